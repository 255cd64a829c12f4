"""How similar representations are: to each other, to earlier ones, to inputs and to targets.

By centred kernel alignment, of which the plain estimate is far above 0 for samples fewer than
units, whatever the representations: p / (p + n) for independent ones of p units (so the unbiased
one is taken); and by the ranks of distances. A layer whose activations are the same for all samples
is similar to nothing: 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.jackknife import leaving_out
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
    dims=["layer", "other_layer"],
    source=_CKA,
)
def cka_layers(representation_kernels: PerLayer) -> Value:
    """How similar the layers' representations are to each other."""
    value, error = leaving_out(_all_alignments, _stacked(representation_kernels))
    names = list(representation_kernels)
    return Value(value, error, {"layer": names, "other_layer": names})


@measure(
    "geometry/cka_inputs",
    needs=["representation_kernels", "input_kernels"],
    convention=f"of each layer and the inputs: {_UNBIASED}",
    dims=["layer"],
    source=_CKA,
)
def cka_inputs(representation_kernels: PerLayer, input_kernels: Tensor) -> Value:
    """How much of the geometry of the inputs the layers keep."""
    return _with_one(representation_kernels, input_kernels)


@measure(
    "geometry/cka_targets",
    needs=["representation_kernels", "target_kernels"],
    convention=f"of each layer and the targets, classes as one-hot vectors: {_UNBIASED}",
    dims=["layer"],
    source=_CKA,
)
def cka_targets(representation_kernels: PerLayer, target_kernels: Tensor) -> Value:
    """How much of the geometry of the targets the layers have."""
    return _with_one(representation_kernels, target_kernels)


@measure(
    "geometry/cka_first",
    needs=["representation_kernels", "first.representation_kernels"],
    convention=f"of each layer now and at the first look: {_UNBIASED}",
    dims=["layer"],
    source=_CKA,
)
def cka_first(now: PerLayer, first: PerLayer) -> Value:
    """How similar each layer's representation is to that of the first look."""
    return _with_earlier(now, first)


@measure(
    "geometry/cka_previous",
    needs=["representation_kernels", "previous.representation_kernels"],
    convention=f"of each layer now and at the look before: {_UNBIASED}",
    dims=["layer"],
    source=_CKA,
)
def cka_previous(now: PerLayer, previous: PerLayer) -> Value:
    """How similar each layer's representation is to that of the look before."""
    return _with_earlier(now, previous)


@measure(
    "geometry/rsa_inputs",
    needs=["representation_kernels", "input_kernels"],
    convention="Spearman's correlation of distances between samples in a layer with those between "
    "inputs, over all pairs; error by leaving out groups of samples",
    dims=["layer"],
    source="Kriegeskorte, Mur and Bandettini 2008, doi:10.3389/neuro.06.004.2008",
)
def rsa_inputs(representation_kernels: PerLayer, input_kernels: Tensor) -> Value:
    """Whether samples that are alike in the inputs are alike in the layers."""
    return _rank_correlations(representation_kernels, input_kernels)


@measure(
    "geometry/rsa_targets",
    needs=["representation_kernels", "target_kernels"],
    convention="Spearman's correlation of distances between samples in a layer with those between "
    "targets (of classes, whether they differ), over all pairs; error by leaving out groups",
    dims=["layer"],
    source="Kriegeskorte, Mur and Bandettini 2008, doi:10.3389/neuro.06.004.2008",
)
def rsa_targets(representation_kernels: PerLayer, target_kernels: Tensor) -> Value:
    """Whether samples that are alike in the task are alike in the layers."""
    return _rank_correlations(representation_kernels, target_kernels)


def hsic(one: Tensor, other: Tensor) -> Tensor:
    """The unbiased estimate HSIC_1 of the squared norm of two sets of features' covariance.

    Args:
        one: (..., B, n, n) kernels of B minibatches of n >= 4 samples, over which is averaged.
        other: likewise.

    Returns:
        (...,), in the kernels' units squared; Song et al. 2012, JMLR 13, eq. 5.
    """
    n = one.shape[-1]
    return (_u_centred(one) * _u_centred(other)).sum((-2, -1)).mean(-1) / (n * (n - 3))


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
    kernels = [
        (x := r.double().flatten(1) - r.double().flatten(1).mean(0)) @ x.T for r in (one, other)
    ]
    return float(_alignment(*(k[None] for k in kernels)))


def _u_centred(kernels: Tensor) -> Tensor:
    """Kernels less the means of their rows and columns, as they are without the diagonal."""
    n = kernels.shape[-1]
    kernels = kernels - torch.diag_embed(kernels.diagonal(dim1=-2, dim2=-1))
    rows = kernels.sum(-1, keepdim=True) / (n - 2)
    centred = kernels - rows - rows.mT + rows.sum(-2, keepdim=True) / (n - 1)
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))


def _alignment(one: Tensor, other: Tensor) -> Tensor:
    """(...,) the CKA of kernels (..., B, n, n)."""
    return ratio(hsic(one, other), (_power(one) * _power(other)).sqrt())


def _all_alignments(kernels: Tensor) -> Tensor:
    """(L, L) the CKA of each two of (L, B, n, n)."""
    batches, n = kernels.shape[1:3]
    centred = _u_centred(kernels).flatten(1)
    power = _power(kernels)
    return ratio(centred @ centred.T / (batches * n * (n - 3)), (power[:, None] * power).sqrt())


def _power(kernels: Tensor) -> Tensor:
    """HSIC_1 of kernels with themselves, 0 where it is rounding or noise alone."""
    found, n = hsic(kernels, kernels), kernels.shape[-1]
    least = _ROUNDING * kernels.square().sum((-2, -1)).mean(-1) / n**2
    return torch.where(found > least, found, 0.0)


def _with_one(layers: PerLayer, one: Tensor) -> Value:
    both = torch.cat([_stacked(layers), one[None]])
    value, error = leaving_out(lambda k: _alignment(k[:-1], k[-1:]), both)
    return Value(value, error, {"layer": list(layers)})


def _with_earlier(now: PerLayer, before: PerLayer) -> Value:
    names = [name for name in now if name in before]
    if not names:
        raise ValueError("the layers of that look have other names: none can be compared")
    both = torch.stack([torch.stack([k[name] for name in names]) for k in (now, before)])
    value, error = leaving_out(lambda k: _alignment(k[0], k[1]), both)
    return Value(value, error, {"layer": names})


def _rank_correlations(layers: PerLayer, reference: Tensor) -> Value:
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    kernels = torch.cat([_stacked(layers), reference[None]])
    n = kernels.shape[-1]
    above = torch.triu_indices(n, n, 1, device=kernels.device)
    squares = kernels.diagonal(dim1=-2, dim2=-1)
    apart = squares[..., None] + squares[..., None, :] - 2 * kernels
    # Equal distances differ by rounding, which must not rank them.
    apart = apart[..., above[0], above[1]]
    scale = apart.amax(-1, keepdim=True).clamp_min(torch.finfo(apart.dtype).tiny)
    ranks = torch.from_numpy(rankdata((apart / scale).cpu().numpy().round(10), axis=-1))
    matrices = torch.zeros(kernels.shape, dtype=torch.float64)
    matrices[..., above[0].cpu(), above[1].cpu()] = ranks

    def correlations(ranks: Tensor) -> Tensor:
        m = ranks.shape[-1]
        i, j = torch.triu_indices(m, m, 1)
        off = ranks[..., i, j]
        off = off - off.mean(-1, keepdim=True)
        products = (off[:-1] * off[-1]).sum(-1).mean(-1)
        norms = off.square().sum(-1).mean(-1)
        return ratio(products, (norms[:-1] * norms[-1]).sqrt())

    value, error = leaving_out(correlations, matrices)
    return Value(value, error, {"layer": list(layers)})


def _stacked(layers: PerLayer) -> Tensor:
    """(L, B, n, n) of all layers."""
    return torch.stack(list(layers.values()))


def ratio(numerator: Tensor, denominator: Tensor, least: float = 0.0) -> Tensor:
    """A ratio, 0 where both vanish; `least` where the denominator alone does, or is negative."""
    positive = denominator > _ROUNDING * numerator.abs()
    found = numerator / torch.where(positive, denominator, 1.0)
    return torch.where(positive, found, torch.where(numerator > 0, least, 0.0))
