"""Exponents of power laws, with intervals, and whether a power law it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
#: Points from which an exponent is fitted, at least.
FEWEST = 8


@dataclass(frozen=True)
class PowerLaw:
    """A straight line through logarithms, ln y = intercept + exponent ln x.

    Args:
        exponent: its slope.
        standard_error: of the slope.
        low: where the 95 % confidence interval of the exponent begins.
        high: where it ends.
        intercept: ln y at x = 1.
        r_squared: the share of the variance of ln y that it explains.
        curvature: the coefficient of (ln x)^2 where that is fitted too.
        curvature_t: that coefficient over its standard error.
        points: how many points were fitted.
        span: the largest x over the smallest.
    """

    exponent: float
    standard_error: float
    low: float
    high: float
    intercept: float
    r_squared: float
    curvature: float
    curvature_t: float
    points: int
    span: float

    def attributes(self) -> dict[str, str | int | float]:
        """What to keep beside the exponent."""
        turns = 2 * self.curvature * math.log(self.span)  # by what the slope changes, end to end
        bent = abs(self.curvature_t) > 3 and abs(turns) > 0.2 * abs(self.exponent)
        doubt = "the points bend: the exponent depends on where it is fitted"
        found: dict[str, str | int | float] = {"fit_warning": doubt} if bent else {}
        return found | {
            "interval_low": self.low,
            "interval_high": self.high,
            "interval": "95 %, least squares of logarithms with HC3 errors, widened by the "
            "statistical inefficiency of the residuals in order",
            "r_squared": self.r_squared,
            "curvature": self.curvature,
            "curvature_t": self.curvature_t,
            "points": self.points,
            "span": self.span,
        }


def power_law(x: Numbers, y: Numbers) -> PowerLaw:
    """Fits y ~ x^exponent by least squares of logarithms.

    Errors are those of MacKinnon and White (1985), HC3, which need no equal scatter; neighbouring
    points that scatter alike, as neighbouring modes do, count as fewer: errors are multiplied by
    the square root of the statistical inefficiency of the residuals, in the order given, and the
    interval is Student's for as many points. Scatter in
    x is not accounted for, and would make the exponent too small.

    Args:
        x: (n,) positive; points at which x or y is not positive or not finite are left out.
        y: (n,) positive.

    Raises:
        ValueError: if fewer than 8 points are left, or all at one x.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    kept = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    if kept.sum() < FEWEST:
        raise ValueError(
            f"expected at least {FEWEST} points with positive numbers for an exponent, got "
            f"{kept.sum()} of {len(x)}"
        )
    u, v = np.log(x[kept]), np.log(y[kept])
    if not np.ptp(u) > 1e-9:
        raise ValueError(f"expected points at several x, got {x[kept][0]:.6g} alone")
    middle, scale = u.mean(), u.std()
    z = (u - middle) / scale
    (level, slope), (_, error), residuals = _fit(np.stack([np.ones_like(z), z], 1), v)
    curved, errors, _ = _fit(np.stack([np.ones_like(z), z, z**2], 1), v)
    exponent, error = slope / scale, error / scale
    freedom = max(3.0, len(z) / inefficiency(residuals) - 2)
    half = float(stdtrit(freedom, 0.975)) * error
    total = np.square(v - v.mean()).sum()
    return PowerLaw(
        exponent=float(exponent),
        standard_error=float(error),
        low=float(exponent - half),
        high=float(exponent + half),
        intercept=float(level - exponent * middle),
        r_squared=float(1 - np.square(residuals).sum() / total) if total > 0 else 1.0,
        curvature=float(curved[2] / scale**2),
        curvature_t=float(curved[2] / errors[2]) if errors[2] > 0 else 0.0,
        points=len(z),
        span=float(np.exp(np.ptp(u))),
    )


def _fit(columns: Numbers, values: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Coefficients, their standard errors, and residuals."""
    inverse = np.linalg.pinv(columns)
    coefficients = inverse @ values
    residuals = values - columns @ coefficients
    leverage = np.einsum("nk,kn->n", columns, inverse).clip(max=1 - 1e-9)
    covariance = (inverse * (residuals / (1 - leverage)) ** 2) @ inverse.T
    errors = np.sqrt(np.diag(covariance) * inefficiency(residuals))
    return coefficients, errors, residuals


def inefficiency(series: Numbers) -> float:
    """How many successive values count as one, at least 1: 1 + 2 sum of autocorrelations.

    Up to the first pair of lags whose sum is not positive: Geyer (1992), Practical Markov chain
    Monte Carlo, section 3.3.
    """
    n = len(series)
    centred = series - series.mean()
    power = np.abs(np.fft.rfft(centred, 2 * n)) ** 2
    covariances = np.fft.irfft(power, 2 * n)[:n]
    if not covariances[0] > 0:
        return 1.0
    rho = covariances / covariances[0]
    pairs = rho[: n // 2 * 2].reshape(-1, 2).sum(1)
    ends = np.nonzero(pairs <= 0)[0]
    last = int(ends[0]) if len(ends) else len(pairs)
    return float(max(1.0, 2 * pairs[:last].sum() - 1))
