"""The one path from a network to records."""

from __future__ import annotations

import copy
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from nettrace.attached import Attached
from nettrace.budget import Budget, check_budget, left_out, synchronise
from nettrace.certificate import SpotChecks
from nettrace.explanation import Explanation, PriceList
from nettrace.measures import Measure, resolve
from nettrace.observer import Observer
from nettrace.past import Past
from nettrace.probe import Probe, check_probes, fingerprint
from nettrace.ranks import leads
from nettrace.record import Record
from nettrace.recording import OnError
from nettrace.schedule import Every, has_last_after, schedule
from nettrace.several import Several, of_pairs
from nettrace.store.journal import UNWRITTEN, Journal
from nettrace.store.provenance import of_model
from nettrace.unwrapped import plain_model, plain_optimizers
from nettrace.waiting import Waiting, reads_window, settings
from nettrace.window import WeightWindow

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None


class Tracer(Observer):
    """Measures a network at scheduled steps, and leaves it exactly as it was.

    At the first record that rests on derivatives, at those numbered 2, 4, 8, ... and whenever the
    operations on the tape change, a few entries of the Jacobian are compared with plain autograd.
    The record "nettrace/spot_check" then holds the largest difference, and as its attribute
    "certificate" the `nettrace.Certificate`, as JSON. Where the check fails, whatever rests on
    derivatives is missing, with the reason, until it passes.

    Measures that compare looks compare with the first at which they were taken and the one before.
    What they need of those is kept in memory, and `state_dict` saves it with a checkpoint. A step
    before the last begins another run.

    At the first record, and whenever the operations on the tape change, the price of each measure
    is predicted (see `explain`). One that is too dear is not taken; its record is missing, with the
    price, the limit and what would do instead.

    Where memory runs out, what was asked for is tried again within a quarter of the memory budget,
    down to a 64th; the attribute "memory_budget" then has the bytes. Where none of these does, it
    is missing, and is tried but once at each later record.

    Args:
        probe: the samples to measure on; or several by name, as {"train": p, "val": q}: each
            record then has a leading axis "probe", or "pair" if it compares two of them.
        measures: names of measures or of groups of them.
        every: when to measure: a period in steps, "log", the steps themselves, or a function from a
            step to yes or no.
        to: a folder for the trace, which `nettrace.open` reads; None keeps nothing on disk.
        on_error: "record" notes why a measure is missing, warns once and goes on; "raise" raises.
        memory_budget: as in `nettrace.jacobian`.
        max_seconds: how long one measure may take at one record, as predicted; None for any time,
            without a prediction.
        budget: the share of wall time since the first call that may be spent measuring, such as
            0.05; scheduled steps are left out to stay within it, as `nettrace.budget.Budget` says,
            and the records "nettrace/share" and "nettrace/skipped" tell of it. Windows are thinned
            step by step; where a schedule has the last step, what that will take is kept for it.
            Of several processes, the first decides. None for any share.
        seed: for measures that draw random numbers; they draw the same at the same step.
        window: the weights of the last updates, which measures of their fluctuations need. By
            default one is made where such a measure is asked for; it sees the weights whenever the
            tracer is called, which is then to be after every update, or `watch`. It is not saved by
            `state_dict`: in a run that is resumed, it fills anew.
        hyperparameters: of the run, such as {"learning_rate": 0.1}, which are kept with the trace;
            reports and live pages group runs by them.

    Raises:
        ValueError: if a measure is unknown, the schedule never fires, or a limit is not positive.

    Example:
        >>> import torch, nettrace as nt
        >>> model = torch.nn.Linear(3, 2)
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> tracer = nt.Tracer(probe, ["ntk/entropy", "fisher"], every=100)
        >>> [record.name for record in tracer(model, step=0)][:2]
        ['ntk/entropy', 'fisher/trace']
    """

    def __init__(
        self,
        probe: Probe | Mapping[str, Probe],
        measures: str | Iterable[str],
        *,
        every: Every = 1,
        to: str | Path | None = None,
        on_error: OnError = "record",
        memory_budget: int | str = "2GiB",
        max_seconds: float | None = 60.0,
        budget: float | None = None,
        seed: int = 0,
        window: WeightWindow | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        check_probes(probe)
        self.measures = chosen(measures, probe)
        names = [measure.name for measure in self.measures]
        self._is_own_window = window is None
        if window is None and any(map(reads_window, self.measures)):
            window = WeightWindow()
        first = probe if isinstance(probe, Probe) else next(iter(probe.values()))
        called = f"Tracer of {names}"
        super().__init__(first, called, on_error, memory_budget, max_seconds, seed, window)
        self.fingerprint = fingerprint(probe)
        self.due = schedule(every)
        self.budget = None if budget is None else check_budget(budget)
        self._skipped = 0
        self._waiting = Waiting(window)
        self._writer = None if to is None else Journal(to, probe=self.fingerprint)
        if self._writer is not None:
            self._writer.provenance["configuration"] = json.dumps(
                {
                    "measures": names,
                    "every": str(every),
                    "probe": str(probe),
                    "memory_budget": memory_budget,
                    "max_seconds": max_seconds,
                    "budget": budget,
                    "seed": seed,
                    "window": None if window is None else settings(window),
                    "hyperparameters": dict(hyperparameters or {}),
                },
                default=str,
            )
        self._several = None if isinstance(probe, Probe) else Several(self, probe)

    def twin(self, probe: Probe, name: str) -> Tracer:
        """The same for a probe by that name, with a past of its own, and nothing written."""
        twin = copy.copy(self)
        twin.probe, twin._where = probe, f" on {name}"
        twin._purpose += twin._where
        twin._writer = twin._several = None
        twin._spot_checks, twin._past = SpotChecks(), Past()
        twin._prices = PriceList(self._prices.max_seconds)
        return twin

    def each(self) -> list[Tracer]:
        """The tracers of several probes, or this one."""
        return [self] if self._several is None else list(self._several.tracers.values())

    def __call__(
        self, model: nn.Module, step: int, optimizer: Optimizers = None, **coordinates: float
    ) -> list[Record]:
        """Measures the network if the schedule says so.

        Args:
            model: the network; it is left exactly as it is. Of one that DistributedDataParallel or
                accelerate has wrapped, what is inside is measured.
            step: how many updates its weights have had.
            optimizer: the one that makes them, or several that share them, for measures that need
                it; it is only read.
            coordinates: what else to note beside the step, such as the epoch.

        Returns:
            The records, empty between scheduled steps, and at those that the budget leaves out.

        Raises:
            Exception: whatever went wrong, if `on_error="raise"`.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        if self.due(step):
            return self.record(model, step, optimizer, None, **coordinates)
        self.watch(model, step, optimizer, coordinates.get("samples", math.nan))
        return []

    def watch(
        self,
        model: nn.Module,
        step: int,
        optimizer: Optimizers = None,
        samples: float = math.nan,
    ) -> None:
        """Shows the weights to the window, if there is one; to be called after every update.

        Calling the tracer does so too, also between scheduled steps.

        Args:
            model: as in a call.
            step: as in a call.
            optimizer: as in a call.
            samples: how many samples were seen so far, if that is known; the coordinate of that
                name where the tracer is called.
        """
        if self.window is not None:
            with self._ledger.measuring():
                self.window.see(plain_model(model), step, plain_optimizers(optimizer), samples)

    def record(
        self,
        model: nn.Module,
        step: int,
        optimizer: Optimizers = None,
        last: bool | None = None,
        **coordinates: float,
    ) -> list[Record]:
        """Measures and writes now, whatever the schedule says; otherwise as calling the tracer.

        Args:
            model: as in a call.
            step: as in a call.
            optimizer: as in a call.
            last: whether this is the last of the run, for which the budget has kept room. Where
                that is known, measures of a window are left out until it is full, and `conclude`
                takes those that never were; else they are missing, with the reason.
            coordinates: as in a call.
        """
        self.watch(model, step, optimizer, coordinates.get("samples", math.nan))
        measures = self.measures if last is None else self.ready(self.measures)
        if not measures:
            return []
        model = plain_model(model)
        synchronise(model)
        all_ = frozenset({"all"})
        reserve = all_ if not last and has_last_after(self.due, step) else frozenset()
        if self.budget:
            self._join(model)
            if not self._ranks.say(self._ledger.allows(all_, reserve)):
                self._skipped += 1
                return []
        with self._ledger.measuring(all_):
            records = self.measure(model, step, measures, optimizer)
            if self.budget is not None:
                records += [self._ledger.record(step), left_out(step, self._skipped)]
                self._skipped = 0
            self._write(model, records, coordinates)
        return records

    def _write(
        self, model: nn.Module, records: Sequence[Record], coordinates: Mapping[str, float]
    ) -> None:
        writer = self._writer
        if writer is None or not records or not leads(self._purpose, str(writer.folder)):
            return
        try:
            if "model" not in writer.provenance:
                writer.provenance |= of_model(model)
            writer.write(records, coordinates)
        except (OSError, TypeError) as error:
            if self.on_error == "raise":
                raise
            text = f"cannot write the trace to {writer.folder}: {error}; {UNWRITTEN}"
            self._warn("cannot write", text)

    @cached_property
    def _ledger(self) -> Budget:
        """What is spent, from the first call on."""
        return Budget(self.budget or 1)

    def ready(self, measures: Sequence[Measure]) -> list[Measure]:
        """Those of some measures that need not wait for the window of weights to be full."""
        return self._waiting.ready(measures)

    def conclude(
        self, model: nn.Module, step: int, optimizer: Optimizers = None, **coordinates: float
    ) -> list[Record]:
        """Takes and writes measures that have waited for a window to be full, and never were taken.

        They are missing with the reason if it is not full yet; to be called where a run ends.
        """
        waited, model = self._waiting.in_vain(), plain_model(model)
        records = self.measure(model, step, waited, optimizer) if waited else []
        self._write(model, records, coordinates)
        return records

    def forget(self) -> None:
        """Lets go of the weights in the window, if the tracer made that for itself."""
        if self.window is not None and self._is_own_window:
            self.window.begin()

    def attached(self, model: nn.Module, optimizer: Optimizers, *, step: int = 0) -> Attached:
        """A context in which the tracer counts the optimizer's steps, and measures at those due.

        Args:
            model: the network, as in a call.
            optimizer: the one that updates it, or several; of several, the steps of the last are
                counted, so that it sees the weights after all have moved them. A step that
                GradScaler or accelerate skip does not count.
            step: how many updates the weights have had already, in a run that is resumed.

        Raises:
            TypeError: if that is no network or optimizer.
            ValueError: if the step is negative.

        Example:
            >>> import torch, nettrace as nt
            >>> model = torch.nn.Linear(3, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
            >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
            >>> tracer = nt.Tracer(nt.Probe(x, y), "loss/mean", every=2)
            >>> with tracer.attached(model, optimizer) as run:
            ...     for _ in range(5):
            ...         torch.nn.functional.cross_entropy(model(x), y).backward()
            ...         optimizer.step()
            >>> run.step
            5
        """
        return Attached(self, model, optimizer, step)

    def take_up(self, step: int) -> None:
        """Goes on from a step of an earlier run, whose records after it are superseded."""
        if self._writer is not None:
            self._writer.take_up(step)

    def measure(
        self,
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
        optimizer: Optimizers = None,
    ) -> list[Record]:
        """Takes some measures now, whatever the schedule says, and writes nothing."""
        self._waiting.taken(measures)
        if self._several is not None:
            return self._several.measure(model, step, measures, optimizer)
        return self.observe(model, step, measures, optimizer)

    def remember(self, model: nn.Module, step: int, measures: Sequence[Measure]) -> None:
        """Keeps what measures will ask of this look, as if they were taken now, but takes none.

        Raises:
            Exception: whatever goes wrong with looking; nothing is kept then.
        """
        if self._several is not None:
            measures = [measure for measure in measures if not of_pairs(measure)]
        for one in self.each():
            one.keep(model, step, measures)

    @property
    def failure(self) -> Exception | None:
        """What kept the last look from being taken at all; on each probe, if there are several."""
        found = [one._failure for one in self.each()]
        return found[0] if all(found) else None

    def state_dict(self) -> dict[str, Any]:
        """What earlier looks left, by the probe's fingerprint: tensors, numbers and texts alone.

        It can be saved by `torch.save` and loaded with `weights_only=True`. The trace is brought to
        the disk, so that it holds all up to the checkpoint.
        """
        self.sync()
        return {one.probe.fingerprint(): one._past.state_dict() for one in self.each()}

    def sync(self) -> None:
        """Brings the trace to the disk."""
        if self._writer is not None:
            try:
                self._writer.sync()
            except OSError as error:
                if self.on_error == "raise":
                    raise
                self._warn("cannot sync", f"cannot bring the trace to the disk: {error}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a run where `state_dict` was saved, to compare with its first look.

        Raises:
            ValueError: if that was on other samples.
        """
        for one in self.each():
            own = one.probe.fingerprint()
            if own not in state:
                raise ValueError(
                    f"expected what was kept of looks on the probe {own}, got that of the probes "
                    f"{sorted(state)}: looks on other samples cannot be compared; give the probe "
                    "that the run began with"
                )
            one._past.load_state_dict(state[own])

    def explain(self, model: nn.Module) -> Explanation:
        """Predicts what the measures will cost on this network, and leaves it exactly as it was.

        Raises:
            CoupledSamplesError: if samples are coupled.
            Exception: whatever goes wrong with calling the network.
        """
        return replace(self.priced(model, self.measures), budget=self.budget)


def chosen(
    measures: str | Iterable[str], probe: Probe | Mapping[str, Probe] | None
) -> list[Measure]:
    """Measures by name; of a group, those that compare probes only if there are several.

    Raises:
        ValueError: as `resolve`.
    """
    names = [measures] if isinstance(measures, str) else list(measures or ())
    several = isinstance(probe, Mapping) and len(probe) > 1
    return [m for m in resolve(names) if several or m.name in names or not of_pairs(m)]
