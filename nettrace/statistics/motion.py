"""Statistics of how far a network has moved: its weights, and what is made of earlier ones."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from torch import Tensor

from nettrace.linearise import linearised
from nettrace.operator import PerLayer
from nettrace.past import Reference
from nettrace.statistics.kernel import KernelStatistics

_FIRST: Reference = ("first", "constants", "outputs", "weights")


class MotionStatistics(KernelStatistics):
    """The weights, the leading eigenvectors, and the network linearised at its first look.

    To linearise it, a copy of all parameters and buffers and of the outputs of that look is kept.
    """

    #: By statistic, the earlier look that it makes use of itself, and what of that.
    references: ClassVar[dict[str, Reference]] = dict.fromkeys(
        ("first_outputs", "linearised_outputs", "linearised_losses"), _FIRST
    )
    #: How many eigenvectors lead, at least.
    leading = 10

    @property
    def weights(self) -> PerLayer:
        """The parameters that require a gradient, by name; not copied."""
        return {n: p.detach() for n, p in self._model.named_parameters() if p.requires_grad}

    @property
    def constants(self) -> PerLayer:
        """All other parameters, and the buffers, by name; not copied."""
        fixed = {n: p for n, p in self._model.named_parameters() if not p.requires_grad}
        return {n: t.detach() for n, t in {**fixed, **dict(self._model.named_buffers())}.items()}

    @property
    def leading_eigenvectors(self) -> Tensor:
        """(N C, k) eigenvectors of the largest eigenvalues of the Gram matrix, in float64.

        The number k is the least multiple of C from 10 on, but at most half of N C: the kernel of
        networks whose outputs share nothing has eigenvalues that are C-fold, which are kept
        together.
        """
        outputs = self.jacobian.outputs
        multiples = min(-(-self.leading // outputs), max(1, self.samples // 2))
        return self.eigenvectors.flatten(0, 1)[:, : multiples * outputs]

    @property
    def first_outputs(self) -> Tensor:
        """(N, ...) the outputs f_0 at the first look."""
        found: Tensor = self.earlier(_FIRST)["outputs"]
        return found

    @cached_property
    def linearised_outputs(self) -> Tensor:
        """(N, ...) f_0 + J_0 (theta - theta_0), with the weights and buffers of the first look."""
        first = self.earlier(_FIRST)
        if first.step == self.step:
            return self.outputs
        state = {**first["constants"], **first["weights"]}
        before = first["outputs"][self._ranks.place(len(self._outputs))]
        own = linearised(self._model, self._own, state, before, self._memory)
        return self._ranks.join(own)

    @cached_property
    def linearised_losses(self) -> Tensor:
        """(N,) the losses of these outputs."""
        return self._losses_of(self._probe, self.linearised_outputs).detach()
