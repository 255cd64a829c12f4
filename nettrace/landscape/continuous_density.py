"""How much of a prior of weights has which loss: the density of states of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from nettrace.estimators import generator
from nettrace.freeze import frozen
from nettrace.landscape.continuous import ContinuousWalkers
from nettrace.landscape.descent import Descent, fine_edges
from nettrace.landscape.looks import Looks, Observable
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
Means: TypeAlias = dict[str, tuple[Array, Array]]
_SOURCE = "Wang and Landau 2001, Phys. Rev. Lett. 86, 2050; Berg and Neuhaus 1992, ibid. 68, 9"
#: To which logarithm of the prior's mass losses are found by default.
_DEPTH = -40.0
#: Copies that go down, at least.
_COPIES = 64
#: How far above the lowest loss that was found bins begin by default, in bins.
_ABOVE = 0.01
#: How many products of a weight and a sample a piece of work has, about, and how many moves; and
#: after how many moves observables are looked at.
_PIECE, _MOST, _SWEEP = 10**8, 64, 4


def loss_density(
    model: nn.Module,
    probe: Probe,
    *,
    prior: str = "gaussian",
    scale: float | Mapping[str, float] | None = None,
    range: tuple[float, float] | None = None,
    bins: int = 60,
    spacing: str = "log",
    parameters: str | Sequence[str] = "*",
    observables: Mapping[str, Observable] | None = None,
    walkers: int = 128,
    windows: int = 1,
    error: float = 0.05,
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """S(E): how much of a prior of weights has which loss, down to the rarest.

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
            the loss falls no further, to the highest of some drawn from the prior.
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
        On the dimension "loss" (the geometric middle of each bin, or the arithmetic one for
        linear spacing; "loss_low" and "loss_high" are its edges): "entropy", S = ln dP / d ln E (of
        linear spacing ln dP / dE), the logarithm of the share of the prior in each bin over the
        width of the bin ("bin_width"), so that exp(S) times the width adds up to 1 together with
        what is out of range; NaN where nothing was found. Its standard error, infinite where one
        group of walkers alone has been. "entropy_without" (group, loss), the same without each
        group of walkers, for errors of what follows from S, and so for observables.
        "log_share_below" and "log_share_above": the logarithm of the share of the prior below and
        above the range. Microcanonical averages: "norm", the length of the weights that vary,
        "overlap", the cosine between them and the network's own, and the observables.

    Raises:
        ValueError: if an argument is out of range, no weights have a loss in `range`, the loss
            is not finite at the network's own weights or at most of those drawn from the prior, or
            has no logarithm.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import loss_density
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
        >>> probe = nt.Probe(x, y, likelihood="gaussian")  # the loss is w^2 / 2
        >>> found = loss_density(model, probe, scale=1.0, range=(1e-3, 1e-1), bins=4)
        >>> bins = np.log(found["loss"].values)
        >>> slope = float(np.polyfit(bins, found["entropy"], 1)[0])
        >>> abs(slope - 0.5) < 0.1  # d / 2
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
        parameters: str | Sequence[str],
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
        self._looks = Looks(model, self.loss, parameters, observables or {}).found
        self._windows, self._error, self._seed = windows, error, seed
        self._walkers = walkers
        self._settled = False
        work = self.loss.size * self.loss.samples * walkers
        # By sizes alone, for the same numbers whatever else the machine does.
        self._piece = max(1, min(_MOST, _PIECE // work))
        self.descent = Descent(
            *(self.loss, self.prior, self._spacing, max(walkers, _COPIES), walkers),
            low=low,
            depth=_DEPTH,
            piece=self._piece,
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
        if self._settled:
            self.sampling.settle()
        self.walkers.stage = self.sampling.stage
        if self.walkers.stage != "exploring" and int(self.sampling.seen.sum()) < 2:
            raise ValueError(
                f"all losses that were found lie in one bin of {self._bins} of "
                f"range={self._limits}: choose a narrower range, or more bins"
            )
        self.sampling.advance()

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
            # What is below is a bin too, and a minimum alone is one that nobody finds.
            at, following = self._spacing.edges(lowest, descent.highest, self._bins)[:2]
            lowest = float(self._spacing.losses(at + _ABOVE * (following - at)))
            limits = lowest, descent.highest
        elif limits[0] >= descent.highest or (descent.stalled and descent.lowest >= limits[1]):
            raise self._not_visited()
        self._limits = limits
        edges = fine_edges(self._spacing.edges(*limits, self._bins), descent.levels)
        self._edges = edges
        self.walkers = ContinuousWalkers(
            *(self.loss, self.prior, self._spacing, edges, descent.levels),
            *(descent.x, descent.losses, generator(self._seed, "walkers")),
        )
        self.sampling = WangLandau(
            self.walkers,
            len(edges) + 1,
            observables=self._looks,
            sweep=_SWEEP,
            piece=self._piece,
            title=self.title,
            windows=self._windows,
            error=self._error,
            seed=self._seed,
        )

    def result(self) -> xr.Dataset:
        """What was found so far.

        Raises:
            ValueError: if walkers have been to all losses that they find, and none is in range.
        """
        outer = self._outer()
        count = len(outer) - 1
        if self.sampling is None:
            entropy, without = np.full(count + 2, np.nan), np.empty((0, count + 2))
            means: Means = {}
        else:
            edges = self._edges
            middle = np.concatenate([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
            place = np.searchsorted(outer, middle, side="right")
            entropy, without, means = joined(
                *self.sampling.entropies(), self.sampling.means(), place, count + 2
            )
            if not len(without):  # averages have no errors either
                means = {name: (mean, each[:0]) for name, (mean, each) in means.items()}
            if self.sampling.stage == "done" and not np.isfinite(entropy[1:-1]).any():
                raise self._not_visited()
        errors = jackknife(without) if len(without) else np.full(count + 2, np.nan)
        width = float(outer[1] - outer[0])
        axis = "loss's logarithm" if self._spacing.logarithmic else "loss"
        inside = slice(1, -1)
        centres = self._spacing.losses((outer[1:] + outer[:-1]) / 2)
        ends = self._spacing.losses(outer)
        quantities = {
            "entropy": Quantity(
                _seen(entropy - np.log(width))[inside],
                ("loss",),
                f"ln of the share of the prior by the {axis}, in nats",
                _seen(errors, entropy)[inside],
                _SOURCE,
            ),
            "loss_low": Quantity(ends[:-1], ("loss",), "where each bin begins"),
            "loss_high": Quantity(ends[1:], ("loss",), "where each bin ends"),
            "entropy_without": Quantity(
                _seen(without - np.log(width))[:, inside],
                ("group", "loss"),
                "entropy without each group of walkers",
            ),
        }
        for name, at, said in [
            ("below", 0, f"below {ends[0]:g}"),
            ("above", -1, f"above {ends[-1]:g}"),
        ]:
            quantities[f"log_share_{name}"] = Quantity(
                entropy[at], (), f"ln of the share of the prior with a loss {said}", errors[at]
            )
        for name, (mean, each) in means.items():
            what = f"{name}, averaged over weights of such a loss"
            error = jackknife(each) if len(each) else mean * np.nan
            quantities[name] = Quantity(mean[inside], ("loss",), what, error[inside])
            quantities[f"{name}_without"] = Quantity(
                each[:, inside], ("group", "loss"), f"{name} without each group of walkers"
            )
        return dataset(
            quantities,
            {"loss": centres},
            doubts=self._doubts(entropy, errors),
            **self._about,
            bin_width=width,
            stage="descent" if self.sampling is None else self.sampling.stage,
            groups=len(without),
            moves=0 if self.sampling is None else self.sampling.visits,
        )

    def _outer(self) -> Array:
        """(bins + 1,) edges of the bins that were asked for."""
        limits = self._limits
        if limits is None:  # before the descent is over
            levels = self.descent.levels
            low, high = (levels[-1].at, levels[0].at) if len(levels) > 1 else (0.0, 1.0)
            return np.linspace(low, high, self._bins + 1)
        return self._spacing.edges(*limits, self._bins)

    def _not_visited(self) -> ValueError:
        return ValueError(
            f"no weights with a loss in range={self._limits} were found: losses of the prior go "
            f"from {self.descent.lowest:.6g} to {self.descent.highest:.6g} or so"
        )

    def _doubts(self, entropy: Array, errors: Array) -> list[str]:
        sampling, descent = self.sampling, self.descent
        found = [] if sampling is None else sampling.own_doubts()
        known = errors[np.isfinite(errors)]
        if sampling is None or sampling.stage not in ("multicanonical", "done") or not len(known):
            found.append(
                "time was over before errors could be told: entropies, if any, are a first guess"
            )
        elif sampling.stage != "done":
            found.append(f"errors are up to {known.max():.2g}, more than asked for")
        if sampling is not None:
            empty = int((~np.isfinite(entropy[1:-1])).sum())
            if empty:
                found.append(
                    f"no weights were found in {empty} of {self._bins} bins: the lowest loss seen "
                    f"is {min(descent.lowest, self.walkers.lowest):.6g}"
                )
            if sampling.stage != "exploring" and sampling.unmixed:
                found.append(
                    f"walkers crossed the range {sampling.unmixed[2]:.2g} times each on average: "
                    "errors may be too small"
                )
            losses = self._spacing.losses(self._edges)
            seldom = sampling.seldom.nonzero()[:, 0].tolist()
            sides = [f"below {losses[i]:g}" for i in seldom if i < len(losses) / 2][-1:]
            sides += [f"above {losses[i - 1]:g}" for i in seldom if i >= len(losses) / 2][:1]
            found += [
                f"walkers came back from losses {side} a few times only: shares there, and all "
                "others if these are large, may be off by more than errors say"
                for side in sides
            ]
            if sampling.left_out.any():
                found.append(
                    "some losses that were met are not counted: they are rare, or walkers hardly "
                    "come back from there"
                )
        if descent.levels and descent.not_finite:
            found.append(
                f"the loss is not finite at {descent.not_finite:.2g} of the weights drawn from the "
                "prior, which do not count"
            )
        return found


def joined(
    entropy: Array, without: Array, means: Means, place: npt.NDArray[np.int64], count: int
) -> tuple[Array, Array, Means]:
    """What is known of bins (B,), for bins made up of them.

    Args:
        entropy: (B,)
        without: (G, B)
        means: averages (B,) by name, and without each group (G, B).
        place: (B,) in which of the wider bins each is.
        count: of wider bins.

    Returns:
        The same for the wider bins, whose averages are weighted by their parts' shares.
    """
    all_ = np.concatenate([entropy[None], without])
    parts = [place == number for number in range(count)]
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.stack([np.logaddexp.reduce(all_[:, part], axis=1) for part in parts], 1)
        shares = np.exp(all_ - np.where(np.isfinite(total), total, 0.0)[:, place])
        found = {}
        for name, (mean, each) in means.items():
            values = np.concatenate([mean[None], each])
            sums = np.where(shares > 0, shares * values, 0.0)
            wide = np.stack([sums[:, part].sum(1) for part in parts], 1)
            wide = np.where(np.isfinite(total), wide, np.nan)
            found[name] = wide[0], wide[1:]
    return total[0], total[1:], found


def _seen(values: Array, by: Array | None = None) -> Array:
    """NaN where nothing was found."""
    return np.where(np.isneginf(values if by is None else by), np.nan, values)


def check_continuous(model: nn.Module) -> None:
    """Refuses networks of whole numbers.

    Raises:
        ValueError: if a parameter is one of integers or quantised, or there is none at all.
    """
    for name, p in model.named_parameters():
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"the parameter {name!r} is of {p.dtype}: weights of whole numbers do not move "
                "through a continuum; see density_of_states for networks of discrete weights"
            )
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__:
            raise ValueError(
                f"{name or 'the network'} is a quantised {type(module).__name__}, whose weights do "
                "not move through a continuum: take the network before it is quantised"
            )
