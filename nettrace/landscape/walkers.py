"""What a flat-histogram sampler moves: many copies of something, each with an energy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Walkers(ABC):
    """Copies of something, each with an energy that is one of the numbers 0 to B - 1.

    Attributes:
        energies: (W,)
    """

    energies: Tensor

    @abstractmethod
    def propose(self, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Proposes a move of each walker.

        Args:
            entropy: (B + 1,) what is known of S(E), for moves that follow its slope; the last, at
                -1, is infinite.

        Returns:
            (W,) the energies that it would have, -1 where it has none; and the logarithm of the
            ratio of proposing back to proposing, and of any prior, None for 0.
        """

    @abstractmethod
    def accept(self, which: Tensor) -> None:
        """Makes the moves of some walkers (W,)."""

    def walk(
        self, chances: Tensor, entropy: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moves all walkers, so that energies are seen as exp(-entropy) weighs them.

        Args:
            chances: (moves, W) uniform numbers: a move is made where it is more likely than that.
            entropy: (B + 1,) as above.
            low: (W,) the least energy of each walker's window, which it does not leave.
            high: (W,) the largest.

        Returns:
            (moves, W) the energies after each move, and those that were proposed.
        """
        track = torch.empty(chances.shape, dtype=torch.int64)
        proposals = torch.empty_like(track)
        for move, chance in enumerate(chances):
            at = self.energies
            to, odds = self.propose(entropy)
            proposals[move] = to
            gained = entropy[at] - entropy[to]
            if odds is not None:
                gained += odds
            outside = (at < low) | (at > high)
            self.accept((chance < gained.exp()) & (outside | (to >= low) & (to <= high)))
            track[move] = self.energies
        return track, proposals
