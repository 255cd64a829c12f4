"""Fewer outputs with the same trace, where the outputs are a linear map of fewer features.

The logits of a language model are o_t = W h_t + b, with V logits and D features a token, D << V.
The trace of J J^T is the same in any orthonormal basis of the outputs. Let the columns of U (V x D)
be one of the range of W, its singular vectors. A direction q orthogonal to them does not see h
change, since q^T W = 0, so that its gradient is h_t at W's row q and 1 at b, whatever else W is
used for. Hence

    tr J J^T = tr J_U J_U^T + (V - D) sum_nt (|h_nt|^2 + 1),

exactly, where J_U belongs to the D outputs U^T o_t of a token: only they need backward passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from nettrace.gradients import Gradients, TapeGradients
from nettrace.tape import Tape, shape_of

if TYPE_CHECKING:
    from nettrace.operator import Jacobian

_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def reduce_outputs(jacobian: Jacobian) -> tuple[Jacobian, dict[str, Tensor]]:
    """The Jacobian of fewer outputs, and what its trace leaves out.

    Returns:
        J_U, and the trace's share of the directions beside the range of W, by parameter; `jacobian`
        itself and nothing if its outputs are no such map.
    """
    found = None
    if jacobian._cotangents is None:
        found = jacobian._gradients.with_fewer_outputs(_fewer)
    if found is None:
        return jacobian, {}
    return type(jacobian)(found[0], jacobian._memory), found[1]


def _fewer(gradients: Gradients) -> tuple[Gradients, dict[str, Tensor]] | None:
    """The gradients of the outputs in a basis of the head's range, and what the rest has."""
    head = _head(gradients) if isinstance(gradients, TapeGradients) else None
    if head is None:
        return None
    assert isinstance(gradients, TapeGradients)
    h, w, weight, bias = head
    features, logits = w.shape
    with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
        basis, triangle = torch.linalg.qr(w.detach().mT.to(gradients.dtype))
        basis = basis @ torch.linalg.svd(triangle).U  # the singular vectors of W
        outputs = h.to(gradients.dtype) @ (w.to(gradients.dtype) @ basis)
        if bias is not None:
            outputs = outputs + gradients.parameters[bias].to(gradients.dtype) @ basis
        outputs = outputs.view(*gradients.outputs.shape[:-1], features)
    rest = logits - features
    left_out = {weight: rest * h.detach().double().square().sum()}
    if bias is not None:
        left_out[bias] = left_out[weight].new_tensor(rest * len(h))
    tape = Tape.behind(outputs, gradients.parameters, [*gradients._tape._constants, basis])
    return TapeGradients(outputs, gradients.parameters, tape, gradients._memory), left_out


def _head(gradients: TapeGradients) -> tuple[Tensor, Tensor, str, str | None] | None:
    """H (tokens, D), W^T (D, V) and the names of W and b, if the outputs are such a map and D < V.

    W must be a parameter, each of whose elements is used once, and b a parameter or missing.
    """
    tape = gradients._tape
    node: Any = gradients.outputs.grad_fn
    while node.name() in _RESHAPES:
        node = node.next_functions[0][0]
    if node.name() == "MmBackward0":
        h, w, slot = node._saved_self, node._saved_mat2, 1
    elif node.name() == "AddmmBackward0" and node._saved_alpha == node._saved_beta == 1:
        h, w, slot = node._saved_mat1, node._saved_mat2, 2
    else:
        return None
    if h is None or w is None or h.is_complex():  # each is kept where the other needs a gradient
        return None
    few = w.shape[0] < w.shape[1] == gradients.outputs.shape[-1]
    sources = {use.slot: use.source for use in tape.uses() if use.node is node}
    if not few or slot not in sources or not tape.carries_samples(get_gradient_edge(h).node):
        return None
    views = gradients._views(sources[slot])
    weight = next(iter(views))
    bias = None
    if slot == 2 and node.next_functions[0][0] is not None:
        bias = tape.leaf(sources[0]) if 0 in sources else None
        if bias is None or shape_of(sources[0].node, sources[0].output_nr) != w.shape[1:]:
            return None
    return None if views[weight] == "computed" else (h, w, weight, bias)
