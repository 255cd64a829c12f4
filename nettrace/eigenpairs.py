"""The largest and the smallest eigenvalues of a symmetric matrix, signed, from few products.

Ritz pairs (theta, v) of a Krylov space converge to the ends of the spectrum first. When to stop is
the question: an estimate that no longer moves may rest on a wrong value, and a residual r = |A v -
theta v| bounds the error of theta, but very loosely. For the i-th of the largest

    lambda_i - theta_i <= (r_1^2 + ... + r_j^2) / (theta_i - mu),    any j >= i,

mu the largest eigenvalue in the complement of the first j vectors (Mathias 1998, Quadratic residual
bounds for the Hermitian eigenvalue problem), for which the largest of the other Ritz values is
taken, with its residual on top. From near vectors, right before the matrix changed a little, that
is enough at half of the tolerance: of 617 values along trainings of small networks, to 1e-3, the
worst was off by 4e-4. Guesses that are nearer to the error fail there, by up to 4e-2.

From random vectors, an eigenvalue of which nothing is seen yet may be larger: where two lie close
together, the space first finds a mixture of their vectors, of which the residual stays at their
distance. From one start vector T is tridiagonal, and its last coefficients hardly change from step
to step once the ends of the spectrum are resolved. So the Ritz value may not gain either if the
coming steps had the mean coefficients of the last four. From several start vectors a residual that
falls slowly counts for more, by the sum of the steps to come, and the bound is to be a tenth of the
tolerance, a step later too. With the bound alone, one in ten top eigenvalues of small networks'
Hessians is off by more than the tolerance; with several start vectors one in a hundred, where they
happen to have next to nothing along the first; with the continued T one of 640, from a random
vector alone, none from one and the gradient. But where the largest two lie within one per cent of
each other, far above the rest, a mixture of theirs may be taken for the largest from one start
vector, which is then off by less than their distance; from two start vectors it is not.

From one start vector one vector of each eigenvalue is found, from two start vectors two. So two are
taken where several pairs are asked for, and further ones as long as as many values coincide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.krylov import LATELY, Krylov, Times

#: What of the tolerance the bound on the error may be, and from several random vectors.
_MARGIN, _SLOW_MARGIN = 0.5, 0.1
#: What of it the gain of further steps may be.
_LITTLE = 0.03
#: The norm of the random part that is added to the last vector of a warm start.
_MIXED = 0.1
#: What errors are relative to at one end of the spectrum, at least, over the largest in modulus.
_FLOOR = 0.1
#: How many steps the space is continued by, in thought.
_FURTHER = 40


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs at one end of the spectrum of a symmetric matrix A.

    Args:
        values: (k,) float64; the outermost first.
        vectors: (P, k) orthonormal, in the matrix's dtype and on its device.
        residuals: (k,) float64, |A v - lambda v|: some eigenvalue is no further from the value.
        converged: whether the errors of all values are below the tolerance, as far as is seen; of
            those that were asked for.
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
    hint: Tensor | None = None,
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
        tolerance: for the error of each value, relative to the outermost at its end of the
            spectrum, or to a tenth of the other where that is more; the square root of the
            dtype's precision unless told.
        start: (P, m) vectors near the wanted ones, such as those found before the matrix changed
            a little. A random part of 10 % is added to the last, so that an eigenvalue that comes
            up elsewhere is taken in, but only after some calls, 10 to 25 where it is new by 1 to 5
            % a call and its vector perpendicular to the old ones: give a `spare` vector more than
            are wanted, or begin without now and then, to see it sooner.
        hint: (P,) a vector that may have more along the wanted ones than a random vector has, to
            which one as long is added to begin with, unless `start` is given.
        spare: how many more are given at the top, however rough, for a later search to begin with.
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
    if start is not None and (start.dim() != 2 or len(start) != size):
        raise ValueError(f"expected start vectors ({size}, m), got {tuple(start.shape)}")
    space = Krylov(times, size, dtype, device)
    tolerance = space.epsilon**0.5 if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"expected a positive tolerance, got {tolerance}")
    counts = min(top, size), min(bottom, size)
    search = _Search(space, counts, max(tolerance, 20 * space.epsilon), seed)
    search.begin(start, hint)
    most_vectors = memory // (size * dtype.itemsize)
    room = max(most_vectors - 2 * space.ahead, 4 * sum(counts) + 8)
    while any(counts) and not search.is_done() and space.products < most_products:
        if len(space) >= room:
            search.restart(room // 2)
        if 2 * len(space) >= size and size <= min(room, most_products):
            search.complete()
        else:
            search.step()
    return *search.found(spare), space.products


class _Search:
    """A Krylov space grown until the outermost Ritz values are right."""

    def __init__(self, space: Krylov, counts: tuple[int, int], tolerance: float, seed: int) -> None:
        self._space = space
        self._counts = counts
        self._tolerance = tolerance
        self._random = generator(seed, "eigenpairs")
        self._is_warm = False
        self._width = 0
        self._calm = 0
        #: Steps with the last column of W that are to come, for a vector that was added late.
        self._deeper = 0
        #: Residuals of the last steps, from the top and from the bottom.
        self._past: list[tuple[Tensor, Tensor]] = []
        self._is_right = [False, False]
        self._ritz = space.ritz()

    def begin(self, start: Tensor | None, hint: Tensor | None) -> None:
        """Start vectors: those given, with a random part, or random ones."""
        vectors = [] if start is None else list(start.T)
        if vectors:
            vectors[-1] = self._mixed(vectors[-1], _MIXED)
        for vector in vectors:
            self._is_warm |= self._space.start(vector)
        if hint is not None and not self._is_warm and bool(hint.isfinite().all()):
            self._space.start(self._mixed(hint, 1.0))
        while self._space.ahead < min(max(self._counts), 1 if self._is_warm else 2):
            self._space.start(self._draw())
        self._width = self._space.ahead

    def step(self) -> None:
        """One product more."""
        space = self._space
        which = 0
        if not space.ahead:
            space.start(self._draw())
        elif self._deeper:
            which = -1
        elif self._is_warm and len(space) >= self._width:
            which = int(space.along(self._unsettled()).argmax())
        self._deeper = max(self._deeper - 1, 0)
        space.step(which)
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
        if self._deeper or not self._calm or self._calm < self._patience():
            return False
        if self._width >= max(self._counts) or self._coincident() < self._width:
            return True
        depth = -(-len(space) // self._width)
        if not space.start(self._draw()):
            return True
        self._width += 1
        self._deeper = depth
        return False

    def _patience(self) -> int:
        """For how many steps all is to be right: one end shows late where the other is far out."""
        if self._is_warm:
            return 1
        if self._width > 1:
            return 1 + self._width
        ends = self._ritz[0][[-1, 0]].abs()
        asked = ends[[count > 0 for count in self._counts]]
        return LATELY if asked.min() < _FLOOR * ends.max() else 1

    def restart(self, keep: int) -> None:
        """Forgets all but the outermost Ritz vectors."""
        values, coefficients, _ = self._ritz
        top = round(keep * self._counts[0] / sum(self._counts))
        order = torch.arange(len(values))
        kept = torch.cat([order[: keep - top], order[len(order) - top :]])
        self._space.restart(values[kept], coefficients[:, kept])

    def found(self, spare: int) -> tuple[Eigenpairs, Eigenpairs]:
        """The pairs at the top, with spare ones, and at the bottom."""
        top, bottom = self._counts
        return self._pairs(0, top + spare), self._pairs(1, bottom)

    def _pairs(self, end: int, count: int) -> Eigenpairs:
        values, coefficients, residuals = self._ritz
        order = torch.arange(len(values))
        chosen = (order if end else order.flip(0))[:count]
        return Eigenpairs(
            values[chosen],
            self._space.combine(coefficients[:, chosen]).T,
            (residuals[chosen].square() + self._space.asymmetry**2).sqrt(),
            self._is_right[end] or len(self._space) == self._space.size,
        )

    def _look(self) -> None:
        """How good the Ritz values are by now."""
        self._ritz = values, _, residuals = self._space.ritz()
        ends = [(values.flip(0), residuals.flip(0)), (-values, residuals)]
        bounds = self._bounds()
        past = self._past[-self._width] if len(self._past) >= self._width else (residuals[:0],) * 2
        self._past = [*self._past, (ends[0][1], ends[1][1])][-self._width :]
        is_slow = self._width > 1 and not self._is_warm
        margin = _SLOW_MARGIN if is_slow else _MARGIN
        self._is_right = [
            len(values) >= max(count, self._width)
            and all(
                _is_largest(*ends[e], i, bound)
                or _error(*ends[e], i, past[e] if is_slow else None) <= margin * bound
                for i in range(count)
            )
            for e, (count, bound) in enumerate(zip(self._counts, bounds, strict=True))
        ]
        if self._width == 1 and not self._is_warm and self._space.ahead:
            ahead = self._space.continued(_FURTHER)
            gains = float(ahead[-1] - values[-1]), float(values[0] - ahead[0])
            for e, count in enumerate(self._counts):
                is_little = gains[e] <= _LITTLE * bounds[e] and len(values) >= LATELY
                self._is_right[e] &= is_little or not count
        self._calm = self._calm + 1 if all(self._is_right) else 0

    def _bounds(self) -> tuple[float, float]:
        """What the errors may be, of values at the top and at the bottom."""
        values = self._ritz[0]
        ends = values[[-1, 0]].abs()
        top, bottom = (self._tolerance * ends.clamp_min(_FLOOR * float(ends.max()))).tolist()
        return top, bottom

    def _unsettled(self) -> Tensor:
        """(n, K): the coefficients of the Ritz vectors that are to be improved.

        Of an end that is not right yet, those asked for; or, once their residuals are small, the
        one that may turn out to be further out.
        """
        values, coefficients, residuals = self._ritz
        bounds = self._bounds()
        chosen: list[int] = []
        for end, count in enumerate(self._counts):
            if self._is_right[end]:
                continue
            order = range(len(values)) if end else range(len(values))[::-1]
            rough = [i for i in order[:count] if residuals[i] > bounds[end]]
            reach = residuals - values if end else residuals + values
            chosen += rough or [max(order[count:] or order, key=reach.__getitem__)]
        return coefficients[:, chosen]

    def _coincident(self) -> int:
        """How many of the values at one end coincide, at most."""
        values = self._ritz[0]
        ends = (values.flip(0)[: self._counts[0]], values[: self._counts[1]])
        return max(
            int(((v[:, None] - v).abs() <= bound).sum(0).max())
            for v, bound in zip(ends, self._bounds(), strict=True)
            if len(v)
        )

    def _mixed(self, vector: Tensor, share: float) -> Tensor:
        """A vector and a random one, of so many times its length."""
        drawn = self._draw().to(vector)
        found: Tensor = vector + share * vector.norm() * drawn / drawn.norm()
        return found

    def _draw(self) -> Tensor:
        return torch.randn(self._space.size, generator=self._random)


def _is_largest(values: Tensor, residuals: Tensor, i: int, bound: float) -> bool:
    """Whether the i-th largest Ritz value is right, and no later one may be larger, to a bound."""
    return bool(residuals[i] <= bound and ((values + residuals)[i:] <= values[i] + bound).all())


def _error(values: Tensor, residuals: Tensor, i: int, before: Tensor | None) -> float:
    """An upper estimate of the error of the i-th largest Ritz value.

    Args:
        values: all Ritz values, largest first.
        residuals: theirs.
        i: which, from 0.
        before: the residuals a round earlier, of as many as there were, if it counts how slowly
            they fall.
    """
    squares = residuals.square().cumsum(0)
    highest = (values + residuals).flip(0).cummax(0).values.flip(0)
    gaps = values[i] - highest[i + 1 :]
    squares = squares[i : len(values) - 1]
    if before is not None:
        known = before.square().cumsum(0)[i : i + len(squares)]
        ratios = torch.ones_like(squares)
        ratios[: len(known)] = squares[: len(known)] / known
        squares = squares / (1 - ratios).clamp_min(0)
    return min((squares / gaps)[gaps > 0].tolist(), default=torch.inf)
