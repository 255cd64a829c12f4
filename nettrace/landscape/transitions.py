"""A first guess of S(E), from the energies that moves would lead to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: The slope of S(E) may grow from one energy to the next by this factor and this constant.
_STEEPER = 1.2, 0.5


def stationary(counts: Array) -> Array:
    """The logarithm of the stationary distribution (K,) of a Markov chain, from counts (K, K).

    By elimination of one state after the other without a subtraction, which gives small entries as
    precisely as large ones (Grassmann, Taksar and Heyman 1985, Operations Research 33, 1107).
    Neighbours without a count have half of one.
    """
    size = len(counts)
    if size == 1:
        return np.zeros(1)
    flow = counts.astype(np.float64)
    here, there = np.arange(size - 1), np.arange(1, size)
    flow[here, there] = np.maximum(flow[here, there], 0.5)
    flow[there, here] = np.maximum(flow[there, here], 0.5)
    flow /= flow.sum(1, keepdims=True)
    for last in range(size - 1, 0, -1):
        flow[:last, last] /= flow[last, :last].sum()
        flow[:last, :last] += np.outer(flow[:last, last], flow[last, :last])
    found = np.zeros(size)
    with np.errstate(divide="ignore"):
        logarithms = np.log(flow)
    for state in range(1, size):
        found[state] = np.logaddexp.reduce(found[:state] + logarithms[:state, state])
    normalised: Array = found - np.logaddexp.reduce(found)
    return normalised


def tempered(energies: npt.NDArray[np.int64], entropy: Array) -> Array:
    """An entropy (K,) that falls on either side of its maximum no faster than it may.

    Walkers that are caught at the last energies, as g is too low there, stay in few states that
    lead no further, and so tell that there is less beyond than there is, which lowers g again.
    Therefore the slope may grow from one energy to the next by a factor and a constant only.
    """
    found, top = entropy.copy(), int(entropy.argmax())
    for side in (range(top + 1, len(found)), range(top - 1, -1, -1)):
        steepest, before = 0.0, top
        for place in side:
            apart = abs(int(energies[place] - energies[before]))
            slope = (entropy[before] - entropy[place]) / apart
            slope = min(slope, _STEEPER[0] * steepest + _STEEPER[1])
            found[place] = found[before] - slope * apart
            steepest, before = max(steepest, slope), place
    return found
