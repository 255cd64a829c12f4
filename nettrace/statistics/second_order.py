"""Statistics of second derivatives: the Hessian, the Gauss-Newton and the Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from nettrace.allowance import is_out_of_memory
from nettrace.likelihood import CANONICAL
from nettrace.missing import told
from nettrace.operator import PerLayer
from nettrace.probe import Probe
from nettrace.ranks import ALONE, Ranks
from nettrace.second_order import (
    CurvatureOperator,
    Flattening,
    GaussNewtonProduct,
    HessianProduct,
    NotTwiceDifferentiableError,
    Twice,
    check_functions,
)
from nettrace.smooth import WideLoss, check_differences, cross_check
from nettrace.statistics.gradients import ProbeGradientStatistics
from nettrace.tape import Tape

_CHECK = ("previous", "hessian_check")
_CHECKED = "reverse over reverse, as finite differences confirm"


class CurvatureStatistics(ProbeGradientStatistics):
    """Matrices of second derivatives of the mean loss by the weights, through their products."""

    #: How many samples second derivatives are held against finite differences on, at least one in
    #: so many.
    checked = 16
    #: How the Hessian's products are found.
    _derivatives = ""

    @cached_property
    def hessian_operator(self) -> CurvatureOperator:
        """The Hessian of the mean loss, held against finite differences where that is due."""
        apart = float(self.hessian_check[1])
        self._past.keep(self, {_CHECK})
        parameters = self._smooth.parameters
        if math.isnan(apart):
            return CurvatureOperator(self._differences, parameters, torch.float32)
        return CurvatureOperator(self._hessian, parameters)

    @cached_property
    def hessian_check(self) -> Tensor:
        """How products with the Hessian compared with finite differences, on a few samples.

        (3,) float64: the number of this look; how far they were apart, NaN where differences alone
        are right and infinite where there are none; and P. It is found anew at the looks number 1,
        2, 4, 8, ..., wherever P has changed, and as long as it is no number.
        """
        before = self._past.before(_CHECK, self.step)
        look, apart, size = before["hessian_check"].tolist() if before else (0, math.nan, 0)
        look, now = look + 1, Flattening(self._smooth.parameters).size
        self._derivatives = _CHECKED
        if size != now or not math.isfinite(apart) or math.frexp(look)[0] == 0.5:
            checks = self._ranks.each(self._cross_check())
            apart, self._derivatives = max(checks, key=lambda c: (math.isnan(c[0]), c[0]))
        return torch.tensor((look, apart, now), dtype=torch.float64)

    def _cross_check(self) -> tuple[float, str]:
        """How far products are from finite differences, and how derivatives are found."""
        some = None
        if len(self._outputs) == len(self._own):
            some = self._own.take(slice(0, -(-len(self._own) // self.checked)))
        few = self._wide(some or self._own, ALONE)
        try:
            error = cross_check(few, self._seed)
        except NotTwiceDifferentiableError as why:
            check_differences(few, self._seed)
            return math.nan, f"finite differences of the gradient in float64, as {why}"
        except RuntimeError as why:  # of operations that take one type alone
            if is_out_of_memory(why):
                raise
            check_functions(Tape.behind(self._smooth.losses, self._smooth.parameters, ()).nodes)
            return math.inf, (
                "reverse over reverse, not held against finite differences, as the network cannot "
                f"be evaluated in float64: {told(why)}"
            )
        return error, _CHECKED

    @cached_property
    def _hessian(self) -> HessianProduct:
        """Products with the Hessian of the mean loss, and its gradient."""
        twice = Twice.of_losses(self._smooth.losses, self._smooth.parameters, self._ranks)
        shares = torch.full((self.samples,), 1 / self.samples, dtype=torch.float64)
        return HessianProduct(twice, shares)

    def _differences(self, vectors: PerLayer) -> PerLayer:
        wide = self.wide_loss
        return wide.split(wide.difference(wide.flat(vectors)))

    def about(self, needs: Iterable[str]) -> dict[str, str]:
        """As of a look; and how second derivatives were found, where the Hessian is needed."""
        found = super().about(needs)
        if self._derivatives and any(n.startswith(("hessian_", "stability_")) for n in needs):
            found["second_derivatives"] = self._derivatives
        return found

    @cached_property
    def gauss_newton_operator(self) -> CurvatureOperator:
        """The mean over samples of J^T M J, M the Hessian of a sample's loss by its outputs."""
        smooth = self._smooth
        outputs = smooth.outputs.detach().requires_grad_()
        with torch.enable_grad():
            losses = smooth.evaluate(outputs)
            (scores,) = torch.autograd.grad(losses.sum(), outputs, create_graph=True)

        def metric(vectors: Tensor) -> Tensor:
            if not scores.requires_grad:  # of a loss that is linear in the outputs
                return torch.zeros_like(vectors)
            (found,) = torch.autograd.grad(
                scores, outputs, vectors, retain_graph=True, materialize_grads=True
            )
            return found / self.samples

        product = GaussNewtonProduct(smooth.outputs, smooth.parameters, metric, self._ranks)
        return CurvatureOperator(product, smooth.parameters)

    @cached_property
    def fisher_operator(self) -> CurvatureOperator:
        """The mean over samples of J^T M J, M the information of the output distribution."""
        if isinstance(self.likelihood, CANONICAL) and self._probe.losses is None:
            return self.gauss_newton_operator  # the same for these
        smooth = self._smooth
        matrices = self.likelihood.metric(smooth.outputs)

        def metric(vectors: Tensor) -> Tensor:
            found = torch.einsum("ncd,nd->nc", matrices, vectors.flatten(1).to(matrices))
            return found.view_as(vectors).to(vectors) / self.samples

        product = GaussNewtonProduct(smooth.outputs, smooth.parameters, metric, self._ranks)
        return CurvatureOperator(product, smooth.parameters)

    @cached_property
    def wide_loss(self) -> WideLoss:
        """The mean loss in float64, as a function of the weights."""
        return self._wide(self._own, self._ranks)

    @cached_property
    def mean_gradient(self) -> PerLayer:
        """By parameter, in its shape, the gradient of the mean loss."""
        return self._hessian.gradient()

    def _wide(self, probe: Probe, ranks: Ranks) -> WideLoss:
        return WideLoss(self._model, probe, self._losses_of, self._smooth.parameters, ranks)
