"""What the theory of stochastic gradient descent near a minimum says of weights' variances.

On a quadratic loss with Hessian H and gradient noise xi of covariance C in each step,

    v' = mu v + H w + xi,    w' = w - eta v',

which is linear: its stationary covariance solves a discrete Lyapunov equation, which for mu = 0 is
H S + S H - eta H S H = eta C (Liu, Ziyin and Ueda 2021, arXiv:2012.03636). Where the noise is not
independent from step to step, as that of batches dealt out of shuffled epochs, whose sum over an
epoch is zero, and where the variance is taken about the mean of a finite window, mode by mode

    sigma_T^2 = R_0 - (1 / T^2) (T R_0 + 2 sum_k (T - k) R_k),    R = A * C,

with A the autocovariance of the response to one kick and C that of the noise. Of a mode with eta h
T >> 1 that is eta C / 2h; with eta h T << 1 it is eta^2 C T / 6, and from shuffled epochs of M
batches with eta h M << 1 it is eta^2 C (M + 1) / 6 whatever h.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
#: eta h T below which a mode is as free as one with h = 0: it is taken to have this.
_FREE = 1e-6
#: Numbers of lags and modes that are worked on at a time.
_BLOCK = 2**22


def stationary_covariance(
    hessian: Numbers, noise: Numbers, rate: float, momentum: float = 0.0
) -> Numbers:
    """(d, d) the stationary covariance of weights under independent noise.

    Args:
        hessian: (d, d) H, symmetric and positive.
        noise: (d, d) C, covariance of a batch's gradient.
        rate: eta, small enough that descent is stable.
        momentum: mu, of `torch.optim.SGD` without dampening.

    Raises:
        ValueError: if descent is not stable, so that there is no stationary covariance.
    """
    from scipy.linalg import solve_discrete_lyapunov  # type: ignore[import-untyped]

    one = np.eye(len(hessian))
    step = np.block([[one - rate * hessian, -rate * momentum * one], [hessian, momentum * one]])
    if not np.abs(np.linalg.eigvals(step)).max() < 1:
        raise ValueError(
            f"expected a stable descent, got rate={rate}, momentum={momentum} and curvatures from "
            f"{np.linalg.eigvalsh(hessian)[[0, -1]]}: there is no stationary covariance"
        )
    kick = np.concatenate([-rate * one, one])
    found: Numbers = solve_discrete_lyapunov(step, kick @ noise @ kick.T)
    return found[: len(hessian), : len(hessian)]


def noise_autocovariance(batches: int | None) -> Numbers:
    """Autocovariances at lags 0, 1, ... of a batch's gradient over its variance.

    Args:
        batches: M, of which an epoch is dealt out without replacement; None for independent ones.
            Then, the lag's start being anywhere in an epoch, -(M - k) / (M (M - 1)) for 1 <= k < M.
    """
    if batches is None or batches < 2:
        return np.ones(1)
    lags = np.arange(1, batches)
    return np.concatenate([np.ones(1), -(batches - lags) / (batches * (batches - 1))])


def window_variances(
    curvatures: Numbers,
    noises: Numbers,
    rate: float,
    momentum: float = 0.0,
    *,
    length: float = math.inf,
    stride: int = 1,
    batches: int | None = None,
) -> Numbers:
    """(K,) the expected variances of modes about their means over a window of stationary descent.

    Args:
        curvatures: (K,) h along each mode; one that is zero is a free one.
        noises: (K,) C along each, of a batch.
        rate: eta.
        momentum: mu.
        length: T, snapshots in the window; infinite for the variance itself.
        stride: updates from one snapshot to the next.
        batches: M of shuffled epochs, None for independent batches.

    Returns:
        NaN where a mode is not stable.
    """
    autocovariance = noise_autocovariance(batches)
    lags = 1 if math.isinf(length) else int(length)
    rows = max(1, _BLOCK // ((lags - 1) * stride + 1 + 2 * len(autocovariance)))
    parts = [
        _window_variances(curvatures[i : i + rows], rate, momentum, lags, stride, autocovariance)
        for i in range(0, len(curvatures), rows)
    ]
    return np.concatenate([np.empty(0), *parts]) * noises


def _window_variances(
    h: Numbers, rate: float, momentum: float, length: int, stride: int, noise: Numbers
) -> Numbers:
    """Those of unit noise."""
    span = (length - 1) * stride + 1
    free = _FREE / (rate * max(span, len(noise)))
    stable = (h > -free) & (rate * h < 2 * (1 + momentum))
    h = np.where(stable, np.maximum(h, free), free)
    m = len(noise) - 1
    kicks = _kicked(h, rate, momentum, span + m)
    # R_k = sum over |j| <= m of C_|j| A_|k - j|.
    both = np.concatenate([kicks[:, m:0:-1], kicks], 1)
    symmetric = np.concatenate([noise[:0:-1], noise])
    if m:
        size = both.shape[1] + 2 * m
        spectra = np.fft.rfft(both, size, 1) * np.fft.rfft(symmetric, size)
        found = np.fft.irfft(spectra, size, 1)[:, 2 * m : 2 * m + span]
    else:
        found = both
    found = found[:, ::stride]
    if length == 1:
        variances = found[:, 0]
    else:
        k = np.arange(1, length)
        # As one sum of differences, in which what is large in R cancels.
        less = found[:, :1] - found[:, 1:]
        variances = 2 * (less @ (length - k)) / length**2
    return np.where(stable, variances, np.nan)


def _kicked(h: Numbers, rate: float, momentum: float, lags: int) -> Numbers:
    """(K, lags) autocovariances of weights under independent noise of unit variance."""
    first = rate * (1 + momentum) / (h * (1 - momentum) * (2 * (1 + momentum) - rate * h))
    turn = 1 + momentum - rate * h
    found = np.empty((len(h), lags))
    found[:, 0] = first
    if lags > 1:
        found[:, 1] = first * turn / (1 + momentum)
    for k in range(2, lags):
        found[:, k] = turn * found[:, k - 1] - momentum * found[:, k - 2]
    return found


def batch_variance(samples: Numbers | float, batch: float, population: float | None) -> Numbers:
    """The variance of a batch's mean, of unbiased variances of single samples.

    Args:
        samples: variances over samples, divided by N - 1.
        batch: B.
        population: N, from which a batch is drawn without replacement; None for independent draws.
    """
    share = 1.0 if population is None else max(0.0, 1 - batch / population)
    return np.asarray(samples) * share / batch
