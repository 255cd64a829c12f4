"""Which weights are contracted with activations, and along which of their axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nettrace.landscape.axes import Axes, Axis, reshape
from nettrace.landscape.followed import Call, Follower
from nettrace.landscape.scales import Scale, Sources, scale_of

#: An axis of a weight is "read" where it is summed over together with activations, "written" where
#: it is left and counts what comes out, "both" where each index of it reads and writes the same, as
#: groups of a convolution, and "place" where it counts places of a filter.
Role: TypeAlias = Literal["read", "written", "both", "place"]

#: Where the weight stands, first or second factor of a product, by its number of axes.
_FIRST: dict[int, Sequence[Role]] = {
    1: ["read"],
    2: ["written", "read"],
    3: ["both", "written", "read"],
}
_SECOND: dict[int, Sequence[Role]] = {
    1: ["read"],
    2: ["read", "written"],
    3: ["both", "read", "written"],
}
_PRODUCTS = frozenset("mm addmm bmm baddbmm mv addmv dot vdot".split())
_JOINING = frozenset({"cat", "stack"})
#: How operations begin that take no more than a shape from what they are given.
_NEW = ("zeros", "ones", "full", "empty", "new_")

#: What stands for the inputs where contractions are numbered.
INPUTS = -1
_NO_SCALES: frozenset[tuple[int, ...]] = frozenset({()})


@dataclass(frozen=True)
class Contraction:
    """A weight that was contracted with activations.

    Args:
        weight: as it was then: transposed, cut out or put together of parameters.
        axes: of the weight, with their roles, in order; those of length one are empty.
        names: of the parameters and buffers that it is made of.
        sources: the numbers of earlier contractions that the activations come from without another
            in between, and `INPUTS`, with the scales on the way.
    """

    weight: Tensor
    axes: Sequence[tuple[Axis, Role]]
    names: frozenset[str]
    sources: Sources


class Contractions(Follower):
    """Follows axes, and notes the weights that are contracted with what depends on data.

    Attributes:
        found: the contractions, in the order of the forward pass.
        scales: fixed vectors that activations were multiplied by, in that order.
        ends: the numbers of those that outputs come from without another in between, with the
            scales on the way.
        outputs: the axes of the outputs.
        side_by_side: axes along which activations were joined.
        multiplied: names of parameters of two axes or more that activations were multiplied with
            number by number.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.found: list[Contraction] = []
        self.scales: list[Scale] = []
        self.ends: Sources = {}
        self.outputs: Axes = ()
        self.side_by_side: list[Axis] = []
        self.multiplied: set[str] = set()
        self._shapes = {name: t.squeeze().dim() for name, t in state.items()}
        self._names = WeakTensorKeyDictionary()
        self._sources = WeakTensorKeyDictionary()
        self._written: dict[int, tuple[Any, Sources]] = {}
        for name, tensor in state.items():
            self._names[tensor] = frozenset({name})

    def end(self, outputs: Tensor) -> None:
        """Fixes the order of outputs, and notes what they come from."""
        super().end(outputs)
        self.ends, self.outputs = self._sources_of(outputs), self.of(outputs)

    def _note(self, func: Any, call: Call, given: list[Axes], from_data: bool) -> None:
        inputs = list(call.tensors())
        sources = _together(map(self._sources_of, inputs))
        names = frozenset[str]().union(*(self._names.get(t, frozenset()) for t in inputs))
        super()._note(func, call, given, from_data)
        name = func.overloadpacket.__name__.removesuffix("_")
        if name.startswith(_NEW):
            sources, names = {}, frozenset()
        # A network that differentiates in its forward uses weights the other way round meanwhile.
        is_backward = torch._C._current_autograd_node() is not None
        for weight, axes in () if is_backward else self._contracted(name, call):
            number = len(self.found)
            self.found.append(Contraction(weight.detach(), axes, self._names[weight], sources))
            sources = {number: _NO_SCALES}
        if from_data and not is_backward:
            sources = self._scaled(name, call, sources)
        if name == "mul" and from_data:
            self.multiplied |= {n for n in names if self._shapes[n] > 1}
        if name in _JOINING and from_data:
            dim = call.named.get("dim", 0) % len(call.shape)
            self.side_by_side.append(self.of(call.results[0])[dim][:1])
        for result in call.results:
            if from_data:
                self._sources[result] = sources
                if func._schema.is_mutable and sources:
                    self._write(result, sources)
            elif names:
                self._names[result] = names

    def _scaled(self, name: str, call: Call, sources: Sources) -> Sources:
        """Notes a scale of activations, if an operation is one."""
        fixed = [t for t in call.tensors() if self._is_weight(t) and not self._is_data(t)]
        found = scale_of(name, call, fixed)
        if found is None or found[1].squeeze().dim() > 1:
            return sources
        values, of = found
        names = frozenset[str]().union(*(self._names[t] for t in fixed))
        magnitudes = values.detach().abs().double()
        self.scales.append(Scale(magnitudes, self.of(of), names, frozenset(sources)))
        number = len(self.scales) - 1
        return {
            source: frozenset((*way, number) for way in ways) for source, ways in sources.items()
        }

    def _sources_of(self, tensor: Tensor) -> Sources:
        found: Sources = self._sources.get(tensor, {})
        if tensor in self._from_data and tensor not in self._sources:
            found = {INPUTS: _NO_SCALES}
        if self._written and tensor.layout is torch.strided:
            found = found | self._written.get(tensor.untyped_storage()._cdata, (None, {}))[1]
        return found

    def _write(self, tensor: Tensor, sources: Sources) -> None:
        """What is written into a part comes with the whole; the memory is kept while following."""
        if tensor.layout is torch.strided:
            key = tensor.untyped_storage()._cdata
            before = self._written.get(key, (None, {}))[1]
            self._written[key] = tensor.untyped_storage(), before | sources

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor in self._names

    def _is_data(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor in self._from_data

    def _contracted(
        self, name: str, call: Call
    ) -> Iterator[tuple[Tensor, Sequence[tuple[Axis, Role]]]]:
        """The weight of a contraction, if an operation is one."""
        if name in _PRODUCTS:
            *_, one, other = call.tensors()
            if self._is_weight(one) and self._is_data(other):
                yield one, list(zip(self.of(one), _FIRST[one.dim()], strict=True))
            elif self._is_data(one) and self._is_weight(other):
                yield other, list(zip(self.of(other), _SECOND[other.dim()], strict=True))
        elif name == "convolution":
            weight = call.named["weight"]
            if self._is_weight(weight) and self._is_data(call.named["input"]):
                yield weight, self._of_filter(call)
        elif name in ("embedding", "index", "index_select"):
            table = call.named["weight" if name == "embedding" else "self"]
            chosen = call.named.get("indices", call.named.get("index"))
            rows = chosen if isinstance(chosen, (list, tuple)) else [chosen]
            if self._is_weight(table) and any(self._is_data(one) for one in rows):
                read = {d for d, one in enumerate(rows) if isinstance(one, Tensor)}
                if name == "index_select":
                    read = {call.named["dim"] % table.dim()}
                several = enumerate(self.of(table))
                yield table, [(a, "read" if d in read else "written") for d, a in several]

    def _of_filter(self, call: Call) -> Sequence[tuple[Axis, Role]]:
        """The axes of a convolution's weight, its groups apart."""
        weight, groups = call.named["weight"], call.named["groups"]
        whole, single, *places = self.of(weight)
        of_group, within = reshape([whole], [groups, weight.shape[0] // groups])
        roles: tuple[Role, Role] = ("written", "read")
        if call.named["transposed"]:
            roles = ("read", "written")
        found: list[tuple[Axis, Role]] = [(of_group, "both"), (within, roles[0])]
        return [*found, (single, roles[1]), *((place, "place") for place in places)]


def _together(several: Iterable[Sources]) -> Sources:
    found: Sources = {}
    for one in several:
        for source, ways in one.items():
            found[source] = found.get(source, frozenset()) | ways
    return found
