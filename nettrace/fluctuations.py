"""How weights fluctuate within a window: the spectrum of their covariance, and correlation times.

With n snapshots theta_t of P weights, the covariance over time is the P x P matrix Sigma = X^T X /
n, with rows of X the snapshots less their mean. It shares its eigenvalues with X X^T / n, which is
n x n and all that is ever formed: the squared singular values of X over n are the variances
sigma_i^2 along the principal directions p_i, and theta_i(t) = sqrt(n) sigma_i u_i(t) are the
coordinates along them, with u_i the left singular vectors.

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
        modes: how many directions of each half.
    """

    slope: float
    kept: float
    shift: float
    modes: int


def centred_gram(rows: Tensor) -> Tensor:
    """(n, n) X X^T in float64, X the rows (n, P) less their mean."""
    n = len(rows)
    gram = rows.new_zeros((n, n), dtype=torch.float64)
    for block in rows.split(max(1, _BLOCK // n), 1):
        centred = block.double()
        # Less the first row before the mean: of large weights, differences are exact.
        centred = centred - centred[0]
        centred -= centred.mean(0)
        gram.addmm_(centred, centred.mT)
    return gram


def modes(gram: Tensor) -> Modes:
    """The principal components of a window, from `centred_gram` or a sum of several.

    Raises:
        ValueError: if the Gram matrix is not finite, or zero.
    """
    if not bool(gram.isfinite().all()):
        raise ValueError("the weights in the window are not finite: the training diverges")
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    if not bool(values[0] > 0):
        raise ValueError("the weights in the window do not move: there is no fluctuation")
    n = len(gram)
    kept = (values > n * torch.finfo(torch.float64).eps * values[0]) & (torch.arange(n) < n - 1)
    values, vectors = values[kept], vectors[:, kept]
    return Modes(values / n, vectors * values.sqrt())


def directions(rows: Tensor, found: Modes, count: int) -> Tensor:
    """(k, P) the first principal directions, orthonormal, in float64; at most `count`.

    Args:
        rows: (n, P) as given to `centred_gram`, of all parameters together.
        found: their principal components.
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

    tau = 1/2 + sum of autocorrelations up to the least lag M of at least 5 tau: Sokal (1997), Monte
    Carlo methods in statistical mechanics, section 3; of exp(-k / t) it is coth(1 / 2t) / 2,
    near t. The statistical inefficiency is 2 tau. Errors are tau sqrt(2 (2 M + 1) / n), his
    equation 3.19; they are infinite where the series is shorter than 50 tau, which it does not
    resolve: autocorrelations are then those of the window, and tau is a lower bound at best.
    """
    window, resolved = _sokal(series)
    tau = autocorrelations(series).cumsum(0).gather(0, window[None])[0] - 0.5
    errors = tau.abs() * (2 * (2 * window + 1) / len(series)).sqrt()
    return tau, torch.where(resolved, errors, torch.inf)


def _sokal(series: Tensor) -> tuple[Tensor, Tensor]:
    """Up to which lag autocorrelations are summed, and whether the series resolves them."""
    n = len(series)
    sums = autocorrelations(series).cumsum(0) - 0.5
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


def halves(gram: Tensor, leading: int = 10, fitted: int = 200) -> Halves:
    """Whether the halves of a window tell the same of how weights fluctuate.

    Directions of one half, variances of the other: where the window is long against all correlation
    times, both have the same variance along each direction, so that `slope` and `kept` are near 1.
    They are small where the principal directions are those of the window rather than of what
    confines the weights: of a random walk, or where there are too few snapshots to find them.

    Args:
        gram: (n, n) of snapshots, centred or not.
        leading: of how many directions of each half `kept` is told, but at most a quarter of it.
        fitted: of how many, less the first, the slope.
    """
    n = len(gram) // 2
    count = max(1, min(leading, n // 4))
    one, other = slice(0, n), slice(len(gram) - n, len(gram))
    logs, slopes = [], []
    for own, their in ((one, other), (other, one)):
        found = modes(_centred(gram[own, own]))
        variances = found.variances[:fitted]
        coordinates = found.coordinates[:, :fitted] / (n * variances)
        theirs = (_centred(gram[their, own]) @ coordinates).square().mean(0)
        logs.append((theirs / variances)[:count].log())
        slopes.append(_slope(variances[1:].log(), theirs[1:].log()))
    within = [_centred(gram[part, part]).trace() / n for part in (one, other)]
    shift = gram[one, one].mean() + gram[other, other].mean() - 2 * gram[one, other].mean()
    kept = math.exp(float(torch.cat(logs).mean()))
    return Halves(sum(slopes) / 2, kept, float(shift / (sum(within) / 2)), count)


def layer_correlations(grams: Iterable[Tensor]) -> Tensor:
    """(L, L) how much the fluctuations of each two layers have to do with each other, from 0 to 1.

    |Sigma_lm| / sqrt(|Sigma_ll| |Sigma_mm|) with Frobenius norms of the blocks of the covariance
    between layers, |Sigma_lm|^2 = tr(G_l G_m) / n^2, from the layers' Gram matrices (n, n).
    """
    flat = torch.stack([gram.flatten() for gram in grams])
    squares = (flat @ flat.mT).clamp_min(0)
    norms = squares.diagonal().sqrt()
    return (squares / (norms * norms[:, None])).sqrt()


def stationarity(gram: Tensor) -> tuple[float, float]:
    """-2 <theta . dtheta> / <|dtheta|^2>, which is 1 where weights are stationary, and its error.

    Yaida (2018), arXiv:1810.00004, the first fluctuation-dissipation relation, in terms of updates
    dtheta, with theta about the mean of the window, and means over the window. The sum telescopes:
    the ratio differs from 1 by the change of |theta|^2 over the window's squared path, so that a
    random walk, which spreads from its mean both ways in time, is not told from equilibrium. The
    error is
    what that change is for snapshots of the window that are drawn independently.

    Args:
        gram: (n, n) `centred_gram`.
    """
    squares = gram.diagonal()
    products = gram.diagonal(1)
    moved = squares[1:] + squares[:-1] - 2 * products
    ratio = -2 * (products - squares[:-1]).sum() / moved.sum()
    error = math.sqrt(2) * squares.std() / moved.sum()
    return float(ratio), float(error)


def _slope(x: Tensor, y: Tensor) -> float:
    if len(x) < 3:
        return math.nan
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def _centred(gram: Tensor) -> Tensor:
    gram = gram - gram.mean(0)
    return gram - gram.mean(1, keepdim=True)
