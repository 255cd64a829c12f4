"""Networks with discrete weights, and many copies of one that change a weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

#: Moves of all copies that are drawn at once; then fields in floating point are computed anew, for
#: the sake of rounding.
_ANEW = 2**18


@dataclass(frozen=True)
class DiscreteNetwork:
    """A classifier in two classes of which each weight takes one of a few values.

    Args:
        layers: for each layer, a matrix (outputs, inputs): NaN where the weight is free, else its
            value. The last has one output, unless units are multiplied.
        levels: the values that free weights take, such as (-1, 1) or (-1, 0, 1).
        activation: of hidden units: "sign", which is 1 at 0, or a function applied to each number.
        output: "sum", the last layer's field; or "product", the product of the last layer's units,
            as in a parity machine.

    The output is of class 1 where it is 0 or more, else of class -1.

    Attributes:
        weights: N, how many are free.
        states: how many networks there are, len(levels) ** N.

    Raises:
        ValueError: if shapes do not fit, nothing is free, or there are not two levels.
    """

    layers: tuple[Tensor, ...]
    levels: tuple[float, ...] = (-1.0, 1.0)
    activation: Literal["sign"] | Callable[[Tensor], Tensor] = "sign"
    output: Literal["sum", "product"] = "sum"

    def __post_init__(self) -> None:
        if len(set(self.levels)) < 2 or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"expected two or more different levels, got {self.levels}")
        if not self.layers or any(layer.dim() != 2 for layer in self.layers):
            raise ValueError("expected layers to be matrices (outputs, inputs), one at least")
        for one, following in pairwise(self.layers):
            if following.shape[1] != one.shape[0]:
                raise ValueError(
                    f"a layer of {one.shape[0]} outputs is followed by one of "
                    f"{following.shape[1]} inputs"
                )
        if self.output not in ("sum", "product"):
            raise ValueError(f"expected output= to be 'sum' or 'product', got {self.output!r}")
        if self.output == "sum" and self.layers[-1].shape[0] != 1:
            raise ValueError(
                f"expected one output in the last layer, got {self.layers[-1].shape[0]}"
            )
        if self.output == "product" and self.activation != "sign":
            raise ValueError("units are multiplied as signs: expected activation='sign'")
        if self.weights == 0:
            raise ValueError("no weight is free: mark free ones as NaN")

    @property
    def weights(self) -> int:
        """N, how many weights are free."""
        return sum(int(layer.isnan().sum()) for layer in self.layers)

    @property
    def states(self) -> int:
        """How many networks there are."""
        return int(len(self.levels) ** self.weights)

    def random(self, copies: int, generator: torch.Generator) -> list[Tensor]:
        """Weights (copies, outputs, inputs) of each layer, all states alike."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        found = []
        for layer in self.layers:
            drawn = torch.randint(len(levels), (copies, *layer.shape), generator=generator)
            found.append(torch.where(layer.isnan(), levels[drawn], layer.double()))
        return found

    def fields(self, weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """(copies, P) the outputs of networks with given weights for inputs (P, inputs)."""
        moved = inputs.to(weights[0].dtype).T.expand(len(weights[0]), -1, -1)
        for number, weight in enumerate(weights):
            moved = weight @ moved
            # What is 0 but for rounding.
            moved = hardshrink(moved, 1e-9 * float(moved.abs().max()))
            if number + 1 < len(weights) or self.output == "product":
                moved = self.activated(moved)
        return moved.prod(1)

    def activated(self, fields: Tensor) -> Tensor:
        """What hidden units make of their fields."""
        if self.activation == "sign":
            return (fields >= 0).to(fields.dtype) * 2 - 1
        assert callable(self.activation)
        return self.activation(fields)


def perceptron(inputs: int, *, levels: Sequence[float] = (-1.0, 1.0)) -> DiscreteNetwork:
    """One unit: the sign of w . x."""
    return DiscreteNetwork((_free(1, inputs),), tuple(levels))


def committee(
    inputs: int, units: int, *, tree: bool = False, levels: Sequence[float] = (-1.0, 1.0)
) -> DiscreteNetwork:
    """The majority of units' signs, where half of them count as 1.

    Args:
        inputs: N.
        units: K.
        tree: whether each unit sees N / K inputs of its own, rather than all of them.
        levels: of weights.
    """
    return DiscreteNetwork(
        (_receptive(inputs, units, tree), torch.ones(1, units, dtype=torch.float64)), tuple(levels)
    )


def parity(
    inputs: int, units: int, *, tree: bool = False, levels: Sequence[float] = (-1.0, 1.0)
) -> DiscreteNetwork:
    """The product of units' signs; the arguments are those of `committee`."""
    return DiscreteNetwork((_receptive(inputs, units, tree),), tuple(levels), output="product")


def multilayer(
    *widths: int,
    levels: Sequence[float] = (-1.0, 1.0),
    activation: Literal["sign"] | Callable[[Tensor], Tensor] = "sign",
) -> DiscreteNetwork:
    """Layers of which all weights are free: `multilayer(5, 3, 1)` has 18."""
    layers = [_free(after, before) for before, after in pairwise(widths)]
    return DiscreteNetwork(tuple(layers), tuple(levels), activation)


def _free(outputs: int, inputs: int) -> Tensor:
    return torch.full((outputs, inputs), torch.nan, dtype=torch.float64)


def _receptive(inputs: int, units: int, tree: bool) -> Tensor:
    if not tree:
        return _free(units, inputs)
    if inputs % units:
        raise ValueError(f"a tree deals {inputs} inputs out to {units} units: expected a multiple")
    seen = torch.eye(units).repeat_interleave(inputs // units, 1)
    return torch.where(seen > 0, torch.nan, 0.0).double()


class DiscreteWalkers:
    """Copies of a network, of each of which one weight may change at a time.

    The energy is the number of patterns that are in the wrong class. All copies propose a change
    of a free weight in the same layer, drawn anew each time, to another of the levels: proposals
    are symmetric. Only what a changed weight can change is computed, in single precision, which is
    exact where inputs, levels and what units make of them are whole numbers. Where they are not,
    fields below a hundred-thousandth of the largest count as 0, which they are but for rounding.

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
        self._each = torch.arange(copies)
        self._exact = _is_exact(network, inputs)
        self._inputs = inputs.T.float().contiguous()
        self._labels = labels.float()
        self._negative = float((labels < 0).sum())
        self._levels = torch.tensor(network.levels)
        self._free = [layer.isnan().nonzero() for layer in network.layers]
        sizes = torch.tensor([len(free) for free in self._free], dtype=torch.float64)
        self._shares = sizes / sizes.sum()
        self._least = [0.0] * len(network.layers)
        given = network.random(copies, generator) if weights is None else weights
        self.weights = [w.expand(copies, -1, -1).float().clone() for w in given]
        self.levels = [(w[..., None] == self._levels).int().argmax(-1) for w in self.weights]
        self._draws: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.energies: Tensor
        self.change: Change
        self._product: Tensor
        self._refresh()
        if not self._exact:
            self._least = [1e-5 * float(fields.abs().max()) for fields in self._fields]
            self._refresh()

    def propose(self, entropy: Tensor) -> tuple[Tensor, None]:
        """(W,) the energies that a change would lead to, symmetrically; `accept` makes it."""
        if not self._draws:
            if not self._exact:
                self._refresh()
            self._draw()
        layer, unit, source, turn = self._draws.pop()
        _, outputs, inputs = self.weights[layer].shape
        row = self._each * outputs + unit
        cell = row * inputs + source
        level = self.levels[layer].view(-1).index_select(0, cell)
        then = (level + turn) % len(self._levels)
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
        change, made = self.change, which.float()
        layer = change.layer
        step = change.step * made
        self.weights[layer].view(-1).index_add_(0, change.cell, step)
        levels = self.levels[layer].view(-1)
        before = levels.index_select(0, change.cell)
        levels.index_copy_(0, change.cell, torch.where(which, change.level, before))
        _add(self._fields[layer], change.row, change.below, step)
        if change.activity is not None:
            _add(self._activities[layer], change.row, change.activity, made)
        for above, (fields, activities) in enumerate(change.above, layer + 1):
            self._fields[above] += fields * made[:, None, None]
            if activities is not None:
                self._activities[above] += activities * made[:, None, None]
        if change.product is not None:
            self._product = torch.where(which[:, None], change.product, self._product)
        self.energies = torch.where(which, self._proposed, self.energies)

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
        return (self._negative - torch.mv(below, self._labels)).long()

    def _draw(self) -> None:
        """Which weights the next changes are of, and to which level."""
        copies, other, random = len(self._each), len(self._levels), self._generator
        moves = max(16, _ANEW // copies)
        layers = torch.multinomial(self._shares, moves, True, generator=random).tolist()
        uniform = torch.rand(moves, copies, generator=random)
        turns = torch.randint(1, other, (moves, copies), generator=random)
        for number, layer in enumerate(layers):
            free = self._free[layer]
            place = free[(uniform[number] * len(free)).long().clamp_(max=len(free) - 1)]
            self._draws.append((layer, place[:, 0], place[:, 1], turns[number]))

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


def check_patterns(network: DiscreteNetwork, inputs: Tensor, labels: Tensor) -> None:
    """Refuses patterns that do not fit a network.

    Raises:
        ValueError: if so.
    """
    if inputs.dim() != 2 or len(inputs) == 0 or inputs.shape[1] != network.layers[0].shape[1]:
        raise ValueError(
            f"expected inputs of shape (patterns, {network.layers[0].shape[1]}), got "
            f"{tuple(inputs.shape)}"
        )
    if labels.shape != (len(inputs),) or not bool((labels.abs() == 1).all()):
        raise ValueError(
            f"expected {len(inputs)} labels, each -1 or 1, got shape {tuple(labels.shape)} with "
            f"values {labels.unique().tolist()[:4]}"
        )
    if not bool(inputs.isfinite().all()):
        raise ValueError("some inputs are not finite")


def _is_exact(network: DiscreteNetwork, inputs: Tensor) -> bool:
    """Whether all fields are whole numbers: sums of whole inputs, or signs, by whole weights."""
    values = [inputs.double(), torch.tensor(network.levels).double()]
    values += [layer[~layer.isnan()].double() for layer in network.layers]
    whole = all(bool((v == v.round()).all()) for v in values)
    return whole and (network.activation == "sign" or len(network.layers) == 1)
