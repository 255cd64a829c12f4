"""Matrices of second derivatives to be used by hand, in a notebook."""

from __future__ import annotations

from typing import Literal

from torch import nn

from nettrace.freeze import frozen
from nettrace.operator import PerLayer
from nettrace.probe import Probe
from nettrace.second_order import CurvatureOperator
from nettrace.statistics import Statistics


def curvature(
    model: nn.Module,
    probe: Probe,
    matrix: Literal["hessian", "gauss_newton", "fisher"] = "hessian",
    *,
    memory_budget: int | str = "2GiB",
) -> CurvatureOperator:
    """A matrix of second derivatives of the mean loss on a probe, by the network's parameters.

    Nothing is formed: it is known by products with vectors, in eval mode and in single precision or
    wider. The Hessian is held against finite differences of gradients on a few samples; what cannot
    be differentiated twice is taken by such differences, in float64. The network is left exactly as
    it is, and its weights must stay as they are as long as the operator is used.

    Args:
        model: the network.
        probe: the samples, and their losses.
        matrix: "hessian" of the mean loss; "gauss_newton", the mean of J^T M J with M the Hessian
            of a sample's loss by its outputs; or "fisher", with M the information of the outputs'
            distribution.
        memory_budget: as in `nettrace.jacobian`.

    Raises:
        ValueError: if there is no such matrix; or if gradients are those of no loss, as with what
            is detached, or jump.
        Exception: whatever goes wrong with calling the network, or if its loss is not known.

    Example:
        >>> import torch, nettrace as nt
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> probe = nt.Probe(torch.eye(3), torch.full((3, 2), 2.0))
        >>> top, bottom = nt.curvature(model, probe).eigenpairs(top=2, bottom=1)
        >>> [round(float(value), 4) for value in top.values]
        [0.3333, 0.3333]
    """
    if matrix not in ("hessian", "gauss_newton", "fisher"):
        raise ValueError(f"expected 'hessian', 'gauss_newton' or 'fisher', got {matrix!r}")
    with frozen(model):
        look = Statistics(model, probe, memory_budget=memory_budget)
        found: CurvatureOperator = getattr(look, f"{matrix}_operator")

    def product(vectors: PerLayer) -> PerLayer:
        with frozen(model):  # finite differences evaluate it again
            return found.product(vectors)

    return CurvatureOperator(product, found.parameters, found.dtype)
