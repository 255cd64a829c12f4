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
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self.samples = jacobian.samples
        self.parameters = jacobian.parameters
        self._jacobian = jacobian

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
            return {name: n[:, 0] for name, n in self._jacobian.norms(per_layer=True).items()}
        return self._jacobian.norms()[:, 0]

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
            return self._jacobian.gram(trace_outputs=True, per_layer=True)
        return self._jacobian.gram(trace_outputs=True)

    @overload
    def mean(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def mean(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def mean(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The mean gradient over samples, (P,), or in each parameter's shape if `per_layer`."""
        weights = torch.full((self.samples, 1), 1 / self.samples, dtype=torch.float64)
        if per_layer:
            return self._jacobian.vjp(weights, per_layer=True)
        return self._jacobian.vjp(weights)

    def rows(self, n: int) -> Tensor:
        """The gradient of sample `n`, (P,), by plain autograd: for checking.

        Raises:
            IndexError: if there is no such sample.
        """
        return self._jacobian.rows(n)[0]

    def coverage(self) -> dict[str, str]:
        """How each parameter's per-sample gradients are found; see `Jacobian.coverage`.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        return self._jacobian.coverage()
