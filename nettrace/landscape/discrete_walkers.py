"""Many copies of a network with discrete weights, which change a weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from nettrace.landscape.discrete import DiscreteNetwork, check_patterns
from nettrace.landscape.walkers import Walkers

#: Moves of all copies that are drawn at once; then fields in floating point are computed anew, for
#: the sake of rounding.
_ANEW = 2**18


class DiscreteWalkers(Walkers):
    """Copies of a network, of each of which one weight may change at a time.

    The energy is the number of patterns that are in the wrong class. All copies propose a change
    of a free weight in the same layer, drawn anew each time, to another of the levels: proposals
    are symmetric. Only what a changed weight can change is computed, in single precision, which is
    exact where inputs, levels and what units make of them are whole numbers. Where they are not,
    fields below a hundred-thousandth of the largest count as 0, which they are but for rounding.

    `propose` and `accept` do so in tensors, for any network, and are the reference. Networks of
    signs with one layer, or two with one unit on top, are moved by a compiled loop for each walker
    instead: by Triton where the inputs are on a GPU, else by Numba where that is installed. From
    the same seed they go the same way.

    Args:
        network: the network.
        inputs: (P, inputs).
        labels: (P,) of -1 and 1.
        copies: W.
        generator: of states and proposals.
        weights: (outputs, inputs) of each layer to begin with; by default random ones.

    Attributes:
        energies: (W,)
        weights: (W, outputs, inputs) of each layer.
        levels: of the same shapes, which of the network's levels each weight has.
        change: the one that was proposed last.
        moved_by: "Triton", "Numba" or "torch".

    Raises:
        ValueError: if shapes do not fit, labels are others, or inputs are not finite.
    """

    def __init__(
        self,
        network: DiscreteNetwork,
        inputs: Tensor,
        labels: Tensor,
        copies: int,
        generator: torch.Generator,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        check_patterns(network, inputs, labels)
        self.network = network
        self._generator = generator
        device = inputs.device
        self._each = torch.arange(copies, device=device)
        self._exact = _is_exact(network, inputs)
        self._inputs = inputs.T.float().contiguous()
        self._labels = labels.to(device).float()
        self._negative = float((labels < 0).sum())
        self._levels = torch.tensor(network.levels, device=device)
        self._free = [layer.isnan().nonzero().to(device) for layer in network.layers]
        sizes = torch.tensor([len(free) for free in self._free], dtype=torch.float64)
        self._shares = sizes / sizes.sum()
        self._least = [0.0] * len(network.layers)
        given = network.random(copies, generator) if weights is None else weights
        self.weights = [w.expand(copies, -1, -1).float().to(device, copy=True) for w in given]
        self.levels = [(w[..., None] == self._levels).int().argmax(-1) for w in self.weights]
        self._taken, self._layers, self._uniform = 0, torch.empty(0), torch.empty(0)
        self._kernel, self.moved_by = _kernel(network, device)
        self.energies: Tensor
        self.change: Change
        self._product: Tensor
        self._refresh()
        if not self._exact:
            self._least = [1e-5 * float(fields.abs().max()) for fields in self._fields]
            self._refresh()

    def propose(self, entropy: Tensor) -> tuple[Tensor, None]:
        """(W,) the energies that a change would lead to, symmetrically; `accept` makes it."""
        layers, uniform = self._take(1)
        layer = int(layers[0])
        free, others = self._free[layer], len(self._levels) - 1
        place = (uniform[0] * (len(free) * others)).long()
        unit, source = free[place // others].unbind(1)
        _, outputs, inputs = self.weights[layer].shape
        row = self._each * outputs + unit
        cell = row * inputs + source
        level = self.levels[layer].view(-1).index_select(0, cell)
        then = (level + place % others + 1) % len(self._levels)
        step = self._levels.index_select(0, then) - self._levels.index_select(0, level)
        if layer == 0:
            below = self._inputs.index_select(0, source)
        else:
            below = self._rows(self._activities[layer - 1], self._each * inputs + source)
        fields = torch.addcmul(self._rows(self._fields[layer], row), below, step[:, None])
        change = self.change = Change(layer, row, cell, then, step, below)
        out = self._upwards(change, unit, fields)
        self._proposed = self._count(out)
        return self._proposed, None

    def accept(self, which: Tensor) -> None:
        """Makes the proposed changes of some copies (W,)."""
        here = which.to(self._each.device)
        change, made = self.change, here.float()
        layer = change.layer
        step = change.step * made
        self.weights[layer].view(-1).index_add_(0, change.cell, step)
        levels = self.levels[layer].view(-1)
        before = levels.index_select(0, change.cell)
        levels.index_copy_(0, change.cell, torch.where(here, change.level, before))
        _add(self._fields[layer], change.row, change.below, step)
        if change.activity is not None:
            _add(self._activities[layer], change.row, change.activity, made)
        for above, (fields, activities) in enumerate(change.above, layer + 1):
            self._fields[above] += fields * made[:, None, None]
            if activities is not None:
                self._activities[above] += activities * made[:, None, None]
        if change.product is not None:
            self._product = torch.where(here[:, None], change.product, self._product)
        self.energies = torch.where(which, self._proposed, self.energies)

    def walk(
        self, chances: Tensor, entropy: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moves all walkers; see `Walkers.walk`."""
        if self._kernel is None:
            return super().walk(chances, entropy, low, high)
        network, done = self.network, 0
        track = torch.empty(chances.shape, dtype=torch.int64)
        proposals = torch.empty_like(track)
        while done < len(chances):
            layers, uniform = self._take(len(chances) - done)
            now = slice(done, done + len(layers))
            deep = len(self._activities) > 0
            self._kernel(
                *(layers, uniform, chances[now], entropy, low, high),
                *(self._inputs, self._labels, self._levels, self._free[0], self._free[-1]),
                *(self._least[0], self._least[-1], deep, network.output == "product"),
                *(self.levels[0], self.weights[0], self.levels[-1], self.weights[-1]),
                *(self._fields[0], self._activities[0] if deep else self._fields[0]),
                *(self._product, self.energies, track[now], proposals[now]),
            )
            done = now.stop
        return track, proposals

    def outputs(self, inputs: Tensor) -> Tensor:
        """(W, P) what the networks give for other inputs (P, inputs)."""
        return self.network.fields([w.double() for w in self.weights], inputs)

    def _rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """(W, P) of (W, units, P), one row each."""
        return tensor[:, 0] if tensor.shape[1] == 1 else tensor.flatten(0, 1).index_select(0, rows)

    def _upwards(self, change: Change, unit: Tensor, fields: Tensor) -> Tensor:
        """(W, P) the outputs after a change; what it adds to layers above is noted in it."""
        network, last = self.network, len(self.weights) - 1
        layer = change.layer
        if layer == last and network.output == "sum":
            return fields
        active = self._activated(fields, layer)
        before = self._rows(self._activities[layer], change.row)
        change.activity = active - before
        if layer == last:
            change.product = self._product * active * before
            return change.product
        # One unit has changed: what that adds to all above it.
        weights = self.weights[layer + 1]
        column = weights.gather(2, unit[:, None, None].expand(-1, weights.shape[1], 1))
        added = column * change.activity[:, None]
        for above in range(layer + 1, last + 1):
            then = self._fields[above] + added
            if above == last and network.output == "sum":
                change.above.append((added, None))
                return then[:, 0]
            active = self._activated(then, above)
            turned = active - self._activities[above]
            change.above.append((added, turned))
            if above < last:
                added = torch.bmm(self.weights[above + 1], turned)
        change.product = active.prod(1)
        return change.product

    def _activated(self, fields: Tensor, layer: int) -> Tensor:
        if not self._exact:
            fields = hardshrink(fields, self._least[layer])
        if self.network.activation == "sign":
            return fields.sign().add_(0.5).sign_()
        return self.network.activated(fields)

    def _count(self, outputs: Tensor) -> Tensor:
        """(W,) how many outputs (W, P) are of the wrong class."""
        # -1 where the output is negative, else 0; by arithmetic, which takes less than comparing.
        if not self._exact:
            outputs = hardshrink(outputs, self._least[-1]) * 1e30
        below = outputs.clamp(-1, 0)
        return (self._negative - torch.mv(below, self._labels)).long().cpu()

    def _take(self, most: int) -> tuple[Tensor, Tensor]:
        """Draws for some of the next moves: their layers (moves,), and numbers (moves, W)."""
        if self._taken == len(self._layers):
            if not self._exact:
                self._refresh()
            copies, random = len(self._each), self._generator
            moves = max(16, _ANEW // copies)
            self._layers = torch.multinomial(self._shares, moves, True, generator=random)
            uniform = torch.rand(moves, copies, generator=random, dtype=torch.float64)
            self._uniform, self._taken = uniform.to(self._each.device), 0
        now = slice(self._taken, self._taken + most)
        layers = self._layers[now]
        self._taken += len(layers)
        return layers, self._uniform[now]

    def _refresh(self) -> None:
        """All fields and energies, from the weights."""
        moved = self._inputs.expand(len(self._each), -1, -1)
        self._fields: list[Tensor] = []
        self._activities: list[Tensor] = []
        for number, weight in enumerate(self.weights):
            self._fields.append(torch.bmm(weight, moved))
            if number + 1 < len(self.weights) or self.network.output == "product":
                moved = self._activated(self._fields[-1], number)
                self._activities.append(moved)
        product = self.network.output == "product"
        self._product = moved.prod(1) if product else self._fields[-1][:, 0]
        self.energies = self._count(self._product)


@dataclass
class Change:
    """A proposed change of a weight in each copy, and what follows from it.

    Args:
        layer: of the weight.
        row: (W,) the copy and the unit that it leads to.
        cell: (W,) the copy and the weight.
        level: (W,) which level it would have.
        step: (W,) what is added to it.
        below: (W, P) what it is multiplied with.
    """

    layer: int
    row: Tensor
    cell: Tensor
    level: Tensor
    step: Tensor
    below: Tensor
    #: (W, P) what is added to the activity of the unit.
    activity: Tensor | None = None
    #: For each layer above, what is added to fields and activities (W, units, P).
    above: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    #: (W, P) of all units of the last layer.
    product: Tensor | None = None


def _add(to: Tensor, rows: Tensor, what: Tensor, times: Tensor) -> None:
    """Adds (W, P), times (W,), to one row each of (W, units, P)."""
    if to.shape[1] == 1:
        to[:, 0].addcmul_(what, times[:, None])
    else:
        to.view(-1, to.shape[2]).index_add_(0, rows, what * times[:, None])


def _kernel(
    network: DiscreteNetwork, device: torch.device
) -> tuple[Callable[..., None] | None, str]:
    """What moves copies of a network fast, if there is anything, and its name."""
    two = len(network.layers) == 2 and network.output == "sum"
    if network.activation != "sign" or not (len(network.layers) == 1 or two):
        return None, "torch"
    try:
        name = "nettrace.kernels.flips" if device.type == "cuda" else "nettrace.landscape.compiled"
        return import_module(name).flips_, "Triton" if device.type == "cuda" else "Numba"
    except (ImportError, RuntimeError):  # the latter of Numba, with no folder to keep code in
        return None, "torch"


def _is_exact(network: DiscreteNetwork, inputs: Tensor) -> bool:
    """Whether all fields are whole numbers: sums of whole inputs, or signs, by whole weights."""
    values = [inputs.double(), torch.tensor(network.levels).double()]
    values += [layer[~layer.isnan()].double() for layer in network.layers]
    whole = all(bool((v == v.round()).all()) for v in values)
    return whole and (network.activation == "sign" or len(network.layers) == 1)
