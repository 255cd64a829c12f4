"""Convolutions as sums of outer products of what a filter meets at each place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nettrace.kernels.still import Still, tiles


@dataclass(frozen=True)
class Geometry:
    """How a filter moves over an image; one entry for each axis of the image."""

    padding: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def places(self, space: Sequence[int]) -> tuple[int, ...]:
        """At how many places along each axis a filter meets an image of size `space`."""
        steps = zip(space, self.size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (s - 1) - 1) // t + 1 for n, s, t, p, d in steps)


class Patches(Still):
    """What a filter meets, (N, G, T, D), made when asked for.

    Args:
        images: (N, S, C, ...) the S images of each sample.
        geometry: how the filter moves over them; T = S x places, D = C / G x filter size.
        ones: as in `Still`.
    """

    #: Making patches, or a convolution with samples as groups, is done once for all columns.
    at_once = 2**24

    def __init__(self, images: Tensor, geometry: Geometry, ones: bool = False) -> None:
        self.images = images
        self.geometry = geometry
        self.samples, per_sample, channels = images.shape[:3]
        self.groups = geometry.groups
        self.length = per_sample * math.prod(geometry.places(images.shape[3:]))
        self.width = channels // geometry.groups * math.prod(geometry.size)
        self.ones = ones
        self.is_lookup = False
        self.dtype = images.dtype

    def tokens(self, ns: slice = slice(None)) -> Tensor:
        """(N, G, T, D) patches of some samples."""
        return patches(self.images[ns], self.geometry)

    def with_ones(self) -> Still:
        """The same with a column of ones."""
        return Patches(self.images, self.geometry, ones=True)

    def to(self, dtype: torch.dtype) -> Still:
        """The same in another precision."""
        return Patches(self.images.to(dtype), self.geometry, self.ones)

    def outer(self, moving: Tensor, ns: slice, out: Tensor | None = None) -> Tensor:
        """(N, G, M, D) the sum over tokens of moving (N, G, T, M) times patches."""
        n, g, t, m = moving.shape
        images, geometry = self.images[ns], self.geometry
        # One convolution with samples as groups makes no patches. Where the images are small, or
        # the channels few or many, it is slower than making them.
        many = 16 <= images.shape[2] // g and m * self.width <= 50_000
        if not many or t < 128 or len(geometry.size) != 2:
            found = moving.new_empty((n, g, m, self.width)) if out is None else out
            for part in tiles(n, g * t * self.width):
                torch.matmul(moving[part].mT, patches(images[part], geometry), out=found[part])
            return found
        _, s, c, *space = images.shape
        places = geometry.places(space)
        cotangent = moving.mT.reshape(n, g, m, s, -1).permute(3, 0, 1, 2, 4)
        weight = torch.ops.aten.convolution_backward(
            cotangent.reshape(s, n * g * m, *places),
            images.movedim(1, 0).reshape(s, n * c, *space),
            images.new_empty((1,)).expand(n * g * m, c // g, *geometry.size),
            None,
            list(geometry.stride),
            list(geometry.padding),
            list(geometry.dilation),
            False,
            [0] * len(places),
            n * g,
            [False, True, False],
        )[1]
        found = weight.view(n, g, m, self.width)
        return found if out is None else out.copy_(found)


def patches(images: Tensor, geometry: Geometry) -> Tensor:
    """(N, G, T, C / G x filter size) what a filter meets at each place of images (N, S, C, ...)."""
    axes = len(geometry.size)
    x: Tensor = images
    if any(geometry.padding):
        x = F.pad(x, [p for pad in reversed(geometry.padding) for p in (pad, pad)])
    for d, (size, step, gap) in enumerate(
        zip(geometry.size, geometry.stride, geometry.dilation, strict=True)
    ):
        x = x.unfold(3 + d, gap * (size - 1) + 1, step)[..., ::gap]
    # (N, S, C, *places, *size): places last, along which memory is read in order.
    order = [0, 2, *range(3 + axes, 3 + 2 * axes), 1, *range(3, 3 + axes)]
    n, s, c = images.shape[:3]
    return x.permute(order).reshape(n, geometry.groups, -1, s * math.prod(x.shape[3 : 3 + axes])).mT
