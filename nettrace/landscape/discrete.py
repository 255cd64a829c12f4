"""Networks with discrete weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink


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
        if not all(math.isfinite(level) for level in self.levels):
            raise ValueError(f"expected levels to be finite, got {self.levels}")
        if self.activation != "sign" and not callable(self.activation):
            raise ValueError(
                f"expected activation= to be 'sign' or a function, got {self.activation!r}"
            )
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


def check_patterns(network: DiscreteNetwork, inputs: Tensor, labels: Tensor) -> None:
    """Refuses patterns that do not fit a network.

    Raises:
        TypeError: if the network is none of discrete weights, or inputs or labels no tensors.
        ValueError: if they do not fit.
    """
    if not isinstance(network, DiscreteNetwork):
        raise TypeError(
            f"expected a network of discrete weights, such as perceptron(15), got "
            f"{type(network).__name__}: for continuous weights, see loss_density"
        )
    if not isinstance(inputs, Tensor) or inputs.is_complex() or inputs.requires_grad:
        raise TypeError(
            f"expected inputs= to be a tensor of real numbers, detached, got {_told(inputs)}"
        )
    if inputs.dim() != 2 or len(inputs) == 0 or inputs.shape[1] != network.layers[0].shape[1]:
        raise ValueError(
            f"expected inputs of shape (patterns, {network.layers[0].shape[1]}), got "
            f"{tuple(inputs.shape)}"
        )
    check_labels(inputs, labels)
    if not bool(inputs.isfinite().all()):
        raise ValueError("some inputs are not finite")


def check_labels(inputs: Tensor, labels: Tensor) -> None:
    """Refuses labels other than -1 and 1, or not one for each pattern.

    Raises:
        TypeError: if they are no tensor.
        ValueError: if so.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected labels= to be a tensor, got {_told(labels)}")
    if labels.shape != (len(inputs),) or not bool((labels.double().abs() == 1).all()):
        raise ValueError(
            f"expected {len(inputs)} labels, each -1 or 1, got shape {tuple(labels.shape)} with "
            f"values {labels.unique().tolist()[:4]}"
        )


def _told(given: Any) -> str:
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{given.dtype}" + (" that requires a gradient" if given.requires_grad else "")
