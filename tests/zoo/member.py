"""What a member of the zoo is, and how it is registered and built."""

from __future__ import annotations

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


def losses(outputs: Tensor) -> Tensor:
    """(N,) half the squared distance to a fixed target; outputs (N,) are losses themselves."""
    if outputs.dim() == 1:
        return outputs
    return (outputs.double() - 0.3).square().flatten(1).sum(1) / 2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to make a model and a batch of `N` samples, and outputs (N, ...) from them.

    Args:
        make: makes the model.
        draw: draws the samples.
        families: the families of workloads (W1 to W20) that it belongs to.
        routes: by which routes the parameters' gradients should be found.
        forward: gets outputs from model and batch.
        of: the part of the model by whose parameters to differentiate.
        singles: the batch with one sample alone, where axis 0 of the parts does not count samples.
        alone: whether a sample alone gives what it gives in the batch: not where the forward pass
            draws noise, or samples are coupled, or it follows its batch's range.
        coupled: whether samples depend on each other, which must be refused.
        training: whether the model is in training mode.
        dtype: of parameters and samples.
        tolerance: relative to the largest entry.
    """

    make: Callable[[], nn.Module]
    draw: Callable[[], Batch]
    families: frozenset[str]
    routes: frozenset[str]
    forward: Callable[[nn.Module, Batch], Tensor] = call
    of: Callable[[nn.Module], nn.Module] = lambda model: model
    singles: Callable[[Batch, int], Batch] | None = None
    alone: bool = True
    coupled: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10


@dataclass(frozen=True, kw_only=True)
class Member(Kind):
    """One of its kind, made."""

    model: nn.Module
    batch: Batch

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


ZOO: dict[str, Kind] = {}


def member(
    name: str, families: str, draw: Callable[[], Batch], routes: str = "rule", **options: object
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers what makes a model under a name; families and routes are separated by spaces."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in ZOO
        ZOO[name] = Kind(
            make=make,
            draw=draw,
            families=frozenset(families.split()),
            routes=frozenset(routes.split()),
            **options,
        )
        return make

    return register


def build(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> Member:
    """A member from a fixed seed, in its own dtype unless told."""
    torch.manual_seed(seed)
    kind = ZOO[name]
    model, batch = kind.make(), kind.draw()
    dtype = dtype or kind.dtype

    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    model = model._apply(cast).train(kind.training)
    batch = tuple(map(cast, batch)) if isinstance(batch, tuple) else cast(batch)
    return Member(**vars(kind) | {"dtype": dtype}, model=model, batch=batch)
