"""Statistics of a training step: of its loss, and of the outputs behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from nettrace.estimators import Estimate, exact_estimate
from nettrace.gram_traces import estimate_trace
from nettrace.likelihood import Categorical, Likelihood
from nettrace.logits import LogitGradients, Logits, NoLikelihoodError
from nettrace.operator import Jacobian, OverBudgetError
from nettrace.ownership import CoupledSamplesError
from nettrace.shared_gradients import shared
from nettrace.statistics.gradients import StepGradientStatistics
from nettrace.statistics.information import InformationStatistics
from nettrace.statistics.look import Inapplicable, Unavailable


class StepStatistics(StepGradientStatistics, InformationStatistics):
    """Those of the gradients of a step's loss, and of the kernel and Fisher information behind it.

    The batch of the step is the probe, in the network's own mode, with what it drew at random; see
    `nettrace.logits` for what the outputs are. Beyond those of the base, it has

    Attributes:
        check: looks at the outputs' Jacobian before anything is made of it, as in `Look`.
    """

    #: The statistics that rest on the outputs behind the loss.
    of_outputs = frozenset(
        "outputs jacobian likelihood assumed_likelihood suggested_likelihood scores targets "
        "fisher_metric trace layer_traces sample_traces centred_trace blocks layer_blocks "
        "loss_gradient_sqnorms loss_gradient_column_sqnorms fisher_sqnorms fisher_layer_sqnorms "
        "fisher_column_sqnorms fisher_eigenvalues fisher_layer_eigenvalues drawn_sqnorms".split()
    ) | (InformationStatistics.of_gram - {"leading_eigenvectors"})

    check: Callable[[Jacobian], None] = staticmethod(lambda jacobian: None)
    _needs: frozenset[str] = frozenset()

    @classmethod
    def known(cls) -> frozenset[str]:
        """The statistics that a training step has."""
        return StepGradientStatistics.known() | cls.of_outputs

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """What to note beside a measure: also what the outputs are, and of which distribution."""
        needs = set(needs)
        found = super().about(needs)
        if not needs & self.of_outputs:
            return found
        likelihood = self.likelihood
        return {
            **found,
            "likelihood": likelihood.name,
            "loss": likelihood.loss,
            **self._logits.notes,
        }

    @property
    def _seed(self) -> int:  # type: ignore[override]
        return self.step

    @property
    def _logits(self) -> Logits:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    @cached_property
    def _found(self) -> Logits | Exception:
        given = (self._loss, self._own_samples, self._parameters, self._constants)
        try:
            with self._ranks.together():
                found = Logits.behind(*given)
            shapes = self._ranks.each((found.likelihood.name, found.shape[1:]))
            if len(set(shapes)) > 1:
                raise NoLikelihoodError(f"the processes have outputs of several kinds: {shapes}")
            return found
        except (NoLikelihoodError, CoupledSamplesError) as error:  # the same for each measure
            return error

    @cached_property
    def outputs(self) -> Tensor:
        """(N, ...) the outputs; of classes, logarithms of probabilities."""
        if self._logits.values is None:
            raise Unavailable(
                "the tape of a squared error that is written out does not keep the outputs: take "
                "torch.nn.functional.mse_loss, or a probe"
            )
        return self._ranks.join(self._logits.values)

    @cached_property
    def likelihood(self) -> Likelihood:
        """The distribution that the outputs parametrise."""
        return self._logits.likelihood

    @property
    def assumed_likelihood(self) -> Likelihood | None:
        """That distribution."""
        return self.likelihood

    @property
    def suggested_likelihood(self) -> Likelihood | None:
        """That distribution."""
        return self.likelihood

    @cached_property
    def scores(self) -> Tensor:
        """(N, C) the gradient of the likelihood's losses by the outputs, at the step's targets."""
        return self._ranks.join(self._logits.scores).reshape(self.samples, -1)

    @cached_property
    def targets(self) -> Tensor:
        """The step's targets: classes, or real numbers in the outputs' shape."""
        found = self._logits
        if not all(self._ranks.each(bool(found.counted.all()))):
            raise Unavailable("some targets of the step are ignored")
        if isinstance(found.likelihood, Categorical):
            axis = found.likelihood.axis
            shares = self.outputs.exp() - self.scores.view_as(self.outputs)
            if float((shares.amax(axis) - 1).abs().max()) > 1e-3:
                raise Unavailable("the targets of the step are probabilities, and no classes")
            return shares.argmax(axis)
        means = {"bernoulli": torch.sigmoid, "poisson": torch.exp}
        mean = means.get(found.likelihood.name, torch.Tensor.detach)(self.outputs)
        return mean - self.scores.view_as(mean)

    @cached_property
    def _unchecked(self) -> Jacobian:
        return self._jacobian_of(None)

    def _jacobian_of(self, centred: int | None) -> Jacobian:
        memory = self._memory
        gradients = LogitGradients(self._loss, self._logits, self._parameters, memory, centred)
        return shared(Jacobian(gradients, memory), self._ranks)

    @cached_property
    def centred_trace(self) -> Estimate:
        """The trace of the kernel of logits less their mean over classes: exact, or an estimate."""
        likelihood = self.likelihood
        if not isinstance(likelihood, Categorical):
            raise Inapplicable("logits have a mean to take off where they are those of classes")
        centred = self._jacobian_of(likelihood.axis)
        if centred.outputs > self.exact_outputs:
            return estimate_trace(centred, "hutchinson", 8, self.relative_error, self._seed)[0]
        return exact_estimate(centred.norms().double().square().sum())

    # The likelihoods of classes and counts depend on the outputs themselves, others on shapes.

    @property
    def _parametrised(self) -> Tensor:
        found = self._logits
        return self._ranks.join(found.scores if found.values is None else found.values)

    @cached_property
    def fisher_metric(self) -> Tensor:
        """(N, C, C) the information of the output distribution about the outputs."""
        self._afford()
        return self.likelihood.metric(self._parametrised)

    @property
    def _roots(self) -> Jacobian:
        self._afford()
        return self.jacobian.project(self.likelihood.weighted_scores(self._parametrised))

    def _afford(self) -> None:
        """Checks that N C^2 numbers fit the budget, as nobody was told what they take."""
        scores = self.scores
        size = scores.numel() * scores.shape[1] * scores.element_size()
        if size > self._memory:
            raise OverBudgetError(
                f"the information about {scores.shape[1]} outputs of each of {self.samples} "
                f"samples takes {size:.3g} bytes, above the memory budget of {self._memory:.3g} "
                "bytes: take 'fisher/trace_mc', or fewer samples by a probe"
            )

    @cached_property
    def drawn_sqnorms(self) -> Tensor:
        """(N, draws) squared norms of loss gradients, for targets drawn from the outputs."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = self.likelihood.sampled_scores(self._parametrised, self.draws, generator)
        return self.jacobian.project(drawn).norms().square()
