"""Products of the Jacobian with a vector from the right, without one backward pass an output.

v -> J^T v is linear and is itself recorded by autograd; pulling u back through that record gives
J u, for two passes whatever the number of outputs. It needs the backward of every operation to be
differentiable, which that of fused attention is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nettrace.operator import Jacobian, PerLayer


def twice_pulled(jacobian: Jacobian, v: Tensor, u: PerLayer | None = None) -> Tensor | None:
    """J u by a backward pass through a backward pass; J J^T v without `u`.

    Args:
        jacobian: J.
        v: (N, C); beside `u` any generic vector, with which the result is checked.
        u: a tensor for each parameter.

    Returns:
        (N, C), or None where some operation's backward is not differentiable: where autograd says
        so, and where it does not but <v, J u> differs from <J^T v, u>.
    """
    gradients = jacobian._gradients
    v = v.detach().to(gradients.outputs).requires_grad_()
    parameters = gradients.parameters
    try:
        with torch.enable_grad():
            mix = jacobian._cotangents
            cotangent = v if mix is None else torch.einsum("nk,knc->nc", v, mix)
            pulled = torch.autograd.grad(
                gradients.outputs,
                list(parameters.values()),
                cotangent.view_as(gradients.outputs),
                create_graph=True,
                allow_unused=True,
            )
            live = {
                name: g
                for name, g in zip(parameters, pulled, strict=True)
                if g is not None and g.requires_grad
            }
            given = {name: g.detach() if u is None else u[name] for name, g in live.items()}
            (product,) = torch.autograd.grad(list(live.values()), v, list(given.values()))
    except RuntimeError:
        return None
    there = float((product.double() * v.detach()).sum())
    back = sum(float((g.detach().conj() * given[name]).real.sum()) for name, g in live.items())
    scale = float(product.double().norm() * v.detach().double().norm())
    if abs(there - back) > torch.finfo(product.dtype).eps ** 0.5 * scale:
        return None
    return product.to(gradients.dtype)


def gram_product(jacobian: Jacobian, v: Tensor) -> Tensor:
    """J J^T v, (N, C); see `Jacobian.gram_product`."""
    found = twice_pulled(jacobian, v)
    return jacobian.jvp(jacobian.vjp(v, per_layer=True)) if found is None else found
