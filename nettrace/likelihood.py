"""Output distributions: what the outputs are parameters of, which defines loss and Fisher metric.

The Fisher information of a network is the mean of J^T M J over samples, with M the information of
the output distribution about the outputs. M can be had as a matrix, as an expectation over targets
drawn from the distribution, or as weighted scores whose outer products sum to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(Protocol):
    """A distribution of targets whose parameters are the outputs (N, ...), C of them a sample."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def loss(self) -> str:
        """What the losses are, in words."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(N,) negative logarithms of the likelihood of the targets, up to a constant."""

    def metric(self, outputs: Tensor) -> Tensor:
        """(N, C, C) the information M about the outputs."""

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """(K, N, C) vectors whose outer products, summed over K, give M."""

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(count, N, C) gradients of the loss by the outputs, for targets drawn from them."""


@dataclass(frozen=True)
class Categorical:
    """Classes, by logits along one axis of the outputs; independent over any further axes."""

    axis: int
    name: str = "categorical"
    loss: str = "cross-entropy in nats, summed over positions"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies.

        Raises:
            ValueError: if a target is no class, such as -100 for a position to ignore.
        """
        scores = outputs.movedim(self.axis, 1)
        wrong = targets[(targets < 0) | (targets >= scores.shape[1])]
        if len(wrong):
            raise ValueError(
                f"expected classes from 0 to {scores.shape[1] - 1}, got {int(wrong[0])}: where "
                "some targets are to be ignored, pass Probe(..., losses=...) that does so"
            )
        losses = F.cross_entropy(scores, targets.long(), reduction="none")
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses

    def metric(self, outputs: Tensor) -> Tensor:
        """diag(p) - p p^T at each position."""
        p = self._probabilities(outputs)  # (N, Q, V)
        same = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        m = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # (N, Q, V, V)
        m = torch.einsum("nqvw,qr->nqvrw", m, same)
        order = self._order(outputs)
        return m.reshape(len(p), order.numel(), -1)[:, order][:, :, order]

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """sqrt(p_v) (e_v - p) for each position and class v."""
        p = self._probabilities(outputs)
        _, q, v = p.shape
        eye = torch.eye(v, dtype=p.dtype, device=p.device)
        scores = p.sqrt().unsqueeze(-1) * (eye - p.unsqueeze(-2))  # (N, Q, V, V)
        same = torch.eye(q, dtype=p.dtype, device=p.device)
        scores = torch.einsum("nqvw,qr->qvnrw", scores, same).reshape(q * v, len(p), q * v)
        return scores[:, :, self._order(outputs)]

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The differences p - e_y for classes y drawn from p."""
        p = self._probabilities(outputs)
        n, q, v = p.shape
        # Drawn on the CPU in float64, so that the classes are the same on every device.
        cumulative = p.detach().double().cpu().cumsum(-1)
        draws = torch.rand((count, n, q, 1), generator=generator, dtype=torch.float64)
        classes = (cumulative < draws * cumulative[..., -1:]).sum(-1).clamp_max(v - 1)
        scores = p - F.one_hot(classes.to(p.device), v)
        return scores.flatten(2)[:, :, self._order(outputs)]

    def _probabilities(self, outputs: Tensor) -> Tensor:
        z = outputs.detach().movedim(self.axis, -1)
        return z.softmax(-1).reshape(len(z), -1, z.shape[-1])

    def _order(self, outputs: Tensor) -> Tensor:
        """Where each output of a sample, in the outputs' order, stands among (Q, V)."""
        shape = list(outputs.shape[1:])
        shape.append(shape.pop(self.axis - 1))
        number = torch.arange(outputs[0].numel(), device=outputs.device).view(shape)
        return number.movedim(-1, self.axis - 1).flatten()


@dataclass(frozen=True)
class Gaussian:
    """Real numbers, by their means, at unit variance."""

    name: str = "gaussian"
    loss: str = "half the squared error, summed over outputs"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half squared errors."""
        squares = 0.5 * (outputs - targets.view_as(outputs)).square()
        return squares.flatten(1).sum(1) if squares.dim() > 1 else squares

    def metric(self, outputs: Tensor) -> Tensor:
        """The identity."""
        eye = torch.eye(outputs[0].numel(), dtype=outputs.dtype, device=outputs.device)
        return eye.expand(len(outputs), -1, -1)

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """The unit vectors."""
        return self.metric(outputs).movedim(1, 0)

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Normal deviates."""
        shape = (count, len(outputs), outputs[0].numel())
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(outputs)


def infer(
    outputs: Tensor, targets: object, name: str | None, class_axis: int | None
) -> Likelihood | None:
    """The likelihood of the given name, or else the one that the targets' type and shape suggest.

    Integer targets mean classes, floating targets of the outputs' shape, but for axes of length
    one, a Gaussian.

    Raises:
        ValueError: if the named one does not fit the shapes, or there are two to choose from.
    """
    shape = tuple(targets.shape) if isinstance(targets, Tensor) else None
    if name == "gaussian":
        if isinstance(targets, Tensor) and not _alike(targets, outputs):
            raise ValueError(
                f"expected targets of the outputs' shape {tuple(outputs.shape)} for the gaussian "
                f"likelihood, got shape {shape}"
            )
        return Gaussian()
    if isinstance(targets, Tensor) and targets.is_floating_point():
        if name == "categorical":
            raise ValueError(
                f"expected integer targets for the categorical likelihood, got {targets.dtype}: "
                "for soft labels, pass Probe(..., losses=...)"
            )
        if not _alike(targets, outputs):
            return None
        if _looks_like_probabilities(targets):
            raise ValueError(
                "the targets are floating, but all 0 or 1, or shares that sum to one: they could "
                "be labels; pass Probe(..., likelihood='gaussian') if squared errors are meant, "
                "else losses=..."
            )
        return Gaussian()
    whole = isinstance(targets, Tensor) and not (
        targets.dtype == torch.bool or targets.is_complex()
    )
    if name is None and not whole:
        return None
    axis = _class_axis(outputs, shape, class_axis)
    if name == "categorical":
        if axis is None:
            raise ValueError(
                f"expected logits (N, classes, ...) or (N, ..., classes) for the categorical "
                f"likelihood, got outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{shape}"
            )
        return Categorical(axis)
    return None if axis is None else Categorical(axis)


def _alike(targets: Tensor, outputs: Tensor) -> bool:
    """Whether shapes agree but for axes of length one; the first, that of samples, must."""

    def significant(shape: torch.Size) -> list[int]:
        return [n for d, n in enumerate(shape) if d == 0 or n != 1]

    return significant(targets.shape) == significant(outputs.shape)


def _looks_like_probabilities(targets: Tensor) -> bool:
    binary = bool(((targets == 0) | (targets == 1)).all())
    shares = targets.dim() > 1 and targets.shape[1] > 1 and bool((targets >= 0).all())
    return binary or (shares and bool((targets.sum(1) - 1).abs().max() < 1e-4))


def _class_axis(outputs: Tensor, targets: tuple[int, ...] | None, chosen: int | None) -> int | None:
    axes = sorted({1, outputs.dim() - 1}) if chosen is None else [chosen % outputs.dim()]
    fitting = []
    for axis in axes:
        rest = tuple(n for d, n in enumerate(outputs.shape) if d != axis)
        if 0 < axis < outputs.dim() and outputs.shape[axis] > 1 and rest == (targets or rest):
            fitting.append(axis)
    if len(fitting) > 1:
        raise ValueError(
            f"the classes could run along axis {fitting[0]} or {fitting[1]} of outputs of shape "
            f"{tuple(outputs.shape)}: pass Probe(..., class_axis={fitting[1]}) or another"
        )
    return fitting[0] if fitting else None
