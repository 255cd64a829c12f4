"""`nettrace.kernels.moments` in Triton: a program takes a part of one tensor's entries."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nettrace.kernels.configurations import MOMENTS
from nettrace.kernels.launch import configured, divided

_NAMES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit  # type: ignore[untyped-decorator]
def _entries(  # type: ignore[no-untyped-def]
    weight, mean, square, before, x, some, inverse, share, MASKED: tl.constexpr, SUMS: tl.constexpr
):
    """One snapshot of some entries: what is to be added up of them."""
    # A mask whose bound is no multiple of 16 keeps loads from being of 16 bytes.
    if MASKED:
        kept = tl.load(weight + x, some, other=0.0)
        m = tl.load(mean + x, some, other=0.0)
        s = tl.load(square + x, some, other=0.0)
    else:
        kept = tl.load(weight + x)
        m = tl.load(mean + x)
        s = tl.load(square + x)
    w = kept.to(tl.float32)
    d = w - m
    m += d * inverse
    s += d * d * share
    if MASKED:
        tl.store(mean + x, m, some)
        tl.store(square + x, s, some)
    else:
        tl.store(mean + x, m)
        tl.store(square + x, s)
    u = w
    if SUMS:
        if MASKED:
            u = w - tl.load(before + x, some, other=0.0).to(tl.float32)
            tl.store(before + x, kept, some)
        else:
            u = w - tl.load(before + x).to(tl.float32)
            tl.store(before + x, kept)
    v = s * inverse
    wide = v.to(tl.float64)  # squares of small variances vanish in float32
    return (w - m) * (w - m), u * u, w * w, v, wide * wide, w * u


@triton.jit  # type: ignore[untyped-decorator]
def welford_kernel(  # type: ignore[no-untyped-def]
    tensors,
    parts,
    sums,
    inverse,
    share,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes a part of one tensor's entries, a block at a time, into sums (programs, 6).

    Tensors (tensors, 7) begin with the addresses of weights, means, squares and previous weights.
    Parts (programs, 3) say of which tensor, and from which entry on how many.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tensors + 7 * tl.load(parts + 3 * program)
    first = tl.load(parts + 3 * program + 1)
    count = tl.load(parts + 3 * program + 2).to(tl.int32)
    weight = tl.load(tensor).to(tl.pointer_type(TYPE))
    mean = tl.load(tensor + 1).to(tl.pointer_type(tl.float32))
    square = tl.load(tensor + 2).to(tl.pointer_type(tl.float32))
    before = tl.load(tensor + 3).to(tl.pointer_type(TYPE))
    if ALIGNED:
        first = tl.multiple_of(first, 16)
        weight = tl.multiple_of(weight, 16)
        mean = tl.multiple_of(mean, 16)
        square = tl.multiple_of(square, 16)
        before = tl.multiple_of(before, 16)
    weight += first
    mean += first
    square += first
    before += first
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    e = tl.zeros([BLOCK], tl.float64)
    f = tl.zeros([BLOCK], tl.float32)
    whole = count // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = start + tl.arange(0, BLOCK)
        a1, b1, c1, d1, e1, f1 = _entries(
            weight, mean, square, before, x, x < count, inverse, share, False, SUMS
        )
        if SUMS:
            a += a1
            b += b1
            c += c1
            d += d1
            e += e1
            f += f1
    if whole < count:
        x = whole + tl.arange(0, BLOCK)
        a1, b1, c1, d1, e1, f1 = _entries(
            weight, mean, square, before, x, x < count, inverse, share, True, SUMS
        )
        if SUMS:
            a += a1
            b += b1
            c += c1
            d += d1
            e += e1
            f += f1
    if SUMS:
        to = sums + 6 * program
        tl.store(to, tl.sum(a).to(tl.float64))
        tl.store(to + 1, tl.sum(b).to(tl.float64))
        tl.store(to + 2, tl.sum(c).to(tl.float64))
        tl.store(to + 3, tl.sum(d).to(tl.float64))
        tl.store(to + 4, tl.sum(e))
        tl.store(to + 5, tl.sum(f).to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator]
def total_kernel(tensors, sums, found, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds up the sums of each tensor's parts.

    Tensors (tensors, 7) end with the row of found (., 6), the first part and the number of parts.
    """
    tensor = tensors + 7 * tl.program_id(0).to(tl.int64)
    row = tl.load(tensor + 4)
    first = tl.load(tensor + 5)
    count = tl.load(tensor + 6).to(tl.int32)
    column = tl.arange(0, 8)
    total = tl.zeros([BLOCK, 8], tl.float64)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)
        some = (part < count)[:, None] & (column < 6)[None, :]
        total += tl.load(sums + (first + part)[:, None] * 6 + column[None, :], some, other=0.0)
    tl.store(found + row * 6 + column, tl.sum(total, axis=0), column < 6)


def launch(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    """(tensors, 6) in float64; see `nettrace.kernels.moments.weight_welford_`.

    One launch for all tensors of a type that begin at multiples of 16 bytes, as they do if they are
    no parts of others; and a small one for the sums.
    """
    weights = [_laid_out(w, m) for w, m in zip(weights, means, strict=True)]
    states = (weights, means, squares, previous or weights)
    rows = [tuple(x.data_ptr() for x in state) for state in zip(*states, strict=True)]
    kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, (w, row) in enumerate(zip(weights, rows, strict=True)):
        aligned = not any(address % 16 for address in row)
        kinds.setdefault((w.device, w.dtype, aligned), []).append(i)
    found = weights[0].new_empty((len(previous), 6), dtype=torch.float64)
    for (device, dtype, aligned), own in kinds.items():
        config = configured(MOMENTS, weights[own[0]])
        block, blocks = config.blocks
        tensors, parts = _tables(
            tuple((*rows[i], i) for i in own),
            tuple(weights[i].numel() for i in own),
            block * blocks,
            device,
        )
        programs = len(parts)
        sums = torch.empty((programs if previous else 0, 6), dtype=torch.float64, device=device)
        with torch.cuda.device_of(tensors):
            if programs:
                welford_kernel[(programs,)](
                    *(tensors, parts, sums, 1 / count, (count - 1) / count),
                    TYPE=_NAMES[dtype],
                    ALIGNED=aligned,
                    SUMS=bool(previous),
                    BLOCK=block,
                    num_warps=config.warps,
                    num_stages=config.stages,
                    enable_fp_fusion=True,
                )
            if previous:
                into = found if device == found.device else found.to(device)
                total_kernel[(len(own),)](tensors, sums, into, BLOCK=128, num_warps=4)
                if into is not found:
                    found[own] = into[own].to(found.device)
    return found


def _laid_out(weight: Tensor, mean: Tensor) -> Tensor:
    """A weight in the order of its mean, which fills its memory."""
    if weight.stride() == mean.stride() or (weight.is_contiguous() and mean.is_contiguous()):
        return weight
    return torch.empty_like(mean, dtype=weight.dtype).copy_(weight)


@lru_cache(maxsize=32)
def _tables(
    rows: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], most: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which tensors there are, and their parts, of at most so many entries; see the kernels.

    Kept, since weights stay where they are: copies to a device would wait for it at every step.
    """
    lengths = torch.tensor([divided(n, most) for n in sizes])
    starts = lengths.cumsum(0) - lengths
    tensor = torch.arange(len(sizes)).repeat_interleave(lengths)
    first = (torch.arange(len(tensor)) - starts[tensor]) * most
    count = (torch.tensor(sizes)[tensor] - first).clamp(max=most)
    tensors = torch.cat([torch.tensor(rows), torch.stack([starts, lengths], 1)], 1)
    return tensors.to(device), torch.stack([tensor, first, count], 1).to(device)
