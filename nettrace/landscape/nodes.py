"""Nodes of a network: hidden units that may be permuted, with the weights that reach them.

A layer of nodes is a group of hidden units of which the order does not matter: what permutations of
hidden units permute together (`nettrace.landscape.symmetries`). A weight *writes* to them where one
of its axes counts what a contraction with activations gives, and *reads* them where it is summed
over. Whether weights are kept as (outputs, inputs) or (inputs, outputs) makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nettrace.landscape.axes import Axis, Factor, factors, leaves
from nettrace.landscape.contractions import INPUTS, Contraction, Contractions, Role
from nettrace.landscape.scales import Gains, carried
from nettrace.landscape.symmetries import FEW, Group, Outputs, Symmetries, proposed
from nettrace.probe import Probe

#: By layer, (2, n): the sums of squares of weights that write to each node, and that read it.
Strengths: TypeAlias = dict[str, Tensor]

_WRITES: frozenset[Role] = frozenset({"written", "both"})
_READS: frozenset[Role] = frozenset({"read", "both"})


@dataclass(frozen=True)
class _Leaf:
    """A factor of an axis of a weight: what it counts, and whether it is read or written."""

    factor: Factor
    role: Role


@dataclass(frozen=True)
class _Use:
    """A weight in one role, however often it is called in it.

    Args:
        weight: as it is contracted.
        leaves: its axes.
        owner: the parameter that it is a view of, None if it is made of several or anew.
        gains: of each call, the squares of what it is multiplied by, along these axes.
    """

    weight: Tensor
    leaves: Sequence[_Leaf]
    owner: str | None
    gains: list[Tensor]

    @property
    def squares(self) -> Tensor:
        """Of magnitudes, in float64 and flat."""
        return self.weight.reshape(-1).abs().double().square()

    def scaled(self, squares: Tensor) -> Tensor:
        """Squares times those of the scales that belong to the weight, on average over calls."""
        gain = sum(self.gains[1:], self.gains[0]) / len(self.gains)
        whole = squares.reshape([leaf.factor.size for leaf in self.leaves])
        return (whole * gain).reshape(-1)

    @property
    def places(self) -> Tensor:
        """Where these numbers are in memory, which uses of one parameter share."""
        shape, strides = self.weight.shape, self.weight.stride()
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        counted = torch.arange(span, device=self.weight.device).as_strided(shape, strides)
        return counted.reshape(-1) + int(self.weight.storage_offset())


class Nodes:
    """The layers of nodes of a network, and the strengths of the nodes.

    Args:
        model: the network, frozen.
        probe: the samples, of which a few are looked at.
        seed: of the permutations that are tried.

    Attributes:
        sizes: by layer, how many nodes there are, in the order in which the forward pass first
            reaches them. A layer has the name of the first axis of a parameter that counts it.
        left_out: by layer, why it is none: its nodes are only written to, or only read.
        uncounted: parameters of two axes or more that activations are multiplied with number by
            number, rather than contracted, which do not count as weights.
        dropped: by layer and operation, what is not known of hidden units, as `Symmetries` has it.
    """

    def __init__(self, model: nn.Module, probe: Probe, seed: int) -> None:
        few = probe.take(slice(0, FEW)) if len(probe) > FEW else None
        outputs = Outputs(model, few or probe)
        self._state = outputs.own
        self._followed = outputs.followed(outputs.own, Contractions)
        for one in self._followed.found:
            if not bool(one.weight.isfinite().all()):
                raise ValueError(f"weights of {_said(one)} are not finite: the training diverges")
        groups, self.dropped = _tried(model, probe, seed, list(proposed(self._followed.axes)))
        self.left_out: dict[str, str] = {}
        self._names = self._roots(groups)
        self._uses = self._told_apart(self._followed.found)
        self.sizes = self._in_order(groups)

    def strengths(self) -> Strengths:
        """By layer, (2, n) in float64 on the CPU: what is written to each node, and what is read.

        Sums of squared magnitudes of weights, each parameter once, however often it is called,
        with the fixed scales of activations that belong to it (`nettrace.landscape.scales`).
        """
        return self._summed([use.scaled(use.squares) for use in self._uses])

    def shuffled(self, draws: torch.Generator) -> Strengths:
        """The strengths if the numbers of each parameter were shuffled among themselves.

        A parameter that is used in several roles is shuffled once, for all of them. Numbers are
        shuffled with the scales that belong to them, but for those of several roles, which are
        scaled then.
        """
        found = [use.squares for use in self._uses]
        for numbers, places in self._owned:
            alone = len(numbers) == 1
            if alone:
                found[numbers[0]] = self._uses[numbers[0]].scaled(found[numbers[0]])
            values = torch.cat([found[number] for number in numbers])
            for number, place in zip(numbers, places, strict=True):
                values[place] = found[number]
            size = 1 + max(int(place.max()) for place in places)
            values = values[torch.randperm(size, generator=draws).to(values.device)]
            for number, place in zip(numbers, places, strict=True):
                shuffled = values[place]
                found[number] = shuffled if alone else self._uses[number].scaled(shuffled)
        return self._summed(found)

    def _summed(self, squares: Sequence[Tensor]) -> Strengths:
        found = {name: torch.zeros(2, size).double() for name, size in self.sizes.items()}
        for use, values in zip(self._uses, squares, strict=True):
            whole = values.reshape([leaf.factor.size for leaf in use.leaves])
            for dim, leaf in enumerate(use.leaves):
                name = self._names.get(leaf.factor)
                if name not in found:
                    continue
                rest = [d for d in range(whole.dim()) if d != dim]
                part = (whole.sum(rest) if rest else whole).cpu()
                for row, roles in enumerate((_WRITES, _READS)):
                    if leaf.role in roles:
                        found[name][row] += part
        return found

    @cached_property
    def _owned(self) -> list[tuple[list[int], list[Tensor]]]:
        """By parameter, the numbers of its uses, and their places among what is used of it."""
        found: dict[object, list[int]] = {}
        for number, use in enumerate(self._uses):
            found.setdefault(use.owner or number, []).append(number)
        owned = []
        for numbers in found.values():
            if len(numbers) == 1:
                only = self._uses[numbers[0]].weight
                places = [torch.arange(only.numel(), device=only.device)]
            else:
                several = [self._uses[number].places for number in numbers]
                places = list(
                    torch.unique(torch.cat(several), return_inverse=True)[1].split(
                        [len(one) for one in several]
                    )
                )
            owned.append((numbers, places))
        return owned

    def loads(self) -> Strengths:
        """By layer, (n,) in float64: the sum over all paths through each node.

        A path goes from an input to an output, by a number of each weight that it passes, and
        counts as the product of their magnitudes: of a chain of dense layers, the load of node j is
        (|W_l| ... |W_1| 1)_j (1 |W_L| ... |W_{l+1}|)_j. Fixed scales of activations on the way
        count, as those of batch normalisation; biases and nonlinearities do not. In a residual
        stream a path counts once for each time that it enters a node. Where activations multiply
        each other, as in attention and gates, paths run through all factors; places of a filter or
        sequence are summed over.

        Raises:
            ValueError: if it cannot be told which weights follow which nodes, with the reason.
        """
        found = self._followed.found
        uses = [_leaves(one) for one in found]
        gains = self._gains(uses)
        ahead: list[Tensor] = []
        for one, several in zip(found, uses, strict=True):
            came = self._came(one, several, ahead, uses, gains)
            ahead.append(_product(one.weight, several, _READS, _WRITES, came))
        behind = [torch.zeros_like(values) for values in ahead]
        for number, ways in self._followed.ends.items():
            if number == INPUTS:
                continue
            self._check(number, uses[number], [*factors(self._followed.outputs)], "the outputs")
            written = _counted(uses[number], _WRITES)
            for way in ways:
                behind[number] += gains.between(way, (), written)[1]
        for number in range(len(found) - 1, -1, -1):
            one, several = found[number], uses[number]
            back = _product(one.weight, several, _WRITES, _READS, behind[number])
            read = _counted(several, _READS)
            for source in one.sources.keys() - {INPUTS}:
                written = _counted(uses[source], _WRITES)
                for way in one.sources[source]:
                    there, here = gains.between(way, written, read)
                    behind[source] += carried(back * here, read, written) * there
        loads = {name: torch.zeros(size).double() for name, size in self.sizes.items()}
        for several, forth, back in zip(uses, ahead, behind, strict=True):
            written = _counted(several, _WRITES)
            for dim, factor in enumerate(written):
                name = self._names.get(factor)
                if name in loads:
                    rest = [d for d in range(len(written)) if d != dim]
                    load = forth * back
                    loads[name] += (load.sum(rest) if rest else load).cpu()
        if not all(bool(load.isfinite().all()) for load in loads.values()):
            raise ValueError("the products of weights along paths are too large for float64")
        return loads

    def _came(
        self,
        one: Contraction,
        several: Sequence[_Leaf],
        ahead: Sequence[Tensor],
        uses: Sequence[Sequence[_Leaf]],
        gains: Gains,
    ) -> Tensor:
        """What paths bring to the nodes that a weight reads."""
        read = _counted(several, _READS)
        joined = {leaf for axis in self._followed.side_by_side for leaf in leaves(axis)}
        if joined & set(read) and one.sources.keys() != {INPUTS}:
            raise ValueError(
                f"{_said(one)} reads activations that were joined side by side: which paths lead "
                "to which of them is not followed"
            )
        shape = [factor.size for factor in read]
        came = torch.zeros(shape, dtype=torch.float64, device=one.weight.device)
        for source, ways in one.sources.items():
            written: Sequence[Factor] = ()
            if source != INPUTS:
                self._check(source, uses[source], read, _said(one))
                written = _counted(uses[source], _WRITES)
            for way in ways:
                there, here = gains.between(way, written, read)
                if source == INPUTS:
                    came = came + there * here
                else:
                    came = came + carried(ahead[source] * there, written, read) * here
        return came

    def _check(
        self, source: int, several: Sequence[_Leaf], read: Sequence[Factor], reader: str
    ) -> None:
        written = _counted(several, _WRITES)
        if not set(written) <= set(read):
            raise ValueError(
                f"what {_said(self._followed.found[source])} gives does not reach {reader} node by "
                "node, but in parts, sums or another order: paths are not followed through that"
            )

    def _roots(self, groups: Sequence[Group]) -> dict[Factor, str]:
        """By the factors of this forward pass, the names of groups."""
        found = {}
        for group in groups:
            name, dims = next(iter(group.places.items()))
            found[factors(self._followed.axes[name])[dims[0]]] = group.name
        return found

    def _in_order(self, groups: Sequence[Group]) -> dict[str, int]:
        """The sizes of groups that are both written and read, in order."""
        roles: dict[str, set[Role]] = {}
        sizes = {group.name: group.size for group in groups}
        for use in self._uses:
            for leaf in sorted(use.leaves, key=lambda leaf: leaf.role in _WRITES):
                if leaf.factor in self._names:
                    roles.setdefault(self._names[leaf.factor], set()).add(leaf.role)
        contracted = {name for one in self._followed.found for name in one.names}
        counted = {name for group in groups for name in group.places} - contracted
        self.uncounted = sorted(map(_plain, self._followed.multiplied & counted))
        for group in groups:
            own = roles.setdefault(group.name, set())
            for said, wanted in (("writes to", _WRITES), ("reads", _READS)):
                if not own & wanted:
                    self.left_out[group.name] = f"no weight {said} these nodes"
        return {name: sizes[name] for name in roles if name not in self.left_out}

    def _told_apart(self, found: Sequence[Contraction]) -> list[_Use]:
        """Each weight in each of its roles once."""
        known: dict[object, list[_Use]] = {}
        uses: list[_Use] = []
        several = [self._without_copies(one) for one in found]
        leaves_of = [_leaves(one) for one in several]
        gains = self._gains(leaves_of).folded()
        for one, own, (written, read) in zip(several, leaves_of, gains, strict=True):
            owner, weight = self._owner(one), one.weight
            roles = sorted(zip(weight.stride(), (role for _, role in one.axes), strict=False))
            key = (one.names, owner, weight.storage_offset() if owner else 0, *roles)
            before = known.setdefault(key, [])
            # What is made anew at each call is the same weight if it has the same numbers.
            again = before if owner else [u for u in before if torch.equal(u.weight, weight)]
            if not again:
                again = [_Use(weight, own, owner, [])]
                before += again
                uses += again
            gain = _along(written, own, _WRITES) * _along(read, own, _READS)
            again[0].gains.append(gain.square())
        return uses

    def _gains(self, several: Sequence[Sequence[_Leaf]]) -> Gains:
        written, read = ([_counted(one, roles) for one in several] for roles in (_WRITES, _READS))
        sources = [*(one.sources for one in self._followed.found), self._followed.ends]
        return Gains(self._followed.scales, written, read, sources)

    def _owner(self, one: Contraction) -> str | None:
        storage = one.weight.untyped_storage().data_ptr()
        own = (n for n in one.names if self._state[n].untyped_storage().data_ptr() == storage)
        return next(own, None)

    def _without_copies(self, one: Contraction) -> Contraction:
        """A weight of which a batched product took a copy for each sample, once."""
        own = {leaf for name in one.names for leaf in factors(self._followed.axes[name])}
        if one.weight.numel() <= sum(self._state[name].numel() for name in one.names):
            return one
        several = _leaves(one)
        whole = one.weight.reshape([leaf.factor.size for leaf in several])
        kept: list[tuple[Axis, Role]] = []
        for leaf in several:
            if leaf.role == "both" and leaf.factor not in own:
                whole = whole.select(len(kept), 0)
            else:
                kept.append(((leaf.factor,), leaf.role))
        return Contraction(whole, kept, one.names, one.sources)


def _tried(
    model: nn.Module, probe: Probe, seed: int, found: Sequence[Group]
) -> tuple[list[Group], dict[str, str]]:
    """The groups that leave outputs unchanged, and why others do not; tried once a structure.

    Weights change from one look to the next, and groups do not: they are tried again only where a
    forward pass proposes others than the last time.
    """
    known = _TRIED.get(model)
    if known is None or known[0] != list(found):
        tried = Symmetries(model, probe, seed)
        known = _TRIED[model] = (list(found), tried.groups, dict(tried.dropped))
    groups = [replace(group, name=_plain(group.name)) for group in known[1]]
    return groups, {_plain(name): _plain(why) for name, why in known[2].items()}


_TRIED: WeakKeyDictionary[nn.Module, tuple[list[Group], list[Group], dict[str, str]]] = (
    WeakKeyDictionary()
)


def _leaves(one: Contraction) -> list[_Leaf]:
    return [_Leaf(leaf, role) for axis, role in one.axes for leaf in leaves(axis)]


def _counted(several: Sequence[_Leaf], roles: frozenset[Role]) -> list[Factor]:
    return [leaf.factor for leaf in several if leaf.role in roles]


def _along(values: Tensor, several: Sequence[_Leaf], roles: frozenset[Role]) -> Tensor:
    """Values by the factors of some roles, aligned with all axes of a weight."""
    if not values.dim():
        return values
    sizes = iter(values.shape)
    return values.reshape([next(sizes) if leaf.role in roles else 1 for leaf in several])


def _said(one: Contraction) -> str:
    return " and ".join(sorted(map(_plain, one.names)))


def _plain(name: str) -> str:
    """Without what torch.compile puts into names."""
    return name.replace("_orig_mod.", "")


def _product(
    weight: Tensor,
    several: Sequence[_Leaf],
    over: frozenset[Role],
    left: frozenset[Role],
    values: Tensor,
) -> Tensor:
    """Sums magnitudes of weights times values over some of their axes."""
    dims = range(len(several))
    whole = weight.abs().double().reshape([leaf.factor.size for leaf in several])
    given = [dim for dim in dims if several[dim].role in over]
    found = [dim for dim in dims if several[dim].role in left]
    made: Tensor = torch.einsum(whole, list(dims), values, given, found)
    return made
