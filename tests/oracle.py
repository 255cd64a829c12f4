"""Brute force: what nettrace computes, by plain autograd and written-out matrices."""

from __future__ import annotations

import torch
import zoo
from torch import Tensor


def jacobian(outputs: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """J by parameter, (N, C, P_layer), of one forward pass, one output at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for output in outputs.flatten():
        gradients = torch.autograd.grad(
            output, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            g = torch.zeros_like(p) if g is None else g
            g = torch.view_as_real(g) if g.is_complex() else g
            rows[name].append(g.flatten())
    return {name: torch.stack(r).unflatten(0, (len(outputs), -1)) for name, r in rows.items()}


def one_sample_jacobian(name: str) -> dict[str, Tensor]:
    """J of a member of the zoo, by one forward pass for each sample, all in the same state."""
    member = zoo.build(name)
    state = {k: v.clone() for k, v in member.model.state_dict().items()}
    samples = []
    for n in range(zoo.N):
        outputs = member.forward(member.model, member.take(n))
        samples.append(jacobian(outputs, member.parameters))
        member.model.load_state_dict(state)
    return {k: torch.cat([sample[k] for sample in samples]) for k in member.parameters}


def gram(j: Tensor) -> Tensor:
    return torch.einsum("ncp,mdp->ncmd", j, j)


def relative_error(found: Tensor, true: Tensor) -> float:
    scale = true.abs().max().clamp_min(1e-300)
    return float((found - true).abs().max() / scale)
