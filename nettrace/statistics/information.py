"""Statistics of loss gradients and of the Fisher information."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from nettrace.differentiate import jacobian
from nettrace.estimators import Estimate, exact_estimate
from nettrace.gram_traces import estimate_trace
from nettrace.likelihood import Categorical
from nettrace.operator import Jacobian, PerLayer
from nettrace.shared_gradients import shared
from nettrace.statistics.kernel import KernelStatistics, spectrum_of
from nettrace.statistics.look import Inapplicable


class InformationStatistics(KernelStatistics):
    """Squares of loss gradients, at the probe's targets, expected and drawn; Fisher spectra."""

    #: How many targets are drawn for each sample in Monte Carlo estimates.
    draws = 8
    #: How many eigenvalues of each layer's block of the Fisher information are given.
    modes = 8

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
    def loss_gradient_column_sqnorms(self) -> Tensor:
        """(P,) squares of the per-sample loss gradients, summed over samples."""
        return self.jacobian.project(self.scores.unsqueeze(0)).column_sqnorms()

    @cached_property
    def fisher_sqnorms(self) -> Tensor:
        """(N,) expected squared norms of loss gradients, over targets drawn from the outputs."""
        return torch.stack(list(self._fisher_shares.values())).sum(0)

    @property
    def fisher_layer_sqnorms(self) -> PerLayer:
        """By parameter, its share of those, (N,)."""
        return self._fisher_shares

    @cached_property
    def _fisher_shares(self) -> PerLayer:
        """By parameter, or by the empty name for all together."""
        exact = self.jacobian.outputs <= self.exact_outputs
        if exact and self._needs & {"trace", "layer_traces"} and self.likelihood:
            eigenvalues, squares = self._sqnorms
            if eigenvalues is not None:
                return {name: (share * eigenvalues).sum(1) for name, share in squares.items()}
        per_layer = bool(self._needs & {"fisher_layer_sqnorms", "hessian_layer_traces"})
        norms = self._roots.norms(per_layer=True) if per_layer else {"": self._roots.norms()}
        return {name: norm.double().square().sum(1) for name, norm in norms.items()}

    @cached_property
    def fisher_column_sqnorms(self) -> Tensor:
        """(P,) expected squares of loss gradients, over drawn targets, summed over samples."""
        return self._roots.column_sqnorms()

    @property
    def fisher_eigenvalues(self) -> Tensor:
        """(N C,) eigenvalues of the samples' summed Fisher information, but for further zeros.

        In float64, the largest first.
        """
        return self._fisher_spectra[0]

    @property
    def fisher_layer_eigenvalues(self) -> PerLayer:
        """By parameter, the `modes` largest eigenvalues of its diagonal block of that matrix."""
        return self._fisher_spectra[1]

    @cached_property
    def _fisher_spectra(self) -> tuple[Tensor, PerLayer]:
        """Those spectra, through Gram matrices: R^T Theta R with R R^T = M has the same, but zeros.

        The second is empty unless it is asked for.
        """
        if "fisher_layer_eigenvalues" in self._needs:
            grams = self._roots.gram(per_layer=True)
        else:
            grams = {"": self._roots.gram()}
        grams = {name: gram.flatten(2).flatten(0, 1) for name, gram in grams.items()}
        blocks = {n: spectrum_of(g)[: self.modes] for n, g in grams.items() if n}
        return spectrum_of(sum(grams.values(), torch.zeros(()))), blocks

    @property
    def _roots(self) -> Jacobian:
        """The rows R^T J, of which the Fisher information is the sum of outer products."""
        return self.jacobian.project(self.likelihood.weighted_scores(self.outputs))

    @cached_property
    def centred_trace(self) -> Estimate:
        """The trace of the kernel of logits less their mean over classes: exact, or an estimate."""
        likelihood = self.assumed_likelihood
        if not isinstance(likelihood, Categorical):
            raise Inapplicable("logits have a mean to take off where they are those of classes")
        estimated = self.jacobian.outputs > self.exact_outputs
        logits = self._outputs
        centred = logits - logits.mean(likelihood.axis, keepdim=True)
        own = jacobian(centred, self._model, memory_budget=self._memory)
        found = shared(own, self._ranks)
        if estimated:
            return estimate_trace(found, "hutchinson", 8, self.relative_error, self._seed)[0]
        return exact_estimate(found.norms().double().square().sum())

    @cached_property
    def drawn_sqnorms(self) -> Tensor:
        """(N, draws) squared norms of loss gradients, for targets drawn from the outputs."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = self.likelihood.sampled_scores(self.outputs, self.draws, generator)
        return self.jacobian.project(drawn).norms().square()
