"""The side of per-sample gradients that all cotangents share: what an operation was applied to.

Of a convolution, it is what a filter meets at each place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

#: How many numbers a temporary result may hold.
TILE = 2**19


class Still:
    """The side of the outer products that all cotangents share.

    Args:
        tokens: (N, G, T, D); or (N, G, T) integers that number rows of the D x D identity.
        width: D.
        ones: whether a further column of ones belongs to it, so that the gradient of a bias, which
            is added to every token, is a further column of the weight's.
        dtype: that of inner products, where integers do not tell.
    """

    #: How many numbers it is efficient to write out together.
    at_once = 2 * TILE

    def __init__(
        self, tokens: Tensor, width: int, ones: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self._tokens = tokens
        self.samples, self.groups, self.length = tokens.shape[:3]
        self.width = width
        self.ones = ones
        self.is_lookup = not (tokens.is_floating_point() or tokens.is_complex())
        self.dtype = dtype or tokens.dtype

    def tokens(self, ns: slice = slice(None)) -> Tensor:
        """(N, G, T, D), or (N, G, T) integers, for some samples, without the column of ones."""
        return self._tokens[ns]

    def with_ones(self) -> Still:
        """The same with a column of ones."""
        return Still(self._tokens, self.width, True, self.dtype)

    def to(self, dtype: torch.dtype) -> Still:
        """The same in another precision."""
        if self.dtype == dtype:
            return self
        tokens = self._tokens if self.is_lookup else self._tokens.to(dtype)
        return Still(tokens, self.width, self.ones, dtype)

    @cached_property
    def gram(self) -> Tensor:
        """(N, G, T, T) inner products between each sample's tokens."""
        if self.length == 1 and not self.is_lookup:  # many small products would take longer
            norms: Tensor = torch.linalg.vector_norm(self.tokens(), dim=-1, keepdim=True)
            return norms.square() + self.ones
        each = self.groups * self.length * (self.length + self.width)
        return torch.cat([products(self, ns, self, ns) for ns in tiles(self.samples, each)])

    @property
    def gram_cost(self) -> int:
        """How many multiplications an entry of `gram` still takes."""
        return 0 if "gram" in self.__dict__ else 1 if self.is_lookup else self.width

    def outer(self, moving: Tensor, ns: slice, out: Tensor | None = None) -> Tensor:
        """(N, G, M, D) the sum over tokens of moving (N, G, T, M) times still, without ones."""
        tokens = self.tokens(ns)
        if not self.is_lookup:
            return torch.matmul(moving.mT, tokens, out=out)
        n, g, _, m = moving.shape
        found = moving.new_zeros((n, g, self.width, m))
        self._add_rows(found, moving, tokens)
        return found.mT if out is None else out.copy_(found.mT)

    def _add_rows(self, out: Tensor, moving: Tensor, tokens: Tensor) -> None:
        """Adds moving (N, G, T, M) to the rows of out (N, G, D, M) that lookups number."""
        n, g, _, m = moving.shape
        first = torch.arange(n * g, device=tokens.device).view(n, g, 1) * self.width
        out.view(-1, m).index_add_(0, (tokens + first).flatten(), moving.reshape(-1, m))

    def add_lookups_(self, out: Tensor, moving: Tensor) -> None:
        """Adds gradients of lookups, for moving (K, N, G, T, M), to those written out (K, N, P)."""
        for found, each in zip(out, moving, strict=True):
            shape = (*each.shape[:2], self.width, each.shape[-1])
            self._add_rows(found.view(shape), each, self.tokens())


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


def products(x: Still, ns: slice, y: Still, ms: slice) -> Tensor:
    """(N, G, T, S) inner products between tokens of `x` and of `y`, sample by sample.

    One of the ranges may hold a single sample, which meets all of the other.
    """
    a, b = x.tokens(ns), y.tokens(ms)
    if x.is_lookup and y.is_lookup:
        found = (a.unsqueeze(-1) == b.unsqueeze(-2)).to(x.dtype)
    elif x.is_lookup:
        found = _picked(b, a).mT
    elif y.is_lookup:
        found = _picked(a, b)
    else:
        found = a @ b.mT
    return found + 1 if x.ones else found


def _picked(values: Tensor, numbers: Tensor) -> Tensor:
    """(N, G, S, T) the columns of values (N, G, S, D) that numbers (N, G, T) name."""
    shape = torch.broadcast_shapes(values.shape[:2], numbers.shape[:2])
    values = values.expand(*shape, -1, -1)
    numbers = numbers.expand(*shape, -1).unsqueeze(-2)
    return values.gather(-1, numbers.expand(-1, -1, values.shape[-2], -1))


def tiles(count: int, each: int, limit: int = TILE) -> Iterator[slice]:
    """Ranges of `count` things of `each` numbers of which at most `limit` are held."""
    step = max(1, limit // max(1, each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
