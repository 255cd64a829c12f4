"""The loss along lines and planes through a network's weights (Li et al. 2018, arXiv:1712.09913).

A slice shows a vanishing part of the landscape; along eigenvectors of the Hessian and principal
components of a trajectory at least one that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nettrace.freeze import frozen
from nettrace.landscape.directions import Direction, Normalise, directions
from nettrace.landscape.points import Points, coarse_to_fine, means, quantities
from nettrace.landscape.result import Quantity, dataset
from nettrace.landscape.run import run
from nettrace.landscape.states import Source, state_of
from nettrace.landscape.weight_loss import WeightLoss
from nettrace.probe import Probe

if TYPE_CHECKING:
    import xarray as xr

#: How far to go both ways, or from where to where.
Extent: TypeAlias = float | tuple[float, float]

_AXES = ("x", "y")
#: By how much of its length a slice goes beyond a trajectory.
_MARGIN = 0.1


def slice_1d(
    model: nn.Module,
    probe: Probe,
    *,
    direction: Direction = "random",
    extent: Extent | None = None,
    points: int = 51,
    normalise: Normalise | None = None,
    trajectory: Sequence[Source] | None = None,
    parameters: str | Sequence[str] = "*",
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """The loss along a line through a network's weights, w + x d.

    The network is in eval mode, its buffers stay as they are, and it is left exactly as it was.
    Points are evaluated coarse to fine from the network's own weights on; those that there was no
    time for are NaN.

    Args:
        model: the network.
        probe: the samples, with targets.
        direction: d, "random", "hessian" (its eigenvector of the largest eigenvalue), "gradient",
            "trajectory" (the first principal component of its weights); or a vector (P,) of all
            that varies, in the order of named_parameters() and complex numbers as pairs; or a
            mapping of parameters' names to tensors, of which those left out are zero.
        extent: from where to where x goes; a number for as far both ways. By default 1 where d is
            filter-normalised or given; for a trajectory's components what the trajectory takes and
            a tenth more; else a tenth of the norm of the weights.
        points: how many, evenly spaced; of an odd number over a symmetric extent one is the
            network itself.
        normalise: "filter" (Li et al. 2018: each filter of d gets the norm of the weights' filter,
            biases and parameters of normalisations none), "unit" (length one, so that second
            derivatives along eigenvectors are eigenvalues) or "none". By default "filter" for
            random directions, "none" for given ones, else "unit".
        trajectory: networks, states or checkpoints of which the weights' coordinates are wanted,
            in their order.
        parameters: names or patterns of those that vary; d has nothing along others.
        seed: of a random direction.
        seconds: how long it may take, the search for directions not included.
        progress: whether to show a progress bar.
        to: a file for the result.

    Returns:
        On the dimension "x": "loss", in nats a sample, and "error_rate", where the outputs are
        logits of classes, each with the standard error of its mean over the probe's samples; these
        errors are those of samples that all points have in common, so that differences between
        points are much better known. On "direction": "direction_norm"; "eigenvalue" and
        "explained_variance", where there is such. On "snapshot": "trajectory" (its coordinates, by
        direction) and "trajectory_distance" (how far it is from the slice).

    Raises:
        ValueError: if an argument is out of range, or the loss is not known or not finite at the
            network's own weights.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import slice_1d
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> probe = nt.Probe(torch.ones(4, 1), model(torch.ones(4, 1)).detach())
        >>> found = slice_1d(model, probe, direction="hessian", extent=2.0, points=5)
        >>> [round(value, 4) for value in found["loss"].values.tolist()]
        [2.0, 0.5, 0.0, 0.5, 2.0]
    """
    with frozen(model):
        sampler = Slice(
            *(model, probe, [direction], [extent], [points]),
            normalise=normalise,
            trajectory=trajectory,
            parameters=parameters,
            seed=seed,
        )
        return run(sampler, seconds=seconds, progress=progress, to=to)


def slice_2d(
    model: nn.Module,
    probe: Probe,
    *,
    directions: Direction | tuple[Direction, Direction] = "random",
    extent: Extent | tuple[Extent, Extent] | None = None,
    points: int | tuple[int, int] = 25,
    normalise: Normalise | None = None,
    trajectory: Sequence[Source] | None = None,
    parameters: str | Sequence[str] = "*",
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """The loss on a plane through a network's weights, w + x d1 + y d2.

    Args:
        model: the network.
        probe: the samples, with targets.
        directions: two of what `slice_1d` takes; or one name for the first two of a kind: two
            random ones, which are not made orthogonal, the eigenvectors of the two largest
            eigenvalues, the first two principal components of a trajectory.
        extent: as in `slice_1d` for both axes, a number for as far all ways; or a pair, each for
            one axis.
        points: how many along each axis, or along both.
        normalise: as in `slice_1d`; this and what follows.
        trajectory: likewise.
        parameters: likewise.
        seed: likewise.
        seconds: likewise.
        progress: likewise.
        to: likewise.

    Returns:
        As `slice_1d`, on the dimensions "x" and "y".

    Raises:
        ValueError: as `slice_1d`, or if the two directions are parallel.
    """
    wanted = [directions] * 2 if isinstance(directions, str) else list(directions)
    if len(wanted) != 2:
        raise ValueError(f"expected two directions, or one name for two, got {len(wanted)}")
    extents = list(extent) if isinstance(extent, tuple) else [extent] * 2
    counts = list(points) if isinstance(points, tuple) else [points] * 2
    if len(extents) != 2 or len(counts) != 2:
        raise ValueError(
            f"expected extent= and points= for both axes or a pair, got {extent!r} and {points!r}"
        )
    with frozen(model):
        sampler = Slice(
            *(model, probe, wanted, extents, counts),
            normalise=normalise,
            trajectory=trajectory,
            parameters=parameters,
            seed=seed,
        )
        return run(sampler, seconds=seconds, progress=progress, to=to)


class Slice(Points):
    """The loss on a grid of points of a line or a plane, coarse to fine.

    Args:
        model: the network, frozen.
        probe: the samples.
        wanted: one direction or two.
        extents: for each, how far to go.
        counts: for each, how many points.
        normalise: how directions are normalised.
        trajectory: weights of which the coordinates are wanted.
        parameters: names or patterns of those that vary.
        seed: of random directions.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        wanted: Sequence[Direction],
        extents: Sequence[Extent | None],
        counts: Sequence[int],
        *,
        normalise: Normalise | None = None,
        trajectory: Sequence[Source] | None = None,
        parameters: str | Sequence[str] = "*",
        seed: int = 0,
    ) -> None:
        for count in counts:
            if isinstance(count, bool) or not isinstance(count, int) or count < 2:
                raise ValueError(f"expected points= to be at least 2, got {count!r}")
        super().__init__(WeightLoss(model, probe, parameters), coarse_to_fine(counts))
        self.title = "loss along a line" if len(wanted) == 1 else "loss on a plane"
        path = None
        if trajectory is not None:
            states = [self.loss.flat(state_of(model, one)) for one in trajectory]
            if not states:
                raise ValueError("expected a trajectory of one snapshot or more, got none")
            path = torch.stack(states)
        self._about: dict[str, str | float] = {
            "model": type(model).__name__,
            "weights": self.loss.size,
            "samples": self.loss.samples,
            "seed": seed,
        }
        self._along = directions(model, probe, self.loss, wanted, normalise, path, seed)
        self._place, self._off = self._projected(path)
        self._grid = [
            np.linspace(*_ends(extent, self._default(axis)), count)
            for axis, (extent, count) in enumerate(zip(extents, counts, strict=True))
        ]
        self._coordinates = np.stack(np.meshgrid(*self._grid, indexing="ij"), -1).reshape(
            -1, len(counts)
        )
        self._values: npt.NDArray[np.float64] | None = None

    def weights(self, point: int) -> Tensor:
        """(P,) of a point of the grid."""
        loss, along = self.loss, self._along
        steps = torch.tensor(self._coordinates[point]).to(along.vectors)
        return loss.point + steps @ along.vectors

    def keep(self, points: npt.NDArray[np.int64], rows: npt.NDArray[np.float64]) -> None:
        """Keeps means and standard errors."""
        if self._values is None:
            self._values = np.full((2, rows.shape[1], len(self._order)), np.nan)
        self._values[:, :, points] = np.swapaxes(np.stack(means(rows)), 1, 2)

    def result(self) -> xr.Dataset:
        """The loss and the error rate on the grid, and what is known of the directions."""
        axes = _AXES[: len(self._grid)]
        found = self._values
        if found is None:
            found = np.full((2, 1, len(self._order)), np.nan)
        shaped = found.reshape(2, found.shape[1], *map(len, self._grid))
        return dataset(
            {**quantities(shaped[0], shaped[1], axes), **self._directions()},
            dict(zip(axes, self._grid, strict=True)) | {"direction": list(axes)},
            doubts=[*self._along.doubts, *self.doubts(found[0, 0])],
            **self._about,
            convention="w + x d1"
            + " + y d2" * (len(axes) == 2)
            + "; "
            + "; ".join(f"d{i + 1}: {said}" for i, said in enumerate(self._along.said)),
        )

    def _directions(self) -> dict[str, Quantity]:
        along = self._along
        norms = along.vectors.double().norm(dim=1)
        found = {"direction_norm": Quantity(norms.cpu(), ["direction"], "length of each direction")}
        if not along.eigenvalues.isnan().all():
            found["eigenvalue"] = Quantity(
                along.eigenvalues, ["direction"], "of the Hessian, where it is an eigenvector"
            )
        if not along.explained.isnan().all():
            found["explained_variance"] = Quantity(
                along.explained,
                ["direction"],
                "share of the variance of the trajectory's weights about their mean, where it is "
                "a principal component",
            )
        if self._place is not None and self._off is not None:
            found["trajectory"] = Quantity(
                self._place,
                ["snapshot", "direction"],
                "coordinates of the point of the slice that is closest to each snapshot",
            )
            found["trajectory_distance"] = Quantity(
                self._off, ["snapshot"], "distance of each snapshot from the slice, as continued"
            )
        return found

    def _projected(
        self, path: Tensor | None
    ) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.float64] | None]:
        """The coordinates (T, D) of a path, and its distances (T,) from the slice."""
        if path is None:
            return None, None
        away = (path - self.loss.point).double()
        along = self._along.vectors.double()
        place = torch.linalg.lstsq(along.T, away.T).solution.T
        off = (away - place @ along).norm(dim=1)
        return place.cpu().numpy(), off.cpu().numpy()

    def _default(self, axis: int) -> tuple[float, float]:
        """From where to where by default."""
        along = self._along
        if along.kinds[axis] == "trajectory" and self._place is not None:
            low, high = min(0.0, self._place[:, axis].min()), max(0.0, self._place[:, axis].max())
            more = _MARGIN * (high - low)
            return float(low - more), float(high + more)
        if along.kinds[axis] in ("random", "given") and along.how[axis] != "unit":
            return -1.0, 1.0
        size = 0.1 * float(self.loss.point.norm()) / float(along.vectors[axis].norm())
        return (-size, size) if size > 0 else (-1.0, 1.0)


def _ends(extent: Extent | None, default: tuple[float, float]) -> tuple[float, float]:
    if extent is None:
        return default
    low, high = extent if isinstance(extent, tuple) else (-extent, extent)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(
            f"expected extent= to be a positive number or from low to high, got {extent!r}"
        )
    return float(low), float(high)
