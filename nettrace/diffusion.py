"""How far weights come in a time: mean squared displacement, its exponent, and ageing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
#: Into how many blocks start times are dealt for errors.
_BLOCKS = 8


@dataclass(frozen=True)
class Displacements:
    """Mean squared displacements within a window.

    Args:
        lags: (m,) in snapshots, spaced evenly in their logarithms, up to an eighth of the window.
        means: (m,) |theta(t + lag) - theta(t)|^2, mean over start times t.
        errors: (m,) their standard errors, by leaving out blocks of start times.
        exponent: of the power of the lag with which they grow: 1 for diffusion, 2 for a drift, 0
            where weights are confined.
        exponent_error: its standard error, by the same.
        ageing: (m,) the mean over the last third of start times over that of the first third: 1
            where it does not matter when one starts.
    """

    lags: npt.NDArray[np.int64]
    means: Numbers
    errors: Numbers
    exponent: float
    exponent_error: float
    ageing: Numbers


def displacements(rows: Numbers, per_octave: int = 4) -> Displacements:
    """Mean squared displacements between snapshots.

    The exponent is the slope of ln means against ln lag, all lags alike. Errors are those of the
    jackknife over eight blocks of successive start times, each as long as the longest lag: of one
    trajectory, they tell how different its parts are.

    Args:
        rows: (n, K) snapshots, as by their coordinates along principal directions.
        per_octave: lags for each factor of two, at most.

    Raises:
        ValueError: if there are fewer than 32 snapshots, or they do not move.
    """
    n = len(rows)
    if n < 32:
        raise ValueError(f"expected at least 32 snapshots for displacements, got {n}")
    most = n // 8
    count = 1 + int(per_octave * np.log2(most))
    lags = np.unique(np.geomspace(1, most, count).round().astype(np.int64))
    each = [np.square(rows[k:] - rows[:-k]).sum(1) for k in lags]
    means = np.array([one.mean() for one in each])
    if not (means > 0).all():
        raise ValueError("the weights in the window do not move: there is no displacement")
    without = np.empty((_BLOCKS, len(lags)))
    for column, one in enumerate(each):
        for row, block in enumerate(np.array_split(np.arange(len(one)), _BLOCKS)):
            without[row, column] = (one.sum() - one[block].sum()) / (len(one) - len(block))
    slopes = np.array([_slope(lags, np.maximum(row, means.min() * 1e-12)) for row in without])
    third = [len(one) // 3 for one in each]
    last = np.array([one[-k:].mean() for one, k in zip(each, third, strict=True)])
    first = np.array([one[:k].mean() for one, k in zip(each, third, strict=True)])
    with np.errstate(divide="ignore"):
        ageing = last / first
    return Displacements(
        lags,
        means,
        _jackknife(without),
        _slope(lags, means),
        float(_jackknife(slopes)),
        ageing,
    )


def _slope(lags: npt.NDArray[np.int64], means: Numbers) -> float:
    if len(lags) < 2:
        return float("nan")
    return float(np.polyfit(np.log(lags), np.log(means), 1)[0])


def _jackknife(without: Numbers) -> Numbers:
    """The standard error, of values with each block left out, along axis 0."""
    blocks = len(without)
    spread = np.square(without - without.mean(0)).sum(0)
    found: Numbers = np.sqrt((blocks - 1) / blocks * spread)
    return found
