"""Whether walkers get around."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Crossings:
    """How often walkers have gone from one end of their window to the other, and come back home.

    Attributes:
        latest: (W,) the end that each was at last: -1, 1, or 0 for none.
        held: the window of each walker, and its ends; (W,) each.
        home: the energy where most states are.
    """

    def __init__(self, walkers: int, windows: int, energies: int) -> None:
        self.home = 0
        self._lowest = torch.full((walkers,), energies)
        self._highest = torch.zeros(walkers, dtype=torch.int64)
        self._below, self._above = torch.zeros(2, energies, dtype=torch.int64)
        self.latest = torch.zeros(walkers, dtype=torch.int64)
        self.held = [torch.full((walkers,), at) for at in (0, -1, energies)]
        self._number: npt.NDArray[np.float64] = np.zeros(windows)
        self._walkers = walkers / windows

    @property
    def fewest(self) -> float:
        """How many there were for each walker, in the window of the fewest."""
        return float(self.times.min())

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """How many there were for each walker, by window."""
        return self._number / self._walkers

    @property
    def returns(self) -> Tensor:
        """(B,) how often walkers have come home from as far as that, or farther."""
        below, above = self._below.cumsum(0), self._above.flip(0).cumsum(0).flip(0)
        return torch.where(torch.arange(len(below)) <= self.home, below, above)

    def begin(self, walkers: Tensor, window: int, low: Tensor, high: Tensor) -> None:
        """Some walkers have a window from now on."""
        ends = torch.tensor(window), low, high
        for held, value in zip(self.held, ends, strict=True):
            held[walkers] = value

    def forget(self) -> None:
        """Begins anew."""
        self.latest.zero_()
        self._number[:] = 0
        self._lowest[:] = self._highest[:] = self.home
        self._below.zero_()
        self._above.zero_()

    def follow(self, track: Tensor) -> None:
        """Goes along energies (moves, W)."""
        least, most = track.aminmax(dim=0)
        torch.minimum(self._lowest, least, out=self._lowest)
        torch.maximum(self._highest, most, out=self._highest)
        back = (least <= self.home) & (most >= self.home)
        for counts, extreme in (self._below, self._lowest), (self._above, self._highest):
            counts += torch.bincount(extreme[back], minlength=len(counts))
            extreme[back] = self.home
        window, low, high = self.held
        walkers, moves = ((track <= low) | (track >= high)).T.nonzero(as_tuple=True)
        if not len(walkers):
            return
        ends = torch.where(track[moves, walkers] <= low[walkers], -1, 1)
        after = walkers[1:] != walkers[:-1]
        one = torch.ones(1, dtype=torch.bool)
        before = torch.where(torch.cat([one, after]), self.latest[walkers], ends.roll(1))
        crossed = walkers[(before != 0) & (before != ends)]
        self._number += np.bincount(window[crossed].numpy(), minlength=len(self._number))
        last = torch.cat([after, one])
        self.latest[walkers[last]] = ends[last]
