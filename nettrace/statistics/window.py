"""Statistics of how the weights have fluctuated over the last few hundred updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from nettrace.diffusion import Displacements, displacements
from nettrace.flatness import width
from nettrace.fluctuations import Halves, Modes, directions, factor, halves, modes
from nettrace.operator import PerLayer
from nettrace.second_order import CurvatureOperator
from nettrace.statistics.look import Unavailable
from nettrace.statistics.second_order import CurvatureStatistics
from nettrace.window import WeightWindow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Updating:
    """How the weights were updated during a window.

    Args:
        rate: eta, the same throughout.
        momentum: mu, the same throughout.
        batch: B, samples in an update, NaN if that is not known.
        epoch: M, updates that make up a shuffled epoch, None where samples are independent or it is
            not known.
        population: N of which the epoch is made, None if it is not known.
        length: T, snapshots in the window.
        stride: updates from one to the next.
        decay: by what factor weights decay beside the gradient.
        rule: the name of the optimizer.
        departs: in what it departs from plain momentum, if it does.
    """

    rate: float
    momentum: float
    batch: float
    epoch: int | None
    population: int | None
    length: int
    stride: int
    decay: float
    rule: str
    departs: str | None


@dataclass(frozen=True)
class Widths:
    """How far the loss grows to e times its value along the principal directions.

    Args:
        right: (K,) along p_i.
        left: (K,) along -p_i.
        least: the loss at the mean weights.
        evaluations: of the loss, in all.
    """

    right: Tensor
    left: Tensor
    least: float
    evaluations: int


class WindowStatistics(CurvatureStatistics):
    """Those of a window of weights, and of the loss along the directions in which they moved."""

    #: The statistics that need a window.
    of_window: ClassVar[frozenset[str]] = frozenset(
        "window window_factors window_modes window_halves window_directions "
        "window_size_error window_displacements "
        "window_widths window_curvatures window_fisher window_noise window_updating".split()
    )
    #: Principal directions along which the landscape is followed, at most.
    most_directions = 200

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """As of a look; and of which updates the window is, where one is needed."""
        needs = set(needs)
        found = super().about(needs)
        if needs & self.of_window and self._window is not None:
            steps = self._window.steps
            found["window"] = (
                f"{self._window.kind} of {len(steps)} updates from step {steps[0]} to {steps[-1]}, "
                f"{self._window.size} numbers of {len(self._window.names)} parameters"
            )
        return found

    @property
    def window(self) -> WeightWindow:
        """The last updates' weights; not copied.

        Raises:
            Unavailable: if there are none, or not as many as make up a window.
        """
        window: WeightWindow | None = self._window
        if window is None:
            raise Unavailable(
                "there is no window of weights: pass Tracer(..., window=WeightWindow(...)), and "
                "call the tracer after every update, due or not"
            )
        if window.reason is not None:
            raise Unavailable(window.reason)
        if not window.is_full:
            gap = (
                f"; it began anew after a gap of {window.gap} updates: see every one of them, or "
                f"pass stride={window.gap} to the WeightWindow, or to WeightFluctuations"
                if window.gap
                else ": it fills while the training goes on, and anew where that is resumed, as "
                "checkpoints do not hold it; pass WeightWindow(length=...) for a "
                "shorter one"
            )
            raise Unavailable(f"the window has {window.count} of {window.length} snapshots{gap}")
        return window

    @cached_property
    def window_factors(self) -> PerLayer:
        """By parameter, T rows with the inner products of its snapshots less their mean."""
        window = self.window
        if window.kind == "moments":
            raise Unavailable(
                "the window keeps moments alone: name fewer parameters by WeightWindow(parameters="
                "...), or raise its memory, for snapshots or a sketch"
            )
        found = {}
        for name in window.names:
            try:
                found[name] = factor(window.rows(name)).cpu()
            except ValueError as error:
                raise ValueError(f"of {name!r}, {error}") from None
        return found

    @cached_property
    def window_modes(self) -> Modes:
        """Variances and coordinates along the principal directions of the window."""
        return modes(self.window_factors.values())

    @cached_property
    def window_halves(self) -> Halves:
        """Whether the halves of the window tell the same."""
        return halves(self.window_modes.coordinates)

    @cached_property
    def window_displacements(self) -> Displacements:
        """Mean squared displacements within the window."""
        return displacements(self.window_modes.coordinates.numpy())

    @property
    def window_size_error(self) -> float:
        """The standard error of the total variation that comes of sketching, relative to it.

        Sums over buckets have signs that are independent of each other's.
        """
        window = self.window
        if window.kind != "sketch":
            return 0.0
        total = square = 0.0
        for name, size in window.sizes.items():
            variances = window.rows(name).double().var(0, correction=0)
            total += float(variances.sum())
            if len(variances) < size:
                square += float(variances.square().sum())
        return math.sqrt(square) / total if total > 0 else 0.0

    @cached_property
    def window_directions(self) -> PerLayer:
        """By parameter, (K, k) its share of the first principal directions, which are orthonormal.

        Raises:
            Unavailable: if the window has no snapshots.
        """
        window, found = self.window, self.window_modes
        if window.kind != "snapshots":
            raise Unavailable(
                f"the window keeps a {window.kind}, in which there are no directions: name fewer "
                "parameters by WeightWindow(parameters=...), or raise its memory, for snapshots"
            )
        return {
            name: directions(window.rows(name), found, self.most_directions)
            for name in window.names
        }

    @cached_property
    def window_widths(self) -> Widths:
        """How far the loss grows to e times its value from the mean weights, along directions."""
        loss, window = self.wide_loss, self.window
        rows = self._flattened(loss.layers, loss.point)
        mean = loss.point.clone()
        for name in window.names:
            own = window.rows(name).double()
            average = own[0] + (own - own[0]).mean(0)
            mean[loss.layers[name]] = average.to(mean.device)
        evaluations = 1
        least = loss(mean)
        limit, guess = 100 * float(mean.norm()), 0.01 * float(mean.norm())
        found = []
        for row in torch.cat([rows, -rows]).unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1):

            def along(distance: float, row: Tensor = row) -> float:
                nonlocal evaluations
                evaluations += 1
                return loss(mean + distance * row)

            found.append(width(along, least, guess, limit))
            guess = found[-1] if math.isfinite(found[-1]) else guess
        sides = torch.tensor(found, dtype=torch.float64)
        return Widths(sides[::2], sides[1::2], least, evaluations)

    @cached_property
    def window_curvatures(self) -> Tensor:
        """(K,) p_i^T H p_i along the principal directions, H the Hessian at the weights of now."""
        return self._curvatures(self.hessian_operator)

    @cached_property
    def window_fisher(self) -> Tensor:
        """(K,) p_i^T F p_i along the principal directions, F the Fisher at the weights of now."""
        return self._curvatures(self.fisher_operator)

    @cached_property
    def window_noise(self) -> Tensor:
        """(N, K) the samples' loss gradients along the principal directions."""
        found = self.window_directions
        parameters = {n: p.detach() for n, p in self._model.named_parameters() if p.requires_grad}
        columns = []
        for k in range(len(self.window_modes.variances[: self.most_directions])):
            vector = {
                name: _shaped(found[name][k], p) if name in found else torch.zeros_like(p)
                for name, p in parameters.items()
            }
            shares = self.loss_gradients.jvp(vector)
            columns.append(torch.stack([shares[n].double().cpu() for n in found]).sum(0))
        return torch.stack(columns, 1)

    @property
    def window_updating(self) -> Updating:
        """How the weights were updated during the window.

        Raises:
            Unavailable: if learning rate or momentum are not known, or changed.
        """
        window = self.window
        rates, momenta = window.learning_rates, window.momenta
        if not window.rule or not bool((rates == rates[0]).all() and (momenta == momenta[0]).all()):
            raise Unavailable(
                "the learning rate or the momentum is not known, or not the same throughout the "
                "window and for all of its parameters: give the optimizer, as to "
                "tracer(model, step, optimizer), and a window in which they are constant"
            )
        samples = window.samples
        batch = float(samples[-1] - samples[0]) / ((len(samples) - 1) * window.stride)
        whole = window.population is not None and batch > 0
        epoch = max(1, int((window.population or 0) // batch)) if whole else None
        rule = window.rule
        departs = [f"{n}={rule[n]}" for n in ("nesterov", "dampening", "maximize") if rule.get(n)]
        return Updating(
            float(rates[0]),
            float(momenta[0]),
            batch,
            epoch,
            window.population,
            window.length,
            window.stride,
            float(rule.get("weight_decay", 0.0)),
            rule["optimizer"],
            ", ".join(departs) or None,
        )

    def _curvatures(self, operator: CurvatureOperator) -> Tensor:
        rows = self._flattened(
            operator.layers, torch.zeros(0, dtype=operator.dtype, device=operator.device)
        )
        found = [(row @ operator(row)).double().cpu() for row in rows]
        return torch.stack(found)

    def _flattened(self, layers: Mapping[str, slice], like: Tensor) -> Tensor:
        """(K, P) the principal directions in the order of an operator's vectors."""
        own = self.window_directions
        if missing := own.keys() - layers.keys():
            raise Unavailable(f"the loss is not known as a function of {sorted(missing)}")
        count = len(next(iter(own.values())))
        size = max(place.stop for place in layers.values())
        rows = torch.zeros((count, size), dtype=like.dtype, device=like.device)
        for name, share in own.items():
            rows[:, layers[name]] = share.to(rows)
        return rows


def _shaped(vector: Tensor, p: Tensor) -> Tensor:
    """A vector of real numbers as a parameter is."""
    if p.is_complex():
        pairs = vector.view(*p.shape, 2).to(p.real.dtype).to(p.device)
        return torch.view_as_complex(pairs.contiguous())
    return vector.view(p.shape).to(p)
