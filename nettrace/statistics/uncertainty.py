"""Statistics of the last layer, and of the uncertainties that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.last_layer import LastLayer, last_layer
from nettrace.likelihood import Categorical, Gaussian
from nettrace.statistics.look import Inapplicable, Look, Unavailable
from nettrace.uncertainty.calibration import Leverages, Rows, calibrated, probit
from nettrace.uncertainty.covariance import Covariance, wide
from nettrace.uncertainty.fitted import with_ones
from nettrace.uncertainty.reading import kind_of, targets_of


@dataclass(frozen=True)
class CrossFitted:
    """Predictions for each sample with what the half of the samples without it tells, in float64.

    Args:
        classes: whether outputs are logits of classes.
        outputs: (N, Q, C) those of each position.
        targets: (N, Q, C), or (N, Q) classes.
        variance: (N, Q, C) of targets about outputs, or of logits.
        plain: (N, 1, C) the mean squared residuals of the other half; zeros of classes.
    """

    classes: bool
    outputs: Tensor
    targets: Tensor
    variance: Tensor
    plain: Tensor

    @property
    def log_probabilities(self) -> Tensor:
        """(N, Q, C) of classes, with their variance taken account of."""
        return probit(self.outputs, self.variance).log_softmax(-1)


class UncertaintyStatistics(Look):
    """The last layer with its features, and predictions with uncertainties across two halves."""

    @cached_property
    def last_layer(self) -> LastLayer:
        """The last linear map, with its features (N, ..., d) and the outputs."""
        # All processes look at all samples, as layers may be called for some of them alone.
        with torch.no_grad():
            return last_layer(self._model, self._probe)

    @cached_property
    def cross_fitted(self) -> CrossFitted:
        """Variances for each sample, from covariance, alpha and ridge of the half without it."""
        likelihood = self.likelihood
        if not isinstance(likelihood, (Categorical, Gaussian)):
            raise Inapplicable("last-layer uncertainties are of numbers and of classes")
        layer = self.last_layer
        targets = targets_of(layer, self.targets, kind_of(layer, self.targets, likelihood))
        classes = isinstance(likelihood, Categorical)
        if classes and bool((targets < 0).any()):
            raise ValueError(f"expected a class at each position, got some of {int(targets.min())}")
        n, c = self.samples, len(layer.weight)
        if n < 4:
            raise Unavailable(
                f"two halves, to fit and to judge by, take a probe of at least 4 samples, got {n}"
            )
        features = wide(with_ones(layer)).reshape(n, -1, with_ones(layer).shape[-1])
        outputs = wide(layer.by_position(layer.outputs)).reshape(n, -1, c)
        targets = targets.reshape(n, -1) if classes else wide(targets).reshape(n, -1, c)
        order = torch.randperm(n, generator=generator(self._seed, "cross_fitted"))
        halves = order[: n // 2].sort().values, order[n // 2 :].sort().values
        variance, plain = torch.zeros_like(outputs), outputs.new_zeros(n, 1, c)
        for fitted, judged in (halves, halves[::-1]):
            rows = Rows(*(t[fitted].flatten(0, 1) for t in (features, outputs, targets)))
            covariance = Covariance.of(rows.features)
            leverages = Leverages(covariance, rows.features, left_out=True)
            found = calibrated(rows, leverages, classes=classes)
            u = Leverages(covariance, features[judged].flatten(0, 1))(found.ridge)
            one = u[:, None] * found.alpha.square()
            variance[judged] = one.reshape(len(judged), -1, c)
            if not classes:
                plain[judged] = (rows.outputs - rows.targets).square().mean(0)
        return CrossFitted(classes, outputs, targets, variance, plain)
