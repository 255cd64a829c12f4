"""Brute force: what nettrace computes, by plain autograd and written-out matrices."""

from __future__ import annotations

import torch
import zoo
from torch import Tensor


def one_sample_jacobian(member: zoo.Member) -> dict[str, Tensor]:
    """J by parameter, (N, C, P_layer): each sample's forward pass alone, one output at a time."""
    parameters = {k: p for k, p in member.model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(zoo.N):
        outputs = member.forward(member.model, member.take(n)).flatten()
        for output in outputs:
            gradients = torch.autograd.grad(
                output, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                g = torch.zeros_like(p) if g is None else g
                g = torch.view_as_real(g) if g.is_complex() else g
                rows[name].append(g.flatten())
    return {name: torch.stack(r).unflatten(0, (zoo.N, -1)) for name, r in rows.items()}


def gram(j: Tensor) -> Tensor:
    return torch.einsum("ncp,mdp->ncmd", j, j)


def relative_error(found: Tensor, true: Tensor) -> float:
    scale = true.abs().max().clamp_min(1e-300)
    return float((found - true).abs().max() / scale)
