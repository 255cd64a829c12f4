"""The loss at given points of a landscape, some at once, the most telling ones first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrace.landscape.result import Quantity
from nettrace.landscape.weight_loss import WeightLoss

#: How many products of a weight and a sample a piece of work has, about, and how many points.
_PIECE, _MOST = 10**8, 64

_ABOUT = {
    "loss": "mean loss over the probe's samples, in nats a sample",
    "error_rate": "share of the probe's samples, or of their positions, at which another class "
    "than the target's has the largest logit",
}


class Points(ABC):
    """A sampler that evaluates the loss at points, in the order of their numbers in `order`.

    Args:
        loss: the loss of weights.
        order: which points to evaluate, first to last.

    Attributes:
        done: (points,) which were evaluated.
    """

    #: As of a `Sampler`.
    title: str

    def __init__(self, loss: WeightLoss, order: npt.NDArray[np.int64]) -> None:
        self.loss = loss
        self.done = np.zeros(len(order), bool)
        self._order = order
        self._next = 0
        # By sizes alone, for the same numbers whatever else the machine does.
        self._at_once = max(1, min(_MOST, _PIECE // (loss.size * loss.samples)))

    @property
    def share(self) -> float:
        """How many of the points are done, of one."""
        return self._next / len(self._order)

    def advance(self) -> None:
        """Evaluates the next points."""
        points = self._order[self._next : self._next + self._at_once]
        weights = torch.stack([self.weights(int(point)) for point in points])
        self.keep(points, self.loss.samples_of(weights).cpu().numpy())
        self.done[points] = True
        self._next += len(points)

    def settle(self) -> None:
        """Nothing only prepares."""
        return

    @abstractmethod
    def weights(self, point: int) -> Tensor:
        """(P,) of a point."""

    @abstractmethod
    def keep(self, points: npt.NDArray[np.int64], rows: npt.NDArray[np.float64]) -> None:
        """Is given what was found (K, R, N) at some points, as `WeightLoss.samples_of` has it."""

    def doubts(self, losses: npt.NDArray[np.float64]) -> list[str]:
        """Where points are missing, or have losses (points,) that are no numbers."""
        found, done = [], int(self.done.sum())
        if done < len(self.done):
            found.append(f"{done} of {len(self.done)} points were evaluated: give it more time")
        count = int((self.done & ~np.isfinite(losses)).sum())
        if count:
            found.append(f"the loss is not finite at {count} of {done} points")
        return found


def means(
    rows: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means over the last axis, that of samples, and their standard errors; NaN of one sample."""
    samples = rows.shape[-1]
    with np.errstate(invalid="ignore", over="ignore"):
        if samples == 1:
            return rows[..., 0], np.full(rows.shape[:-1], np.nan)
        return rows.mean(-1), rows.std(-1, ddof=1) / samples**0.5


def quantities(
    values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], dims: Sequence[str]
) -> dict[str, Quantity]:
    """Losses and, where they are there, error rates, as parts of a result.

    Args:
        values: (R, ...) of `WeightLoss.samples_of`, averaged over samples.
        errors: their standard errors, of one shape.
        dims: names of the axes but the first.
    """
    return {
        name: Quantity(value, dims, said, error)
        for (name, said), value, error in zip(_ABOUT.items(), values, errors, strict=False)
    }


def coarse_to_fine(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """The points of a grid, by number in row-major order: its middle, every so many, then all.

    So that those that are done at any time cover the grid about evenly.
    """
    away = np.meshgrid(*[np.arange(n) - n // 2 for n in counts], indexing="ij")
    steps = np.min([np.where(a == 0, 2**62, a & -a) for a in away], 0).ravel()
    distances = sum(a.astype(float) ** 2 for a in away)
    return np.lexsort((np.ravel(distances), -steps))
