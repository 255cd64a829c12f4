"""A look at a network: what measures make of it now, on one probe."""

from __future__ import annotations

import time
import traceback
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.optim import Optimizer

from nettrace.budget import synchronise
from nettrace.certificate import Certificate, SpotCheckError, SpotChecks, certify
from nettrace.differentiate import parse_bytes
from nettrace.explanation import Explanation, PriceList
from nettrace.freeze import frozen
from nettrace.gathered import check_gathering
from nettrace.independence import check_independence
from nettrace.measures import Measure
from nettrace.operator import Jacobian
from nettrace.own_loss import LossCheck
from nettrace.past import Past, Reference
from nettrace.price import TooDear
from nettrace.probe import Probe
from nettrace.ranks import purpose, ranks
from nettrace.record import Record
from nettrace.recording import OnError, Recorder, Taken, spot_check
from nettrace.statistics import Statistics
from nettrace.unwrapped import plain_optimizers
from nettrace.window import WeightWindow


class Observer(Recorder):
    """Measures a network on a probe whenever it is asked to, and leaves it exactly as it was.

    Args:
        probe: the samples.
        name: what it is called where several processes measure together.
        on_error: as in `nettrace.Tracer`, like all that follow.
        memory_budget: as there.
        max_seconds: as there.
        seed: as there.
        window: as there; whoever asks for measures of it shows it the weights.
    """

    def __init__(
        self,
        probe: Probe,
        name: str,
        on_error: OnError,
        memory_budget: int | str,
        max_seconds: float | None,
        seed: int,
        window: WeightWindow | None,
    ) -> None:
        super().__init__(on_error, memory_budget)
        #: The samples, or the first of several probes.
        self.probe = probe
        #: The weights of the last updates, if a measure asks for them.
        self.window = window
        #: What is known of a loss that is not declared, from where it is trained.
        self.loss_check: LossCheck | None = None
        self._purpose = purpose(name)
        self._seed = seed
        self._spot_checks = SpotChecks()
        self._past = Past()
        self._prices = PriceList(max_seconds)
        self._failure: Exception | None = None

    def observe(
        self,
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ) -> list[Record]:
        """Takes some measures now."""
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

    def keep(self, model: nn.Module, step: int, measures: Sequence[Measure]) -> None:
        """Keeps what measures will ask of this look, as if they were taken now, but takes none.

        Raises:
            Exception: whatever goes wrong with looking; nothing is kept then.
        """
        self._join(model)
        with self._frozen(model), self._ranks.together():
            found, refused = self._see(model, step, measures, (), [])
            self._past.keep(found, _references(measures, refused))

    def priced(self, model: nn.Module, measures: Sequence[Measure]) -> Explanation:
        """Predicts what some measures will cost on this network, and leaves it exactly as it was.

        Raises:
            CoupledSamplesError: if samples are coupled.
            Exception: whatever goes wrong with calling the network.
        """

        def look() -> Statistics:
            memory = self._memory_budget
            found = Statistics(model, self.probe, window=self.window, memory_budget=memory)
            check_independence(found)
            return found

        return self._prices.explain(model, look, measures)

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

        needs = {need for measure in measures for need in measure.needs}
        found = Statistics(
            model,
            self.probe,
            needs,
            step=step,
            past=self._past,
            optimizers=optimizers,
            seed=self._seed_at(step),
            window=self.window,
            memory_budget=self._allowance.bytes,
            check=check,
            loss_check=self.loss_check,
            ranks=self._ranks,
        )
        # Of several processes, each evaluates its samples without those of the others.
        asked = {need.rpartition(".")[2] for need in needs}
        if self._ranks.count > 1 or not asked <= Statistics.of_mean_loss:
            check_independence(found)
        return found, self._prices.refused(found, measures)

    def _spot_check(self, jacobian: Jacobian, step: int) -> Certificate | None:
        """A certificate, if one is due."""
        return self._spot_checks(jacobian, self._seed_at(step))

    def _seed_at(self, step: int) -> int:
        return self._seed * 1_000_003 + step


def _references(measures: Sequence[Measure], refused: Container[str]) -> set[Reference]:
    """The earlier looks that measures which are not refused compare with."""
    return {m.reference for m in measures if m.reference is not None and m.name not in refused}
