"""Every feature of the trainer with every callback: the training is bitwise that without."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nettrace as nt
from nettrace import landscape
from nettrace.callbacks import (
    CollectiveVariables,
    Curvature,
    FisherTrace,
    GradientStatistics,
    LandscapeProbe,
    NTKTrace,
    StabilityMonitor,
    Trace,
    WeightFluctuations,
)

pytestmark = [
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
    # What Lightning says of the features themselves.
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling:UserWarning"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that:UserWarning"),
]

#: Of each callback, a quantity that it measures. Another callback is one more line.
CALLBACKS: dict[str, tuple[Callable[..., Trace], str]] = {
    "Trace": (partial(Trace, ["loss", "weights"]), "loss_mean"),
    "NTKTrace": (NTKTrace, "ntk_trace"),
    "FisherTrace": (FisherTrace, "fisher_trace"),
    "CollectiveVariables": (CollectiveVariables, "collective_trace_papyrus"),
    "GradientStatistics": (
        partial(GradientStatistics, ["gradients", "ntk", "fisher"]),
        "gradients_fisher_trace",
    ),
    "WeightFluctuations": (
        partial(WeightFluctuations, ["weights/variation", "loss/mean"], length=4),
        "loss_mean",
    ),
    # Without what is not defined before the first step of Adam.
    "Curvature": (partial(Curvature, ["hessian/lambda_max", "hessian/trace"]), "hessian_trace"),
    "StabilityMonitor": (
        partial(StabilityMonitor, ["hessian/lambda_min", "hessian/gradient_sharpness"]),
        "hessian_lambda_min",
    ),
}


# Networks ----------------------------------------------------------------------------------------


def manual(network: type[Any], optimizers: int = 1) -> type[Any]:
    """The same with optimizers that are stepped by hand, in turn."""

    class Manual(network):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = super().training_step(batch, index)
            found = self.optimizers()
            optimizer = (found if isinstance(found, list) else [found])[index % optimizers]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            parts = (self.net[:4], self.net[4:]) if optimizers > 1 else (self.net,)
            return [torch.optim.AdamW(part.parameters(), 0.01) for part in parts]

    return Manual


def unpacking(unpack: Callable[[Any], Any], network: type[Any]) -> type[Any]:
    """The same with batches that are not pairs."""

    class Unpacking(network):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step(unpack(batch), index)

        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(unpack(batch), index)

    return Unpacking


def taking(name: str, network: type[Any]) -> type[Any]:
    """The same with an input of another name."""

    class Taking(network):
        def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
            return super().forward(*inputs, *(named[name] for _ in range(not inputs)))

    return Taking


def returning(kind: str, network: type[Any]) -> type[Any]:
    """The same with steps that return a dict, or at times nothing, which skips the update."""

    class Returning(network):
        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            if kind == "dict":
                return {"loss": loss, "noise": torch.rand(3), "name": "a text"}
            return None if index % 2 else loss

    return Returning


def several_validations(network: type[Any]) -> type[Any]:
    class Several(network):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            loss = F.cross_entropy(self(batch[0]) + torch.randn(3), batch[1])
            self.log(f"loss_{dataloader_idx}", loss, add_dataloader_idx=False)

    return Several


def checkpointed(reentrant: bool, network: type[Any]) -> type[Any]:
    class Checkpointed(network):
        def forward(self, x: Tensor) -> Tensor:
            x = x if x.requires_grad or not reentrant else x.detach().requires_grad_()
            first, second = self.net[:4], self.net[4:]
            return second(checkpoint(first, x, use_reentrant=reentrant))

    return Checkpointed


def compiled(backend: str, network: type[Any]) -> type[Any]:
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    class Compiled(network):
        def __init__(self) -> None:
            super().__init__()
            torch._dynamo.reset()  # it compiles one function only so often
            self.net = torch.compile(self.net, backend=counted)

        def on_train_end(self) -> None:
            assert graphs

    return Compiled


def optimized(name: str, network: type[Any]) -> type[Any]:
    class Optimized(network):
        def __init__(self) -> None:
            super().__init__(name)

    return Optimized


def own_loader(network: type[Any]) -> type[Any]:
    class Loading(network):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return shuffled(batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return validated()

    return Loading


def scheduled(network: type[Any]) -> type[Any]:
    class Scheduled(network):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return Scheduled


def normed(network: type[Any]) -> type[Any]:
    """The same with a norm that iterates on buffers whenever it is called in training."""

    class Normed(network):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.utils.parametrizations.spectral_norm(self.net[7])

    return Normed


def interrupted(error: type[BaseException], network: type[Any]) -> type[Any]:
    """The same, ended from without in its third step."""

    class Interrupted(network):
        def training_step(self, batch: Any, index: int) -> Any:
            if self.global_step == 2:
                raise error("enough")
            return super().training_step(batch, index)

    return Interrupted


# Data --------------------------------------------------------------------------------------------


class Shuffled(training.Stream):
    """A stream that draws its order and noise."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = training.Augmented()
        yield from (samples[i] for i in torch.randperm(len(samples)).tolist())


@dataclass
class Both:
    """A batch as a dataclass."""

    features: Tensor
    labels: Tensor


def collated(make: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
    """A loader of batches of another kind."""

    def collate(samples: list[tuple[Tensor, Tensor]]) -> Any:
        return make(*(torch.stack(several) for several in zip(*samples, strict=True)))

    return lambda: training.loader(training.Augmented(), shuffle=True, collate_fn=collate)


def shuffled(seed: int = 0, **options: Any) -> Any:
    return training.loader(training.Augmented(seed), shuffle=True, **options)


def fixed() -> nt.Probe:
    samples = training.Samples(seed=2)
    return nt.Probe(samples.inputs, samples.targets)


# Features ----------------------------------------------------------------------------------------


def fit(case: Feature, namespace: str, folder: Path, model: Any, callbacks: list[Any]) -> None:
    """One training, as most features are tried."""
    callbacks = [*callbacks, *case.beside(import_module(f"{namespace}.callbacks"))]
    logger = import_module(f"{namespace}.loggers").CSVLogger(folder, version=0)
    settings = {"namespace": namespace, "logger": logger, "default_root_dir": folder}
    options = {**settings, **case.options(namespace)}
    training.fit(callbacks, model, case.data(), case.validation(), **options)


def resumed(case: Feature, namespace: str, folder: Path, model: Any, callbacks: list[Any]) -> None:
    """A training that is left after two steps and taken up by another process, as it were."""
    kinds = import_module(f"{namespace}.callbacks")
    keep = kinds.ModelCheckpoint(folder, "kept", enable_version_counter=False)
    options = {"namespace": namespace, "enable_checkpointing": True}
    first = copy.deepcopy(callbacks)
    training.fit([*first, keep], type(model)(), case.data(), max_steps=2, **options)
    options["ckpt_path"] = folder / "kept.ckpt"
    training.fit([*callbacks, keep], model, case.data(), **options)


def fit_alone(
    case: Feature, namespace: str, folder: Path, model: Any, callbacks: list[Any]
) -> None:
    """One training on the network's own data."""
    callbacks = [*callbacks, *case.beside(import_module(f"{namespace}.callbacks"))]
    training.trainer(callbacks, namespace=namespace, default_root_dir=folder).fit(model)


def tuned(case: Feature, namespace: str, folder: Path, model: Any, callbacks: list[Any]) -> None:
    """A training after the tuner looked for its learning rate."""
    trainer = training.trainer(callbacks, namespace=namespace, default_root_dir=folder)
    model.lr = 0.01
    tuner = import_module(f"{namespace}.tuner").Tuner(trainer)
    tuner.lr_find(model, case.data(), num_training=4, update_attr=False)
    trainer.fit(model, case.data())


@dataclass(frozen=True)
class Feature:
    """A feature of the trainer: how a training differs from a plain one.

    Args:
        network: from a network's class to that of this training.
        data: makes what is trained on.
        validation: makes what is validated on.
        options: of the trainer, by its namespace.
        beside: other callbacks, made from the namespace's.
        probe: for data from which a default probe cannot be taken.
        train: how it is trained.
        ends: how it ends, if not by itself.
        steps: at which is measured, of those that are even.
        missing: why nothing can be measured, if so.
    """

    network: Callable[[type[Any]], type[Any]] = lambda network: network
    data: Callable[[], Any] = shuffled
    validation: Callable[[], Any] = lambda: None
    options: Callable[[str], dict[str, Any]] = lambda namespace: {}
    beside: Callable[[Any], list[Any]] = lambda callbacks: []
    probe: Callable[[], nt.Probe] | None = None
    train: Callable[..., None] = fit
    ends: tuple[type[BaseException], ...] = ()
    steps: tuple[int, ...] = (0, 2, 4)
    missing: str = ""


def options(**given: Any) -> Callable[[str], dict[str, Any]]:
    return lambda namespace: given


def scaler(initial: float) -> Callable[[str], dict[str, Any]]:
    """16-mixed as on a GPU; asked for by name, Lightning would take bfloat16 on the CPU."""

    def made(namespace: str) -> dict[str, Any]:
        kind = import_module(f"{namespace}.plugins").MixedPrecision
        return {"plugins": kind("16-mixed", "cpu", torch.amp.GradScaler("cpu", initial))}

    return made


def average(callbacks: Any) -> list[Any]:
    ema = torch.optim.swa_utils.get_ema_avg_fn(0.5)
    return [callbacks.WeightAveraging(avg_fn=ema)]


def swa(callbacks: Any) -> list[Any]:
    return [callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]


def stopping(callbacks: Any) -> list[Any]:
    stop = callbacks.EarlyStopping("loss_step", stopping_threshold=99.0)
    return [stop]


validated = partial(training.loader, training.Augmented(seed=1))
both = {"validation": validated}

FEATURES: dict[str, Feature] = {
    "plain": Feature(),
    "validation": Feature(**both),
    "accumulation": Feature(options=options(accumulate_grad_batches=2)),
    "accumulation that changes": Feature(
        beside=lambda c: [c.GradientAccumulationScheduler({0: 2, 1: 1})]
    ),
    "clipping by norm": Feature(options=options(gradient_clip_val=0.1)),
    "clipping by value": Feature(
        options=options(gradient_clip_val=0.01, gradient_clip_algorithm="value")
    ),
    "manual optimisation": Feature(manual),
    "several optimizers": Feature(partial(manual, optimizers=2)),
    "closures that are called again": Feature(partial(optimized, "LBFGS")),
    "learning-rate schedule": Feature(scheduled),
    "several training loaders": Feature(
        partial(unpacking, lambda batch: batch["a"]),
        lambda: {"a": shuffled(), "b": shuffled(3, batch_size=2)},
    ),
    "several validation loaders": Feature(
        several_validations, validation=lambda: [validated(), shuffled(4)]
    ),
    "dict batches": Feature(
        lambda n: taking("features", unpacking(lambda b: (b["features"], b["labels"]), n)),
        collated(lambda x, y: {"features": x, "labels": y}),
    ),
    "dataclass batches": Feature(
        lambda n: taking("features", unpacking(lambda b: (b.features, b.labels), n)),
        collated(Both),
    ),
    "tuple batches": Feature(
        partial(unpacking, lambda b: (b[0], b[2])),
        collated(lambda x, y: (x, torch.arange(len(x)), y)),
        probe=fixed,
    ),
    "tuple batches without a probe": Feature(
        partial(unpacking, lambda b: (b[0], b[2])),
        collated(lambda x, y: (x, torch.arange(len(x)), y)),
        missing="cannot be called with the probe's inputs, a tuple.*forward=lambda",
    ),
    "nested batches": Feature(
        partial(unpacking, lambda b: (b["data"][0]["x"], b["data"][1])),
        collated(lambda x, y: {"data": [{"x": x}, y], "id": torch.arange(len(x))}),
        probe=fixed,
    ),
    "steps that return a dict": Feature(partial(returning, "dict")),
    "steps that return None": Feature(partial(returning, "None")),
    "workers": Feature(data=lambda: shuffled(num_workers=1, persistent_workers=True)),
    "a stream": Feature(data=lambda: training.loader(Shuffled()), probe=fixed),
    "a sanity check": Feature(options=options(num_sanity_val_steps=2), **both),
    "fast_dev_run": Feature(options=options(fast_dev_run=2), steps=(0, 2), **both),
    "overfit_batches": Feature(options=options(overfit_batches=2)),
    "limited batches": Feature(
        options=options(limit_train_batches=3, limit_val_batches=1, val_check_interval=2), **both
    ),
    "a learning-rate finder": Feature(train=tuned),
    "a learning-rate finder as a callback": Feature(
        scheduled,
        beside=lambda c: [c.LearningRateFinder(num_training_steps=4, update_attr=False)],
    ),
    "a batch-size finder": Feature(
        own_loader,
        beside=lambda c: [c.BatchSizeFinder(max_trials=2, steps_per_trial=1)],
        train=fit_alone,
    ),
    "early stopping": Feature(beside=stopping, steps=(0, 2, 4), options=options(max_steps=9)),
    "stochastic weight averaging": Feature(
        options=options(max_steps=-1, max_epochs=3), beside=swa, steps=(0, 2, 4, 6, 8, 10, 12)
    ),
    "weight averaging": Feature(beside=average, **both),
    "checkpointing, not reentrant": Feature(partial(checkpointed, False)),
    "checkpointing, reentrant": Feature(partial(checkpointed, True)),
    "torch.compile, eager": Feature(partial(compiled, "eager")),
    "torch.compile, aot_eager": Feature(partial(compiled, "aot_eager")),
    "bf16-mixed": Feature(options=options(precision="bf16-mixed")),
    "16-mixed with a scaler": Feature(options=scaler(2.0**8)),
    "16-mixed with updates that overflow": Feature(options=scaler(2.0**60)),
    "bf16-true": Feature(options=options(precision="bf16-true")),
    "64-true": Feature(options=options(precision="64-true")),
    "deterministic": Feature(options=options(deterministic=True)),
    "anomaly detection": Feature(options=options(detect_anomaly=True)),
    "validation in inference mode": Feature(
        options=options(inference_mode=True, val_check_interval=1), **both
    ),
    "validation without gradients": Feature(
        options=options(inference_mode=False, val_check_interval=1), **both
    ),
    "buffers that forwards iterate on": Feature(normed),
    "checkpoint and resume": Feature(train=resumed),
    "an exception": Feature(
        partial(interrupted, ZeroDivisionError), ends=(ZeroDivisionError,), steps=(0, 2)
    ),
    "Ctrl-C": Feature(partial(interrupted, KeyboardInterrupt), ends=(SystemExit,), steps=(0, 2)),
}


# The matrix --------------------------------------------------------------------------------------


@contextmanager
def undone() -> Iterator[None]:
    """Puts back what Lightning sets for the whole process."""
    handler = signal.getsignal(signal.SIGINT)
    with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled()):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            signal.signal(signal.SIGINT, handler)


def outcome(feature: str, namespace: str, callbacks: list[Trace], folder: Path) -> dict[str, Any]:
    """All that comes of a training with a feature."""
    case = FEATURES[feature]
    training.seed()
    model = case.network(training.delicate(namespace))()
    ends = pytest.raises(case.ends) if case.ends else nullcontext()
    with undone(), ends:
        case.train(case, namespace, folder, model, callbacks)
    return training.result(model.trainer, model)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The outcome without callbacks, of each kind once."""

    @cache
    def trained(feature: str, namespace: str) -> dict[str, Any]:
        return outcome(feature, namespace, [], tmp_path_factory.mktemp("bare"))

    return trained


def cells() -> Iterator[Any]:
    """Each feature with two of the callbacks, in turn, one in each namespace; one by default."""
    for row, feature in enumerate(FEATURES):
        for number in (0, 1):
            column = (row + number) % len(CALLBACKS)
            namespace = training.NAMESPACES[(row // 2 + number) % 2]
            marks = [pytest.mark.slow] if number or "torch.compile" in feature else []
            marks += [training.recent] if feature == "weight averaging" else []
            callback = list(CALLBACKS)[column]
            yield pytest.param(
                feature, callback, namespace, marks=marks, id=f"{feature}-{callback}-{namespace}"
            )


#: What a training step cannot tell.
OWN_MISSING = {"16-mixed with updates that overflow": "the loss gradients of .* overflow"}
#: Where the updates in a row are too few for a window.
SHORT = ("fast_dev_run", "checkpoint and resume")


@pytest.mark.parametrize(("feature", "callback", "namespace"), list(cells()))
def test_a_training_with_a_feature_is_bitwise_the_same_with_a_callback(
    feature: str, callback: str, namespace: str, bare: Any, tmp_path: Path
) -> None:
    case, (kind, quantity) = FEATURES[feature], CALLBACKS[callback]
    expected = bare(feature, namespace)
    own = callback == "GradientStatistics"  # which needs no probe, nor what a probe cannot tell
    missing = OWN_MISSING.get(feature, "") if own else case.missing
    if callback == "WeightFluctuations" and feature in SHORT:
        quantity, missing = "weights_variation", "the window has 3 of 4 snapshots"
    options = {} if own else {"probe": case.probe and case.probe()}
    measuring = kind(every=2, to=tmp_path / "trace", **options)
    says = pytest.warns(nt.MissingMeasureWarning, match=missing)
    with says if missing else nullcontext():
        found = outcome(feature, namespace, [measuring], tmp_path)
    assert training.differences(expected, found) == []
    assert found["hooks"] == 0
    assert len(expected["course"]) >= 2  # there was something to disturb
    trace = nt.open(tmp_path / "trace")
    steps = trace.step.values.tolist()
    assert steps in (list(case.steps), list(case.steps[:-1])) if own else steps == list(case.steps)
    assert np.isfinite(trace[quantity].values).all() != bool(missing)
    reasons = {name: v.attrs["missing"] for name, v in trace.items() if "missing" in v.attrs}
    if missing:
        assert re.search(missing, reasons[quantity])
    else:
        assert reasons == {}


def probed() -> Iterator[Any]:
    """Each feature in one namespace, in turn."""
    for row, feature in enumerate(FEATURES):
        namespace = training.NAMESPACES[row % 2]
        marks = [pytest.mark.slow] if row % 4 or "torch.compile" in feature else []
        marks += [training.recent] if feature == "weight averaging" else []
        yield pytest.param(feature, namespace, marks=marks, id=f"{feature}-{namespace}")


@pytest.mark.parametrize(("feature", "namespace"), list(probed()))
def test_a_training_with_a_feature_is_bitwise_the_same_with_probes_of_the_landscape(
    feature: str, namespace: str, bare: Any, tmp_path: Path
) -> None:
    case = FEATURES[feature]
    function = partial(landscape.slice_1d, points=3)
    options: dict[str, Any] = {"every": 2, "to": tmp_path / "found"}
    probing = LandscapeProbe(function, probe=case.probe and case.probe(), **options)
    expected = bare(feature, namespace)
    says = pytest.warns(nt.MissingMeasureWarning, match=case.missing)
    with says if case.missing else nullcontext():
        found = outcome(feature, namespace, [probing], tmp_path)
    assert training.differences(expected, found) == []
    result = landscape.open(tmp_path / "found")["slice_1d"]
    assert result.step.values.tolist() == list(case.steps)
    if case.missing:
        assert all(re.search(case.missing, reason) for reason in result.missing.values.tolist())
    else:
        assert np.isfinite(result.loss.values).all()


PLANTED = dict(zip(training.CARELESS, FEATURES, strict=False))


@pytest.mark.parametrize("deed", PLANTED)
def test_one_careless_deed_turns_a_cell_red(
    deed: str, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb, where = training.CARELESS[deed]
    measure = nt.Tracer.measure

    def careless(self: Any, model: Any, step: int, *options: Any) -> Any:
        if step == 2:
            disturb(model)
        return measure(self, model, step, *options)

    monkeypatch.setattr(nt.Tracer, "measure", careless)
    found = outcome(PLANTED[deed], training.NAMESPACES[0], [NTKTrace(every=2)], tmp_path)
    differences = training.differences(bare(PLANTED[deed], training.NAMESPACES[0]), found)
    assert any(name.endswith(f"/{where}") for name in differences), differences
