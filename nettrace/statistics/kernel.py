"""Statistics of the neural tangent kernel, the Gram matrix of the Jacobian."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from nettrace.estimators import Estimate, exact_estimate
from nettrace.gram_traces import estimate_trace
from nettrace.jackknife import parts_of
from nettrace.operator import PerLayer
from nettrace.statistics.look import Look, Unavailable


class KernelStatistics(Look):
    """The kernel, its trace and its spectrum."""

    #: The statistics that are made of the Gram matrix.
    of_gram = frozenset(
        "gram traced_gram eigenvalues eigenvectors traced_eigenvalues traced_eigenvectors "
        "cosine_eigenvalues leading_eigenvectors partial_eigenvalues "
        "traced_partial_eigenvalues".split()
    )
    #: The statistics made of norms of rows that are turned onto eigenvectors of the Fisher metric.
    of_fisher = frozenset(
        "fisher_sqnorms fisher_layer_sqnorms hessian_trace hessian_layer_traces "
        "gauss_newton_trace".split()
    )
    #: The statistics of two probes that were joined.
    of_pairs = frozenset({"cross_kernels"})

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
        if self._needs & self.of_fisher:
            with suppress(ValueError, Unavailable):  # which the Fisher information will report
                eigenvalues, vectors = torch.linalg.eigh(self.fisher_metric.double())
                rows = rows.project(vectors.permute(2, 0, 1))
        per_layer = bool(
            self._needs & {"layer_traces", "fisher_layer_sqnorms", "hessian_layer_traces"}
        )
        norms = rows.norms(per_layer=True) if per_layer else {"": rows.norms()}
        return eigenvalues, {name: norm.double().square() for name, norm in norms.items()}

    @cached_property
    def _kernel(self) -> tuple[Tensor | None, PerLayer]:
        if self._needs & self.of_gram:
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
    def sample_traces(self) -> PerLayer | None:
        """By parameter, or by the empty name for all together, each sample's share of the trace.

        (N,) each; None where the trace is estimated.
        """
        if self.jacobian.outputs > self.exact_outputs:
            return None
        return {name: squares.sum(1) for name, squares in self._sqnorms[1].items()}

    @cached_property
    def traced_gram(self) -> Tensor:
        """(N, N) the Gram matrix summed over outputs."""
        return self.gram.diagonal(dim1=1, dim2=3).sum(-1)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """(N C,) eigenvalues of the Gram matrix in float64, the largest first."""
        if self._needs & {"eigenvectors", "leading_eigenvectors"}:
            return self._eigensystem[0]
        return spectrum_of(self._matrix)

    @cached_property
    def eigenvectors(self) -> Tensor:
        """(N, C, N C) orthonormal eigenvectors of the Gram matrix along the last axis, likewise."""
        return self._eigensystem[1].view(self.samples, self.jacobian.outputs, -1)

    @cached_property
    def traced_eigenvalues(self) -> Tensor:
        """(N,) eigenvalues of the Gram matrix summed over outputs, in float64, largest first."""
        if "traced_eigenvectors" in self._needs:
            return self._traced_eigensystem[0]
        return spectrum_of(self.traced_gram)

    @cached_property
    def traced_eigenvectors(self) -> Tensor:
        """(N, N) orthonormal eigenvectors of the Gram matrix summed over outputs, likewise."""
        return self._traced_eigensystem[1]

    @cached_property
    def partial_eigenvalues(self) -> list[Tensor]:
        """Eigenvalues of the Gram matrix with each of up to 16 groups of samples left out."""
        return _partial_eigenvalues(self.gram)

    @cached_property
    def traced_partial_eigenvalues(self) -> list[Tensor]:
        """Those of the Gram matrix summed over outputs, likewise."""
        return _partial_eigenvalues(self.traced_gram)

    @property
    def _matrix(self) -> Tensor:
        order = self.samples * self.jacobian.outputs
        return self.gram.reshape(order, order)

    @cached_property
    def _eigensystem(self) -> tuple[Tensor, Tensor]:
        return _eigensystem(self._matrix)

    @cached_property
    def _traced_eigensystem(self) -> tuple[Tensor, Tensor]:
        return _eigensystem(self.traced_gram)

    @cached_property
    def cosine_eigenvalues(self) -> Tensor:
        """(N C,) eigenvalues of the cosines between the Jacobian's rows, in float64, largest first.

        The cosines of a row that is zero are zero.
        """
        kernel = self._matrix.double()
        norms = kernel.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0)
        return spectrum_of(inverse[:, None] * kernel * inverse)

    @cached_property
    def cross_kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of two probes: (N, M) the kernel between them, (N, N) and (M, M) those of each.

        All are summed over equal outputs.
        """
        cut = self._probe.cut
        if cut is None:
            raise Unavailable(
                "this compares two probes, and there is one: pass "
                'Tracer({"train": probe, "val": other}, ...)'
            )
        if self.samples != len(self._probe):
            raise Unavailable(
                f"{len(self._probe)} inputs give {self.samples} rows of outputs, so that it cannot "
                "be told which belong to which probe: make each row of outputs one sample"
            )
        kernel = self.jacobian.gram(trace_outputs=True)
        return kernel[:cut, cut:], kernel[:cut, :cut], kernel[cut:, cut:]


def spectrum_of(kernel: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix in float64, the largest first.

    Raises:
        ValueError: if it is not finite.
    """
    values: Tensor = torch.linalg.eigvalsh(_finite(kernel))
    return values.flip(0)


def _partial_eigenvalues(gram: Tensor) -> list[Tensor]:
    found = []
    for kept in parts_of(len(gram)):
        kept = kept.to(gram.device)
        part = gram.index_select(0, kept).index_select(gram.dim() // 2, kept)
        order = math.isqrt(part.numel())
        found.append(spectrum_of(part.reshape(order, order)))
    return found


def _eigensystem(kernel: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_finite(kernel))
    return values.flip(0), vectors.flip(1)


def _finite(kernel: Tensor) -> Tensor:
    if not bool(kernel.isfinite().all()):
        raise ValueError("the kernel is not finite: the gradients overflow")
    return kernel.double()
