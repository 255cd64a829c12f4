"""`nettrace.kernels.conv_psg` in Triton: what a filter meets is read from the images themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import CONV_PSG, CONV_PSG_SQUARES
from nettrace.kernels.jit.psg import TOGETHER, fitted, place
from nettrace.kernels.launch import Precision, configured, divided, products, split, summed, widened


@triton.jit  # type: ignore[untyped-decorator]
def conv_moments_kernel(  # type: ignore[no-untyped-def]
    x,
    gy,
    sqnorms,
    totals,
    squares,
    samples,
    places,
    channels,
    filters,
    groups,
    height,
    width,
    out_width,
    filter_area,
    filter_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    DW: tl.constexpr,
    SQ: tl.constexpr,
    PREC: tl.constexpr,
    TOGETHER: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
):
    """A program has some channels at one place of the filter, some filters, and samples as above.

    `x` is (N, H, W, C), `gy` (N, places, filters of all groups). The places that a filter meets
    with one of its own lie inside the image or not for all channels alike.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    high = tl.cdiv(channels, BI)
    wide = tl.cdiv(filters, BO)
    group = tile // (filter_area * high * wide)
    row, column = place(tile % (filter_area * high * wide), filter_area * high, wide, TOGETHER)
    spot = row // high
    c = row % high * BI + tl.arange(0, BI)
    o = column * BO + tl.arange(0, BO)
    up = spot // filter_width * dilation_h - padding_h
    left = spot % filter_width * dilation_w - padding_w
    xc = groups * channels
    yc = groups * filters
    xs = x + group * channels
    ys = gy + group * filters
    acc = tl.zeros([BI, BO], tl.float32)
    total = tl.zeros([BI, BO], tl.float32)
    square = tl.zeros([BI, BO], tl.float32)
    steps = tl.cdiv(places, BT)
    for step in range(tl.cdiv(samples - part, parts) * steps):
        n = (part + step // steps * parts).to(tl.int64)
        t = step % steps * BT + tl.arange(0, BT)
        h = t // out_width * stride_h + up
        w = t % out_width * stride_w + left
        inside = (t < places) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        # Numbers of one image are counted by 32 bits, those of all by 64.
        a = tl.load(
            xs + n * height * width * xc + (((h * width + w) * xc)[None, :] + c[:, None]),
            (c < channels)[:, None] & inside[None, :],
            other=0.0,
        )
        g = tl.load(
            ys + n * places * yc + ((t * yc)[:, None] + o[None, :]),
            (t < places)[:, None] & (o < filters)[None, :],
            other=0.0,
        )
        acc = tl.dot(a, g, acc, input_precision=PREC)
        if step % steps == steps - 1:
            power = acc * acc
            tl.store(sqnorms + tile.to(tl.int64) * samples + n, tl.sum(power))
            if SQ:
                square += power
            if DW:
                total += acc
            acc = tl.zeros([BI, BO], tl.float32)
    entry = (part.to(tl.int64) * groups + group) * filters + o[None, :]
    to = (entry * channels + c[:, None]) * filter_area + spot
    some = (c < channels)[:, None] & (o < filters)[None, :]
    if DW:
        tl.store(totals + to, total, some)
    if SQ:
        tl.store(squares + to, square, some)


def launch(
    x: Tensor,
    gy: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dw: bool,
    sq: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nettrace.kernels.conv_psg.conv_psg`, in float32."""
    # Channels last, so that those of a place are read together: a copy for other images.
    x, gy = (widened(one).permute(0, 2, 3, 1).contiguous() for one in (x, gy))
    n, height, width, _ = x.shape
    channels, filters = x.shape[3] // groups, gy.shape[3] // groups
    places = gy.shape[1] * gy.shape[2]
    area = size[0] * size[1]
    config = configured(CONV_PSG_SQUARES if sq else CONV_PSG, x)
    bi, bo, bt = fitted(config.blocks, (channels, filters, places))
    tiles = groups * area * divided(channels, bi) * divided(filters, bo)
    parts = split(tiles * (1 + (dw or sq)), most=n)
    sqnorms = x.new_empty((tiles, n), dtype=torch.float32)
    totals, squares = (
        x.new_empty(
            (parts, groups * filters, channels, *size) if asked else (0,) * 5, dtype=torch.float32
        )
        for asked in (dw, sq)
    )
    with torch.cuda.device_of(x):
        conv_moments_kernel[(tiles, parts)](
            *(x, gy, sqnorms, totals, squares, n, places, channels, filters, groups),
            *(height, width, gy.shape[2], area, size[1], *stride, *padding, *dilation),
            DW=dw,
            SQ=sq,
            PREC=products(x, precision),
            TOGETHER=TOGETHER,
            BI=bi,
            BO=bo,
            BT=bt,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return sqnorms.sum(0), summed(totals), summed(squares)
