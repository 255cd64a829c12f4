"""How much the loss rises between two networks, along the straight line from one to the other.

    barrier = max_t [ L(w(t)) - ((1 - t) L(w0) + t L(w1)) ],    w(t) = (1 - t) w0 + t w1

(Frankle et al. 2020, arXiv:1912.05671, section 2, with the mean of the ends for the base line;
Entezari et al. 2022, arXiv:2110.06296, equation 1). It is zero where the line lies in one linearly
connected low region; also where the loss is high all the way, so look at the loss too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nettrace.freeze import frozen
from nettrace.landscape.matching import By, match
from nettrace.landscape.points import Points, coarse_to_fine, means, quantities
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.states import Source, state_of
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.probe import Probe

if TYPE_CHECKING:
    import xarray as xr

BatchNorm = Literal["interpolated", "estimated"]

_STATISTICS: dict[BatchNorm, str] = {
    "interpolated": "buffers, running statistics of batch normalisation among them, interpolated "
    "as weights are",
    "estimated": "batch normalisation with the probe's own statistics at each point, the ends "
    "included",
}


def barrier(
    model: nn.Module,
    probe: Probe,
    other: Source,
    *,
    matched: bool | By = False,
    points: int = 25,
    batch_norm: BatchNorm = "interpolated",
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """The loss on the line between two networks, and how far it lies above that of the ends.

    Networks are in eval mode, and left exactly as they were. All that is of real or complex numbers
    is interpolated, frozen parameters and buffers too; integers are the first network's.

    Args:
        model: the network at t = 0.
        probe: the samples, with targets.
        other: the one at t = 1: a network of the same architecture, its state or a checkpoint.
        matched: whether to permute the other network's hidden units first, so that they are as
            close as may be to this one's (`nettrace.landscape.match`): by "weights" where True, or
            by "activations".
        points: how many, evenly spaced from t = 0 to 1. The barrier is the largest at these.
        batch_norm: "interpolated" running statistics, so that the ends are the two networks; or
            "estimated" anew from the probe's samples at each point (as REPAIR does, Jordan et al.
            2023, arXiv:2211.08403, section 3), since the variance of features collapses between
            networks and statistics of the ends then do not fit: that raises barriers. Each
            point's variances are those of one batch of all samples, divided by their number;
            samples of one point then depend on each other, of which standard errors know nothing.
        seed: of the search for permutations.
        seconds: how long it may take, the search for permutations not included.
        progress: whether to show a progress bar.
        to: a file for the result.

    Returns:
        On "t": "loss", in nats a sample, with "error_rate" where the outputs are logits of classes,
        and "excess" of the loss over the line between the ends. "barrier", its maximum, at
        "barrier_at"; "error_barrier", that of the error rate; "convexity_defect", the largest
        height of the loss above the largest convex function below it, which is zero where the loss
        is convex along the line, and at least the barrier. Standard errors are over the probe's
        samples; those of differences are of the differences of each sample, and know nothing of
        the choice of the largest. Of points that are not done, or not finite, nothing is known,
        and the largest is that of the others; NaN before both ends are done.

    Raises:
        CheckpointError: if the other network does not fit.
        ValueError: if an argument is out of range, or the loss is not known, or not finite at an
            end; or as by `match`.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import barrier
        >>> model = torch.nn.Bilinear(1, 1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> ones = torch.ones(4, 1)
        >>> probe = nt.Probe((ones, ones), losses=lambda out, _: (out[:, 0] ** 2 - 1) ** 2)
        >>> found = barrier(model, probe, {"weight": -model.weight.detach()})
        >>> float(found["barrier"]), float(found["barrier_at"])
        (1.0, 0.5)
    """
    if matched not in (True, False, *get_args(By)):
        raise ValueError(
            f"expected matched= to be True, False, 'weights' or 'activations', got {matched!r}"
        )
    said = ""
    if matched:
        aligned = match(
            model, probe, other, by="weights" if matched is True else matched, seed=seed
        )
        before, other = aligned.distance[0], aligned.state
        said = (
            f", hidden units of w1 permuted in {len(aligned.permutations)} groups to match w0 by "
            f"{aligned.by}, at a distance of {before:.4g} before"
        )
    with frozen(model):
        sampler = Barrier(model, probe, other, points=points, batch_norm=batch_norm, said=said)
        return run(sampler, seconds=seconds, progress=progress, to=to)


class Barrier(Points):
    """The loss at points of a line between two networks: first its ends, then coarse to fine.

    Args:
        model: the network at t = 0, frozen.
        probe: the samples.
        other: the one at t = 1.
        points: how many.
        batch_norm: what is done about running statistics.
        said: more on what the other network is.
    """

    title = "loss between two networks"

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        other: Source,
        *,
        points: int = 25,
        batch_norm: BatchNorm = "interpolated",
        said: str = "",
    ) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 3:
            raise ValueError(f"expected points= to be at least 3, got {points!r}")
        if batch_norm not in get_args(BatchNorm):
            raise ValueError(
                f"expected batch_norm= 'interpolated' or 'estimated', got {batch_norm!r}"
            )
        state = state_of(model, other)
        if batch_norm == "estimated":
            _use_batch_statistics(model)
        order = coarse_to_fine([points])
        first = np.array([0, points - 1])
        loss = WeightLoss(model, probe, None)
        super().__init__(loss, np.concatenate([first, order[~np.isin(order, first)]]))
        self._end = loss.flat(state)
        self._t = np.linspace(0, 1, points)
        self._rows: npt.NDArray[np.float64] | None = None
        self._about: dict[str, str | float] = {
            "model": type(model).__name__,
            "samples": loss.samples,
            "convention": f"w(t) = (1 - t) w0 + t w1{said}; {_STATISTICS[batch_norm]}",
        }
        names = [name for name, _ in model.named_parameters()]
        ends = loss.split(self._end), loss.split(loss.point)
        apart = [(ends[0][name] - ends[1][name]).abs().double().norm() for name in names]
        self._about["distance"] = float(torch.stack(apart).norm())

    def weights(self, point: int) -> Tensor:
        """(P,) of a point of the line."""
        one, other, t = self.loss.point, self._end, float(self._t[point])
        if t in (0, 1):
            return other if t else one
        # What is the same at both ends stays so, be it infinite, as in masks.
        return torch.where(one == other, one, torch.lerp(one, other, t))

    def keep(self, points: npt.NDArray[np.int64], rows: npt.NDArray[np.float64]) -> None:
        """Keeps what each sample makes of each point.

        Raises:
            ValueError: if the loss at an end is not finite.
        """
        if self._rows is None:
            self._rows = np.full((len(self._t), *rows.shape[1:]), np.nan)
        self._rows[points] = rows
        for name, end in [("the network's own weights", 0), ("the other network", -1)]:
            if end % len(self._t) in points and not np.isfinite(loss := self._rows[end, 0].mean()):
                raise ValueError(
                    f"the mean loss of {name} is {loss}: a barrier is that between finite ones"
                )

    def result(self) -> xr.Dataset:
        """The loss and the error rate along the line, and what they rise by."""
        found = self._rows
        if found is None:
            found = np.full((len(self._t), 1, self.loss.samples), np.nan)
        rows = np.moveaxis(found, 1, 0)  # (R, T, N)
        values, errors = means(rows)
        over = means(rows[0] - _chords(self._t, rows[0]))
        parts = {
            **quantities(values, errors, ["t"]),
            "excess": Quantity(
                over[0],
                ["t"],
                "loss minus (1 - t) of that at t = 0 and t of that at t = 1",
                over[1],
            ),
            **self._risen("barrier", "loss", rows[0], _chords(self._t, rows[0])),
        }
        if len(rows) > 1:
            above = _chords(self._t, rows[1])
            parts |= self._risen("error_barrier", "error rate", rows[1], above)
        return dataset(
            {**parts, **self._defect(rows[0])},
            {"t": self._t},
            doubts=self.doubts(values[0]),
            **self._about,
        )

    def _risen(
        self,
        name: str,
        what: str,
        rows: npt.NDArray[np.float64],
        chords: npt.NDArray[np.float64],
    ) -> dict[str, Quantity]:
        """The largest rise over the line between the ends, and where it is."""
        value, error, place = _largest(rows - chords)
        at = np.nan if place is None else self._t[place]
        return {
            name: Quantity(
                value,
                [],
                f"largest excess of the {what} over that interpolated between the ends",
                error,
                "Frankle et al. 2020, arXiv:1912.05671; Entezari et al. 2022, arXiv:2110.06296",
            ),
            f"{name}_at": Quantity(at, [], f"t at which {name} is taken"),
        }

    def _defect(self, rows: npt.NDArray[np.float64]) -> Mapping[str, Quantity]:
        value, error, _ = _largest(rows - _below(self._t, rows))
        return {
            "convexity_defect": Quantity(
                value,
                [],
                "largest height of the loss above its lower convex envelope along the line",
                error,
            )
        }


def _chords(t: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(T, N) of each sample, what lies between its values at the ends."""
    found: npt.NDArray[np.float64] = (1 - t)[:, None] * rows[0] + t[:, None] * rows[-1]
    return found


def _below(t: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(T, N) of each sample, what lies between its values where the mean's lower hull has corners.

    So that its mean is the lower convex envelope of the means, and differences of samples have
    their errors.
    """
    means = rows.mean(1)
    corners: list[int] = []
    for i in np.flatnonzero(np.isfinite(means)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (means[b] - means[a]) * (t[i] - t[a]) < (means[i] - means[a]) * (t[b] - t[a]):
                break
            corners.pop()
        corners.append(int(i))
    found = np.full_like(rows, np.nan)
    for a, b in pairwise(corners):
        share = ((t[a : b + 1] - t[a]) / (t[b] - t[a]))[:, None]
        found[a : b + 1] = (1 - share) * rows[a] + share * rows[b]
    return found


def _largest(rows: npt.NDArray[np.float64]) -> tuple[float, float, int | None]:
    """The largest mean of rows (T, N), its standard error, and where it is; NaN where all are."""
    values, errors = means(rows)
    if np.isnan(values[[0, -1]]).any():
        return np.nan, np.nan, None
    place = int(np.nanargmax(values))
    return float(values[place]), float(errors[place]), place


def _use_batch_statistics(model: nn.Module) -> None:
    """Lets batch normalisation forget its running statistics, within `frozen`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module._buffers["running_mean"] = module._buffers["running_var"] = None
