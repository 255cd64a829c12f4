"""Per-sample gradients by parameters in other units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nettrace.gradients import Gradients, Layer, Pulled, reals
from nettrace.kernels import Dense, Factor, dense


class ScaledGradients(Gradients):
    """Each gradient times a factor for each of the parameter's numbers; written out.

    Args:
        gradients: those to scale.
        scales: by parameter, factors in its shape; two for each complex number.
    """

    def __init__(self, gradients: Gradients, scales: Mapping[str, Tensor]) -> None:
        super().__init__(gradients.outputs, gradients.parameters)
        self._gradients = gradients
        self._scales = dict(scales)

    def _autograd(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
        return self._gradients._autograd(*arguments, **options)

    def scaled(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of a parameter, scaled, with its tape."""
        gradient, scale = self._gradients.scaled(name, gradient), self._scales[name]
        if not gradient.is_complex():
            return gradient * scale.to(gradient.dtype)
        pairs = torch.view_as_real(gradient)
        return torch.view_as_complex(pairs * scale.to(pairs.dtype))

    def layers(self, apart: bool) -> list[Layer]:
        """Each parameter for itself."""
        return self._gradients.layers(apart=True)

    def coverage(self) -> dict[str, str]:
        """As without scales."""
        return self._gradients.coverage()

    def pull(self, cotangents: Tensor, layers: Sequence[Layer]) -> Pulled:
        """As without scales."""
        return self._gradients.pull(cotangents, layers)

    def bytes_per_cotangent(self, layers: Sequence[Layer]) -> int:
        """That, and one sample's gradients of the largest parameter."""
        largest = max((reals(self.parameters[n]) for layer in layers for n in layer), default=0)
        return self._gradients.bytes_per_cotangent(layers) + largest * self.dtype.itemsize

    def at_once(self, layers: Sequence[Layer]) -> int:
        """As without scales."""
        return self._gradients.at_once(layers)

    def forget(self) -> None:
        """As without scales."""
        self._gradients.forget()

    def factor(
        self, layer: Layer, pulled: Pulled, samples: slice, oriented: bool = False
    ) -> Factor:
        """The gradients written out, scaled."""
        factor = self._gradients.factor(layer, pulled, samples, oriented=True)
        return Dense(dense(factor) * self._scales[layer[0]].flatten().to(self.dtype))

    def is_written_out(self, layer: Layer) -> bool:
        """Always."""
        return True
