"""How much of a prior of weights has which loss: the density of states of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nettrace.estimators import generator
from nettrace.freeze import frozen
from nettrace.landscape.continuous import ContinuousWalkers
from nettrace.landscape.descent import Descent, fine_edges
from nettrace.landscape.multicanonical import jackknife
from nettrace.landscape.prior import prior_of
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.spacing import Spacing
from nettrace.landscape.wang_landau import WangLandau
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.probe import Probe

if TYPE_CHECKING:
    import xarray as xr

Array = npt.NDArray[np.float64]
#: What is looked at beside the loss: the samples of a probe, or a function of tensors (W, ...) of
#: all parameters by name, that gives (W,).
Observable: TypeAlias = Probe | Callable[[Mapping[str, Tensor]], Tensor]
Look: TypeAlias = Callable[[ContinuousWalkers], Tensor]
#: To which logarithm of the prior's mass losses are found by default.
_DEPTH = -40.0
#: Copies that go down, at least.
_COPIES = 64
#: How many products of a weight and a sample a piece of work has, about, and how many moves; and
#: after how many moves observables are looked at.
_PIECE, _MOST, _SWEEP = 10**8, 256, 4


def loss_density(
    model: nn.Module,
    probe: Probe,
    *,
    prior: str = "gaussian",
    scale: float | Mapping[str, float] | None = None,
    range: tuple[float, float] | None = None,
    bins: int = 60,
    spacing: str = "log",
    parameters: str | list[str] = "*",
    observables: Mapping[str, Observable] | None = None,
    walkers: int = 64,
    windows: int = 1,
    error: float = 0.05,
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """The share of a prior's weights that have a loss, by loss: S(E) = ln dP / dE.

    Walkers move through the weights so that all losses are seen alike, however rare they are, by
    `WangLandau` with `ContinuousWalkers`. They begin on the way of a `Descent` from the prior.

    The network is in eval mode, its buffers stay as they are, and it is left exactly as it was.

    Args:
        model: the network.
        probe: the samples, with targets.
        prior: "gaussian" about zero, or "sphere" for all weights of one norm alike.
        scale: the standard deviation of weights: one for all, or by names or patterns of
            parameters; by default 1 / sqrt(inputs of a unit) for weights and biases of layers, 1
            for other parameters. Of a sphere the radius; by default the norm of the network's own
            weights.
        range: from which loss to which. By default from where the prior's mass below is e^-40, or
            the loss falls no further, to the highest of 64 losses drawn from the prior.
        bins: how many of losses.
        spacing: "log" for bins even in the logarithm of the loss, "linear" for bins even in it,
            for which it may be negative.
        parameters: names or patterns of those that vary; others stay as they are.
        observables: by name, of what to take averages at given loss: a probe, for "<name>_loss" and
            where its outputs are logits of classes "<name>_error_rate"; or a function from a
            mapping of the parameters' names to tensors (W, ...), of W copies, to (W,).
        walkers: how many copies of the network move at once.
        windows: how many windows of losses walkers are confined to, and exchange; divides them.
        error: the standard error of S that is enough, in each bin.
        seed: of what is drawn.
        seconds: how long it may take.
        progress: whether to show a progress bar.
        to: a file for the result.

    Returns:
        On the dimension "loss" (the geometric middle of each bin, the arithmetic one for linear
        spacing; "loss_low" and "loss_high" are its edges): "entropy", the logarithm of the share of
        the prior with a loss in the bin over the width of the bin, so that exp(entropy) times the
        widths adds up to 1 with what is out of range; -inf where nothing was found.
        "entropy_without" (group, loss) is the same without each group of walkers, for jackknifed
        errors of what is made of it. "log_mass_below" and "log_mass_above": the logarithm of the
        share of the prior below and above the range. Microcanonical averages: "norm", the length
        of the weights that vary, "overlap", the cosine between them and the network's own, and
        the observables. All have standard errors, by the jackknife over groups of walkers.

    Raises:
        ValueError: if an argument is out of range, no weights have a loss in `range`, the loss
            is not finite at the network's own weights or at most of those drawn from the prior, or
            has no logarithm.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import loss_density
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> probe = nt.Probe(torch.ones(1, 1), torch.zeros(1, 1))  # the loss is w^2 / 2
        >>> found = loss_density(model, probe, scale=1.0, range=(1e-3, 1e-1), bins=4)
        >>> slope = found["entropy"].diff("loss") / np.log(found["loss"]).diff("loss")
        >>> abs(float(slope.mean()) + 0.5) < 0.1  # d/2 - 1
        True
    """
    with frozen(model):
        sampler = LossDensity(
            *(model, probe, prior, scale, range, bins, spacing, parameters, observables),
            walkers=walkers,
            windows=windows,
            error=error,
            seed=seed,
        )
        return run(sampler, seconds=seconds, progress=progress, to=to)


class LossDensity:
    """A sampler for `loss_density`, with its arguments; the network is to be frozen."""

    title = "density of the loss"

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        prior: str,
        scale: float | Mapping[str, float] | None,
        limits: tuple[float, float] | None,
        bins: int,
        spacing: str,
        parameters: str | list[str],
        observables: Mapping[str, Observable] | None,
        *,
        walkers: int,
        windows: int,
        error: float,
        seed: int,
    ) -> None:
        for name, number, least in [("bins", bins, 1), ("walkers", walkers, 2)]:
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"expected {name}= to be {least} or more, got {number!r}")
        self._spacing = Spacing(spacing)
        self._limits, self._bins = limits, bins
        low = None
        if limits is not None:
            low = float(self._spacing.edges(*limits, bins)[0])
        check_continuous(model)
        self.loss = WeightLoss(model, probe, parameters)
        self.prior = prior_of(model, self.loss, prior, scale)
        self._spacing.of(self.loss(self.loss.point[None]))
        self._looks = looks(model, self.loss, parameters, observables or {})
        self._options = {"windows": windows, "error": error, "seed": seed}
        self._walkers = walkers
        self._settled = False
        self.descent = Descent(
            *(self.loss, self.prior, self._spacing, max(walkers, _COPIES), walkers),
            low=low,
            depth=_DEPTH,
            seed=seed,
        )
        self.sampling: WangLandau | None = None
        self._about: dict[str, str | float] = {
            "model": type(model).__name__,
            "weights": self.loss.size,
            "samples": self.loss.samples,
            "prior": prior,
            "walkers": walkers,
            "windows": windows,
            "seed": seed,
            "spacing": spacing,
        }

    @property
    def share(self) -> float:
        """How much is done."""
        return 0.0 if self.sampling is None else self.sampling.share

    def advance(self) -> None:
        """Goes a level down, or makes some moves."""
        if self.sampling is None:
            self.descent.advance()
            if self.descent.done or (self._settled and len(self.descent.levels) > 1):
                self._begin()
            return
        self.walkers.stage = self.sampling.stage
        self.sampling.advance()
        if self._settled:
            self.sampling.settle()

    def settle(self) -> None:
        """Ends what only prepares."""
        self._settled = True
        if self.sampling is not None:
            self.sampling.settle()

    def _begin(self) -> None:
        """Lets walkers go, from where the descent has been."""
        descent, limits = self.descent, self._limits
        if limits is None:
            lowest = float(self._spacing.losses(np.array(descent.levels[-1].at)))
            limits = lowest, descent.highest
        elif descent.stalled and descent.lowest >= limits[1]:
            raise ValueError(
                f"no weights with a loss in the range {limits} were found: the lowest was "
                f"{descent.lowest:.6g}"
            )
        self._limits = limits
        edges = fine_edges(self._spacing.edges(*limits, self._bins), descent.levels)
        self._edges = edges
        self.walkers = ContinuousWalkers(
            *(self.loss, self.prior, self._spacing, edges, descent.levels),
            *(descent.x, descent.losses, generator(self._options["seed"], "walkers")),
        )
        work = self.loss.size * self.loss.samples * self._walkers
        self.sampling = WangLandau(
            self.walkers,
            len(edges) + 1,
            observables=self._looks,
            sweep=_SWEEP,
            piece=max(1, min(_MOST, _PIECE // work)),
            title=self.title,
            **self._options,
        )


def check_continuous(model): ...
def looks(model, loss, parameters, observables): return {}
