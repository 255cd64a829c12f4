"""Langevin sampling of a network's weights around where they are, by many chains at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from nettrace.freeze import frozen
from nettrace.landscape.chains import Chains, mean_and_error, require_arviz
from nettrace.landscape.dynamics import Dynamics, LangevinWalkers, Settings
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.stiffness import FIRST
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.probe import Probe
from nettrace.unwrapped import plain_model

if TYPE_CHECKING:
    import xarray as xr

#: Seconds that a piece takes.
_PIECE = 0.1
#: After how many steps the curvature is looked at, once the step size is fixed.
_RARELY = 50
#: What h^2 k, or e k, may be, and by how much temperatures may differ from 1, in standard errors
#: too.
_LONG = {"underdamped": 1.0, "sgld": 0.4}
_HEAT, _SURE = 0.1, 4.0

_VEHTARI = "Vehtari et al. 2021, Bayesian Analysis 16, 667"


def langevin(
    model: nn.Module,
    probe: Probe,
    *,
    parameters: str | Sequence[str] = "*",
    dynamics: Dynamics = "underdamped",
    beta: float = 1.0,
    n: int | None = None,
    localisation: float = 1.0,
    chains: int = 4,
    draws: int = 2000,
    warmup: int = 1000,
    spacing: int | None = None,
    batch_size: int | None = None,
    step_size: float | None = None,
    friction: float | None = None,
    seed: int = 0,
    memory: int = 2**30,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """Samples weights w from exp(-n beta L(w) - gamma |w - w*|^2 / 2) around the network's own, w*.

    L is the mean loss on the probe in nats a sample. The network stays as it is.

    Args:
        model: the network; it is evaluated in eval mode.
        probe: the samples, with what tells their losses.
        parameters: names or patterns of the parameters that move, such as "layers.1.*".
        dynamics: "underdamped" or "sgld"; see `nettrace.landscape.dynamics`.
        beta: the inverse temperature; 1 for the posterior of n samples.
        n: how many samples the energy stands for; by default those of the probe.
        localisation: gamma, in units of 1 / weight^2, which keeps chains near w*.
        chains: how many, independent; all begin at w*.
        draws: of each chain, at which losses are noted.
        warmup: steps before the first, in which the step size is chosen.
        spacing: steps from one draw to the next; by default 1, or with batches as many as take
            about as long as a gradient of the whole probe does.
        batch_size: how many samples, drawn anew at each step and chain, gradients are of; by
            default all. Losses are of the whole probe always.
        step_size: h, or for "sgld" e as in w <- w - (e/2) grad U + sqrt(e) N(0, 1); by default such
            that with k the largest curvature that chains meet, h^2 k = 0.25, or e k = 0.04.
        friction: of momenta, per unit of time; by default 0.05 / h, with batches 1 / h.
        seed: of all that is random.
        memory: bytes that copies of the network may take together.
        seconds: how long it may take; the warm-up then ends at half of it.
        progress: whether to show a progress bar.
        to: a netCDF file for the result, which is written every few seconds.

    Returns:
        A Dataset with "loss" (chain, draw); "mean_loss" and, with what it rises by from that at w*
        in units of the temperature, "energy", both without the bias of steps and batches, which is
        "step_size_bias"; "kinetic_temperature" <p^2> (underdamped) and
        "configurational_temperature" <(w - w*) . grad U> / P, in units of the temperature;
        "squared_distance" |w - w*|^2; "r_hat" and "effective_samples" of the losses; and
        "curvature", the largest that chains met. Means have "_standard_error". Chains that
        diverged are NaN, and named in the attribute "diverged". Why the result may be doubted is in
        the attribute "doubts", and warned of.

    Raises:
        ValueError: if an argument is out of range, the loss is not known or not finite at w*, or no
            parameter matches.
        FloatingPointError: if all chains diverge.
        ImportError: if arviz is missing.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import langevin
        >>> x = torch.randn(100, 3)
        >>> model = torch.nn.Linear(3, 1)
        >>> found = langevin(model, nt.Probe(x, model(x).detach()), localisation=100.0)
        >>> abs(float(found.configurational_temperature) - 1) < 0.1
        True
    """
    settings = Settings(
        dynamics,
        chains,
        draws,
        warmup,
        spacing,
        batch_size,
        step_size,
        friction,
        localisation,
        seed,
    )
    for name, value in {"beta": beta, "n": n}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"expected {name}= to be positive, got {value!r}")
    plain = plain_model(model)
    with frozen(plain):
        loss = WeightLoss(plain, probe, parameters, memory)
        sampler = Langevin(loss, (n or loss.samples) * beta, settings)
        return run(sampler, seconds=seconds, progress=progress, to=to)


class Langevin:
    """Chains that sample weights; a `nettrace.landscape.Sampler`.

    Args:
        loss: of the weights; its network is frozen meanwhile.
        scale: n beta, by which the mean loss is multiplied.
        settings: how.

    Raises:
        ImportError: if arviz is missing.
    """

    title = "Langevin"

    def __init__(self, loss: WeightLoss, scale: float, settings: Settings) -> None:
        require_arviz()
        self.settings, self.scale = settings, scale
        self.walkers = LangevinWalkers(loss, scale, settings)
        self._steps, self._drawn, self._warmup = 0, 0, settings.warmup
        self._spacing = settings.spacing or 1
        if settings.spacing is None and settings.batch_size is not None:
            self._spacing = max(1, round(loss.samples / (2 * settings.batch_size)))
        self._seen: dict[str, npt.NDArray[np.float64]] = {}
        self._beginning = FIRST

    @property
    def share(self) -> float:
        """How many of the steps are done."""
        return self._steps / (self._warmup + self.settings.draws * self._spacing)

    def settle(self) -> None:
        """Ends the warm-up."""
        if self._beginning or self._steps < self._warmup:
            self._beginning, self._warmup = 0, self._steps
            self.walkers.settle()

    def advance(self) -> None:
        """Makes steps for a tenth of a second."""
        end = time.monotonic() + _PIECE
        while self.share < 1:
            self._step()
            if time.monotonic() >= end:
                break

    def _step(self) -> None:
        walkers, sampled = self.walkers, self._steps - self._warmup
        if self._beginning:
            walkers.begin()
            self._beginning -= 1
            if not self._beginning and not self._warmup:
                walkers.settle()
            return
        if sampled < 0:
            walkers.adapt(self._steps, self._warmup)
        elif sampled % _RARELY == 0:
            walkers.look()
        walkers.move()
        lost = walkers.lost()
        if bool(lost.any()):
            self._without(lost)
        self._steps += 1
        if self._steps == self._warmup:
            walkers.settle()
        elif sampled >= 0 and (sampled + 1) % self._spacing == 0:
            self._draw()

    def _without(self, lost: Tensor) -> None:
        walkers = self.walkers
        if self._steps < self._warmup and self.settings.step_size is None:
            walkers.restart(lost)
            return
        walkers.drop(lost)
        if not len(walkers.alive):
            raise FloatingPointError(
                f"all {self.settings.chains} chains diverged: after {self._steps} steps, with "
                f"size {walkers.step:.3g} at last, losses, gradients or weights are not finite: "
                "take a smaller step_size=, or a larger localisation="
            )

    def _draw(self) -> None:
        walkers = self.walkers
        losses, slopes, excess = walkers.seen()
        apart = walkers.weights - walkers.loss.point
        found = {
            "loss": losses,
            "excess": excess,
            "virial": (apart * slopes).mean(1),
            "squared_distance": apart.square().sum(1),
        }
        if self.settings.dynamics == "underdamped":
            found["kinetic"] = walkers.momenta.square().mean(1)
        for name, values in found.items():
            if name not in self._seen:
                shape = (self.settings.chains, self.settings.draws)
                self._seen[name] = np.full(shape, np.nan)
            self._seen[name][walkers.alive, self._drawn] = values.double().cpu()
        self._drawn += 1

    def excess(self) -> npt.NDArray[np.float64]:
        """(chains alive, draws) the mean loss less that at w*, as it is."""
        return self._of("loss") - self.walkers.center_loss

    def bias(self) -> npt.NDArray[np.float64]:
        """(chains alive, draws) what has the mean of that by which steps and batches raise it."""
        return self._of("excess")

    def squared_distance(self) -> npt.NDArray[np.float64]:
        """(chains alive, draws) |w - w*|^2."""
        return self._of("squared_distance")

    def result(self) -> xr.Dataset:
        """What the draws that there are tell; see `langevin`."""
        walkers, settings, center = self.walkers, self.settings, self.walkers.center_loss
        corrected = self.excess() - self.bias()
        losses = Chains.of(corrected)
        mean, error = losses.mean, losses.standard_error
        temperatures = {"configurational": mean_and_error(self._of("virial"))}
        conventions = {
            "configurational": "<(w - w*) . grad U> / P, by the virial theorem",
            "kinetic": "<p^2>, at the end of steps, where in equilibrium it is 1 - h^2 k / 4 along "
            "a direction of curvature k",
        }
        quantities = {
            "loss": Quantity(
                self._all("loss"), ["chain", "draw"], "mean over the probe, nats a sample"
            ),
            "center_loss": Quantity(center, [], "the loss at w*"),
            "mean_loss": Quantity(center + mean, [], "mean over chains and draws", error),
            "step_size_bias": Quantity(
                _mean(self.bias()),
                [],
                "what was taken off the mean of loss for the length of steps and the noise of "
                "batches; exact for quadratic energies, but for orders above h^2 k",
            ),
            "energy": Quantity(
                self.scale * mean,
                [],
                "n beta (mean_loss - center_loss), in units of the temperature",
                self.scale * error,
            ),
        }
        if settings.dynamics == "underdamped":
            temperatures["kinetic"] = mean_and_error(self._of("kinetic"))
        for kind, (value, its_error) in temperatures.items():
            quantities[f"{kind}_temperature"] = Quantity(
                value, [], f"{conventions[kind]}; 1 in equilibrium", its_error
            )
        distance, its_error = mean_and_error(self.squared_distance())
        quantities |= {
            "squared_distance": Quantity(distance, [], "mean of |w - w*|^2", its_error),
            "r_hat": Quantity(
                losses.r_hat, [], "of the loss; split, rank-normalised", source=_VEHTARI
            ),
            "effective_samples": Quantity(
                losses.effective, [], "of the loss; bulk effective sample size", source=_VEHTARI
            ),
            "curvature": Quantity(
                walkers.stiffness.highest, [], "k, the largest of the energy that chains met"
            ),
        }
        of_step = "e" if settings.dynamics == "sgld" else "h"
        quantities["step_size"] = Quantity(walkers.step, [], of_step)
        lost = sorted(set(range(settings.chains)) - set(walkers.alive.tolist()))
        doubts = [*losses.doubts, *_heats(temperatures)]
        if lost:
            doubts.insert(
                0,
                f"chains {', '.join(map(str, lost))} of {settings.chains} diverged and are left "
                f"out: take a smaller step_size= than {walkers.step:.3g}",
            )
        if walkers.length > _LONG[settings.dynamics]:
            doubts.append(
                f"the step is long, its product with the curvature {walkers.length:.2g}: take a "
                f"smaller step_size= than {walkers.step:.3g}, or a longer warmup= to find it"
            )
        return dataset(
            quantities,
            {"chain": range(settings.chains), "draw": range(self._drawn)},
            doubts=doubts,
            dynamics=settings.dynamics,
            inverse_temperature=self.scale,
            localisation=settings.localisation,
            friction=walkers.friction,
            warmup=self._warmup,
            spacing=self._spacing,
            batch_size=settings.batch_size or walkers.loss.samples,
            samples=walkers.loss.samples,
            parameters=walkers.loss.size,
            diverged=" ".join(map(str, lost)),
            seed=settings.seed,
        )

    def _all(self, name: str) -> npt.NDArray[np.float64]:
        empty = np.full((self.settings.chains, 0), np.nan)
        return self._seen.get(name, empty)[:, : self._drawn]

    def _of(self, name: str) -> npt.NDArray[np.float64]:
        """Of the chains that have not diverged."""
        found: npt.NDArray[np.float64] = self._all(name)[self.walkers.alive.numpy()]
        return found


def _mean(draws: npt.NDArray[np.float64]) -> float:
    return float(draws.mean()) if draws.size else float("nan")


def _heats(temperatures: dict[str, tuple[float, float]]) -> list[str]:
    found = []
    for kind, (value, error) in temperatures.items():
        off = value - 1
        if abs(off) < max(_HEAT, _SURE * error) or not np.isfinite(error):
            continue
        why = (
            "steps or the noise of batches heat the chains: take a smaller step_size=, or a larger "
            "batch_size="
            if off > 0
            else "chains have not spread along the directions that hardly anything but the "
            "localisation holds: take a longer warmup= and more draws=, or a larger localisation="
        )
        if off > 0 or kind == "configurational":
            found.append(f"the {kind} temperature is {value:.3g}, not 1: {why}")
    return found
