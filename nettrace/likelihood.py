"""Output distributions: what the outputs are parameters of, which defines loss and Fisher metric.

The Fisher information of a network is the mean of J^T M J over samples, with M the information of
the output distribution about the outputs. M can be had as a matrix, as an expectation over targets
drawn from the distribution, or as vectors whose outer products sum to it.

Here the outputs are natural parameters, up to a fixed linear map. So M is the Hessian of the loss
by the outputs whatever the targets, and the Fisher information is the generalised Gauss-Newton
matrix (Martens 2020, arXiv:1412.1193, section 9.2). All losses leave out what depends on the
targets alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
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
    """Classes, by logits along one axis of the outputs; independent over any further axes.

    Args:
        axis: the one along which the classes run, from 1 on, as axis 0 counts samples.

    Raises:
        ValueError: if the axis is below 1.
    """

    axis: int
    name: str = "categorical"
    loss: str = "cross-entropy in nats, summed over positions"

    def __post_init__(self) -> None:
        if self.axis < 1:
            raise ValueError(
                f"expected a class axis of at least 1, as axis 0 counts samples, got {self.axis}"
            )

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
        return _summed(F.cross_entropy(scores, targets.long(), reduction="none"))

    def metric(self, outputs: Tensor) -> Tensor:
        """diag(p) - p p^T at each position."""
        p = self._probabilities(outputs)  # (N, Q, V)
        same = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        m = -p.unsqueeze(-1) * p.unsqueeze(-2)  # (N, Q, V, V)
        m.diagonal(dim1=2, dim2=3).copy_(p * _complements(p))
        m = torch.einsum("nqvw,qr->nqvrw", m, same)
        order = self._order(outputs)
        return m.reshape(len(p), order.numel(), -1)[:, order][:, :, order]

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """sqrt(p_v) (e_v - p) for each position and class v."""
        p = self._probabilities(outputs)
        _, q, v = p.shape
        scores = -p.unsqueeze(-2).repeat(1, 1, v, 1)
        scores.diagonal(dim1=2, dim2=3).copy_(_complements(p))
        scores = p.sqrt().unsqueeze(-1) * scores  # (N, Q, V, V)
        same = torch.eye(q, dtype=p.dtype, device=p.device)
        scores = torch.einsum("nqvw,qr->qvnrw", scores, same).reshape(q * v, len(p), q * v)
        return scores[:, :, self._order(outputs)]

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The differences p - e_y for classes y drawn from p."""
        p = self._probabilities(outputs)
        n, q, v = p.shape
        cumulative = p.double().cpu().cumsum(-1)
        draws = _uniform((count, n, q, 1), generator)
        classes = (cumulative < draws * cumulative[..., -1:]).sum(-1).clamp_max(v - 1)
        drawn = F.one_hot(classes.to(p.device), v).bool()
        scores = torch.where(drawn, -_complements(p), p)
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
class Bernoulli:
    """Yes or no, by logits; the outputs are independent of each other."""

    name: str = "bernoulli"
    loss: str = "binary cross-entropy in nats, summed over outputs"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropies.

        Raises:
            ValueError: if a target is not from 0 to 1.
        """
        y = _like(targets, outputs)
        wrong = y[~((y >= 0) & (y <= 1))]
        if len(wrong):
            raise ValueError(
                f"expected targets from 0 to 1 for the bernoulli likelihood, got {float(wrong[0])}"
            )
        return _summed(F.binary_cross_entropy_with_logits(outputs, y, reduction="none"))

    def metric(self, outputs: Tensor) -> Tensor:
        """diag(p (1 - p))."""
        yes, no = self._chances(outputs)
        return torch.diag_embed(yes * no)

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """sqrt(p_c (1 - p_c)) e_c for each output c."""
        yes, no = self._chances(outputs)
        return torch.diag_embed(yes.sqrt() * no.sqrt()).movedim(1, 0)

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The differences p - y for y drawn from p."""
        yes, no = self._chances(outputs)
        draws = _uniform((count, *yes.shape), generator)
        drawn = draws < _flat(outputs).double().cpu().sigmoid()
        return torch.where(drawn.to(yes.device), -no, yes)

    def _chances(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) those of yes and of no: one less the other would lose the small ones."""
        z = _flat(outputs)
        return z.sigmoid(), (-z).sigmoid()


@dataclass(frozen=True)
class Poisson:
    """Counts, by logarithms of their rates; the outputs are independent of each other."""

    name: str = "poisson"
    loss: str = "rate - count ln(rate), without ln(count!), summed over outputs"

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e^f - y f.

        Raises:
            ValueError: if a target is negative.
        """
        y = _like(targets, outputs)
        wrong = y[~(y >= 0)]
        if len(wrong):
            raise ValueError(
                f"expected targets of at least 0 for the poisson likelihood, got {float(wrong[0])}"
            )
        return _summed(F.poisson_nll_loss(outputs, y, reduction="none"))

    def metric(self, outputs: Tensor) -> Tensor:
        """diag(e^f)."""
        return torch.diag_embed(_flat(outputs).exp())

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """e^(f_c / 2) e_c for each output c."""
        return torch.diag_embed((_flat(outputs) / 2).exp()).movedim(1, 0)

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The differences e^f - y for counts y drawn at that rate."""
        rates = _flat(outputs).double().cpu().exp().expand(count, -1, -1)
        # Chances of large counts lose their digits in the difference of large logarithms: from here
        # on deviates are drawn as normal, which they are to 1e-5.
        large = 2.0**30
        scores = rates - torch.poisson(rates.clamp_max(large), generator)
        normal = torch.randn(rates.shape, generator=generator, dtype=torch.float64)
        return torch.where(rates < large, scores, rates.sqrt() * normal).to(outputs)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Real numbers, by their means, at a covariance that is given.

    Args:
        covariance: the variance of every output, (C,) variances, or a (C, C) covariance matrix of a
            sample's outputs in their order.

    Raises:
        ValueError: if the covariance is not positive definite, or no number, vector or matrix.
    """

    covariance: float | Tensor = 1.0
    name: str = "gaussian"
    _given: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = torch.as_tensor(self.covariance, dtype=torch.float64, device="cpu").detach()
        object.__setattr__(self, "_given", given)
        if given.dim() > 2 or (given.dim() == 2 and given.shape[0] != given.shape[1]):
            raise ValueError(
                "expected a variance, C variances or a C x C covariance matrix, got shape "
                f"{tuple(given.shape)}"
            )
        if given.dim() == 2 and not torch.allclose(given, given.mT):
            raise ValueError(
                "expected a symmetric covariance matrix, got one that differs from its transpose "
                f"by up to {float((given - given.mT).abs().max()):.3g}"
            )
        if given.dim() == 2:
            fine = not torch.linalg.cholesky_ex(given).info
            least = torch.linalg.eigvalsh(given)[0]
        else:
            fine, least = bool((given > 0).all()), given.min()
        if not fine:
            raise ValueError(
                f"expected a positive definite covariance, got one whose least "
                f"{'eigenvalue' if given.dim() == 2 else 'variance'} is {float(least):.3g}"
            )

    @property
    def loss(self) -> str:
        """What the losses are, in words."""
        if self._given.dim() > 0:
            return (
                "half the squared Mahalanobis distance under the given covariance, without the "
                "log-determinant"
            )
        if self._given == 1:
            return "half the squared error, summed over outputs"
        return (
            f"half the squared error over the variance {float(self._given):g}, summed over "
            "outputs, without the log-determinant"
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half squared Mahalanobis distances."""
        residuals = (outputs - _like(targets, outputs)).reshape(len(outputs), -1)
        w = self._whitening(outputs)
        whitened = residuals @ w.mT if w.dim() == 2 else residuals * w
        return 0.5 * whitened.square().sum(1)

    def metric(self, outputs: Tensor) -> Tensor:
        """The inverse of the covariance."""
        w = self._whitening(outputs)
        return (w.mT @ w if w.dim() == 2 else w.square().diag()).expand(len(outputs), -1, -1)

    def weighted_scores(self, outputs: Tensor) -> Tensor:
        """The rows of the whitening matrix, whose outer products sum to the inverse covariance."""
        w = self._whitening(outputs)
        return (w if w.dim() == 2 else w.diag()).unsqueeze(1).expand(-1, len(outputs), -1)

    def sampled_scores(self, outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Normal deviates whose covariance is the inverse of that of the targets."""
        shape = (count, len(outputs), outputs[0].numel())
        deviates = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = self._whitening(deviates[0])
        return (deviates @ w if w.dim() == 2 else deviates * w).to(outputs)

    def _whitening(self, outputs: Tensor) -> Tensor:
        """W with W^T W the inverse covariance: (C, C), or (C,) where it is diagonal."""
        given, count = self._given, outputs[0].numel()
        if given.dim() > 0 and len(given) != count:
            raise ValueError(
                f"expected a covariance of the {count} outputs of a sample, got shape "
                f"{tuple(given.shape)}"
            )
        if given.dim() < 2:
            return given.rsqrt().expand(count).to(outputs)
        lower = torch.linalg.cholesky(given)
        one = torch.eye(count, dtype=torch.float64)
        found: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
        return found.to(outputs)


#: Those whose Fisher metric is the Hessian of the loss by the outputs, whatever the targets.
CANONICAL = (Categorical, Bernoulli, Poisson, Gaussian)


def alike(targets: Tensor, outputs: Tensor) -> bool:
    """Whether shapes agree but for axes of length one; the first, that of samples, must."""

    def significant(shape: torch.Size) -> list[int]:
        return [n for d, n in enumerate(shape) if d == 0 or n != 1]

    return significant(targets.shape) == significant(outputs.shape)


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """The targets in the outputs' shape, with numbers of their kind."""
    if not alike(targets, outputs):
        raise ValueError(
            f"expected targets of the outputs' shape {tuple(outputs.shape)}, got shape "
            f"{tuple(targets.shape)}"
        )
    return targets.view_as(outputs).to(torch.promote_types(outputs.dtype, torch.float32))


def _summed(losses: Tensor) -> Tensor:
    """(N,) sums over all axes but that of samples."""
    return losses.flatten(1).sum(1) if losses.dim() > 1 else losses


def _flat(outputs: Tensor) -> Tensor:
    """(N, C) the outputs as numbers."""
    return outputs.detach().reshape(len(outputs), -1)


def _complements(p: Tensor) -> Tensor:
    """1 - p for probabilities p along the last axis, where p is near 1 as the sum of the others."""
    largest = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, largest, 0).sum(-1, keepdim=True)
    return (1 - p).scatter(-1, largest, others)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers on the CPU in float64, so that draws are the same on every device."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)
