"""The loss that a first training step returns, held against the one that is assumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nettrace import Probe, Tracer
from nettrace.freeze import frozen
from nettrace.measures import Measure
from nettrace.missing import told
from nettrace.own_loss import LossCheck, compare
from nettrace.statistics import Statistics
from nettrace.unwrapped import is_spread


class FirstBatch:
    """Evaluates the first batch as its training step is about to, and compares the losses.

    A training step that draws random numbers of its own before it calls the network, or changes the
    batch, looks like one of another loss; the reason then has both numbers and says what to pass.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        tracers: with their measures; those that rest on a loss which is not declared are told.
    """

    def __init__(
        self, trainer: Any, module: Any, tracers: Iterable[tuple[Tracer, Sequence[Measure]]]
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._tracers = [
            tracer
            for group, measures in tracers
            if any(Statistics.of_likelihood & set(measure.needs) for measure in measures)
            for tracer in group.each()
            if tracer.probe.losses is None and tracer.probe.likelihood is None
        ]
        self._seen: list[tuple[Tracer, Probe, Tensor]] = []
        for tracer in self._tracers:
            tracer.loss_check = LossCheck("not checked yet: no batch has been trained on")

    @property
    def is_due(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self._tracers)

    def evaluate(self, batch: Any) -> None:
        """Takes the outputs on the batch, with the weights, modes and draws of its training step.

        Leaves the network exactly as it is.
        """
        tracers, self._tracers = self._tracers, []
        if any(is_spread(p) for p in self._module.parameters()):
            for tracer in tracers:
                tracer.loss_check = _unchecked("the parameters are spread over processes")
            return
        for tracer in tracers:
            try:
                probe, outputs = self._outputs(tracer.probe, batch)
                self._seen.append((tracer, probe, outputs))
            except Exception as error:  # of a batch that is not made as the probe is
                tracer.loss_check = _unchecked(told(error))

    def compare(self, returned: Any) -> None:
        """Compares with what the training step returned."""
        if not self._seen:
            return
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if isinstance(loss, Tensor) and self._module.automatic_optimization:
            loss = loss * self._trainer.accumulate_grad_batches  # by which Lightning divides it
        seen, self._seen = self._seen, []
        for tracer, probe, outputs in seen:
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                tracer.loss_check = _unchecked("the first training step returned no loss")
            elif any(isinstance(o, torch.optim.LBFGS) for o in self._trainer.optimizers):
                tracer.loss_check = _unchecked("LBFGS moves the weights before the loss is seen")
            else:
                try:
                    tracer.loss_check = compare(probe, outputs, loss, "the first batch")
                except ValueError as error:
                    tracer.loss_check = _unchecked(str(error))

    def _outputs(self, like: Probe, batch: Any) -> tuple[Probe, Tensor]:
        with frozen(self._module, evaluating=False):
            probe = Probe.from_batch(
                batch, forward=like.forward, class_axis=like.class_axis, select=like.select
            )
            with self._trainer.precision_plugin.train_step_context():
                return probe, probe.look(self._module).detach()


def _unchecked(reason: str) -> LossCheck:
    return LossCheck(f"not checked: {reason}")
