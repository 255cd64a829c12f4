"""Few numbers for a large Gram matrix: sketches, low-rank approximations, leading eigenvalues.

None of these forms the Jacobian; all but the sketch need only products K v = J (J^T v).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from nettrace.estimators import Estimate, generator, signs
from nettrace.products import Pushforward, gram_product

if TYPE_CHECKING:
    from nettrace.operator import Jacobian

GramMethod: TypeAlias = Literal["sketch", "nystrom"]
PseudoKind: TypeAlias = Literal["sum", "random"]

#: Products spent on the error of a Nystrom approximation: known to within sqrt(2 / 8) at worst.
_CHECKS = 8
#: Blocks of products after which `spectrum` returns what it has.
_BLOCKS = 50


def pseudo(jacobian: Jacobian, kind: PseudoKind, k: int, seed: int) -> Jacobian:
    """The Jacobian of few combinations of the outputs; see `Jacobian.pseudo`."""
    if kind not in ("sum", "random"):
        raise ValueError(f"expected 'sum' or 'random', got {kind!r}")
    if k < 1 or (kind == "sum" and k > 1):
        raise ValueError(f"expected k = 1 for 'sum' and at least 1 for 'random', got {k}")
    rows = torch.ones(1, jacobian.outputs)
    if kind == "random":
        rows = torch.stack([signs((jacobian.outputs,), seed, f"pseudo {i}") for i in range(k)])
    rows = rows.to(jacobian._gradients.outputs) / math.sqrt(jacobian.outputs)
    return jacobian.project(rows[:, None].expand(-1, jacobian.samples, -1))


def sketch(jacobian: Jacobian, k: int, seed: int) -> Tensor:
    """(N, C, k) random projections of the rows; see `Jacobian.sketch`."""
    if k < 1:
        raise ValueError(f"expected k of at least 1, got {k}")
    shape = (jacobian.samples, jacobian.outputs)
    push = Pushforward(jacobian, signs(shape, seed, "check"))
    columns = []
    for i in range(k):
        u = {}
        for name, p in jacobian._gradients.parameters.items():
            like = torch.view_as_real(p) if p.is_complex() else p
            drawn = signs(tuple(like.shape), seed, f"sketch {i} {name}").to(like)
            u[name] = torch.view_as_complex(drawn) if p.is_complex() else drawn
        column = push(u)
        columns.append(jacobian.jvp(u) if column is None else column)
    return torch.stack(columns, 2) / math.sqrt(k)


def approximate_gram(jacobian: Jacobian, method: GramMethod, rank: int, seed: int) -> Estimate:
    """The Gram matrix by a sketch or by Nystrom's method; see `Jacobian.approximate_gram`."""
    n, c = jacobian.samples, jacobian.outputs
    if method not in ("sketch", "nystrom"):
        raise ValueError(f"expected 'sketch' or 'nystrom', got {method!r}")
    if not 1 <= rank or (method == "nystrom" and rank > n * c):
        raise ValueError(f"expected a rank from 1 to N C = {n * c}, got {rank}")
    if method == "sketch":
        features = sketch(jacobian, rank, seed).flatten(0, 1)
        value = features @ features.T
        norms = value.diagonal()
        error = ((norms[:, None] * norms + value.square()) / rank).sqrt().view(n, c, n, c)
        probes = rank
    else:
        features, error = _nystrom(jacobian, rank, seed)
        value, probes = features @ features.T, rank + _CHECKS
    return Estimate(value.view(n, c, n, c), error, probes, method)


def spectrum(jacobian: Jacobian, k: int, tolerance: float, seed: int) -> Estimate:
    """The k largest eigenvalues of the Gram matrix; see `Jacobian.spectrum`."""
    order = jacobian.samples * jacobian.outputs
    if not 1 <= k <= order:
        raise ValueError(f"expected k from 1 to N C = {order}, got {k}")
    block = _normal(jacobian, k, seed, "spectrum")
    basis, images = block[:, :0], block[:, :0]
    while True:
        block = block[:, : order - basis.shape[1]]
        for _ in range(2):  # twice, for a block that lies in the basis but for rounding
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis = torch.cat([basis, block], 1)
        images = torch.cat([images, _times(jacobian, block)], 1)
        small = basis.T @ images
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        residuals = (images @ vectors - basis @ vectors * values).norm(dim=0)
        steps = basis.shape[1]
        if bool((residuals <= tolerance * values[0]).all()) or steps in (order, _BLOCKS * k):
            return Estimate(values, residuals, steps, "block lanczos")
        block = images[:, -block.shape[1] :]


def _nystrom(jacobian: Jacobian, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """F (N C, R) with F F^T near K, and the root-mean-square error of an entry.

    Tropp, Yurtsever, Udell and Cevher 2017, arXiv:1706.05736, algorithm 3: shifted, so that
    rounding cannot make it indefinite.
    """
    tests = torch.linalg.qr(_normal(jacobian, rank, seed, "nystrom")).Q
    images = _times(jacobian, tests)
    shift = len(tests) ** 0.5 * torch.finfo(jacobian._gradients.dtype).eps * images.norm()
    shift = shift.clamp_min(torch.finfo(images.dtype).tiny)
    images = images + shift * tests
    core = tests.T @ images
    lower = torch.linalg.cholesky((core + core.T) / 2)
    left, values, _ = torch.linalg.svd(
        torch.linalg.solve_triangular(lower, images.T, upper=False).T, full_matrices=False
    )
    features = left * (values.square() - shift).clamp_min(0).sqrt()
    checks = _normal(jacobian, _CHECKS, seed, "checks")
    rest = _times(jacobian, checks) - features @ (features.T @ checks)
    return features, rest.square().sum(0).mean().sqrt() / len(features)


def _normal(jacobian: Jacobian, columns: int, seed: int, key: str) -> Tensor:
    """(N C, columns) independent standard normal numbers, drawn on the CPU, in float64."""
    shape = (jacobian.samples * jacobian.outputs, columns)
    drawn = torch.randn(shape, generator=generator(seed, key), dtype=torch.float64)
    return drawn.to(jacobian._gradients.outputs.device)


def _times(jacobian: Jacobian, columns: Tensor) -> Tensor:
    """K times each column, in float64."""
    vectors = columns.T.reshape(-1, jacobian.samples, jacobian.outputs)
    return torch.stack([gram_product(jacobian, v).flatten() for v in vectors], 1).double()
