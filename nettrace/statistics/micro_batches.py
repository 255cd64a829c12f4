"""Signal and noise where samples cannot be told apart, from the gradients of several batches.

Gradients g_m of M batches of b_m samples, at the same weights, scatter about the expected gradient
with covariance Sigma / b_m. So what is found of them as of single gradients is the signal itself,
and the noise over the batches' harmonic mean size: McCandlish et al. (2018), arXiv:1812.06162,
appendix A.1, with all M batches rather than one small and one large. Such batches are those over
which gradients are accumulated, or those of several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from nettrace.gradients import strided
from nettrace.operator import OverBudgetError, PerLayer
from nettrace.ranks import ALONE, Ranks
from nettrace.statistics.gradients import finite

#: The measures that such gradients define.
MEASURES = frozenset(
    f"gradients/{name}" for name in ("signal", "noise", "noise_scale", "signal_to_noise_per_layer")
)


class MicroBatches:
    """Gradients of several batches at the same weights, which are kept, each a copy of all weights.

    Args:
        parameters: by name.
        memory: bytes that the gradients may take.
        ranks: the processes that have batches of their own.
    """

    def __init__(self, parameters: Mapping[str, Tensor], memory: int, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._parameters = dict(parameters)
        self._memory = memory
        self._each = sum(p.numel() * p.element_size() for p in parameters.values())
        self._before: dict[str, Tensor | None] = {}
        self.sizes: list[int] = []
        self._gradients: list[PerLayer] = []

    @torch.no_grad()
    def before_backward(self) -> None:
        """Remembers what is accumulated already."""
        if self._affords(1):
            self._before = {
                name: None if p.grad is None else p.grad.detach().clone()
                for name, p in self._parameters.items()
            }

    @torch.no_grad()
    def after_backward(self, samples: int, scale: float) -> None:
        """Adds what a backward pass has added to the parameters' `.grad`, which is only read.

        Args:
            samples: of how many samples.
            scale: by what their mean loss was multiplied.
        """
        found = {}
        for name, before in self._before.items():
            now = self._parameters[name].grad
            if now is None:
                found[name] = torch.zeros_like(self._parameters[name])
            else:
                found[name] = strided(now.detach() if before is None else now - before) / scale
        self._before = {}
        self.add(found, samples)

    def add(self, gradients: PerLayer, samples: int) -> None:
        """Adds the gradient of a batch.

        Args:
            gradients: by parameter; none to count it alone, where memory does not suffice.
            samples: of how many samples its loss is the mean.
        """
        self.sizes.append(samples)
        if self._affords(0):
            self._gradients.append(gradients)
        else:
            self._gradients.clear()

    def _affords(self, more: int) -> bool:
        return (len(self.sizes) + more) * self._each <= self._memory

    def products(self) -> PerLayer:
        """By parameter, the (M, M) inner products of the gradients.

        Raises:
            OverBudgetError: if they took more than the memory.
        """
        if len(self._gradients) < len(self.sizes):
            raise OverBudgetError(
                f"the gradients of {len(self.sizes)} micro-batches, which would tell signal from "
                f"noise, take {len(self.sizes) * self._each:.3g} bytes, above the memory budget "
                f"of {self._memory:.3g} bytes"
            )
        found = {}
        for name in self._parameters:
            rows = torch.stack([gradients[name].flatten() for gradients in self._gradients])
            rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
            rows = self.ranks.join(rows)
            found[name] = rows.double() @ rows.double().mT
        return found


class MicroBatchStatistics:
    """Inner products of micro-batches' gradients.

    Args:
        batches: those, at least two in all processes.
        step: how many updates the weights have had.
        reason: why samples are not told apart.

    Attributes:
        samples: M, of which each stands for a batch.
    """

    def __init__(self, batches: MicroBatches, step: int, reason: str) -> None:
        self._batches = batches
        self._reason = reason
        self._sizes = [size for sizes in batches.ranks.each(batches.sizes) for size in sizes]
        self.samples = len(self._sizes)
        self.step = step

    @property
    def gradient_layer_squares(self) -> PerLayer:
        """By parameter, (M,) squared norms of the gradients."""
        return {name: product.diagonal() for name, product in self._products.items()}

    @property
    def gradient_layer_overlaps(self) -> PerLayer:
        """By parameter, (M,) inner products of the gradients with their mean."""
        return {name: product.mean(1) for name, product in self._products.items()}

    @property
    def gradient_batch(self) -> float:
        """The harmonic mean of the batches' sizes."""
        return len(self._sizes) / sum(1 / size for size in self._sizes)

    @cached_property
    def _products(self) -> PerLayer:
        return finite(self._batches.products())

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """What to note beside a measure: that it is of micro-batches, and why."""
        sizes = ", ".join(map(str, dict.fromkeys(self._sizes)))
        alone = self._batches.ranks.count == 1
        batches = "accumulated micro-batches" if alone else "processes' batches"
        return {
            "mode": "training step",
            "batch": f"{self.samples} {batches} of {sizes} samples",
            "gradients": "of whole micro-batches, of which the noise is told for single samples by "
            "their size; standard error by leaving out micro-batches",
            "samples_apart": f"no: {self._reason}",
        }
