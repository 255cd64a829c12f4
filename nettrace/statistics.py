"""What measures share: each statistic of one look at a network is computed once, when first needed.

A statistic is a property of `Statistics`; a measure names those that it needs. All are plain sums
or raw arrays: measures divide, and say by what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from nettrace.certificate import SpotCheckError
from nettrace.differentiate import jacobian, parse_bytes
from nettrace.estimators import Estimate, estimate_trace, exact_estimate
from nettrace.likelihood import Likelihood
from nettrace.operator import Jacobian, PerLayer
from nettrace.ownership import check_rows
from nettrace.piecewise import check_piecewise_linear
from nettrace.probe import Probe
from nettrace.tape import Tape


class Unavailable(Exception):
    """A statistic that this probe does not define; the message says what to add."""


class Inapplicable(Exception):
    """A measure that has no meaning for this kind of network; it is left out without a word."""


class Statistics:
    """Statistics of a network on a probe, at one instant.

    Args:
        model: the network, in the mode in which it is to be measured.
        probe: the samples.
        needs: the statistics that will be asked for, so that they can share work.
        seed: for those that draw random numbers.
        memory_budget: as in `nettrace.jacobian`.
        check: looks at the Jacobian before anything is made of it; what rests on the Jacobian is
            not to be had if it raises `SpotCheckError`.

    Attributes:
        samples: N.
    """

    #: How many targets are drawn for each sample in Monte Carlo estimates.
    draws = 8
    #: Above this number of outputs, the kernel's trace is estimated.
    exact_outputs = 256
    #: The standard error aimed at then, relative to the trace.
    relative_error = 0.01
    #: The statistics that depend on the distribution that the outputs parametrise.
    of_likelihood = frozenset(
        "likelihood losses scores mean_gradient_sqnorm loss_gradient_sqnorms fisher_sqnorms "
        "fisher_metric drawn_sqnorms hessian_traces".split()
    )

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        needs: Iterable[str] = (),
        *,
        seed: int = 0,
        memory_budget: int | str = "2GiB",
        check: Callable[[Jacobian], None] = lambda jacobian: None,
    ) -> None:
        self._outputs = probe.look(model)
        self._probe = probe
        self._model = model
        self._needs = frozenset(needs)
        self._seed = seed
        self._memory = memory_budget
        self._check = check
        self.samples = len(self._outputs)

    @cached_property
    def outputs(self) -> Tensor:
        """(N, ...) the outputs."""
        return self._outputs.detach()

    @cached_property
    def targets(self) -> Tensor:
        """The probe's targets."""
        if not isinstance(self._probe.targets, Tensor):
            raise Unavailable("the probe has no targets: pass Probe(inputs, targets)")
        return self._probe.targets

    @cached_property
    def likelihood(self) -> Likelihood:
        """The distribution that the outputs parametrise."""
        likelihood = self.assumed_likelihood
        if likelihood is None:
            raise Unavailable(
                "the output distribution is not known: pass Probe(..., likelihood='categorical') "
                f"or 'gaussian'{self._shapes}"
            )
        return likelihood

    @cached_property
    def assumed_likelihood(self) -> Likelihood | None:
        """The distribution that the outputs parametrise, None if it is not known."""
        return self._probe.distribution(self._outputs)

    @property
    def _shapes(self) -> str:
        targets = self._probe.targets
        if not isinstance(targets, Tensor):
            return ""
        return (
            f"; outputs of shape {tuple(self._outputs.shape)} and {targets.dtype} targets of shape "
            f"{tuple(targets.shape)} fit neither by themselves"
        )

    @cached_property
    def losses(self) -> Tensor:
        """(N,) the loss of each sample."""
        return self._losses.detach()

    @cached_property
    def _losses(self) -> Tensor:
        losses = self._probe.per_sample_losses(self._outputs)
        if losses is None:
            raise Unavailable(
                "the loss is not known: pass Probe(inputs, targets), and losses=... where neither "
                f"cross-entropy nor squared error is meant{self._shapes}"
            )
        return losses

    @property
    def jacobian(self) -> Jacobian:
        """The Jacobian of the outputs."""
        if isinstance(self._checked, SpotCheckError):
            raise self._checked
        return self._checked

    @cached_property
    def _checked(self) -> Jacobian | SpotCheckError:
        try:
            self._check(self._unchecked)
        except SpotCheckError as error:
            return error
        return self._unchecked

    @cached_property
    def _unchecked(self) -> Jacobian:
        return jacobian(self._outputs, self._model, memory_budget=self._memory)

    @property
    def routes(self) -> dict[str, str]:
        """How each parameter's gradients are found; see `nettrace.Jacobian.coverage`."""
        return self._unchecked.coverage()

    @cached_property
    def _sqnorms(self) -> tuple[Tensor | None, PerLayer]:
        """Squared norms of the Jacobian's rows, in one pass for two traces.

        Where the Fisher information is wanted too, the rows are turned onto the eigenvectors of
        each sample's information about its outputs. That changes no trace, and the trace of the
        Fisher information is then the sum of the squared norms, weighted with the eigenvalues.

        Returns:
            The eigenvalues (N, C), if rows are turned, and the squared norms (N, C) by parameter,
            or by the empty name for all together.
        """
        rows, eigenvalues = self.jacobian, None
        if self._needs & {"fisher_sqnorms", "hessian_traces"} and self.assumed_likelihood:
            eigenvalues, vectors = torch.linalg.eigh(self.fisher_metric.double())
            rows = rows.project(vectors.permute(2, 0, 1))
        per_layer = "layer_traces" in self._needs
        norms = rows.norms(per_layer=True) if per_layer else {"": rows.norms()}
        return eigenvalues, {name: norm.double().square() for name, norm in norms.items()}

    @cached_property
    def _kernel(self) -> tuple[Tensor | None, PerLayer]:
        if self._needs & {"gram", "eigenvalues", "traced_eigenvalues"}:
            return self.jacobian.gram_and_layer_blocks()
        return None, self.jacobian.blocks(per_layer=True)

    @cached_property
    def gram(self) -> Tensor:
        """(N, C, N, C) the Gram matrix of the Jacobian: the neural tangent kernel."""
        found, _ = self._kernel
        return self.jacobian.gram() if found is None else found

    @cached_property
    def layer_blocks(self) -> PerLayer:
        """By parameter, its share of the per-sample diagonal blocks of the kernel, (N, C, C)."""
        return self._kernel[1]

    @cached_property
    def blocks(self) -> Tensor:
        """(N, C, C) the per-sample diagonal blocks of the Gram matrix."""
        return torch.stack(list(self.layer_blocks.values())).sum(0)

    @property
    def trace(self) -> Estimate:
        """The trace of the Gram matrix: exact, or an estimate if there are too many outputs."""
        return self._traces[0]

    @property
    def layer_traces(self) -> dict[str, Estimate]:
        """By parameter, its share of that trace, found likewise."""
        return self._traces[1]

    @cached_property
    def _traces(self) -> tuple[Estimate, dict[str, Estimate]]:
        if self.jacobian.outputs > self.exact_outputs:
            return estimate_trace(self.jacobian, "hutchinson", 8, self.relative_error, self._seed)
        traces = {name: squares.sum() for name, squares in self._sqnorms[1].items()}
        whole = torch.stack(list(traces.values())).sum()
        return exact_estimate(whole), {name: exact_estimate(t) for name, t in traces.items()}

    @cached_property
    def eigenvalues(self) -> Tensor:
        """(N C,) eigenvalues of the Gram matrix in float64, the largest first."""
        order = self.samples * self.jacobian.outputs
        return _eigenvalues(self.gram.reshape(order, order))

    @cached_property
    def traced_eigenvalues(self) -> Tensor:
        """(N,) eigenvalues of the Gram matrix summed over outputs, in float64, largest first."""
        return _eigenvalues(self.gram.diagonal(dim1=1, dim2=3).sum(-1))

    @cached_property
    def scores(self) -> Tensor:
        """(N, C) the gradient of each sample's loss by its outputs."""
        check_rows(self._losses, self._outputs, parse_bytes(self._memory))
        (gradient,) = torch.autograd.grad(self._losses.sum(), self._outputs, retain_graph=True)
        return gradient.detach().reshape(self.samples, -1)

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
    def fisher_metric(self) -> Tensor:
        """(N, C, C) the information of the output distribution about the outputs."""
        return self.likelihood.metric(self.outputs)

    @cached_property
    def drawn_sqnorms(self) -> Tensor:
        """(N, draws) squared norms of loss gradients, for targets drawn from the outputs."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = self.likelihood.sampled_scores(self.outputs, self.draws, generator)
        return self.jacobian.project(drawn).norms().square()


def _eigenvalues(kernel: Tensor) -> Tensor:
    if not bool(kernel.isfinite().all()):
        raise ValueError("the kernel is not finite: the gradients overflow")
    values: Tensor = torch.linalg.eigvalsh(kernel.double())
    return values.flip(0)
