"""How weights fluctuate within a window: the spectrum of their covariance, and correlation times.

With n snapshots theta_t of P weights, the covariance over time is the P x P matrix Sigma = X^T X /
n, with rows of X the snapshots less their mean. It shares its eigenvalues with X X^T / n, which is
n x n, and only the smaller of the two is formed: the squared singular values of X over n are the
variances sigma_i^2 along the principal directions p_i, and theta_i(t) = sqrt(n) sigma_i u_i(t) are
the coordinates along them, with u_i the left singular vectors.

Of an unconfined random walk, principal components are cosines and their shares of the variance 6 /
(pi^2 k^2), whatever the landscape: Antognini and Sohl-Dickstein (2018), arXiv:1806.08805. So what
is read off a window is checked on its halves (`halves`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.weight_sketch import BUCKETS

_DIVERGES = "weights in the window are not finite: the training diverges"
#: Numbers in float64 that are made of a window's rows at a time.
_BLOCK = 2**22
#: Correlation times that Sokal's window is long.
_SOKAL = 5
#: Correlation times that a series must be long for one of them to be known.
_RESOLVED = 50


@dataclass(frozen=True)
class Modes:
    """The principal components of a window.

    Args:
        variances: (K,) sigma_i^2, largest first; those above rounding.
        coordinates: (n, K) theta_i(t), of mean zero.
    """

    variances: Tensor
    coordinates: Tensor


@dataclass(frozen=True)
class Halves:
    """What one half of a window tells of the other.

    Args:
        slope: of the logarithms of the variances that the other half has along the principal
            directions of one, against those of the half itself: 1 in equilibrium, 0 where it is the
            window that makes some larger than others. NaN of fewer than 4 modes.
        kept: the geometric mean, over leading directions of each half, of the variance that the
            other half has along them, over that of their own.
        shift: squared distance between the means of the halves, over the mean total variance within
            them; 4 / n for independent snapshots, and 4 for a random walk.
    """

    slope: float
    kept: float
    shift: float


def factor(rows: Tensor) -> Tensor:
    """In float64, n rows of few numbers, with the inner products of rows (n, P) less their mean.

    These themselves where they are up to a few thousand numbers each, else n.

    Raises:
        ValueError: if the rows are not finite.
    """
    n, size = rows.shape
    if size <= max(n, BUCKETS):
        found = _less_mean(rows)
        if not bool(found.isfinite().all()):
            raise ValueError(_DIVERGES)
        return found
    gram = rows.new_zeros((n, n), dtype=torch.float64)
    for block in rows.split(max(1, _BLOCK // n), 1):
        centred = _less_mean(block)
        gram.addmm_(centred, centred.mT)
    if not bool(gram.isfinite().all()):
        raise ValueError(_DIVERGES)
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def modes(factors: Iterable[Tensor]) -> Modes:
    """The principal components of a window, from the `factor` of each parameter.

    Raises:
        ValueError: if nothing moves.
    """
    parts = list(factors)
    n, size = len(parts[0]), sum(part.shape[1] for part in parts)
    if size <= n:
        rows = torch.cat(parts, 1)
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        coordinates = rows @ vectors
    else:
        values, vectors = torch.linalg.eigh(sum(part @ part.mT for part in parts))
        coordinates = vectors * values.clamp_min(0).sqrt()
    values, coordinates = values.flip(0), coordinates.flip(1)
    if not bool(values[0] > 0):
        raise ValueError("the weights in the window do not move: there is no fluctuation")
    kept = values > n * torch.finfo(torch.float64).eps * values[0]
    kept[n - 1 :] = False
    return Modes(values[kept] / n, coordinates[:, kept])


def directions(rows: Tensor, found: Modes, count: int) -> Tensor:
    """(k, P) the first principal directions, orthonormal, in float64; at most `count` of them.

    Args:
        rows: (n, P) snapshots of all parameters, or of some, whose share is then found.
        found: the principal components of all.
        count: how many directions.
    """
    own = found.coordinates[:, :count]
    left = own / own.square().sum(0)
    if len(rows) != len(own):
        raise ValueError(f"expected {len(own)} rows of snapshots, got {len(rows)}")
    # Coordinates have mean zero, so that the mean of the rows drops out.
    blocks = rows.split(max(1, _BLOCK // len(rows)), 1)
    return torch.cat([left.mT @ (block.double() - block[0].double()) for block in blocks], 1)


def autocorrelations(series: Tensor) -> Tensor:
    """(n, K) autocorrelations at lags 0, 1, ... of series (n, K), about their means.

    Sums over the n - k pairs of a lag are divided by n, which keeps them positive definite.
    """
    n = len(series)
    centred = series - series.mean(0)
    spectrum = torch.fft.rfft(centred, 2 * n, 0).abs().square()
    found = torch.fft.irfft(spectrum, 2 * n, 0)[:n]
    rho: Tensor = found / found[0]
    return rho


def correlation_times(series: Tensor) -> tuple[Tensor, Tensor]:
    """Integrated autocorrelation times (K,) of series (n, K), in steps of them, and their errors.

    tau = 1/2 + sum of autocorrelations up to a lag M: Sokal (1997), Monte Carlo methods in
    statistical mechanics, section 3; of exp(-k / t) it is coth(1 / 2t) / 2, near t. The statistical
    inefficiency is 2 tau. M is the least lag of at least 5 times the sum of the autocorrelations'
    moduli, for with momentum they may swing, and a sum that ends within the first swing is wrong.
    Errors are tau sqrt(2 (2 M + 1) / n), his equation 3.19, with the root of the sum of squared
    autocorrelations, over 2, for tau where that is more. They are infinite where the series is
    shorter than 50 of that sum, which it does not resolve: autocorrelations are then those of the
    window, and tau is a lower bound at best.
    """
    window, resolved = _sokal(series)
    found = autocorrelations(series)
    tau = found.cumsum(0).gather(0, window[None])[0] - 0.5
    squares = 2 * found.square().cumsum(0).gather(0, window[None])[0] - 1
    scale = torch.maximum(tau.abs(), squares.sqrt() / 2)
    errors = scale * (2 * (2 * window + 1) / len(series)).sqrt()
    return tau, torch.where(resolved, errors, torch.inf)


def _sokal(series: Tensor) -> tuple[Tensor, Tensor]:
    """Up to which lag autocorrelations are summed, and whether the series resolves them."""
    n = len(series)
    # Moduli that are no more than noise would let the sum grow with the lag.
    found = autocorrelations(series).abs()
    sums = torch.where(found > 2 / n**0.5, found, 0.0).cumsum(0) - 0.5
    lags = torch.arange(n, dtype=series.dtype)[:, None]
    reached = lags >= _SOKAL * sums
    reached[0], reached[-1] = False, True
    window = reached.to(torch.int8).argmax(0)
    tau = sums.gather(0, window[None])[0]
    return window, (n >= _RESOLVED * tau) & (window < n - 1)


def variance_errors(series: Tensor) -> Tensor:
    """Standard errors (K,) of the variances of series (n, K) of Gaussian values.

    Var = 2 sigma^4 / n (1 + 2 sum of squared autocorrelations), Bartlett (1946), up to the lag of
    `correlation_times`; infinite where that is not resolved.
    """
    n = len(series)
    window, resolved = _sokal(series)
    squares = autocorrelations(series).square().cumsum(0)
    total = 2 * squares.gather(0, window[None])[0] - 1
    errors = series.var(0, correction=0) * (2 * total / n).sqrt()
    return torch.where(resolved, errors, torch.inf)


def halves(rows: Tensor, leading: int = 10, fitted: int = 200) -> Halves:
    """Whether the halves of a window tell the same of how weights fluctuate.

    Directions of one half, variances of the other: where the window is long against all correlation
    times, both have the same variance along each direction, so that `slope` and `kept` are near 1.
    They are small where the principal directions are those of the window rather than of what
    confines the weights: of a random walk, or where there are too few snapshots to find them.

    Args:
        rows: (n, K) snapshots, as by their coordinates.
        leading: of how many directions of each half `kept` is told, but at most a quarter of it.
        fitted: of how many, less the first, the slope.
    """
    n = len(rows) // 2
    count = max(1, min(leading, n // 4))
    logs, slopes, within = [], [], 0.0
    for own, their in ((rows[:n], rows[-n:]), (rows[-n:], rows[:n])):
        centred = _less_mean(own)
        _, scales, vectors = torch.linalg.svd(centred, full_matrices=False)
        there = scales > 1e-7 * scales[0]  # beyond, squares are rounding
        variances = (scales[there].square() / n)[:fitted]
        theirs = (_less_mean(their) @ vectors[there][:fitted].mT).square().mean(0)
        logs.append((theirs / variances)[:count].log())
        slopes.append(_slope(variances[1:].log(), theirs[1:].log()))
        within += float(centred.square().sum()) / n / 2
    shift = float((rows[:n].mean(0) - rows[-n:].mean(0)).square().sum())
    kept = math.exp(float(torch.cat(logs).mean()))
    return Halves(sum(slopes) / 2, kept, shift / within if within else math.nan)


def layer_correlations(factors: Iterable[Tensor]) -> Tensor:
    """(L, L) how much the fluctuations of each two layers have to do with each other, from 0 to 1.

    |Sigma_lm| / sqrt(|Sigma_ll| |Sigma_mm|) with Frobenius norms of the blocks of the covariance
    between layers, which are those of Z_l^T Z_m / n, with Z_l the layers' `factor`.
    """
    parts = list(factors)
    found = torch.stack(
        [torch.stack([(one.mT @ other).norm() for other in parts]) for one in parts]
    )
    norms = found.diagonal().sqrt()
    return found / (norms * norms[:, None])


def stationarity(rows: Tensor) -> tuple[float, float]:
    """-2 <theta . dtheta> / <|dtheta|^2>, which is 1 where weights are stationary, and its error.

    Yaida (2018), arXiv:1810.00004, the first fluctuation-dissipation relation, in terms of updates
    dtheta, with theta about the mean of the window, and means over the window. The sum telescopes:
    the ratio differs from 1 by the change of |theta|^2 over the window's squared path, so that a
    random walk, which spreads from its mean both ways in time, is not told from equilibrium. The
    error is what that change is for snapshots of the window that are drawn independently.

    Args:
        rows: (n, K) snapshots, as by their coordinates.
    """
    centred = _less_mean(rows)
    steps = centred.diff(dim=0)
    path = steps.square().sum()
    ratio = -2 * (centred[:-1] * steps).sum() / path
    error = math.sqrt(2) * centred.square().sum(1).std() / path
    return float(ratio), float(error)


def _slope(x: Tensor, y: Tensor) -> float:
    if len(x) < 3:
        return math.nan
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def _less_mean(rows: Tensor) -> Tensor:
    """Rows less their mean, in float64; less the first before, as differences keep their digits."""
    found = rows.double() - rows[0].double()
    found -= found.mean(0)
    return found
