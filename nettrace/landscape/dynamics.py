"""Langevin dynamics of many copies of a network's weights, in an energy that their loss makes.

The density that is sampled is exp(-U), with

    U(w) = n beta (L(w) - L(w*)) + gamma |w - w*|^2 / 2,

L the mean loss in nats a sample, w* the network's own weights. Two dynamics are there:

- "underdamped": with momenta of unit mass, split as BAOAB (Leimkuhler and Matthews 2013, Applied
  Mathematics Research eXpress 2013, 34). Weights of a quadratic energy have the right variance at
  any step that is stable; momenta do not.
- "sgld": overdamped (Welling and Teh 2011, ICML), w <- w - (e/2) grad U + sqrt(e) N(0, 1). The
  variance along a direction of curvature k is too large by the factor 1 / (1 - e k / 4).

Gradients of batches have a control variate: that of the batch at w* is replaced by that of the
whole probe (Baker, Fearnhead, Fox and Nemeth 2019, Statistics and Computing 29, 599), as the noise
of batches would heat the chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.landscape.stiffness import Stiffness
from nettrace.landscape.weight_loss import WeightLoss

Dynamics: TypeAlias = Literal["underdamped", "sgld"]

#: Steps by default, in units of what is stable: h^2 k, or e k, at the largest curvature k.
_STEP = {"underdamped": 0.25, "sgld": 0.04}
#: The friction by default, in units of the inverse step; with batches, whose noise it takes up.
_FRICTION, _FRICTION_OF_BATCHES = 0.05, 1.0
#: The share of such a step that the warm-up begins with, and by how much it grows.
_SHORT, _GROWTH = 0.1, 1.05
#: In the warm-up the curvature is looked at after each of so many steps, then after some.
_CLOSE, _OFTEN = 50, 4
#: How far from w* it is tried how copies can be evaluated, in units of weights and one.
_BESIDE = 1e-2
#: What the curvature is multiplied with where a chain ran away in the warm-up.
_STIFFER = 4.0


@dataclass(frozen=True)
class Settings:
    """How weights are sampled; see `langevin` for what each of these is.

    Raises:
        ValueError: if one of them is out of range.
    """

    dynamics: Dynamics = "underdamped"
    chains: int = 4
    draws: int = 2000
    warmup: int = 1000
    spacing: int | None = None
    batch_size: int | None = None
    step_size: float | None = None
    friction: float | None = None
    localisation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dynamics not in get_args(Dynamics):
            raise ValueError(
                f"expected dynamics= to be one of {get_args(Dynamics)}, got {self.dynamics!r}"
            )
        whole = {"chains": 1, "draws": 4, "warmup": 0, "spacing": 1, "batch_size": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if value is not None and not (value == int(value) and value >= least):
                raise ValueError(
                    f"expected {name}= to be a whole number from {least} on, got {value!r}"
                )
        for name in ("step_size", "friction", "localisation"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"expected {name}= to be positive, got {value!r}")
        if self.friction is not None and self.dynamics == "sgld":
            raise ValueError("friction= is of underdamped dynamics, not of 'sgld': leave it out")


class LangevinWalkers:
    """Copies of weights that move by Langevin dynamics.

    Args:
        loss: of the weights; its network is frozen meanwhile.
        scale: n beta, by which the mean loss is multiplied.
        settings: how they move.

    Attributes:
        alive: (K,) the numbers of the chains that have not diverged.
        weights: (K, P).
        momenta: (K, P).
        losses: (K,) what the last gradients are of, on the whole probe or batches.
        slopes: (K, P) gradients of the energy there.
        step: h, or e for "sgld".
        stiffness: the largest curvature of the energy that they meet.
        center_loss: the mean loss at w*.
    """

    def __init__(self, loss: WeightLoss, scale: float, settings: Settings) -> None:
        if settings.batch_size is not None and settings.batch_size >= loss.samples:
            raise ValueError(
                f"expected batch_size= below the {loss.samples} samples of the probe, got "
                f"{settings.batch_size}: leave it out for gradients of all of them"
            )
        self.loss, self._scale, self._settings = loss, scale, settings
        self._random = torch.Generator(loss.device)
        self._random.manual_seed(generator(settings.seed, "langevin").initial_seed())
        center = loss.point[None]
        self.alive = torch.arange(settings.chains)
        self.weights = center.repeat(settings.chains, 1)
        self.momenta = self._noise()
        self._grown = _SHORT
        self._rows = self._batches()
        # Whether copies can be evaluated together is found on one, and not at w* itself, where
        # gradients may be nothing but rounding.
        beside = center + _BESIDE * (1 + center.abs()) * self._noise()[:1]
        loss.gradients(beside)
        if self._rows is not None:
            loss.gradients(beside, self._rows[:1])
        center_losses, self._center_gradient = loss.gradients(center)
        self.center_loss = float(center_losses)
        self.losses, self.slopes = self._at(self.weights, self._rows)
        self.stiffness = Stiffness(self._noise(), settings.localisation)
        self.step = settings.step_size or self._stable()

    @property
    def friction(self) -> float:
        """Of the momenta, per unit of time; 0 for overdamped dynamics."""
        if self._settings.dynamics == "sgld":
            return 0.0
        usual = _FRICTION if self._settings.batch_size is None else _FRICTION_OF_BATCHES
        return self._settings.friction or usual / self.step

    @property
    def length(self) -> float:
        """h^2 k, or e k, with the largest curvature met: of 4 and more, steps are not stable."""
        power = 1 if self._settings.dynamics == "sgld" else 2
        return float(self.step**power * self.stiffness.highest)

    def begin(self) -> None:
        """Looks for the curvature before the first step, which takes `stiffness.FIRST` calls."""
        self.stiffness.begin(self._slopes_at, self.weights, self.slopes)
        self.step = self._settings.step_size or self._stable()

    def move(self) -> None:
        """Makes a step."""
        h = self.step
        if self._settings.dynamics == "sgld":
            self.weights = self.weights - (h / 2) * self.slopes + math.sqrt(h) * self._noise()
            self._renew()
            return
        kept = self._kept()
        momenta = self.momenta - (h / 2) * self.slopes
        weights = self.weights + (h / 2) * momenta
        momenta = kept * momenta + math.sqrt(1 - kept**2) * self._noise()
        self.weights = weights + (h / 2) * momenta
        self._renew()
        self.momenta = momenta - (h / 2) * self.slopes

    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (K,) and gradients (K, P) of the whole energy where the chains are.

        And (K,) what has the mean of that by which steps and batches raise the losses. Of SGLD it
        is (e/8) grad L . grad U, gradients being those of the step. Otherwise the noise c of the
        gradients of batches raises the variance along a direction by its own, times h^2 / 4 times
        (1 + a) / (1 - a), where a is what a step leaves of a momentum. The first is right for
        quadratic energies, the second is if h^2 k is small, too.
        """
        losses, slopes = self.losses, self.slopes
        if self._rows is not None:
            losses, slopes = self._at(self.weights, None)
        if self._settings.dynamics == "sgld":
            held = self._settings.localisation * (self.weights - self.loss.point)
            return (
                losses,
                slopes,
                self.step / 8 * self._per_loss((self.slopes - held) * self.slopes),
            )
        kept = self._kept()
        factor = self.step**2 / 8 * (1 + kept) / (1 - kept)
        return losses, slopes, factor * self._per_loss((self.slopes - slopes).square())

    def adapt(self, step: int, steps: int) -> None:
        """Chooses the step size, unless it was given, before a step of so many of the warm-up."""
        if step == steps // 2:
            self.stiffness.highest = 0.0
        if step < _CLOSE or step % _OFTEN == 0:
            self.look()
        if self._settings.step_size is None:
            self._grown = min(1.0, self._grown * _GROWTH)
            self.step = self._stable()

    def settle(self) -> None:
        """Fixes the step size by the largest curvature met of late."""
        self._grown = 1.0
        self.stiffness.value = max(self.stiffness.value, self.stiffness.highest)
        self.step = self._settings.step_size or self._stable()
        self.stiffness.highest = 0.0

    def look(self) -> None:
        """Follows the curvature."""
        self.stiffness.look(self._slopes_at, self.weights, self.slopes)

    def lost(self) -> Tensor:
        """(K,) which of the chains alive are not finite."""
        rows = torch.cat([self.weights, self.slopes, self.momenta], 1).sum(1) + self.losses
        return rows.isfinite().logical_not()

    def restart(self, lost: Tensor) -> None:
        """Lets chains begin anew at w*, with shorter steps."""
        self.weights = torch.where(lost[:, None], self.loss.point, self.weights)
        self.momenta = torch.where(lost[:, None], self._noise(), self.momenta)
        self.stiffness.value *= _STIFFER
        self.stiffness.highest = max(self.stiffness.highest, self.stiffness.value)
        self.step = self._stable()
        self._renew()

    def drop(self, lost: Tensor) -> None:
        """Goes on without some chains."""
        kept = ~lost
        self.alive = self.alive[kept.cpu()]
        self.stiffness.keep(kept)
        if self._rows is not None:
            self._rows = self._rows[kept]
        self.weights, self.momenta = self.weights[kept], self.momenta[kept]
        self.losses, self.slopes = self.losses[kept], self.slopes[kept]

    def _stable(self) -> float:
        found = _STEP[self._settings.dynamics] * self._grown / self.stiffness.value
        return float(found if self._settings.dynamics == "sgld" else math.sqrt(found))

    def _renew(self) -> None:
        """Gradients where the weights are now, of another batch if of batches."""
        self._rows = self._batches()
        self.losses, self.slopes = self._at(self.weights, self._rows)

    def _batches(self) -> Tensor | None:
        """(K, B) which samples the gradients of each chain are of; None for all."""
        size, loss = self._settings.batch_size, self.loss
        if size is None:
            return None
        shape = (len(self.weights), size)
        return torch.randint(loss.samples, shape, generator=self._random, device=loss.device)

    def _slopes_at(self, weights: Tensor) -> Tensor:
        return self._at(weights, self._rows)[1]

    def _at(self, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        losses, gradients = self.loss.gradients(weights, rows)
        if rows is not None:
            center = self.loss.point.expand_as(weights)
            gradients = gradients - self.loss.gradients(center, rows)[1]
            gradients = gradients + self._center_gradient
        apart = weights - self.loss.point
        return losses, self._scale * gradients + self._settings.localisation * apart

    def _per_loss(self, products: Tensor) -> Tensor:
        return products.sum(1).double() / self._scale

    def _kept(self) -> float:
        """What a step leaves of a momentum."""
        return math.exp(-self.step * self.friction)

    def _noise(self) -> Tensor:
        shape, loss = (len(self.alive), self.loss.size), self.loss
        return torch.randn(shape, generator=self._random, device=loss.device, dtype=loss.dtype)
