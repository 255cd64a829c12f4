"""Measuring a training step by the tape of its loss, before its backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from nettrace.certificate import SpotCheckError, SpotChecks
from nettrace.freeze import random_states
from nettrace.measures import Measure
from nettrace.record import Record
from nettrace.recording import OnError, Recorder, spot_check, timed
from nettrace.statistics import StepStatistics

_CHECK, _SECONDS = "nettrace/step_spot_check", "nettrace/step_seconds"


class StepTracer(Recorder):
    """Measures training steps by the tapes of their losses, and leaves both as they are.

    No forward pass is made; the tape is read by backward passes that write nothing. What they give
    is compared with plain autograd as `nettrace.Tracer` does, as "nettrace/step_spot_check".
    """

    def __init__(self, on_error: OnError = "record") -> None:
        super().__init__(on_error, " of the training")
        self._spot_checks = SpotChecks()

    def measure(
        self,
        look: Callable[[], StepStatistics],
        model: nn.Module,
        step: int,
        measures: Sequence[Measure],
    ) -> list[Record]:
        """Takes some measures of a step.

        Args:
            look: gives the statistics of the step.
            model: the network.
            step: how many updates the weights have had.
            measures: of the statistics of a step.

        Raises:
            Exception: whatever goes wrong, if `on_error="raise"`.
        """
        start = time.perf_counter()
        found: StepStatistics | Exception
        devices = {p.device for p in model.parameters()}
        with ExitStack() as stack:
            for kind in {"cpu"} | {d.type for d in devices}:
                stack.enter_context(torch.autocast(device_type=kind, enabled=False))
            stack.enter_context(random_states(devices))
            stack.enter_context(torch.enable_grad())
            checks: list[Record] = []
            try:
                found = look()
                checks = self._check(found, step)
            except Exception as error:
                if isinstance(error, SpotCheckError):
                    checks = [spot_check(step, error, _CHECK)]
                found = error
            records = self._take(measures, step, found, {})
        return [*records, *checks, timed(step, time.perf_counter() - start, _SECONDS)]

    def _check(self, found: StepStatistics, step: int) -> list[Record]:
        """A certificate, if one is due.

        Raises:
            SpotCheckError: if it is, and cannot be given.
        """
        certificate = self._spot_checks(found.loss_gradients.shares, step)
        return [] if certificate is None else [spot_check(step, certificate, _CHECK)]
