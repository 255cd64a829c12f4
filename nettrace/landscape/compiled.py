"""Single changes of weights of networks of signs, one walker after the other, by Numba."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

#: Products of a weight and a pattern that are worth a thread.
_WORTH = 2**21
#: Moves of one walker before the next has its turn: draws of many lie side by side in memory.
_BLOCK = 32


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
    *state: Tensor,
) -> None:
    """Moves all walkers in place; see `nettrace.kernels.flips`, of which this is the same.

    Walkers go in threads of their own, as many as torch has, which makes no difference to them.
    """
    moves, walkers = uniform.shape
    arrays = [t.numpy() for t in (layers, uniform, chances, entropy, low, high)]
    fixed = [t.numpy() for t in (inputs, labels > 0, levels, free, free_above)]
    kept = [t.numpy() for t in state]
    rest = np.float32(least), np.float32(least_above), deep, product

    def move(ends: tuple[int, int]) -> None:
        _move(*ends, *arrays, *fixed, *rest, *kept)

    work = moves * walkers * inputs.shape[1]
    threads = max(1, min(torch.get_num_threads(), walkers, work // _WORTH))
    each = math.ceil(walkers / threads)
    parts = [(begin, min(begin + each, walkers)) for begin in range(0, walkers, each)]
    if threads == 1:
        move(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(move, parts))


@numba.njit(nogil=True, cache=True)
def _move(  # type: ignore[no-untyped-def]
    first,
    last,
    layers,
    uniform,
    chances,
    entropy,
    low,
    high,
    inputs,
    positive,
    levels,
    free,
    free_above,
    least,
    least_above,
    deep,
    product,
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
):
    patterns, others = len(positive), len(levels) - 1
    one = np.float32(1)
    for begun in range(0, len(layers), _BLOCK):
        for w in range(first, last):
            at = energies[w]
            outside = at < low[w] or at > high[w]
            for m in range(begun, min(begun + _BLOCK, len(layers))):
                above = layers[m] == 1
                places = free_above if above else free
                place = int(uniform[m, w] * (len(places) * others))
                turn = 1
                if others > 1:  # a division takes as long as all else with a few patterns
                    place, turn = place // others, place % others + 1
                unit, source = places[place, 0], places[place, 1]
                # What is changed, in which layer; what reads it; and what it is multiplied with.
                picked = chosen_above[w, unit] if above else chosen[w, unit]
                values = weights_above[w, unit] if above else weights[w, unit]
                field = out[w] if above else fields[w, unit]
                below = activities[w, source] if above else inputs[source]
                then = picked[source] + turn
                then -= len(levels) if then > others else 0
                step = levels[then] - levels[picked[source]]
                top = out[w]
                to = np.int32(0)
                if not deep or above:
                    edge = -least_above if above else -least
                    for p in range(patterns):
                        to += np.int32((field[p] + step * below[p] >= edge) != positive[p])
                elif product:
                    active = activities[w, unit]
                    for p in range(patterns):
                        turned = one if field[p] + step * below[p] >= -least else -one
                        to += np.int32((top[p] * active[p] * turned >= 0) != positive[p])
                else:
                    active, weight = activities[w, unit], weights_above[w, 0, unit]
                    for p in range(patterns):
                        turned = one if field[p] + step * below[p] >= -least else -one
                        moved = top[p] + weight * (turned - active[p])
                        to += np.int32((moved >= -least_above) != positive[p])
                proposals[m, w] = to
                inside = to >= low[w] and to <= high[w]
                if chances[m, w] < math.exp(entropy[at] - entropy[to]) and (outside or inside):
                    picked[source], values[source] = then, levels[then]
                    for p in range(patterns):
                        field[p] += step * below[p]
                    if deep and not above:
                        active = activities[w, unit]
                        weight = np.float32(0) if product else weights_above[w, 0, unit]
                        for p in range(patterns):
                            turned = one if field[p] >= -least else -one
                            if product:
                                top[p] *= active[p] * turned
                            else:
                                top[p] += weight * (turned - active[p])
                            active[p] = turned
                    at, outside = to, not inside
                track[m, w] = at
            energies[w] = at
