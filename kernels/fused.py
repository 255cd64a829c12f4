"""Contractions of factors by compiled kernels: gradients and tokens' products are never written.

`nettrace.kernels.factors` and `columns` take these where kernels compile. Each cotangent is done by
itself, and what a column of ones adds is not in them. Axes are named as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nettrace.kernels.conv_psg import conv_psg
from nettrace.kernels.embedding import embedding_gram, embedding_sqnorm
from nettrace.kernels.factors import Outer
from nettrace.kernels.ghost import ghost_gram, ghost_sqnorm
from nettrace.kernels.psg import psg_moments
from nettrace.kernels.still import Patches, Still, tiles

#: How many numbers of patches are made at a time.
_MADE = 2**26


def sqnorms(x: Outer, by_tokens: bool) -> Tensor:
    """(K, N) squared norms, by inner products of tokens or by blocks of gradients.

    Lookups are met by tokens alone.
    """
    return torch.stack([_sqnorms(x.still, moving, by_tokens) for moving in x.moving])


def squares(x: Outer) -> Tensor:
    """(G, M, D) squares of the gradients' entries, summed over cotangents and samples."""
    return torch.stack([_squares(x.still, moving) for moving in x.moving]).sum(0)


def gram_(out: Tensor, x: Outer, y: Outer, limit: int) -> None:
    """Adds inner products between the gradients of one cotangent of `x` and of `y` to out (N, M).

    Where `x is y`, entries with n > m may be left out. Patches are made of at most `limit` numbers.
    """
    if x.still.is_lookup:
        for ids, g in zip(x.still.tokens().unbind(1), x.moving[0].unbind(1), strict=True):
            out += embedding_gram(ids, g)
        return
    each = max(_made(x.still), _made(y.still))
    for ms in tiles(out.shape[1], each, limit):
        theirs = y.still.tokens(ms), y.moving[0, ms]
        for ns in tiles(ms.stop if x is y else len(out), each, limit):
            same = x is y and ns == ms
            mine = theirs if same else (x.still.tokens(ns), x.moving[0, ns])
            for group in range(x.still.groups):
                others = () if same else (side[:, group] for side in theirs)
                out[ns, ms] += ghost_gram(*(side[:, group] for side in mine), *others)


def _sqnorms(still: Still, moving: Tensor, by_tokens: bool) -> Tensor:
    """(N,) of moving (N, G, T, M)."""
    if not by_tokens and (given := _images(still, moving)):
        alone: Tensor = conv_psg(*given, dw=False)[0]
        return alone
    found = moving.new_empty(moving.shape[:2])
    for ns in tiles(len(moving), _made(still), _MADE):
        tokens, g = still.tokens(ns).flatten(0, 1), moving[ns].flatten(0, 1)
        if still.is_lookup:
            norms = embedding_sqnorm(tokens, g)
        else:
            norms = ghost_sqnorm(tokens, g) if by_tokens else psg_moments(tokens, g, dw=False)[0]
        found[ns] = norms.view(-1, still.groups)
    return found.sum(1)


def _squares(still: Still, moving: Tensor) -> Tensor:
    """(G, M, D) of moving (N, G, T, M)."""
    _, groups, _, m = moving.shape
    if given := _images(still, moving):
        alone: Tensor = conv_psg(*given, dw=False, sq=True)[2]
        return alone.view(groups, m, -1)
    found = moving.new_zeros((groups, m, still.width))
    for ns in tiles(len(moving), _made(still), _MADE):
        tokens = still.tokens(ns)
        for group in range(groups):
            sides = moving[ns, group], tokens[:, group]
            found[group] += psg_moments(*sides, dw=False, sq=True)[2]
    return found


def _made(still: Still) -> int:
    """How many numbers are made of each sample's tokens."""
    patches = isinstance(still, Patches)
    return still.groups * still.length * still.width if patches else 0


def _images(still: Still, moving: Tensor) -> tuple[Any, ...] | None:
    """What `conv_psg` takes, if it is a convolution of one two-dimensional image a sample."""
    if not isinstance(still, Patches) or still.images.shape[1] > 1 or still.images.dim() != 5:
        return None
    images, geometry = still.images[:, 0], still.geometry
    gy = moving.mT.flatten(1, 2).unflatten(2, geometry.places(images.shape[2:]))
    return (
        *(images, gy, geometry.size, geometry.stride, geometry.padding, geometry.dilation),
        geometry.groups,
    )
