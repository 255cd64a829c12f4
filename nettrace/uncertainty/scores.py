"""How good predicted uncertainties are: likelihood, calibration and sharpness."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Bins of confidence, and levels of coverage.
BINS = 15


def gaussian_losses(residuals: Tensor, variance: Tensor) -> Tensor:
    """(..., C) negative log densities of normal residuals, in nats."""
    return ((2 * math.pi * variance).log() + residuals.square() / variance) / 2


def categorical_losses(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """(R,) negative logarithms of the probabilities (R, C) of classes (R,), in nats."""
    return F.nll_loss(log_probabilities, classes, reduction="none")


def coverage(residuals: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(15,) levels, and how often targets lie below the quantile that is predicted for each.

    Kuleshov, Fenner and Ermon 2018, arXiv:1807.00263.

    Args:
        residuals: targets less means.
        variance: predicted, of the same shape.
    """
    levels = torch.arange(1, BINS + 1, dtype=torch.float64) / (BINS + 1)
    reached = torch.special.ndtr((residuals / variance.sqrt()).double().flatten()).cpu()
    return levels, (reached[:, None] <= levels).double().mean(0)


def reliability(probabilities: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean confidences in 15 groups of equal size, and accuracies; B < 15 of fewer samples.

    Args:
        probabilities: (R, C).
        classes: (R,).
    """
    confidence, right = _confidence(probabilities, classes)
    order = confidence.argsort(stable=True)
    groups = order.tensor_split(min(BINS, len(order)))
    means = [
        torch.stack([values[group].mean() for group in groups]) for values in (confidence, right)
    ]
    return means[0], means[1]


def expected_calibration_error(probabilities: Tensor, classes: Tensor) -> Tensor:
    """The mean of |accuracy - confidence| over 15 bins of equal width, weighted by their samples.

    Guo, Pleiss, Sun and Weinberger 2017, arXiv:1706.04599, equation 3.

    Args:
        probabilities: (R, C).
        classes: (R,).
    """
    confidence, right = _confidence(probabilities, classes)
    which = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    off = torch.zeros(BINS, dtype=torch.float64).index_add(0, which, right - confidence)
    return off.abs().sum() / len(confidence)


def _confidence(probabilities: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) the largest probability, and whether that is the class."""
    confidence, chosen = probabilities.double().cpu().max(1)
    return confidence, (chosen == classes.cpu()).double()
