"""Bins of losses, even in the loss or in its logarithm."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]
Scale: TypeAlias = Literal["log", "linear"]


class Spacing:
    """The logarithm of losses, or losses themselves.

    Args:
        kind: "log" or "linear".

    Raises:
        ValueError: if it is neither.
    """

    def __init__(self, kind: str) -> None:
        if kind not in get_args(Scale):
            raise ValueError(f"expected spacing= to be 'log' or 'linear', got {kind!r}")
        self.logarithmic = kind == "log"

    def of(self, losses: Tensor) -> Tensor:
        """The place of losses on the axis of bins; -inf for zero on one of logarithms.

        Raises:
            ValueError: if some are negative where there is no logarithm.
        """
        if not self.logarithmic:
            return losses
        if bool((losses < 0).any()):
            raise ValueError(
                f"the loss is {float(losses[losses < 0][0]):g} somewhere, which has no logarithm: "
                "pass spacing='linear'"
            )
        return losses.log()

    def slope(self, losses: Tensor) -> Tensor:
        """The derivative of `of`."""
        return 1 / losses if self.logarithmic else losses.new_ones(losses.shape)

    def losses(self, at: Array) -> Array:
        """The losses of places."""
        return np.exp(at) if self.logarithmic else at

    def edges(self, low: float, high: float, bins: int) -> Array:
        """(bins + 1,) places between two losses.

        Raises:
            ValueError: if they are in the wrong order, or not on the axis.
        """
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(
                f"expected range= to go from a loss to a higher one, got {(low, high)}"
            )
        if self.logarithmic:
            if low <= 0:
                raise ValueError(
                    f"expected range= to begin above zero for bins of the logarithm, got {low}: "
                    "or pass spacing='linear'"
                )
            low, high = np.log(low), np.log(high)
        return np.linspace(low, high, bins + 1)
