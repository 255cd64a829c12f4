"""The one path from a network to records."""

from __future__ import annotations

import copy
import json
import operator
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from nettrace.attached import Attached
from nettrace.budget import Budget, check_budget, left_out, synchronise
from nettrace.certificate import Certificate, SpotCheckError, SpotChecks, certify
from nettrace.differentiate import parse_bytes
from nettrace.explanation import Explanation, PriceList
from nettrace.freeze import frozen
from nettrace.gathered import check_gathering
from nettrace.independence import check_independence
from nettrace.measures import Measure, resolve
from nettrace.operator import Jacobian
from nettrace.own_loss import LossCheck
from nettrace.past import Past, Reference
from nettrace.price import TooDear
from nettrace.probe import Probe, check_probes, fingerprint
from nettrace.ranks import leads, purpose, ranks
from nettrace.record import Record
from nettrace.recording import OnError, Recorder, Taken, spot_check
from nettrace.schedule import Every, has_last_after, schedule
from nettrace.several import Several, of_pairs
from nettrace.statistics import Statistics
from nettrace.store.journal import UNWRITTEN, Journal
from nettrace.store.provenance import of_model
from nettrace.unwrapped import plain_model, plain_optimizers

Optimizers: TypeAlias = Optimizer | Sequence[Optimizer] | None


class Tracer(Recorder):
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
    ) -> None:
        super().__init__(on_error, memory_budget)
        check_probes(probe)
        #: The samples, or the first of several probes.
        self.probe = probe if isinstance(probe, Probe) else next(iter(probe.values()))
        self.fingerprint = fingerprint(probe)
        self.measures = chosen(measures, probe)
        self.due = schedule(every)
        self.budget = None if budget is None else check_budget(budget)
        self._ledger: Budget | None = None
        self._skipped = 0
        self._seed = seed
        self._writer = None if to is None else Journal(to, probe=self.fingerprint)
        if self._writer is not None:
            self._writer.provenance["configuration"] = json.dumps(
                {
                    "measures": [measure.name for measure in self.measures],
                    "every": str(every),
                    "probe": str(probe),
                    "memory_budget": memory_budget,
                    "max_seconds": max_seconds,
                    "budget": budget,
                    "seed": seed,
                }
            )
        self._purpose = purpose(f"Tracer of {[measure.name for measure in self.measures]}")
        self._spot_checks = SpotChecks()
        self._past = Past()
        self._prices = PriceList(max_seconds)
        self._failure: Exception | None = None
        #: What is known of a loss that is not declared, from where it is trained.
        self.loss_check: LossCheck | None = None
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
        return self.record(model, step, optimizer, False, **coordinates) if self.due(step) else []

    def record(
        self,
        model: nn.Module,
        step: int,
        optimizer: Optimizers = None,
        last: bool = False,
        **coordinates: float,
    ) -> list[Record]:
        """Measures and writes now, whatever the schedule says; otherwise as calling the tracer.

        Args:
            model: as in a call.
            step: as in a call.
            optimizer: as in a call.
            last: whether this is the last of the run, for which the budget has kept room.
            coordinates: as in a call.
        """
        if self._ledger is None:
            self._ledger = Budget(self.budget or 1)
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
            records = self.measure(model, step, self.measures, optimizer)
            if self.budget is not None:
                records += [self._ledger.record(step), left_out(step, self._skipped)]
                self._skipped = 0
            if self._writer is not None and leads(self._purpose, str(self._writer.folder)):
                self._write(self._writer, model, records, coordinates)
        return records

    def _write(
        self,
        writer: Journal,
        model: nn.Module,
        records: Sequence[Record],
        coordinates: Mapping[str, float],
    ) -> None:
        try:
            if "model" not in writer.provenance:
                writer.provenance |= of_model(model)
            writer.write(records, coordinates)
        except (OSError, TypeError) as error:
            if self.on_error == "raise":
                raise
            text = f"cannot write the trace to {writer.folder}: {error}; {UNWRITTEN}"
            self._warn("cannot write", text)

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
        if self._several is not None:
            return self._several.measure(model, step, measures, optimizer)
        self._join(model)
        start, taken = time.perf_counter(), Taken()
        optimizers = plain_optimizers(optimizer)
        self._allow_all()
        left = measures
        while left := self._attempt(model, step, left, optimizers, taken):
            self._allowance.reduce()
        times = taken.times(step, time.perf_counter() - start)
        return [*taken.in_order(measures), *taken.checks, *times]

    def _attempt(
        self,
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
        optimizers: Sequence[Optimizer],
        taken: Taken,
    ) -> list[Measure]:
        """Adds the records of one look; returns what to try again within less memory."""
        left: list[Measure] = []
        found: Statistics | Exception
        refused: Mapping[str, TooDear] = {}
        try:
            with self._frozen(model):
                try:
                    with self._ranks.together():
                        found, refused = self._see(model, step, measures, optimizers, taken.checks)
                except Exception as error:
                    found = error
                left = self._take(measures, step, found, refused, taken)
                if not isinstance(found, Exception):
                    done = [measure for measure in measures if measure not in left]
                    with self._ranks.together():
                        self._past.keep(found, _references(done, refused))
                synchronise(model)
        except Exception as error:  # of freezing itself, as of a model that is not initialised
            found = error
            left = self._take(measures, step, error, refused, taken)
        self._failure = found if isinstance(found, Exception) else None
        if self._failure is not None:  # which would keep the look and its tape until the next
            traceback.clear_frames(self._failure.__traceback__)
        return left

    def remember(self, model: nn.Module, step: int, measures: Sequence[Measure]) -> None:
        """Keeps what measures will ask of this look, as if they were taken now, but takes none.

        Raises:
            Exception: whatever goes wrong with looking; nothing is kept then.
        """
        if self._several is not None:
            measures = [measure for measure in measures if not of_pairs(measure)]
        for one in self.each():
            one._join(model)
            with one._frozen(model), one._ranks.together():
                found, refused = one._see(model, step, measures, (), [])
                one._past.keep(found, _references(measures, refused))

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

        def look() -> Statistics:
            found = Statistics(model, self.probe, memory_budget=self._memory_budget)
            check_independence(found)
            return found

        return replace(self._prices.explain(model, look, self.measures), budget=self.budget)

    def certify(self, model: nn.Module) -> Certificate:
        """Certifies the derivatives of the network on the probe, and leaves it exactly as it was.

        Of several probes, the first is taken.

        Raises:
            CoupledSamplesError: if samples are coupled.
            SpotCheckError: if derivatives differ from those of plain autograd.
            Exception: whatever goes wrong with calling the network.
        """
        with frozen(model):
            statistics = Statistics(model, self.probe, memory_budget=self._memory_budget)
            check_independence(statistics)
            return certify(statistics.jacobian, seed=self._seed)

    def refuse(self, measures: Sequence[Measure], step: int, error: Exception) -> list[Record]:
        """The records of measures that cannot be taken, for one reason.

        Raises:
            Exception: the reason, if `on_error="raise"`.
        """
        taken = Taken()
        self._take(measures, step, error, {}, taken)
        return taken.in_order(measures)

    def _join(self, model: nn.Module) -> None:
        """Finds the processes that measure this network together."""
        self._ranks = ranks(self._purpose, model, self.probe.fingerprint)

    @contextmanager
    def _frozen(self, model: nn.Module) -> Iterator[None]:
        """The network as it is measured, and the same in all processes."""
        with ExitStack() as stack:
            with self._ranks.together():
                self._ranks.check()
                check_gathering(model, self._ranks, parse_bytes(self._memory_budget))
                stack.enter_context(frozen(model))
            self._ranks.same_(list(model.buffers()))
            yield

    def _see(
        self,
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
        optimizers: Sequence[Optimizer],
        checks: list[Record],
    ) -> tuple[Statistics, Mapping[str, TooDear]]:
        """A look that has been examined, and which measures are too dear; adds to `checks`."""

        def check(jacobian: Jacobian) -> None:
            if checks and checks[0].missing is None:
                return  # it passed before memory ran out
            try:
                certificate = self._spot_check(jacobian, step)
            except SpotCheckError as error:
                checks[:] = [spot_check(step, error)]
                raise
            if certificate is not None:
                checks[:] = [spot_check(step, certificate)]

        found = Statistics(
            model,
            self.probe,
            {need for measure in measures for need in measure.needs},
            step=step,
            past=self._past,
            optimizers=optimizers,
            seed=self._seed_at(step),
            memory_budget=self._allowance.bytes,
            check=check,
            loss_check=self.loss_check,
            ranks=self._ranks,
        )
        if not found.needed <= Statistics.of_mean_loss:
            check_independence(found)
        return found, self._prices.refused(found, measures)

    def _spot_check(self, jacobian: Jacobian, step: int) -> Certificate | None:
        """A certificate, if one is due."""
        return self._spot_checks(jacobian, self._seed_at(step))

    def _seed_at(self, step: int) -> int:
        return self._seed * 1_000_003 + step


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


def _references(measures: Sequence[Measure], refused: Container[str]) -> set[Reference]:
    """The earlier looks that measures which are not refused compare with."""
    return {m.reference for m in measures if m.reference is not None and m.name not in refused}
