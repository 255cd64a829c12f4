"""The landscape along the directions in which weights fluctuate, and how variances follow from it.

Feng and Tu (2021), PNAS 118, e2015617118: the variance of the weights of stochastic gradient
descent is the larger, the narrower the loss is along a direction, sigma_i^2 ~ F_i^-psi, against
what equilibrium at a temperature would give. For a quadratic loss of curvature h ~ F^-2 and noise C
~ h^gamma, theory (`nettrace.stationary`) has

    psi = 2 (gamma - 1)  in a stationary state with independent batches, and
    psi = 2 gamma        where the window, or an epoch dealt out without replacement, is short
                         against the correlation time 1 / (eta h),

so that what is fitted depends on the window. It is fitted over modes 1 to 199; mode 0 is drift.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from nettrace.fluctuations import Halves, Modes
from nettrace.measures.fluctuations import checked
from nettrace.measures.registry import Value, measure
from nettrace.power_law import PowerLaw, power_law
from nettrace.stationary import batch_variance, window_variances
from nettrace.statistics.window import Updating, Widths

_FENG = "Feng and Tu 2021, PNAS 118, e2015617118"
_NOISE = "Zhang, Yang and Tu 2026, arXiv:2602.05600"
_LYAPUNOV = "Liu, Ziyin and Ueda 2021, arXiv:2012.03636; shuffled epochs: arXiv:2306.05300"
_ALONG = "p_i the principal directions of the window, largest variance first, up to 200 of them"
_FITTED = "over modes 1 to 199, mode 0 being drift; standard error of least squares of logarithms"
#: The modes over which exponents are fitted.
_FIRST, _LAST = 1, 199


@measure(
    "weights/flatness",
    needs=["window_widths"],
    convention="F_i = right + left, where the probe's mean loss at the window's mean weights grows "
    f"to e times its value along p_i and -p_i, in float64, to 0.1 %; {_ALONG}; infinite where it "
    "never does, NaN where the loss is not positive",
    dims=["mode"],
    source=_FENG,
    grouped=False,
)
def flatness(window_widths: Widths) -> Value:
    """How wide the landscape is along the directions in which weights fluctuate."""
    found = window_widths
    attributes = {"loss": found.least, "evaluations": found.evaluations}
    return Value(found.right + found.left, attributes=attributes)


@measure(
    "weights/curvature",
    needs=["window_curvatures"],
    convention=f"h_i = p_i^T H p_i, H the Hessian of the mean loss on the probe, {_ALONG}",
    dims=["mode"],
    source=_FENG,
    grouped=False,
)
def curvature(window_curvatures: Tensor) -> Tensor:
    """The curvature of the loss along the directions in which weights fluctuate."""
    return window_curvatures


@measure(
    "weights/gradient_noise",
    needs=["window_noise"],
    convention="C_i, variance over the probe's samples of their loss gradients along p_i, of "
    f"single samples, unbiased, {_ALONG}; standard error over samples",
    dims=["mode"],
    source=_NOISE,
    grouped=False,
)
def gradient_noise(window_noise: Tensor) -> Value:
    """The noise of the gradient along the directions in which weights fluctuate."""
    return _variances(window_noise)


@measure(
    "weights/flatness_exponent",
    needs=["window_modes", "window_widths", "window_halves"],
    convention=f"psi of sigma_i^2 ~ F_i^-psi, {_FITTED}, of this window: it depends on its length",
    source=_FENG,
    grouped=False,
)
def flatness_exponent(window_modes: Modes, window_widths: Widths, window_halves: Halves) -> Value:
    """The exponent of the inverse variance-flatness relation."""
    widths = (window_widths.right + window_widths.left).numpy()
    found = _fitted(widths, window_modes.variances[: len(widths)].numpy())
    attributes = {**_inverted(found), **checked(window_halves)}
    return Value(-found.exponent, found.standard_error, attributes=attributes)


@measure(
    "weights/curvature_exponent",
    needs=["window_modes", "window_curvatures", "window_halves"],
    convention=f"x of sigma_i^2 ~ h_i^x, {_FITTED}, of modes of positive curvature",
    source=_FENG,
    grouped=False,
)
def curvature_exponent(
    window_modes: Modes, window_curvatures: Tensor, window_halves: Halves
) -> Value:
    """How the variance of the weights grows with curvature."""
    h = window_curvatures.numpy()
    found = _fitted(h, window_modes.variances[: len(h)].numpy())
    attributes = {**_attributes(found), **checked(window_halves)}
    return Value(found.exponent, found.standard_error, attributes=attributes)


@measure(
    "weights/noise_exponent",
    needs=["window_noise", "window_curvatures"],
    convention=f"gamma of C_i ~ h_i^gamma, {_FITTED}, of modes of positive curvature",
    source=_NOISE,
    grouped=False,
)
def noise_exponent(window_noise: Tensor, window_curvatures: Tensor) -> Value:
    """How gradient noise grows with curvature: 1 where it is the Fisher and that the Hessian."""
    found = _fitted(window_curvatures.numpy(), window_noise.var(0).numpy())
    return Value(found.exponent, found.standard_error, attributes=_attributes(found))


@measure(
    "weights/noise_to_hessian",
    needs=["window_noise", "window_curvatures"],
    convention=f"sum of C_i over sum of h_i, {_ALONG}; standard error over samples, of the noise",
    source=_NOISE,
    grouped=False,
)
def noise_to_hessian(window_noise: Tensor, window_curvatures: Tensor) -> Value:
    """Gradient noise over curvature, where the weights fluctuate."""
    return _ratio(window_noise, window_curvatures)


@measure(
    "weights/noise_to_fisher",
    needs=["window_noise", "window_fisher"],
    convention="sum of C_i over sum of p_i^T F p_i, F the true Fisher information on the probe, "
    f"{_ALONG}: 1 where the targets are as the network predicts; standard error over samples, of "
    "the noise",
    source="Kunstner, Balles and Hennig 2019, arXiv:1905.12558",
    grouped=False,
)
def noise_to_fisher(window_noise: Tensor, window_fisher: Tensor) -> Value:
    """Gradient noise over Fisher information, where the weights fluctuate."""
    return _ratio(window_noise, window_fisher)


@measure(
    "weights/variance_predicted",
    needs=["window_modes", "window_noise", "window_curvatures", "window_updating"],
    convention="the variance expected of stationary stochastic gradient descent in each mode by "
    "itself, from C_i, h_i, learning rate, momentum and batch size, about the mean of the window "
    "of T snapshots, NaN where descent is not stable, as of negative curvature; batches "
    "independent, or dealt out of shuffled epochs where the window knows the population; "
    "log_correlation and slope of ln sigma_i^2 against its logarithm, of "
    "modes 1 to 199; standard error over samples, of the noise",
    dims=["mode"],
    source=_LYAPUNOV,
    grouped=False,
)
def variance_predicted(
    window_modes: Modes, window_noise: Tensor, window_curvatures: Tensor, window_updating: Updating
) -> Value:
    """The variances that theory expects along the same directions."""
    noise, updating = _variances(window_noise), window_updating
    predicted = _laws(window_curvatures, window_noise, updating)["window"]
    error = predicted * np.asarray(noise.standard_error) / np.asarray(noise.value)
    attributes: dict[str, str | int | float] = {
        "rate": updating.rate,
        "momentum": updating.momentum,
        "batch": updating.batch,
        "sampling": "independent" if updating.epoch is None else f"epochs of {updating.epoch}",
    }
    measured = window_modes.variances[: len(predicted)].numpy()
    u, v = (np.log(one[_FIRST : _LAST + 1]) for one in (predicted, measured))
    kept = np.isfinite(u) & np.isfinite(v)
    if kept.sum() > 2:
        attributes["log_correlation"] = float(np.corrcoef(u[kept], v[kept])[0, 1])
        attributes["slope"] = float(np.polyfit(u[kept], v[kept], 1)[0])
        attributes["median_ratio"] = float(np.exp(np.median(v[kept] - u[kept])))
    return Value(predicted, error, attributes=attributes)


@measure(
    "weights/flatness_exponent_predicted",
    needs=["window_noise", "window_curvatures", "window_updating"],
    convention="psi of weights/variance_predicted ~ F_i^-psi with F_i ~ h_i^-1/2, over modes 1 to "
    "199; attributes: that of a stationary state with independent batches (2 (gamma - 1)), with a "
    "window of T (2 gamma where it is short), with shuffled epochs, and gamma of C_i ~ h_i^gamma",
    source=_LYAPUNOV,
    grouped=False,
)
def flatness_exponent_predicted(
    window_noise: Tensor, window_curvatures: Tensor, window_updating: Updating
) -> Value:
    """What theory expects the exponent of the variance-flatness relation to be, and why."""
    h = window_curvatures.numpy()
    gamma = _fitted(h, window_noise.var(0).numpy())
    laws = _laws(window_curvatures, window_noise, window_updating)
    fits = {name: _fitted(h, variances) for name, variances in laws.items()}
    attributes: dict[str, str | int | float] = {
        "gamma": gamma.exponent,
        "gamma_standard_error": gamma.standard_error,
        "psi_stationary_by_gamma": 2 * (gamma.exponent - 1),
        "psi_short_by_gamma": 2 * gamma.exponent,
        **{f"psi_{name}": 2 * fit.exponent for name, fit in fits.items() if name != "window"},
    }
    found = fits["window"]
    return Value(2 * found.exponent, 2 * found.standard_error, attributes=attributes)


def _laws(curvatures: Tensor, noise: Tensor, updating: Updating) -> dict[str, Any]:
    """Variances expected of each mode: of the window as it is, and of what makes it so."""
    if updating.rule != "SGD" or updating.departs:
        what = f"{updating.rule} with {updating.departs}" if updating.departs else updating.rule
        raise ValueError(
            f"the theory is that of torch.optim.SGD with momentum, weights are updated by {what}"
        )
    if not updating.batch > 0:
        raise ValueError(
            "how many samples an update sees is not known: pass how many were seen so far, as in "
            "tracer(model, step, optimizer, samples=...)"
        )
    h = curvatures.numpy() + updating.decay
    c = batch_variance(noise.var(0).numpy(), updating.batch, updating.population)
    given = (h, c, updating.rate, updating.momentum)
    length, stride, epoch = updating.length, updating.stride, updating.epoch
    found = {
        "window": window_variances(*given, length=length, stride=stride, batches=epoch),
        "stationary": window_variances(*given),
        "short_window": window_variances(*given, length=length, stride=stride),
    }
    if epoch is not None:
        found["epochs"] = window_variances(*given, batches=epoch)
    return found


def _variances(noise: Tensor) -> Value:
    """Unbiased variances of columns, and the standard errors that their fourth moments tell."""
    n = len(noise)
    if n < 2:
        raise ValueError(f"gradient noise takes at least 2 samples, got {n}")
    squares = (noise - noise.mean(0)).square()
    return Value(squares.sum(0) / (n - 1), squares.std(0) / math.sqrt(n))


def _ratio(noise: Tensor, along: Tensor) -> Value:
    squares = (noise - noise.mean(0)).square().sum(1)
    n, total = len(noise), along.sum()
    if n < 2:
        raise ValueError(f"gradient noise takes at least 2 samples, got {n}")
    return Value(squares.sum() / (n - 1) / total, squares.std() / math.sqrt(n) / total.abs())


def _fitted(x: Any, y: Any) -> PowerLaw:
    return power_law(np.asarray(x)[_FIRST : _LAST + 1], np.asarray(y)[_FIRST : _LAST + 1])


def _attributes(found: PowerLaw) -> dict[str, str | int | float]:
    return {**found.attributes(), "first_mode": _FIRST, "last_mode": _LAST}


def _inverted(found: PowerLaw) -> dict[str, str | int | float]:
    """The interval of the negative exponent."""
    return {**_attributes(found), "interval_low": -found.high, "interval_high": -found.low}
