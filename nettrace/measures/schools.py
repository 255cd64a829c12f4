"""The kernel's collective variables as each school of the field defines them.

One network on one batch has Tr Theta = 870, 13.6 or 4.5, depending on whom one asks. Here the
suffix of a name tells the school, and the convention with each value tells the definition:

    papyrus, znnl     Tovey et al.: the (N C, N C) kernel over its order, eigenvalues clipped
    perspic           Nikolaou et al.: sums over outputs, over the number T of targets
    neural_tangents   Novak et al.: the (N, N) kernel, a mean over outputs
    nngeometry        George: the Fisher information of a Gaussian, a mean over samples

Quantities of theirs that carry no convention of their own, or one that other measures have, are not
repeated: papyrus's loss and accuracy are whatever functions it is given, here `loss/mean` and
`loss/accuracy`; perspic's coupling is `collective/chi_align`, in which T cancels; nngeometry's Gram
matrix is `ntk/gram` with its axes as (C, N, C, N), and its Fisher information of logits has the
trace `fisher/trace`.
"""

from __future__ import annotations

import math

from torch import Tensor

from nettrace.measures.collective import chi_loss
from nettrace.measures.registry import Value, measure
from nettrace.measures.spectrum import shannon

_PAPYRUS = "Tovey et al. 2024, arXiv:2410.07451; papyrus"
_ZNNL = "Tovey et al. 2023, arXiv:2305.00995; ZnNL"
_PERSPIC = "Nikolaou et al. 2026, arXiv:2605.31244; perspic"
_NEURAL_TANGENTS = "Novak et al. 2020, arXiv:1912.02803; neural-tangents, empirical_ntk_fn"
_NNGEOMETRY = "George 2021, NNGeometry"
_CLIP = 1e-14  # papyrus and ZnNL clip eigenvalues here before they normalise them


# The trace ----------------------------------------------------------------------------------------


@measure(
    "collective/trace_papyrus",
    needs=["blocks"],
    convention="papyrus: trace of the (N C, N C) kernel over N C; standard error over samples",
    source=_PAPYRUS,
)
@measure(
    "collective/trace_znnl",
    needs=["blocks"],
    convention="ZnNL: trace of the (N C, N C) kernel over N C, not divided in its first versions; "
    "standard error over samples",
    source=_ZNNL,
)
@measure(
    "collective/trace_neural_tangents",
    needs=["blocks"],
    convention="neural-tangents: mean diagonal entry of the (N, N) kernel, itself a mean over "
    "outputs; standard error over samples",
    source=_NEURAL_TANGENTS,
)
def mean_diagonal(blocks: Tensor) -> Value:
    """The mean diagonal entry of the kernel."""
    return Value.mean(_diagonal(blocks).mean(1))


@measure(
    "collective/trace_nngeometry",
    needs=["blocks"],
    convention="nngeometry: trace of the Fisher information for regression, that is of the kernel "
    "over N; standard error over samples",
    source=_NNGEOMETRY,
)
def regression_fisher_trace(blocks: Tensor) -> Value:
    """The trace of the Fisher information, were the outputs means of Gaussians of unit variance."""
    return Value.mean(_diagonal(blocks).sum(1))


@measure(
    "collective/trace_perspic",
    needs=["blocks", "targets"],
    convention="perspic's chi_net: trace of the kernel over the number of target entries, which is "
    "N for classes, N S for S tokens and N C for one-hot classes; standard error over samples",
    source=_PERSPIC,
)
def trace_per_target(blocks: Tensor, targets: Tensor) -> Value:
    """What the network contributes to the squared gradient, for each target."""
    return Value.mean(_diagonal(blocks).sum(1) * (len(blocks) / targets.numel()))


@measure(
    "collective/chi_loss_perspic",
    needs=["scores", "targets"],
    convention="perspic: squared norm of the gradient of the mean loss by all outputs, times the "
    "number of target entries, as in trace_perspic; the mean is over samples, so that for tokens "
    "the losses have to be means over positions",
    source=_PERSPIC,
)
def chi_loss_per_target(scores: Tensor, targets: Tensor) -> Tensor:
    """What the loss contributes to the squared gradient, for each target."""
    return chi_loss(scores) * targets.numel()


# Entropies and eigenvalues ------------------------------------------------------------------------


@measure(
    "collective/entropy_papyrus",
    needs=["eigenvalues"],
    convention="papyrus: nats, eigenvalues of the (N C, N C) kernel, clipped at 1e-14, over sum",
    source=_PAPYRUS,
)
@measure(
    "collective/entropy_znnl",
    needs=["eigenvalues"],
    convention="ZnNL: nats, eigenvalues of the (N C, N C) kernel, clipped at 1e-14, over sum",
    source=_ZNNL,
)
def entropy(eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy of the kernel."""
    return shannon(_clipped(eigenvalues))


@measure(
    "collective/entropy_effective_papyrus",
    needs=["eigenvalues"],
    convention="papyrus, effective=True: entropy_papyrus over ln(N C)",
    source=_PAPYRUS,
)
def entropy_effective(eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy of the kernel in units of its maximum."""
    return entropy(eigenvalues) / math.log(max(len(eigenvalues), 2))


@measure(
    "collective/covariance_entropy_papyrus",
    needs=["cosine_eigenvalues"],
    convention="papyrus, normalize_matrix=True: entropy_papyrus of the kernel of cosines, "
    "Theta_ij / sqrt(Theta_ii Theta_jj), or 0 where that is 0 / 0",
    source=_PAPYRUS,
)
@measure(
    "collective/covariance_entropy_znnl",
    needs=["cosine_eigenvalues"],
    convention="ZnNL: entropy_znnl of the kernel of cosines, Theta_ij / sqrt(Theta_ii Theta_jj), "
    "or 0 where that is 0 / 0",
    source=_ZNNL,
)
def covariance_entropy(cosine_eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy of the directions of the gradients, whatever their norms."""
    return entropy(cosine_eigenvalues)


@measure(
    "collective/eigenvalues_papyrus",
    needs=["eigenvalues"],
    convention="papyrus: of the (N C, N C) kernel, clipped at 1e-14, over their sum, largest first",
    dims=["mode"],
    source=_PAPYRUS,
)
def normalised_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """The kernel's eigenvalues as probabilities."""
    clipped = _clipped(eigenvalues)
    return clipped / clipped.sum()


@measure(
    "collective/eigenvalues_znnl",
    needs=["eigenvalues"],
    convention="ZnNL: of the (N C, N C) kernel, clipped at 1e-14, not divided, smallest first",
    dims=["ascending_mode"],
    source=_ZNNL,
)
def ascending_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """The kernel's eigenvalues, the smallest first."""
    return _clipped(eigenvalues).flip(0)


@measure(
    "collective/gram_neural_tangents",
    needs=["gram"],
    convention="neural-tangents, trace_axes=(-1,): a mean over outputs of the (N, N) kernels",
    dims=["sample", "sample_2"],
    source=_NEURAL_TANGENTS,
)
def mean_gram(gram: Tensor) -> Tensor:
    """The kernel of the samples."""
    return gram.diagonal(dim1=1, dim2=3).mean(-1)


# Magnitudes ---------------------------------------------------------------------------------------


@measure(
    "collective/magnitude_distribution_papyrus",
    needs=["blocks"],
    convention="papyrus: square roots of the kernel's N C diagonal entries, over their sum",
    dims=["row"],
    source=_PAPYRUS,
)
@measure(
    "collective/magnitude_distribution_znnl",
    needs=["blocks"],
    convention="ZnNL's magnitude_ntk: square roots of the kernel's N C diagonal entries, over "
    "their sum",
    dims=["row"],
    source=_ZNNL,
)
def magnitude_distribution(blocks: Tensor) -> Tensor:
    """How the gradients' norms are spread over samples and outputs; rows count n C + c."""
    magnitudes = _magnitudes(blocks)
    return magnitudes / magnitudes.sum()


@measure(
    "collective/self_entropy_papyrus",
    needs=["blocks"],
    convention="papyrus: nats, of magnitude_distribution_papyrus",
    source=_PAPYRUS,
)
@measure(
    "collective/magnitude_entropy_znnl",
    needs=["blocks"],
    convention="ZnNL: nats, of magnitude_distribution_znnl",
    source=_ZNNL,
)
def self_entropy(blocks: Tensor) -> Tensor:
    """The Shannon entropy of the magnitude distribution."""
    return shannon(_magnitudes(blocks))


@measure(
    "collective/magnitude_variance_znnl",
    needs=["blocks"],
    convention="ZnNL: variance, over all N C and not N C - 1, of the square roots of the kernel's "
    "diagonal entries over their mean",
    source=_ZNNL,
)
def magnitude_variance(blocks: Tensor) -> Tensor:
    """How far the gradients' norms differ, relative to their mean."""
    magnitudes = _magnitudes(blocks)
    return (magnitudes / magnitudes.mean()).var(correction=0)


# The loss -----------------------------------------------------------------------------------------


@measure(
    "collective/loss_derivative_papyrus",
    needs=["scores"],
    convention="papyrus: gradient of the mean loss by the outputs",
    dims=["sample", "output"],
    source=_PAPYRUS,
)
@measure(
    "collective/loss_derivative_znnl",
    needs=["scores"],
    convention="ZnNL: gradient of the mean loss by the outputs; its norm in the first versions",
    dims=["sample", "output"],
    source=_ZNNL,
)
def loss_derivative(scores: Tensor) -> Tensor:
    """The derivative of the loss by the network's outputs."""
    return scores.double() / len(scores)


def _diagonal(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).double()


def _magnitudes(blocks: Tensor) -> Tensor:
    return _diagonal(blocks).clamp_min(0).sqrt().flatten()


def _clipped(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.double().clamp_min(_CLIP)
