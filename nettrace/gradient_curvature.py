"""How the loss is curved along the gradients of its samples, by products with Hessians.

With g_n the gradient of sample n's loss and H_m the Hessian of the mean loss over a part m of the
samples, g_n^T H_m g_n is wanted for samples that are not of that part: the curvature that a sample
has along its own gradient is much larger than that along others', so that a Hessian of all of them
would be biased. The samples are dealt out into parts, and each part's Hessian is multiplied with
gradients of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.estimators import signs
from nettrace.per_sample import LossJacobian
from nettrace.second_order import HessianProduct, NotTwiceDifferentiableError, Twice

#: Into how many parts samples are dealt out, and how many products with Hessians are made for the
#: squares in all, or a few more.
PARTS, PRODUCTS = 8, 16


@dataclass(frozen=True)
class GradientCurvature:
    """The curvature that each part of the samples has along the gradients of the others.

    Args:
        parts: the numbers of the samples of each of M parts.
        squares: (M, N) d^T H_m d for d the gradients less their mean over samples not of part m,
            exact or estimates without bias; 0 for those of the part.
        overlaps: (M, N) g^T H_m mean(g), with that mean.
        products: how many products with Hessians it took.
        is_exact: whether the squares are.
    """

    parts: Sequence[Tensor]
    squares: Tensor
    overlaps: Tensor
    products: int
    is_exact: bool


def along_gradients(gradients: LossJacobian, twice: Twice, seed: int) -> GradientCurvature:
    """The curvature that each part of the samples has along the gradients of the others.

    The squares in a part's Hessian H of n samples' centred gradients D (n, P) are the diagonal of
    D H D^T: exact by a product for each of the n, or by signs e as the mean of e * (D H D^T e).

    Args:
        gradients: of the samples' losses.
        twice: the same with their tape.
        seed: for the signs.

    Raises:
        NotTwiceDifferentiableError: if some backward pass cannot be differentiated.
        ValueError: if there are fewer than 3 samples, or gradients overflow.
    """
    samples = gradients.samples
    if samples < 3:
        raise ValueError(f"curvature and noise are told apart by at least 3 samples, got {samples}")
    parts = [torch.arange(m, samples, PARTS) for m in range(min(PARTS, samples))]
    draws = PRODUCTS // len(parts)
    squares = torch.zeros(len(parts), samples, dtype=torch.float64)
    overlaps, products = torch.zeros_like(squares), 0
    is_exact = True
    for m, part in enumerate(parts):
        rest = torch.ones(samples, dtype=torch.bool)
        rest[part] = False
        count = int(rest.sum())
        few = count <= draws
        is_exact = is_exact and few
        vectors = torch.zeros(count if few else draws, samples, dtype=torch.float64)
        for k, vector in enumerate(vectors):
            if few:
                vector[rest.nonzero()[k]] = 1
            else:
                vector[rest] = signs((count,), seed, f"curvature {m} {k}").double()
        hessian = _Hessian(gradients, twice, part)
        mean = rest.double() / count
        overlaps[m] = hessian(mean)
        for vector in vectors:
            weights = torch.where(rest, vector - vector[rest].mean(), 0)
            found = hessian(weights)
            hessian.check_symmetry(mean, overlaps[m], weights, found)
            squares[m] += vector * (found - found[rest].mean()) / (1 if few else draws)
        products += 1 + len(vectors)
    return GradientCurvature(parts, squares, overlaps, products, is_exact)


class _Hessian:
    """w -> J H J^T w, (N,), for the Hessian of the mean loss over a part of the samples."""

    def __init__(self, gradients: LossJacobian, twice: Twice, part: Tensor) -> None:
        self._gradients = gradients
        self._epsilon = twice.epsilon
        weights = torch.zeros(gradients.samples, dtype=torch.float64)
        weights[part] = 1 / len(part)
        self._hessian = HessianProduct(twice, weights)

    def __call__(self, weights: Tensor) -> Tensor:
        shares = self._gradients.jvp(self._hessian(self._gradients.vjp(weights)))
        product = torch.stack([share.double().cpu() for share in shares.values()]).sum(0)
        if not bool(product.isfinite().all()):
            raise ValueError(
                "second derivatives of the loss overflow: the weights diverge, or the arithmetic "
                "is too narrow"
            )
        return product

    def check_symmetry(self, v: Tensor, of_v: Tensor, w: Tensor, of_w: Tensor) -> None:
        """Checks that v . J H J^T w is w . J H J^T v, which wrong second derivatives seldom are."""
        one, other = v @ of_w, w @ of_v
        size = v.norm() * of_w.norm() + w.norm() * of_v.norm()
        if abs(one - other) > self._epsilon**0.5 * size:
            raise NotTwiceDifferentiableError(
                f"second derivatives of the loss are not symmetric, {float(one):.3g} one way and "
                f"{float(other):.3g} the other: the backward pass of some operation gives wrong "
                "derivatives when it is differentiated"
            )
