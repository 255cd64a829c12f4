"""How many eigenvalues of a symmetric matrix lie where, from products with random vectors.

Stochastic Lanczos quadrature: for a random unit vector z, the measure sum_i (v_i . z)^2 delta(x -
lambda_i) has the spectral density of the matrix, (1 / P) sum_i delta(x - lambda_i), as its mean.
After s steps of Lanczos from z, the Ritz values theta_k and the squared first components tau_k^2 of
the eigenvectors of the projected matrix are its Gaussian quadrature: moments up to order 2 s - 1
are those of z, exactly, and so without bias those of the matrix. Ubaru, Chen and Saad 2017, Fast
estimation of tr(f(A)) via stochastic Lanczos quadrature; for networks Papyan 2020,
arXiv:2008.11865.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.estimators import Estimate, signs
from nettrace.krylov import Krylov, Times


@dataclass(frozen=True)
class Quadrature:
    """The spectral density of a symmetric matrix, as its draws' quadratures.

    Args:
        nodes: (D, s) float64, the Ritz values of each draw, smallest first.
        weights: (D, s) float64, theirs, of which each draw's sum is 1.
        size: P, how many eigenvalues there are.
        products: how many were made.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest Ritz value, of all draws; within the true range."""
        return float(self.nodes.min()), float(self.nodes.max())

    def moment(self, order: int) -> Estimate:
        """Tr A^order / P; without bias for orders below 2 s.

        Raises:
            ValueError: if the order is negative.
        """
        if order < 0:
            raise ValueError(f"expected an order from 0, got {order}")
        return self._mean(self.nodes**order)

    def cumulative(self, places: Tensor) -> Estimate:
        """(X,): which part of the eigenvalues is not above each place.

        Between Ritz values it is a step function: within the bulk, as coarse as those.
        """
        below = self.nodes[..., None] <= places.double()
        return self._mean(below.double())

    def grid(self, width: float = 0.01) -> Tensor:
        """(256,): places over the range, and five widths beyond, for the density of this width."""
        low, high = self.range
        margin = 5 * self._scale(width)
        return torch.linspace(low - margin, high + margin, 256, dtype=torch.float64)

    def density(self, places: Tensor | None = None, width: float = 0.01) -> Estimate:
        """(X,): the density at some places, each eigenvalue a Gaussian of unit area.

        Args:
            places: (X,), those of `grid` unless told.
            width: the Gaussian's standard deviation, as a part of the range of the Ritz values.

        Raises:
            ValueError: if the width is not positive, or the matrix is 0.
        """
        scale = self._scale(width)
        places = self.grid(width) if places is None else places.double()
        off = (places - self.nodes[..., None]) / scale
        return self._mean((-off.square() / 2).exp() / (scale * math.sqrt(2 * math.pi)))

    def _scale(self, width: float) -> float:
        low, high = self.range
        # Of a multiple of the identity, Ritz values differ by rounding.
        scale = width * max(high - low, 1e-6 * max(abs(low), abs(high)))
        if not scale > 0:
            raise ValueError(
                f"expected a positive width, and a matrix that is not 0, got {width} and Ritz "
                f"values from {low} to {high}"
            )
        return scale

    def _mean(self, values: Tensor) -> Estimate:
        """The mean over nodes by weight and over draws, of (D, s) or (D, s, X)."""
        weights = self.weights if values.dim() == 2 else self.weights[..., None]
        draws = (weights * values).sum(1)
        error = draws.std(0) / len(draws) ** 0.5
        return Estimate(draws.mean(0), error, len(draws), "lanczos quadrature")


def quadrature(
    times: Times,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    steps: int = 30,
    draws: int = 4,
    seed: int = 0,
) -> Quadrature:
    """The spectral density, by `steps` products for each of some draws.

    Args:
        times: multiplies with the matrix, (P,) -> (P,).
        size: P.
        dtype: of the vectors that are multiplied, of which `steps` are held at a time.
        device: of the vectors that are multiplied.
        steps: s, how many products and Ritz values for each draw, at most P: the bulk is resolved
            to about its width over s, outliers to a few parts in a thousand where s is some 10.
        draws: D, how many random vectors, at least 2, of which the spread gives standard errors.
        seed: for their random signs, drawn on the CPU.

    Raises:
        NotSymmetricError: if the matrix is seen not to be symmetric.
        ValueError: if an argument is out of range, or a product is not finite.
    """
    if size < 1 or steps < 1 or draws < 2:
        raise ValueError(
            "expected a positive size and number of steps, and at least 2 draws, to see their "
            f"spread, got {size}, {steps} and {draws}"
        )
    steps = min(steps, size)
    nodes, weights = torch.zeros(2, draws, steps, dtype=torch.float64)
    products = 0
    for k in range(draws):
        space = Krylov(times, size, dtype, device)
        space.start(signs((size,), seed, f"density {k}"))
        while space.ahead and len(space) < steps:
            space.step()
        values, coefficients, _ = space.ritz()
        count = len(values)  # fewer than the steps where they span an invariant subspace
        nodes[k, :count], nodes[k, count:] = values, values[-1]
        weights[k, :count] = coefficients[0].square()
        products += space.products
    return Quadrature(nodes, weights, size, products)
