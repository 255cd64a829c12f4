"""Whether walkers get around."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Crossings:
    """How often walkers have gone from one end of their window to the other.

    Attributes:
        latest: (W,) the end that each was at last: -1, 1, or 0 for none.
        held: the window of each walker, and its ends; (W,) each.
    """

    def __init__(self, walkers: int, windows: int) -> None:
        self.latest = torch.zeros(walkers, dtype=torch.int64)
        self.held = [torch.zeros(walkers, dtype=torch.int64) for _ in range(3)]
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

    def begin(self, walkers: Tensor, window: int, low: Tensor, high: Tensor) -> None:
        """Some walkers have a window from now on."""
        ends = torch.tensor(window), low, high
        for held, value in zip(self.held, ends, strict=True):
            held[walkers] = value

    def forget(self) -> None:
        """Begins anew."""
        self.latest.zero_()
        self._number[:] = 0

    def follow(self, track: Tensor) -> None:
        """Goes along energies (moves, W)."""
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
