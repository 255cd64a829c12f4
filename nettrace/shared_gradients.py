"""Per-sample gradients of samples that several processes have evaluated, each its share of them.

Each process pulls its own cotangents back. What is found sample by sample is filled in by the
process whose samples they are, and added up at the end; where the gradients of different samples
meet, their factors go round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from nettrace.gradients import Gradients, Layer, Pulled, cut
from nettrace.kernels import Factor
from nettrace.ranks import Ranks

if TYPE_CHECKING:
    from nettrace.operator import Jacobian
    from nettrace.per_sample import LossJacobian

T = TypeVar("T")

#: The worst come first.
_ROUTES = ("rows", "node", "rule", "unused")


def shared(jacobian: Jacobian, ranks: Ranks) -> Jacobian:
    """The Jacobian of the outputs of all processes' samples, one process's after the other's.

    Args:
        jacobian: that of this process's outputs.
        ranks: the processes; each must call this, and then the same of the result.
    """
    if ranks.count == 1:
        return jacobian
    return type(jacobian)(SharedGradients(jacobian._gradients, ranks), jacobian._memory)


def shared_losses(losses: LossJacobian, ranks: Ranks) -> LossJacobian:
    """The Jacobian of what the samples of all processes contribute to the mean of their losses.

    Args:
        losses: that of this process's samples, of which the mean is its loss.
        ranks: as in `shared`.
    """
    if ranks.count == 1:
        return losses
    jacobian = shared(losses.shares, ranks)
    # The mean of all rows is that of the processes' means, however many samples each has.
    factor = losses._factor * jacobian.samples / (losses.samples * ranks.count)
    holds = any(ranks.each(losses.holds_statistics))
    return type(losses)(jacobian, factor, losses._common, holds)


class SharedGradients(Gradients):
    """The gradients of all processes' outputs; all must ask for the same.

    Args:
        own: the gradients of this process's outputs.
        ranks: the processes.
    """

    def __init__(self, own: Gradients, ranks: Ranks) -> None:
        super().__init__(ranks.join(own.outputs.detach()), own.parameters)
        self.dtype = own.dtype
        self._own = own
        self._ranks = ranks
        counts = ranks.each(len(own.outputs))
        starts = [sum(counts[:r]) for r in range(ranks.count + 1)]
        self._ranges = [slice(a, b) for a, b in pairwise(starts)]
        self._range = self._ranges[ranks.number]
        #: What the processes have agreed on, by what was asked.
        self._agreed: dict[object, object] = {}
        #: Layers that are used in several ways, so that factors must be laid out as parameters are.
        self._unlike: set[Layer] = set()
        self._last: tuple[object, Pulled, Factor] | None = None

    def signature(self) -> str:
        """The digests of all processes' tapes."""
        return " ".join(self._ranks.each(self._own.signature()))

    def precision(self) -> float:
        """That of the coarsest arithmetic anywhere."""
        return max(self._ranks.each(self._own.precision()))

    def backward(self, cotangent: Tensor) -> dict[str, Tensor]:
        """The gradient of each parameter for one cotangent, summed over all processes' samples."""
        found = self._own.backward(cotangent[self._range].contiguous())
        self._ranks.add_(list(found.values()))
        return found

    def layers(self, apart: bool) -> list[Layer]:
        """Those that any process has; parameters are one by one where not all have the same."""
        own = self._own_layers(apart)
        found = self._agree(("layers", apart), lambda: own)
        if all(one == found[0] for one in found):
            return self._compared(own)
        if not apart:
            return self.layers(apart=True)
        known = {layer for one in found for layer in one}
        return self._compared([(name,) for name in self.parameters if (name,) in known])

    def coverage(self) -> dict[str, str]:
        """The route that is furthest from a rule of those that processes go."""
        found = self._agree("coverage", self._own.coverage)
        return {
            name: min((one[name] for one in found), key=_ROUTES.index) for name in self.parameters
        }

    def pull(self, cotangents: Tensor, layers: Sequence[Layer]) -> Pulled:
        """Pulls this process's cotangents back."""
        mine = self._known(layers)
        return self._own.pull(cotangents[:, self._range], mine) if mine else {}

    def bytes_per_cotangent(self, layers: Sequence[Layer]) -> int:
        """The most that any process holds."""
        own = partial(self._own.bytes_per_cotangent, self._known(layers))
        return max(self._agree(("bytes", tuple(layers)), own))

    def at_once(self, layers: Sequence[Layer]) -> int:
        """As many as suit all."""
        own = partial(self._own.at_once, self._known(layers))
        return min(self._agree(("at once", tuple(layers)), own))

    def forget(self) -> None:
        """Lets go of what is kept from one pullback to the next, if anything is."""
        self._last = None
        self._own.forget()

    def factor(
        self, layer: Layer, pulled: Pulled, samples: slice, oriented: bool = False
    ) -> Factor:
        """The gradients of a layer for samples of this process's."""
        key = (layer, samples.start, samples.stop, oriented)
        if self._last is not None and self._last[0] == key and self._last[1] is pulled:
            return self._last[2]
        first = self._range.start
        own = slice(samples.start - first, samples.stop - first)
        found = self._own.factor(layer, pulled, own, oriented or layer in self._unlike)
        self._last = (key, pulled, found)
        return found

    def is_written_out(self, layer: Layer) -> bool:
        """Whether any process writes them out."""

        def own() -> bool:
            return bool(self._known([layer])) and self._own.is_written_out(layer)

        return any(self._agree(("written out", layer), own))

    def tiles(self, layer: Layer, step: int) -> list[slice]:
        """This process's samples, so many at a time; none if they do not use the layer."""
        if not self._known([layer]):
            return []
        return cut(self._range.start, self._range.stop, step)

    def each(self, layer: Layer, pulled: Pulled, step: int) -> Iterator[tuple[slice, Factor]]:
        """The gradients of all processes' samples, which go round."""
        having = self._agree(("having", layer), lambda: bool(self._known([layer])))
        for owner, samples in enumerate(self._ranges):
            if not having[owner]:
                continue
            for ms in cut(samples.start, samples.stop, step):
                make = partial(self.factor, layer, pulled, ms)
                yield ms, self._ranks.pass_on(make, owner)

    def partners(self, layer: Layer, ms: slice, step: int) -> list[slice]:
        """Those of this process's tiles whose products with the samples ms it makes.

        Of two processes, one makes the products of their samples, and each as often as another.
        """
        mine = self.tiles(layer, step)
        if self._range.start <= ms.start < self._range.stop:
            return [ns for ns in mine if ns.start <= ms.start]
        other = next(r for r, one in enumerate(self._ranges) if one.start <= ms.start < one.stop)
        own = self._ranks.number
        return mine if ((own + other) % 2 == 0) == (own < other) else []

    def remade(self, make: Callable[[Gradients], Gradients]) -> Gradients:
        """What is made of these, sample by sample."""
        with self._ranks.together():
            own = make(self._own)
        return SharedGradients(own, self._ranks)

    def with_fewer_outputs(
        self, fewer: Callable[[Gradients], tuple[Gradients, dict[str, Tensor]] | None]
    ) -> tuple[Gradients, dict[str, Tensor]] | None:
        """The same of fewer outputs, and what is left out; see `nettrace.heads`."""
        with self._ranks.together():
            found = fewer(self._own)
        if not all(self._ranks.each(found is not None)) or found is None:
            return None
        self._ranks.add_(list(found[1].values()))
        return SharedGradients(found[0], self._ranks), found[1]

    def complete(self, shares: Mapping[str, Tensor]) -> None:
        """Adds up results, to which each process has added what it made of its samples."""
        self._ranks.add_(list(shares.values()))

    def _compared(self, layers: list[Layer]) -> list[Layer]:
        """The layers, after noting which of them processes use in several ways."""
        forms = self._agree(
            ("forms", tuple(layers)), lambda: {x: self._own.form(x) for x in self._known(layers)}
        )
        for layer in layers:
            if len({one[layer] for one in forms if layer in one}) > 1:
                self._unlike.add(layer)
        return layers

    def _own_layers(self, apart: bool) -> list[Layer]:
        with self._ranks.together():
            return self._own.layers(apart)

    def _known(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of the layers that this process's outputs depend on."""
        own = {name for (name,) in self._own.layers(apart=True)}
        return [layer for layer in layers if own.issuperset(layer)]

    def _agree(self, about: object, own: Callable[[], T]) -> list[T]:
        """What each process says; they are asked once."""
        if about not in self._agreed:
            with self._ranks.together():
                said = own()
            self._agreed[about] = self._ranks.each(said)
        return self._agreed[about]  # type: ignore[return-value]
