"""Batch normalisation in training mode, with the statistics of the batch held constant.

Each output depends on the whole batch, through its mean and variance. With those held constant the
operation is an affine map of each sample by itself: a gradient g of its output flows back as
g weight / sqrt(variance + eps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

_Gradients: TypeAlias = tuple[Tensor | None, ...]


def is_training_norm(node: Node) -> bool:
    """Whether a node of the tape normalises by statistics of a batch."""
    name = node.name()
    return "SyncBatchNorm" in name or (
        "BatchNormBackward" in name and bool(getattr(node, "_saved_training", False))
    )


def may_be_held(node: Any) -> bool:
    """Whether it can be held constant here: not across processes, nor for instance normalisation.

    The latter is batch normalisation of one entry, of which the samples are channels.
    """
    if "SyncBatchNorm" in node.name() or not is_training_norm(node):
        return False
    return bool(node._input_metadata[0].shape[0] > 1)


@contextmanager
def held(nodes: Iterable[Node]) -> Iterator[None]:
    """Holds the statistics of such nodes constant in the backward passes within."""
    handles = [node.register_hook(_affine(node)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _affine(node: Any) -> Callable[[_Gradients, _Gradients], _Gradients]:
    def backward(inner: _Gradients, outer: _Gradients) -> _Gradients:
        gradient, *others = inner
        flow = outer[0]
        if flow is not None and torch.is_grad_enabled():  # with a tape, to be differentiated again
            return _recorded(node, inner, flow)
        if gradient is None or flow is None:
            return inner
        scale = node._saved_result2
        if node._saved_weight is not None:
            scale = scale * node._saved_weight
        shape = (-1,) + (1,) * (gradient.dim() - 2)
        return (flow * scale.detach().view(shape)).to(gradient), *others

    return backward


def _recorded(node: Any, inner: _Gradients, flow: Tensor) -> _Gradients:
    """The gradients of an affine map by its input, scale and shift, with their tape."""
    shape = (1, -1) + (1,) * (flow.dim() - 2)
    axes = [axis for axis in range(flow.dim()) if axis != 1]
    mean, scale = (s.detach().view(shape) for s in (node._saved_result1, node._saved_result2))
    weight = node._saved_weight
    found = (
        flow * scale if weight is None else flow * scale * weight.view(shape),
        (flow * (node._saved_input - mean) * scale).sum(axes),
        flow.sum(axes),
    )
    return tuple(None if g is None else f.to(g) for f, g in zip(found, inner, strict=True))
