"""A network on a probe, evaluated for derivatives beyond the first: with weights of one's own.

`smooth` gives a tape that can be differentiated twice, in single precision or wider. `WideLoss` is
the mean loss in double precision, as a function of the weights: for finite differences, and for how
far the loss stays low.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from nettrace.estimators import signs
from nettrace.freeze import random_streams
from nettrace.gradients import strided
from nettrace.probe import Probe
from nettrace.ranks import Ranks
from nettrace.second_order import Flattening, HessianProduct, NotTwiceDifferentiableError, Twice
from nettrace.tape import has_fused_attention

T = TypeVar("T")
#: From a probe and outputs (N, ...) to losses (N,), with their tape.
Losses = Callable[[Probe, Tensor], Tensor]
#: Up to which relative difference derivatives and finite differences are taken to agree.
_AGREE = 1e-3


@dataclass(frozen=True)
class Smooth:
    """Outputs and losses with a tape of which every backward pass can be differentiated.

    Unless the network has operations of which that is not so, which is found when they are.

    Args:
        outputs: (N, ...).
        evaluate: gives the losses (N,), when they are asked for.
        parameters: that require a gradient, by name; copies where they were widened.
    """

    outputs: Tensor
    evaluate: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Tensor]

    @property
    def losses(self) -> Tensor:
        """(N,), with their tape."""
        return self.evaluate(self.outputs)


def smooth(model: nn.Module, probe: Probe, outputs: Tensor, losses: Losses) -> Smooth:
    """The outputs as they are, or anew: without fused attention, in single precision at least.

    Args:
        model: the network, frozen.
        probe: the samples.
        outputs: as `probe.look(model)` gave them.
        losses: what gives their losses.
    """
    own = dict(model.named_parameters())
    parameters: dict[str, Tensor] = {n: p for n, p in own.items() if p.requires_grad}
    if any(_is_narrow(p) for p in parameters.values()):
        probe = probe.map(widened(torch.float32))
        parameters = {n: _leaf(p, torch.float32) for n, p in parameters.items()}
        state = {**widened_state(model, torch.float32), **parameters}
        with sdpa_kernel(SDPBackend.MATH):
            outputs = called(model, state, probe.look)
    elif has_fused_attention(outputs):
        with sdpa_kernel(SDPBackend.MATH):
            outputs = probe.look(model)
    return Smooth(outputs, lambda found: losses(probe, found), parameters)


class WideLoss(Flattening):
    """The mean loss of a network on a probe in float64, as a function of its weights.

    Args:
        model: the network, frozen.
        probe: this process's samples.
        losses: what gives the losses of outputs.
        parameters: the names of those that make up the weights.
        ranks: the processes; all must ask for the same.

    Attributes:
        point: (P,) the network's own weights in float64, those of each parameter flattened; complex
            ones as pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        losses: Losses,
        parameters: Mapping[str, Tensor],
        ranks: Ranks,
    ) -> None:
        self._model, self._losses = model, losses
        self._probe = probe.map(widened(torch.float64))
        self._state = widened_state(model, torch.float64)
        super().__init__({name: self._state[name] for name in parameters})
        self._ranks = ranks
        self._same_draws = random_streams({t.device for t in self._state.values()})
        self.point = self.flat(self._state)

    def __call__(self, weights: Tensor) -> float:
        """The mean loss with other weights (P,); networks that draw numbers draw the same."""
        losses = self._losses_with(self.split(weights)).detach()
        total = torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        self._ranks.add_([total])
        return float(total[0] / total[1])

    def gradient(self, weights: Tensor) -> Tensor:
        """(P,) the gradient of the mean loss at other weights."""
        losses, parts = self._recorded(weights)
        found = torch.autograd.grad(
            losses.sum(), list(parts.values()), allow_unused=True, materialize_grads=True
        )
        shares = [strided(g) / sum(self._ranks.each(len(losses))) for g in found]
        self._ranks.add_(shares)
        return self.flat(dict(zip(parts, shares, strict=True)))

    def product(self, weights: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) the Hessian of the mean loss at other weights times a vector; (P,) its gradient."""
        losses, parts = self._recorded(weights)
        samples = sum(self._ranks.each(len(losses)))
        shares = torch.full((samples,), 1 / samples, dtype=torch.float64)
        hessian = HessianProduct(Twice.of_losses(losses, parts, self._ranks), shares)
        product = self.flat(hessian(self.split(vector.to(self.point))))
        return product, self.flat(hessian.gradient())

    def _recorded(self, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses at other weights with their tape, and those weights."""
        parts = {n: t.detach().requires_grad_() for n, t in self.split(weights).items()}
        with torch.enable_grad():
            return self._losses_with(parts), parts

    def _losses_with(self, parts: Mapping[str, Tensor]) -> Tensor:
        self._same_draws()
        with sdpa_kernel(SDPBackend.MATH):
            outputs = called(self._model, {**self._state, **parts}, self._probe.look)
        return self._losses(self._probe, outputs)

    def difference(self, vector: Tensor, step: float = 1e-7) -> Tensor:
        """(P,) the Hessian at the network's own weights times a vector, by central differences.

        Args:
            vector: (P,)
            step: how far the gradients are apart, in units of the length of the weights and one.
        """
        size = vector.to(self.point).norm().clamp_min(torch.finfo(torch.float64).tiny)
        step = float(step * (1 + self.point.norm()))
        move = step * vector.to(self.point) / size
        above, below = self.gradient(self.point + move), self.gradient(self.point - move)
        found: Tensor = (above - below) * (size / (2 * step))
        return found


def cross_check(loss: WideLoss, seed: int) -> float:
    """How far a product with the Hessian is from the difference of two gradients, relative to both.

    Along random signs; of weights apart by a ten-millionth, or less where a kink lies between.

    Raises:
        NotTwiceDifferentiableError: if they differ by more than rounding and curvature of higher
            order explain.
    """
    vector = _unit_signs(loss, seed)
    product, gradient = loss.product(loss.point, vector)
    step = float(1e-7 * (1 + loss.point.norm()))
    moved = torch.add(loss.point, vector, alpha=step)
    ahead = loss.gradient(moved).sub_(gradient).div_(step)
    errors = [_apart(ahead, product, gradient)]
    if errors[0] > _AGREE:
        errors.append(_apart(loss.difference(vector, 1e-8), product, gradient))
    if min(errors) < _AGREE:
        return min(errors)
    raise NotTwiceDifferentiableError(
        f"a product with the Hessian differs from finite differences of the gradient by "
        f"{min(errors):.2g} of its size: the backward pass of some operation gives wrong "
        "derivatives when it is differentiated, or gradients are not those of one smooth loss, as "
        "with what is detached or rounded"
    )


def check_differences(loss: WideLoss, seed: int) -> None:
    """Checks that finite differences of the gradient are products with a symmetric matrix.

    Raises:
        NotTwiceDifferentiableError: if they are not.
    """
    one, other = _unit_signs(loss, seed), _unit_signs(loss, seed + 1)
    of_one, of_other = loss.difference(one), loss.difference(other)
    if _apart(loss.difference(one, 3e-8), of_one, loss.gradient(loss.point)) > _AGREE:
        raise NotTwiceDifferentiableError("the gradient jumps at these weights: it has no Hessian")
    left, right = float(one @ of_other), float(other @ of_one)
    if abs(left - right) > _AGREE * float(of_one.norm() + of_other.norm()):
        raise NotTwiceDifferentiableError(
            f"finite differences of the gradient are not symmetric, {left:.3g} one way and "
            f"{right:.3g} the other: it is not the gradient of one loss, as with what is detached, "
            "and has no Hessian"
        )


def _apart(one: Tensor, other: Tensor, gradient: Tensor) -> float:
    # The differences of gradients are no better than the gradients' rounding.
    scale = one.norm() + other.norm() + 1e-6 * gradient.norm()
    return float((one - other).norm() / scale) if scale > 0 else 0.0


def _unit_signs(loss: WideLoss, seed: int) -> Tensor:
    size = len(loss.point)
    found: Tensor = signs((size,), seed, "cross check").to(loss.point)
    return found.div_(size**0.5)


def called(model: nn.Module, state: Mapping[str, Tensor], look: Callable[[nn.Module], T]) -> T:
    """What is made of a network that has other parameters and buffers meanwhile."""
    holder = _Holder(model)
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    found: T = functional_call(holder, named, (look,))
    return found


class _Holder(nn.Module):
    """A network as a part of another, which makes something of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, look: Callable[[nn.Module], Any]) -> Any:
        return look(self.model)


def widened_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of parameters and buffers in a wider type."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _copy(tensor, dtype) for name, tensor in named.items()}


def widened(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What gives numbers at least the width of a real type, and leaves integers alone."""

    def wide(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.to(torch.promote_types(tensor.dtype, dtype))
        return tensor

    return wide


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return _copy(tensor, dtype).requires_grad_()


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wide = widened(dtype)(tensor.detach())
    return wide.clone() if wide.dtype == tensor.dtype else wide


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4
