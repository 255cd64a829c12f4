"""Sketches of weights: few numbers for many, with the inner products of how these moved.

A count sketch (Charikar, Chen and Farach-Colton 2002) of much structure: the entries of a
parameter, with random signs, are summed over those whose places are equal modulo k. Inner products
of sketches y and z are without bias those of the vectors. Each of the k buckets c adds a term y_c
z_c, whose signs are independent of the others', so that the variance of an inner product is at most
the expectation of sum_c (y_c z_c)^2, which the sketches themselves tell: up to 2 / k of the product
of the squared norms, where these are spread evenly over the buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nettrace.estimators import signs

#: Numbers in a sketch: inner products are known to sqrt(2 / 8191), 1.6 % of the product of norms.
BUCKETS = 8191


def buckets(sizes: Sequence[int], rows: Sequence[int]) -> list[int]:
    """How many numbers of a sketch each parameter gets: its size, or equal shares of what is left.

    Args:
        sizes: entries of each parameter.
        rows: entries along its last axis. The modulus has no factor in common with them, lest what
            belongs to one input of a layer gathers in few buckets.
    """
    left, found = BUCKETS, [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        share = max(1, left // (len(sizes) - rank))
        while share < sizes[i] and math.gcd(share, rows[i]) > 1:
            share -= 1
        found[i] = min(share, sizes[i])
        left -= found[i]
    return found


class WeightSketch:
    """Sketches the differences of weights from those that it begins with.

    Args:
        weights: each parameter as a vector of real numbers, copied.
        rows: entries along its last axis.
        seed: the signs are those of the seed and the parameter's place.

    Attributes:
        places: which numbers of a sketch are each parameter's.
        length: of a sketch.
    """

    def __init__(self, weights: Sequence[Tensor], rows: Sequence[int], seed: int) -> None:
        self._first = [w.clone() for w in weights]
        counts = buckets([len(w) for w in weights], rows)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.places = [slice(end - k, end) for end, k in zip(ends, counts, strict=True)]
        self.length = ends[-1]
        self._signs: list[Tensor | None] = []
        for i, (first, k) in enumerate(zip(self._first, counts, strict=True)):
            if k == len(first):
                self._signs.append(None)
                continue
            drawn = signs((len(first),), seed, f"weights {i}").to(first)
            first.mul_(drawn).neg_()  # so that one pass makes signs times differences
            self._signs.append(drawn)
        self._scratch = [torch.empty_like(first) for first in self._first]

    def __call__(self, weights: Sequence[Tensor], out: Tensor) -> None:
        """Writes the sketch of the weights less the first into a row of that length."""
        for i, (weight, place) in enumerate(zip(weights, self.places, strict=True)):
            drawn, own, k = self._signs[i], out[place], place.stop - place.start
            if drawn is None:
                own.copy_(torch.sub(weight, self._first[i], out=self._scratch[i]))
                continue
            moved = torch.addcmul(self._first[i], weight, drawn, out=self._scratch[i])
            whole = len(moved) // k * k
            own.copy_(moved[:whole].view(-1, k).sum(0))
            own[: len(moved) - whole] += moved[whole:]
