"""Collective variables of learning: few numbers that follow the state of a network.

The kernel's variables under the definitions of the papyrus package (Tovey et al., ZnNL and papyrus,
arXiv:2305.00995, arXiv:2410.07451), and the loss-network-alignment identity of the perspic package:
the squared gradient is the product of what the loss, the network and their alignment contribute.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.measures.registry import measure
from nettrace.measures.spectrum import shannon

_PAPYRUS = "Tovey et al. 2024, arXiv:2410.07451; papyrus"
_IDENTITY = "Nikolaou et al. 2026, arXiv:2605.31244; perspic"
_CLIP = 1e-14  # papyrus clips eigenvalues here before it normalises them


@measure(
    "collective/trace",
    needs=["blocks"],
    convention="papyrus: trace of the (N C, N C) kernel over N C",
    source=_PAPYRUS,
)
def trace(blocks: Tensor) -> Tensor:
    """The mean diagonal entry of the kernel."""
    return blocks.diagonal(dim1=1, dim2=2).double().mean()


@measure(
    "collective/entropy",
    needs=["eigenvalues"],
    convention="papyrus: nats, eigenvalues of the (N C, N C) kernel, clipped at 1e-14, over sum",
    source=_PAPYRUS,
)
def entropy(eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy of the kernel."""
    p = eigenvalues.double().clamp_min(_CLIP)
    p = p / p.sum()
    return -(p * p.log()).sum()


@measure(
    "collective/self_entropy",
    needs=["blocks"],
    convention="papyrus: nats, of the magnitude distribution",
    source=_PAPYRUS,
)
def self_entropy(blocks: Tensor) -> Tensor:
    """The Shannon entropy of the magnitude distribution."""
    return shannon(_magnitudes(blocks))


@measure(
    "collective/magnitude_distribution",
    needs=["blocks"],
    convention="papyrus: square roots of the kernel's N C diagonal entries, over their sum",
    dims=["row"],
    source=_PAPYRUS,
)
def magnitude_distribution(blocks: Tensor) -> Tensor:
    """How the gradients' norms are spread over samples and outputs; rows count n C + c."""
    magnitudes = _magnitudes(blocks)
    return magnitudes / magnitudes.sum()


def _magnitudes(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).double().clamp_min(0).sqrt().flatten()


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
    convention="squared gradient over chi_loss chi_net, in [0, 1]",
    source=_IDENTITY,
)
def chi_align(mean_gradient_sqnorm: Tensor, scores: Tensor, blocks: Tensor) -> Tensor:
    """How far the loss pulls along the kernel's leading modes."""
    factors = chi_loss(scores) * chi_net(blocks)
    if not bool(factors > 0):
        raise ValueError("the alignment is not defined: the loss or the network has no gradient")
    return mean_gradient_sqnorm / factors


@measure(
    "collective/gradient_sqnorm",
    needs=["mean_gradient_sqnorm"],
    convention="squared norm of the gradient of the mean loss; chi_loss chi_net chi_align",
    source=_IDENTITY,
)
def gradient_sqnorm(mean_gradient_sqnorm: Tensor) -> Tensor:
    """The squared gradient, by one backward pass."""
    return mean_gradient_sqnorm
