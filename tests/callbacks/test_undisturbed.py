"""Training with callbacks is bitwise the training without, and what it takes for that."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import nettrace as nt
from nettrace import freeze
from nettrace.callbacks import (
    CollectiveVariables,
    FisherTrace,
    GradientStatistics,
    NTKTrace,
    RepresentationGeometry,
    Trace,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]


# A whole training -------------------------------------------------------------------------------


def outcome(
    namespace: str, optimizer: str, callbacks: list[Any], folder: Any, *, validate: bool = True
) -> dict[str, Any]:
    """Trains under all that can be disturbed, and gives all that came of it."""
    training.seed()
    model = training.delicate(namespace)(optimizer)
    logger = import_module(f"{namespace}.loggers").CSVLogger(folder, version=0)
    trainer = training.fit(
        callbacks,
        model,
        training.loader(training.Augmented(), shuffle=True),
        training.loader(training.Augmented(seed=1)) if validate else None,
        namespace=namespace,
        max_steps=6,
        accumulate_grad_batches=2,
        logger=logger,
    )
    return training.result(trainer, model)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The outcome of a training without callbacks, of each kind once."""

    @cache
    def trained(namespace: str, optimizer: str, validate: bool = True) -> dict[str, Any]:
        return outcome(namespace, optimizer, [], tmp_path_factory.mktemp("bare"), validate=validate)

    return trained


@pytest.mark.parametrize("namespace", training.NAMESPACES)
@pytest.mark.parametrize(
    ("probe", "optimizer"),
    [("validation", "AdamW"), ("training", "SGD"), ("given", "AdamW"), ("several", "SGD")],
)
def test_training_is_bitwise_the_same_with_callbacks(
    namespace: str, probe: str, optimizer: str, bare: Any, tmp_path: Any
) -> None:
    samples = training.Samples(seed=2)
    own = nt.Probe(samples.inputs, samples.targets)
    given = {"given": own, "several": {"one": own, "two": own}}.get(probe)
    options = {"every": 1, "to": tmp_path / "trace", "log": True, "probe": given}
    kinds = (NTKTrace, FisherTrace, CollectiveVariables, RepresentationGeometry, Trace)
    callbacks = [kind(**options) for kind in kinds]
    optimizer_sees = {**options, "every": range(1, 100)}
    callbacks += [Trace("weights", **options), Trace("ntk/preconditioned_trace", **optimizer_sees)]
    callbacks += [GradientStatistics(every=1, to=tmp_path / "trace")]
    validate = probe != "training"
    found = outcome(namespace, optimizer, callbacks, tmp_path, validate=validate)
    assert training.differences(bare(namespace, optimizer, validate), found) == []
    assert found["hooks"] == 0
    trace = nt.open(tmp_path / "trace")  # there is no law about callbacks that do not measure
    assert trace.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not any("missing" in variable.attrs for variable in trace.values())
    assert "own loss is this" in trace.loss_mean.attrs["loss_checked"]  # the first batch was seen


def test_a_training_is_bitwise_the_same_without_callbacks(bare: Any, tmp_path: Any) -> None:
    again = outcome("pytorch_lightning", "AdamW", [], tmp_path)
    assert training.differences(bare("pytorch_lightning", "AdamW"), again) == []


@pytest.mark.parametrize("deed", training.CARELESS)
def test_one_careless_deed_in_one_measurement_is_found(
    deed: str, bare: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb, where = training.CARELESS[deed]
    measure = nt.Tracer.measure

    def careless(self: Any, model: Any, step: int, *options: Any) -> Any:
        if step == 1:
            disturb(model)
        return measure(self, model, step, *options)

    monkeypatch.setattr(nt.Tracer, "measure", careless)
    found = outcome("pytorch_lightning", "AdamW", [NTKTrace(every=1)], tmp_path)
    differences = training.differences(bare("pytorch_lightning", "AdamW"), found)
    assert any(name.endswith(f"/{where}") for name in differences), differences


def test_deeds_within_a_measurement_are_undone(bare: Any, tmp_path: Any) -> None:
    def careless(model: Any, x: Tensor) -> Tensor:
        torch.rand(()), np.random.rand(), random.random()
        model.net[1].num_batches_tracked.add_(1)
        training.write_grad(model)
        outputs = model(x)
        model.net[3].train()
        model.net[5].train()
        return outputs

    samples = training.Samples()
    # Named, for a forward that draws before dropout does gives another loss than the training's.
    options = {"forward": careless, "likelihood": "categorical"}
    probe = nt.Probe(samples.inputs, samples.targets, **options)
    callback = NTKTrace(every=1, probe=probe, to=tmp_path / "trace")
    found = outcome("pytorch_lightning", "AdamW", [callback], tmp_path)
    assert training.differences(bare("pytorch_lightning", "AdamW"), found) == []
    assert np.isfinite(nt.open(tmp_path / "trace").ntk_trace.values).all()


# What frozen undoes ------------------------------------------------------------------------------


class Wild(nn.Module):
    """Disturbs in its forward whatever there is to disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("gain", torch.ones(3))
        self.calls = 0
        self.seen = torch.zeros(3)
        self.history: list[int] = []
        self.linear.weight.grad = torch.full((3, 4), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.linear(x))) * self.gain
        torch.rand(1), np.random.rand(), random.random()
        self.calls += 1
        self.added = 1
        self.history.append(self.calls)
        self.seen.add_(y.detach().sum(0))
        self.gain.mul_(2)
        self.norm.running_var.add_(1)
        self.train(not self.training)
        self.norm.train()
        self.linear(x).sum().backward()  # adds to the gradient that is there, in place
        self.linear.bias.requires_grad_(False)
        return y


def everything(model: Wild) -> dict[str, Any]:
    return {
        **training.state(model),
        "attribute seen": model.seen.clone(),
        "attribute calls": model.calls,
        "attribute history": list(model.history),
        "attribute names": sorted(vars(model)),
    }


@pytest.mark.parametrize("ends", ["well", "in an error"])
def test_what_a_wild_forward_does_is_undone(ends: str) -> None:
    model = Wild()
    model.dropout.eval()
    before, gradient, gain = everything(model), model.linear.weight.grad, model.gain
    raises: AbstractContextManager[Any] = nullcontext()
    if ends == "in an error":
        raises = pytest.raises(ZeroDivisionError)
    with raises, freeze.frozen(model):
        model(torch.randn(2, 4))
        assert training.differences(before, everything(model)) != []
        if ends == "in an error":
            1 / 0  # noqa: B018
    assert training.differences(before, everything(model)) == []
    assert model.linear.weight.grad is gradient
    assert model.gain is gain


@pytest.mark.parametrize("number", [1, 4, 9])
def test_what_memory_did_not_suffice_to_copy_is_left_alone(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Wild()
    before = {name: id(value) for name, value in [*vars(model).items(), *model.named_buffers()]}
    copies, copy = itertools.count(1), freeze.private_copy

    def short(*arguments: Any) -> Any:
        if next(copies) == number:
            raise MemoryError
        return copy(*arguments)

    monkeypatch.setattr(freeze, "private_copy", short)
    with pytest.raises(MemoryError), freeze.frozen(model):
        pytest.fail("there was memory")
    found = {name: id(value) for name, value in [*vars(model).items(), *model.named_buffers()]}
    assert found == before


PARTS = {
    "random_states": {"random torch", "random numpy", "random python"},
    "_parameters": {"grad linear.weight", "requires_grad linear.bias"},
    "_attributes": {
        *("buffer gain", "buffer norm.running_var", "attribute seen"),
        *("attribute calls", "attribute history", "attribute names"),
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_frozen_is_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wild()
    before = everything(model)
    monkeypatch.setattr(freeze, part, lambda *_: nullcontext())
    with freeze.frozen(model):
        model(torch.randn(2, 4))
    found = {name.removeprefix("/") for name in training.differences(before, everything(model))}
    assert found & PARTS[part]
    assert not found & set().union(*PARTS.values()) - PARTS[part]


@pytest.mark.parametrize("guarded", [True, False])
def test_modules_are_evaluated_in_eval_mode(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    if not guarded:
        monkeypatch.setattr(freeze, "_modes", lambda *_: nullcontext())
    with freeze.frozen(model):
        assert {module.training for module in model.modules()} == {not guarded}
    assert {module.training for module in model.modules()} == {True}


@pytest.mark.parametrize(("network", "is_used"), [(nn.LSTM(2, 3), False), (nn.Linear(2, 3), True)])
def test_recurrent_networks_have_derivatives_in_eval_mode(
    network: nn.Module, is_used: bool
) -> None:
    """cuDNN's have none, on GPUs."""
    with freeze.frozen(nn.Sequential(network)):
        assert torch.backends.cudnn.enabled is is_used
    assert torch.backends.cudnn.enabled is True


class Notes(nn.Module):
    """Keeps something, and changes it in place at each call."""

    def __init__(self, name: str, kept: Any, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.name, self.change = name, change
        setattr(self, name, kept)

    def forward(self) -> None:
        self.change(getattr(self, self.name))


KEPT: dict[str, tuple[str, Callable[[], Any], Callable[[Any], Any]]] = {
    "a list": ("kept", list, lambda kept: kept.append(1)),
    "a set": ("kept", set, lambda kept: kept.add(1)),
    "a dict": ("kept", dict, lambda kept: kept.update(a=1)),
    "a tensor": ("kept", lambda: torch.zeros(2), lambda kept: kept.add_(1)),
    "a private list": ("_kept", list, lambda kept: kept.append(1)),
    "a private tensor": ("_kept", lambda: torch.zeros(2), lambda kept: kept.add_(1)),
    "a deque": ("kept", deque, lambda kept: kept.append(1)),
    "a list of tensors": ("kept", lambda: [torch.zeros(2)], lambda kept: kept[0].add_(1)),
    "a dict of lists": ("kept", lambda: {"a": []}, lambda kept: kept["a"].append(1)),
    "a generator": (
        "kept",
        lambda: torch.Generator().manual_seed(0),
        lambda kept: torch.rand(1, generator=kept),
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_module_keeps_is_left_alone(kind: str) -> None:
    name, make, change = KEPT[kind]
    model = Notes(name, make(), change)
    with freeze.frozen(model):
        model()
    kept, fresh = getattr(model, name), make()
    if isinstance(kept, torch.Generator):
        kept, fresh = kept.get_state(), fresh.get_state()
    assert training.differences(kept, fresh) == []


def normalise(weight: Tensor) -> None:
    with torch.no_grad():
        weight.div_(weight.norm())


def normalise_data(weight: Tensor) -> None:
    weight.data.div_(weight.norm())


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data / weight.norm()


WRITERS: dict[str, Callable[[Tensor], None]] = {
    "in place": normalise,
    "through .data": normalise_data,
    "by a new .data": replace_data,
}


@pytest.mark.parametrize("way", WRITERS)
def test_weights_that_a_forward_writes_to_are_left_alone(way: str) -> None:
    model = nn.Linear(4, 3)
    before = training.state(model)
    with freeze.frozen(model):
        WRITERS[way](model.weight)
        assert training.differences(before["weight weight"], model.weight.detach()) != []
    assert training.differences(before, training.state(model)) == []


def test_embeddings_that_scale_what_they_look_up_are_left_alone() -> None:
    model = nn.Embedding(3, 4, max_norm=0.1)
    before = training.state(model)
    with freeze.frozen(model):
        model(torch.tensor([0, 2]))
    assert training.differences(before, training.state(model)) == []


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_gradients_flow_in_full_precision_whatever_is_around(
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = torch.randn(2, 4)
    with around():
        before = training.state(model)
        with freeze.frozen(model):
            outputs = model(x)
            (gradient,) = torch.autograd.grad(outputs.sum(), model[0].weight)
        assert training.differences(before, training.state(model)) == []
    assert (outputs.dtype, gradient.dtype) == (torch.float32, torch.float32)


class Copied(AbstractContextManager["Copied"]):
    """Undoes what a forward did by writing values back: the way that does not do."""

    def __init__(self, model: Wild) -> None:
        self.model = model

    def __enter__(self) -> Copied:
        self.gain = self.model.gain.clone()
        return self

    def __exit__(self, *_: Any) -> None:
        self.model.gain.copy_(self.gain)


@pytest.mark.parametrize("guard", [freeze.frozen, Copied])
def test_a_graph_recorded_before_stays_valid(guard: Callable[..., Any]) -> None:
    model = Wild().eval()
    x = torch.randn(2, 4)
    loss = (model.linear(x) * model.gain).square().sum()  # keeps the buffer for its backward
    (expected,) = torch.autograd.grad(loss, model.linear.weight, retain_graph=True)
    with guard(model):
        model(x)
    if guard is Copied:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    model.linear.weight.grad = None
    loss.backward()
    assert torch.equal(model.linear.weight.grad, expected)


# What else a measurement touches -----------------------------------------------------------------


class Jitter:
    """A transform that draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.generator.normal(size=x.shape)).float()


class Jittered(training.Samples):
    """Samples with noise from a generator that belongs to the data set or to its transform."""

    def __init__(self, jitter: Any) -> None:
        super().__init__()
        if isinstance(jitter, Jitter):
            self.transform = jitter
        else:
            self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (self.transform(x) if hasattr(self, "transform") else Jitter.__call__(self, x)), y


OWNERS: dict[str, Callable[[], Any]] = {
    "data set": lambda: Jittered(None),
    "data set of a subset": lambda: Subset(Jittered(None), range(16)),
    "data set of several": lambda: ConcatDataset([training.Samples(count=4), Jittered(None)]),
    "transform": lambda: Jittered(Jitter()),
}


@pytest.mark.parametrize("owner", OWNERS)
def test_a_default_probe_leaves_the_generators_of_the_data_alone(owner: str) -> None:
    trained = []
    for callbacks in ([], [NTKTrace()]):
        model = training.network()()
        training.fit(callbacks, model, training.loader(OWNERS[owner]()))
        trained.append(training.state(model))
    assert training.differences(*trained) == []


def test_a_default_probe_does_not_copy_the_data() -> None:
    class Noted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            places.add(self.tensors[0].data_ptr())
            return super().__getitem__(index)

    places: set[int] = set()
    samples = training.Samples()
    training.fit(NTKTrace(), data=training.loader(Noted(samples.inputs, samples.targets)))
    assert places == {samples.inputs.data_ptr()}


def test_a_default_probe_is_taken_from_data_sets_that_refer_to_each_other() -> None:
    class Family:
        copies = 0

        def __copy__(self) -> Family:
            Family.copies += 1
            if Family.copies > 100:
                pytest.fail("copies in circles")
            twin = Family.__new__(Family)
            vars(twin).update(vars(self))
            return twin

    family = Family()
    for name in ("one", "other"):
        setattr(family, name, training.Samples())
        getattr(family, name).family = family
    trainer = training.fit(NTKTrace(), data=training.loader(family.one))
    assert "ntk/trace" in trainer.callback_metrics


def test_what_a_batch_hook_counts_is_left_alone() -> None:
    class Counting(training.network()):
        batches = 0

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.batches += 1
            return batch

    model = Counting()
    training.fit(NTKTrace(), model)
    assert model.batches == 4


def test_what_a_forward_logs_is_left_alone(tmp_path: Any) -> None:
    class Talkative(training.network()):
        def forward(self, x: Tensor) -> Tensor:
            outputs = self.net(x)
            self.log("level", outputs.mean(), on_step=True, on_epoch=True)
            return outputs

    logged = []
    for number, callbacks in enumerate(([], [NTKTrace(every=[2, 4], to=tmp_path / "trace")])):
        logger = import_module("pytorch_lightning.loggers").CSVLogger(tmp_path, version=number)
        training.fit(callbacks, Talkative(), logger=logger)
        names = ("level_step", "level_epoch")
        logged.append({name: training.column(logger.log_dir, name) for name in names})
    assert training.differences(*logged) == []
    assert np.isfinite(nt.open(tmp_path / "trace").ntk_trace.values).all()
