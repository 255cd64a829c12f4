"""Whatever goes wrong with measuring, the training goes on as if it had not been measured."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import Tensor

import nettrace as nt
from nettrace.callbacks import NTKTrace, Trace
from nettrace.measures import registry
from nettrace.operator import Jacobian

pytestmark = [
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
]

#: Samples of the probe; batches have four.
PROBE = 16


# Faults ------------------------------------------------------------------------------------------


def fails_on_probe(error: Callable[[], BaseException], after: int = 0) -> type[Any]:
    """A network whose forward raises on the probe, from some update on."""

    class Failing(training.delicate()):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == PROBE and self.global_step >= after:
                raise error()
            return super().forward(x)

    return Failing


def diverging(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    class Diverging(training.delicate()):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * torch.inf if self.global_step == 2 else loss

    return Diverging


def poisoned(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    class Poisoned(training.delicate()):
        def on_before_zero_grad(self, *_: Any) -> None:
            if self.global_step == 2:
                self.net[0].weight.data[0, 0] = torch.nan

    return Poisoned


def short_of_memory(least: int, kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Memory runs out for kernels that are computed within more than so many bytes."""
    calls = count(1)
    errors: dict[str, Callable[[], Exception]] = {
        "CUDA": lambda: torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {next(calls) * 0.7:.2f} MiB"
        ),
        "CPU": lambda: RuntimeError(
            f"[enforce fail] DefaultCPUAllocator: can't allocate memory: {next(calls)} bytes"
        ),
        "Python": lambda: MemoryError(f"Unable to allocate {next(calls)} MiB"),
    }

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Jacobian.gram_and_layer_blocks

        def short(self: Jacobian) -> Any:
            if self._memory > least:
                raise errors[kind]()
            return whole(self)

        monkeypatch.setattr(Jacobian, "gram_and_layer_blocks", short)

    return inject


def broken_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry._MEASURES["ntk/entropy"]
    calls = count(1)

    def broken(*_: Any) -> Any:
        raise ArithmeticError(f"it came to {1 / next(calls):.5g} instead of 1")

    monkeypatch.setitem(
        registry._MEASURES, known.name, nt.measures.Measure(**{**vars(known), "function": broken})
    )


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nettrace.store.writer.os.write", full)


def locked_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def locked(path: Any, flags: int, *mode: Any) -> int:
        if flags & os.O_CREAT and Path(path).suffix == ".ntl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)

    monkeypatch.setattr("nettrace.store.writer.os.open", locked)


def dead_logger(folder: Path) -> Any:
    """A logger that takes Lightning's own metrics, and no others."""

    class Dead(import_module("pytorch_lightning.loggers").CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any("/" in name for name in metrics):
                raise RuntimeError("the quota is used up")
            super().log_metrics(metrics, step)

    return Dead(folder)


def lost_wandb(error: Exception) -> Callable[[Path], Any]:
    """W&B that cannot be reached when a row is sent."""

    class Run:
        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def log(self, row: Any) -> None:
            raise error

    class WandbLogger(import_module("pytorch_lightning.loggers.logger").Logger):
        """Loses Lightning's own rows as well, but without a word: they are not looked at here."""

        name = version = "lost"

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

        def log_metrics(self, *_: Any, **__: Any) -> None:
            pass

        @property
        def experiment(self) -> Any:
            return Run()

    return lambda folder: WandbLogger()


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        says: what the warning and the trace say of the cause.
        remedy: what the warning says is to be done.
        inject: causes it; may give a network's class that suffers from it.
        logger: that has the fault, from a folder.
        missing: at which of the steps 0 to 4 the kernel's entropy is missing for it.
        written: whether the trace can be written.
    """

    says: str
    remedy: str = "on_error='raise'"
    inject: Callable[[pytest.MonkeyPatch], Any] = lambda monkeypatch: None
    logger: Callable[[Path], Any] | None = None
    missing: tuple[int, ...] = (0, 1, 2, 3, 4)
    written: bool = True


def raising(error: Callable[[], BaseException], after: int = 0) -> Any:
    return lambda monkeypatch: fails_on_probe(error, after)


FAULTS = {
    **{
        f"out of memory ({kind})": Fault(says, "take a smaller probe", short_of_memory(0, kind))
        for kind, says in (
            ("CUDA", "OutOfMemoryError: CUDA out of memory"),
            ("CPU", "can't allocate memory"),
            ("Python", "MemoryError: Unable"),
        )
    },
    "out of memory in the look": Fault(
        "OutOfMemoryError: on the probe",
        "take a smaller probe",
        raising(lambda: torch.OutOfMemoryError("on the probe"), after=2),
        missing=(2, 3, 4),
    ),
    "NaN in the weights": Fault("NaN", inject=poisoned, missing=(3, 4)),
    "a loss that is not finite": Fault("NaN", inject=diverging, missing=(3, 4)),
    "a measure that fails": Fault("ArithmeticError: it came to", inject=broken_measure),
    "a forward that raises on the probe": Fault(
        "ZeroDivisionError: on the probe", inject=raising(lambda: ZeroDivisionError("on the probe"))
    ),
    "a full disk": Fault("No space left on device", "make room", inject=full_disk, written=False),
    "a folder that is locked": Fault(
        "Permission denied", "give a folder that can be written", locked_folder, written=False
    ),
    "a dead logger": Fault("the quota is used up", "log=False", logger=dead_logger, missing=()),
    "a W&B outage": Fault(
        "cannot log to WandbLogger.*503",
        "log=False",
        logger=lost_wandb(RuntimeError("503 Service Unavailable")),
        missing=(),
    ),
    "W&B hangs up": Fault(
        "cannot log to WandbLogger.*Broken pipe",
        "log=False",
        logger=lost_wandb(BrokenPipeError(errno.EPIPE, "Broken pipe")),
        missing=(),
    ),
}


def outcome(
    fault: Fault,
    make: Callable[[], list[Any]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """All that comes of a training with a fault."""
    training.seed()
    with monkeypatch.context() as patch:
        kind = fault.inject(patch) or training.delicate()
        model = kind()
        logger = fault.logger(folder) if fault.logger else False
        data = training.loader(training.Augmented(count=PROBE), shuffle=True)
        trainer = training.fit(make(), model, data, logger=logger)
    return training.result(trainer, model)


def complaints(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, nt.MissingMeasureWarning)]


def reasons(folder: Path, name: str) -> dict[str, str]:
    return json.loads(nt.open(folder)[name].attrs.get("missing", "{}"))


# Each fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_what_it_must_and_nothing_of_the_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, trace = FAULTS[name], tmp_path / "trace"
    bare = outcome(fault, list, tmp_path / "bare", monkeypatch)

    def both() -> list[Trace]:
        names = (["ntk/entropy", "ntk/trace"], "fisher/trace")
        return [Trace(of, every=1, to=trace) for of in names]

    with pytest.warns(nt.MissingMeasureWarning) as caught:
        found = outcome(fault, both, tmp_path / "found", monkeypatch)
    assert training.differences(bare, found) == []
    assert found["progress"][0] == 4
    (text,) = complaints(caught)
    assert re.search(fault.says, text)
    assert fault.remedy in text
    if not fault.written:
        assert not list(trace.glob("*"))
        return
    data = nt.open(trace)
    assert data.step.values.tolist() == [0, 1, 2, 3, 4]
    missing = data.ntk_entropy.isnull().values
    assert data.step.values[missing].tolist() == list(fault.missing)
    if fault.missing:
        assert all(re.search(fault.says, r) for r in reasons(trace, "ntk_entropy").values())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_raises_on_request(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    options = {"every": 1, "to": tmp_path / "trace", "on_error": "raise"}
    with pytest.raises(Exception, match=fault.says.rpartition(": ")[2].rpartition(".*")[2]):
        outcome(fault, lambda: [Trace("ntk/entropy", **options)], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name", ["out of memory (CUDA)", "a measure that fails", "a full disk", "a dead logger"]
)
def test_a_fault_is_logged_where_warnings_are_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    fault = FAULTS[name]
    bare = outcome(fault, list, tmp_path / "bare", monkeypatch)
    options = {"every": 1, "to": tmp_path / "trace"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=nt.MissingMeasureWarning)
        found = outcome(
            fault, lambda: [Trace("ntk/entropy", **options)], tmp_path / "found", monkeypatch
        )
    assert training.differences(bare, found) == []
    (text,) = logged
    logged.clear()
    assert re.search(fault.says, text)


# Out of memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "quarters"), [("2GiB", 0), ("2GiB", 1), ("2GiB", 3), (2**20, 1), (2**20, 3)]
)
def test_what_runs_out_of_memory_is_measured_within_less(
    budget: Any, quarters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = training.network()()
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    names = ["ntk/entropy", "fisher/trace", "ntk/distance_first"]
    expected = nt.Tracer(probe, names)(model, 0)
    within = (2**31 if budget == "2GiB" else budget) // 4**quarters
    short_of_memory(within, "CUDA")(monkeypatch)
    before = training.state(model)
    tracer = nt.Tracer(probe, names, memory_budget=budget)
    found = tracer(model, 0)
    assert training.differences(before, training.state(model)) == []
    assert [r.name for r in found] == [r.name for r in expected]
    for one, other in zip(found[:3], expected, strict=False):
        np.testing.assert_allclose(one.value, other.value, rtol=1e-5)
    budgets = {r.name: r.attributes.get("memory_budget") for r in found[:3]}
    less = within if quarters else None
    assert budgets == {"ntk/entropy": less, "fisher/trace": None, "ntk/distance_first": less}
    monkeypatch.undo()  # then there is memory again
    again = tracer(model, 1)
    assert {r.attributes.get("memory_budget") for r in again[:3]} == {None}
    assert float(again[2].value) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("least", [0, 500], ids=["for nothing", "not for the result"])
def test_what_no_budget_does_for_is_tried_once_at_later_records(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    short_of_memory(least, "CUDA")(monkeypatch)
    monkeypatch.setattr("nettrace.explanation.PriceList.refused", lambda *_: {})
    looks: list[int] = []
    see = nt.Tracer._see
    monkeypatch.setattr(nt.Tracer, "_see", lambda *given: looks.append(1) or see(*given))
    tracer = nt.Tracer(probe, ["ntk/entropy", "fisher/trace"], memory_budget=500 * 64)
    model = training.network()()
    says = "memory ran out.*the last try was within memory_budget=500 B: take a smaller probe"
    with pytest.warns(nt.MissingMeasureWarning, match=says) as caught:
        found = [tracer(model, step) for step in range(3)]
    assert len(complaints(caught)) == 1
    assert all("memory ran out" in entropy.missing for entropy, *_ in found)
    assert all(fisher.missing is None for _, fisher, *_ in found)
    assert len(looks) == 4 + 1 + 1


def test_a_result_that_exceeds_its_budget_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    looks: list[int] = []
    see = nt.Tracer._see
    monkeypatch.setattr(nt.Tracer, "_see", lambda *given: looks.append(1) or see(*given))
    options = {"memory_budget": 2000, "max_seconds": None}
    tracer = nt.Tracer(probe, ["ntk/gram", "loss/mean"], **options)
    with pytest.warns(nt.MissingMeasureWarning, match="raise memory_budget"):
        gram, loss, *_ = tracer(training.network()(), 0)
    assert gram.missing
    assert "memory_budget" not in loss.attributes
    assert len(looks) == 1


# Disks -------------------------------------------------------------------------------------------


def test_steps_that_a_full_disk_refused_are_noted_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(training.network()):
        def on_train_batch_start(self, *_: Any) -> None:
            if self.global_step == 1:
                full_disk(monkeypatch)
            if self.global_step == 3:
                monkeypatch.undo()

    with pytest.warns(nt.MissingMeasureWarning, match="is noted as missing once") as caught:
        training.fit(NTKTrace(every=1, to=tmp_path), Disk(), max_steps=5)
    assert len(complaints(caught)) == 1
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.ntk_trace.isnull().values.tolist() == [False, False, True, True, False, False]
    assert data.batches.values.tolist() == [0, 1, 2, 3, 4, 1]
    (reason,) = reasons(tmp_path, "ntk_trace").values()
    assert "not written: OSError" in reason
    assert "No space left" in reason


def test_a_disk_without_room_is_noted_in_a_plain_loop_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    tracer, model = nt.Tracer(probe, "ntk", to=tmp_path), training.network()()
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.warns(nt.MissingMeasureWarning, match="make room"):
            tracer(model, 0)
    tracer(model, 1)
    assert nt.open(tmp_path).ntk_trace.isnull().values.tolist() == [True, False]


# What nobody foresaw -----------------------------------------------------------------------------


@contextmanager
def unforeseen(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> Any:
        raise LookupError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        yield


@pytest.mark.parametrize(
    "where", ["__init__", "begin_batch", "end_batch", "measure", "measure_last", "close", "sync"]
)
def test_an_error_that_nobody_foresaw_ends_the_measuring_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    for callbacks in ([], [Trace("loss", every=1)]):
        training.seed()
        model = training.delicate()()
        keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(
            tmp_path, enable_version_counter=False
        )
        caught: Any = ()
        with unforeseen(monkeypatch, f"nettrace.callbacks.session.Session.{where}"):
            if callbacks:
                with pytest.warns(nt.MissingMeasureWarning, match="measures no more") as caught:
                    trainer = training.fit([*callbacks, keep], model, enable_checkpointing=True)
            else:
                trainer = training.fit(keep, model, enable_checkpointing=True)
        assert len(complaints(caught)) == len(callbacks)
        trained.append(training.result(trainer, model))
    assert training.differences(*trained) == []
    keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(tmp_path)
    callbacks = [Trace("loss", every=1, on_error="raise"), keep]
    with (
        unforeseen(monkeypatch, f"nettrace.callbacks.session.Session.{where}"),
        pytest.raises(LookupError, match="nobody thought of this"),
    ):
        training.fit(callbacks, training.delicate()(), enable_checkpointing=True)


# Ctrl-C ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_ctrl_c_in_the_middle_of_a_measurement_leaves_all_as_it_was(
    namespace: str, tmp_path: Path
) -> None:
    class Interrupted(training.delicate(namespace)):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == PROBE and self.global_step == 2:
                self.net[1].running_mean.add_(1)
                torch.rand(3)
                self.before = training.state(self)
                raise KeyboardInterrupt
            return super().forward(x)

    handler = signal.getsignal(signal.SIGINT)
    models = []
    try:
        for callbacks, steps in (([], 2), ([NTKTrace(every=1, to=tmp_path)], 9)):
            training.seed()
            model = Interrupted()
            ends = pytest.raises(SystemExit) if callbacks else warnings.catch_warnings()
            with ends:
                training.fit(callbacks, model, namespace=namespace, max_steps=steps)
            models.append(model)
    finally:
        signal.signal(signal.SIGINT, handler)
    bare, found = ({n: v for n, v in training.state(m).items() if n[:4] != "mode"} for m in models)
    for name in ("weight", "buffer", "random", "requires_grad", "hooks"):
        ours = [{n: v for n, v in s.items() if n.startswith(name)} for s in (bare, found)]
        assert training.differences(*ours) == []
    assert nt.open(tmp_path).step.values.tolist() == [0, 1]
    assert np.isfinite(nt.open(tmp_path).ntk_trace.values).all()
