"""How many solutions lie around a given one: wide minima among networks with discrete weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.landscape.discrete import DiscreteNetwork
from nettrace.landscape.discrete_walkers import DiscreteWalkers
from nettrace.landscape.multicanonical import jackknife
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.walkers import Walkers
from nettrace.landscape.wang_landau import WangLandau

if TYPE_CHECKING:
    import xarray as xr

_SOURCE = "Baldassi et al. 2015, Phys. Rev. Lett. 115, 128101"


def local_entropy(
    network: DiscreteNetwork,
    inputs: Tensor,
    labels: Tensor,
    around: Sequence[Tensor],
    *,
    errors: int = 0,
    error: float = 0.05,
    walkers: int = 256,
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """S(d) = ln of the number of networks with few errors in which d weights are other ones.

    Walkers begin at the given network, and go only where there are few errors: S(d) counts what is
    connected with it by changes of single weights.

    Args:
        network: which networks there are.
        inputs: (P, inputs) the patterns.
        labels: (P,) their classes, -1 or 1.
        around: (outputs, inputs) the weights of each layer of the given network.
        errors: how many errors a network may make, at most.
        error: the standard error of S(d) to stop at.
        walkers: W, how many networks move at once.
        seed: of all that is drawn.
        seconds: how long it may take.
        progress: whether to show a progress bar.
        to: a file to write the result to, as it comes.

    Returns:
        A Dataset with dimension "distance", d from 0 to N: "entropy" and its standard error, NaN
        where no network was found, and "all", ln of the number of all networks at that distance.

    Raises:
        ValueError: if shapes do not fit, or the given network makes more errors or is none of those
            that there are.
    """
    if len(around) != len(network.layers) or any(
        w.shape != layer.shape for w, layer in zip(around, network.layers, strict=False)
    ):
        shapes = [tuple(layer.shape) for layer in network.layers]
        raise ValueError(
            f"expected weights of shapes {shapes}, got {[tuple(w.shape) for w in around]}"
        )
    for weights, layer in zip(around, network.layers, strict=True):
        free = weights.double()[layer.isnan()]
        if not bool(torch.isin(free, torch.tensor(network.levels, dtype=torch.float64)).all()):
            raise ValueError(f"expected weights to be among the levels {network.levels}")
    sampler = LocalEntropy(
        network, inputs, labels, around, errors=errors, error=error, walkers=walkers, seed=seed
    )
    return run(sampler, seconds=seconds, progress=progress, to=to)


class LocalEntropy(WangLandau):
    """The sampler behind `local_entropy`; its arguments are the same."""

    def __init__(
        self,
        network: DiscreteNetwork,
        inputs: Tensor,
        labels: Tensor,
        around: Sequence[Tensor],
        *,
        errors: int,
        error: float,
        walkers: int,
        seed: int,
    ) -> None:
        self._network, self._errors = network, errors
        given = [
            torch.where(layer.isnan(), w.double(), layer)[None]
            for w, layer in zip(around, network.layers, strict=True)
        ]
        nearby = _Nearby(
            DiscreteWalkers(
                network, inputs, labels, walkers, generator(seed, "walkers"), weights=given
            ),
            errors,
        )
        super().__init__(
            nearby,
            network.weights + 1,
            error=error,
            sweep=network.weights,
            piece=max(16, min(256, 2**24 // (walkers * len(inputs)))),
            seed=seed,
            title="local entropy",
        )

    def result(self) -> xr.Dataset:
        """What was found so far."""
        entropy, without = self.entropies()
        # There is one network at distance 0.
        entropy, without = entropy - entropy[0], without - without[:, :1]
        nothing = np.isneginf(entropy) | np.isnan(entropy)
        errors = jackknife(without) if len(without) else np.full_like(entropy, np.nan)
        size, other = self._network.weights, len(self._network.levels) - 1
        every = [math.log(math.comb(size, d)) + d * math.log(other) for d in range(size + 1)]
        convention = f"ln of the number of networks with {self._errors} errors or fewer, in nats"
        doubts = self.own_doubts()
        if self.stage == "done" and nothing[1:].all():
            doubts.append("no other network is connected with the given one by single changes")
        elif self.stage != "done":
            doubts.append(f"it ended while {self.stage}, before errors were as small as asked for")
        return dataset(
            {
                "entropy": Quantity(
                    np.where(nothing, np.nan, entropy),
                    ("distance",),
                    convention,
                    np.where(nothing, np.nan, errors),
                    _SOURCE,
                ),
                "entropy_without": Quantity(
                    np.where(np.isneginf(without), np.nan, without),
                    ("group", "distance"),
                    "entropy without each group of walkers",
                ),
                "all": Quantity(
                    every,
                    ("distance",),
                    "ln of the number of networks",
                ),
            },
            {"distance": np.arange(size + 1)},
            doubts=doubts,
            sampler="Wang-Landau and multicanonical in the distance",
            stage=self.stage,
            moves=self.visits,
        )


class _Nearby(Walkers):
    """Walkers whose energy is the distance to where they begin, and who make few errors."""

    def __init__(self, walkers: DiscreteWalkers, errors: int) -> None:
        made = int(walkers.energies[0])
        if made > errors:
            raise ValueError(
                f"the given network makes {made} errors, and errors={errors} are allowed: give one "
                "that solves the task, or allow more"
            )
        self._walkers, self._errors = walkers, errors
        self._reference = [levels.flatten().clone() for levels in walkers.levels]
        self.energies = torch.zeros(len(walkers.energies), dtype=torch.int64)

    def propose(self, entropy: Tensor) -> tuple[Tensor, None]:
        """(W,) the distances; -1 where there would be too many errors."""
        errors, _ = self._walkers.propose(entropy)
        change = self._walkers.change
        reference = self._reference[change.layer].index_select(0, change.cell)
        before = self._walkers.levels[change.layer].view(-1).index_select(0, change.cell)
        farther = (change.level != reference).long() - (before != reference).long()
        self._proposed = torch.where(errors <= self._errors, self.energies + farther.cpu(), -1)
        return self._proposed, None

    def accept(self, which: Tensor) -> None:
        """Makes the proposed changes of some copies (W,)."""
        self._walkers.accept(which)
        self.energies = torch.where(which, self._proposed, self.energies)
