"""How the callbacks get on with a trainer, its data, its other callbacks and its failures."""

from __future__ import annotations

import json
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import training
import xarray as xr
from torch import Tensor
from torch.utils.data import DataLoader

import nettrace as nt
from nettrace.callbacks import CollectiveVariables, FisherTrace, NTKTrace, Trace, session
from nettrace.statistics import Statistics

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

both_namespaces = pytest.mark.parametrize("namespace", training.NAMESPACES)


def steps(folder: Path) -> list[int]:
    return nt.open(folder).step.values.tolist()


def reasons(trace: xr.Dataset, name: str = "ntk_trace") -> dict[str, str]:
    """Why a quantity is missing, by step."""
    return json.loads(trace[name].attrs.get("missing", "{}"))


def value_of(name: str, records: list[nt.Record]) -> float:
    (value,) = [record.value for record in records if record.name == name]
    return float(value)


def complaints(caught: Any) -> list[str]:
    """Our own among the warnings that were caught."""
    return [str(w.message) for w in caught if issubclass(w.category, nt.MissingMeasureWarning)]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[nt.Probe]:
    """The probes of the looks that are taken at the network, in order."""
    found: list[nt.Probe] = []
    begin = Statistics.__init__

    def counted(self: Statistics, model: Any, probe: nt.Probe, *args: Any, **kwargs: Any) -> None:
        found.append(probe)
        begin(self, model, probe, *args, **kwargs)

    monkeypatch.setattr(Statistics, "__init__", counted)
    return found


# When they measure -------------------------------------------------------------------------------


@both_namespaces
def test_a_callback_can_be_passed_bare(namespace: str, tmp_path: Path) -> None:
    trainer = training.fit(NTKTrace(to=tmp_path, every=1), namespace=namespace)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert {"ntk/trace", "ntk/entropy"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (3, [0, 3, 6]),
        (4, [0, 4]),
        (100, [0]),
        ([3, 6], [3, 6]),
        (lambda step: step == 5, [5]),
        (nt.windows(2, every=4), [0, 1, 4, 5]),
        (nt.epochs(1), [0, 4]),
        (nt.with_last(4), [0, 4, 6]),
        (nt.with_last(3), [0, 3, 6]),
    ],
    ids=[
        *("each", "third", "fourth", "hundredth", "chosen", "function"),
        *("windows", "epochs", "last", "last anyway"),
    ],
)
def test_measures_at_the_steps_of_the_schedule_and_no_others(
    every: Any, expected: list[int], tmp_path: Path
) -> None:
    training.fit(Trace("loss", every=every, to=tmp_path), max_steps=6)
    assert steps(tmp_path) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": -1, "max_epochs": 2}, [0, 4, 8]),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}, [0, 2, 4]),
        ({"max_steps": 7, "limit_train_batches": 3}, [0, 3, 6, 7]),
    ],
    ids=["epochs", "accumulated", "limited"],
)
def test_epochs_and_the_last_step_are_those_of_the_trainer(
    options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    callback = Trace("loss", every=nt.with_last(nt.epochs(1)), to=tmp_path)
    training.fit(callback, **options)
    assert steps(tmp_path) == expected


@both_namespaces
def test_a_training_that_stops_early_is_measured_last(namespace: str, tmp_path: Path) -> None:
    class Stopping(import_module(namespace).Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    model = training.network(namespace)()
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    callbacks = [
        Stopping(),
        NTKTrace(every=nt.with_last(2), probe=probe, to=tmp_path / "last"),
        NTKTrace(every=2, probe=probe, to=tmp_path / "plain"),
    ]
    training.fit(callbacks, model, namespace=namespace, max_steps=9)
    assert steps(tmp_path / "last") == [0, 2, 3]
    assert steps(tmp_path / "plain") == [0, 2]
    last = nt.open(tmp_path / "last")
    assert last.batches.values.tolist() == [0, 2, 3]
    after = value_of("ntk/trace", nt.Tracer(probe, "ntk")(model, 3))
    assert last.ntk_trace.values[-1] == after


def test_a_stream_has_no_epochs_to_go_by_but_a_last_step(tmp_path: Path) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    stream = training.loader(training.Stream())
    with (
        pytest.warns(nt.MissingMeasureWarning, match="never measured"),
        pytest.warns(nt.MissingMeasureWarning, match="steps_per_epoch="),
    ):
        training.fit(NTKTrace(every=nt.epochs(1), probe=probe), data=stream)
    callback = NTKTrace(every=nt.with_last([1]), probe=probe, to=tmp_path)
    training.fit(callback, data=stream, max_steps=-1, max_epochs=1)
    assert steps(tmp_path) == [1, 4]


def test_step_0_is_before_any_update_and_the_last_after_all(tmp_path: Path) -> None:
    model = training.network()()
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    tracer = nt.Tracer(probe, "ntk")
    measured = [value_of("ntk/trace", tracer(model, 0))]
    training.fit(NTKTrace(probe=probe, every=4, to=tmp_path), model)
    measured.append(value_of("ntk/trace", tracer(model, 4)))
    assert nt.open(tmp_path).ntk_trace.values.tolist() == measured
    assert measured[0] != measured[1]


def test_a_step_of_several_batches_is_measured_once(tmp_path: Path, looks: list[nt.Probe]) -> None:
    training.fit(NTKTrace(every=1, to=tmp_path), accumulate_grad_batches=2)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 1, 2, 3, 4]
    assert trace.batches.values.tolist()[:4] == [0, 2, 4, 2]
    assert len(looks) == 5


def test_a_step_is_placed_in_its_epoch(tmp_path: Path) -> None:
    training.fit(Trace("loss", every=1, to=tmp_path), max_steps=6)
    trace = nt.open(tmp_path)
    assert trace.batches.values.tolist() == [0, 1, 2, 3, 4, 1, 2]
    assert trace.epoch.values.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_schedule_that_never_fires_says_so() -> None:
    with pytest.warns(nt.MissingMeasureWarning, match=r"never measured.* 4 steps.*every="):
        training.fit(NTKTrace(every=[100]))


def test_the_time_that_it_takes_is_recorded(tmp_path: Path) -> None:
    trainer = training.fit(NTKTrace(every=1, to=tmp_path))
    seconds = nt.open(tmp_path).nettrace_seconds
    assert (seconds > 0).all()
    assert seconds.attrs["units"] == "s"
    assert float(trainer.callback_metrics["nettrace/seconds"]) == np.float32(seconds[-1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")  # on purpose
def test_a_resumed_run_supersedes_what_it_takes_again(tmp_path: Path) -> None:
    class Faster(training.network()):
        def on_train_start(self) -> None:
            self.optimizers().param_groups[0]["lr"] = 0.5

    traces = []
    for model, last, checkpoint in (
        (None, 6, None),
        (Faster(), 8, tmp_path / "step=4.ckpt"),  # resumes from before the end
    ):
        keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(
            tmp_path, "{step}", save_top_k=-1, enable_version_counter=False
        )
        callbacks = [NTKTrace(every=1, to=tmp_path / "trace"), keep]
        options = {"max_steps": last, "enable_checkpointing": True, "ckpt_path": checkpoint}
        training.fit(callbacks, model, **options)
        traces.append(nt.open(tmp_path / "trace").ntk_trace)
    first, second = traces
    assert second.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    same = (second.sel(step=first.step) == first).values.tolist()
    assert same == [True, True, True, True, True, False, False]


def test_a_run_from_the_start_supersedes_all_before_it(tmp_path: Path) -> None:
    training.fit(NTKTrace(every=1, to=tmp_path))
    training.fit(FisherTrace(every=1, to=tmp_path), max_steps=2)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 1, 2]
    assert "ntk_trace" not in trace


# What they share, and with whom ------------------------------------------------------------------


def test_callbacks_share_one_look_a_step(tmp_path: Path, looks: list[nt.Probe]) -> None:
    kinds = (NTKTrace, FisherTrace, CollectiveVariables)
    training.fit([kind(every=2, to=tmp_path) for kind in kinds])
    assert len(looks) == 3
    assert {"ntk_trace", "fisher_trace", "collective_trace_papyrus"} <= nt.open(tmp_path).keys()


def test_callbacks_that_share_a_look_keep_their_own_steps_and_folders(
    tmp_path: Path, looks: list[nt.Probe]
) -> None:
    training.fit(
        [NTKTrace(every=2, to=tmp_path / "ntk"), FisherTrace(every=3, to=tmp_path / "fisher")]
    )
    assert steps(tmp_path / "ntk") == [0, 2, 4]
    assert steps(tmp_path / "fisher") == [0, 3]
    assert len(looks) == 4
    assert "fisher_trace" not in nt.open(tmp_path / "ntk")


def test_callbacks_together_make_as_many_forward_passes_as_one() -> None:
    class Counting(training.network()):
        passes: ClassVar[list[int]] = []  # what an instance keeps is put back

        def forward(self, x: Tensor) -> Tensor:
            self.passes.append(len(x))
            return super().forward(x)

    made = []
    for kinds in ([FisherTrace], [NTKTrace, FisherTrace, CollectiveVariables]):
        Counting.passes.clear()
        training.fit([kind(every=1) for kind in kinds], Counting())
        made.append(list(Counting.passes))
    assert made[0] == made[1]
    assert made[0].count(16) >= 5  # the probe at each of the steps, beside batches of 4


def test_what_is_not_due_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: dict[int, set[str]] = {}
    measure = nt.Tracer.measure

    def noted(self: nt.Tracer, model: Any, step: int, measures: Any, *options: Any) -> Any:
        measured[step] = {measure.name.partition("/")[0] for measure in measures}
        return measure(self, model, step, measures, *options)

    monkeypatch.setattr(nt.Tracer, "measure", noted)
    training.fit([NTKTrace(every=2), FisherTrace(every=3)])
    assert measured == {0: {"ntk", "fisher"}, 2: {"ntk"}, 3: {"fisher"}, 4: {"ntk"}}


@pytest.mark.parametrize(("same", "number"), [(True, 3), (False, 6)])
def test_a_look_is_shared_where_the_probe_is(
    same: bool, number: int, looks: list[nt.Probe]
) -> None:
    samples = training.Samples()
    one, other = (nt.Probe(samples.inputs, samples.targets) for _ in range(2))
    training.fit([NTKTrace(every=2, probe=one), FisherTrace(every=2, probe=one if same else other)])
    assert len(looks) == number


@both_namespaces
@pytest.mark.parametrize(("threshold", "stops_at"), [(np.inf, 4), (-np.inf, 12)])
def test_early_stopping_can_monitor_a_measure(
    namespace: str, threshold: float, stops_at: int
) -> None:
    stop = import_module(f"{namespace}.callbacks").EarlyStopping(
        "ntk/entropy", stopping_threshold=threshold, patience=99, check_on_train_epoch_end=True
    )
    callbacks = [stop, NTKTrace(every=1)]
    trainer = training.fit(callbacks, namespace=namespace, max_steps=12)
    assert trainer.global_step == stops_at


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Any, xr.Dataset]:
    """A `ModelCheckpoint` that monitored a measure, and the trace of that."""
    kept = import_module("pytorch_lightning.callbacks").ModelCheckpoint(
        tmp_path, "{step}", monitor="ntk/trace", mode="min", save_top_k=-1, every_n_train_steps=1
    )
    training.fit([kept, NTKTrace(every=1, to=tmp_path / "trace")], enable_checkpointing=True)
    return kept, nt.open(tmp_path / "trace")


def test_checkpoints_can_be_kept_by_a_measure(checkpoints: tuple[Any, xr.Dataset]) -> None:
    kept, trace = checkpoints
    scores = [float(score) for score in kept.best_k_models.values()]
    assert len(scores) == 4
    assert set(scores) <= set(trace.ntk_trace.values.astype(np.float32).tolist())
    assert float(kept.best_model_score) == min(scores)


def test_a_checkpoint_is_judged_by_its_own_weights(checkpoints: tuple[Any, xr.Dataset]) -> None:
    kept, trace = checkpoints
    for path, score in kept.best_k_models.items():
        step = torch.load(path, weights_only=True)["global_step"]
        assert float(score) == np.float32(trace.ntk_trace.sel(step=step))


@both_namespaces
def test_a_callback_can_be_sent_to_another_process(namespace: str) -> None:
    sent = pickle.loads(pickle.dumps(NTKTrace(every=2)))
    trainer = training.fit(sent, namespace=namespace)
    assert "ntk/trace" in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_measures_in_the_precision_of_the_weights(
    precision: str, given: bool, tmp_path: Path
) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    plain = value_of("ntk/trace", nt.Tracer(probe, "ntk")(training.network()(), 0))
    callback = NTKTrace(every=2, probe=probe if given else None, to=tmp_path)
    training.fit(callback, precision=precision)
    trace = nt.open(tmp_path)
    assert trace.ntk_gram.dtype == (np.float64 if precision == "64-true" else np.float32)
    assert reasons(trace) == {}
    tolerance = {"64-true": 1e-6, "bf16-mixed": 0.0}.get(precision, 2e-2)  # eps of bfloat16: 8e-3
    assert trace.ntk_trace.values[0] == pytest.approx(plain, rel=tolerance, abs=0)


# What they measure on ----------------------------------------------------------------------------


class Watched(DataLoader):
    """Counts how often it is iterated."""

    times = 0

    def __iter__(self) -> Any:
        type(self).times += 1
        return super().__iter__()


@both_namespaces
@pytest.mark.parametrize("source", ["validation", "training"])
def test_a_default_probe_is_evenly_spaced_and_no_loader_is_iterated_for_it(
    namespace: str, source: str, looks: list[nt.Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []
    for callbacks in ([], [NTKTrace(samples=5)]):
        monkeypatch.setattr(Watched, "times", 0)
        data = Watched(training.Samples(), batch_size=4, shuffle=True)
        validation = Watched(training.Samples(seed=1), batch_size=4)
        validation = validation if source == "validation" else None
        training.fit(callbacks, None, data, validation, namespace=namespace)
        times.append(Watched.times)
    assert times[0] == times[1] > 0
    samples = training.Samples(seed=1 if source == "validation" else 0)
    chosen = [0, 3, 6, 9, 12]  # of 16
    assert torch.equal(looks[0].inputs, samples.inputs[chosen])
    assert torch.equal(looks[0].targets, samples.targets[chosen])


@pytest.mark.parametrize("join", [list, lambda loaders: {"a": loaders[0], "b": loaders[1]}])
def test_of_several_loaders_the_first_gives_the_probe(join: Any, looks: list[nt.Probe]) -> None:
    class Many(training.network()):
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            pass

    data = join([training.loader(training.Samples(seed=seed)) for seed in (1, 2)])
    training.fit(NTKTrace(), Many(), validation=data)
    assert torch.equal(looks[0].inputs, training.Samples(seed=1).inputs)


def test_a_probe_is_made_as_the_modules_batches_are(looks: list[nt.Probe]) -> None:
    class Doubling(training.network()):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return 2 * batch[0], batch[1]

    training.fit(NTKTrace(), Doubling())
    assert torch.equal(looks[0].inputs, 2 * training.Samples().inputs)


def test_a_stream_without_a_probe_is_told_what_to_pass(tmp_path: Path) -> None:
    data = training.loader(training.Stream())
    with pytest.warns(nt.MissingMeasureWarning, match=r"pass probe=nettrace\.Probe\(inputs"):
        trainer = training.fit(NTKTrace(to=tmp_path / "trace"), data=data)
    assert trainer.global_step == 4
    assert not (tmp_path / "trace").exists()


def test_a_stream_with_a_probe_is_measured(tmp_path: Path) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    callback = NTKTrace(probe=probe, every=2, to=tmp_path)
    training.fit(callback, data=training.loader(training.Stream()))
    assert steps(tmp_path) == [0, 2, 4]


@pytest.mark.filterwarnings("ignore:Total length of .* is zero:UserWarning")  # on purpose
@pytest.mark.parametrize(
    "dataset", [training.Stream(), training.Samples(count=0)], ids=["stream", "empty"]
)
def test_where_validation_data_have_no_samples_the_training_data_give_the_probe(
    dataset: Any, looks: list[nt.Probe]
) -> None:
    training.fit(NTKTrace(), validation=training.loader(dataset))
    assert torch.equal(looks[0].inputs, training.Samples().inputs)


def test_a_module_without_forward_is_told_what_to_pass() -> None:
    class Headless(training.network()):
        forward = import_module("pytorch_lightning").LightningModule.forward

        def training_step(self, batch: Any, index: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(nt.MissingMeasureWarning, match="forward=lambda model, inputs: "):
        training.fit(NTKTrace(), Headless())


# What may go wrong -------------------------------------------------------------------------------


class Sick(training.network()):
    """Loses its weights in the second step."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 2:
            self.net[0].weight.data.fill_(torch.nan)


class Coupled(training.network()):
    """Mixes samples after its weights."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs - outputs.mean(0)


class Centred(training.network()):
    """Mixes samples before its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0))


FAILURES = {
    "NaN weights": (Sick, "NaN", ["3", "4"]),
    "coupled samples": (Coupled, "CoupledSamplesError", ["0", "1", "2", "3", "4"]),
    "coupled inputs": (Centred, "CoupledSamplesError", ["0", "1", "2", "3", "4"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_measure_that_fails_is_recorded_as_missing_with_its_reason(
    failure: str, tmp_path: Path
) -> None:
    kind, reason, expected = FAILURES[failure]
    with pytest.warns(nt.MissingMeasureWarning, match=reason):
        trainer = training.fit(NTKTrace(every=1, to=tmp_path), kind())
    assert trainer.global_step == 4
    trace = nt.open(tmp_path)
    assert list(reasons(trace)) == [f"{expected[0]}..{expected[-1]}"]
    assert all(reason in text for text in reasons(trace).values())
    missing = trace.ntk_trace.isnull()
    assert trace.step[missing].values.astype(str).tolist() == expected


@pytest.mark.parametrize("failure", FAILURES)
def test_a_measure_that_fails_again_and_again_warns_once(failure: str) -> None:
    with pytest.warns(nt.MissingMeasureWarning) as caught:
        training.fit([NTKTrace(every=1), FisherTrace(every=1)], FAILURES[failure][0]())
    assert len(complaints(caught)) == 1


@pytest.mark.parametrize("failure", FAILURES)
def test_a_measure_that_fails_raises_on_request(failure: str) -> None:
    with pytest.raises((ValueError, nt.CoupledSamplesError), match=r"NaN|coupled"):
        training.fit(NTKTrace(every=1, on_error="raise"), FAILURES[failure][0]())


def broken_logger() -> Any:
    """A logger that takes Lightning's own metrics, and no others."""
    csv = import_module("pytorch_lightning.loggers").CSVLogger

    class Broken(csv):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "ntk/trace" in metrics:
                raise RuntimeError("the quota is used up")

    return Broken


def test_a_logger_that_raises_does_not_end_the_training(tmp_path: Path) -> None:
    with pytest.warns(nt.MissingMeasureWarning, match="the quota is used up") as caught:
        trainer = training.fit(
            NTKTrace(every=1, to=tmp_path / "trace"), logger=broken_logger()(tmp_path)
        )
    assert len(complaints(caught)) == 1
    assert trainer.global_step == 4
    assert steps(tmp_path / "trace") == [0, 1, 2, 3, 4]


def test_a_logger_that_raises_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    sound = import_module("pytorch_lightning.loggers").CSVLogger(tmp_path, version=0)
    with pytest.warns(nt.MissingMeasureWarning, match="the quota is used up"):
        training.fit(NTKTrace(every=1), logger=[broken_logger()(tmp_path, version=1), sound])
    assert sorted(training.column(sound.log_dir, "ntk/trace")) == [0, 1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(nt.MissingMeasureWarning, match="cannot write the trace to .*file") as caught:
        trainer = training.fit(NTKTrace(every=1, to=tmp_path / "file"))
    assert len(complaints(caught)) == 1
    assert trainer.global_step == 4
    assert "ntk/trace" in trainer.callback_metrics


@pytest.mark.parametrize("what", ["logger", "folder", "probe"])
def test_what_goes_wrong_around_a_measure_raises_on_request(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = {"folder": {"to": tmp_path / "file"}}.get(what, {})
    logger = broken_logger()(tmp_path) if what == "logger" else False
    data = training.loader(training.Stream()) if what == "probe" else None
    with pytest.raises((RuntimeError, OSError, TypeError), match=r"quota|file|stream"):
        training.fit(NTKTrace(on_error="raise", **options), data=data, logger=logger)


def test_a_training_that_fails_leaves_what_was_measured(tmp_path: Path) -> None:
    class Failing(training.network()):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 2:
                raise RuntimeError("out of luck")

    callback = NTKTrace(every=1, to=tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        training.fit(callback, Failing())
    assert steps(tmp_path) == [0, 1, 2]
    training.fit(callback)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_each_fit_takes_its_own_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nt.Probe] = []

    class Noted(nt.Tracer):
        def __init__(self, probe: nt.Probe, *args: Any, **kwargs: Any) -> None:
            made.append(probe)
            super().__init__(probe, *args, **kwargs)

    monkeypatch.setattr(session, "Tracer", Noted)
    callback = NTKTrace(every=4)
    for seed in (0, 1):
        training.fit(callback, data=training.loader(training.Samples(seed=seed)))
        assert torch.equal(made[-1].inputs, training.Samples(seed=seed).inputs)
    assert len(made) == 2


def test_the_look_before_is_that_of_the_callbacks_own_schedule(tmp_path):
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    names = ["ntk/distance_previous", "ntk/distance_first"]

    def fit(name, **every):
        callbacks = [
            Trace(names, every=period, probe=probe, to=tmp_path / name / which)
            for which, period in every.items()
        ]
        training.fit(callbacks, max_steps=9)
        return nt.open(tmp_path / name / "a").load()

    alone, beside = fit("alone", a=2), fit("beside", b=3, a=2)
    for name in ("ntk_distance_previous", "ntk_distance_first"):
        np.testing.assert_array_equal(beside[name].values, alone[name].values)
