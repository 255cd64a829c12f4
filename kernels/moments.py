"""Running moments of weights: Welford's recursion over all tensors of a network at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from nettrace.kernels.launch import is_compiled

#: The columns of what `weight_welford_` returns, sums over a tensor's entries.
WELFORD_SUMS = (
    "(w - mean)^2",
    "(w - previous)^2",
    "w^2",
    "variance",
    "variance^2",
    "w (w - previous)",
)


def weight_welford_(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    count: int,
    previous: Sequence[Tensor] = (),
) -> Tensor:
    """Takes one more snapshot into running means and sums of squared deviations, in place.

    With n snapshots so far, this one included, for each entry

        d = weight - mean;    mean += d / n;    square += d * d * (n - 1) / n,

    after which `mean` is the mean of all n, and `square` the sum of their squared deviations from
    it: Welford (1962), Technometrics 4, 419. Nothing is squared before the mean is taken off, so
    that fluctuations much smaller than the weights keep their digits.

    Given `previous`, statistics are made in the same read of the weights. By the new mean, and with
    the variance square / n of each entry, they are the sums over entries of `WELFORD_SUMS`. The
    roots of the first three are how far the weights are from their mean, the last update, and their
    norm; the fourth squared over the fifth is in how many entries they fluctuate, their
    participation ratio; and the last tells the angle between weights and update.

    Args:
        weights: the snapshot, of real numbers; not changed.
        means: of the snapshots before; zero for the first. In the weights' shapes and
            devices, and in their floating types or wider ones; no two tensors share memory.
        squares: as `means`; zero for the first.
        count: n, of which the first is 1.
        previous: the snapshot before, in the weights' shapes, types and devices, which this one
            then replaces; none for no statistics.

    Returns:
        (tensors, 6) in float64, in the units of the weights to the second or, for the fifth, fourth
        power; (0, 6) without `previous`.

    Raises:
        ValueError: if lists, shapes, types or devices do not fit, if numbers are complex, or if
            `count` is below 1.
    """
    if not weights:
        _check(weights, means, squares, count, previous)
        return torch.zeros((0, len(WELFORD_SUMS)), dtype=torch.float64)
    count = operator.index(count)
    several = [w.detach() for w in weights], list(means), list(squares), count, list(previous)
    if not (torch.compiler.is_compiling() or is_compiled(*weights[:1])):
        _check(*several)  # without what calling an operation of torch's takes, 80 us a step
        return _by_torch(*several)
    found: Tensor = _weight_welford_(*several)
    return found


@torch.library.custom_op("nettrace::weight_welford_", mutates_args=("means", "squares", "previous"))
def _weight_welford_(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    _check(weights, means, squares, count, previous)
    states = (means, squares, previous) if previous else (means, squares)
    if is_compiled(*weights, *means, *squares) and all(
        m.dtype == s.dtype == torch.float32 for m, s in zip(means, squares, strict=True)
    ):
        if all(_lie_alike(*state) for state in zip(*states, strict=True)):
            from nettrace.kernels.jit.moments import launch

            return launch(weights, means, squares, count, previous)
    return _by_torch(weights, means, squares, count, previous)


def _by_torch(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    differences = torch._foreach_sub(weights, means)
    torch._foreach_add_(means, differences, alpha=1 / count)
    share = (count - 1) / count
    torch._foreach_addcmul_(squares, differences, differences, value=share)
    if not previous:
        return weights[0].new_empty((0, len(WELFORD_SUMS)), dtype=torch.float64)
    found = _statistics(weights, means, squares, count, previous)
    torch._foreach_copy_(previous, weights)
    return found


@_weight_welford_.register_fake
def _(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    _check(weights, means, squares, count, previous)
    shape = (len(previous), len(WELFORD_SUMS))
    return weights[0].new_empty(shape, dtype=torch.float64)


def _lie_alike(*state: Tensor) -> bool:
    """Whether tensors of one shape fill their memory, in one order."""
    if all(x.is_contiguous() for x in state):
        return True
    first, size = state[0], 1
    if any(x.stride() != first.stride() for x in state):
        return False
    for step, length in sorted(zip(first.stride(), first.shape, strict=True)):
        if length > 1 and step != size:
            return False
        size *= length
    return True


def _statistics(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    """(tensors, 6) the sums of `WELFORD_SUMS`."""
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    moved = torch._foreach_sub(wide, previous)
    variances = torch._foreach_div(squares, count)
    columns = [
        [_sqnorm(x) for x in torch._foreach_sub(wide, means)],
        [_sqnorm(x) for x in moved],
        [_sqnorm(x) for x in wide],
        [x.sum(dtype=torch.float64) for x in variances],
        [_sqnorm(x) for x in variances],
        [x.sum(dtype=torch.float64) for x in torch._foreach_mul(wide, moved)],
    ]
    return torch.stack([torch.stack(column) for column in columns], 1)


def _sqnorm(x: Tensor) -> Tensor:
    """In float64, where squares of small variances do not vanish."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _check(
    weights: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    count: int,
    previous: Sequence[Tensor],
) -> None:
    if count < 1:
        raise ValueError(f"expected a count of at least 1, this snapshot, got {count}")
    lists = {"means": means, "squares": squares, **({"previous": previous} if previous else {})}
    for name, others in lists.items():
        if len(others) != len(weights):
            raise ValueError(f"expected {len(weights)} {name}, one a weight, got {len(others)}")
        for i, (w, x) in enumerate(zip(weights, others, strict=True)):
            if x.shape != w.shape or x.device != w.device:
                raise ValueError(
                    f"expected {name}[{i}] of the weight's shape {tuple(w.shape)} on {w.device}, "
                    f"got {tuple(x.shape)} on {x.device}"
                )
            wide = w.dtype if name == "previous" else torch.promote_types(w.dtype, x.dtype)
            if not w.is_floating_point() or x.dtype != wide:
                raise ValueError(
                    f"expected weights of real floating types, and {name}[{i}] of the same"
                    f"{'' if name == 'previous' else ' or a wider'}, got {w.dtype} and {x.dtype}; "
                    "torch.view_as_real views complex numbers as real ones"
                )
