"""One look at a network: what its outputs, losses and derivatives are on a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nettrace.certificate import SpotCheckError
from nettrace.differentiate import jacobian, parse_bytes
from nettrace.likelihood import Likelihood
from nettrace.missing import told
from nettrace.operator import Jacobian, PerLayer
from nettrace.own_loss import LossCheck, compare
from nettrace.ownership import check_rows
from nettrace.past import Kept, Past, Reference
from nettrace.probe import Probe
from nettrace.ranks import ALONE, Ranks
from nettrace.shared_gradients import shared
from nettrace.window import WeightWindow


class Unavailable(Exception):
    """A statistic that this probe does not define; the message says what to add."""


class Inapplicable(Exception):
    """A measure that has no meaning for this kind of network; it is left out without a word."""


class Look:
    """A network on a probe, at one instant: outputs, losses and the Jacobian.

    Args:
        model: the network, in the mode in which it is to be measured.
        probe: the samples.
        needs: the statistics that will be asked for, so that they can share work.
        step: how many updates the weights have had.
        past: what earlier looks left.
        optimizers: those that update the weights, if they are known.
        seed: for those that draw random numbers.
        memory_budget: as in `nettrace.jacobian`.
        check: looks at the Jacobian before anything is made of it; what rests on the Jacobian is
            not to be had if it raises `SpotCheckError`.
        loss_check: what is known of a loss that is not declared, from where it is trained.
        window: the weights of the last updates, if they are kept.
        ranks: the processes that look together, each at its share of the samples; all must then ask
            for the same statistics, in one order.

    Attributes:
        samples: N.
        step: how many updates the weights have had.
        selected: which outputs these are, where the network returns more; else empty.
    """

    #: Above this number of outputs, the kernel's trace is estimated.
    exact_outputs = 256
    #: The standard error aimed at then, relative to the trace.
    relative_error = 0.01
    #: The statistics that depend on the distribution that the outputs parametrise.
    of_likelihood = frozenset(
        "likelihood losses scores mean_gradient_sqnorm loss_gradient_sqnorms "
        "loss_gradient_column_sqnorms fisher_sqnorms fisher_layer_sqnorms fisher_column_sqnorms "
        "fisher_eigenvalues fisher_layer_eigenvalues fisher_metric drawn_sqnorms hessian_trace "
        "hessian_layer_traces gauss_newton_trace hessian_top hessian_leading hessian_bottom "
        "hessian_lowest hessian_estimates hessian_density hessian_diagonal hessian_layer_tops "
        "hessian_operator mean_gradient gauss_newton_top gauss_newton_leading "
        "gauss_newton_estimates gauss_newton_density gauss_newton_operator fisher_top "
        "fisher_leading fisher_estimates fisher_density fisher_operator stability_top "
        "stability_operator wide_loss "
        "centred_trace linearised_losses gradient_layer_squares gradient_layer_overlaps "
        "gradient_gram gradient_curvature cross_fitted".split()
    )

    #: The statistics that have a meaning also where samples are not independent of each other.
    of_mean_loss = frozenset(
        "hessian_operator hessian_top hessian_leading hessian_bottom hessian_lowest "
        "hessian_layer_tops hessian_density hessian_estimates hessian_diagonal mean_gradient "
        "wide_loss stability_operator stability_top stability_threshold learning_rates weights "
        "step nodes node_strengths shuffled_strengths node_loads".split()
    )

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        needs: Iterable[str] = (),
        *,
        step: int = 0,
        past: Past | None = None,
        optimizers: Sequence[Optimizer] = (),
        seed: int = 0,
        memory_budget: int | str = "2GiB",
        check: Callable[[Jacobian], None] = lambda jacobian: None,
        loss_check: LossCheck | None = None,
        window: WeightWindow | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        own = probe.take(ranks.share(len(probe))) if 1 < ranks.count <= len(probe) else None
        #: This process's samples; where they cannot be told apart, each process takes all.
        self._own = own or probe
        self._ranks = ranks if own else ALONE
        #: This process's outputs, with their tape.
        self._outputs, self.selected = self._own.see(model)
        self._probe = probe
        self._model = model
        self.expect(needs)
        self._seed = seed
        self._memory = parse_bytes(memory_budget)
        self.check = check
        self._loss_check = loss_check
        self._past = past or Past()
        self._optimizers = optimizers
        self._window = window
        self.samples = sum(self._ranks.each(len(self._outputs)))
        self.step = step

    def expect(self, needs: Iterable[str]) -> None:
        """Says anew which statistics will be asked for, before the first is."""
        self._needs = frozenset(need.rpartition(".")[2] for need in needs)

    def earlier(self, reference: Reference) -> Kept:
        """The look that a measure compares with: the first, which may be this, or the one before.

        Raises:
            Inapplicable: if there was none before.
        """
        kept = self._past.before(reference, self.step)
        if kept is not None:
            return kept.to(self._outputs.device)
        when, *names = reference
        # Also where there is nothing to compare yet, so that what is wrong with them is said.
        values = {name: getattr(self, name) for name in names}
        if when == "previous":
            raise Inapplicable("there is no earlier look to compare with")
        return Kept(self.step, values)

    def together(self) -> AbstractContextManager[None]:
        """What is done in this succeeds in all processes that look together, or in none."""
        return self._ranks.together()

    @property
    def model(self) -> nn.Module:
        """The network, in the mode in which it is measured."""
        return self._model

    @property
    def inputs(self) -> Any:
        """The probe's inputs, as the network is called with them."""
        return self._probe.inputs

    @property
    def parameters(self) -> PerLayer:
        """By name, all parameters, detached."""
        return {name: p.detach() for name, p in self._model.named_parameters()}

    @cached_property
    def outputs(self) -> Tensor:
        """(N, ...) the outputs."""
        return self._ranks.join(self._outputs.detach())

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
            self._check_loss()
            raise Unavailable(
                "the output distribution is not known: pass Probe(..., likelihood='categorical'), "
                f"'bernoulli', 'poisson' or 'gaussian'{self._shapes}"
            )
        return likelihood

    @cached_property
    def assumed_likelihood(self) -> Likelihood | None:
        """The distribution that the outputs parametrise, None if it is not known."""
        if self.loss_check is not None and not self.loss_check.agrees:
            return None
        return self.suggested_likelihood

    @cached_property
    def suggested_likelihood(self) -> Likelihood | None:
        """What outputs and targets suggest, whatever loss is trained; None if that is nothing."""
        return self._probe.distribution(self.outputs)

    @cached_property
    def loss_check(self) -> LossCheck | None:
        """What is known of a loss that is not declared, held against the network's own."""
        if self._probe.losses is not None or self._probe.likelihood is not None:
            return None
        try:
            own = self._own.own_loss(self._model)
            found = own if own is None else compare(self._own, self._outputs, own, "the probe")
        except Exception as error:  # of the comparison; that of the loss itself is raised elsewhere
            found = LossCheck(f"not checked: {told(error)}")
        several = [one for one in self._ranks.each(found) if one is not None]
        if not several:
            none = LossCheck("not checked: the network returned no loss of its own")
            return self._loss_check or none
        found = next((one for one in several if not one.agrees), several[0])
        # What is trained need not be what the network returns.
        is_trained = self._loss_check is None or self._loss_check.agrees
        return found if is_trained or not found.agrees else self._loss_check

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """What to note beside a measure that needs some statistics.

        The mode, which outputs were measured, and what their distribution and the loss were taken
        to be, if it matters.
        """
        found = {"mode": "eval"} | ({"outputs": self.selected} if self.selected else {})
        if "gram" in needs and (classes := self._told_classes):
            found["classes"] = classes
        if not self.of_likelihood & set(needs):
            return found
        likelihood = self.assumed_likelihood
        found["likelihood"] = "unknown" if likelihood is None else likelihood.name
        found["loss"] = "losses of the probe's own" if likelihood is None else likelihood.loss
        check = self.loss_check
        return found if check is None else {**found, "loss_checked": check.text}

    def _check_loss(self) -> None:
        if self.loss_check is not None and not self.loss_check.agrees:
            raise Unavailable(self.loss_check.text)

    @property
    def _told_classes(self) -> str:
        """The class of each sample, by which figures put kernels in order, if there are classes."""
        targets = self._probe.targets
        if not isinstance(targets, Tensor) or targets.shape != (self.samples,):
            return ""
        is_class = not (targets.is_floating_point() or targets.is_complex())
        return " ".join(map(str, targets.tolist())) if is_class else ""

    @property
    def _shapes(self) -> str:
        targets = self._probe.targets
        if not isinstance(targets, Tensor):
            return ""
        return (
            f"; outputs of shape {tuple(self.outputs.shape)} and {targets.dtype} targets of shape "
            f"{tuple(targets.shape)} fit neither by themselves"
        )

    @cached_property
    def losses(self) -> Tensor:
        """(N,) the loss of each sample."""
        return self._ranks.join(self._losses.detach())

    @cached_property
    def _losses(self) -> Tensor:
        """Those of this process's samples, with their tape."""
        self._check_loss()
        return self._losses_of(self._own, self._outputs)

    def _losses_of(self, probe: Probe, outputs: Tensor) -> Tensor:
        losses = probe.per_sample_losses(outputs)
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
            self.check(self._unchecked)
        except SpotCheckError as error:
            return error
        return self._unchecked

    @cached_property
    def _unchecked(self) -> Jacobian:
        return shared(self._of_own, self._ranks)

    @cached_property
    def _of_own(self) -> Jacobian:
        """The Jacobian of this process's outputs."""
        return jacobian(self._outputs, self._model, memory_budget=self._memory)

    @property
    def routes(self) -> dict[str, str]:
        """How each parameter's gradients are found; see `nettrace.Jacobian.coverage`."""
        return self._unchecked.coverage()

    @cached_property
    def scores(self) -> Tensor:
        """(N, C) the gradient of each sample's loss by its outputs."""
        return self._ranks.join(self._scores_of_own)

    @cached_property
    def _scores_of_own(self) -> Tensor:
        check_rows(self._losses, self._outputs, self._memory)
        (gradient,) = torch.autograd.grad(self._losses.sum(), self._outputs, retain_graph=True)
        return gradient.detach().reshape(len(self._outputs), -1)

    @cached_property
    def fisher_metric(self) -> Tensor:
        """(N, C, C) the information of the output distribution about the outputs."""
        return self.likelihood.metric(self.outputs)
