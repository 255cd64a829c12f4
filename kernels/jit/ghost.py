"""`nettrace.kernels.ghost` in Triton: a program holds the tokens of some samples against others'.

A tile has BM rows, which are TB tokens of each of BM / TB samples. Products of inputs and products
of gradients meet in registers: only their sum over tokens is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import GHOST, GHOST_NORM, GHOST_SHORT
from nettrace.kernels.launch import Precision, configured, divided, products, split, summed, widened


@triton.jit
def corner(pair, count):  # type: ignore[no-untyped-def]
    """The row and the column of one of count (count + 1) / 2 pairs with column <= row.

    Row count - 1 and row 0 together are as long as row count - 2 and row 1, and so on.
    """
    fold = pair // (count + 1)
    column = pair % (count + 1)
    row = count - 1 - fold
    long = column <= row
    return tl.where(long, row, fold), tl.where(long, column, column - row - 1)


@triton.jit  # type: ignore[untyped-decorator]
def inner(  # type: ignore[no-untyped-def]
    x,
    y,
    some,
    others,
    xd,
    yd,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BM, BN) inner products of the rows at `x` with those at `y`; 0 for those that are not."""
    found = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        within = k < width
        k = k.to(tl.int64)
        left = tl.load(x[:, None] + k[None, :] * xd, some[:, None] & within[None, :], other=0.0)
        right = tl.load(y[None, :] + k[:, None] * yd, others[None, :] & within[:, None], other=0.0)
        found = tl.dot(left, right, found, input_precision=PRECISION)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def gram_kernel(  # type: ignore[no-untyped-def]
    a,
    g,
    b,
    h,
    out,
    samples,
    others,
    tokens,
    tokens_of_others,
    inputs,
    outputs,
    an,
    at,
    ad,
    gn,
    gt,
    gd,
    bm,
    bs,
    bd,
    hm,
    hs,
    hd,
    SYMMETRIC: tl.constexpr,
    TB: tl.constexpr,
    SB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds up, over some pairs of blocks of tokens, what samples have in common with others."""
    RN: tl.constexpr = BM // TB
    RM: tl.constexpr = BN // SB
    tile = tl.program_id(0)
    part = tl.program_id(1)
    if SYMMETRIC:
        WIDER: tl.constexpr = RN // RM
        i, j = corner(tile // WIDER, tl.cdiv(samples, RN))
        j = j * WIDER + tile % WIDER
    else:
        columns = tl.cdiv(others, RM)
        i = tile // columns
        j = tile % columns
    row = tl.arange(0, BM)
    column = tl.arange(0, BN)
    n = (i * RN + row // TB).to(tl.int64)
    m = (j * RM + column // SB).to(tl.int64)
    blocks = tl.cdiv(tokens_of_others, SB)
    found = tl.zeros([RN, RM], tl.float32)
    for pair in range(part, tl.cdiv(tokens, TB) * blocks, tl.num_programs(1)):
        t = ((pair // blocks) * TB + row % TB).to(tl.int64)
        s = ((pair % blocks) * SB + column % SB).to(tl.int64)
        these = (n < samples) & (t < tokens)
        those = (m < others) & (s < tokens_of_others)
        x, y = a + n * an + t * at, b + m * bm + s * bs
        met = inner(x, y, these, those, ad, bd, inputs, BM, BN, BK, PRECISION)
        x, y = g + n * gn + t * gt, h + m * hm + s * hs
        met *= inner(x, y, these, those, gd, hd, outputs, BM, BN, BK, PRECISION)
        if RN == 1 and RM == 1:
            found += tl.sum(met)
        else:
            met = tl.sum(tl.reshape(met, [BM, RM, SB]), axis=2)
            found += tl.sum(tl.reshape(met, [RN, TB, RM]), axis=1)
    n = (i * RN + tl.arange(0, RN)).to(tl.int64)[:, None]
    m = (j * RM + tl.arange(0, RM)).to(tl.int64)[None, :]
    out += part.to(tl.int64) * samples * others
    if SYMMETRIC:
        # A tile across the diagonal has both of (n, m) and (m, n), of which one is kept.
        kept = (n < samples) & (m <= n)
        tl.store(out + m * samples + n, found, kept)
    else:
        kept = (n < samples) & (m < others)
    tl.store(out + n * others + m, found, kept)


@triton.jit  # type: ignore[untyped-decorator]
def sqnorm_kernel(  # type: ignore[no-untyped-def]
    a,
    g,
    out,
    samples,
    tokens,
    inputs,
    outputs,
    an,
    at,
    ad,
    gn,
    gt,
    gd,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds up what each sample's tokens have in common: each pair of blocks of them once."""
    RN: tl.constexpr = BM // TB
    first = tl.program_id(0) * RN
    part = tl.program_id(1)
    row = tl.arange(0, BM)
    n = (first + row // TB).to(tl.int64)
    blocks = tl.cdiv(tokens, TB)
    found = tl.zeros([RN], tl.float32)
    for pair in range(part, blocks * (blocks + 1) // 2, tl.num_programs(1)):
        i, j = corner(pair, blocks)
        t = (i * TB + row % TB).to(tl.int64)
        s = (j * TB + row % TB).to(tl.int64)
        these = (n < samples) & (t < tokens)
        those = (n < samples) & (s < tokens)
        x, y = a + n * an + t * at, a + n * an + s * at
        met = inner(x, y, these, those, ad, ad, inputs, BM, BM, BK, PRECISION)
        x, y = g + n * gn + t * gt, g + n * gn + s * gt
        met *= inner(x, y, these, those, gd, gd, outputs, BM, BM, BK, PRECISION)
        times = tl.where(i == j, 1.0, 2.0)
        if RN == 1:
            found += times * tl.sum(met)
        else:
            own = (row // TB)[:, None] == (row // TB)[None, :]
            met = tl.sum(tl.where(own, met, 0.0), axis=1)
            found += times * tl.sum(tl.reshape(met, [RN, TB]), axis=1)
    n = first + tl.arange(0, RN)
    tl.store(out + part.to(tl.int64) * samples + n, found, n < samples)


def launch_gram(
    a: Tensor, g: Tensor, b: Tensor | None, h: Tensor | None, precision: Precision
) -> Tensor:
    """(N, M) in float32; see `nettrace.kernels.ghost.ghost_gram`."""
    symmetric = b is None or h is None
    a, g = widened(a), widened(g)
    # What is multiplied is of one type.
    b, h = (a, g) if b is None or h is None else (widened(b), widened(h))
    a, b = _alike(a, b)
    g, h = _alike(g, h)
    (n, t, d), (m, s, _), o = a.shape, b.shape, g.shape[2]
    widest = max(a, g, key=lambda x: x.element_size())
    config = configured(GHOST_SHORT if max(t, s) <= 8 else GHOST, widest)
    rows, columns, bk = config.blocks
    if symmetric:
        tb = sb = held(n, t, columns)
        count = divided(n, rows // tb)
        tiles = count * (count + 1) // 2 * (rows // columns)
    else:
        tb, sb = held(n, t, rows), held(m, s, columns)
        tiles = divided(n, rows // tb) * divided(m, columns // sb)
    parts = split(tiles, most=divided(t, tb) * divided(s, sb))
    out = a.new_empty((parts, n, m), dtype=torch.float32)
    with torch.cuda.device_of(a):
        gram_kernel[(tiles, parts)](
            *(a, g, b, h, out, n, m, t, s, d, o),
            *(*a.stride(), *g.stride(), *b.stride(), *h.stride()),
            SYMMETRIC=symmetric,
            TB=tb,
            SB=sb,
            BM=rows,
            BN=columns,
            BK=bk,
            PRECISION=products(widest, precision),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return summed(out)


def launch_sqnorm(a: Tensor, g: Tensor, precision: Precision) -> Tensor:
    """(N,) in float32; see `nettrace.kernels.ghost.ghost_sqnorm`."""
    a, g = widened(a), widened(g)
    (n, t, d), o = a.shape, g.shape[2]
    widest = max(a, g, key=lambda x: x.element_size())
    config = configured(GHOST_NORM, widest)
    most, bk = config.blocks
    # Of products between samples none is wanted: tiles are as small as tensor cores take them.
    tb = min(triton.next_power_of_2(t), most)
    rows = max(16, tb)
    programs = divided(n, rows // tb)
    blocks = divided(t, tb)
    parts = split(programs, most=blocks * (blocks + 1) // 2)
    out = a.new_empty((parts, n), dtype=torch.float32)
    with torch.cuda.device_of(a):
        sqnorm_kernel[(programs, parts)](
            *(a, g, out, n, t, d, o, *a.stride(), *g.stride()),
            TB=tb,
            BM=rows,
            BK=bk,
            PRECISION=products(widest, precision),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return summed(out)


def held(samples: int, tokens: int, rows: int) -> int:
    """How many tokens of a sample a tile of so many rows holds, so that tiles are fewest."""
    least = 1 if tokens <= 8 else 4  # fewer take registers for sums of many pairs of samples
    sizes = [1 << i for i in range(rows.bit_length()) if least <= 1 << i < 2 * tokens]
    return min(sizes, key=lambda tb: (divided(samples, rows // tb) * divided(tokens, tb), -tb))


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)
