"""The two numbers that make variances of leverages: alpha and the ridge, by the authors' rules.

The variance of a prediction is alpha^2 u, u = f^T (F^T F + ridge^2)^-1 f. The ridge is searched for
on the authors' grid of quarter decades, over ten of them, and then on finer ones; what alpha it
goes with is known in closed form for regression. Their grid is of absolute numbers; ours is in
units of the root of the mean eigenvalue of F^T F, so that features may be of any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from nettrace.uncertainty.covariance import Covariance, wide

Objective: TypeAlias = Literal["nll", "ssl"]
K = TypeVar("K")

#: log10 of the ridge in units of `Covariance.scale`, and of the mean variance of logits.
_RIDGES = [-5 + step / 4 for step in range(40)]
_VARIANCES = [-4 + step / 2 for step in range(17)]
#: Decades of the finer grids, each around the best of the one before.
_FINER = (0.025, 0.0025)
#: Samples in a bin of the sum of squared logarithms.
BIN = 100
#: Numbers of logits for which all pairs of ridge and alpha are tried, and of the search after it.
_COARSE, _MOST = 2**18, 2**22


@dataclass(frozen=True)
class Rows:
    """What is known of the positions that variances are calibrated on.

    Args:
        features: (R, D), with 1 appended where there is a bias.
        outputs: (R, C).
        targets: (R, C) numbers, or (R,) classes.
    """

    features: Tensor
    outputs: Tensor
    targets: Tensor

    def every(self, step: int) -> Rows:
        """Each so many of them."""
        return Rows(self.features[::step], self.outputs[::step], self.targets[::step])

    def where(self, chosen: Tensor) -> Rows:
        """Those that are chosen (R,)."""
        return Rows(self.features[chosen], self.outputs[chosen], self.targets[chosen])


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Args:
        ridge: in units of the features times the root of their number.
        alpha: (C,), one for each output of a regression, or the same for all classes.
        doubts: what to bear in mind.
    """

    ridge: float
    alpha: Tensor
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leverages:
    """u of some features, for any ridge.

    Args:
        covariance: F^T F.
        features: (R, D).
        left_out: whether these features are among those of F, each to be left out in turn.
    """

    covariance: Covariance
    features: Tensor
    left_out: bool = False

    @cached_property
    def _squares(self) -> Tensor:
        return (wide(self.features) @ self.covariance.spectrum[1]).square()

    def __call__(self, ridge: float) -> Tensor:
        """(R,) u, above zero also where features are zero: at least 1e-12 of the mean.

        Without a sample n, u of it is u / (1 - u).
        """
        u = self._squares @ (self.covariance.spectrum[0] + ridge**2).reciprocal()
        u = u / (1 - u).clamp_min(1e-12) if self.left_out else u
        return u.clamp_min(max(1e-12 * float(u.mean()), 1e-300))


def calibrated(
    rows: Rows,
    leverages: Leverages,
    *,
    classes: bool,
    ridge: float | None = None,
    alpha: Tensor | None = None,
    objective: Objective = "nll",
) -> Calibrated:
    """Alpha and the ridge, as far as they are not given.

    Regression: the negative log-likelihood of a Gaussian, at alpha_c^2 = mean(r_c^2 / u), or the
    sum over bins of 100 samples, sorted by u, of log(mean squared error / mean variance)^2.
    Classification: that of the probit approximation, softmax(z / sqrt(1 + pi/8 variance)).

    Args:
        rows: the positions.
        leverages: of their features.
        classes: whether outputs are logits of classes.
        ridge: to be kept.
        alpha: (C,) to be kept.
        objective: "nll" or, for regression, "ssl".

    Raises:
        ValueError: if there are too few samples, or all are of one class.
    """
    if classes:
        return _of_classes(rows, leverages, ridge, alpha)
    residuals = wide(rows.outputs) - wide(rows.targets)
    if objective == "ssl" and len(residuals) < 2 * BIN:
        raise ValueError(
            f"the objective 'ssl' takes bins of {BIN} samples, and two of them at least, got "
            f"{len(residuals)} samples: pass objective='nll'"
        )
    found = _squared_logarithms if objective == "ssl" else _of_gaussian
    scale = leverages.covariance.scale

    def at(exponent: float) -> float:
        return found(residuals.square(), leverages(scale * 10**exponent), alpha)[0]

    exponents = _RIDGES if ridge is None else []
    best = _least(at, exponents) if exponents else math.nan
    chosen = scale * 10**best if ridge is None else ridge
    squares = found(residuals.square(), leverages(chosen), alpha)[1]
    doubts = list(_at_the_end(best))
    if alpha is None and bool((residuals.square().sum(0) == 0).any()):
        doubts.append("some outputs have no residuals at all: their variances are next to zero")
    return Calibrated(chosen, squares.sqrt(), tuple(doubts))


def probit(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits whose softmax is about the mean softmax of logits of some variance (..., 1).

    MacKay 1992, The evidence framework applied to classification networks; for several classes as
    in Daxberger et al. 2021, arXiv:2106.14806.
    """
    return logits * (1 + math.pi / 8 * variance).rsqrt()


def _of_gaussian(squares: Tensor, u: Tensor, alpha: Tensor | None) -> tuple[float, Tensor]:
    """The mean negative log-likelihood, summed over outputs, and alpha^2."""
    found = (squares / u[:, None]).mean(0) if alpha is None else alpha.square()
    found = found.clamp_min(torch.finfo(found.dtype).tiny ** 0.5)
    variance = found * u[:, None]
    losses = (2 * math.pi * variance).log() + squares / variance
    return float(losses.sum(1).mean()) / 2, found


def _squared_logarithms(squares: Tensor, u: Tensor, alpha: Tensor | None) -> tuple[float, Tensor]:
    order = u.argsort(stable=True)
    bins = len(u) // BIN
    cut = [BIN] * (bins - 1) + [len(u) - BIN * (bins - 1)]  # the rest goes to the last
    actual = torch.stack([part.mean(0) for part in squares[order].split(cut)])
    expected = torch.stack([part.mean() for part in u[order].split(cut)])
    least = torch.finfo(actual.dtype).tiny ** 0.5
    off = actual.clamp_min(least).log() - expected.log()[:, None]
    found = off.mean(0).exp() if alpha is None else alpha.square()
    return float((off - found.log()).square().sum()), found


def _of_classes(
    rows: Rows, leverages: Leverages, ridge: float | None, alpha: Tensor | None
) -> Calibrated:
    classes = rows.outputs.shape[1]
    if (alpha is None or ridge is None) and len(rows.targets.unique()) < 2:
        raise ValueError(
            f"all {len(rows.targets)} samples to calibrate on are of class "
            f"{int(rows.targets[0])}: their likelihood does not tell how sure to be; pass "
            "calibration= with samples of several classes, or alpha= and ridge="
        )
    scale = leverages.covariance.scale

    def nll(part: Rows, of: Leverages) -> Callable[[float, float], float]:
        logits, targets = wide(part.outputs), part.targets[:, None]
        of(scale)  # which projects the features, once

        def at(exponent: float, spread: float) -> float:
            u = of(scale * 10**exponent if ridge is None else ridge)
            squared = 10**spread / u.mean() if alpha is None else alpha[0] ** 2
            scores = probit(logits, (squared * u)[:, None])
            return float((scores.logsumexp(1) - scores.gather(1, targets)[:, 0]).mean())

        return at

    def fewer(numbers: int) -> tuple[Rows, Leverages]:
        step = -(-rows.outputs.numel() // numbers)
        part = rows.every(step)
        return part, Leverages(leverages.covariance, part.features, leverages.left_out)

    at = nll(*fewer(_COARSE))
    spreads = _VARIANCES if alpha is None else [0.0]
    exponents = _RIDGES if ridge is None else [0.0]
    table = {(e, s): at(e, s) for e in exponents for s in spreads}
    best, spread = _last_of_least(table)
    at = nll(*fewer(_MOST))
    for _ in range(2):
        if alpha is None:
            spread = _least(partial(at, best), [spread])
        if ridge is None:
            best = _least(partial(_turned, at, spread), [best])
    chosen = scale * 10**best if ridge is None else ridge
    doubts = list(_at_the_end(best)) if ridge is None else []
    if alpha is None:
        alpha = (10**spread / leverages(chosen).mean()).sqrt()
        if spread <= _VARIANCES[0] + 0.25:
            doubts.append(
                "the samples to calibrate on are likeliest without any variance of logits: "
                "probabilities are those of a plain softmax"
            )
    return Calibrated(chosen, wide(alpha).reshape(-1).expand(classes).clone(), tuple(doubts))


def _turned(at: Callable[[float, float], float], spread: float, exponent: float) -> float:
    return at(exponent, spread)


def _least(at: Callable[[float], float], grid: Sequence[float]) -> float:
    """Where a function is least: on a grid, and then on finer ones around the best."""
    best = _last_of_least({x: at(x) for x in grid}) if len(grid) > 1 else grid[0]
    for step in _FINER:
        best = _last_of_least({best + k * step: at(best + k * step) for k in range(-9, 10)})
    return best


def _last_of_least(values: dict[K, float]) -> K:
    """The last of the keys whose values are least, to rounding, so that ties are told apart."""
    least = min(values.values())
    close = 1e-12 * max(1.0, abs(least))
    return [key for key, value in values.items() if value <= least + close][-1]


def _at_the_end(exponent: float) -> tuple[str, ...]:
    if _RIDGES[0] < exponent < _RIDGES[-1]:
        return ()
    if math.isnan(exponent):
        return ()
    which = "least" if exponent <= _RIDGES[0] else "largest"
    return (f"the ridge is the {which} that was tried: the samples do not tell it",)
