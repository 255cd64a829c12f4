"""`nettrace.kernels.sketch` in Triton: a program reads the tokens of one sample once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import SKETCH, SKETCH_WIDE
from nettrace.kernels.launch import Precision, configured, divided, products, split, summed, widened


@triton.jit  # type: ignore[untyped-decorator]
def projected(  # type: ignore[no-untyped-def]
    x,
    r,
    some,
    xd,
    width,
    columns,
    BT: tl.constexpr,
    BK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BT, COLUMNS) the rows at `x` times the matrix (width, columns) at `r`."""
    found = tl.zeros([BT, COLUMNS], tl.float32)
    column = tl.arange(0, COLUMNS)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        within = k < width
        far = k.to(tl.int64) * xd
        left = tl.load(x[:, None] + far[None, :], some[:, None] & within[None, :], other=0.0)
        inside = within[:, None] & (column < columns)[None, :]
        right = tl.load(r + k[:, None] * columns + column[None, :], inside, other=0.0)
        found = tl.dot(left, right, found, input_precision=PRECISION)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def sketch_kernel(  # type: ignore[no-untyped-def]
    a,
    g,
    ra,
    rg,
    out,
    samples,
    tokens,
    inputs,
    outputs,
    k1,
    k2,
    an,
    at,
    ad,
    gn,
    gt,
    gd,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """Adds up, over some blocks of tokens, products of projected inputs and gradients."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    found = tl.zeros([K1, K2], tl.float32)
    for block in range(part, tl.cdiv(tokens, BT), tl.num_programs(1)):
        t = (block * BT + tl.arange(0, BT)).to(tl.int64)
        some = t < tokens
        x = projected(a + n * an + t * at, ra, some, ad, inputs, k1, BT, BK, K1, PRECISION)
        y = projected(g + n * gn + t * gt, rg, some, gd, outputs, k2, BT, BK, K2, PRECISION)
        found = tl.dot(tl.trans(x), y, found, input_precision=WITHIN)
    row = tl.arange(0, K1)[:, None]
    column = tl.arange(0, K2)[None, :]
    out += (part.to(tl.int64) * samples + n) * k1 * k2
    tl.store(out + row * k2 + column, found, (row < k1) & (column < k2))


def launch(a: Tensor, g: Tensor, ra: Tensor, rg: Tensor, precision: Precision) -> Tensor:
    """(N, k1 k2) in float32; see `nettrace.kernels.sketch.kron_sketch`."""
    a, g = widened(a), widened(g)
    (n, t, i), o = a.shape, g.shape[2]
    k1, k2 = ra.shape[1], rg.shape[1]
    (ra, one), (rg, other) = _scaled(ra, a.dtype), _scaled(rg, g.dtype)
    widest = max(a, g, key=lambda x: x.element_size())
    config = configured(SKETCH if max(k1, k2) <= 64 else SKETCH_WIDE, widest)
    bt, bk = config.blocks
    bt = min(bt, max(16, triton.next_power_of_2(t)))
    parts = split(n, most=divided(t, bt))
    out = a.new_empty((parts, n, k1 * k2), dtype=torch.float32)
    with torch.cuda.device_of(a):
        sketch_kernel[(n, parts)](
            *(a, g, ra, rg, out, n, t, i, o, k1, k2, *a.stride(), *g.stride()),
            K1=max(16, triton.next_power_of_2(k1)),
            K2=max(16, triton.next_power_of_2(k2)),
            BT=bt,
            BK=bk,
            PRECISION=products(widest, precision),
            WITHIN=products(out, precision),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    found = summed(out)
    for scale in (one, other):
        found = found if scale is None else found * scale
    return found


def _scaled(r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The matrix in a type, and by what it has to be multiplied.

    Few numbers 1 / sqrt(k) are of half precision, but signs are.
    """
    if r.dtype == dtype or dtype == torch.float32:
        return r.to(dtype).contiguous(), None
    scale = r.float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return (r / scale).to(dtype).contiguous(), scale
