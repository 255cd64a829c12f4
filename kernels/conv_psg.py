"""Per-sample gradients of a convolution's filters: norms, sum, and sum of squares.

A convolution multiplies at each place t of what it returns the filters with what they meet there,

    P_n = sum_t gy[n, t] patch(x[n], t)^T,

in the layout of the weight. Patches repeat the images as often as a filter has entries; compiled
kernels read them from the images as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nettrace.kernels.launch import check_real, is_compiled, known, operation, summing
from nettrace.kernels.psg import HELD, alike
from nettrace.kernels.still import Geometry, Patches, tiles

#: How many channels and filters a group has at least where kernels are compiled: fewer would leave
#: most of a tensor core's block empty.
_LEAST = 16
#: And how few numbers an image of these has: they are counted by 32 bits.
_MOST = 2**31


@operation("conv_psg")
def conv_psg(
    x: Tensor,
    gy: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dw: bool = True,
    sq: bool = False,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of per-sample gradients P_n of a convolution's filters, in one pass over `x`.

    Kernels are compiled for groups of 16 channels and filters or more; for fewer, torch unfolds.

    Args:
        x: (N, C, H, W) images, in any memory format.
        gy: (N, O, H', W') the gradient by what the convolution returns.
        size: (height, width) of the filters.
        stride: by how much they move down and to the right.
        padding: how many zeros there are above and below the image, and beside it.
        dilation: how far apart the entries of a filter are.
        groups: of channels.
        dw: whether to return the second result.
        sq: whether to return the third.
        precision: how a GPU multiplies float32: "tf32", "tf32x3" or "ieee".

    Returns:
        In float32 at least: (N,) squared norms, the sum over entries of P_n^2;
        (O, C / groups, *size) the sum over samples of P_n;
        (O, C / groups, *size) the sum over samples of P_n^2, entry by entry. Of what is not asked
        for, a tensor without entries. P_n is a sum over places.

    Raises:
        ValueError: if shapes do not fit, or numbers are not real, or there is no such precision.
    """
    how = known(precision)
    geometry = _checked(x, gy, size, stride, padding, dilation, groups)
    x, gy = alike(x, gy)
    n, channels, filters = *x.shape[:2], gy.shape[1]
    fits = min(channels, filters) >= groups * _LEAST
    fits = fits and max(x.numel(), gy.numel()) < _MOST * n
    if fits and is_compiled(x, gy) and gy.numel():
        from nettrace.kernels.jit.conv_psg import launch

        return launch(x, gy, size, stride, padding, dilation, groups, dw, sq, how)
    wide = summing(x)
    shape = filters, channels // groups, *size
    sqnorms = x.new_zeros((n,), dtype=wide)
    totals, squares = (x.new_zeros(shape if asked else (0,) * 4, dtype=wide) for asked in (dw, sq))
    if not gy.numel() or not x.numel():
        return sqnorms, totals, squares
    for ns in tiles(n, math.prod(shape), HELD):
        met = Patches(x[ns].to(wide).unsqueeze(1), geometry)
        moving = gy[ns].to(wide).unflatten(1, (groups, -1)).flatten(3).mT
        p = met.outer(moving, slice(None)).reshape(-1, *shape)
        if dw:
            totals += p.sum(0)
        p.square_()
        sqnorms[ns] = p.sum((1, 2, 3, 4))
        if sq:
            squares += p.sum(0)
    return sqnorms, totals, squares


@conv_psg.register_fake
def _(
    x: Tensor,
    gy: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dw: bool = True,
    sq: bool = False,
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor, Tensor]:
    known(precision)
    _checked(x, gy, size, stride, padding, dilation, groups)
    wide = summing(x, gy)
    shape = gy.shape[1], x.shape[1] // groups, *size
    return (
        x.new_empty((x.shape[0],), dtype=wide),
        x.new_empty(shape if dw else (0,) * 4, dtype=wide),
        x.new_empty(shape if sq else (0,) * 4, dtype=wide),
    )


def _checked(
    x: Tensor,
    gy: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    check_real(x=x, gy=gy)
    if x.dim() != 4 or gy.dim() != 4 or x.shape[0] != gy.shape[0]:
        raise ValueError(
            f"expected x (N, C, H, W) and gy (N, O, H', W'), got {tuple(x.shape)} and "
            f"{tuple(gy.shape)}"
        )
    for name, pair, least in (
        ("size", size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"expected a {name} of two numbers from {least} on, got {list(pair)}")
    if groups < 1 or x.shape[1] % groups or gy.shape[1] % groups:
        raise ValueError(
            f"expected groups that divide {x.shape[1]} channels and {gy.shape[1]} filters, got "
            f"{groups}"
        )
    geometry = Geometry(tuple(padding), tuple(size), tuple(stride), tuple(dilation), groups)
    places = geometry.places(x.shape[2:])
    if tuple(gy.shape[2:]) != places:
        raise ValueError(
            f"expected gy at {places} places, where filters meet the images, got "
            f"{tuple(gy.shape[2:])}"
        )
    return geometry
