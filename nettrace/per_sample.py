"""The Jacobian of per-sample losses: one gradient a sample."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from nettrace.operator import Jacobian, PerLayer


class LossJacobian:
    """An implicit N x P matrix of per-sample loss gradients; made by `loss_jacobian`.

    Attributes:
        samples: N.
        parameters: P.
        shares: an (N, 1) x P Jacobian, of which the rows are multiples but for what is common.
        holds_statistics: whether statistics of the batch were held constant, in batch normalisation
            in training mode.
    """

    # Row n is `factor` times that of `shares`, plus `common`, which holds each parameter's share
    # of what is the same for all samples, if anything is.

    def __init__(
        self,
        jacobian: Jacobian,
        factor: float = 1.0,
        common: PerLayer | None = None,
        holds_statistics: bool = False,
    ) -> None:
        self.samples = jacobian.samples
        self.parameters = jacobian.parameters
        self.shares = jacobian
        self._factor = factor
        self._common = common
        self.holds_statistics = holds_statistics

    @overload
    def norms(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def norms(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def norms(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The Euclidean norms of the gradients, (N,).

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        if per_layer:
            norms = {name: n[:, 0] for name, n in self.shares.norms(per_layer=True).items()}
        else:
            norms = {"": self.shares.norms()[:, 0]}
        norms = {name: self._factor * norm for name, norm in norms.items()}
        for name, (inner, square) in self._with_common(per_layer).items():
            norms[name] = (norms[name].square() + 2 * inner + square).clamp_min(0).sqrt()
        return norms if per_layer else norms[""]

    @overload
    def gram(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def gram(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def gram(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The inner products between the gradients, (N, N).

        Raises:
            CoupledSamplesError: if samples are coupled.
            MemoryError: if the result alone would exceed the memory budget.
        """
        if per_layer:
            grams = self.shares.gram(trace_outputs=True, per_layer=True)
        else:
            grams = {"": self.shares.gram(trace_outputs=True)}
        grams = {name: self._factor**2 * gram for name, gram in grams.items()}
        for name, (inner, square) in self._with_common(per_layer).items():
            grams[name] = grams[name] + inner + inner[:, None] + square
        return grams if per_layer else grams[""]

    @overload
    def mean(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def mean(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def mean(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The mean gradient over samples, (P,), or in each parameter's shape if `per_layer`."""
        shares = self.vjp(torch.full((self.samples,), 1 / self.samples, dtype=torch.float64))
        return shares if per_layer else self.shares._flat(shares)

    def vjp(self, w: Tensor) -> PerLayer:
        """By parameter, in its shape, the sum of the gradients with weights; by one backward pass.

        Args:
            w: (N,) the weights.
        """
        shares = self.shares.vjp(w.unsqueeze(1) * self._factor, per_layer=True)
        if self._common is None:
            return shares
        total = float(w.sum())
        return {name: share + total * self._common[name] for name, share in shares.items()}

    def jvp(self, u: PerLayer) -> PerLayer:
        """By parameter, the inner products (N,) of the gradients with a vector.

        Args:
            u: a tensor for each parameter by name, in its shape.

        Raises:
            CoupledSamplesError: if samples are coupled.
            ValueError: if `u` has the wrong names or shapes.
        """
        found = {
            name: self._factor * share[:, 0]
            for name, share in self.shares.jvp(u, per_layer=True).items()
        }
        if self._common is not None:
            for name, share in self._common.items():
                found[name] = found[name] + (share.conj() * u[name]).real.sum()
        return found

    def rows(self, n: int) -> Tensor:
        """The gradient of sample `n`, (P,), by plain autograd: for checking.

        Raises:
            IndexError: if there is no such sample.
        """
        row = self._factor * self.shares.rows(n)[0]
        return row if self._common is None else row + self.shares._flat(self._common)

    def coverage(self) -> dict[str, str]:
        """How each parameter's per-sample gradients are found; see `Jacobian.coverage`.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        return self.shares.coverage()

    def _with_common(self, per_layer: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter, or all together, what each sample has with `common`, and its square."""
        if self._common is None:
            return {}
        found = {
            name: (self._factor * share[:, 0], self._common[name].abs().square().sum())
            for name, share in self.shares.jvp(self._common, per_layer=True).items()
        }
        if per_layer:
            return found
        inners, squares = zip(*found.values(), strict=True)
        return {"": (sum(inners), sum(squares))}
