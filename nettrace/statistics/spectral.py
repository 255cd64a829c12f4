"""Statistics of the spectra of Hessian, Gauss-Newton and Fisher matrix: ends, traces, density."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from nettrace.eigenpairs import Eigenpairs
from nettrace.estimators import Estimate
from nettrace.likelihood import CANONICAL
from nettrace.matrix_traces import Probed
from nettrace.operator import PerLayer
from nettrace.piecewise import NotPiecewiseLinearError, check_piecewise_linear
from nettrace.second_order import CurvatureOperator
from nettrace.spectral_density import Quadrature
from nettrace.statistics.second_order import CurvatureStatistics
from nettrace.tape import Tape

Matrix: TypeAlias = Literal["hessian", "gauss_newton", "fisher", "stability"]
Ends: TypeAlias = tuple[Eigenpairs, Eigenpairs]
_NAMES: dict[Matrix, str] = {
    "hessian": "Hessian",
    "gauss_newton": "Gauss-Newton matrix",
    "fisher": "Fisher information matrix",
    "stability": "Hessian as the optimizer scales it",
}


#: What is kept for the next look.
FOLLOWED = "(P, 1 or 2) the first eigenvectors, the very first as long as its eigenvalue"


def statistic(what: str, matrix: Matrix, words: str) -> Any:
    """A statistic of one of the matrices, found once."""

    def get(self: SpectralStatistics) -> Any:
        if (matrix, what) not in self._found:
            self._found[matrix, what] = getattr(self, f"_{what}")(matrix)
        return self._found[matrix, what]

    get.__doc__ = f"{words} of the {_NAMES[matrix]}."
    return property(get)


class SpectralStatistics(CurvatureStatistics):
    """What is known of those matrices' spectra.

    Where the largest eigenvalue alone is wanted, the look before is begun with: with two of its
    eigenvectors, for the second to be there when it overtakes the first. At the edge of stability,
    where both are held at the same value, one alone is wrong by up to 2 % at one look in seven. The
    first look begins with the gradient, which mostly lies in the top eigenspace (Gur-Ari, Roberts
    and Dyer 2018, arXiv:1812.04754), and a random vector as long: for a third fewer products. So
    does one at which the eigenvalue has fallen below half: of a network that diverges, the old
    vectors may say nothing any more.
    """

    #: How many eigenvalues are found at the upper end, and at the lower.
    upper, lower = 10, 5
    #: To what error eigenvalues are found, relative to the outermost at their end of the spectrum,
    #: in single and in double precision.
    tolerances = 1e-3, 1e-6
    #: How many test vectors traces are estimated from, at least; the relative standard error aimed
    #: at by more, and after how many products to be content.
    test_vectors, trace_error, most_products = 12, 0.02, 100
    #: How many steps a density takes for each draw, and how many draws.
    density_steps, density_draws = 30, 4

    hessian_top = statistic("top", "hessian", "The largest eigenvalue")
    gauss_newton_top = statistic("top", "gauss_newton", "The largest eigenvalue")
    fisher_top = statistic("top", "fisher", "The largest eigenvalue")
    hessian_leading = statistic("leading", "hessian", "The largest eigenvalues")
    gauss_newton_leading = statistic("leading", "gauss_newton", "The largest eigenvalues")
    fisher_leading = statistic("leading", "fisher", "The largest eigenvalues")
    hessian_bottom = statistic("bottom", "hessian", "The smallest eigenvalue")
    hessian_lowest = statistic("lowest", "hessian", "The smallest eigenvalues")
    hessian_estimates = statistic("estimates", "hessian", "Traces and squared norm")
    gauss_newton_estimates = statistic("estimates", "gauss_newton", "Traces and squared norm")
    fisher_estimates = statistic("estimates", "fisher", "Traces and squared norm")
    hessian_density = statistic("density", "hessian", "The density of eigenvalues")
    gauss_newton_density = statistic("density", "gauss_newton", "The density of eigenvalues")
    fisher_density = statistic("density", "fisher", "The density of eigenvalues")
    # What the next look begins with.
    hessian_eigenvector = statistic("eigenvector", "hessian", FOLLOWED)
    gauss_newton_eigenvector = statistic("eigenvector", "gauss_newton", FOLLOWED)
    fisher_eigenvector = statistic("eigenvector", "fisher", FOLLOWED)

    @cached_property
    def hessian_layer_tops(self) -> dict[str, Eigenpairs]:
        """By parameter, the largest eigenvalue of its diagonal block of the Hessian."""
        operator = self.hessian_operator
        return {name: self._extremes(operator.block(name), 1, 0)[0] for name in operator.layers}

    @property
    def hessian_diagonal(self) -> Estimate:
        """(P,) the diagonal of the Hessian."""
        found = self._estimated("hessian").diagonal
        assert found is not None  # as it was asked for
        return found

    @cached_property
    def hessian_trace(self) -> Tensor | Estimate:
        """The traces of the samples' Hessians (N,), where they are exact, or an estimated mean.

        Exact for networks that are piecewise linear in each weight: of the Gauss-Newton part then.
        """
        if self._is_exact(self._is_piecewise_linear):
            return self.fisher_sqnorms
        return self._estimated("hessian").trace

    @cached_property
    def hessian_layer_traces(self) -> PerLayer | dict[str, Estimate]:
        """By parameter, the trace of its diagonal block of the Hessian, as `hessian_trace`."""
        if self._is_exact(self._is_piecewise_linear):
            return self.fisher_layer_sqnorms
        return self._estimated("hessian").blocks

    @cached_property
    def gauss_newton_trace(self) -> Tensor | Estimate:
        """Those of the Gauss-Newton matrix, exact where it is the Fisher information."""
        if self._is_exact(self._is_canonical):
            return self.fisher_sqnorms
        return self._estimated("gauss_newton").trace

    @cached_property
    def _is_piecewise_linear(self) -> bool:
        """Whether the trace of the Hessian is that of the Gauss-Newton matrix."""
        if not self._is_canonical or not self._outputs.requires_grad:
            return False
        parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        try:
            check_piecewise_linear(Tape.behind(self._outputs, parameters, ()))
        except NotPiecewiseLinearError:
            return False
        return True

    @property
    def _is_canonical(self) -> bool:
        """Whether the Gauss-Newton matrix is the Fisher information, of which traces are exact."""
        return (
            isinstance(self.assumed_likelihood, CANONICAL)
            and self._probe.losses is None
            and self.outputs[0].numel() <= self.exact_outputs
        )

    def _is_exact(self, here: bool) -> bool:
        """Whether that is so in all processes."""
        return all(self._ranks.each(here))

    def _top(self, matrix: Matrix) -> Eigenpairs:
        return self._ends(matrix, 1, 0)[0]

    def _leading(self, matrix: Matrix) -> Eigenpairs:
        return self._ends(matrix, self.upper, 0)[0]

    def _bottom(self, matrix: Matrix) -> Eigenpairs:
        return self._ends(matrix, 0, 1)[1]

    def _lowest(self, matrix: Matrix) -> Eigenpairs:
        return self._ends(matrix, 0, self.lower)[1]

    def _ends(self, matrix: Matrix, upper: int, lower: int) -> Ends:
        """So many eigenpairs at both ends, found together with all that are to be asked for."""
        every = {"top": (1, 0), "leading": (self.upper, 0)}
        every |= {"bottom": (0, 1), "lowest": (0, self.lower)}
        asked = [counts for what, counts in every.items() if f"{matrix}_{what}" in self._needs]
        uppers, lowers = zip((upper, lower), *asked, strict=True)
        key = (matrix, f"{max(uppers)} and {max(lowers)}")
        if key not in self._found:
            self._found[key] = self._pairs(matrix, max(uppers), max(lowers))
        above, below = self._found[key]
        return above.first(upper), below.first(lower)

    def _pairs(self, matrix: Matrix, upper: int, lower: int) -> Ends:
        """Eigenpairs; where the largest alone is wanted, it and the next from the look before.

        For several, the vectors of a matrix that has changed since are no better than random ones.
        """
        operator: CurvatureOperator = getattr(self, f"{matrix}_operator")
        reference = ("previous", f"{matrix}_eigenvector")
        is_alone = (upper, lower) == (1, 0)
        before = self._past.before(reference, self.step) if is_alone else None
        ends, spare = None, int(upper == 1)
        if before is not None and len(before[reference[1]]) == operator.size:
            start = before[reference[1]].to(operator.device, operator.dtype)
            length = start[:, 0].norm()
            if length > 0:
                ends = self._extremes(operator, upper, lower, start=start, spare=spare)
                if ends[0].values[0] < length / 2:
                    ends = None
        if ends is None:
            hint = operator.flat(self.mean_gradient) if is_alone else None
            ends = self._extremes(operator, upper, lower, hint=hint, spare=spare)
        if upper:
            followed = ends[0].vectors[:, :2].clone()
            followed[:, 0] *= float(ends[0].values[0])
            self._found[matrix, "eigenvector"] = followed
            self._past.keep(self, {reference})
        return ends

    def _eigenvector(self, matrix: Matrix) -> Tensor:
        self._top(matrix)
        found: Tensor = self._found[matrix, "eigenvector"]
        return found

    def _extremes(
        self, operator: CurvatureOperator, upper: int, lower: int, **options: Any
    ) -> Ends:
        tolerance = self.tolerances[operator.dtype == torch.float64]
        return operator.eigenpairs(
            *(upper, lower), tolerance=tolerance, seed=self._seed, memory=self._memory, **options
        )

    def _estimated(self, matrix: Matrix) -> Probed:
        found: Probed = getattr(self, f"{matrix}_estimates")
        return found

    def _estimates(self, matrix: Matrix) -> Probed:
        operator: CurvatureOperator = getattr(self, f"{matrix}_operator")
        vectors = 3 * self.test_vectors * operator.size * operator.dtype.itemsize
        return operator.probe(
            method="xtrace" if vectors <= self._memory else "hutchinson",
            probes=self.test_vectors,
            relative_error=self.trace_error,
            most_products=self.most_products,
            diagonal=f"{matrix}_diagonal" in self._needs,
            seed=self._seed,
        )

    def _density(self, matrix: Matrix) -> Quadrature:
        operator: CurvatureOperator = getattr(self, f"{matrix}_operator")
        steps, draws = self.density_steps, self.density_draws
        return operator.density(steps=steps, draws=draws, seed=self._seed)

    @cached_property
    def _found(self) -> dict[tuple[str, str], Any]:
        """By matrix and by what is found of it."""
        return {}
