"""What a member of the zoo is, and how it is registered and built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

N = 4

Batch: TypeAlias = Tensor | tuple[Tensor, ...]


def call(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def last_token(model: nn.Module, batch: Batch) -> Tensor:
    return call(model, batch)[:, -1, :7]


def square(outputs: Tensor) -> Tensor:
    """(N,) half the squared distance to a fixed target; outputs (N,) are losses themselves."""
    if outputs.dim() == 1:
        return outputs
    return (outputs.double() - 0.3).square().flatten(1).sum(1) / 2


@dataclass(frozen=True)
class Member:
    """A model, a batch of `N` samples, and how to get outputs (N, ...) from them.

    Args:
        model: the model.
        batch: the samples.
        families: the families of workloads (W1 to W20) that it belongs to.
        forward: how to get outputs from model and batch.
        routes: by which routes the parameters' gradients should be found.
        of: the part of the model by whose parameters to differentiate.
        singles: the batch with one sample alone, where axis 0 of the parts does not count samples.
        alone: whether a sample alone gives what it gives in the batch: not where the forward pass
            draws noise, or samples are coupled, or it follows its batch's range.
        coupled: whether samples depend on each other, which must be refused.
        training: whether the model is in training mode.
        dtype: of parameters and samples.
        tolerance: relative to the largest entry.
    """

    model: nn.Module
    batch: Batch
    families: str
    forward: Callable[[nn.Module, Batch], Tensor] = call
    routes: frozenset[str] = frozenset({"rule"})
    of: Callable[[nn.Module], nn.Module] = lambda model: model
    singles: Callable[[Batch, int], Batch] | None = None
    alone: bool = True
    coupled: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10

    @property
    def target(self) -> nn.Module:
        """What to differentiate by."""
        return self.of(self.model)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters to differentiate by."""
        return {name: p for name, p in self.target.named_parameters() if p.requires_grad}

    def take(self, n: int) -> Batch:
        """The batch with sample `n` alone."""
        if self.singles is not None:
            return self.singles(self.batch, n)
        if isinstance(self.batch, Tensor):
            return self.batch[n : n + 1]
        return tuple(part[n : n + 1] for part in self.batch)


def singles_of(graph: int) -> Callable[[Batch, int], Batch]:
    """Takes the rows that part number `graph` of the batch assigns to one sample."""

    def take(batch: Batch, n: int) -> Batch:
        rows = batch[graph] == n
        return tuple(part[rows] * (0 if i == graph else 1) for i, part in enumerate(batch))

    return take


ZOO: dict[str, Callable[[], Member]] = {}


def member(
    name: str, families: str, batch: Callable[[], Batch], routes: str = "rule", **options: object
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers what makes a model under a name; `routes` are separated by spaces."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in ZOO
        ZOO[name] = lambda: Member(
            make(), batch(), families, routes=frozenset(routes.split()), **options
        )
        return make

    return register


def build(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> Member:
    """A member from a fixed seed, in its own dtype unless told."""
    torch.manual_seed(seed)
    made = ZOO[name]()
    dtype = dtype or made.dtype

    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    batch = made.batch
    batch = tuple(map(cast, batch)) if isinstance(batch, tuple) else cast(batch)
    model = made.model._apply(cast).train(made.training)
    return dataclasses.replace(made, model=model, batch=batch, dtype=dtype)
