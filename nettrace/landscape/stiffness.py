"""The largest curvature that chains meet, which says how long their steps may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

#: From weights (K, P) to the gradients (K, P) of what is sampled.
Slope: TypeAlias = Callable[[Tensor], Tensor]
#: Power iterations before the first step.
FIRST = 20
#: By how much what is followed falls at a look, where less is met.
_FALL = 0.98


class Stiffness:
    """The largest curvature of an energy around many chains, by a power iteration along each.

    A product with the Hessian is the difference of two gradients, as far apart as the energy grows
    by about one half: so that it is known where the energy is flat at one point, as at the
    singular points of networks, or has kinks. It rises at once, and falls slowly.

    Args:
        directions: (K, P) random ones to begin with, one for each chain.
        least: a curvature that the energy has at least.

    Attributes:
        value: the largest curvature, as followed.
        highest: the largest met since `forget`.
    """

    def __init__(self, directions: Tensor, least: float) -> None:
        self._directions = directions / directions.norm(dim=1, keepdim=True)
        self._least = least
        self.value = self.highest = max(least, 1.0)

    def begin(self, slope: Slope, weights: Tensor, gradients: Tensor) -> None:
        """Makes one of the first power iterations.

        Args:
            slope: the gradients at weights.
            weights: (K, P) of the chains.
            gradients: (K, P) there.
        """
        met = self._met(slope, weights, gradients)
        self.value = self.highest = max(self._least, (self.value * met) ** 0.5)

    def look(self, slope: Slope, weights: Tensor, gradients: Tensor) -> None:
        """Makes a power iteration where the chains are now; arguments as at first."""
        met = self._met(slope, weights, gradients)
        self.value = max(met, _FALL * self.value + (1 - _FALL) * met, self._least)
        self.highest = max(self.highest, met)

    def raise_to(self, value: float) -> None:
        """Takes the curvature to be larger than what was met."""
        self.value, self.highest = max(self.value, value), max(self.highest, value)

    def forget(self) -> None:
        """Begins `highest` anew."""
        self.highest = self._least

    def keep(self, chains: Tensor) -> None:
        """Goes on with some of the chains, by number."""
        self._directions = self._directions[chains]

    def _met(self, slope: Slope, weights: Tensor, gradients: Tensor) -> float:
        apart = self.value**-0.5
        change = (slope(weights + apart * self._directions) - gradients) / apart
        sizes = change.norm(dim=1)
        usable = sizes.isfinite() & (sizes > 0)
        self._directions[usable] = change[usable] / sizes[usable, None]
        found = sizes[sizes.isfinite()]
        return max(float(found.max()) if len(found) else 0.0, torch.finfo(torch.float32).tiny)
