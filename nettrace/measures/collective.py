"""Collective variables of learning: few numbers that follow the state of a network.

The loss-network-alignment identity of the perspic package: the squared gradient is the product of
what the loss, the network and their alignment contribute,

    |grad L|^2 = g^T Theta g = chi_loss chi_net chi_align,    g the gradient of L by all outputs,

and the spectral position of the loss, the mean of the kernel's eigenvalues, each weighted with the
share of g in its mode: kappa = g^T Theta g / |g|^2. The same quantities under the definitions of
each school are in `schools`.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.measures.registry import measure

_IDENTITY = "Nikolaou et al. 2026, arXiv:2605.31244; perspic"


@measure(
    "collective/chi_loss",
    needs=["scores"],
    convention="squared norm of the gradient of the mean loss by all outputs",
    source=_IDENTITY,
)
def chi_loss(scores: Tensor) -> Tensor:
    """What the loss contributes to the squared gradient."""
    return (scores.double() / len(scores)).square().sum()


@measure(
    "collective/chi_net",
    needs=["blocks"],
    convention="trace of the kernel: sum over samples and outputs",
    source=_IDENTITY,
)
def chi_net(blocks: Tensor) -> Tensor:
    """What the network contributes to the squared gradient."""
    return blocks.diagonal(dim1=1, dim2=2).double().sum()


@measure(
    "collective/chi_align",
    needs=["mean_gradient_sqnorm", "scores", "blocks"],
    convention="squared gradient over chi_loss chi_net, in [0, 1]: spectral position over the "
    "kernel's trace",
    source=_IDENTITY,
)
def chi_align(mean_gradient_sqnorm: Tensor, scores: Tensor, blocks: Tensor) -> Tensor:
    """How far the loss pulls along the kernel's leading modes."""
    return _ratio(mean_gradient_sqnorm, chi_loss(scores) * chi_net(blocks))


@measure(
    "collective/gradient_sqnorm",
    needs=["mean_gradient_sqnorm"],
    convention="squared norm of the gradient of the mean loss; chi_loss chi_net chi_align",
    source=_IDENTITY,
)
def gradient_sqnorm(mean_gradient_sqnorm: Tensor) -> Tensor:
    """The squared gradient, by one backward pass."""
    return mean_gradient_sqnorm


@measure(
    "collective/spectral_position",
    needs=["mean_gradient_sqnorm", "scores"],
    convention="kappa = g^T Theta g / |g|^2, g the gradient of the mean loss by all outputs; "
    "between the kernel's smallest and largest eigenvalue, not divided",
    source=_IDENTITY,
)
def spectral_position(mean_gradient_sqnorm: Tensor, scores: Tensor) -> Tensor:
    """Which eigenvalues drive the loss down: their mean, weighted with the loss gradient."""
    return _ratio(mean_gradient_sqnorm, chi_loss(scores))


@measure(
    "collective/spectral_position_mean",
    needs=["mean_gradient_sqnorm", "scores", "blocks"],
    convention="kappa over the mean of the kernel's N C eigenvalues: 1 on average over directions "
    "of the loss gradient",
    source=_IDENTITY,
)
def spectral_position_mean(mean_gradient_sqnorm: Tensor, scores: Tensor, blocks: Tensor) -> Tensor:
    """The spectral position in units of the mean eigenvalue."""
    return scores.numel() * chi_align(mean_gradient_sqnorm, scores, blocks)


@measure(
    "collective/spectral_position_largest",
    needs=["mean_gradient_sqnorm", "scores", "eigenvalues"],
    convention="kappa over the kernel's largest eigenvalue, in [0, 1]",
    source=_IDENTITY,
)
def spectral_position_largest(
    mean_gradient_sqnorm: Tensor, scores: Tensor, eigenvalues: Tensor
) -> Tensor:
    """The spectral position in units of the largest eigenvalue."""
    return _ratio(mean_gradient_sqnorm, chi_loss(scores) * eigenvalues[0])


def _ratio(mean_gradient_sqnorm: Tensor, factors: Tensor) -> Tensor:
    if not bool(factors > 0):
        raise ValueError("the alignment is not defined: the loss or the network has no gradient")
    return mean_gradient_sqnorm / factors
