"""Networks aligned with each other by permutations of their hidden units.

Two networks that are trained alone hardly ever number their units alike; barriers between them are
in good part those of a bad numbering (Entezari et al. 2022, arXiv:2110.06296). Weights are matched
by the permutations P that maximise the inner product of w and P w', one group of units after the
other, each a linear assignment problem (Ainsworth et al. 2023, Git Re-Basin, arXiv:2209.04836,
algorithm 1), or activations on a probe likewise (section 3.1 there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from nettrace.estimators import generator
from nettrace.freeze import frozen
from nettrace.landscape.axes import Factor, factors
from nettrace.landscape.states import Source, state_of
from nettrace.landscape.symmetries import Group, Outputs, Symmetries
from nettrace.probe import Probe
from nettrace.second_order import real

By: TypeAlias = Literal["weights", "activations"]

#: From how many numberings the search starts: the given one, and random ones.
_STARTS = 3
#: Which share of the whole counts as a gain.
_GAIN = 1e-12


@dataclass(frozen=True)
class Matched:
    """A network aligned with another.

    Args:
        state: of the permuted network, which computes what it did, as `load_state_dict` takes it.
        permutations: by group of units: unit i is what was unit p[i].
        axes: by group, the parameters and buffers that it permutes.
        dropped: what else might have been permuted and was not, and why: by group, that outputs
            changed when it was tried; by operation, that it is not known what it does with units.
        distance: of the weights from the other network's, before and after.
        by: what was matched.
    """

    state: dict[str, Tensor]
    permutations: dict[str, Tensor]
    axes: dict[str, list[str]]
    dropped: dict[str, str]
    distance: tuple[float, float]
    by: By


def match(
    model: nn.Module, probe: Probe, other: Source, *, by: By = "weights", seed: int = 0
) -> Matched:
    """Permutes the hidden units of another network so that it is as close as may be to this one.

    Which units may be permuted is found by following a forward pass on a few samples through
    whatever operations it is made of: hidden units, channels (those of grouped convolutions as
    groups and alike within all groups), features of a residual stream, heads of attention as
    blocks, and features within heads alike for all of them; features that are joined along an axis
    alike if there are equally many of each, else not at all. Each such group is tried before it is
    used, and outputs of the permuted network are held against those of the other one. Units that an
    operation not known sees stay where they are.

    Both networks are left exactly as they were.

    Args:
        model: the network that is matched.
        probe: samples; without targets if need be.
        other: the one whose units are permuted: a network of the same architecture, its state or
            a checkpoint.
        by: "weights", by their inner products, as they are, of all parameters that have units; or
            "activations", by the correlations of units over the probe's samples (and positions):
            where weights of two networks have nothing in common, activations may.
        seed: of the order in which groups are matched, and of the numberings that the search
            starts from: the given one and two random ones, of which the best end is kept.

    Raises:
        CheckpointError: if the other network does not fit.
        ValueError: if there is nothing to permute, or weights are not finite.
        RuntimeError: if the permuted network computed something else, which it does not return.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.landscape import match
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> a, b, c, d = model.state_dict().values()
        >>> other = dict(zip(model.state_dict(), (a[[1, 2, 0]], b[[1, 2, 0]], c[:, [1, 2, 0]], d)))
        >>> found = match(model, nt.Probe(torch.randn(4, 2)), other)
        >>> found.permutations["0.weight[0]"].tolist(), found.distance[1]
        ([2, 0, 1], 0.0)
    """
    if by not in get_args(By):
        raise ValueError(f"expected by= 'weights' or 'activations', got {by!r}")
    given = state_of(model, other)
    with frozen(model):
        known = Symmetries(model, probe, seed)
        if not known.groups:
            said = "; ".join(f"{name}: {why}" for name, why in known.dropped.items())
            raise ValueError(
                f"no units of {type(model).__name__} may be permuted"
                + (f" ({said})" if said else ": the order of all of them matters")
            )
        outputs = Outputs(model, probe)
        own = outputs.own
        theirs = {name: given[name].to(own[name]) for name in own}
        for said, state in [("the network", own), ("the other network", theirs)]:
            bad = [n for n, p in model.named_parameters() if not bool(state[n].isfinite().all())]
            if bad:
                raise ValueError(f"{said} has weights that are not finite, such as {bad[0]}")
        names = [name for name, _ in model.named_parameters()]
        if by == "weights":
            pairs = _weights(known, names, own, theirs)
        else:
            pairs = _activations(known, outputs, own, theirs)
        orders = _Search(known.groups, [pair for pair in pairs if pair.where], seed).best()
        moved = known.permuted(theirs, orders)
        off = outputs.apart(theirs, moved)
        if off > known.tolerance:
            raise RuntimeError(
                f"permuting the units of {type(model).__name__} changed its outputs by {off:.2g} "
                "of their size, though each group alone did not: please report this network"
            )
    distance = _distance(names, own, theirs), _distance(names, own, moved)
    permuted = known.permuted(given, orders)
    every = [*model.named_parameters(), *model.named_buffers()]
    keys = {id(tensor): name for name, tensor in every}
    state = {
        key: permuted[keys[id(value)]].clone()
        for key, value in model.state_dict(keep_vars=True).items()
        if id(value) in keys
    }
    axes = {group.name: list(group.places) for group in known.groups}
    return Matched(state, orders, axes, known.dropped, distance, by)


@dataclass(frozen=True)
class _Pair:
    """A tensor of the one network and that of the other, with an axis for each factor.

    Args:
        where: by group, which axes count its units.
        one: of the network that is matched.
        other: of the one that is permuted.
    """

    where: Mapping[str, Sequence[int]]
    one: Tensor
    other: Tensor

    def gains(self, name: str, now: Tensor) -> Tensor:
        """(n, n) inner products of unit i of the one and unit j of the other, as that is by now."""
        found = torch.zeros(())
        for dim in self.where[name]:
            rows = [t.movedim(dim, 0).reshape(t.shape[dim], -1) for t in (self.one, now)]
            found = found + rows[0] @ rows[1].T
        return found

    def moved(self, name: str, now: Tensor, order: Tensor) -> Tensor:
        """The other with units of a group in another order."""
        for dim in self.where[name]:
            now = now.index_select(dim, order)
        return now


class _Search:
    """Coordinate ascent of the inner product of all pairs.

    Args:
        groups: of units.
        pairs: of tensors.
        seed: of orders and starts.
    """

    def __init__(self, groups: Sequence[Group], pairs: Sequence[_Pair], seed: int) -> None:
        self._groups, self._pairs = groups, pairs
        self._draws = generator(seed, "matching")
        self._most = sum(float(p.one.norm() * p.other.norm()) for p in pairs)

    def best(self) -> dict[str, Tensor]:
        """(size,) by group, the order that is best of those that several starts end in."""
        ends = []
        for start in range(_STARTS):
            orders = {
                g.name: torch.randperm(g.size, generator=self._draws)
                if start
                else torch.arange(g.size)
                for g in self._groups
            }
            ends.append(self._climbed(orders))
            if ends[-1][0] >= self._most * (1 - _GAIN):
                break  # there is no better one
        return max(ends, key=lambda end: end[0])[1]

    def _climbed(self, orders: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        found, now = dict(orders), [p.other for p in self._pairs]
        for name, order in orders.items():
            now = self._moved(name, now, order)
        moving = True
        while moving:
            moving = False
            for number in torch.randperm(len(self._groups), generator=self._draws).tolist():
                name = self._groups[number].name
                gains: Tensor | int = sum(
                    p.gains(name, t)
                    for p, t in zip(self._pairs, now, strict=True)
                    if name in p.where
                )
                if not isinstance(gains, Tensor):
                    continue  # of buffers alone
                _, columns = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
                order = torch.as_tensor(columns)
                ahead = self._moved(name, now, order)
                # Exact but where a tensor has the units on two axes.
                if self._value(ahead) > self._value(now) + _GAIN * self._most:
                    found[name], now, moving = found[name][order], ahead, True
        return self._value(now), found

    def _moved(self, name: str, now: Sequence[Tensor], order: Tensor) -> list[Tensor]:
        return [
            p.moved(name, t, order.to(t.device)) if name in p.where else t
            for p, t in zip(self._pairs, now, strict=True)
        ]

    def _value(self, now: Sequence[Tensor]) -> float:
        return sum(float((p.one * t).sum()) for p, t in zip(self._pairs, now, strict=True))


def _weights(
    known: Symmetries,
    names: Sequence[str],
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
) -> list[_Pair]:
    """Parameters of both networks."""
    found = []
    for name in names:
        where = {g.name: g.places[name] for g in known.groups if name in g.places}
        pair = [real(known.unfold(name, state[name])).double() for state in (own, theirs)]
        found.append(_Pair(where, *pair))
    return found


def _activations(
    known: Symmetries, outputs: Outputs, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> list[_Pair]:
    """Activations of both networks, as deviations of each unit from its mean, of length one."""
    one, other = (outputs.follow(state, keep=True) for state in (own, theirs))
    shapes = [[t.shape for t, _ in each.activations] for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the two networks do not call the same operations on the probe, so that activations "
            "cannot be compared: match by='weights'"
        )
    roots: dict[Factor, str] = {}
    for group in known.groups:
        name, dims = next(iter(group.places.items()))
        row = factors(one.axes[name])
        if dims[0] < len(row) and row[dims[0]].size == group.size:
            roots[row[dims[0]]] = group.name
    found = []
    for (left, several), (right, _) in zip(one.activations, other.activations, strict=True):
        row = factors(several)
        where: dict[str, list[int]] = {}
        for dim, factor in enumerate(row):
            if factor in roots:
                where.setdefault(roots[factor], []).append(dim)
        units = {dim for dims in where.values() for dim in dims}
        rest = [dim for dim in range(len(row)) if dim not in units]
        if where and rest:
            shape = [factor.size for factor in row]
            found.append(
                _Pair(where, *(_deviations(t.reshape(shape), rest) for t in (left, right)))
            )
    return found


def _deviations(tensor: Tensor, dims: list[int]) -> Tensor:
    """Deviations from means over some axes, of length one along them where there are any."""
    tensor = real(tensor).double()
    apart = tensor - tensor.mean(dims, keepdim=True)
    size = apart.square().sum(dims, keepdim=True).sqrt()
    return torch.where(size > 0, apart / size, 0)


def _distance(
    names: Sequence[str], one: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> float:
    apart = [(one[name] - other[name]).abs().double().norm() for name in names]
    return float(torch.stack(apart).norm())
