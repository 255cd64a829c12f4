"""Running moments of weights: Welford's recursion over all tensors of a network at once."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_welford_(
    weights: list[Tensor], means: list[Tensor], squares: list[Tensor], count: int
) -> None:
    """Takes one more snapshot into running means and sums of squared deviations, in place.

    With n snapshots so far, this one included, for each entry

        d = weight - mean;    mean += d / n;    square += d * d * (n - 1) / n,

    after which `mean` is the mean of all n, and `square` the sum of their squared deviations from
    it: Welford (1962), Technometrics 4, 419. Nothing is squared before the mean is taken off, so
    that fluctuations much smaller than the weights keep their digits.

    Args:
        weights: the snapshot, not changed.
        means: of the snapshots before; of any value for the first. In the weights' shapes, floating
            types and devices.
        squares: as `means`; zero for the first.
        count: n, of which the first is 1.
    """
    differences = torch._foreach_sub(weights, means)
    torch._foreach_add_(means, differences, alpha=1 / count)
    share = (count - 1) / count
    torch._foreach_addcmul_(squares, differences, differences, value=share)
