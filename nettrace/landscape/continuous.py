"""Copies of a network whose weights move through a continuum, by Hamiltonian dynamics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrace.landscape.descent import SPREAD, Level
from nettrace.landscape.prior import Prior
from nettrace.landscape.spacing import Spacing
from nettrace.landscape.walkers import Walkers
from nettrace.landscape.weight_loss import WeightLoss

Array = npt.NDArray[np.float64]
#: The share of moves that follow a force, at most, and the number of weights of which it is half
#: that: their steps in S grow with it, those of free moves do not. They take 1, 2 or 4 steps.
_GUIDED, _HALF, _STEPS = 0.75, 8, 2
#: The share of them to be accepted, and by how much of what is missing steps are adapted.
_ACCEPTED, _RATE = 0.55, 0.05


class ContinuousWalkers(Walkers):
    """Copies of a network, each with weights of its own, by bins of the loss.

    Two moves keep the prior and are reversible:

    1. Free ones rotate x = w / scales by an angle towards a random direction, whatever the loss
       (preconditioned Crank-Nicolson: Neal 1998; Cotter et al. 2013, Stat. Sci. 28, 424).
    2. Guided ones take steps of such rotations with kicks between them, the force being that of
       the density exp(-S(E)) times the prior, of which all energies would be seen alike: S is
       interpolated between the centres of bins (Neal 2011; Beskos et al. 2011, Stoch. Process.
       Appl. 121, 2201; on the sphere Byrne and Girolami 2013, Scand. J. Stat. 40, 825).

    The logarithm of the step is drawn from a normal distribution, about what is best in the bin
    that a walker is in. How likely the same step is where it leads to counts in its acceptance, so
    that moves are exact. Free ones are thinned by that before they are proposed: they are
    symmetric with respect to the prior, whatever S is, and so their transitions tell S.

    Args:
        loss: of weights.
        prior: of weights.
        spacing: of losses.
        edges: (B - 1,) of bins, as `spacing` has them; the first and the last bin are open.
        levels: which tell steps.
        x: (W, P) where walkers begin, as `prior` has it.
        losses: (W,) there.
        generator: of moves.

    Attributes:
        energies: (W,) the bins that walkers are in.
        x: (W, P)
        losses: (W,) in float64.
        stage: that of `WangLandau`: guided moves are made once "exploring" is over, and their
            steps held from "multicanonical" on.
        moves: that were made.
    """

    def __init__(
        self,
        loss: WeightLoss,
        prior: Prior,
        spacing: Spacing,
        edges: Array,
        levels: Sequence[Level],
        x: Tensor,
        losses: Tensor,
        generator: torch.Generator,
    ) -> None:
        self._loss, self._prior, self._spacing = loss, prior, spacing
        self._generator = generator
        self._edges = torch.from_numpy(edges)
        self._centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
        at = np.array([level.at for level in levels])[::-1]
        # Most of a bin's weights are near its upper end.
        steps = np.interp(
            np.append(edges, edges[-1]), at, np.array([level.log_step for level in levels])[::-1]
        )
        #: (B,) logarithms of steps of free moves, and what is added for guided ones.
        self._log_steps, self._stretch = torch.from_numpy(steps), 0.0
        self.x, self.losses = x, losses
        self.energies = self._bins(losses)
        self.stage, self.moves = "exploring", 0

    @property
    def lowest(self) -> float:
        """The lowest of the losses now."""
        return float(self.losses.min())

    @property
    def weights(self) -> Tensor:
        """(W, P) of the network."""
        return self._prior.weights(self.x)

    def propose(self, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """(W,) the bins that moves would lead to, and the odds of going back; `accept` makes them.

        Args:
            entropy: (B + 1,) what is known of S; the last is not looked at.
        """
        prior, random, at = self._prior, self._generator, self.energies
        share = _GUIDED * prior.size / (prior.size + _HALF)
        self._guided = self.stage != "exploring" and bool(torch.rand((), generator=random) < share)
        centres = self._log_steps
        if self._guided:
            centres = (centres + self._stretch).clamp_max(0.0)
        offset = SPREAD * torch.randn(len(at), generator=random, dtype=torch.float64)
        log_step = centres[at] + offset
        p = prior.momentum(self.x, random)
        time = log_step.exp().to(self.x)[:, None]
        if self._guided:
            x, q, fine = self._followed(p, time, entropy[:-1])
        else:
            x, q = prior.drifted(self.x, p, time)
            fine = torch.ones(len(at), dtype=torch.bool)
        losses = self._loss(prior.weights(x)).cpu()
        fine &= losses.isfinite()
        losses = torch.where(fine, losses, self.losses)
        to = self._bins(losses)
        odds = (offset.square() - (log_step - centres[to]).square()) / (2 * SPREAD**2)
        self._proposed = x, losses, to
        if self._guided:
            odds += (prior.energy(self.x, p) - prior.energy(x, q)).cpu()
            return torch.where(fine, to, -1), odds
        self._moving = fine & (torch.rand(len(at), generator=random).log() <= odds)
        return torch.where(self._moving, to, at), None

    def accept(self, which: Tensor) -> None:
        """Makes the proposed moves of some walkers (W,)."""
        if self._guided and self.stage == "Wang-Landau":
            # By the same factor everywhere: steps that vary from bin to bin are hard to go back.
            self._stretch += _RATE * (float(which.double().mean()) - _ACCEPTED)
        if not self._guided:
            which = which & self._moving
        x, losses, to = self._proposed
        moved = torch.where(which[:, None].to(x.device), x, self.x)
        self.x = self._prior.kept(moved)
        self.losses = torch.where(which, losses, self.losses)
        self.energies = torch.where(which, to, self.energies)
        self.moves += 1

    def _bins(self, losses: Tensor) -> Tensor:
        return torch.searchsorted(self._edges, self._spacing.of(losses), right=True)

    def _followed(self, p: Tensor, time: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, p (W, P) after some steps with kicks half way, and which met finite losses alone."""
        prior, x = self._prior, self.x
        centres, slopes = self._centres, self._slopes(entropy)
        fine = torch.ones(len(x), dtype=torch.bool)
        steps = 2 ** int(torch.randint(_STEPS + 1, (), generator=self._generator))
        for step in range(steps):
            # Two half rotations in a row are one.
            x, p = prior.drifted(x, p, time / 2 if step == 0 else time)
            losses, gradients = self._loss.gradients(prior.weights(x))
            losses = losses.cpu()
            here = losses.isfinite() & gradients.isfinite().all(1).cpu()
            fine &= here
            losses = torch.where(here, losses, 1.0)
            at = self._spacing.of(losses)
            force = -slopes[torch.searchsorted(centres, at)] * self._spacing.slope(losses)
            force = torch.where(here & (losses != 0), force, 0.0)
            kick = gradients.nan_to_num(0.0, 0.0, 0.0) * prior.scales * force.to(x)[:, None]
            p = p + time * prior.tangent(x, kick)
        x, p = prior.drifted(x, p, time / 2)
        return x, p, fine

    def _slopes(self, entropy: Tensor) -> Tensor:
        """(B - 1,) of S between the centres of closed bins, none beyond."""
        closed = entropy[1:-1]
        slopes = (closed[1:] - closed[:-1]) / (self._centres[1:] - self._centres[:-1])
        return torch.nn.functional.pad(slopes.nan_to_num(0.0, 0.0, 0.0), (1, 1))
