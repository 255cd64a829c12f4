"""Sketches of weights: few numbers for many, with the inner products of how these moved.

A count sketch (Charikar, Chen and Farach-Colton 2002) of much structure: the entries of a
parameter, with random signs, are summed over those whose places are equal modulo k. Inner products
of sketches y and z are without bias those of the vectors. Each of the k buckets c adds a term y_c
z_c, whose signs are independent of the others', so that the variance of an inner product is at most
the expectation of sum_c (y_c z_c)^2, which the sketches themselves tell: up to 2 / k of the product
of the squared norms, where these are spread evenly over the buckets.

To look at every weight after every update would cost a large network more than it may. Of more than
2^18, so many stand for all, in evenly spaced blocks that begin at a random place: where the squared
motion of single weights has a kurtosis q, that changes inner products by sqrt(q / 2^18) of the
product of norms, 0.3 % for normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nettrace.estimators import generator, signs

#: Numbers in a sketch: inner products are known to sqrt(2 / 4093), 2.2 % of the product of norms.
BUCKETS = 4093
#: Weights that are sketched, at most or a few more, in blocks of so many.
SAMPLED, BLOCK = 2**18, 64
#: Weights of a parameter that are sketched, at least.
_LEAST = 2**10


def sampled(size: int, total: int) -> int:
    """How many entries of a parameter are sketched: all, or a multiple of `BLOCK`.

    Args:
        size: entries of the parameter.
        total: of all parameters.
    """
    wanted = max(_LEAST, size * min(SAMPLED, total) // total)
    number = -(-wanted // BLOCK) * BLOCK
    return number if 2 * number <= size else size


def buckets(sizes: Sequence[int], rows: Sequence[int]) -> list[int]:
    """How many numbers of a sketch each parameter gets: its size, or equal shares of what is left.

    Args:
        sizes: entries of each parameter.
        rows: entries along its last axis. The modulus has no factor in common with them, lest what
            belongs to one input of a layer gathers in few buckets.
    """
    total = sum(sizes)
    numbers = [sampled(size, total) for size in sizes]
    rows = [r if n == s else BLOCK for r, n, s in zip(rows, numbers, sizes, strict=True)]
    sizes = numbers
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
        sizes = [len(w) for w in weights]
        counts = buckets(sizes, rows)
        self._whole = [i for i, k in enumerate(counts) if k == sizes[i]]
        self._summed = [i for i, k in enumerate(counts) if k < sizes[i]]
        self.places = [slice(0)] * len(weights)
        self.length = 0
        for i in (*self._whole, *self._summed):  # those that are kept whole side by side
            self.places[i] = slice(self.length, self.length + counts[i])
            self.length += counts[i]
        self._first = torch.cat([weights[0][:0], *(weights[i] for i in self._whole)])
        self._picks = [_Pick(sizes[i], sum(sizes), rows[i], seed, i) for i in self._summed]
        self._signs = [
            pick.scale * signs(pick.shape, seed, f"weights {i}").to(weights[i])
            for pick, i in zip(self._picks, self._summed, strict=True)
        ]
        # By signs: so that one pass makes signs times differences.
        several = zip(self._signs, self._picks, self._summed, strict=True)
        self._less = [-drawn * pick(weights[i]) for drawn, pick, i in several]
        self._scratch = [torch.empty_like(less) for less in self._less]

    def __call__(self, weights: Sequence[Tensor], out: Tensor) -> None:
        """Writes the sketch of the weights less the first into a row of that length."""
        if self._whole:
            whole = out[: len(self._first)]
            gather([weights[i] for i in self._whole], whole)
            whole -= self._first
        several = zip(
            self._summed, self._picks, self._signs, self._less, self._scratch, strict=True
        )
        for i, pick, drawn, less, scratch in several:
            own = out[self.places[i]]
            k = len(own)
            moved = torch.addcmul(less, pick(weights[i]), drawn, out=scratch).view(-1)
            rows = len(moved) // k
            own.copy_(moved[: rows * k].view(rows, k).sum(0))
            own[: len(moved) - rows * k] += moved[rows * k :]


class _Pick:
    """Some of a parameter's entries: evenly spaced blocks, or all.

    Attributes:
        shape: of what is picked.
        scale: by what its entries count for more.
    """

    def __init__(self, size: int, total: int, row: int, seed: int, place: int) -> None:
        number = sampled(size, total)
        blocks = max(number // BLOCK, 1)
        self._is_all = number == size
        self._step = size // blocks
        while self._step > BLOCK and math.gcd(self._step, row) > 1:
            self._step -= 1  # lest the same columns of a matrix are picked from all its rows
        self._blocks = blocks
        room = self._step - BLOCK + 1
        drawn = (
            0
            if self._is_all
            else torch.randint(room, (), generator=generator(seed, f"picked {place}"))
        )
        self._first = int(drawn)
        self.shape = (size,) if self._is_all else (blocks, BLOCK)
        self.scale = math.sqrt(size / number)

    def __call__(self, vector: Tensor) -> Tensor:
        """A view of them."""
        if self._is_all:
            return vector
        rows = vector[: self._blocks * self._step].view(self._blocks, self._step)
        return rows[:, self._first : self._first + BLOCK]


def gather(vectors: Sequence[Tensor], out: Tensor) -> None:
    """Writes vectors one after the other, also from other devices."""
    if all(vector.device == out.device for vector in vectors):
        torch.cat(list(vectors), out=out)
        return
    end = 0
    for vector in vectors:
        out[end : end + len(vector)].copy_(vector)
        end += len(vector)
