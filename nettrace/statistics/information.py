"""Statistics of loss gradients and of the Fisher information."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from nettrace.piecewise import check_piecewise_linear
from nettrace.statistics.kernel import KernelStatistics
from nettrace.statistics.look import Unavailable
from nettrace.tape import Tape


class InformationStatistics(KernelStatistics):
    """Squared norms of loss gradients: those of the probe's targets, expected and drawn ones."""

    #: How many targets are drawn for each sample in Monte Carlo estimates.
    draws = 8

    @cached_property
    def mean_gradient_sqnorm(self) -> Tensor:
        """The squared norm of the gradient of the mean loss, by one backward pass."""
        shares = self.jacobian.vjp(self.scores / self.samples)
        return shares.double().square().sum()

    @cached_property
    def loss_gradient_sqnorms(self) -> Tensor:
        """(N,) squared norms of the per-sample loss gradients."""
        return self.jacobian.project(self.scores.unsqueeze(0)).norms().square()[:, 0]

    @cached_property
    def fisher_sqnorms(self) -> Tensor:
        """(N,) expected squared norms of loss gradients, over targets drawn from the outputs."""
        exact = self.jacobian.outputs <= self.exact_outputs
        if exact and self._needs & {"trace", "layer_traces"} and self.likelihood:
            eigenvalues, squares = self._sqnorms
            assert eigenvalues is not None
            return (torch.stack(list(squares.values())).sum(0) * eigenvalues).sum(1)
        roots = self.likelihood.weighted_scores(self.outputs)
        return self.jacobian.project(roots).norms().square().sum(1)

    @cached_property
    def hessian_traces(self) -> Tensor:
        """(N,) traces of the Hessians of the samples' losses by the parameters.

        For networks that are piecewise linear in each weight, of which the Fisher information,
        which is that of the Gauss-Newton matrix for these losses, has the same trace.
        """
        if self._probe.losses is not None:
            raise Unavailable(
                "the exact trace of the Hessian is known for the losses of a likelihood alone: "
                "leave out Probe(..., losses=...) if cross-entropy or half the squared error, "
                "summed over outputs, is meant"
            )
        parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        check_piecewise_linear(Tape(self._outputs, parameters, ()))
        return self.fisher_sqnorms

    @cached_property
    def drawn_sqnorms(self) -> Tensor:
        """(N, draws) squared norms of loss gradients, for targets drawn from the outputs."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = self.likelihood.sampled_scores(self.outputs, self.draws, generator)
        return self.jacobian.project(drawn).norms().square()
