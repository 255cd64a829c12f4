"""The largest and the smallest eigenvalues of a symmetric matrix, signed, from few products.

Ritz pairs (theta, v) of a Krylov space converge to the ends of the spectrum first. When to stop is
the question: an estimate that no longer moves may rest on a wrong value, and a residual r = |A v -
theta v| bounds the error of theta, but very loosely. For the i-th of the largest

    lambda_i - theta_i <= (r_1^2 + ... + r_j^2) / (theta_i - mu),    any j >= i,

mu the largest eigenvalue in the complement of the first j vectors (Mathias 1998, Quadratic residual
bounds for the Hermitian eigenvalue problem), for which the largest of the other Ritz values is
taken, with its residual on top. An eigenvalue of which nothing is seen yet may be larger: where
two lie close together, the space first finds a mixture of their vectors, of which the residual
stays at their distance. From one start vector T is tridiagonal, and its last coefficients hardly
change from step to step once the ends of the spectrum are resolved. So the error is taken to be
what the Ritz value would gain if the coming steps had the mean coefficients of the last four. From
several start vectors a residual that falls slowly counts for more, by the sum of the steps to come,
and the bound is to be a tenth of the tolerance, a step later too. With the bound alone, one in ten
top eigenvalues of small networks' Hessians is off by more than the tolerance; with several start
vectors one in a hundred, where they happen to have next to nothing along the first; with the
continued T none of 192, nor of 450 that began with the vectors of ten updates before.

From one start vector one vector of each eigenvalue is found, from two start vectors two. So two are
taken where several pairs are asked for, and further ones as long as as many values coincide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.krylov import Krylov, Times

#: What of the tolerance the bound on the error may be.
_MARGIN = 0.1
#: What of it the gain of further steps may be.
_LITTLE = 0.03
#: How many steps the space is continued by, in thought.
_FURTHER = 40


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs at one end of the spectrum of a symmetric matrix A.

    Args:
        values: (k,) float64; the outermost first.
        vectors: (P, k) orthonormal, in the matrix's dtype and on its device.
        residuals: (k,) float64, |A v - lambda v|: some eigenvalue is no further from the value.
        converged: whether the errors of all values are below the tolerance, as far as is seen.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool

    def first(self, count: int) -> Eigenpairs:
        """The outermost of them."""
        vectors = self.vectors[:, :count]
        return Eigenpairs(self.values[:count], vectors, self.residuals[:count], self.converged)


def eigenpairs(
    times: Times,
    size: int,
    top: int,
    bottom: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    tolerance: float | None = None,
    start: Tensor | None = None,
    spare: int = 0,
    seed: int = 0,
    most_products: int = 500,
    memory: int = 2**31,
) -> tuple[Eigenpairs, Eigenpairs, int]:
    """The `top` largest and the `bottom` smallest eigenvalues, with vectors, and products made.

    Args:
        times: multiplies with the matrix, (P,) -> (P,).
        size: P. Where fewer pairs exist than are asked for, all are given.
        top: how many of the largest, largest first; may be 0.
        bottom: how many of the smallest, smallest (most negative) first; may be 0.
        dtype: of the vectors that are multiplied.
        device: of the vectors that are multiplied.
        tolerance: for the error of each value, relative to the largest in modulus; the square
            root of the dtype's precision unless told.
        start: (P,) what to begin with in place of a random vector: one with more along the wanted
            vectors, such as those found before the matrix changed a little, and with something of a
            random one, for what has come up elsewhere.
        spare: how many more of the largest to give, right or not, as to begin with next time.
        seed: for random vectors, which are drawn on the CPU.
        most_products: after how many to give up, with `converged` False.
        memory: bytes for vectors; where that is short, the outermost Ritz vectors are kept and the
            rest begins anew. Room for four times the pairs asked for, and 8, is always taken.

    Raises:
        NotSymmetricError: if the matrix is seen not to be symmetric.
        ValueError: if an argument is out of range, or a product is not finite.
    """
    if size < 1 or min(top, bottom) < 0 or most_products < 1:
        raise ValueError(
            "expected a positive size, counts from 0 and at least one product, got "
            f"{size}, {top}, {bottom} and {most_products}"
        )
    if start is not None and start.shape != (size,):
        raise ValueError(f"expected a start vector ({size},), got {tuple(start.shape)}")
    space = Krylov(times, size, dtype, device)
    tolerance = space.epsilon**0.5 if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"expected a positive tolerance, got {tolerance}")
    counts = min(top, size), min(bottom, size)
    search = _Search(space, counts, max(tolerance, 20 * space.epsilon), seed)
    search.begin(start)
    most_vectors = memory // (size * dtype.itemsize)
    room = max(most_vectors - 2 * space.ahead, 4 * sum(counts) + 8)
    while any(counts) and not search.is_done() and space.products < most_products:
        if len(space) >= room:
            search.restart(room // 2)
        if 2 * len(space) >= size and size <= min(room, most_products):
            search.complete()
        else:
            search.step()
    return search.pairs(0, spare), search.pairs(1), space.products


class _Search:
    """A Krylov space grown until the outermost Ritz values are right."""

    def __init__(self, space: Krylov, counts: tuple[int, int], tolerance: float, seed: int) -> None:
        self._space = space
        self._counts = counts
        self._tolerance = tolerance
        self._random = generator(seed, "eigenpairs")
        self._width = 0
        self._calm = 0
        #: Steps with the last column of W that are to come, for a vector that was added late.
        self._deeper = 0
        #: Residuals of the last steps, from the top and from the bottom.
        self._past: list[tuple[Tensor, Tensor]] = []
        self._is_right = [False, False]
        self._ritz = space.ritz()

    def begin(self, start: Tensor | None) -> None:
        """One start vector, or two where several pairs are asked for."""
        if start is not None:
            self._space.start(start)
        while self._space.ahead < min(max(self._counts), 2):
            self._space.start(self._draw())
        self._width = self._space.ahead

    def step(self) -> None:
        """One product more."""
        if not self._space.ahead:
            self._space.start(self._draw())
        self._space.step(-1 if self._deeper else 0)
        self._deeper = max(self._deeper - 1, 0)
        self._look()

    def complete(self) -> None:
        """All products that are left: beyond half of them, looking after each takes longer."""
        space = self._space
        while len(space) < space.size:
            if not space.ahead:
                space.start(self._draw())
            space.step()
        self._look()

    def is_done(self) -> bool:
        """Whether all that is asked for is found, as far as is seen."""
        space = self._space
        if len(space) == space.size:
            return True
        if self._deeper or self._calm < (1 if self._width == 1 else 1 + self._width):
            return False
        if self._width >= max(self._counts) or self._coincident() < self._width:
            return True
        depth = -(-len(space) // self._width)
        if not space.start(self._draw()):
            return True
        self._width += 1
        self._deeper = depth
        return False

    def restart(self, keep: int) -> None:
        """Forgets all but the outermost Ritz vectors."""
        values, coefficients, _ = self._ritz
        top = round(keep * self._counts[0] / sum(self._counts))
        order = torch.arange(len(values))
        kept = torch.cat([order[: keep - top], order[len(order) - top :]])
        self._space.restart(values[kept], coefficients[:, kept])

    def pairs(self, end: int, spare: int = 0) -> Eigenpairs:
        """Those at the top, 0, or at the bottom, 1, and some that need not be right."""
        values, coefficients, residuals = self._ritz
        order = torch.arange(len(values))
        chosen = (order if end else order.flip(0))[: self._counts[end] + spare]
        return Eigenpairs(
            values[chosen],
            self._space.combine(coefficients[:, chosen]).T,
            residuals[chosen],
            self._is_right[end] or len(self._space) == self._space.size,
        )

    def _look(self) -> None:
        """How good the Ritz values are by now."""
        self._ritz = values, _, residuals = self._space.ritz()
        ends = [(values.flip(0), residuals.flip(0)), (-values, residuals)]
        past = self._past[-self._width] if len(self._past) >= self._width else (residuals[:0],) * 2
        self._past = [*self._past, (ends[0][1], ends[1][1])][-self._width :]
        bound = self._tolerance * float(values.abs().max())
        if self._width == 1:
            ahead = self._space.continued(_FURTHER)
            gains = (ahead[-1] - values[-1], values[0] - ahead[0])
            self._is_right = [
                count == 0 or float(gain) <= _LITTLE * bound
                for count, gain in zip(self._counts, gains, strict=True)
            ]
        else:
            self._is_right = [
                len(values) >= count
                and all(_error(*ends[e], past[e], i) <= _MARGIN * bound for i in range(count))
                for e, count in enumerate(self._counts)
            ]
        self._calm = self._calm + 1 if all(self._is_right) else 0

    def _coincident(self) -> int:
        """How many of the values at one end coincide, at most."""
        values = self._ritz[0]
        close = self._tolerance * float(values.abs().max())
        ends = (values.flip(0)[: self._counts[0]], values[: self._counts[1]])
        return max(int(((v[:, None] - v).abs() <= close).sum(0).max()) for v in ends if len(v))

    def _draw(self) -> Tensor:
        return torch.randn(self._space.size, generator=self._random)


def _error(values: Tensor, residuals: Tensor, before: Tensor, i: int) -> float:
    """An upper estimate of the error of the i-th largest Ritz value, or a tenth of its residual.

    Args:
        values: all Ritz values, largest first.
        residuals: theirs.
        before: the residuals a round earlier, of as many as there were.
        i: which, from 0.
    """
    squares = residuals.square().cumsum(0)
    highest = (values + residuals).flip(0).cummax(0).values.flip(0)
    gaps = values[i] - highest[i + 1 :]
    squares = squares[i : len(values) - 1]
    known = before.square().cumsum(0)[i : i + len(squares)]
    ratios = torch.ones_like(squares)
    ratios[: len(known)] = squares[: len(known)] / known
    squares = squares / (1 - ratios).clamp_min(0)
    bounds = (squares / gaps)[gaps > 0]
    return float(torch.cat([_MARGIN * residuals[i : i + 1], bounds]).min())
