"""Single changes of weights of networks of signs: one program moves one walker, many times.

A walker is a network whose weights take a few values each. Its energy E is the number of patterns p
in the wrong class. A move proposes another value for one weight, and is made with probability

    min(1, exp(entropy[E] - entropy[E'])),

as flat-histogram sampling asks for. Only what the weight can change is computed: the field of the
unit that it leads to, and what follows from it.

Networks have units k with fields f_k and signs s_k = sign(f_k), which is 1 at 0, and an output that
is f_0 itself ("flat"), sum_k v_k s_k, of which the v_k may change as well, or prod_k s_k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _flips(  # type: ignore[no-untyped-def]
    layers,
    uniform,
    chances,
    entropy,
    low,
    high,
    inputs,
    labels,
    levels,
    free,
    free_above,
    chosen,
    weights,
    chosen_above,
    weights_above,
    fields,
    activities,
    out,
    energies,
    track,
    proposals,
    least,
    least_above,
    moves,
    walkers,
    patterns,
    units,
    sources,
    places,
    places_above,
    LEVELS: tl.constexpr,
    DEEP: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    w = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK)
    some = p < patterns
    label = tl.load(labels + p, some, other=1.0)
    at = tl.load(energies + w)
    lowest, highest = tl.load(low + w), tl.load(high + w)
    top = out + w * patterns + p
    if PRODUCT:
        least_above = 0.0
    if not DEEP:
        least_above = least
    for m in range(moves):
        above = tl.load(layers + m) == 1
        number = tl.load(uniform + m * walkers + w)
        if above:
            place = (number * (places_above * (LEVELS - 1))).to(tl.int64)
            unit, source = tl.zeros_like(w), tl.load(free_above + place // (LEVELS - 1) * 2 + 1)
            cell = w * units + source
            level, weight = chosen_above + cell, weights_above + cell
            field, below = top, activities + cell * patterns + p
        else:
            place = (number * (places * (LEVELS - 1))).to(tl.int64)
            pair = free + place // (LEVELS - 1) * 2
            unit, source = tl.load(pair), tl.load(pair + 1)
            cell = (w * units + unit) * sources + source
            level, weight = chosen + cell, weights + cell
            field = fields + (w * units + unit) * patterns + p
            below = inputs + source * patterns + p
        before = tl.load(level)
        then = (before + 1 + place % (LEVELS - 1)) % LEVELS
        value = tl.load(levels + then)
        step = value - tl.load(levels + before)
        moved = tl.load(field, some) + step * tl.load(below, some)
        result = moved
        if DEEP:
            row = activities + (w * units + unit) * patterns + p
            active = tl.load(row, some)
            turned = tl.where(moved >= -least, 1.0, -1.0)
            if PRODUCT:
                result = tl.load(top, some) * active * turned
            else:
                read = tl.load(weights_above + w * units + unit)
                result = tl.where(above, moved, tl.load(top, some) + read * (turned - active))
        wrong = (result >= -least_above) != (label > 0)
        to = tl.sum((wrong & some).to(tl.int32)).to(tl.int64)
        tl.store(proposals + m * walkers + w, to)
        chance = tl.exp(tl.load(entropy + at) - tl.load(entropy + to))
        outside = (at < lowest) | (at > highest)
        inside = (to >= lowest) & (to <= highest)
        if (tl.load(chances + m * walkers + w) < chance) & (outside | inside):
            tl.store(level, then)
            tl.store(weight, value)
            tl.store(field, moved, some)
            if DEEP:
                tl.store(row, turned, some & (not above))
                tl.store(top, result, some)
            at = to
        tl.store(track + m * walkers + w, at)
        # What one thread wrote, all of them read.
        tl.debug_barrier()
    tl.store(energies + w, at)


def warps(block: int) -> int:
    """How many warps move a walker with so many patterns: with more than 8 each, threads spill."""
    return max(1, min(32, block // 256))


def flips_(
    layers: Tensor,
    uniform: Tensor,
    chances: Tensor,
    entropy: Tensor,
    low: Tensor,
    high: Tensor,
    inputs: Tensor,
    labels: Tensor,
    levels: Tensor,
    free: Tensor,
    free_above: Tensor,
    least: float,
    least_above: float,
    deep: bool,
    product: bool,
    chosen: Tensor,
    weights: Tensor,
    chosen_above: Tensor,
    weights_above: Tensor,
    fields: Tensor,
    activities: Tensor,
    out: Tensor,
    energies: Tensor,
    track: Tensor,
    proposals: Tensor,
) -> None:
    """Moves all walkers in place, each by the given draws.

    What is on another device than `inputs` is copied there, and back where it is written.

    Args:
        layers: (moves,) which weights a move is of: 0 for those of units, 1 for v.
        uniform: (moves, W) between 0 and 1, which say which weight and which value.
        chances: (moves, W) between 0 and 1: a move is made where its probability is larger.
        entropy: (B + 1,) what is known of S(E).
        low: (W,) the least energy of each walker's window, which it does not leave.
        high: (W,) the largest.
        inputs: (N, P)
        labels: (P,) -1 or 1.
        levels: (L,) the values of weights.
        free: (F, 2) unit and input of each weight that may change.
        free_above: (F', 2) the same of v, of unit 0.
        least: -least counts as 0 for the fields of units;
        least_above: and for the output.
        deep: whether the output is made of signs.
        product: whether it is their product.
        chosen: (W, K, N) which level each weight has.
        weights: (W, K, N) its value.
        chosen_above: (W, 1, K) the same of v.
        weights_above: (W, 1, K)
        fields: (W, K, P)
        activities: (W, K, P) signs.
        out: (W, P) the output.
        energies: (W,)
        track: (moves, W) the energies after each move, to be written.
        proposals: (moves, W) those that were proposed, to be written.
    """
    device = inputs.device
    given = layers, uniform, chances, entropy, low, high
    fixed = inputs, labels, levels, free, free_above
    read = [t.to(device).contiguous() for t in (*given, *fixed)]
    state = chosen, weights, chosen_above, weights_above, fields, activities, out
    assert all(t.is_contiguous() for t in state), "they are written to as they lie in memory"
    written = energies, track, proposals
    found = [t.to(device).contiguous() for t in written]
    moves, walkers = uniform.shape
    _, units, patterns = fields.shape
    block = triton.next_power_of_2(patterns)
    with torch.cuda.device_of(inputs):
        _flips[(walkers,)](
            *(*read, *state, *found),
            *(least, least_above, moves, walkers, patterns, units, len(inputs)),
            *(len(free), len(free_above)),
            LEVELS=len(levels),
            DEEP=deep,
            PRODUCT=product,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=True,
        )
    for one, other in zip(written, found, strict=True):
        one.copy_(other)
