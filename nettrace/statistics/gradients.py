"""Statistics of the gradients of the samples' losses, on a probe or in a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nettrace.differentiate import parse_bytes, reduced_jacobian
from nettrace.gathered import original
from nettrace.gradient_curvature import GradientCurvature, along_gradients
from nettrace.gradients import strided
from nettrace.operator import PerLayer
from nettrace.ownership import CoupledSamplesError
from nettrace.per_sample import LossJacobian
from nettrace.ranks import ALONE, Ranks
from nettrace.reduction import tape_of, terms_of
from nettrace.second_order import Twice, check_functions
from nettrace.shared_gradients import shared_losses
from nettrace.smooth import Smooth, smooth
from nettrace.statistics.information import InformationStatistics
from nettrace.statistics.look import Inapplicable, Unavailable
from nettrace.tape import Tape, opaque


class GradientStatistics(ABC):
    """Inner products of per-sample loss gradients."""

    samples: int
    step: int
    #: Above this number of samples, the inner products of all pairs by layer are not made.
    most_pairs = 512

    @property
    @abstractmethod
    def loss_gradients(self) -> LossJacobian:
        """The Jacobian of the samples' losses."""

    @property
    def gradient_layer_squares(self) -> PerLayer:
        """By parameter, (N,) squared norms of the loss gradients."""
        return self._squares_and_overlaps[0]

    @property
    def gradient_layer_overlaps(self) -> PerLayer:
        """By parameter, (N,) inner products of the loss gradients with their mean."""
        return self._squares_and_overlaps[1]

    @cached_property
    def gradient_gram(self) -> Tensor:
        """(N, N) inner products of the loss gradients."""
        if self.samples <= self.most_pairs:
            return torch.stack([gram.double() for gram in self._layer_grams.values()]).sum(0)
        return self.loss_gradients.gram().double()

    @cached_property
    def gradient_curvature(self) -> GradientCurvature:
        """The curvature that each part of the samples has along the gradients of the others."""
        return along_gradients(self.loss_gradients, self._twice, self.step)

    @property
    @abstractmethod
    def _twice(self) -> Twice:
        """Gradients of the losses, to be differentiated again."""

    @property
    def gradient_batch(self) -> float:
        """How many samples each gradient is the mean over: 1, but for those of micro-batches."""
        return 1.0

    @property
    def parameter_groups(self) -> dict[str, list[str]]:
        """By optimizer's parameter group, the names of its parameters."""
        raise Inapplicable("the groups of an optimizer are those of a training step")

    @property
    def term_products(self) -> tuple[list[str], PerLayer]:
        """The names of a step's loss terms, and by parameter the products of their gradients."""
        raise Inapplicable("the terms of a loss are seen in a training step")

    @cached_property
    def _layer_grams(self) -> PerLayer:
        return finite(self.loss_gradients.gram(per_layer=True))

    @cached_property
    def _squares_and_overlaps(self) -> tuple[PerLayer, PerLayer]:
        if self.samples <= self.most_pairs:
            grams = {name: gram.double() for name, gram in self._layer_grams.items()}
            squares = {name: gram.diagonal() for name, gram in grams.items()}
            return squares, {name: gram.mean(1) for name, gram in grams.items()}
        gradients = self.loss_gradients
        norms = finite(gradients.norms(per_layer=True))
        squares = {name: norm.double().square() for name, norm in norms.items()}
        return squares, gradients.jvp(gradients.mean(per_layer=True))


def finite(shares: PerLayer) -> PerLayer:
    """Shares of parameters, as they are.

    Raises:
        ValueError: if some are not finite, with the parameter.
    """
    for name, share in shares.items():
        if not bool(share.isfinite().all()):
            raise ValueError(
                f"the loss gradients of {name!r} overflow: the weights diverge, or the loss is "
                "scaled by too much, in which case a gradient scaler leaves this update out"
            )
    return shares


class ProbeGradientStatistics(InformationStatistics, GradientStatistics):
    """Those of the losses at the probe's own targets."""

    @cached_property
    def loss_gradients(self) -> LossJacobian:
        """The Jacobian of the samples' losses."""
        return LossJacobian(self.jacobian.project(self.scores.unsqueeze(0)))

    @property
    def _twice(self) -> Twice:
        twice = self._smooth
        check_functions(Tape.behind(twice.losses, twice.parameters, ()).nodes)
        return Twice.of_losses(twice.losses, twice.parameters, self._ranks)

    @cached_property
    def _smooth(self) -> Smooth:
        """This process's samples evaluated such that all can be differentiated twice."""
        if not self._outputs.requires_grad:
            raise Unavailable("no parameter requires a gradient: there is none to differentiate by")
        return smooth(self._model, self._own, self._outputs, self._losses_of)


class StepGradientStatistics(GradientStatistics):
    """Those of the loss of a training step.

    Args:
        loss: () the loss, with its tape.
        model: the network.
        samples: how many samples make up the loss.
        step: how many updates the weights have had.
        memory_budget: as in `nettrace.jacobian`.
        scale: by what the loss is multiplied, as against the underflow of half precision.
        notes: what else to note beside each measure.
        optimizers: those that update the weights.
        ranks: the processes, whose losses are averaged, that make the step together; samples and
            loss are those of this process.

    Raises:
        CoupledSamplesError: if the loss is no mean or sum over samples, or some of the network is
            hidden from its tape.
    """

    def __init__(
        self,
        loss: Tensor,
        model: nn.Module,
        samples: int,
        step: int,
        memory_budget: int | str = "2GiB",
        scale: float = 1.0,
        notes: Mapping[str, str] | None = None,
        optimizers: Sequence[Optimizer] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        if hidden := opaque(loss):
            raise CoupledSamplesError(
                f"{hidden} hides a part of the network from the tape of the loss, so that the "
                "samples in it cannot be told apart"
            )
        self._loss = loss
        self._notes = dict(notes or {})
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._constants = list(model.buffers())
        self._scale = scale
        self._memory = parse_bytes(memory_budget)
        self._ranks = ranks
        with ranks.together():
            own = reduced_jacobian(loss, model, samples, "mean", self._memory, scale)
        self._gradients = shared_losses(own, ranks)
        self._optimizers = optimizers
        self._own_samples, self.samples = samples, self._gradients.samples
        self.step = step

    @classmethod
    def known(cls) -> frozenset[str]:
        """The statistics that a training step has."""
        named = {n for n in dir(cls) if isinstance(getattr(cls, n), (property, cached_property))}
        return frozenset({"samples", "step"} | named)

    @property
    def loss_gradients(self) -> LossJacobian:
        """The Jacobian of what the samples contribute: its rows' mean is the step's gradient."""
        return self._gradients

    @property
    def _twice(self) -> Twice:
        return Twice.of_step(
            *(self._loss, self._own_samples, self._parameters, self._constants, self._scale),
            self._ranks,
        )

    @cached_property
    def parameter_groups(self) -> dict[str, list[str]]:
        """By optimizer's parameter group, by its `name` or number, the names of its parameters.

        Raises:
            Inapplicable: if there is but one with parameters of the network.
        """
        names = {id(original(p)): name for name, p in self._parameters.items()}
        found: dict[str, list[str]] = {}
        groups = [group for one in self._optimizers for group in one.param_groups]
        for number, group in enumerate(groups):
            own = [names[id(p)] for p in group["params"] if id(p) in names]
            name = str(group.get("name", f"group{number}"))
            if own:
                found[name if name not in found else f"{name} {number}"] = own
        if len(found) < 2:
            raise Inapplicable("all parameters are of one group")
        return found

    @cached_property
    def term_products(self) -> tuple[list[str], PerLayer]:
        """The names of the loss's terms, and by parameter the (K, K) products of their gradients.

        Raises:
            Inapplicable: if there is but one.
            MemoryError: if their gradients take more than the memory budget.
        """
        parameters = self._parameters
        tape = tape_of(self._loss, self._own_samples, parameters, self._constants)
        terms = terms_of(self._loss, tape)
        if len(terms) < 2:
            raise Inapplicable("the loss is made of one term")
        size = len(terms) * sum(p.numel() * p.element_size() for p in parameters.values())
        if size > self._memory:
            raise MemoryError(
                f"the gradients of {len(terms)} terms of the loss take {size:.3g} bytes, above the "
                f"memory budget of {self._memory:.3g} bytes"
            )
        gradients = [
            torch.autograd.grad(
                term.edges,
                list(parameters.values()),
                term.flows,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for term in terms
        ]
        products = {}
        self._check_terms([term.name for term in terms])
        for name, several in zip(parameters, zip(*gradients, strict=True), strict=True):
            rows = torch.stack([strided(g).flatten() for g in several])
            self._ranks.add_([rows])
            rows = rows / (self._scale * self._ranks.count)
            rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
            products[name] = rows.double() @ rows.double().mT
        return [term.name for term in terms], products

    def _check_terms(self, names: list[str]) -> None:
        if any(one != names for one in self._ranks.each(names)):
            raise Inapplicable("the processes' losses have other terms each")

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """What to note beside a measure: the mode, and what was held constant."""
        found = {"mode": "training step", "batch": f"{self.samples} samples"}
        if self._ranks.count > 1:
            found["batch"] += f" of {self._ranks.count} processes"
        if self._gradients.holds_statistics:
            found["batch_statistics"] = "held constant at those of this batch"
        return found | self._notes
