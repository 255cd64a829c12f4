"""A first guess of S(E), from the energies that moves would lead to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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
