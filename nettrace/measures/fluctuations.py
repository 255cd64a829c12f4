"""How weights fluctuate over a window of updates, and how far they come.

The window is a `nettrace.window.WeightWindow`, of T snapshots, fed after every update. Variances
and principal directions: Feng and Tu (2021), PNAS 118, e2015617118. That principal components of a
window which is short against the correlation times are those of a random walk, whatever the
landscape, is what `weights/equilibration` looks for: Antognini and Sohl-Dickstein (2018),
arXiv:1806.08805.
"""

from __future__ import annotations

import math

import torch

from nettrace.diffusion import Displacements
from nettrace.fluctuations import (
    Halves,
    Modes,
    correlation_times,
    layer_correlations,
    stationarity,
    variance_errors,
)
from nettrace.heavy_tails import update_tail_index
from nettrace.measures.registry import Value, measure
from nettrace.operator import PerLayer
from nettrace.statistics import Inapplicable
from nettrace.statistics.window import Updating
from nettrace.window import WeightWindow

_FENG = "Feng and Tu 2021, PNAS 118, e2015617118"
_MODES = "along the principal directions of the window, largest variance first"
_ABOUT = "about the mean of the window, over T"
_DIFFUSION = "Kunin et al. 2021, arXiv:2107.09133"
#: The 97.5 % quantile of Student's t for the eight blocks of a jackknife.
_STUDENT = 2.365
#: `weights/equilibration` below which the window is said not to be equilibrated.
EQUILIBRATED = 0.7
_OWN = (
    "variances along the principal directions of one half follow those of the other with the slope "
    "{:.2g} rather than 1. It is short against the correlation times, or has few snapshots for its "
    "many weights: principal components of a random walk have variances that fall as 1 / k^2, "
    "whatever the landscape. Take a longer window, or read exponents as those of this one"
)
_DRIFTS = (
    "the weights drift, the means of its halves being {:.2g} times the squared spread within them "
    "apart. Wait until the loss has settled, or take the first modes for the drift"
)


@measure(
    "weights/variance",
    needs=["window_modes"],
    convention=f"sigma_i^2, eigenvalues of the covariance of the weights over time, {_ABOUT}, "
    "largest first, those above rounding; standard error by Bartlett's formula from each mode's "
    "autocorrelations, infinite where the window does not resolve its correlation time",
    dims=["mode"],
    source=_FENG,
    grouped=False,
)
def variance(window_modes: Modes) -> Value:
    """The variances of the weights along the principal directions of their fluctuations."""
    return Value(window_modes.variances, variance_errors(window_modes.coordinates))


@measure(
    "weights/correlation_time",
    needs=["window_modes", "window"],
    convention=f"in updates, {_MODES}: 1/2 + sum of autocorrelations, by Sokal's window of 5 of "
    "it; standard error by Madras and Sokal, infinite where the window is shorter than 50 of it, "
    "where the value is a lower bound at best",
    dims=["mode"],
    source="Sokal 1997, Monte Carlo methods in statistical mechanics, section 3",
    grouped=False,
)
def correlation_time(window_modes: Modes, window: WeightWindow) -> Value:
    """For how many updates the weights remember where they were."""
    times, errors = correlation_times(window_modes.coordinates)
    resolved = int(errors.isfinite().sum())
    attributes: dict[str, str | int | float] = {"resolved_modes": resolved}
    return Value(window.stride * times, window.stride * errors, attributes=attributes)


@measure(
    "weights/equilibration",
    needs=["window_halves"],
    convention="slope of ln variances that one half of the window has along the principal "
    "directions of the other, modes 1 to 199, against ln of the other's own, mean of both ways: 1 "
    "where variances are those of the landscape, 0 where what makes some larger is the window, as "
    "of a random walk; half_kept is their ratio, geometric mean over up to 10 leading modes, "
    "half_shift the squared distance between the halves' means over the variance within them, 4 "
    "for a random walk",
    source="Antognini and Sohl-Dickstein 2018, arXiv:1806.08805",
    grouped=False,
)
def equilibration(window_halves: Halves) -> Value:
    """Whether the window is long enough to tell physics from a random walk."""
    return Value(window_halves.slope, attributes=checked(window_halves))


def checked(found: Halves) -> dict[str, str | int | float]:
    """What to note of a window beside what rests on it, with a warning where need be."""
    notes: dict[str, str | int | float] = {
        "equilibration": found.slope,
        "half_kept": found.kept,
        "half_shift": found.shift,
    }
    own, drifts = found.slope < EQUILIBRATED, found.shift > 1
    if own or drifts:
        notes["warning"] = "the window is not equilibrated: " + "; ".join(
            own * [_OWN.format(found.slope)] + drifts * [_DRIFTS.format(found.shift)]
        )
    return notes


@measure(
    "weights/variation",
    needs=["window", "window_size_error"],
    convention=f"sum over weights of their variances {_ABOUT}; of moments, since the window began",
    source=_FENG,
    grouped=False,
)
def variation(window: WeightWindow, window_size_error: float) -> Value:
    """The total variation of the weights within the window."""
    attributes: dict[str, str | int | float] = {
        "kept": str(window.kind),
        "snapshots": window.count,
        "sketch_error": window_size_error,
    }
    return Value(torch.stack(list(window.variations().values())).sum(), attributes=attributes)


@measure(
    "weights/variation_per_layer",
    needs=["window"],
    convention=f"sum over each parameter's weights of their variances {_ABOUT}; of moments, since "
    "the window began",
    dims=["layer"],
    source=_FENG,
    grouped=False,
)
def variation_per_layer(window: WeightWindow) -> Value:
    """Each parameter's share of the total variation."""
    found = window.variations()
    return Value(torch.stack(list(found.values())), coordinates={"layer": list(found)})


@measure(
    "weights/drift",
    needs=["window"],
    convention="|theta_T - theta_1| from the first snapshot of the window to its last; of moments, "
    "since the window began",
    source=_DIFFUSION,
    grouped=False,
)
def drift(window: WeightWindow) -> float:
    """How far the weights have come in the window."""
    return window.displacement()


@measure(
    "weights/layer_correlations",
    needs=["window_factors"],
    convention="|Sigma_lm| / sqrt(|Sigma_ll| |Sigma_mm|), Frobenius norms of the blocks of the "
    "covariance between parameters, from 0 to 1; of T snapshots that are independent about "
    "sqrt(rank / T); NaN where a parameter is still",
    dims=["layer", "other_layer"],
    source="Gross et al. 2023, arXiv:2311.14120",
    grouped=False,
)
def correlations_between_layers(window_factors: PerLayer) -> Value:
    """How much the fluctuations of each two parameters have to do with each other."""
    names = list(window_factors)
    found = layer_correlations(window_factors.values())
    return Value(found, coordinates={"layer": names, "other_layer": names})


@measure(
    "weights/temperature",
    needs=["window_updating"],
    convention="eta / B, learning rate over samples in an update; the attribute with_momentum is "
    "eta / (B (1 - mu))",
    source="Mandt, Hoffman and Blei 2017, arXiv:1704.04289; Jastrzebski et al. 2017, "
    "arXiv:1711.04623",
    grouped=False,
)
def temperature(window_updating: Updating) -> Value:
    """The temperature of stochastic gradient descent."""
    found = window_updating
    if not found.batch > 0:
        raise ValueError(
            "how many samples an update sees is not known: pass how many were seen so far, as in "
            "tracer(model, step, optimizer, samples=...)"
        )
    value = found.rate / found.batch
    attributes: dict[str, str | int | float] = {
        "with_momentum": value / (1 - found.momentum),
        "rate": found.rate,
        "momentum": found.momentum,
        "batch": found.batch,
    }
    return Value(value, attributes=attributes)


@measure(
    "weights/stationarity",
    needs=["window_modes"],
    convention="-2 <theta . dtheta> / <|dtheta|^2> with theta about the mean of the window and "
    "dtheta the next step: 1 where the weights are stationary, less while they spread; it does "
    "not see a random walk; standard error as if snapshots were independent",
    source="Yaida 2018, arXiv:1810.00004, the first fluctuation-dissipation relation",
    grouped=False,
)
def yaida(window_modes: Modes) -> Value:
    """Whether fluctuation and dissipation balance."""
    return Value(*stationarity(window_modes.coordinates))


@measure(
    "weights/mean_squared_displacement",
    needs=["window_displacements", "window"],
    convention="|theta(t + lag) - theta(t)|^2, mean over start times t in the window, lags in "
    "updates; standard error by leaving out blocks of start times",
    dims=["lag"],
    source=_DIFFUSION,
    grouped=False,
)
def mean_squared_displacement(window_displacements: Displacements, window: WeightWindow) -> Value:
    """How far the weights come in a time."""
    found = window_displacements
    return Value(found.means, found.errors, coordinates=_lags(found, window))


@measure(
    "weights/diffusion_exponent",
    needs=["window_displacements"],
    convention="slope of ln weights/mean_squared_displacement against ln lag: 1 for diffusion, 2 "
    "for a drift, 0 where weights are confined; standard error by leaving out blocks of starts",
    source=_DIFFUSION,
    grouped=False,
)
def diffusion_exponent(window_displacements: Displacements) -> Value:
    """The power of time with which squared displacements grow."""
    found = window_displacements
    half = _STUDENT * found.exponent_error
    attributes: dict[str, str | int | float] = {
        "interval_low": found.exponent - half,
        "interval_high": found.exponent + half,
        "lags": len(found.lags),
    }
    return Value(found.exponent, found.exponent_error, attributes=attributes)


@measure(
    "weights/ageing",
    needs=["window_displacements", "window"],
    convention="mean squared displacement from the last third of start times over that from the "
    "first third, lags in updates: 1 where it does not matter when one starts",
    dims=["lag"],
    source="Bouchaud 1992, Weak ergodicity breaking and aging in disordered systems",
    grouped=False,
)
def ageing(window_displacements: Displacements, window: WeightWindow) -> Value:
    """Whether the weights move the less the longer they have moved."""
    found = window_displacements
    return Value(found.ageing, coordinates=_lags(found, window))


def _lags(found: Displacements, window: WeightWindow) -> dict[str, list[str]]:
    return {"lag": [str(int(lag) * window.stride) for lag in found.lags]}


@measure(
    "weights/tail_index",
    needs=["window"],
    convention="index alpha of a stable law for the entries of single updates, each less its mean "
    "over the window and over its root mean square there, with random signs: 2 for light tails; "
    "the inverse is averaged over updates; standard error over blocks of them",
    source="Mohammadi et al. 2015, Metrika 78, 549, corollary 2.4; Simsekli et al. 2019, "
    "arXiv:1901.06053",
    grouped=False,
)
def tail_index(window: WeightWindow) -> Value:
    """How heavy the tails of the updates are: smaller is heavier."""
    if window.kind != "snapshots":
        raise ValueError(f"expected snapshots for the tails of single entries, got {window.kind}")
    if window.size < 64:
        raise Inapplicable(f"a tail index takes at least 64 weights, got {window.size}")
    rows = torch.cat([window.rows(name) for name in window.names], 1)
    index, error, updates = update_tail_index(rows, window.seed)
    return Value(index, error, attributes={"updates": updates})


@measure(
    "weights/update_ratio",
    needs=["window", "weights"],
    convention="root mean square over the window of |theta_l(t + 1) - theta_l(t)|, over |theta_l| "
    "now, by parameter; infinite where theta_l = 0 moved",
    dims=["layer"],
    source="You, Gitman and Ginsburg 2017, arXiv:1708.03888",
    grouped=False,
)
def update_ratio(window: WeightWindow, weights: PerLayer) -> Value:
    """How large updates are against the weights that they update."""
    if window.kind == "moments":
        raise ValueError("expected snapshots or a sketch, got moments: they keep no updates")
    found = []
    for name in window.names:
        moved = window.rows(name).double().diff(dim=0).square().sum(1).mean().sqrt().cpu()
        norm = float(torch.linalg.vector_norm(weights[name]))
        found.append(float(moved) / norm if norm else math.inf if moved else 0.0)
    return Value(torch.tensor(found).double(), coordinates={"layer": window.names})
