"""Fixed scales of activations, as those of batch normalisation, and which weights they belong to.

What is multiplied between the weight that writes to nodes and the one that reads them, by numbers
that depend on parameters and buffers alone, may as well be multiplied into either weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from nettrace.landscape.axes import Axes, Factor, factors

if TYPE_CHECKING:
    from nettrace.landscape.followed import Call

#: By the number of a contraction, the scales (by number, in order) on each way from it to here.
Sources: TypeAlias = dict[int, frozenset[tuple[int, ...]]]

_WITH_WEIGHT = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm"})


@dataclass(frozen=True)
class Scale:
    """A vector, or a number, by which activations are multiplied.

    Args:
        values: its magnitudes, in float64.
        axes: of them.
        names: of the parameters and buffers that it is made of.
        sources: the numbers of the contractions that the activations come from.
    """

    values: Tensor
    axes: Axes
    names: frozenset[str]
    sources: frozenset[int]

    def along(self, wanted: Sequence[Factor]) -> Tensor | None:
        """Its magnitudes with an axis for each of some factors; None if they vary along others."""
        given = factors(self.axes)
        if len(set(given)) < len(given) or len(set(wanted)) < len(wanted):
            return None
        whole = self.values.reshape([factor.size for factor in given])
        for dim in reversed(range(len(given))):
            if given[dim] not in wanted:
                if not torch.equal(whole, whole.narrow(dim, 0, 1).expand_as(whole)):
                    return None
                whole = whole.select(dim, 0)
        if not bool(whole.isfinite().all()):
            said = " and ".join(sorted(self.names))
            raise ValueError(f"scales by {said} are not finite: the training diverges")
        return carried(whole, [factor for factor in given if factor in wanted], wanted)


def scale_of(name: str, call: Call, fixed: Collection[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The numbers by which an operation multiplies activations, if it does, and what they are of.

    Args:
        name: of the operation.
        call: its arguments.
        fixed: those of its arguments that depend on parameters and buffers alone.
    """

    def given(argument: str) -> Tensor | None:
        value = call.named.get(argument)
        return value if any(value is one for one in fixed) else None

    if "batch_norm" in name:
        weight, variance = given("weight"), given("running_var")
        # Of the samples themselves, or of those that it has seen.
        if variance is None or call.named.get("training") or name == "_batch_norm_with_update":
            return None if weight is None else (weight, weight)
        eps = call.named["eps" if "eps" in call.named else "epsilon"]
        one = (variance.double() + eps).rsqrt()
        return (one if weight is None else one * weight), variance
    if name in _WITH_WEIGHT:
        one = given("weight")
    elif name == "mul":
        one, other = given("self"), given("other")
        one = other if one is None else one
    elif name == "div":
        one = given("other")
        return None if one is None else (one.reciprocal(), one)
    else:
        return None
    return None if one is None else (one, one)


class Gains:
    """What activations are multiplied by between contractions.

    Args:
        scales: by number.
        written: the factors that each contraction writes, by number.
        read: those that it reads.
        sources: where what it reads comes from; last, where outputs do.
    """

    def __init__(
        self,
        scales: Sequence[Scale],
        written: Sequence[Sequence[Factor]],
        read: Sequence[Sequence[Factor]],
        sources: Sequence[Sources],
    ) -> None:
        self._scales, self._written, self._read = scales, written, read
        self._left = [dict(one) for one in sources]

    def between(
        self, chain: Iterable[int], written: Sequence[Factor], read: Sequence[Factor]
    ) -> tuple[Tensor, Tensor]:
        """The product of scales on the way from what is written to what is read, on either side.

        Those that vary along neither, as along places of a sequence, do not count.
        """
        behind, ahead = torch.ones(()).double(), torch.ones(()).double()
        for number in chain:
            here = self._scales[number].along(read)
            if here is not None:
                behind = behind * here
            else:
                there = self._scales[number].along(written)
                ahead = ahead if there is None else ahead * there
        return ahead, behind

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Of each contraction, what its weight is multiplied by: by factors written, and read.

        The scale of what comes from one weight alone belongs to that weight, if all that takes from
        it is scaled so; else it belongs to the weights that read. Where one reads a sum of
        activations of different scales, it is the root of their mean square.
        """
        found = []
        for number, written in enumerate(self._written):
            found.append(self.between(self._of_all(number), (), written)[1])
        both = []
        for number, read in enumerate(self._read):
            squares = []
            for chains in self._left[number].values():
                ways = [self.between(chain, (), read)[1] for chain in chains]
                squares.append(sum(ways, torch.zeros(()).double()).square())
            if squares:
                mean = sum(squares, torch.zeros(()).double()) / len(squares)
                both.append((found[number], mean.sqrt()))
            else:  # what it reads does not depend on data
                both.append((found[number], torch.ones(()).double()))
        return both

    def _of_all(self, number: int) -> Iterator[int]:
        """Takes off the scales that all ways from a contraction begin with."""
        ways = [one for one in self._left if number in one]
        while True:
            first = {chain[:1] for one in ways for chain in one[number]}
            if len(first) != 1 or first == {()}:
                return
            ((scale,),) = first
            if self._scales[scale].sources != {number}:
                return
            if self._scales[scale].along(self._written[number]) is None:
                return
            for one in ways:
                one[number] = frozenset(chain[1:] for chain in one[number])
            yield scale


def carried(values: Tensor, given: Sequence[Factor], wanted: Sequence[Factor]) -> Tensor:
    """Values by other factors: summed over those that are not wanted, the same along new ones."""
    for several in (given, wanted):
        if len(set(several)) < len(several):
            raise ValueError("a weight has the same nodes on two axes of one side")
    dropped = [dim for dim, factor in enumerate(given) if factor not in wanted]
    values = values.sum(dropped) if dropped else values
    kept = [factor for factor in given if factor in wanted]
    order = [kept.index(factor) for factor in wanted if factor in kept]
    values = values.permute(order)
    shape = [factor.size if factor in kept else 1 for factor in wanted]
    return values.reshape(shape).expand([factor.size for factor in wanted])
