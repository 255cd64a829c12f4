"""Per-sample gradients of a linear layer's weight: norms, sum, and sum of squares.

A layer that multiplies T tokens a sample with a weight of I x O has, by sample,

    P_n = sum_t a[n, t] g[n, t]^T,

where a is what the layer takes and g the gradient by what it returns. The product of matrices that
makes the weight's gradient makes all P_n on its way, and here none of them is written to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.kernels.launch import Precision, check_real, is_compiled, known, operation, summing
from nettrace.kernels.still import tiles

#: How many numbers of per-sample gradients are held at a time where nothing is compiled.
HELD = 2**22


@operation("psg_moments")
def psg_moments(
    a: Tensor,
    g: Tensor,
    weight: Tensor | None = None,
    dw: bool = True,
    sq: bool = False,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of per-sample gradients P_n = sum_t a[n, t] g[n, t]^T, in one pass over `a` and `g`.

    Args:
        a: (N, T, I) what the layer takes.
        g: (N, T, O) the gradient by what it returns.
        weight: (N,) of samples in the second result, 1 if not given.
        dw: whether to return the second result.
        sq: whether to return the third.
        precision: how a GPU multiplies float32: "tf32", "tf32x3" or "ieee".

    Returns:
        In float32 at least: (N,) squared norms, the sum over entries of P_n^2;
        (I, O) the sum over samples of weight[n] P_n;
        (I, O) the sum over samples of P_n^2, entry by entry, without weights. Of what is not asked
        for, a tensor without entries.

    Raises:
        ValueError: if shapes do not fit, or numbers are not real, or there is no such precision.
    """
    _check(a, g, weight)
    return _moments(*alike(a, g), weight, dw, sq, known(precision))


@psg_moments.register_fake
def _(
    a: Tensor,
    g: Tensor,
    weight: Tensor | None = None,
    dw: bool = True,
    sq: bool = False,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor, Tensor]:
    known(precision)
    _check(a, g, weight)
    wide = summing(a, g)
    shape = a.shape[2], g.shape[2]
    return (
        a.new_empty((a.shape[0],), dtype=wide),
        a.new_empty(shape if dw else (0, 0), dtype=wide),
        a.new_empty(shape if sq else (0, 0), dtype=wide),
    )


def _moments(
    a: Tensor, g: Tensor, weight: Tensor | None, dw: bool, sq: bool, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    wide = summing(a)
    weight = None if weight is None else weight.to(wide).contiguous()
    if a.shape[1] == 1 < a.shape[0]:
        return _of_single_tokens(a, g, weight, dw, sq, precision)
    given = (a, g) if weight is None else (a, g, weight)
    if is_compiled(*given) and a.numel() and g.numel():
        from nettrace.kernels.jit.psg import launch

        return launch(a, g, weight, dw, sq, precision)
    a, g = a.to(wide), g.to(wide)
    n, _, i = a.shape
    o = g.shape[2]
    sqnorms = a.new_zeros(n)
    totals, squares = (a.new_zeros((i, o) if asked else (0, 0)) for asked in (dw, sq))
    for rows in tiles(i, o, HELD):
        for ns in tiles(n, (rows.stop - rows.start) * o, HELD):
            p = a[ns, :, rows].mT @ g[ns]
            if dw:
                totals[rows] += p.sum(0) if weight is None else torch.tensordot(weight[ns], p, 1)
            p.square_()
            sqnorms[ns] += p.sum((1, 2))
            if sq:
                squares[rows] += p.sum(0)
    return sqnorms, totals, squares


def _of_single_tokens(
    a: Tensor, g: Tensor, weight: Tensor | None, dw: bool, sq: bool, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Of outer products, whose squares are outer products: sums over samples as over tokens."""
    first, second = (x.to(summing(x)).square() for x in (a, g))
    sqnorms = first.sum((1, 2)) * second.sum((1, 2))
    totals, squares = (sqnorms.new_zeros((0, 0)) for _ in range(2))
    if dw:
        a, g = alike(a, g if weight is None else g * weight[:, None, None])
        totals = _product(a, g, precision)
    if sq:
        squares = _product(first, second, precision)
    return sqnorms, totals, squares


def _product(a: Tensor, g: Tensor, precision: Precision) -> Tensor:
    """(I, O) the sum over samples of (N, 1, I) times (N, 1, O)."""
    return _moments(a.transpose(0, 1), g.transpose(0, 1), None, True, False, precision)[1]


def alike(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type that holds the numbers of both."""
    both = torch.promote_types(a.dtype, g.dtype)
    return a.to(both), g.to(both)


def _check(a: Tensor, g: Tensor, weight: Tensor | None) -> None:
    check_real(a=a, g=g, **({} if weight is None else {"weight": weight}))
    if a.dim() != 3 or g.dim() != 3 or a.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"expected a (N, T, I) and g (N, T, O), got {tuple(a.shape)} and {tuple(g.shape)}"
        )
    if weight is not None and weight.shape != a.shape[:1]:
        raise ValueError(
            f"expected a weight for each of {len(a)} samples, got {tuple(weight.shape)}"
        )
