"""Statistics of the kernel as the optimizer sees it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from nettrace.estimators import Estimate, exact_estimate
from nettrace.gathered import original, whole
from nettrace.gram_traces import estimate_trace
from nettrace.operator import Jacobian, PerLayer
from nettrace.statistics.kernel import KernelStatistics, spectrum_of
from nettrace.statistics.look import Unavailable


class PreconditionedStatistics(KernelStatistics):
    """J P^-1 J^T, for the matrix P by which the optimizer divides gradients.

    P is diagonal: the identity for SGD, sqrt(v) + eps for Adam and AdamW, with the second moments v
    corrected for their bias (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1). Weights that no
    optimizer moves, or that have had no gradient yet, do not count.
    """

    @cached_property
    def _preconditioned(self) -> Jacobian:
        parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        names = {id(original(p)): name for name, p in parameters.items()}
        roots: PerLayer = {}
        for optimizer in self._known_optimizers:
            found = inverse_roots(optimizer)
            roots |= {names[key]: root for key, root in found.items() if key in names}
        if not roots:
            raise Unavailable(
                "the optimizer moves none of the network's weights yet: it has no second moments "
                "before its first step, or is that of another network"
            )
        absent = {name: torch.zeros_like(p) for name, p in parameters.items() if name not in roots}
        return self.jacobian.scaled({**roots, **absent})

    @property
    def _known_optimizers(self) -> list[Optimizer]:
        if not self._optimizers:
            raise Unavailable(
                "the optimizer is not known: pass it on, as in tracer(model, step, optimizer)"
            )
        return list(self._optimizers)

    @cached_property
    def preconditioned_trace(self) -> Estimate:
        """The trace of J P^-1 J^T: exact, or an estimate if there are too many outputs."""
        scaled = self._preconditioned
        if scaled.outputs > self.exact_outputs:
            return estimate_trace(scaled, "hutchinson", 8, self.relative_error, self._seed)[0]
        return exact_estimate(scaled.norms().double().square().sum())

    @cached_property
    def preconditioned_eigenvalues(self) -> Tensor:
        """(N C,) eigenvalues of J P^-1 J^T in float64, the largest first."""
        order = self.samples * self._preconditioned.outputs
        return spectrum_of(self._preconditioned.gram().reshape(order, order))


def inverse_roots(optimizer: Optimizer) -> dict[int, Tensor]:
    """P^-1/2 in each parameter's shape, by the parameter's identity.

    Of a complex parameter, real and imaginary parts are scaled apart, and are those of the result.
    """
    if not isinstance(optimizer, (SGD, Adam, AdamW)):
        raise Unavailable(
            f"how {type(optimizer).__name__} divides gradients is not known: expected "
            "torch.optim.SGD, Adam or AdamW"
        )
    if not isinstance(optimizer, SGD) and not optimizer.state:
        raise Unavailable(f"{type(optimizer).__name__} has no second moments before its first step")
    roots = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            pair = (2,) if p.is_complex() else ()
            root = torch.ones((*p.shape, *pair), dtype=p.dtype.to_real(), device=p.device)
            if not isinstance(optimizer, SGD):
                state = optimizer.state.get(p, {})
                moments = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
                if moments is None:
                    continue
                moments = whole(moments)
                moments = torch.view_as_real(moments) if moments.is_complex() else moments
                correction = 1 - float(group["betas"][1]) ** float(state["step"])
                divisor = (moments.double() / correction).sqrt() + group["eps"]
                root = divisor.rsqrt().to(root.dtype)
            roots[id(p)] = torch.view_as_complex(root) if p.is_complex() else root
    return roots
