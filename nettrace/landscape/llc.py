"""The local learning coefficient: how fast the volume of low loss around weights shrinks with it.

Watanabe 2009, Algebraic Geometry and Statistical Learning Theory; of a network's weights w*, Lau et
al. 2023, arXiv:2308.12108:

    lambda = n beta (<L> - L(w*)),    beta = 1 / ln n,

L the mean loss over n samples in nats, a negative log likelihood, < > the mean over weights w of
density exp(-n beta L(w) - gamma |w - w*|^2 / 2). It is P / 2 for a regular model of P parameters,
and less where the model is singular.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from nettrace.freeze import frozen
from nettrace.landscape.chains import mean_and_error
from nettrace.landscape.dynamics import Dynamics, Settings
from nettrace.landscape.langevin_chains import Langevin
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.weight_loss import WeightLoss, matching
from nettrace.probe import Probe
from nettrace.unwrapped import plain_model

if TYPE_CHECKING:
    import xarray as xr

_SOURCE = "Lau et al. 2023, arXiv:2308.12108; Watanabe 2013, JMLR 14, 867 for beta = 1 / ln n"
#: The share of draws with a lower loss than w* from which on w* is said not to be a minimum.
_BELOW = 0.05


def learning_coefficient(
    model: nn.Module,
    probe: Probe,
    *,
    parameters: str | Sequence[str] = "*",
    per_layer: bool = False,
    n: int | None = None,
    beta: float | None = None,
    dynamics: Dynamics = "underdamped",
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
    """The local learning coefficient of a network at its weights, lambda = n beta (<L> - L(w*)).

    Both losses are of the whole probe, whatever the batches of gradients. With `parameters`, the
    coefficient restricted to some, others as they are (Wang et al. 2024, arXiv:2410.02984). The
    network stays as it is.

    The localisation takes from the estimate: for a quadratic loss of curvatures h_i, the
    coefficient is (1/2) sum_i n beta h_i / (n beta h_i + gamma). What it may have taken at most is
    "localisation_energy". At finite n, singular models of multiplicity m > 1 are estimated low by
    about (m - 1) / ln(n beta).

    Args:
        model: the network; it is evaluated in eval mode.
        probe: the samples, with what tells their losses: negative log likelihoods in nats.
        parameters: names or patterns of the parameters that move, such as "layers.1.*".
        per_layer: whether to give the coefficient restricted to each of these parameters instead.
        n: how many samples the loss stands for; by default those of the probe.
        beta: the inverse temperature; by default 1 / ln n.
        dynamics: this and what follows as in `nettrace.landscape.langevin`.
        localisation: likewise.
        chains: likewise.
        draws: likewise.
        warmup: likewise.
        spacing: likewise.
        batch_size: likewise.
        step_size: likewise.
        friction: likewise.
        seed: likewise.
        memory: likewise.
        seconds: likewise; `per_layer` shares it among the layers.
        progress: likewise.
        to: likewise.

    Returns:
        A Dataset with "learning_coefficient", without the bias of steps and batches, and its
        standard error over chains and along them; "learning_coefficient_uncorrected", as the chains
        have it; "learning_coefficient_of_chain" (chain,); "localisation_energy"
        gamma <|w - w*|^2> / 2; and what `langevin` gives. With `per_layer` all have a first axis
        "layer", the names of parameters. Why the result may be doubted is in the attribute
        "doubts", and warned of: chains that are not stationary, an estimate below zero, losses that
        may not be negative log likelihoods.

    Raises:
        ValueError: if an argument is out of range, the loss is not known or not finite at w*, or no
            parameter matches.
        FloatingPointError: if all chains diverge.
        ImportError: if arviz is missing.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import learning_coefficient
        >>> x = torch.randn(500, 4)
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> probe = nt.Probe(x, model(x).detach())
        >>> found = learning_coefficient(model, probe, chains=50, draws=200, warmup=200)
        >>> abs(float(found.learning_coefficient) - 2) < 0.2
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
    samples = len(probe) if n is None else n
    if not (math.isfinite(samples) and samples > 1):
        raise ValueError(f"expected n= to be more than 1, got {samples!r}")
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"expected beta= to be positive, or None for 1 / ln n, got {beta!r}")
    scale = samples * (1 / math.log(samples) if beta is None else beta)
    plain = plain_model(model)
    with frozen(plain):

        def estimator(patterns: str | Sequence[str]) -> Estimator:
            loss = WeightLoss(plain, probe, patterns, memory)
            return Estimator(Langevin(loss, scale, settings), _of_losses(probe))

        sampler: Estimator | Layers
        if per_layer:
            names = matching(plain, parameters)
            sampler = Layers({name: estimator(escape(name)) for name in names})
        else:
            sampler = estimator(parameters)
        return run(sampler, seconds=seconds, progress=progress, to=to)


class Estimator:
    """What Langevin chains tell of the learning coefficient; a `nettrace.landscape.Sampler`.

    Args:
        chains: that sample the weights.
        doubts: what makes the estimate doubtful in any case.
    """

    title = "learning coefficient"

    def __init__(self, chains: Langevin, doubts: Sequence[str] = ()) -> None:
        self._chains, self._doubts = chains, doubts

    @property
    def share(self) -> float:
        """How many of the steps are done."""
        return self._chains.share

    def settle(self) -> None:
        """Ends the warm-up."""
        self._chains.settle()

    def advance(self) -> None:
        """Makes steps for a tenth of a second."""
        self._chains.advance()

    def result(self) -> xr.Dataset:
        """What the draws that there are tell; see `learning_coefficient`."""
        chains, found = self._chains, self._chains.result()
        energies = chains.scale * chains.excess()
        corrected = energies - chains.scale * chains.bias()
        of_chain = np.full(chains.settings.chains, np.nan)
        if corrected.size:
            of_chain[chains.walkers.alive.numpy()] = corrected.mean(1)
        value = float(found.energy)
        held = chains.settings.localisation / 2 * chains.squared_distance()
        uncorrected, held_by = mean_and_error(energies), mean_and_error(held)
        own = dataset(
            {
                "learning_coefficient": Quantity(
                    value,
                    [],
                    "n beta (mean_loss - center_loss), both of the whole probe",
                    float(found.energy_standard_error),
                    _SOURCE,
                ),
                "learning_coefficient_uncorrected": Quantity(
                    uncorrected[0], [], "with the bias of steps and batches", uncorrected[1]
                ),
                "learning_coefficient_of_chain": Quantity(
                    of_chain, ["chain"], "learning_coefficient of each chain; NaN if it diverged"
                ),
                "localisation_energy": Quantity(
                    held_by[0],
                    [],
                    "gamma <|w - w*|^2> / 2: of a regular model, what the localisation took from "
                    "learning_coefficient; 1 / 2 for each direction that nothing else confines",
                    held_by[1],
                ),
            }
        )
        doubts = [*self._doubts, *filter(None, found.attrs["doubts"].splitlines())]
        below = float((energies < 0).mean()) if energies.size else 0.0
        if value < 0 or below > _BELOW:
            doubts.append(
                f"{below:.0%} of the draws have a lower loss than w*, the lowest by "
                f"{-energies.min() / chains.scale:.3g} nats a sample: w* is no minimum of the loss "
                "on the probe, and the coefficient is defined at minima. Train on, or take samples "
                "that were trained on"
            )
        merged = own.merge(found.drop_vars(["energy", "energy_standard_error"]))
        return merged.assign_attrs(found.attrs, doubts="\n".join(doubts))


class Layers:
    """The coefficient restricted to each of several layers, in turn; a `Sampler`.

    Args:
        estimators: one a layer, by name.
    """

    title = "learning coefficients of layers"

    def __init__(self, estimators: Mapping[str, Estimator]) -> None:
        self._estimators = estimators
        self._failures: dict[str, FloatingPointError] = {}

    @property
    def share(self) -> float:
        """How much is done, in the mean over layers."""
        return sum(map(self._share, self._estimators)) / len(self._estimators)

    def settle(self) -> None:
        """Ends all warm-ups."""
        for estimator in self._estimators.values():
            estimator.settle()

    def advance(self) -> None:
        """Goes on with the layer of which least is done."""
        name = min(self._estimators, key=self._share)
        try:
            self._estimators[name].advance()
        except FloatingPointError as error:
            self._failures[name] = error
            if len(self._failures) == len(self._estimators):
                raise

    def result(self) -> xr.Dataset:
        """The results of all layers, along an axis "layer"."""
        import xarray as xr

        found = {name: estimator.result() for name, estimator in self._estimators.items()}
        doubts = []
        for name, one in found.items():
            said = [str(self._failures[name])] if name in self._failures else []
            said = said or [text for text in one.attrs["doubts"].splitlines() if text]
            doubts += [f"{name}: {text}" for text in said]
        joined = xr.concat(
            list(found.values()),
            xr.DataArray(list(found), dims="layer", name="layer"),
            data_vars="all",
            coords="minimal",
            compat="override",
            join="outer",
            combine_attrs="drop_conflicts",
        )
        return joined.assign_attrs(doubts="\n".join(doubts))

    def _share(self, name: str) -> float:
        return 1.0 if name in self._failures else self._estimators[name].share


def _of_losses(probe: Probe) -> list[str]:
    if probe.losses is None or probe.likelihood is not None:
        return []
    return [
        "the learning coefficient is one only if losses= gives negative log likelihoods in nats: "
        "if it does, say which by likelihood="
    ]
