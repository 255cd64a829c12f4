"""Measuring a training step by the tape of its loss, before its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nettrace.certificate import SpotCheckError, SpotChecks
from nettrace.freeze import frozen
from nettrace.gathered import check_gathering
from nettrace.gradients import strided
from nettrace.measures import Measure
from nettrace.operator import Jacobian
from nettrace.ownership import CoupledSamplesError
from nettrace.ranks import Ranks, purpose, ranks
from nettrace.record import Record
from nettrace.recording import OnError, Recorder, Taken, spot_check
from nettrace.statistics import StepStatistics
from nettrace.statistics.micro_batches import MicroBatches, MicroBatchStatistics

#: What gives the statistics of a step.
Look: TypeAlias = Callable[[int, Ranks], StepStatistics]
_CHECK = "nettrace/step_spot_check"
_OUTPUTS_CHECK = "nettrace/step_outputs_spot_check"


class StepTracer(Recorder):
    """Measures training steps by the tapes of their losses, and leaves both as they are.

    No forward pass is made; the tape is read by backward passes that write nothing. What they give
    is compared with plain autograd as `nettrace.Tracer` does, as "nettrace/step_spot_check"; that
    of the outputs behind the loss, where measures need them, as
    "nettrace/step_outputs_spot_check".
    """

    def __init__(self, on_error: OnError = "record", memory_budget: int | str = "2GiB") -> None:
        super().__init__(on_error, memory_budget, " of the training")
        self._purpose = purpose("StepTracer")
        self._spot_checks = SpotChecks()
        self._outputs_spot_checks = SpotChecks()
        self._deferrable: Container[str] = ()
        #: What failed as samples are not told apart, to be found of micro-batches.
        self._deferred: list[tuple[Measure, CoupledSamplesError]] = []

    @property
    def reason(self) -> str:
        """Why some measures wait for micro-batches; empty if none does."""
        return str(self._deferred[0][1]) if self._deferred else ""

    def measure(
        self,
        look: Look,
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
        deferrable: Container[str] = (),
    ) -> list[Record]:
        """Takes some measures of a step.

        Args:
            look: gives the statistics of the step, within so many bytes and for the samples of so
                many processes.
            model: the network.
            step: how many updates the weights have had.
            measures: of the statistics of a step.
            deferrable: the names of those that are left for `conclude` where samples are coupled.

        Raises:
            Exception: whatever goes wrong, if `on_error="raise"`.
        """
        self._deferrable, self._deferred = deferrable, []
        start = time.perf_counter()
        taken = Taken()
        self._allow_all()
        self._ranks = ranks(self._purpose, model)
        left = measures
        with ExitStack() as stack:
            with self._ranks.together():
                check_gathering(model, self._ranks, self._allowance.bytes)
                stack.enter_context(frozen(model, evaluating=False))
            while left := self._attempt(look, step, left, taken):
                self._allowance.reduce()
        times = taken.times(step, time.perf_counter() - start, "step_")
        return [*taken.in_order(measures), *taken.checks, *times]

    def conclude(self, found: MicroBatchStatistics | None, step: int) -> list[Record]:
        """Takes what was deferred.

        Args:
            found: the statistics of micro-batches; None if there are none, so that it is missing.
            step: how many updates the weights have had.

        Raises:
            Exception: whatever goes wrong, if `on_error="raise"`.
        """
        taken = Taken()
        deferred, self._deferred, self._deferrable = self._deferred, [], ()
        self._allow_all()
        for measure, error in deferred:
            self._take([measure], step, found or error, {}, taken)
        return taken.in_order([measure for measure, _ in deferred])

    def conclude_together(
        self, loss: Tensor, model: nn.Module, samples: int, step: int, scale: float
    ) -> list[Record]:
        """Takes what was deferred of the gradients that several processes have of their batches.

        Args:
            loss: () that of this process's batch.
            model: the network.
            samples: how many are in the batch.
            step: as in `measure`.
            scale: by what the loss is multiplied.
        """
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        batches = MicroBatches(parameters, self._allowance.bytes, self._ranks)
        found = None
        if self._ranks.count == 1:  # the others have other weights
            return self.conclude(None, step)
        with suppress(Exception), self._ranks.together(), frozen(model, evaluating=False):
            gradients = torch.autograd.grad(
                loss,
                list(parameters.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            own = {n: strided(g) / scale for n, g in zip(parameters, gradients, strict=True)}
            batches.add(own, samples)
            found = MicroBatchStatistics(batches, step, self.reason)
        return self.conclude(found, step)

    def _defers(self, measure: Measure, error: Exception) -> bool:
        if not isinstance(error, CoupledSamplesError) or measure.name not in self._deferrable:
            return False
        self._deferred.append((measure, error))
        return True

    def _attempt(
        self,
        look: Look,
        step: int,
        measures: Sequence[Measure],
        taken: Taken,
    ) -> list[Measure]:
        """Adds the records of one look; returns what to try again within less memory."""
        found: StepStatistics | Exception
        try:
            with self._ranks.together():
                found = look(self._allowance.bytes, self._ranks)
                found.expect(need for measure in measures for need in measure.needs)
                found.check = partial(self._check_outputs, step, taken)
                certificate = self._spot_checks(found.loss_gradients.shares, step)
            if certificate is not None:
                _note(spot_check(step, certificate, _CHECK), taken)
        except Exception as error:
            if isinstance(error, SpotCheckError):
                _note(spot_check(step, error, _CHECK), taken)
            found = error
        return self._take(measures, step, found, {}, taken)

    def _check_outputs(self, step: int, taken: Taken, jacobian: Jacobian) -> None:
        try:
            certificate = self._outputs_spot_checks(jacobian, step)
            if certificate is not None:
                _note(spot_check(step, certificate, _OUTPUTS_CHECK), taken)
        except SpotCheckError as error:
            _note(spot_check(step, error, _OUTPUTS_CHECK), taken)
            raise


def _note(check: Record, taken: Taken) -> None:
    """Adds a check, in place of one before memory ran out."""
    taken.checks[:] = [*(c for c in taken.checks if c.name != check.name), check]
