"""What a budget leaves out of a training under Lightning, and that the training does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training

import nettrace as nt
from nettrace.budget import Budget
from nettrace.callbacks import NTKTrace, Trace, session
from nettrace.callbacks.progress import announced

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]


class Clock:
    """A clock of which measurements and steps say how far it goes on."""

    def __init__(self) -> None:
        self.now, self.cost, self.step = 0.0, 1.0, 1.0
        #: Wall time and time spent measuring, at the end of each measurement.
        self.course: list[tuple[float, float]] = []
        self.spent = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of budgets; a measurement takes what `cost` says, a batch what `step` says."""
    clock = Clock()
    measure, evaluate = nt.Tracer.measure, session.Session.end_batch

    def slow(self: nt.Tracer, *args: Any) -> list[nt.Record]:
        clock.now += clock.cost
        clock.spent += clock.cost
        clock.course.append((clock.now, clock.spent))
        return measure(self, *args)

    def batch(self: Any, returned: Any) -> None:
        clock.now += clock.step
        evaluate(self, returned)

    monkeypatch.setattr(session, "Budget", partial(Budget, clock=clock))
    monkeypatch.setattr(nt.Tracer, "measure", slow)
    monkeypatch.setattr(session.Session, "end_batch", batch)
    return clock


def steps(folder: Path) -> list[int]:
    return nt.open(folder).step.values.tolist()


@pytest.mark.parametrize("namespace", training.NAMESPACES)
@pytest.mark.parametrize("ratio", [0.1, 1, 7])
def test_the_share_of_a_training_stays_within_its_budget(
    namespace: str, ratio: float, clock: Clock, tmp_path: Path
) -> None:
    clock.cost = ratio
    callback = Trace("loss", every=1, to=tmp_path, budget=0.1)
    training.fit(callback, namespace=namespace, max_steps=240)
    first, *rest = clock.course
    assert all(spent <= 0.1 * wall * (1 + 1e-9) for wall, spent in rest)
    assert len(clock.course) >= 240 * 0.1 / ratio * 0.8 - 2 if ratio > 0.2 else 200
    trace = nt.open(tmp_path)
    found = trace.step.values
    assert found[0] == 0
    assert trace.nettrace_skipped.values.tolist() == (np.diff(found, prepend=-1) - 1).tolist()
    shares = [spent / wall for wall, spent in clock.course]
    np.testing.assert_allclose(trace.nettrace_share.values, shares)
    (configured,) = json.loads(trace.attrs["configuration"])["callbacks"]
    assert configured["budget"] == 0.1


@pytest.mark.parametrize(
    "namespace",
    [training.NAMESPACES[0], pytest.param(training.NAMESPACES[1], marks=pytest.mark.slow)],
)
def test_training_is_bitwise_the_same_under_a_budget(
    namespace: str, clock: Clock, tmp_path: Path
) -> None:
    def outcome(callbacks: list[Any]) -> dict[str, Any]:
        training.seed()
        model = training.delicate(namespace)()
        data = training.loader(training.Augmented(), shuffle=True)
        trainer = training.fit(callbacks, model, data, namespace=namespace, max_steps=40)
        optimizer = trainer.optimizers[0].state_dict()
        return {**training.state(model), "course": model.notes, "optimizer": optimizer}

    bare = outcome([])
    probe = nt.Probe(training.Samples(1).inputs, training.Samples(1).targets)
    for cost in (0.3, 0.8):  # which thins differently
        clock.cost = cost
        folder = tmp_path / str(cost)
        names = ["ntk", "fisher", "weights", "loss"]
        callbacks = [
            Trace(names, every=1, probe=probe, to=folder, budget=0.2),
            NTKTrace(every=3, budget=0.3),
        ]
        assert training.differences(bare, outcome(callbacks)) == []
        assert 2 <= len(steps(folder)) < 30


def test_the_time_of_the_machine_is_what_counts(tmp_path: Path) -> None:
    trainer = training.fit(NTKTrace(every=1, to=tmp_path, budget=0.3), max_steps=100)
    trace = nt.open(tmp_path)
    assert 0 in trace.step.values
    assert len(trace.step) < 30  # steps as short as these are cheaper than a look
    assert float(trainer.callback_metrics["nettrace/share"]) > 0.05
    assert (trace.nettrace_share > 0).all()


def test_callbacks_share_the_smallest_budget_and_those_without_one_measure_always(
    clock: Clock, tmp_path: Path
) -> None:
    clock.cost, clock.step = 1, 1
    callbacks = [
        Trace("loss", every=1, to=tmp_path / "a", budget=0.2, prefix="a/"),
        Trace("ntk/trace", every=10, to=tmp_path / "b", budget=0.1, prefix="b/"),
        Trace("loss/mean", every=[0, 50, 60], to=tmp_path / "c", prefix="c/"),
    ]
    trainer = training.fit(callbacks, max_steps=300)
    assert steps(tmp_path / "c") == [0, 50, 60]
    share = clock.spent / clock.now
    assert 0.08 < share <= 0.1
    rare = steps(tmp_path / "b")
    assert len(rare) > 3  # which the frequent one has left room for
    assert set(rare) <= set(range(0, 301, 10))
    assert {f"{p}/nettrace/skipped" for p in "ab"} <= trainer.callback_metrics.keys()
    assert "c/nettrace/skipped" not in trainer.callback_metrics
    for name, period in (("a", 1), ("b", 10)):
        trace = nt.open(tmp_path / name)
        every = np.diff(trace.step.values, prepend=-period) // period - 1
        assert trace.nettrace_skipped.values.tolist() == every.tolist()
    assert "nettrace_skipped" not in nt.open(tmp_path / "c")


@pytest.mark.parametrize(("stop", "total"), [(None, 90), (77, 90)], ids=["whole", "early"])
def test_what_the_last_step_takes_is_kept_for_it(
    stop: int | None, total: int, clock: Clock, tmp_path: Path
) -> None:
    class Stopping(import_module(training.NAMESPACES[0]).Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == stop

    callback = Trace("loss", every=nt.with_last(1), to=tmp_path, budget=0.1)
    training.fit([callback, Stopping()], max_steps=total)
    found = nt.open(tmp_path)
    assert found.step.values[-1] == stop or total
    assert clock.spent <= 0.1 * clock.now
    skipped = np.diff(found.step.values, prepend=-1) - 1
    assert found.nettrace_skipped.values.tolist() == skipped.tolist()


def test_a_last_step_that_is_not_affordable_is_left_out(clock: Clock, tmp_path: Path) -> None:
    training.fit(Trace("loss", every=nt.with_last(1), to=tmp_path, budget=0.1), max_steps=6)
    assert steps(tmp_path) == [0]


def test_a_callback_that_never_had_its_turn_says_why(clock: Clock) -> None:
    callbacks = [Trace("loss", every=100), NTKTrace(every=[5], budget=0.01)]
    with pytest.warns(nt.MissingMeasureWarning, match=r"NTKTrace never measured.*budget=0.01 was"):
        training.fit(callbacks, max_steps=8)


def test_looks_before_are_those_that_were_taken(clock: Clock, tmp_path: Path) -> None:
    callback = Trace("ntk/distance_previous", every=1, to=tmp_path, budget=0.1)
    training.fit(callback, max_steps=60)
    found = nt.open(tmp_path)
    last, before = found.step.values[-1], found.step.values[-2]
    assert last - before > 1
    assert found.ntk_distance_previous.attrs["reference_step"] == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")  # on purpose
def test_a_run_that_is_resumed_has_a_budget_of_its_own(clock: Clock, tmp_path: Path) -> None:
    keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint
    clock.cost = 30

    def run(last: int, checkpoint: Path | None = None) -> None:
        callbacks = [
            Trace("loss", every=1, to=tmp_path / "trace", budget=0.1),
            keep(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=40),
        ]
        options = {"enable_checkpointing": True, "ckpt_path": checkpoint}
        training.fit(callbacks, max_steps=last, **options)

    run(40)
    assert steps(tmp_path / "trace") == [0]
    run(60, tmp_path / "step=40.ckpt")
    assert steps(tmp_path / "trace") == [0, 40]


def test_one_process_asks_no_other(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = import_module("pytorch_lightning.strategies")

    asked: list[Any] = []
    broadcast = strategies.SingleDeviceStrategy.broadcast

    def counted(self: Any, value: Any, *args: Any) -> Any:
        asked.append(value)
        return broadcast(self, value, *args)

    monkeypatch.setattr(strategies.SingleDeviceStrategy, "broadcast", counted)
    training.fit([])
    own = len(asked)  # Lightning's
    training.fit(NTKTrace(every=1, budget=0.1))
    assert len(asked) == 2 * own


#: Of two processes: to the second, measuring costs nothing, so that it would not leave out a step.
SCRIPT = """
import json
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
import training

import nettrace as nt
from nettrace.budget import Budget
from nettrace.callbacks import Trace, session

measured, asked, spent = [], [], [0]
measure = nt.Tracer.measure


def noted(self, model, step, *args):
    measured.append(step)
    spent[0] += (3, 0)[dist.get_rank()]
    return measure(self, model, step, *args)


class Noted(Trace):
    def on_train_start(self, trainer, module):
        broadcast = trainer.strategy.broadcast

        def counted(value, *args):
            asked.append(trainer.global_step)
            return broadcast(value, *args)

        session.Budget = partial(Budget, clock=lambda: trainer.global_step + spent[0])
        trainer.strategy.broadcast = counted
        super().on_train_start(trainer, module)

    def on_train_end(self, trainer, module):
        super().on_train_end(trainer, module)
        del trainer.strategy.broadcast


nt.Tracer.measure = noted
trainer = training.fit(
    Noted("loss", every=2, budget=0.2, to=f"{sys.argv[1]}/trace"),
    data=training.loader(training.Samples(count=512)),
    max_steps=60,
    strategy="ddp",
    devices=2,
)
Path(sys.argv[1], f"{trainer.global_rank}.json").write_text(json.dumps([measured, asked]))
"""


@pytest.mark.slow
def test_of_several_processes_the_first_decides_for_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    measured, asked = first
    assert asked == list(range(0, 61, 2))  # at candidates, and nowhere else
    assert 3 <= len(measured) <= 6
    assert steps(tmp_path / "trace") == measured


# The progress bar --------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_the_bar_says_when_a_long_measurement_goes_on(
    namespace: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.cost = 2
    bar = import_module(f"{namespace}.callbacks").TQDMProgressBar()
    training.fit([NTKTrace(every=2), bar], namespace=namespace, enable_progress_bar=True)
    said = capsys.readouterr().out
    assert "nettrace measures step 0" in said  # before there is a bar
    assert "nettrace measures step 2" in said
    *_, last = said.replace("\r", "\n").strip().splitlines()
    assert "Epoch 0" in last
    assert "nettrace" not in last.replace("nettrace/", "")


def test_the_bar_does_not_bother_with_short_ones(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.cost = 0.1
    bar = import_module("pytorch_lightning.callbacks").TQDMProgressBar()
    training.fit([NTKTrace(every=1), bar], enable_progress_bar=True)
    assert "nettrace measures step 1" not in capsys.readouterr().out


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_metrics_are_the_same_with_a_text_on_the_bar(namespace: str, clock: Clock) -> None:
    clock.cost = 2
    shown = []
    for bar in (True, False):
        torch.manual_seed(0)
        options = {"namespace": namespace, "enable_progress_bar": bar}
        trainer = training.fit(Trace("loss", every=1), **options)
        names = [name for name in trainer.callback_metrics if "seconds" not in name]
        shown.append({name: trainer.callback_metrics[name] for name in names})
    assert training.differences(*shown) == []


@training.recent
@pytest.mark.parametrize("namespace", training.NAMESPACES)
@pytest.mark.parametrize("checked", [True, False], ids=["sanity check", "none"])
def test_rich_bars_say_so_too_and_are_put_back(
    namespace: str,
    checked: bool,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("rich")
    kind = import_module(f"{namespace}.callbacks").RichProgressBar
    said, left = [], []

    class Noting(import_module(namespace).Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            left.append(trainer.progress_bar_callback.train_progress_bar.description)

    slow = nt.Tracer.measure

    def measure(self: nt.Tracer, *args: Any) -> list[nt.Record]:
        tasks = bar.progress.tasks if bar.progress is not None else []
        said.extend(task.description for task in tasks if task.visible)
        return slow(self, *args)

    monkeypatch.setattr(nt.Tracer, "measure", measure)
    clock.cost = 2
    bar = kind()
    validation = training.loader() if checked else None
    options = {"namespace": namespace, "enable_progress_bar": True}
    training.fit([NTKTrace(every=1), Noting(), bar], validation=validation, **options)
    steps = range(5) if checked else range(1, 5)
    assert said == [f"nettrace measures step {step}" for step in steps]
    assert all("Epoch 0" in text for text in left)
    shown = capsys.readouterr().out
    assert "Epoch 0" in shown
    assert "nettrace measures" not in shown.splitlines()[-1]


class Broken:
    """A progress bar of which nothing works."""

    is_enabled = True

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class TQDMProgressBar(Broken):
    """Taken for Lightning's by its name."""


@pytest.mark.parametrize("kind", [type(None), object, Broken, TQDMProgressBar])
def test_a_bar_that_fails_is_passed_over(kind: type) -> None:
    bar = kind()
    with announced(SimpleNamespace(progress_bar_callback=bar), "text"):
        pass
    with pytest.raises(KeyError), announced(SimpleNamespace(progress_bar_callback=bar), "text"):
        raise KeyError
