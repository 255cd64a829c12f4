"""Krylov spaces of a symmetric matrix that is known by its products alone.

Held is a decomposition

    A Q = Q T + W B,

Q and W with orthonormal columns, all perpendicular to each other, T symmetric: from one start
vector T is the tridiagonal matrix of Lanczos (1950), from several that of the band Lanczos process
(Ruhe 1979). A step makes the first column of W the next of Q, at the price of one product, and what
of the product lies in neither becomes the last of W. So the residual of a Ritz pair (theta, Q y),
y an eigenvector of T, is |B y|, for nothing, and Ritz vectors that are kept in place of Q (thick
restart: Wu and Simon 2000) leave a decomposition of the same form.

Without reorthogonalisation, rounding brings converged Ritz pairs back as ghosts. Here each product
is made orthogonal to everything twice (Parlett 1998, The symmetric eigenvalue problem, section
6.9), which also tells, for nothing, whether the matrix is symmetric: what the product has along
earlier columns is known beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: A product with a symmetric matrix: (P,) -> (P,), of the same dtype and device.
Times: TypeAlias = Callable[[Tensor], Tensor]
#: For how many vectors there is room at first.
_ROOM = 24
#: How many numbers are summed in the vectors' own precision.
_BLOCK = 1024
#: How far a matrix may be from symmetric, over its norm and the root of the precision: where large
#: second derivatives cancel, as in networks that are saturated, rounding is above that root.
_ASYMMETRY = 30
#: How many steps the course of the process is judged by.
LATELY = 4


class NotSymmetricError(ValueError):
    """A matrix that should be symmetric is not; the message says by how much."""


class Krylov:
    """A growing decomposition A Q = Q T + W B.

    Args:
        times: multiplies with A.
        size: P.
        dtype: of the vectors; all small matrices are in float64.
        device: of the vectors.

    Attributes:
        products: how many were made.
        norm: the largest |A q| so far, at most the largest eigenvalue in modulus.
        asymmetry: the largest difference of a . A b and b . A a so far, of unit vectors.
    """

    def __init__(
        self, times: Times, size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._times = times
        #: The columns of Q and then those of W, as rows.
        self._basis = torch.empty(min(_ROOM, size + 1), size, dtype=dtype, device=device)
        self._projected = torch.zeros(0, 0, dtype=torch.float64)
        self._links = torch.zeros(0, 0, dtype=torch.float64)
        #: Of the last steps, q . A q and the norm of what is new in A q.
        self._course: deque[tuple[float, float]] = deque(maxlen=LATELY)
        self.products = 0
        self.norm = self.asymmetry = 0.0

    def __len__(self) -> int:
        """How many columns Q has."""
        return len(self._projected)

    @property
    def size(self) -> int:
        """P."""
        return self._basis.shape[1]

    @property
    def ahead(self) -> int:
        """How many columns W has; 0 where Q spans an invariant subspace."""
        return len(self._links)

    @property
    def epsilon(self) -> float:
        """The precision of the vectors."""
        return torch.finfo(self._basis.dtype).eps

    def start(self, vector: Tensor) -> bool:
        """Makes (P,) the last column of W, as far as it is new; returns whether it is.

        Raises:
            ValueError: if it is not finite.
        """
        vector = vector.to(self._basis)
        norm = _length(vector)
        if not norm < torch.inf:
            raise ValueError(f"expected a finite start vector, got one of norm {norm}")
        if norm == 0 or len(self) + self.ahead == self.size:
            return False
        _, rest = self._orthogonal(vector / norm)
        if not rest:
            return False
        row = torch.zeros(1, len(self), dtype=torch.float64)
        self._links = torch.cat([self._links, row])
        return True

    def step(self, which: int = 0) -> None:
        """One product, with a column of W, the first unless told.

        Raises:
            NotSymmetricError: if the products cannot be those of a symmetric matrix.
            ValueError: if the product is not finite.
        """
        n, which = len(self), which % self.ahead
        if which:
            moved = self._basis[n : n + which + 1].roll(1, 0)
            self._basis[n : n + which + 1] = moved
        product = self._times(self._basis[n])
        self.products += 1
        norm = _length(product)
        if not norm < torch.inf:
            raise ValueError(
                f"product number {self.products} with the matrix is not finite, of norm {norm}: "
                "the network diverges, or its arithmetic is too narrow"
            )
        self.norm = max(self.norm, norm)
        expected = self._links[which]
        others = self._links[[b for b in range(self.ahead) if b != which]]
        projected = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        projected[:n, :n] = self._projected
        near = [*expected.nonzero()[:, 0].tolist(), n]
        found, rest = self._orthogonal(product, self.norm, near)
        self._projected, self._links = projected, others
        deviation = float((found[:n] - expected).norm())
        self.asymmetry = max(self.asymmetry, deviation)
        if deviation > _ASYMMETRY * self.epsilon**0.5 * self.norm:
            raise NotSymmetricError(
                f"the matrix is not symmetric: a . A b and b . A a differ by {deviation:.3g} for "
                f"unit vectors, at a norm of {self.norm:.3g}; give a product of which the "
                "derivatives are right and that is the same at every call, without dropout or "
                "running statistics"
            )
        projected[:n, n], projected[n, :n], projected[n, n] = found[:n], expected, found[n]
        self._links = torch.cat([self._links, found[n + 1 :, None]], 1)
        self._course.append((float(found[n]), rest))
        if rest:
            row = torch.zeros(1, n + 1, dtype=torch.float64)
            row[0, n] = rest
            self._links = torch.cat([self._links, row])

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (n,), smallest first, coefficients (n, n) of their vectors, residuals (n,).

        A residual |A v - theta v| is not known to better than the products, and not said to be.
        """
        values, coefficients = torch.linalg.eigh((self._projected + self._projected.T) / 2)
        residuals = (self._links @ coefficients).square().sum(0)
        return values, coefficients, (residuals + (self.epsilon * self.norm) ** 2).sqrt()

    def continued(self, steps: int) -> Tensor:
        """Ritz values, smallest first, after further steps with the last ones' mean coefficients.

        Of a space that has one start vector; where it is invariant, nothing is to come.
        """
        n, further = len(self), steps if self.ahead else 0
        whole = torch.zeros(n + further, n + further, dtype=torch.float64)
        whole[:n, :n] = (self._projected + self._projected.T) / 2
        if further:
            own, new = torch.tensor(list(self._course), dtype=torch.float64).mean(0)
            whole[n:, n:] = torch.diag(own.expand(further))
            whole[n:, n:].diagonal(1).fill_(new)
            whole[:n, n] = self._links[0]
        values: Tensor = torch.linalg.eigvalsh(whole, UPLO="U")
        return values

    def along(self, coefficients: Tensor) -> Tensor:
        """(W,): how much of the residuals of some pairs, Q y for y (n, K), lies in columns of W."""
        return (self._links @ coefficients).square().sum(1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """(K, P): the combinations (n, K) of the columns of Q, as rows."""
        return coefficients.T.to(self._basis) @ self._basis[: len(self)]

    def restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Keeps some Ritz pairs, of values (K,) and vectors Q y, y from (n, K), in place of Q."""
        kept, ahead = self.combine(coefficients), self._basis[len(self) :][: self.ahead].clone()
        self._basis[: len(kept)] = kept
        self._basis[len(kept) : len(kept) + len(ahead)] = ahead
        self._links = self._links @ coefficients
        self._projected = torch.diag(values)

    def _orthogonal(
        self, vector: Tensor, scale: float = 1.0, near: Sequence[int] = ()
    ) -> tuple[Tensor, float]:
        """What a vector has along the columns of Q and W, and the norm of its rest.

        The rest's direction becomes the last column of W. There is none, and the norm is 0, but for
        rounding, where it is tiny in comparison with a scale. What the vector has along those
        columns of Q that it is near to is taken out first: then one pass over all mostly is enough.
        """
        count = len(self) + self.ahead
        if count == len(self._basis):
            wider = self._basis.new_empty(min(2 * count, self.size + 1), self.size)
            wider[:count] = self._basis
            self._basis = wider
        basis, rest = self._basis[:count], self._basis[count]
        found = torch.zeros(count, dtype=torch.float64)
        rest.copy_(vector)
        for i in near:
            amount = float(basis[i] @ rest)
            rest.sub_(basis[i], alpha=amount)
            found[i] += amount
        norm = _length(rest)
        for _ in range(4):
            along = basis @ rest
            rest.addmv_(basis.T, along, alpha=-1)
            found += along.double().cpu()
            before, norm = norm, _length(rest)
            if norm <= 10 * self.epsilon * scale:
                return found, 0.0
            if norm > 0.7 * before:
                break
        rest.div_(norm)
        return found, norm


def _length(vector: Tensor) -> float:
    """The norm: that of a million numbers summed in single precision is off by 1e-4."""
    whole = len(vector) - len(vector) % _BLOCK
    parts = [vector[:whole].view(-1, _BLOCK).norm(dim=1), vector[whole:].norm()[None]]
    found = float(torch.cat(parts).double().norm())
    if 1e-12 < found < 1e12:
        return found
    return float(vector.double().norm())  # squares may be beyond the range of single precision
