"""One fit of one trainer, as all of its callbacks of this package see it together."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nettrace import Probe, Record, Tracer
from nettrace.batch import tensors
from nettrace.budget import Budget, left_out, synchronise
from nettrace.callbacks.figures import Figures
from nettrace.callbacks.first_batch import FirstBatch
from nettrace.callbacks.lightning import bound_to, loggers_step, silenced
from nettrace.callbacks.loggers import monitor, send
from nettrace.callbacks.progress import announced
from nettrace.callbacks.request import report, warn_idle
from nettrace.callbacks.samples import probe_of
from nettrace.callbacks.steps import Steps, asked
from nettrace.callbacks.windows import Windows
from nettrace.ranks import purpose, ranks
from nettrace.schedule import has_last_after
from nettrace.store.journal import UNWRITTEN, Journal
from nettrace.store.provenance import of_model
from nettrace.waiting import reads_window
from nettrace.window import WeightWindow

if TYPE_CHECKING:
    from nettrace.callbacks.trace import Trace


#: What to do about it, for warnings.
_UNLOGGED = (
    "each record is tried anew, and the trace in to= and other loggers get all of them; log=False "
    "logs nothing"
)
_LONG = 1.0  # seconds, as expected, after which people wonder what is going on


class Session:
    """Measures for several callbacks at once: one pass for all that share a probe.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        callbacks: its callbacks of this package.
        past: what an earlier session's `state_dict` returned, if it goes on from there.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: Sequence[Trace],
        past: Mapping[str, Any] | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = module
        budgets = [callback.budget for callback in callbacks if callback.budget is not None]
        self._budget = Budget(min(budgets, default=1))
        #: Steps that the budget left out since a callback measured last.
        self._skipped: dict[Trace, set[int]] = {}
        self._position: dict[str, float] = {}
        # Where the checkpoint does not say how many samples were seen, nobody knows.
        begun = trainer.global_step > 0
        self._samples = (past or {}).get("samples", math.nan if begun else 0)
        #: Earlier attempts were right about the weights that this one begins with.
        self._start = trainer.global_step + begun
        self._step: int | None = None
        self._due = {callback: bound_to(trainer, callback.due) for callback in callbacks}
        self._probing = [callback for callback in callbacks if not callback.of_steps]
        #: At which step each callback measured last.
        self._measured: dict[Trace, int] = {}
        self._unfired = list(callbacks)
        self._warned: set[str] = set()
        self._attempt = uuid.uuid4().hex
        #: By folder and the fingerprint of the probe, None for the training's own steps.
        self._writers: dict[tuple[Path, str | None], Journal] = {}
        #: By prefix, what loggers get beside numbers.
        self._figures: dict[str, Figures] = {}
        #: Callbacks that share a probe, with the tracer that measures for them.
        self._groups: dict[object, tuple[Tracer, list[Trace]]] = {}
        self._ranks = ranks(purpose("Session"), module)
        self._steps = Steps(trainer, module, [c for c in callbacks if c.of_steps])
        self._windows = Windows(trainer, module, self._probing)
        first: dict[object, WeightWindow] = {}
        for callback in self._windows.of:
            first.setdefault(_key(callback), self._windows.of[callback])
        for callback in self._probing:
            key = _key(callback)
            window = self._windows.of.get(callback, first.get(key))
            if window is not first.get(key):
                key = (key, id(window))
            if any(_compare_apart(callback, other) for other in self._sharing(key)):
                key = (key, id(callback))
            try:
                if key not in self._groups:
                    names = [measure.name for measure in callback.measures]
                    with self._budget.measuring(), self._ranks.together():
                        probe = probe_of(
                            trainer, module, callback.probe, callback.samples, self._ranks
                        )
                    tracer = Tracer(
                        callback.looking(probe),
                        names,
                        on_error=callback.on_error,
                        max_seconds=callback.max_seconds,
                        window=window,
                    )
                    self._groups[key] = (tracer, [])
                self._groups[key][1].append(callback)
            except Exception as error:
                self._unfired.remove(callback)
                self._report(callback, "cannot take a probe", error)
        looks = (past or {}).get("looks", {})
        for tracer, sharing in self._groups.values():
            compares = [c for c in sharing if any(m.reference for m in c.measures)]
            if looks and compares:
                try:
                    tracer.load_state_dict(looks)
                except Exception as error:  # whatever a checkpoint of others may hold
                    self._report(compares[0], "cannot compare with the run before", error)
        tracers = [
            (t, [m for c in group for m in c.measures]) for t, group in self._groups.values()
        ]
        self._first_batch = FirstBatch(trainer, module, tracers)

    def _ready(self, callback: Trace) -> bool:
        """Whether any measure of the callback need not wait for a window of weights to be full."""
        groups = self._groups.values()
        return any(tracer.ready(callback.measures) for tracer, group in groups if callback in group)

    def _sharing(self, key: object) -> list[Trace]:
        return self._groups[key][1] if key in self._groups else []

    def begin_batch(self, batch: Any, index: int) -> None:
        """Sees a batch before its training step."""
        first = next(tensors(batch), None)
        if first is None or first.dim() == 0:
            self._samples = math.nan
        else:
            self._samples += len(first) * self._trainer.world_size
        if self._first_batch.is_due:
            with silenced(self._module), self._budget.measuring():
                self._first_batch.evaluate(batch)
        if not self._steps.callbacks:
            return
        step = self._trainer.global_step
        due = [c for c in self._steps.new(step) if self._is_due(c, step)]
        self._steps.begin_batch(batch, index, step, self._affordable(step, due))

    def before_backward(self, loss: Tensor) -> None:
        """Measures the training step whose loss this is, for the callbacks that are due."""
        if not self._steps.due:
            return
        synchronise(self._module)
        due = () if self._steps.accumulated is not None else self._steps.due
        with self._budget.measuring(frozenset(due)), self._reporting():
            self._steps.measure(loss)

    def after_backward(self) -> None:
        """Sees the gradients of a micro-batch, where they are to be measured."""
        if self._steps.accumulated is not None:
            with self._budget.measuring(), self._reporting():
                self._steps.accumulated.after_backward()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._report(self._steps.due[0], "cannot measure the training step", error)
            self._steps.conclude(whole=False)

    def end_batch(self, returned: Any) -> None:
        """Sees what the training step returned, and writes what its tape told."""
        self._first_batch.compare(returned)
        self.flush()

    def forget(self) -> None:
        """Lets go of the batch that is being trained on, and of what is watched meanwhile."""
        self._steps.forget()

    def flush(self, last: bool = False) -> None:
        """Writes what was measured of a training step, if there is nothing to wait for."""
        if not self._steps.callbacks:
            return
        with self._budget.measuring():
            due, records = self._steps.taken(last)
        if records:
            self._unfired = [callback for callback in self._unfired if callback not in due]
            if any(callback.budget is not None for callback in due):
                records.append(self._budget.record(records[0].step))
            self._tell(due, records, None)
            for callback in due:
                self._skipped.pop(callback, None)

    def state_dict(self) -> dict[str, Any]:
        """How many samples were seen, and what looks left for measures that compare them.

        The latter by the probe's fingerprint. Where several tracers have looked at one probe, the
        looks before are left out: a resumed run begins without.
        """
        found: dict[str, Any] = {}
        for tracer, _ in self._groups.values():
            for probe, past in tracer.state_dict().items():
                if past["kept"] and probe in found:
                    both = found[probe]["kept"] | past["kept"]
                    last = max(found[probe]["last"], past["last"])
                    first = {name: kept for name, kept in both.items() if name.startswith("first ")}
                    found[probe] = {"last": last, "kept": first}
                elif past["kept"]:
                    found[probe] = past
        return {"samples": self._samples, "looks": found}

    def sync(self) -> None:
        """Brings the traces to the disk, so that they hold all up to a checkpoint."""
        for writer in self._writers.values():
            try:
                writer.sync()
            except OSError as error:
                text = f"cannot bring the trace in {writer.folder} to the disk"
                self._report(next(iter(self._due)), text, error)

    def measure(self, step: int, batches: int) -> None:
        """Measures for the callbacks that are due, once a step.

        Args:
            step: how many updates the weights have had.
            batches: how many batches of this epoch have been seen.
        """
        if step == self._step:  # with accumulated gradients, several batches make one step
            return
        self._step = step
        self._position = {
            "epoch": self._trainer.current_epoch,
            "batches": batches,
            "samples": self._samples,
        }
        if self._windows.of:
            with self._budget.measuring():
                self._windows.see(step, self._samples)
        due = [c for c in self._probing if self._is_due(c, step) and self._ready(c)]
        last = [c for c in self._probing if has_last_after(self._due[c], step)]
        self._measure(step, self._affordable(step, due, reserve=last))
        self._show(lambda figures: figures.due, Figures.send)

    def measure_last(self, step: int) -> None:
        """Measures for the callbacks whose schedules have the last step, and that have not yet.

        Args:
            step: how many updates the weights have had in the end.
        """
        last = [c for c in self._probing if getattr(self._due[c], "last", False)]
        due = [c for c in last if self._measured.get(c) != step and self._ready(c)]
        self._measure(step, self._affordable(step, due))
        for callback in self._unfired:
            if callback in self._windows.of and all(map(reads_window, callback.measures)):
                self._ready(callback)  # if it is not, that is why nothing was measured
        for tracer, group in self._groups.values():
            with self._budget.measuring(), silenced(self._module):
                records = tracer.conclude(self._module, step, self._trainer.optimizers)
            if records:
                names = {record.name for record in records}
                waited = [c for c in group if any(m.name in names for m in c.measures)]
                self._unfired = [callback for callback in self._unfired if callback not in waited]
                self._tell(waited, records, tracer.fingerprint)

    def _affordable(
        self, step: int, due: Sequence[Trace], reserve: Sequence[Trace] = ()
    ) -> Sequence[Trace]:
        """Those of the callbacks that are due which the budget does not leave out."""
        limited = [callback for callback in due if callback.budget is not None]
        if not limited:
            return due
        allowed = self._budget.allows(frozenset(due), frozenset(reserve))
        if self._trainer.world_size > 1:  # whose clocks differ
            allowed = self._trainer.strategy.broadcast(allowed)
        if allowed:
            return due
        for callback in limited:
            self._skipped.setdefault(callback, set()).add(step)
        return [callback for callback in due if callback.budget is None]

    def _measure(self, step: int, callbacks: Sequence[Trace]) -> None:
        if not callbacks:
            return
        what = frozenset(callbacks)
        long = self._budget.expected(what) > _LONG
        text = f"nettrace measures step {step}"
        synchronise(self._module)
        with (
            self._budget.measuring(what),
            announced(self._trainer, text) if long else nullcontext(),
        ):
            self._take(step, callbacks)
        for callback in callbacks:
            self._skipped.pop(callback, None)

    def _take(self, step: int, callbacks: Sequence[Trace]) -> None:
        for tracer, group in self._groups.values():
            due = [callback for callback in group if callback in callbacks]
            if due:
                self._unfired = [callback for callback in self._unfired if callback not in due]
                self._measured |= dict.fromkeys(due, step)
                measures = {m.name: m for c in due for m in tracer.ready(c.measures)}
                with silenced(self._module):
                    records = tracer.measure(
                        self._module, step, list(measures.values()), self._trainer.optimizers
                    )
                if any(callback.budget is not None for callback in due):
                    records.append(self._budget.record(step))
                self._tell(due, records, tracer.fingerprint)

    def _tell(
        self, callbacks: Sequence[Trace], records: Sequence[Record], fingerprint: str | None
    ) -> None:
        """Writes and logs what some callbacks asked for."""
        self._write(callbacks, records, fingerprint)
        begun = self._position["batches"] > 0
        self._log(callbacks, records, loggers_step(self._trainer) + begun)

    def _is_due(self, callback: Trace, step: int) -> bool:
        try:
            return self._due[callback](step)
        except Exception as error:
            self._report(callback, "has a schedule that fails", error)
            return False

    def close(self) -> None:
        """Sends the last figures, and says which callbacks never measured."""
        self._show(lambda figures: True, Figures.conclude)
        for callback in self._unfired:
            spent = f"at each step of its schedule, all of budget={self._budget.limit:g} was spent"
            reason = spent if callback in self._skipped else ""
            warn_idle(callback, self._trainer.global_step, reason)

    def _write(
        self,
        callbacks: Sequence[Trace],
        records: Sequence[Record],
        fingerprint: str | None,
    ) -> None:
        if not self._trainer.is_global_zero:
            return
        folders: dict[Path, list[Trace]] = {}
        for callback in callbacks:
            if callback.to is not None:
                folders.setdefault(Path(callback.to).absolute(), []).append(callback)
        for folder, sharing in folders.items():
            try:
                key = (folder, fingerprint)
                if key not in self._writers:
                    self._writers[key] = self._writer(folder, fingerprint)
                self._writers[key].write(self._of(sharing, records), self._position)
            except Exception as error:  # of the disk, or of hyper-parameters that cannot be told
                what = f"cannot write the trace to {folder}"
                self._report(callbacks[0], what, error, UNWRITTEN)

    def _writer(self, folder: Path, fingerprint: str | None) -> Journal:
        trainer, module = self._trainer, self._module
        about: dict[str, Any] = of_model(module)
        if fingerprint is not None:
            about["probe"] = fingerprint
        configuration = {
            "callbacks": [
                {
                    "class": type(callback).__name__,
                    "measures": [measure.name for measure in callback.measures],
                    "every": str(callback.every),
                    "budget": callback.budget,
                    "probe": "the training's own batches"
                    if callback.of_steps
                    else str(callback.probe or f"{callback.samples} samples of the data"),
                    **self._windows.about(callback),
                }
                for callback in self._due
                if callback.to is not None and Path(callback.to).absolute() == folder
            ],
            "hyperparameters": dict(getattr(module, "hparams", {})),
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
        }
        return Journal(
            folder,
            self._attempt,
            start=self._start,
            configuration=json.dumps(configuration, default=str),
            **about,
        )

    def _log(self, callbacks: Sequence[Trace], records: Sequence[Record], step: int) -> None:
        prefixes: dict[str, list[Trace]] = {}
        for callback in callbacks:
            if callback.logs:
                prefixes.setdefault(callback.prefix, []).append(callback)
        for prefix, sharing in prefixes.items():
            records_ = self._of(sharing, records)
            self._keep(sharing[0], records_, step)
            found = [r for r in records_ if r.missing is None]
            if found:
                monitor(self._trainer, found, prefix)
            for logger in self._trainer.loggers if found else ():
                try:
                    send(logger, found, prefix, step)
                except Exception as error:
                    what = f"cannot log to {type(logger).__name__}"
                    self._report(callbacks[0], what, error, _UNLOGGED)

    def _keep(self, callback: Trace, records: Sequence[Record], step: int) -> None:
        """Keeps records for figures, where there are loggers that take these."""
        if not self._trainer.is_global_zero:
            return
        prefix = callback.prefix
        if prefix not in self._figures:
            self._figures[prefix] = Figures(self._trainer.loggers, prefix)
        self._figures[prefix].add(records, self._position, step)

    def _show(
        self,
        wanted: Callable[[Figures], bool],
        send: Callable[[Figures], list[tuple[str, Exception]]],
    ) -> None:
        """Sends figures; what that takes is spent on measuring, but is no measurement's."""
        for figures in filter(wanted, self._figures.values()):
            with self._budget.measuring():
                for what, error in send(figures):
                    self._report(next(iter(self._due)), what, error, _UNLOGGED)

    def _of(self, callbacks: Sequence[Trace], records: Sequence[Record]) -> list[Record]:
        """The records that callbacks asked for, and those about the measurement itself."""
        names = {measure.name for callback in callbacks for measure in callback.measures}
        found = [r for r in records if asked(r.name) in names or r.name.startswith("nettrace/")]
        if all(callback.budget is None for callback in callbacks):
            return found
        step = records[0].step
        skipped = set().union(*(self._skipped.get(callback, ()) for callback in callbacks))
        return [*found, left_out(step, len(skipped - {step}))]

    def _report(self, callback: Trace, what: str, error: Exception, remedy: str = "") -> None:
        report(callback, what, error, self._warned, remedy)


def _key(callback: Trace) -> object:
    """What callbacks have in common that share a tracer."""
    layers = None if callback.layers is None else tuple(callback.layers)
    return _shared(callback), layers, callback.on_error, callback.max_seconds


def _shared(callback: Trace) -> object:
    """What callbacks have in common that share a probe."""
    if callback.probe is None:
        return callback.samples
    if isinstance(callback.probe, Probe):
        return None, id(callback.probe)
    return tuple((name, id(probe)) for name, probe in callback.probe.items())


def _compare_apart(one: Trace, other: Trace) -> bool:
    """Whether two schedules make the look before another for measures that both compare with it."""

    def before(callback: Trace) -> set[object]:
        found = {measure.reference for measure in callback.measures}
        return {reference for reference in found if reference and reference[0] == "previous"}

    together = one.due == other.due and (one.budget is None) == (other.budget is None)
    return not together and bool(before(one) & before(other))
