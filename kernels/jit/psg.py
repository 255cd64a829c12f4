"""`nettrace.kernels.psg` in Triton: the product of all samples, looked at where one ends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import PSG, PSG_SQUARES
from nettrace.kernels.launch import Precision, configured, divided, products, split, summed, widened

#: How many rows of tiles are done together, so that what they read stays in the cache.
TOGETHER = 8


@triton.jit  # type: ignore[untyped-decorator]
def place(tile, high, wide, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of one of `high` x `wide` tiles: down some rows, then on to the right."""
    first = tile // (TOGETHER * wide) * TOGETHER
    rows = tl.minimum(high - first, TOGETHER)
    tile = tile % (TOGETHER * wide)
    return first + tile % rows, tile // rows


@triton.jit  # type: ignore[untyped-decorator]
def moments_kernel(  # type: ignore[no-untyped-def]
    a,
    g,
    weight,
    sqnorms,
    totals,
    squares,
    samples,
    tokens,
    rows,
    columns,
    an,
    at,
    gn,
    gt,
    WEIGHTED: tl.constexpr,
    DW: tl.constexpr,
    SQ: tl.constexpr,
    PREC: tl.constexpr,
    TOGETHER: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """A program has a tile of the weight, and every so many-th sample."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    row, column = place(tile, tl.cdiv(rows, BI), tl.cdiv(columns, BO), TOGETHER)
    i = row * BI + tl.arange(0, BI)
    o = column * BO + tl.arange(0, BO)
    ip = a + i[:, None]
    op = g + o[None, :]
    acc = tl.zeros([BI, BO], tl.float32)
    total = tl.zeros([BI, BO], tl.float32)
    square = tl.zeros([BI, BO], tl.float32)
    steps = tl.cdiv(tokens, BT)
    # One loop over samples and tokens, so that loads run ahead from a sample to the next.
    for step in range(tl.cdiv(samples - part, parts) * steps):
        n = part + step // steps * parts
        t = step % steps * BT + tl.arange(0, BT)
        x = tl.load(
            ip + (n.to(tl.int64) * an + t[None, :].to(tl.int64) * at),
            (i < rows)[:, None] & (t < tokens)[None, :],
            other=0.0,
        )
        y = tl.load(
            op + (n.to(tl.int64) * gn + t[:, None].to(tl.int64) * gt),
            (t < tokens)[:, None] & (o < columns)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, y, acc, input_precision=PREC)
        if step % steps == steps - 1:
            power = acc * acc
            tl.store(sqnorms + tile.to(tl.int64) * samples + n, tl.sum(power))
            if SQ:
                square += power
            if DW:
                if WEIGHTED:
                    total += acc * tl.load(weight + n)
                else:
                    total += acc
            acc = tl.zeros([BI, BO], tl.float32)
    to = (part.to(tl.int64) * rows + i[:, None]) * columns + o[None, :]
    some = (i < rows)[:, None] & (o < columns)[None, :]
    if DW:
        tl.store(totals + to, total, some)
    if SQ:
        tl.store(squares + to, square, some)


def launch(
    a: Tensor, g: Tensor, weight: Tensor | None, dw: bool, sq: bool, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,), (I, O) and (I, O) in float32; see `nettrace.kernels.psg.psg_moments`."""
    asked_rows, asked_columns = a.shape[2], g.shape[2]
    a, g = aligned(a), aligned(g)
    n, t, i = a.shape
    o = g.shape[2]
    config = configured(PSG_SQUARES if sq else PSG, a)
    bi, bo, bt = fitted(config.blocks, (i, o, t))
    tiles = divided(i, bi) * divided(o, bo)
    parts = split(tiles * (1 + (dw or sq)), most=n)  # sums of parts are written and read again
    sqnorms = a.new_empty((tiles, n), dtype=torch.float32)
    totals, squares = (
        a.new_empty((parts, i, o) if asked else (0, 0, 0), dtype=torch.float32)
        for asked in (dw, sq)
    )
    with torch.cuda.device_of(a):
        moments_kernel[(tiles, parts)](
            *(a, g, sqnorms if weight is None else weight, sqnorms, totals, squares),
            *(n, t, i, o, *a.stride()[:2], *g.stride()[:2]),
            WEIGHTED=weight is not None,
            DW=dw,
            SQ=sq,
            PREC=products(a, precision),
            TOGETHER=TOGETHER,
            BI=bi,
            BO=bo,
            BT=bt,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    totals, squares = (
        summed(x)[:asked_rows, :asked_columns].contiguous() for x in (totals, squares)
    )
    return sqnorms.sum(0), totals, squares


def aligned(x: Tensor) -> Tensor:
    """The same so that 16 bytes at a time can be read: in a copy, with zeros added, if need be.

    A copy is read once, what is multiplied once for each tile; and kernels that read number by
    number need more registers than there are.
    """
    x = widened(x)
    along = x.shape[2], *x.stride()[:2], x.data_ptr()
    if x.stride(2) == 1 and not any(number % 16 for number in along):
        return x
    return F.pad(x, (0, -x.shape[2] % 16)).contiguous()


def fitted(blocks: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks not much larger than what there is, but 16 at least, as tensor cores want them."""
    some = (max(16, 1 << (count - 1).bit_length()) for count in counts)
    return tuple(min(*pair) for pair in zip(blocks, some, strict=True))
