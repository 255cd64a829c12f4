"""How similar representations are: to each other, to earlier ones, to inputs and to targets.

By centred kernel alignment, of which the plain estimate is far above 0 for samples fewer than
units, whatever the representations: p / (p + n) for independent ones of p units (so the unbiased
one is taken); and by the ranks of distances. A layer whose activations are the same for all samples
is similar to nothing: 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.jackknife import error_of_subsets, subsets
from nettrace.measures.registry import Value, measure
from nettrace.operator import PerLayer

_CKA = "Kornblith et al. 2019, arXiv:1905.00414; Nguyen, Raghu and Kornblith 2021, arXiv:2010.15327"
_UNBIASED = (
    "linear CKA, HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)), each unbiased, over minibatches "
    "of up to 1,024 samples; error by leaving out groups of samples"
)
#: Below this share of their size, what is left of centred kernels is rounding.
_ROUNDING = 1e-12


@measure(
    "geometry/cka_layers",
    needs=["representation_kernels"],
    convention=f"of each two layers: {_UNBIASED}",
    dims=["representation", "other_representation"],
    source=_CKA,
)
def cka_layers(representation_kernels: PerLayer) -> Value:
    """How similar the layers' representations are to each other."""
    kernels, names = _stacked(representation_kernels), list(representation_kernels)
    some = subsets(kernels.shape[-1]).to(kernels.device)
    value, error = error_of_subsets(_all_alignments(kernels, some))
    return Value(value, error, {"representation": names, "other_representation": names})


@measure(
    "geometry/cka_inputs",
    needs=["representation_kernels", "input_kernels"],
    convention=f"of each layer and the inputs: {_UNBIASED}",
    dims=["representation"],
    source=_CKA,
)
def cka_inputs(representation_kernels: PerLayer, input_kernels: Tensor) -> Value:
    """How much of the geometry of the inputs the layers keep."""
    return _with_one(representation_kernels, input_kernels)


@measure(
    "geometry/cka_targets",
    needs=["representation_kernels", "target_kernels"],
    convention=f"of each layer and the targets, classes as one-hot vectors: {_UNBIASED}",
    dims=["representation"],
    source=_CKA,
)
def cka_targets(representation_kernels: PerLayer, target_kernels: Tensor) -> Value:
    """How much of the geometry of the targets the layers have."""
    return _with_one(representation_kernels, target_kernels)


@measure(
    "geometry/cka_first",
    needs=["representation_kernels", "first.representation_kernels"],
    convention=f"of each layer now and at the first look: {_UNBIASED}",
    dims=["representation"],
    source=_CKA,
)
def cka_first(now: PerLayer, first: PerLayer) -> Value:
    """How similar each layer's representation is to that of the first look."""
    return _with_earlier(now, first)


@measure(
    "geometry/cka_previous",
    needs=["representation_kernels", "previous.representation_kernels"],
    convention=f"of each layer now and at the look before: {_UNBIASED}",
    dims=["representation"],
    source=_CKA,
)
def cka_previous(now: PerLayer, previous: PerLayer) -> Value:
    """How similar each layer's representation is to that of the look before."""
    return _with_earlier(now, previous)


@measure(
    "geometry/rsa_inputs",
    needs=["representation_ranks", "input_ranks"],
    convention="Spearman's correlation of distances between samples in a layer with those between "
    "inputs, over all pairs; error by leaving out groups of samples",
    dims=["representation"],
    source="Kriegeskorte, Mur and Bandettini 2008, doi:10.3389/neuro.06.004.2008",
)
def rsa_inputs(representation_ranks: PerLayer, input_ranks: Tensor) -> Value:
    """Whether samples that are alike in the inputs are alike in the layers."""
    return _rank_correlations(representation_ranks, input_ranks)


@measure(
    "geometry/rsa_targets",
    needs=["representation_ranks", "target_ranks"],
    convention="Spearman's correlation of distances between samples in a layer with those between "
    "targets (of classes, whether they differ), over all pairs; error by leaving out groups",
    dims=["representation"],
    source="Kriegeskorte, Mur and Bandettini 2008, doi:10.3389/neuro.06.004.2008",
)
def rsa_targets(representation_ranks: PerLayer, target_ranks: Tensor) -> Value:
    """Whether samples that are alike in the task are alike in the layers."""
    return _rank_correlations(representation_ranks, target_ranks)


def hsic(one: Tensor, other: Tensor, some: Tensor | None = None) -> Tensor:
    """The unbiased estimate HSIC_1 of the squared norm of two sets of features' covariance.

    Song et al. 2012, JMLR 13, eq. 5.

    Args:
        one: (..., B, n, n) kernels of B minibatches of n >= 4 samples, over which is averaged.
        other: likewise; the two are broadcast.
        some: (n, S) subsets of the samples, as ones and zeros; all of them by default.

    Returns:
        (..., S) for each of the subsets, (...,) by default, in the kernels' units squared.
    """
    if some is None:
        return hsic(one, other, one.new_ones(one.shape[-1], 1))[..., 0]
    n = some.sum(0)
    k, l = (_without_diagonal(kernels) for kernels in (one, other))  # noqa: E741
    rows, others = (some * (kernels @ some) for kernels in (k, l))
    products = (some * ((k * l) @ some)).sum(-2)
    totals = rows.sum(-2) * others.sum(-2) / ((n - 1) * (n - 2))
    found: Tensor = products + totals - 2 * (rows * others).sum(-2) / (n - 2)
    return found.mean(-2) / (n * (n - 3))


def cka(one: Tensor, other: Tensor) -> float:
    """The unbiased linear CKA of two representations (N, d) and (N, e) of the same samples.

    Raises:
        ValueError: if there are not as many samples in both, or fewer than four.
    """
    if len(one) != len(other) or len(one) < 4:
        raise ValueError(
            f"expected two representations of the same 4 samples or more, got {len(one)} and "
            f"{len(other)}"
        )
    rows = [r.flatten(1).double() for r in (one, other)]
    kernels = [((r - r.mean(0)) @ (r - r.mean(0)).T)[None] for r in rows]
    everything = kernels[0].new_ones(len(one), 1)
    return float(_alignment(kernels[0], kernels[1], everything))


def _without_diagonal(kernels: Tensor) -> Tensor:
    return kernels - torch.diag_embed(kernels.diagonal(dim1=-2, dim2=-1))


def _alignment(one: Tensor, other: Tensor, some: Tensor) -> Tensor:
    """(..., S) the CKA of kernels (..., B, n, n), for subsets (n, S) of the samples."""
    return ratio(hsic(one, other, some), (_power(one, some) * _power(other, some)).sqrt())


def _all_alignments(kernels: Tensor, some: Tensor) -> Tensor:
    """(L, L, S) the CKA of each two of kernels (L, B, n, n), for subsets (n, S) of the samples."""
    n, without = some.sum(0), 1 - some
    k = _without_diagonal(kernels)
    rows = some * (k @ some)
    totals = rows.sum(-2)
    # Over all pairs i, j of samples at first, by i; then less those of which one is not there.
    lines = k.permute(1, 2, 0, 3)  # (B, n, L, n)
    by_row = lines @ lines.mT
    products = by_row.sum(1).movedim(0, -1)[..., None] - 2 * torch.einsum(
        "bnkl,ns->klbs", by_row, without
    )
    for number, column in enumerate(without.T):
        left = column.nonzero().flatten()
        block = k[..., left[:, None], left].flatten(2)
        products[..., number] += torch.einsum("kbp,lbp->klb", block, block)
    found = products + torch.einsum("kbs,lbs->klbs", totals, totals) / ((n - 1) * (n - 2))
    found = found - 2 * torch.einsum("kbns,lbns->klbs", rows, rows) / (n - 2)
    found = found.mean(-2) / (n * (n - 3))
    powers = _known(found.diagonal(dim1=0, dim2=1).mT, kernels)
    return ratio(found, (powers[:, None] * powers).sqrt())


def _power(kernels: Tensor, some: Tensor) -> Tensor:
    """HSIC_1 of kernels with themselves, 0 where it is rounding or noise alone."""
    return _known(hsic(kernels, kernels, some), kernels)


def _known(powers: Tensor, kernels: Tensor) -> Tensor:
    least = _ROUNDING * kernels.square().mean((-3, -2, -1))
    return torch.where(powers > least[..., None], powers, 0.0)


def _with_one(layers: PerLayer, one: Tensor) -> Value:
    some = subsets(one.shape[-1]).to(one.device)
    value, error = error_of_subsets(_alignment(_stacked(layers), one, some))
    return Value(value, error, {"representation": list(layers)})


def _with_earlier(now: PerLayer, before: PerLayer) -> Value:
    names = [name for name in now if name in before]
    if not names:
        raise ValueError("the layers of that look have other names: none can be compared")
    kernels, others = (torch.stack([k[name] for name in names]) for k in (now, before))
    some = subsets(kernels.shape[-1]).to(kernels.device)
    value, error = error_of_subsets(_alignment(kernels, others, some))
    return Value(value, error, {"representation": names})


def _rank_correlations(layers: PerLayer, reference: Tensor) -> Value:
    """Of ranks (B, n, n) of pairs, above the diagonal, less their mean."""
    matrices = _stacked(layers)
    some = subsets(matrices.shape[-1]).to(matrices.device)
    pairs = (size := some.sum(0)) * (size - 1) / 2

    def covariance(one: Tensor, other: Tensor) -> Tensor:
        """Over the pairs of each subset, and over minibatches."""
        product, *means = ((some * (m @ some)).sum(-2) / pairs for m in (one * other, one, other))
        return (product - means[0] * means[1]).mean(-2)

    variances = covariance(matrices, matrices) * covariance(reference, reference)
    found = ratio(covariance(matrices, reference), variances.sqrt())
    value, error = error_of_subsets(found)
    return Value(value, error, {"representation": list(layers)})


def _stacked(layers: PerLayer) -> Tensor:
    """(L, B, n, n) of all layers."""
    return torch.stack(list(layers.values()))


def ratio(numerator: Tensor, denominator: Tensor, least: float = 0.0) -> Tensor:
    """A ratio, 0 where both vanish; `least` where the denominator alone does, or is negative."""
    positive = denominator > _ROUNDING * numerator.abs()
    found = numerator / torch.where(positive, denominator, 1.0)
    return torch.where(positive, found, torch.where(numerator > 0, least, 0.0))
