"""Statistics of the stability of training: the Hessian as the optimizer scales it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from nettrace.gathered import original
from nettrace.second_order import CurvatureOperator
from nettrace.statistics.look import Inapplicable, Unavailable
from nettrace.statistics.preconditioned import PreconditionedStatistics, inverse_roots
from nettrace.statistics.spectral import FOLLOWED, SpectralStatistics, statistic


class StabilityStatistics(SpectralStatistics, PreconditionedStatistics):
    """D^1/2 (H + S) D^1/2, for steps -D (g + S theta): D the learning rates, over Adam's divisors.

    S holds the weight decay that is a part of the gradient, as in SGD and Adam; that of AdamW is
    none. Weights that are not moved do not count.
    """

    stability_top = statistic("top", "stability", "The largest eigenvalue")
    stability_eigenvector = statistic("eigenvector", "stability", FOLLOWED)

    @cached_property
    def stability_operator(self) -> CurvatureOperator:
        """The Hessian, with weight decay, as the optimizer scales it."""
        roots, shifts = {}, {}
        for optimizer in self._known_optimizers:
            if not isinstance(optimizer, SGD) and not optimizer.state:
                raise Inapplicable("the optimizer divides by nothing yet, before its first step")
            found = inverse_roots(optimizer)
            for group in optimizer.param_groups:
                apart = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
                for p in group["params"]:
                    name = self._names.get(id(p))
                    if name is not None and id(p) in found:
                        roots[name] = found[id(p)] * float(group["lr"]) ** 0.5
                        shifts[name] = float(group["weight_decay"]) if not apart else 0.0
        hessian = self.hessian_operator
        still = {n: torch.zeros_like(p) for n, p in hessian.parameters.items() if n not in roots}
        shift = torch.zeros(hessian.size, dtype=hessian.dtype, device=hessian.device)
        for name, place in hessian.layers.items():
            shift[place] = shifts.get(name, 0.0)
        return hessian.scaled(hessian.flat({**roots, **still}), shift)

    @cached_property
    def stability_threshold(self) -> float:
        """The eigenvalue of that matrix from which on steps of the optimizer grow."""
        found = {
            _threshold(optimizer, group)
            for optimizer in self._known_optimizers
            for group in optimizer.param_groups
            if any(id(p) in self._names for p in group["params"])
        }
        if len(found) != 1:
            raise Unavailable(
                f"the optimizer's groups of parameters have other momenta each, and become "
                f"unstable at other curvatures: {sorted(found)} over their learning rates; "
                "'hessian/lambda_max' is there for any"
            )
        return found.pop()

    @cached_property
    def learning_rates(self) -> dict[str, float]:
        """By parameter that an optimizer moves, its learning rate."""
        return {
            self._names[id(p)]: float(group["lr"])
            for optimizer in self._known_optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._names
        }

    @property
    def _names(self) -> dict[int, str]:
        named = self._model.named_parameters()
        return {id(original(p)): name for name, p in named if p.requires_grad}


def _threshold(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """2, but for momentum: heavy balls roll faster along a valley, and are slower to leave it.

    With steps v' = b v + (1 - d) g, theta' = theta - eta v' along a curvature h, what is multiplied
    each step has an eigenvalue of -1 at eta h = 2 (1 + b) / (1 - d); Nesterov's at 2 (1 + b) /
    (1 + 2 b). Adam's momentum is a heavy ball's with d = b.
    """
    if group.get("maximize"):
        raise Unavailable("the optimizer maximises the loss: stability is that of minimising")
    if not isinstance(optimizer, SGD):
        momentum = float(group["betas"][0])
        return 2 * (1 + momentum) / (1 - momentum)
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    return 2 * (1 + momentum) / (1 - (float(group["dampening"]) if momentum else 0))
