"""Hooks on gradients, which backward passes call: ours too, unless they are kept from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.autograd.graph import Node

_HOOKED = "nettrace: the tensor has hooks"


@contextmanager
def noted() -> Iterator[list[str]]:
    """Notes which computed tensors are given hooks meanwhile, for which the tape has no sign.

    Yields:
        The names of the methods that were called for it, as they are.
    """
    found: list[str] = []
    with ExitStack() as stack:
        for name in ("register_hook", "retain_grad"):
            stack.enter_context(patch.object(Tensor, name, _noting(name, found)))
        yield found


def _noting(name: str, found: list[str]) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    @wraps(method)
    def noting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.grad_fn is not None:
            found.append(f"Tensor.{name}")
            _notes(tensor.grad_fn)[_HOOKED] = True
        return method(tensor, *arguments, **options)

    return noting


def is_hooked(node: Node) -> bool:
    """Whether a result of an operation was given hooks while that was noted."""
    return _HOOKED in _notes(node)


def _notes(node: Node) -> dict[Any, Any]:
    """What is kept with an operation of the tape, as long as the tape is."""
    return node.metadata  # type: ignore[return-value]  # which torch declares as a method


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Takes the hooks of parameters off meanwhile, such as those that log or clip gradients."""
    found = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    kept = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, these in zip(found, kept, strict=True):
            hooks.update(these)
