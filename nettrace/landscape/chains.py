"""What chains tell of a mean: its error, and whether they may be trusted; by arviz."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

#: Above which R-hat, below which effective samples, chains are said not to have mixed.
_R_HAT, _EFFECTIVE = 1.1, 100
#: Standard errors by which the halves of chains may differ.
_DRIFT = 4.0
#: Draws a chain that arviz needs.
_LEAST = 4


@dataclass(frozen=True)
class Chains:
    """The mean of a quantity along chains.

    Args:
        mean: over chains and draws.
        standard_error: of it, with the correlation along chains and the spread between them.
        r_hat: split and rank-normalised (Vehtari et al. 2021, Bayesian Analysis 16, 667); NaN for
            one chain.
        effective: bulk effective sample size (ibidem).
        doubts: a sentence each.
    """

    mean: float
    standard_error: float
    r_hat: float
    effective: float
    doubts: tuple[str, ...]

    @classmethod
    def of(cls, draws: npt.NDArray[np.float64]) -> Chains:
        """What chains tell of the mean of draws (chains, draws)."""
        chains, length = draws.shape
        if length < _LEAST or not chains:
            said = f"{length} draws of {chains} chains tell no error"
            return cls(_mean(draws), np.nan, np.nan, np.nan, (said,))
        mean, error = mean_and_error(draws)
        r_hat = _told("rhat", draws, "rank") if chains > 1 else np.nan
        effective = _told("ess", draws, "bulk")
        doubts = []
        if chains == 1:
            doubts.append("one chain does not show whether it depends on where it began: take more")
        if r_hat > _R_HAT:
            doubts.append(f"chains disagree, R-hat is {r_hat:.3f}: take more draws= or spacing=")
        if effective < _EFFECTIVE:
            doubts.append(
                f"losses along the chains are worth {effective:.0f} independent ones: take more "
                "draws= or spacing="
            )
        half = length // 2
        if half >= _LEAST:
            (first, one), (second, other) = map(mean_and_error, (draws[:, :half], draws[:, half:]))
            drift = abs(second - first) / max(np.hypot(one, other), np.finfo(float).tiny)
            if drift > _DRIFT:
                doubts.append(
                    f"losses drift, from {first:.6g} to {second:.6g} between the halves of the "
                    f"chains, {drift:.1f} standard errors: take a longer warmup="
                )
        return cls(mean, error, r_hat, effective, tuple(doubts))


def mean_and_error(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The mean of draws (chains, draws) and its standard error; NaN where that cannot be told.

    The error is the larger of that which correlations along chains tell, by arviz, and that which
    the spread between chains does: the first alone is a tenth too small for chains of underdamped
    dynamics, the second uncertain for few chains.
    """
    if draws.shape[1] < _LEAST or not len(draws):
        return _mean(draws), float("nan")
    if np.ptp(draws) == 0:
        return float(draws[0, 0]), 0.0
    along, between = _told("mcse", draws, "mean"), 0.0
    if len(draws) > 1:
        between = float(draws.mean(1).std(ddof=1) / np.sqrt(len(draws)))
    return float(draws.mean()), max(along, between)


def require_arviz() -> Any:
    """The package arviz.

    Raises:
        ImportError: if it is missing, with what to install.
    """
    try:
        with warnings.catch_warnings():  # of what will change in it
            warnings.simplefilter("ignore")
            return import_module("arviz")
    except ImportError as error:
        raise ImportError(
            "chains are judged by arviz, which is not installed: pip install 'nettrace[landscape]'",
            name="arviz",
        ) from error


def _told(what: str, draws: npt.NDArray[np.float64], method: str) -> float:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # With Numba, arviz gives arrays of one number.
        return float(np.asarray(getattr(require_arviz(), what)(draws, method=method)).item())


def _mean(draws: npt.NDArray[np.float64]) -> float:
    return float(draws.mean()) if draws.size else float("nan")
