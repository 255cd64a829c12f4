"""The training's own steps, measured by the tapes of their losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nettrace import Record
from nettrace.batch import tensors
from nettrace.training_step import StepTracer

if TYPE_CHECKING:
    from nettrace.callbacks.trace import Trace


class Steps:
    """What some callbacks measure of the training's own steps.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        callbacks: those callbacks.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: Sequence[Trace]) -> None:
        self._trainer = trainer
        self._module = module
        self.callbacks = list(callbacks)
        self._tracers = {c.on_error: StepTracer(c.on_error) for c in callbacks}
        self._samples = 0
        #: How many updates the weights had had before this batch, and how many backward passes it
        #: has had since.
        self._step, self._passes = -1, 0
        self._measured = -1
        self._due: list[Trace] = []
        self._records: list[Record] = []

    def begin_batch(self, batch: Any, step: int) -> None:
        """Sees a batch before its training step."""
        first = next(tensors(batch), None)
        self._samples = 0 if first is None or first.dim() == 0 else len(first)
        self._samples = getattr(batch, "num_graphs", self._samples)  # whose first axis is of nodes
        self._step, self._passes = step, 0

    def measure(self, loss: Tensor, is_due: Callable[[Trace, int], bool]) -> None:
        """Measures the loss of a step before its backward pass.

        Of gradients that are accumulated over several batches, those of the first are measured; of
        an optimizer that evaluates a batch several times, the first evaluation.
        """
        automatic = self._module.automatic_optimization
        self._passes += 1
        if self._passes == 1:
            new = self._step != self._measured
            self._due = [c for c in self.callbacks if new and is_due(c, self._step)]
        elif automatic:
            return
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        if automatic:
            scale /= self._trainer.accumulate_grad_batches
        for on_error, tracer in self._tracers.items():
            measures = {m.name: m for c in self._due if c.on_error == on_error for m in c.measures}
            if measures:
                self._measured = self._step
                records = tracer.measure(
                    loss, self._module, self._samples, self._step, list(measures.values()), scale
                )
                self._records += [_numbered(record, self._passes) for record in records]

    def taken(self) -> tuple[list[Trace], list[Record]]:
        """The callbacks that were due in the batch that has ended, and the records."""
        records, self._records = self._records, []
        return self._due, records


def asked(name: str) -> str:
    """The name by which a record was asked for."""
    return re.sub(r"_backward_\d+$", "", name)


def _numbered(record: Record, passes: int) -> Record:
    """Under a name of its own, from the second backward pass of a batch on."""
    if passes == 1:
        return record
    return replace(record, name=f"{record.name}_backward_{passes}")
