"""`nettrace.kernels.affine` in Triton: a program reads some tokens and features of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import AFFINE
from nettrace.kernels.launch import configured, divided, split, summed, widened


@triton.jit  # type: ignore[untyped-decorator]
def affine_kernel(  # type: ignore[no-untyped-def]
    x,
    dy,
    mean,
    rstd,
    scales,
    shifts,
    samples,
    tokens,
    features,
    xn,
    xt,
    xd,
    yn,
    yt,
    yd,
    mn,
    mt,
    rn,
    rt,
    NORMALISES: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Adds up, over the tokens of each part, dy times x normalised, and dy."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    part = tl.program_id(2)
    some = d < features
    scale = tl.zeros([BD], tl.float32)
    shift = tl.zeros([BD], tl.float32)
    for block in range(part, tl.cdiv(tokens, PARTS * BT) * PARTS, PARTS):
        t = block * BT + tl.arange(0, BT)
        both = (t < tokens)[:, None] & some[None, :]
        xs = x + n * xn + t[:, None].to(tl.int64) * xt + d[None, :] * xd
        ys = dy + n * yn + t[:, None].to(tl.int64) * yt + d[None, :] * yd
        a = tl.load(xs, both, other=0.0).to(tl.float32)
        b = tl.load(ys, both, other=0.0).to(tl.float32)
        if NORMALISES:
            m = tl.load(mean + n * mn + t * mt, t < tokens, other=0.0).to(tl.float32)
            r = tl.load(rstd + n * rn + t * rt, t < tokens, other=0.0).to(tl.float32)
            a = (a - m[:, None]) * r[:, None]
        scale += tl.sum(a * b, axis=0)
        shift += tl.sum(b, axis=0)
    to = (part.to(tl.int64) * samples + n) * features + d
    tl.store(scales + to, scale, some)
    tl.store(shifts + to, shift, some)


def launch(
    x: Tensor, dy: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N, D) and (N, D) in float32; see `nettrace.kernels.affine.affine_psg`."""
    x, dy = widened(x), widened(dy)
    n, t, d = x.shape
    config = configured(AFFINE, x)
    bt, bd = config.blocks
    blocks = divided(d, bd)
    parts = split(n * blocks, most=divided(t, bt))
    scales, shifts = (x.new_empty((parts, n, d), dtype=torch.float32) for _ in range(2))
    m, r = (x if one is None else widened(one) for one in (mean, rstd))
    with torch.cuda.device_of(x):
        affine_kernel[(n, blocks, parts)](
            *(x, dy, m, r, scales, shifts, n, t, d),
            *(*x.stride(), *dy.stride(), *m.stride()[:2], *r.stride()[:2]),
            NORMALISES=mean is not None,
            PARTS=parts,
            BT=bt,
            BD=bd,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return summed(scales), summed(shifts)
