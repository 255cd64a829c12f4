"""The geometry of representations: what layers make of samples, as clouds of points.

A layer's activations, flattened, are a point for each sample. `Probe.layers` says of which layers
(see `nettrace.activations`). A layer whose activations are the same for all samples has dimension 0
and separates nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nettrace.jackknife import delete_one_error, error_of_subsets, parts_of, subsets
from nettrace.measures.registry import Value, measure
from nettrace.measures.similarity import hsic, ratio
from nettrace.operator import PerLayer

#: Below this, a mean of logarithms is rounding.
_ROUNDING = 1e-12


@measure(
    "geometry/participation_ratio",
    needs=["representation_kernels"],
    convention="(tr S)^2 / tr S^2, S the covariance of the samples' activations: at most N - 1, "
    "of isotropic data in d dimensions 1 / (1 / d + 1 / (N - 1)); error by leaving out groups",
    dims=["representation"],
    source="Gao et al. 2017, doi:10.1101/214262",
)
def participation_ratio(representation_kernels: PerLayer) -> Value:
    """How many directions the samples' activations spread over."""
    return _per_layer(representation_kernels, _ratio)


def _ratio(kernels: Tensor, some: Tensor) -> Tensor:
    """(..., S) for subsets (n, S) of the samples, of which kernels are centred anew."""
    n, rows = some.sum(0), some * (kernels @ some)
    total = rows.sum(-2)
    trace = kernels.diagonal(dim1=-2, dim2=-1) @ some - total / n
    squares = (some * (kernels.square() @ some)).sum(-2)
    squares = squares - 2 * rows.square().sum(-2) / n + (total / n).square()
    return ratio(trace.mean(-2).square(), squares.mean(-2))


@measure(
    "geometry/participation_ratio_corrected",
    needs=["representation_kernels"],
    convention="(tr Sigma)^2 / tr Sigma^2 of the covariance of the source of the samples, both "
    "estimated without bias from N of them; infinite where it is too large to be told",
    dims=["representation"],
    source="Song et al. 2012, JMLR 13, eq. 5, for tr Sigma^2; (tr Sigma)^2 by the same over "
    "distances of pairs without a common sample",
)
def participation_ratio_corrected(representation_kernels: PerLayer) -> Value:
    """The participation ratio that infinitely many samples would have."""
    return _per_layer(representation_kernels, _corrected_ratio)


def _corrected_ratio(kernels: Tensor, some: Tensor) -> Tensor:
    n, squares = some.sum(0), kernels.diagonal(dim1=-2, dim2=-1)
    apart = squares[..., None] + squares[..., None, :] - 2 * kernels
    rows = some * (apart @ some)
    disjoint = rows.sum(-2).square() - 4 * rows.square().sum(-2)
    disjoint = disjoint + 2 * (some * (apart.square() @ some)).sum(-2)
    trace_squared = disjoint / (4 * n * (n - 1) * (n - 2) * (n - 3))
    return ratio(trace_squared.mean(-2), hsic(kernels, kernels, some), least=torch.inf)


@measure(
    "geometry/dimension_two_nn",
    needs=["neighbour_distances", "neighbour_numbers"],
    convention="(M - 1) / sum ln(r_2 / r_1) over M distinct samples, r_1 and r_2 the distances to "
    "the nearest two; too small where a manifold has a boundary or M is too small for it, by 15 % "
    "for the cube of 10 dimensions and M = 2,000, which is not in the error, the scatter of the "
    "logarithms with what neighbours share",
    dims=["representation"],
    source="Facco et al. 2017, doi:10.1038/s41598-017-11873-y",
)
def dimension_two_nn(neighbour_distances: PerLayer, neighbour_numbers: PerLayer) -> Value:
    """The intrinsic dimension, by the two nearest neighbours."""
    return _dimensions(neighbour_distances, neighbour_numbers, 2)


@measure(
    "geometry/dimension_mle",
    needs=["neighbour_distances", "neighbour_numbers"],
    convention="inverse of the mean of ln(r_k / r_j) over j < k and M distinct samples, k = 10; "
    "errors as those of dimension_two_nn, smaller; bias by curvature and boundaries is larger, of "
    "a Gaussian in 10 dimensions 10 % for M = 500, and not in the error",
    dims=["representation"],
    source="Levina and Bickel 2004, averaged as by MacKay and Ghahramani 2005",
)
def dimension_mle(neighbour_distances: PerLayer, neighbour_numbers: PerLayer) -> Value:
    """The intrinsic dimension, of greatest likelihood for the ten nearest neighbours."""
    return _dimensions(neighbour_distances, neighbour_numbers, 10)


def _dimensions(distances: PerLayer, numbers: PerLayer, k: int) -> Value:
    found = [_dimension(distances[name][:, :k], numbers[name][:, :k]) for name in distances]
    values, errors = (
        torch.tensor(several, dtype=torch.float64) for several in zip(*found, strict=True)
    )
    return Value(values, errors, {"representation": list(distances)})


def _dimension(distances: Tensor, numbers: Tensor) -> tuple[float, float]:
    """The dimension of M points and its standard error; 0 of fewer than three."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    points, k = distances.shape
    if points < 3:
        return 0.0, 0.0
    logs = (distances[:, -1:] / distances[:, :-1]).log().mean(1)
    count = points * (k - 1)
    mean = float(logs.mean())
    if not mean * (count / (count - 1)) > _ROUNDING:  # all are equally far from each other
        return torch.inf, 0.0
    dimension = (count - 1) / count / mean
    # Points whose neighbourhoods overlap have correlated logarithms.
    members = torch.cat([torch.arange(points)[:, None], numbers.cpu()], 1)
    around = csr_matrix(
        (np.ones(members.numel()), members.flatten().numpy(), range(0, members.numel() + 1, k + 1))
    )
    one, other = (around @ around.T).nonzero()
    off = (logs - mean).cpu().numpy()
    variance = max(float((off[one] * off[other]).sum()), float(off @ off)) / points**2
    return dimension, dimension * variance**0.5 / mean


@measure(
    "geometry/separation",
    needs=["activations", "classes"],
    convention="1 - mean distance within classes over that between all samples, classes weighted "
    "alike, distances 1 - cosine of activations; 1 where each class is a point, 0 where classes "
    "are all alike",
    dims=["representation"],
    source="Kornblith et al. 2021, arXiv:2010.16402, class separation R^2",
)
def separation(activations: PerLayer, classes: Tensor) -> Value:
    """How far classes are apart, against how far they spread."""
    if len(classes.unique()) < 2:
        raise ValueError("the probe has samples of one class alone: take samples of several")
    rows = {name: F.normalize(a.double()) for name, a in activations.items()}

    def separated(some: Tensor) -> Tensor:
        within = classes[some][:, None] == classes[some].unique()
        share = within.to(torch.float64) / within.sum(0)
        means = [share.T @ one[some] for one in rows.values()]
        inner = torch.stack([m.square().sum(1).mean() for m in means])
        outer = torch.stack([m.mean(0).square().sum() for m in means])
        apart = 1 - outer
        return ratio(inner - outer, torch.where(apart > _ROUNDING, apart, 0.0))

    everything = torch.arange(len(classes), device=classes.device)
    parts = [separated(part.to(classes.device)) for part in parts_of(len(classes))]
    error = delete_one_error(torch.stack(parts))
    return Value(separated(everything), error, {"representation": list(rows)})


def _per_layer(layers: PerLayer, function: Callable[[Tensor, Tensor], Tensor]) -> Value:
    kernels = torch.stack(list(layers.values()))
    some = subsets(kernels.shape[-1]).to(kernels.device)
    value, error = error_of_subsets(function(kernels, some))
    return Value(value, error, {"representation": list(layers)})
