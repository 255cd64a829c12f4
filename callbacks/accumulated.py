"""The micro-batches over which one update's gradients are accumulated."""

from __future__ import annotations

from typing import Any

from nettrace.differentiate import parse_bytes
from nettrace.statistics.micro_batches import MicroBatches, MicroBatchStatistics


class Accumulated:
    """Gradients of an update's micro-batches, from the backward pass of the first of them on.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        samples: of the first micro-batch.
        memory_budget: as in `nettrace.jacobian`; what the gradients may take.

    Attributes:
        step: how many updates the weights have had.
    """

    def __init__(
        self, trainer: Any, module: Any, samples: int, memory_budget: int | str = "2GiB"
    ) -> None:
        self._trainer = trainer
        self._samples = samples
        self._automatic = module.automatic_optimization
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._batches = MicroBatches(parameters, parse_bytes(memory_budget))
        self.step = trainer.global_step

    @property
    def is_over(self) -> bool:
        """Whether the weights have been updated."""
        return bool(self._trainer.global_step != self.step)

    def begin_batch(self, samples: int) -> None:
        """Sees another micro-batch before its training step."""
        self._samples = samples

    def before_backward(self) -> None:
        """Sees the gradients before a backward pass adds to them."""
        self._batches.before_backward()

    def after_backward(self) -> None:
        """Sees what it has added, before it is unscaled or clipped."""
        self._batches.after_backward(self._samples, scale_of(self._trainer, self._automatic))

    def statistics(self, reason: str) -> MicroBatchStatistics | None:
        """What the micro-batches tell, if they are several with samples.

        Args:
            reason: why their samples are not told apart.
        """
        sizes = self._batches.sizes
        if len(sizes) < 2 or not all(sizes):
            return None
        return MicroBatchStatistics(self._batches, self.step, reason)


def scale_of(trainer: Any, automatic: bool) -> float:
    """By what the loss that is differentiated has been multiplied."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    return scale / trainer.accumulate_grad_batches if automatic else scale
