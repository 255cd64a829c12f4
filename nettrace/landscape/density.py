"""The density of states of networks with discrete weights: how many make so many errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.landscape.discrete import DiscreteNetwork, check_labels
from nettrace.landscape.discrete_walkers import DiscreteWalkers
from nettrace.landscape.multicanonical import jackknife
from nettrace.landscape.result import Quantity, check_names, dataset, spans
from nettrace.landscape.run import run
from nettrace.landscape.wang_landau import WangLandau

if TYPE_CHECKING:
    import xarray as xr

#: From walkers to a number (W,) for each; `weights` and `outputs` of the walkers tell it.
Observable: TypeAlias = Callable[[DiscreteWalkers], Tensor]
_SOURCE = "Wang and Landau 2001, Phys. Rev. Lett. 86, 2050; Mele et al. 2024, arXiv:2409.18683"


def density_of_states(
    network: DiscreteNetwork,
    inputs: Tensor,
    labels: Tensor,
    *,
    energies: tuple[int, int] | None = None,
    observables: Mapping[str, Observable] | None = None,
    error: float = 0.05,
    walkers: int = 256,
    windows: int = 1,
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """S(E) = ln of the number of networks that put E of the patterns in the wrong class.

    By flat-histogram sampling with many walkers at once: see `nettrace.landscape.wang_landau`.

    Args:
        network: which networks there are.
        inputs: (P, inputs) the patterns.
        labels: (P,) their classes, -1 or 1.
        energies: the least and the most errors that count, both included; None for all. Other
            networks are then not visited, and only ratios of numbers of states are known: their
            sum over the range is 1.
        observables: what else to average over all networks of the same energy, by name: functions
            from the walkers to a number (W,) for each, such as `wrong_share`, `overlap` and
            `margin` make them.
        error: the standard error of S(E) to stop at, for all energies that most groups of walkers
            have seen; 0.05 means numbers of states to 5 %.
        walkers: W, how many networks move at once.
        windows: into how many windows energies are divided, between which walkers are exchanged:
            for ranges of hundreds; in a short one they cost more than they bring. Where networks
            of an energy are connected by those of higher ones alone, walkers wait at the edges of
            windows. It must divide the number of walkers.
        seed: of all that is drawn.
        seconds: how long it may take; without, until errors are as asked for. Half of it may go by
            until errors can be told.
        progress: whether to show a progress bar.
        to: a file to write the result to, as it comes.

    Returns:
        A Dataset with dimension "energy": "entropy" S(E) in nats, NaN where no network was seen,
        and "entropy_standard_error", infinite where one group of walkers alone has been; "visits";
        "left_out", 1 where there are networks that are hardly met, or from which walkers do not
        come back, and which are not counted;
        averages of observables, with errors. "entropy_without" (group, energy) is S(E) without each
        group of walkers, and so for observables: from these, errors of whatever follows from S are
        found by the jackknife, as `canonical` does.
        Attributes say how it came about: among them "moves", "flips_per_second", "stage" and
        "moved_by" (Numba, Triton or, for networks of other than signs, torch).

    Raises:
        ValueError: if shapes do not fit, labels are not -1 and 1, or the range is empty, not within
            0 to P, or was never visited.

    Example:
        >>> import torch
        >>> from nettrace.landscape import density_of_states, perceptron
        >>> x = torch.randn(9, 11, generator=torch.Generator().manual_seed(0))
        >>> found = density_of_states(perceptron(11), x, torch.ones(9), error=0.1)
        >>> round(float(np.exp(found.entropy).sum())) == 2**11
        True
    """
    sampler = DensityOfStates(
        network,
        inputs,
        labels,
        energies=energies,
        observables=observables,
        error=error,
        walkers=walkers,
        windows=windows,
        seed=seed,
    )
    return run(sampler, seconds=seconds, progress=progress, to=to)


class DensityOfStates(WangLandau):
    """The sampler behind `density_of_states`; its arguments are the same."""

    def __init__(
        self,
        network: DiscreteNetwork,
        inputs: Tensor,
        labels: Tensor,
        *,
        energies: tuple[int, int] | None = None,
        observables: Mapping[str, Observable] | None = None,
        error: float = 0.05,
        walkers: int = 256,
        windows: int = 1,
        seed: int = 0,
    ) -> None:
        patterns = len(inputs)
        allowed, self._range = None, energies
        if energies is not None:
            low, high = energies
            if not 0 <= low < high <= patterns:
                raise ValueError(
                    f"expected energies= to be the least and the most of 0 to {patterns} errors, "
                    f"two different numbers, got {energies}"
                )
            allowed = torch.zeros(patterns + 1, dtype=torch.bool)
            allowed[low : high + 1] = True
        self.network = network
        check_names(observables or {}, ("entropy", "visits", "left_out", "energy", "group"))
        if walkers < 2:
            raise ValueError(
                f"expected two walkers or more, got {walkers}: errors are told by how far "
                "independent walkers differ"
            )
        copies = DiscreteWalkers(network, inputs, labels, walkers, generator(seed, "walkers"))
        self._moved_by = copies.moved_by
        super().__init__(
            copies,
            patterns + 1,
            allowed=allowed,
            error=error,
            windows=windows,
            observables=observables,
            sweep=network.weights,
            piece=max(16, min(2**17 // walkers, 2**26 // (walkers * patterns))),
            seed=seed,
        )

    def result(self) -> xr.Dataset:
        """What was found so far.

        Raises:
            ValueError: if the range of energies was never visited.
        """
        if not self.visits:
            raise ValueError(
                f"energies={self._range} was not visited: the walkers are at "
                f"{sorted(set(self.walkers.energies.tolist()))[:8]} after their time; there may be "
                "no such networks, or more time is needed"
            )
        total = self.network.weights * math.log(len(self.network.levels))
        entropy, without = self.entropies()
        if self._range is None:
            entropy, without = entropy + total, without + total
            convention = "ln of the number of networks with so many errors"
        else:
            convention = "ln of the share of networks with so many errors, of those in the range"
        errors = jackknife(without) if len(without) else np.full_like(entropy, np.nan)
        nothing = np.isneginf(entropy)
        quantities = {
            "entropy": Quantity(
                np.where(nothing, np.nan, entropy),
                ("energy",),
                convention + ", in nats",
                np.where(nothing, np.nan, errors),
                _SOURCE,
            ),
            "entropy_without": Quantity(
                np.where(np.isneginf(without), np.nan, without),
                ("group", "energy"),
                "entropy without each group of walkers",
            ),
            "visits": Quantity(self.production_visits, ("energy",), "moves that ended there"),
            "left_out": Quantity(
                self.left_out.numpy().astype(np.int32),
                ("energy",),
                "1 where there are networks that are not counted",
            ),
        }
        for name, (mean, each) in self.means().items():
            what = f"{name}, averaged over networks with so many errors"
            apart = jackknife(each) if len(each) else np.full_like(mean, np.nan)
            quantities[name] = Quantity(mean, ("energy",), what, apart)
            quantities[f"{name}_without"] = Quantity(
                each, ("group", "energy"), f"{name} without each group of walkers"
            )
        return dataset(
            quantities,
            {"energy": np.arange(len(entropy))},
            doubts=self._doubts(errors),
            sampler="Wang-Landau and multicanonical, single changes of weights",
            stage=self.stage,
            walkers=len(self.walkers.energies),
            moved_by=self._moved_by,
            groups=len(without),
            moves=self.visits,
            flips_per_second=self.visits / self.seconds,
            weights=self.network.weights,
            log_f=self.history[-1][1] if self.history else math.nan,
        )

    def _doubts(self, errors: npt.NDArray[np.float64]) -> list[str]:
        found = self.own_doubts()
        known = errors[np.isfinite(errors)]
        if not len(known):
            found.append(
                f"it ended while {self.stage}, before walkers had gone around: S(E) is a first "
                "guess and has no errors; give it more time, or a range of energies"
            )
        elif self.stage != "done":
            found.append(
                f"errors of S(E) are up to {known.max():.2g}, more than asked for: give it more "
                "time"
            )
        if self.stage == "multicanonical" and self.unmixed:
            low, high, times = self.unmixed
            found.append(
                f"walkers crossed the window of energies {low} to {high} {times:.2g} times on "
                "average, which is less than once"
            )
        left = spans(self.left_out.nonzero()[:, 0].tolist())
        if left:
            found.append(
                f"networks with {left} errors exist, but are not counted: they are few, or walkers "
                "hardly come back from there; more time may help"
            )
        seldom = spans(self.seldom.nonzero()[:, 0].tolist())
        if seldom:
            found.append(
                f"walkers came back from networks with {seldom} errors a few times only: S(E) may "
                "be off by more there than its errors say"
            )
        alone = np.isinf(errors)
        if alone.any():
            found.append(
                "one group of walkers alone has seen energies "
                + spans(np.flatnonzero(alone).tolist())
            )
        return found


def wrong_share(inputs: Tensor, labels: Tensor) -> Observable:
    """The share of other patterns (P, inputs) that are in the wrong class: the test error.

    Raises:
        ValueError: if labels are other than -1 and 1.
    """
    check_labels(inputs, labels)

    def look(walkers: DiscreteWalkers) -> Tensor:
        outputs = walkers.outputs(inputs)
        return ((outputs < 0) ^ (labels < 0)).double().mean(1)

    return look


def margin(inputs: Tensor, labels: Tensor) -> Observable:
    """The least of label times output over patterns (P, inputs).

    Raises:
        ValueError: if labels are other than -1 and 1.
    """
    check_labels(inputs, labels)

    def look(walkers: DiscreteWalkers) -> Tensor:
        return (walkers.outputs(inputs) * labels).amin(1)

    return look


def overlap(reference: list[Tensor]) -> Observable:
    """The cosine of the angle between free weights and those of another network, 0 without any.

    Args:
        reference: (outputs, inputs) the other's weights, a tensor a layer.

    Raises:
        TypeError: if it is one tensor.
    """
    if isinstance(reference, Tensor):
        raise TypeError("expected reference= to be a list, a tensor for each layer: [weights]")

    def look(walkers: DiscreteWalkers) -> Tensor:
        products, own, other = [], [], []
        for weights, fixed, layer in zip(
            walkers.weights, reference, walkers.network.layers, strict=True
        ):
            free = layer.isnan()
            w, r = weights.double()[:, free], fixed.double()[free]
            products.append(w @ r)
            own.append(w.square().sum(1))
            other.append(r.square().sum())
        lengths = torch.stack(own).sum(0).sqrt() * torch.stack(other).sum().sqrt()
        return torch.stack(products).sum(0) / lengths.where(lengths > 0, 1.0)

    return look
