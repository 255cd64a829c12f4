"""Statistics of nodes: how strong the weights are that reach each hidden unit."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from nettrace.estimators import generator
from nettrace.operator import PerLayer
from nettrace.statistics.kernel import KernelStatistics
from nettrace.statistics.look import Inapplicable

if TYPE_CHECKING:
    from nettrace.landscape.nodes import Nodes


class NodeStatistics(KernelStatistics):
    """The hidden units of a network, by layers, as `nettrace.landscape.nodes` finds them."""

    #: How often weights are shuffled.
    shuffles = 200
    #: The least number of layers that can alternate.
    alternating = 4

    @cached_property
    def nodes(self) -> Nodes:
        """The layers of nodes, and which weights write to them and read them."""
        from nettrace.landscape.nodes import Nodes

        # All processes look at the same samples, and so find the same.
        found = Nodes(self._model, self._probe, self._seed)
        if not found.sizes:
            reasons = [f"{name} {why}" for name, why in found.dropped.items()]
            reasons += [f"{why}: {name}" for name, why in found.left_out.items()]
            said = "; ".join(reasons) or (
                "the order of all units matters to inputs, outputs or each other, as in a network "
                "of one layer, or of one that is called again on what it gives"
            )
            raise ValueError(f"no layer of two or more hidden units was found, for {said}")
        return found

    @cached_property
    def node_strengths(self) -> PerLayer:
        """(2, n) by layer of nodes: sums of squares of weights that write to each, that read it."""
        return self.nodes.strengths()

    @cached_property
    def shuffled_strengths(self) -> PerLayer:
        """(K, 2, n) the same if the numbers of each weight were shuffled, drawn K times."""
        if len(self.nodes.sizes) < self.alternating:
            raise Inapplicable("there are too few layers of nodes to alternate")
        draws = generator(self._seed, "shuffled weights")
        found = [self.nodes.shuffled(draws) for _ in range(self.shuffles)]
        return {name: torch.stack([one[name] for one in found]) for name in self.nodes.sizes}

    @cached_property
    def node_loads(self) -> PerLayer:
        """(n,) by layer of nodes: sums over all paths through each of products of |weights|."""
        return self.nodes.loads()
