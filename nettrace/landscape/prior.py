"""How weights are distributed before a loss is looked at: as a Gaussian, or evenly on a sphere."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from nettrace.landscape.weight_loss import WeightLoss

Kind: TypeAlias = Literal["gaussian", "sphere"]


class Prior:
    """A distribution of weights w = scales x, and moves that keep it.

    A Gaussian one has x of unit variance; on a sphere x has the length sqrt(P). Both are kept by
    rotations of x towards a momentum p of unit variance, on the sphere a tangent one: the motion of
    free oscillators, or along great circles.

    Args:
        kind: "gaussian" or "sphere".
        scales: (P,)
    """

    def __init__(self, kind: Kind, scales: Tensor) -> None:
        self.kind, self.scales = kind, scales
        self.size = len(scales)

    def weights(self, x: Tensor) -> Tensor:
        """(K, P) of x (K, P)."""
        return x * self.scales

    def draw(self, copies: int, generator: torch.Generator) -> Tensor:
        """(K, P) for x, independent of each other."""
        return self.kept(self._normal(copies, generator))

    def kept(self, x: Tensor) -> Tensor:
        """The same x but for rounding: on a sphere, put back on it."""
        if self.kind == "gaussian":
            return x
        lengths: Tensor = x.norm(dim=1, keepdim=True)
        found: Tensor = x / lengths * self.size**0.5
        return found

    def momentum(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(K, P) for p at x (K, P)."""
        return self.tangent(x, self._normal(len(x), generator))

    def tangent(self, x: Tensor, vector: Tensor) -> Tensor:
        """What of vectors (K, P) counts at x."""
        if self.kind == "gaussian":
            return vector
        return vector - x * ((x * vector).sum(1, keepdim=True) / self.size)

    def drifted(self, x: Tensor, p: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Where x and p are after times (K, 1) without a force."""
        if self.kind == "gaussian":
            rate = torch.ones_like(time)
        else:
            rate = p.norm(dim=1, keepdim=True) / self.size**0.5
        cos, sin = (rate * time).cos(), (rate * time).sin()
        return x * cos + p * (sin / rate), p * cos - x * (sin * rate)

    def energy(self, x: Tensor, p: Tensor) -> Tensor:
        """(K,) minus the logarithm of the density of x and p, in float64."""
        found = p.double().square().sum(1)
        if self.kind == "gaussian":
            found = found + x.double().square().sum(1)
        return found / 2

    def _normal(self, copies: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(copies, self.size, generator=generator, dtype=self.scales.dtype)
        return drawn.to(self.scales.device)


def prior_of(
    model: nn.Module, loss: WeightLoss, kind: str, scale: float | Mapping[str, float] | None
) -> Prior:
    """The prior that arguments of `loss_density` mean.

    Raises:
        ValueError: if there is none such.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"expected prior= to be 'gaussian' or 'sphere', got {kind!r}")
    one = torch.ones_like(loss.point)
    if kind == "sphere":
        if isinstance(scale, Mapping):
            raise ValueError("expected scale= to be one number, the radius, for prior='sphere'")
        if loss.size < 2:
            raise ValueError("a sphere needs two weights or more, got one: take prior='gaussian'")
        radius = float(loss.point.double().norm()) if scale is None else _positive(scale)
        if radius == 0:
            raise ValueError(
                "all weights are zero, and so the radius of prior='sphere': pass it as scale="
            )
        return Prior("sphere", one * (radius / loss.size**0.5))
    if scale is not None and not isinstance(scale, Mapping):
        return Prior("gaussian", one * _positive(scale))
    scales = one
    for name, place in loss.layers.items():
        if scale is None:
            found = fan_in_scale(model, name)
        else:
            matches = [value for pattern, value in scale.items() if fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(f"scale= says nothing of {name!r}: it has {list(scale)}")
            found = _positive(matches[0])
        # The two parts of a complex number share its variance.
        parts = 2 if loss.parameters[name].is_complex() else 1
        scales[place] = found / parts**0.5
    return Prior("gaussian", scales)


def fan_in_scale(model: nn.Module, name: str) -> float:
    """1 / sqrt(inputs of a unit) for weights and biases of a layer, 1 for all else.

    With which fields are of order one, whatever the width (Neal 1996, Bayesian Learning for Neural
    Networks; LeCun et al. 1998).
    """
    own = dict(model.named_parameters())[name]
    beside = model.get_submodule(name.rpartition(".")[0])._parameters.get("weight")
    for tensor in (own, beside):
        if tensor is not None and tensor.dim() > 1:
            return float(tensor[0].numel() ** -0.5)
    return 1.0


def _positive(scale: float) -> float:
    if isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise ValueError(f"expected scale= to be positive and finite, got {scale!r}")
    return float(scale)
