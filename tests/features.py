"""A network whose inputs are its Jacobian, so that any kernel can be had."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nettrace as nt


class Features(nn.Module):
    """Inputs (N, C, P), which are the Jacobian, to outputs (N, C)."""

    def __init__(self, parameters: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(parameters, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def measured(jacobian: Tensor, *names: str, targets: Tensor | None = None) -> dict[str, nt.Record]:
    """The records of the network with a Jacobian (N, C, P); whatever goes wrong is raised."""
    probe = nt.Probe(jacobian, targets)
    model = Features(jacobian.shape[-1], jacobian.dtype)
    return {r.name: r for r in nt.Tracer(probe, names, on_error="raise")(model, 0)}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rotation(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n))[0]
