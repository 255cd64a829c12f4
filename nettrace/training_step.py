"""Measuring a training step by the tape of its loss, before its backward pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from nettrace.freeze import random_states
from nettrace.measures import Measure
from nettrace.record import Record
from nettrace.recording import Recorder, timed
from nettrace.statistics import StepStatistics


class StepTracer(Recorder):
    """Measures training steps by the tapes of their losses, and leaves both as they are.

    No forward pass is made; the tape is read by backward passes that write nothing.
    """

    def measure(
        self,
        loss: Tensor,
        model: nn.Module,
        samples: int,
        step: int,
        measures: Sequence[Measure],
        scale: float = 1.0,
    ) -> list[Record]:
        """Takes some measures of a step.

        Args:
            loss: () `scale` times the loss of the step, before its backward pass.
            model: the network.
            samples: how many samples make up the loss.
            step: how many updates the weights have had.
            measures: of the statistics of a step.
            scale: by what the loss was multiplied.

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
            try:
                found = StepStatistics(loss, model, samples, step, scale)
            except Exception as error:
                found = error
            records = self._take(measures, step, found, {})
        return [*records, timed(step, time.perf_counter() - start)]
