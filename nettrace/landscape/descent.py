"""From the prior down to low losses: how fast the mass of the prior falls, roughly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from nettrace.estimators import generator
from nettrace.landscape.prior import Prior
from nettrace.landscape.spacing import Spacing
from nettrace.landscape.weight_loss import WeightLoss

Array = npt.NDArray[np.float64]
#: The standard deviation of the logarithm of steps.
SPREAD = 0.5
#: Moves of all copies between one level and the next, and the share of them to be accepted.
_MOVES, _ACCEPTED = 12, 0.3
#: How often weights are drawn anew where the loss is no number.
_DRAWS = 64
#: Levels over which a fall of the loss by less than this share is none.
_LATELY, _FALL = 16, 1e-5
#: Bins between the median loss of the prior and the highest, at least.
_RISES = 6


@dataclass(frozen=True)
class Level:
    """A loss below which copies were kept.

    Args:
        at: the loss, as `Spacing.of` has it.
        log_mass: the logarithm of the mass of the prior below it, about.
        log_step: of moves of which some are accepted there.
    """

    at: float
    log_mass: float
    log_step: float


class Descent:
    """Multilevel splitting (Kahn and Harris 1951; Au and Beck 2001, Probab. Eng. Mech. 16, 263).

    Copies drawn from the prior move so as to keep it; at each level the half of larger losses is
    replaced by copies of the other, which then move below the level.

    Args:
        loss: of weights.
        prior: of weights.
        spacing: of losses.
        copies: how many move.
        kept: how many of all that there were, evenly over the levels, are kept.
        low: the loss to go below, as `Spacing.of` has it; None for `depth` alone.
        depth: to which logarithm of the prior's mass to go, where `low` is None.
        piece: how many moves of all copies are made at once.
        seed: of what is drawn.

    Attributes:
        levels: from the prior down.
        x: (kept, P) as `Prior` has it.
        losses: (kept,)
        highest: of all losses drawn from the prior.
        done: whether it is at its end.
        stalled: whether as the loss falls no more.
        not_finite: the share of draws from the prior at which the loss is no number.
    """

    def __init__(
        self,
        loss: WeightLoss,
        prior: Prior,
        spacing: Spacing,
        copies: int,
        kept: int,
        *,
        low: float | None,
        depth: float,
        piece: int,
        seed: int,
    ) -> None:
        self._loss, self._prior, self._spacing = loss, prior, spacing
        self._low, self._depth = low, depth
        self._generator = generator(seed, "descent")
        self._copies, self._kept = copies, kept
        self._log_step = float(np.log(np.pi / 2))
        self._x = torch.empty(0)
        self._at = self._values = torch.empty(0, dtype=torch.float64)
        self._level, self._left, self._piece = Level(0.0, 0.0, 0.0), 0, piece
        self.levels: list[Level] = []
        self.done = self.stalled = False

    @property
    def lowest(self) -> float:
        """The lowest of the losses that are kept."""
        return float(self.losses.min())

    def advance(self) -> None:
        """Makes some moves towards the next level."""
        if not self.levels:
            self._begin()
            return
        if not self._left:
            self._cut()
        moves = min(self._left, self._piece)
        for _ in range(moves):
            self._move()
        self._left -= moves
        if not self._left:
            self._end()

    def _cut(self) -> None:
        """Goes on with the lower half."""
        level = float(self._at.median())
        below = (self._at <= level).nonzero()[:, 0]
        drawn = torch.randint(len(below), (self._copies - len(below),), generator=self._generator)
        chosen = torch.cat([below, below[drawn]])
        self._x, self._at = self._x[chosen.to(self._x.device)], self._at[chosen]
        self._values = self._values[chosen]
        self._level = Level(
            level,
            self.levels[-1].log_mass + float(np.log(len(below) / self._copies)),
            self._log_step,
        )
        self._left = _MOVES

    def _end(self) -> None:
        """Notes a level, and whether it was the last."""
        level = replace(self._level, log_step=self._log_step)
        self.levels.append(level)
        self._keep()
        lately = self.levels[-_LATELY:]
        whole = 1.0 if self._spacing.logarithmic else self.levels[0].at - level.at
        self.stalled = len(lately) == _LATELY and not lately[0].at - level.at > _FALL * whole
        reached = level.log_mass < self._depth if self._low is None else level.at < self._low
        self.done = self.stalled or reached

    def _begin(self) -> None:
        """Draws copies from the prior."""
        prior, bad = self._prior, torch.ones(self._copies, dtype=torch.bool)
        self._x = prior.draw(self._copies, self._generator)
        self._values = torch.full((self._copies,), torch.nan, dtype=torch.float64)
        drawn = failed = 0
        for _ in range(_DRAWS):
            here = bad.nonzero()[:, 0]
            x = prior.draw(len(here), self._generator)
            self._x[here.to(x.device)] = x
            self._values[here] = self._loss(prior.weights(x)).cpu()
            bad = ~self._values.isfinite()
            drawn += len(here)
            failed += int(bad.sum())
            if not bad.any():
                break
        else:
            raise ValueError(
                f"the loss is no finite number at {failed} of {drawn} weights drawn from the "
                "prior: choose a smaller scale="
            )
        self.not_finite = failed / drawn
        self._at = self._spacing.of(self._values)
        self.highest = float(self._values.max())
        self.levels.append(Level(float(self._at.max()), 0.0, self._log_step))
        chosen = torch.arange(self._kept) % self._copies
        self.x, self.losses = self._x[chosen.to(self._x.device)], self._values[chosen]

    def _move(self) -> None:
        prior, random = self._prior, self._generator
        steps = self._log_step + SPREAD * torch.randn(self._copies, 1, generator=random)
        p = prior.momentum(self._x, random)
        x, _ = prior.drifted(self._x, p, steps.exp().to(self._x))
        losses = self._loss(prior.weights(x)).cpu()
        at = self._spacing.of(losses)
        fine = losses.isfinite() & (at <= self._level.at)
        self._x = prior.kept(torch.where(fine[:, None].to(x.device), x, self._x))
        self._at = torch.where(fine, at, self._at)
        self._values = torch.where(fine, losses, self._values)
        change = float(fine.double().mean()) - _ACCEPTED
        self._log_step = min(self._log_step + change / 2, float(np.log(np.pi / 2)))

    def _keep(self) -> None:
        """Puts some copies in the place of those kept, so that all levels have the same share."""
        replaced = torch.rand(self._kept, generator=self._generator) * len(self.levels) < 1
        drawn = torch.randint(self._copies, (self._kept,), generator=self._generator)
        where = replaced.to(self._x.device)[:, None]
        self.x = torch.where(where, self._x[drawn.to(self._x.device)], self.x)
        self.losses = torch.where(replaced, self._values[drawn], self.losses)


def fine_edges(edges: Array, levels: list[Level]) -> Array:
    """Edges of bins, and more where the prior's mass falls by far between them.

    Within a bin all weights count the same, so that where the fall is wide its lower end would
    hardly be seen, and nothing below it. The lowest bin that was reached has nothing below.

    Args:
        edges: (n + 1,) as `Spacing.of` has them.
        levels: from the prior down.
    """
    at = np.array([level.at for level in levels])[::-1]
    mass = np.array([level.log_mass for level in levels])[::-1]
    places = np.interp(edges, at, mass)
    lowest = edges[1:][edges[1:] >= at[0]].min(initial=np.inf)
    more = [
        level.at
        for level in levels[1::2]
        if level.at > lowest and np.abs(level.log_mass - places).min() > 0.7
    ]
    # Above the median nothing is known but how far the prior goes.
    step = (at[-1] - at[-2]) / _RISES
    for low, high in pairwise(edges):
        if high > at[-2] and high - low > step > 0:
            more += np.linspace(low, high, int(np.ceil((high - low) / step)) + 1)[1:-1].tolist()
    return np.unique(np.concatenate([edges, more]))
