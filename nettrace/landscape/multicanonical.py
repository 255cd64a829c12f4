"""Histograms of walkers with fixed weights: what they say of numbers of states, and the error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
#: By how much visits grow until errors are computed anew.
_GROWTH = 1.1


class Production:
    """Visits to energies, by group of walkers and window.

    Args:
        groups: G of walkers that share nothing.
        windows: how many windows each group has walkers in.
        energies: B.
        names: of observables.

    Attributes:
        burning: whether the walkers are yet to forget where they were before.
        worst: the largest standard error of S(E) when it was last computed; 0 before.
        visits: (G, windows, B)
    """

    def __init__(self, groups: int, windows: int, energies: int, names: Sequence[str]) -> None:
        self._groups, self._windows, self._energies = groups, windows, energies
        self._names = tuple(names)
        self.burning, self.worst = True, 0.0
        self._log_g: Array = np.zeros(energies)
        self._inside = np.ones((windows, energies), dtype=bool)
        self._clear()

    def _clear(self) -> None:
        cells = self._groups * self._energies
        self._counts = torch.zeros(cells * self._windows, dtype=torch.float64)
        self._looks = torch.zeros(cells, dtype=torch.float64)
        self._sums = torch.zeros(len(self._names), cells, dtype=torch.float64)
        self._examined = 0.0

    def begin(self, log_g: Array, low: Array, high: Array) -> None:
        """Forgets all visits, for samples with weights 1 / g and windows from `low` to `high`."""
        self._log_g = log_g.copy()
        energies = np.arange(self._energies)
        self._inside = (energies >= low[:, None]) & (energies <= high[:, None])
        self._inside &= np.isfinite(log_g)
        self._clear()

    def count(self, place: Tensor, track: Tensor) -> None:
        """Adds visits to energies (moves, W) by walkers of group * windows + window `place`."""
        cells = (place * self._energies + track).flatten()
        self._counts += torch.bincount(cells, minlength=len(self._counts))

    def observe(self, place: Tensor, energies: Tensor, values: Sequence[Tensor]) -> None:
        """Adds values (W,) of each observable."""
        cells = place // self._windows * self._energies + energies
        self._looks.index_add_(0, cells, torch.ones(len(cells), dtype=torch.float64))
        for sums, value in zip(self._sums, values, strict=True):
            sums.index_add_(0, cells, value.double())

    @property
    def visits(self) -> Array:
        """(G, windows, B), within windows."""
        shape = (self._groups, self._windows, self._energies)
        counts: Array = self._counts.view(shape).numpy() * self._inside
        return counts

    def entropies(self) -> tuple[Array, Array]:
        """(B,) ln of the share of states at each energy; (G, B) the same without each group."""
        visits = self.visits
        all_ = visits.sum(0)
        found = self._entropy(np.concatenate([all_[None], all_ - visits]))
        return found[0], found[1:]

    def means(self) -> dict[str, tuple[Array, Array]]:
        """For each observable its means (B,), and (G, B) without each group."""
        looks = self._looks.view(self._groups, -1).numpy()
        found = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, sums in zip(self._names, self._sums, strict=True):
                each = sums.view(self._groups, -1).numpy()
                without = (each.sum(0) - each) / (looks.sum(0) - looks)
                found[name] = each.sum(0) / looks.sum(0), without
        return found

    def flattened(self, log_g: Array) -> Array:
        """(B,) weights by the visits so far; as they are where there were none."""
        entropy, _ = self.entropies()
        seen = np.isfinite(entropy)
        shift = float(np.median((log_g - entropy)[seen]))
        return np.where(seen, entropy + shift, log_g)

    def examine(self) -> float:
        """The largest standard error of S(E), where most groups have been, now and then."""
        total = float(self._counts.sum())
        if total >= _GROWTH * self._examined:
            self._examined = total
            often = (self.visits.sum(1) > 0).mean(0) > 0.5
            errors = jackknife(self.entropies()[1])[often]
            self.worst = float(errors.max(initial=0.0)) if often.any() else np.inf
        return self.worst if self._examined else np.inf

    def _entropy(self, visits: Array) -> Array:
        """(K, B) from visits (K, windows, B), by the weighted histograms' equations.

        Ferrenberg and Swendsen 1989, Phys. Rev. Lett. 63, 1195; with one window they are solved at
        once.
        """
        total, lengths = visits.sum(1), visits.sum(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = total / np.maximum(total.sum(1, keepdims=True), 1)
            for _ in range(10_000 if self._windows > 1 else 0):
                shares = ratios[:, None] * self._inside
                scales = np.where(lengths > 0, lengths / shares.sum(2), 0.0)
                expected = (scales[..., None] * self._inside).sum(1)
                then = np.where(total > 0, total / expected, 0.0)
                then /= then.sum(1, keepdims=True)
                done = np.nanmax(np.abs(then / ratios - 1), initial=0.0) < 1e-7
                ratios = then
                if done:
                    break
            found = np.log(ratios) + np.where(np.isfinite(self._log_g), self._log_g, 0.0)
        found = np.where(total > 0, found, -np.inf)
        normalised: Array = found - np.logaddexp.reduce(found, axis=1, keepdims=True)
        return normalised


def jackknife(without: Array) -> Array:
    """The standard error (...) of a value from what it is without each of G groups, (G, ...).

    Infinite where all there is comes from one group, NaN where there is nothing.
    """
    groups = len(without)
    with np.errstate(invalid="ignore"):
        apart = without - without.mean(0)
        found: Array = np.sqrt((groups - 1) / groups * (apart**2).sum(0))
    some = np.isfinite(without).any(0)
    return np.where(np.isfinite(without).all(0), found, np.where(some, np.inf, np.nan))
