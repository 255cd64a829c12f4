"""`nettrace.kernels.embedding` in Triton: blocks of tokens meet where their ids may.

Tokens of a sample are sorted by their ids, so that a block of them meets few others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import EMBEDDING
from nettrace.kernels.jit.ghost import corner, inner
from nettrace.kernels.launch import Precision, configured, divided, products, split, summed, widened


@triton.jit  # type: ignore[untyped-decorator]
def embedding_kernel(  # type: ignore[no-untyped-def]
    ids,
    order,
    lows,
    tops,
    g,
    out,
    samples,
    tokens,
    features,
    gn,
    gt,
    gd,
    NORMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds up products of gradients of equal ids: of pairs of samples, or each with itself."""
    RN: tl.constexpr = BM // TB  # more than one only of samples that are one block each
    tile = tl.program_id(0)
    part = tl.program_id(1)
    if NORMS:
        i = tile
        j = tile
        found = tl.zeros([RN], tl.float32)
    else:
        i, j = corner(tile, tl.cdiv(samples, RN))
        found = tl.zeros([RN, RN], tl.float32)
    row = tl.arange(0, BM)
    n = (i * RN + row // TB).to(tl.int64)
    m = (j * RN + row // TB).to(tl.int64)
    blocks = tl.cdiv(tokens, TB)
    block = tl.arange(0, BLOCKS)
    for own in range(part, blocks, tl.num_programs(1)):
        t = own * TB + row % TB
        these = (n < samples) & (t < tokens)
        mine = tl.load(ids + n * tokens + t, these, other=0)
        first = 0
        last = blocks
        if RN == 1:
            low = tl.load(lows + i.to(tl.int64) * blocks + own)
            top = tl.load(tops + i.to(tl.int64) * blocks + own)
            there = j.to(tl.int64) * blocks + block
            below = tl.load(tops + there, block < blocks, other=0) < low
            reached = tl.load(lows + there, block < blocks, other=0) <= top
            first = tl.sum((below & (block < blocks)).to(tl.int32))
            last = tl.sum((reached & (block < blocks)).to(tl.int32))
        if NORMS:
            last = tl.minimum(last, own + 1)
        for other in range(first, last):
            s = other * TB + row % TB
            those = (m < samples) & (s < tokens)
            theirs = tl.load(ids + m * tokens + s, those, other=0)
            equal = (mine[:, None] == theirs[None, :]) & these[:, None] & those[None, :]
            if NORMS:
                equal = equal & ((row // TB)[:, None] == (row // TB)[None, :])
            if tl.max(equal.to(tl.int32)) > 0:
                x = g + n * gn + tl.load(order + n * tokens + t, these, other=0) * gt
                y = g + m * gn + tl.load(order + m * tokens + s, those, other=0) * gt
                met = inner(x, y, these, those, gd, gd, features, BM, BM, BK, PRECISION)
                met = tl.where(equal, met, 0.0)
                if NORMS:
                    times = tl.where(t // TB == s // TB, 1.0, 2.0)
                    met = tl.sum(met, axis=1) * times
                    found += tl.sum(tl.reshape(met, [RN, TB]), axis=1)
                else:
                    met = tl.sum(tl.reshape(met, [BM, RN, TB]), axis=2)
                    found += tl.sum(tl.reshape(met, [RN, TB, RN]), axis=1)
    n = (i * RN + tl.arange(0, RN)).to(tl.int64)
    if NORMS:
        tl.store(out + part.to(tl.int64) * samples + n, found, n < samples)
    else:
        m = (j * RN + tl.arange(0, RN)).to(tl.int64)[None, :]
        n = n[:, None]
        kept = (n < samples) & (m <= n)  # of a tile across the diagonal, one half
        out += part.to(tl.int64) * samples * samples
        tl.store(out + n * samples + m, found, kept)
        tl.store(out + m * samples + n, found, kept)


def launch(ids: Tensor, g: Tensor, precision: Precision, norms: bool) -> Tensor:
    """(N,) or (N, N) in float32; see `nettrace.kernels.embedding`."""
    g = widened(g)
    n, t, d = g.shape
    config = configured(EMBEDDING, g)
    rows, bk = config.blocks
    tb = min(triton.next_power_of_2(t), rows)
    blocks = divided(t, tb)
    ids, order = ids.long().sort(dim=1, stable=True)
    lows = ids[:, ::tb].contiguous()
    tops = torch.cat([ids[:, tb - 1 :: tb], ids[:, -1:]], 1)[:, :blocks].contiguous()
    tiles = divided(n, rows // tb)
    if not norms:
        tiles = tiles * (tiles + 1) // 2
    parts = split(tiles, most=blocks)
    out = g.new_empty((parts, n) if norms else (parts, n, n), dtype=torch.float32)
    with torch.cuda.device_of(g):
        embedding_kernel[(tiles, parts)](
            *(ids, order, lows, tops, g, out, n, t, d, *g.stride()),
            NORMS=norms,
            BLOCKS=triton.next_power_of_2(blocks),
            TB=tb,
            BM=rows,
            BK=bk,
            PRECISION=products(g, precision),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return summed(out)
