"""Permutations of hidden units that leave what a network computes as it is.

Which axes of parameters and buffers count the same units is found by following a forward pass, and
then tried: each group of axes is permuted at weights that are drawn around the network's own, and
outputs have to stay the same. Around them, since at the weights themselves outputs may stay the
same by chance, as where units are dead or branches begin with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from nettrace.estimators import generator
from nettrace.freeze import random_streams
from nettrace.landscape.axes import Axes, Factor, factors, fix, leaves
from nettrace.landscape.followed import Follower
from nettrace.landscape.weight_loss import plain_attention
from nettrace.probe import Probe
from nettrace.smooth import called, widened, widened_state

F = TypeVar("F", bound=Follower)
#: How far around the network's weights, of their size.
_AROUND = 0.3
#: On how many samples groups are found and tried.
FEW = 8


class Outputs:
    """The outputs of a network as a function of its state, in float64 where it can be evaluated so.

    Args:
        model: the network, frozen.
        probe: the samples.

    Attributes:
        dtype: the least that numbers are widened to.
        own: the network's own state, widened.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self._model, self._given = model, probe
        state = widened_state(model, torch.float32)
        self._same_draws = random_streams({t.device for t in state.values()})
        for self.dtype in (torch.float64, torch.float32):
            self.own, self._probe = widened_state(model, self.dtype), probe.map(widened(self.dtype))
            try:
                self(self.own)
            except RuntimeError:  # of operations that take one type alone
                if self.dtype == torch.float32:
                    raise
            else:
                return

    def __call__(self, state: Mapping[str, Tensor]) -> Tensor:
        """The outputs (N, ...) with another state."""
        return self._with(self._leaves(state)).detach()

    def _with(self, state: Mapping[str, Tensor]) -> Tensor:
        self._same_draws()
        with plain_attention():
            return called(self._model, state, self._probe.look)

    def _leaves(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, by which networks that do so in their forward may differentiate."""
        wants = {name for name, p in self._model.named_parameters() if p.requires_grad}
        return {name: t.detach().requires_grad_(name in wants) for name, t in state.items()}

    def apart(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        """How far the outputs with two states are apart, of the largest; or infinite."""
        first, second = self(one), self(other)
        same = (first == second) | (first.isnan() & second.isnan())
        most = torch.where(same, 0, (first - second).abs()).max()
        size = first.abs()[first.isfinite()]
        off = float(most / size.max()) if len(size) and float(size.max()) > 0 else float(most)
        return off if off == off else float("inf")

    def follow(self, state: Mapping[str, Tensor], *, keep: bool = False) -> Follower:
        """The axes of a state's tensors and, if they are kept, of activations."""
        return self.followed(state, lambda leaves: Follower(leaves, keep))

    def followed(self, state: Mapping[str, Tensor], by: Callable[[Mapping[str, Tensor]], F]) -> F:
        """What follows a forward pass, made of the state's tensors, when it has."""
        leaves = self._leaves(state)
        follower = by(leaves)
        with follower:
            follower.end(self._with(leaves))
        return follower


@dataclass(frozen=True)
class Group:
    """Units that may be permuted together.

    Args:
        name: the first axis that they are on, as "layer.weight[0]", and as "layer.weight[0/1]" the
            second factor of it.
        size: how many units there are.
        places: by name of a parameter or buffer, which axes of it as `Symmetries.unfold` has it.
    """

    name: str
    size: int
    places: Mapping[str, Sequence[int]]


class Symmetries:
    """Groups of hidden units of a network, and what permutes them.

    Args:
        model: the network, frozen.
        probe: the samples; groups are found and tried on a few of them.
        seed: of the permutations that are tried.

    Attributes:
        groups: those that leave outputs unchanged.
        dropped: by name, why groups that were found are no such, and operations not known.
        outputs: of the network, on the few samples.
        tolerance: up to which share of their size outputs count as the same, for rounding.
    """

    def __init__(self, model: nn.Module, probe: Probe, seed: int) -> None:
        few = probe.take(slice(0, FEW)) if len(probe) > FEW else None
        self.outputs = Outputs(model, few or probe)
        state = self.outputs.own
        followed = self.outputs.follow(state)
        self.axes = followed.axes
        saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        for name, buffer in model.named_buffers():
            if id(buffer) not in saved:  # with which the permuted state could not be used
                fix(*self.axes[name])
        self.dropped = {
            f"operation {name}": "is not known, so that all units that it sees stay where they are"
            for name in followed.unknown()
        }
        # Some networks compute in single precision whatever their weights are.
        self.tolerance = followed.epsilon**0.5
        self.groups: list[Group] = []
        around = _around(state, {n for n, _ in model.named_buffers()}, seed)
        for group in proposed(self.axes):
            order = torch.randperm(group.size, generator=generator(seed, group.name)).roll(1)
            if torch.equal(order, torch.arange(group.size)):
                order = order.roll(1)
            off = self.outputs.apart(around, self.permuted(around, {group.name: order}, [group]))
            if off <= self.tolerance:
                self.groups.append(group)
            else:
                self.dropped[group.name] = (
                    f"outputs change by {off:.2g} of their size when its {group.size} units on "
                    f"{', '.join(group.places)} are permuted"
                )

    def unfold(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter or buffer with an axis for each factor of its axes."""
        return tensor.reshape([factor.size for factor in factors(self.axes[name])])

    def permuted(
        self,
        state: Mapping[str, Tensor],
        orders: Mapping[str, Tensor],
        groups: Sequence[Group] | None = None,
    ) -> dict[str, Tensor]:
        """A state of which unit i of each group is unit order[i] of the one given.

        Args:
            state: by name.
            orders: (size,) by group.
            groups: where these are; those that leave outputs unchanged by default.
        """
        found = dict(state)
        for group in self.groups if groups is None else groups:
            for name, dims in group.places.items():
                tensor = self.unfold(name, found[name])
                for dim in dims:
                    tensor = tensor.index_select(dim, orders[group.name].to(tensor.device))
                found[name] = tensor.reshape(state[name].shape)
        return found


def proposed(axes: Mapping[str, Axes]) -> Iterator[Group]:
    """A group for each factor of tensors' axes that is free, with where it is."""
    places: dict[Factor, dict[str, list[int]]] = {}
    names: dict[Factor, str] = {}
    for name, several in axes.items():
        for number, axis in enumerate(several):
            within = leaves(axis)
            for place, leaf in enumerate(within):
                place_said = f"/{place}" if len(within) > 1 else ""
                names.setdefault(leaf, f"{name}[{number}{place_said}]")
        for dim, leaf in enumerate(factors(several)):
            places.setdefault(leaf, {}).setdefault(name, []).append(dim)
    for leaf, found in places.items():
        if not leaf.fixed:
            yield Group(names[leaf], leaf.size, found)


def _around(state: Mapping[str, Tensor], buffers: set[str], seed: int) -> dict[str, Tensor]:
    """Weights drawn around a state, and buffers scaled, so that variances stay positive."""
    draws, found = generator(seed, "around"), {}
    for name, tensor in state.items():
        found[name] = tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        drawn = torch.randn(tensor.shape, generator=draws, dtype=torch.float64)
        drawn = drawn.to(tensor.device, tensor.dtype)
        size = tensor.abs().square().mean().sqrt()
        if name in buffers and bool(size > 0):
            found[name] = tensor * (_AROUND * drawn).exp()
        elif bool(size.isfinite()):
            found[name] = tensor + _AROUND * (size if bool(size > 0) else 1) * drawn
    return found
