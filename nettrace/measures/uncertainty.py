"""How well last-layer uncertainties describe a network's errors, over training.

On the probe's samples: the covariance of features, alpha and the ridge are of one half, as
`nettrace.uncertainty.fit` finds them without further samples, and variances are judged on the other
half, and the other way round. On a probe of samples that the network was trained on, errors are
smaller than those of new ones, here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.measures.registry import Value, measure
from nettrace.statistics.uncertainty import CrossFitted
from nettrace.uncertainty.scores import (
    categorical_losses,
    coverage,
    expected_calibration_error,
    gaussian_losses,
    reliability,
)

_LLPR = "Bigi, Chong, Ceriotti and Grasselli 2024, arXiv:2403.02251"
_HALVES = "variances of one half of the samples' features and errors, judged on the other"


@measure(
    "uncertainty/nll",
    needs=["cross_fitted"],
    convention="-log p(y), with all constants, summed over positions and outputs, mean over "
    f"samples; {_HALVES}",
    source=_LLPR,
)
def nll(found: CrossFitted) -> Value:
    """The negative log-likelihood of targets under last-layer uncertainties, in nats."""
    if found.classes:
        return Value.mean(_of_classes(found, found.log_probabilities))
    residuals = found.targets - found.outputs
    return Value.mean(gaussian_losses(residuals, found.variance).sum((1, 2)))


@measure(
    "uncertainty/nll_plain",
    needs=["cross_fitted"],
    convention="-log p(y) of normal targets whose variance is the other half's mean squared error "
    "of an output, or of a plain softmax; summed over positions and outputs, mean over samples",
    source=_LLPR,
)
def nll_plain(found: CrossFitted) -> Value:
    """That of a constant variance, or a plain softmax, above which there is no gain."""
    if found.classes:
        return Value.mean(_of_classes(found, found.outputs.log_softmax(-1)))
    residuals = found.targets - found.outputs
    plain = found.plain.clamp_min(torch.finfo(found.plain.dtype).tiny ** 0.5)
    return Value.mean(gaussian_losses(residuals, plain.expand_as(residuals)).sum((1, 2)))


@measure(
    "uncertainty/ece",
    needs=["cross_fitted"],
    convention="of classes: |accuracy - mean confidence|, weighted over 15 bins of equal width; of "
    f"numbers: mean |observed - nominal| share below 15 predicted quantiles; {_HALVES}",
    source="Guo et al. 2017, arXiv:1706.04599, equation 3; Kuleshov et al. 2018, arXiv:1807.00263",
)
def ece(found: CrossFitted) -> Value:
    """The expected calibration error of last-layer uncertainties."""
    if found.classes:
        return Value(expected_calibration_error(*_probabilities(found)))
    nominal, observed = coverage(found.targets - found.outputs, found.variance)
    return Value((observed - nominal).abs().mean())


@measure(
    "uncertainty/sharpness",
    needs=["cross_fitted"],
    convention="mean predicted standard deviation over samples, positions and outputs, or mean "
    f"largest probability of classes; {_HALVES}",
    source="Kuleshov et al. 2018, arXiv:1807.00263, with deviations for variances",
)
def sharpness(found: CrossFitted) -> Value:
    """How narrow the predictions are, of numbers, or how confident, of classes."""
    if found.classes:
        return Value.mean(found.log_probabilities.amax(-1).exp().mean(1))
    return Value.mean(found.variance.sqrt().mean((1, 2)))


@measure(
    "uncertainty/calibration",
    needs=["cross_fitted"],
    convention="of numbers: 15 quantiles, and the share of targets below; of classes: mean "
    f"confidence and accuracy in 15 groups of equal size, by confidence; {_HALVES}",
    dims=["curve", "bin"],
    source="Kuleshov et al. 2018, arXiv:1807.00263; DeGroot and Fienberg 1983",
)
def calibration(found: CrossFitted) -> Value:
    """The calibration curve: what is predicted, and what is observed."""
    if found.classes:
        curve = reliability(*_probabilities(found))
    else:
        curve = coverage(found.targets - found.outputs, found.variance)
    return Value(torch.stack(curve), coordinates={"curve": ["predicted", "observed"]})


@measure(
    "uncertainty/variance",
    needs=["cross_fitted"],
    convention="alpha^2 f^T (F^T F + ridge^2)^-1 f, mean over positions and outputs; of logits "
    "where these are classes; F of the half without the sample",
    dims=["sample"],
    source=_LLPR,
    grouped=False,
)
def variance(found: CrossFitted) -> Value:
    """The variance of each sample's prediction."""
    return Value(found.variance.mean((1, 2)))


def _of_classes(found: CrossFitted, log_probabilities: Tensor) -> Tensor:
    losses = categorical_losses(log_probabilities.flatten(0, 1), found.targets.flatten())
    return losses.reshape(len(found.outputs), -1).sum(1)


def _probabilities(found: CrossFitted) -> tuple[Tensor, Tensor]:
    return found.log_probabilities.exp().flatten(0, 1), found.targets.flatten()
