"""What `Jacobian` offers where the exact Gram matrix or its trace is too dear."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from nettrace.estimators import Estimate, TraceMethod
from nettrace.gram_traces import estimate_trace
from nettrace.low_rank import (
    GramMethod,
    PseudoKind,
    approximate_gram,
    pseudo,
    sketch,
    spectrum,
)
from nettrace.products import gram_product

if TYPE_CHECKING:
    from nettrace.operator import Jacobian


class Approximations:
    """Estimates with their errors, and products without one backward pass an output."""

    @property
    def _jacobian(self) -> Jacobian:
        return cast("Jacobian", self)

    def estimate_trace(
        self,
        method: TraceMethod = "hutchinson",
        *,
        probes: int = 8,
        relative_error: float | None = None,
        seed: int = 0,
    ) -> Estimate:
        """An estimate of the trace of the Gram matrix, for outputs by the thousand.

        Where the outputs are a linear map of fewer features, as the logits of a language model are,
        an orthogonal change of basis first leaves only as many outputs as there are features; that
        is exact (see `nettrace.heads`). Where the probes would be as many as the outputs, the exact
        trace is returned, and `method` says so.

        Args:
            method: "hutchinson": the mean of |J_n^T v|^2 over random v, for `probes` passes of the
                cost of `norms` for one output (Hutchinson 1990). "hutch++": the same beside
                `probes` leading combinations of each sample's outputs, whose share is found
                exactly, for twice the cost and a `gram_product` a probe; better where few
                combinations dominate (Meyer et al. 2021, arXiv:2010.09649, sample by sample).
                "xtrace": over samples and outputs together, for two `gram_product` a probe; better
                where the kernel's eigenvalues fall off fast (Epperly et al. 2024,
                arXiv:2301.07825).
            probes: how many random vectors, at least 2.
            relative_error: if given, probes are added until the standard error is at most this
                share of the estimate, by as much as it is itself uncertain.
            seed: the same seed gives the same probes on any device and for any memory budget.

        Returns:
            A number and its standard error, from the spread of the probes within samples (of its
            leave-one-out estimates for "xtrace").

        Raises:
            CoupledSamplesError: if samples are coupled.
            ValueError: if an argument is out of range; or if "hutch++" or "xtrace" meets an
                operation whose backward pass cannot be differentiated.
        """
        return estimate_trace(self._jacobian, method, probes, relative_error, seed)[0]

    def estimate_layer_traces(
        self, *, probes: int = 8, relative_error: float | None = None, seed: int = 0
    ) -> dict[str, Estimate]:
        """The parameters' shares of the trace, by Hutchinson's estimator; see `estimate_trace`.

        Args:
            probes: as there.
            relative_error: as there, of the whole trace.
            seed: as there; the shares are those of the same probes and add up to that trace.

        Raises:
            CoupledSamplesError: if samples are coupled.
            ValueError: if an argument is out of range.
        """
        return estimate_trace(self._jacobian, "hutchinson", probes, relative_error, seed)[1]

    def gram_product(self, v: Tensor) -> Tensor:
        """The product J J^T v, (N, C), without the Gram matrix.

        It takes two backward passes, where the backward pass of every operation is itself
        differentiable, and one for each output where not, as with fused attention; the two are told
        apart by <v, J J^T v> = |J^T v|^2.

        Args:
            v: (N, C).

        Raises:
            CoupledSamplesError: if samples are coupled and some operation is not differentiable
                twice.
            ValueError: if `v` has the wrong shape.
        """
        shape = (self._jacobian.samples, self._jacobian.outputs)
        if v.shape != shape:
            raise ValueError(f"expected v of shape {shape}, got {tuple(v.shape)}")
        return gram_product(self._jacobian, v)

    def pseudo(self, kind: PseudoKind = "sum", *, k: int = 1, seed: int = 0) -> Jacobian:
        """The Jacobian of `k` combinations of the outputs, the same for all samples.

        Its Gram matrix is the pseudo-NTK (Mohamadi, Bae and Sutherland 2023, arXiv:2206.12543): at
        large width, where K = k(x, x') 1 over outputs, it is k(x, x').

        Args:
            kind: "sum": rows sum_c J[n, c] / sqrt(C). "random": rows sum_c s_kc J[n, c] / sqrt(C)
                with random signs s; then `gram(trace_outputs=True)` times C / k is an unbiased
                estimate of this Jacobian's own.
            k: the number of combinations, 1 for "sum".
            seed: for the signs.

        Raises:
            ValueError: if an argument is out of range.
        """
        return pseudo(self._jacobian, kind, k, seed)

    def sketch(self, k: int, *, seed: int = 0) -> Tensor:
        """Random projections S = J R of the rows, (N, C, k), whose Gram matrix estimates that of J.

        R is P x k of independent signs over sqrt(k), so that S S^T is unbiased, with the variance
        of an entry at most (K_ii K_jj + K_ij^2) / k. It takes k + 1 backward passes, or k C where
        `gram_product` takes C.

        Args:
            k: the number of columns.
            seed: the same seed and names of parameters give the same signs on any device, for any
                batch and memory budget.

        Raises:
            CoupledSamplesError: if samples are coupled and some operation is not differentiable
                twice.
            ValueError: if `k` is out of range.
        """
        return sketch(self._jacobian, k, seed)

    def approximate_gram(
        self, method: GramMethod = "nystrom", *, rank: int, seed: int = 0
    ) -> Estimate:
        """An approximation of the Gram matrix, positive semidefinite, with its error.

        Args:
            method: "sketch": from `sketch(rank)`; unbiased, with the standard error of each entry.
                "nystrom": K O (O^T K O)^-1 O^T K for a random O of `rank` columns, by as many
                products and eight more for the error, the root mean square over all entries; better
                where the eigenvalues fall off.
            rank: the approximation's rank.
            seed: for the random vectors.

        Returns:
            (N, C, N, C), and the error, of that shape or one number.

        Raises:
            CoupledSamplesError: as for `sketch`.
            MemoryError: if the result alone would exceed the memory budget.
            ValueError: if an argument is out of range.
        """
        j = self._jacobian
        j._afford((j.samples, j.outputs) * 2, per_layer=False)
        return approximate_gram(j, method, rank, seed)

    def spectrum(self, k: int, *, tolerance: float = 1e-4, seed: int = 0) -> Estimate:
        """The largest eigenvalues of the Gram matrix, which is not formed.

        By block Lanczos with full reorthogonalisation, in blocks of `k`, so that eigenvalues
        that coincide are each found (Golub and Underwood 1977).

        Args:
            k: how many.
            tolerance: of the residuals, relative to the largest eigenvalue; products are spent
                until they are below, but no more than 50 k.
            seed: for the first block.

        Returns:
            (k,) the eigenvalues, largest first, and as their errors the norms of the residuals
            K y - theta y: some eigenvalue lies that near. `probes` counts products with K.

        Raises:
            CoupledSamplesError: as for `gram_product`.
            ValueError: if `k` is out of range.
        """
        return spectrum(self._jacobian, k, tolerance, seed)
