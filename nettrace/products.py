"""Products of the Jacobian with vectors from the right, without one backward pass an output.

v -> J^T v is linear and is itself recorded by autograd; pulling u back through that record gives
J u, for one pass more whatever the number of outputs. It needs the backward pass of every operation
to be differentiable, which that of fused attention is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nettrace.operator import Jacobian, PerLayer


class Pushforward:
    """u -> J u, by backward passes through the backward pass of one vector.

    Args:
        jacobian: J.
        v: (N, C) the vector; any generic one will do, and serves to check every product.
    """

    def __init__(self, jacobian: Jacobian, v: Tensor) -> None:
        gradients, mix = jacobian._gradients, jacobian._cotangents
        self._dtype = gradients.dtype
        self._v = v.detach().to(gradients.outputs).requires_grad_()
        with torch.enable_grad():
            cotangent = self._v if mix is None else torch.einsum("nk,knc->nc", self._v, mix)
            pulled = gradients._autograd(
                list(gradients.parameters.values()),
                cotangent.view_as(gradients.outputs),
                create_graph=True,
            )
        self._pulled = {
            name: gradients.scaled(name, g)
            for name, g in zip(gradients.parameters, pulled, strict=True)
            if g is not None and g.requires_grad
        }

    def __call__(self, u: PerLayer | None = None) -> Tensor | None:
        """J u, (N, C), where `u` has a tensor for each parameter; J J^T v without it.

        Returns:
            None where some operation's backward pass is not differentiable: where autograd says so,
            and where it does not, but <v, J u> differs from <J^T v, u>.
        """
        pulled = list(self._pulled.values())
        given = [g.detach() if u is None else u[name] for name, g in self._pulled.items()]
        try:
            (product,) = torch.autograd.grad(pulled, self._v, given, retain_graph=True)
        except RuntimeError:
            return None
        v, product = self._v.detach().double(), product.to(self._dtype)
        left = float((product * v).sum())
        right = sum(
            float((g.detach().conj() * x).real.sum(dtype=torch.float64))
            for g, x in zip(pulled, given, strict=True)
        )
        tolerance = torch.finfo(self._v.dtype).eps ** 0.5 * float(product.double().norm())
        return product if abs(left - right) <= tolerance * float(v.norm()) else None


def gram_product(jacobian: Jacobian, v: Tensor) -> Tensor:
    """J J^T v, (N, C); see `Jacobian.gram_product`."""
    has_tape = jacobian._gradients.outputs.requires_grad  # not if it is that of other processes too
    found = Pushforward(jacobian, v)() if has_tape else None
    return jacobian.jvp(jacobian.vjp(v, per_layer=True)) if found is None else found
