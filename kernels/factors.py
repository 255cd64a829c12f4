"""Per-sample gradients of one weight, kept as factors, and their inner products.

For K cotangents and N samples the gradients of a weight are K N matrices. An operation that
multiplies a weight with T tokens a sample yields each as a sum of T outer products,

    dW[k, n] = sum_t left[k, n, t] right[k, n, t]^T,

where one side, the operation's input, is the same for all cotangents. Inner products of such
matrices need not form them: with A = the still side and g = the moving one,

    <dW[k, n], dW[j, m]> = sum_ts (A_nt . A_ms) (g_knt . g_jms).

Each contraction takes the cheaper of the two ways, counted in multiplications. All are plain sums.

Suffixes name axes: K cotangents, N samples, G groups, T tokens, L and R the weight's rows and
columns, D either of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Gradients as sums of outer products.

    Args:
        left: (K or 1, N, G, T, L), or (1, N, G, T) integers that number rows of the identity.
        right: (K or 1, N, G, T, R).
        rows: L.
        moves_left: whether the left side is the one that carries the cotangents.
    """

    left: Tensor
    right: Tensor
    rows: int
    moves_left: bool = False

    @property
    def is_lookup(self) -> bool:
        """Whether the left side numbers rows of the identity."""
        return not (self.left.is_floating_point() or self.left.is_complex())

    @property
    def moving(self) -> Tensor:
        """The side that differs between cotangents."""
        return self.left if self.moves_left else self.right

    @property
    def still(self) -> Tensor:
        """The side that all cotangents share."""
        return self.right if self.moves_left else self.left

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N, G, T, L, R)."""
        _, n, g, t, r = self.right.shape
        return self.moving.shape[0], n, g, t, self.rows, r


@dataclass(frozen=True)
class Dense:
    """Gradients written out: (K, N, P)."""

    values: Tensor


Factor: TypeAlias = Outer | Dense


def dense(x: Factor) -> Tensor:
    """Gradients written out, (K, N, P), complex ones as pairs of reals."""
    if isinstance(x, Dense):
        return x.values
    k, n, g, t, rows, columns = x.shape
    if not x.is_lookup:
        return (x.left.mT @ x.right).expand(k, -1, -1, -1, -1).flatten(2)
    return _looked_up(x, x.right.new_zeros(()).expand(k, n, g * rows * columns))


def total(factors: Sequence[Factor]) -> Tensor:
    """The sum of the same weight's gradients, written out, (K, N, P)."""
    lookups = [x for x in factors if isinstance(x, Outer) and x.is_lookup]
    others = [dense(x) for x in factors if not (isinstance(x, Outer) and x.is_lookup)]
    out = sum(others[1:], others[0]) if others else dense(lookups.pop())
    for x in lookups:
        out = _looked_up(x, out)
    return out


def _looked_up(x: Outer, out: Tensor) -> Tensor:
    """`out`, (K, N, P), with the gradients of a lookup added."""
    k, n, g, _, rows, columns = x.shape
    offset = torch.arange(n * g, device=x.left.device).view(1, n, g, 1) * rows
    where = (x.left + offset).flatten()
    out = out.reshape(k, -1, columns).index_add(1, where, x.right.reshape(k, -1, columns))
    return out.view(k, n, -1)


def fold(x: Factor) -> Factor:
    """The same gradients with the K cotangents among the weight's columns, so that K = 1."""
    if isinstance(x, Dense):
        return Dense(x.values.movedim(0, 1).flatten(1).unsqueeze(0))
    moving = x.moving.movedim(0, -2).flatten(-2).unsqueeze(0)  # (1, N, G, T, K D)
    if x.moves_left:  # transpose each matrix: inner products stay as they are
        return Outer(x.right, moving, x.right.shape[-1])
    return Outer(x.left, moving, x.rows)


def sqnorms(x: Factor) -> Tensor:
    """(K, N) squared norms."""
    if isinstance(x, Outer):
        k, _, _, t, rows, columns = x.shape
        if t * (_still_width(x) + k * x.moving.shape[-1]) < k * rows * columns:
            return (_token_gram(x, x) @ x.moving).mul(x.moving).sum((2, 3, 4))
    return dense(x).square().sum(-1)


def blocks(x: Factor, y: Factor) -> Tensor:
    """(N, K, J) inner products between the cotangents of `x` and of `y`, sample by sample."""
    if isinstance(x, Outer) and isinstance(y, Outer):
        k, _, _, t, rows, columns = x.shape
        j, width = y.shape[0], x.moving.shape[-1]
        tokens = t * t * (_still_width(x) + j * width) + k * j * t * width
        if tokens < (k + j) * t * rows * columns + k * j * rows * columns:
            weighted = (_token_gram(x, y) @ y.moving).movedim(0, 1).flatten(2)
            return x.moving.movedim(0, 1).flatten(2) @ weighted.mT
    return dense(x).movedim(0, 1) @ dense(y).movedim(0, 1).mT


def gram(x: Factor, y: Factor) -> Tensor:
    """(N, K, M, J) inner products between all gradients of `x` and all of `y`."""
    if isinstance(x, Outer) and isinstance(y, Outer):
        k, n, g, t, rows, columns = x.shape
        j, m, _, s, _, _ = y.shape
        if t == 1 and s == 1:
            return _gram_of_single_tokens(x, y)
        width = x.moving.shape[-1]
        tokens = n * m * t * (s * (_still_width(x) + j * width) + k * j * width)
        if tokens < (k * n * t + j * m * s + k * n * j * m) * rows * columns:
            return _gram_by_tokens(x, y)
    a, b = dense(x).movedim(0, 1), dense(y).movedim(0, 1)
    return (a.flatten(0, 1) @ b.flatten(0, 1).mT).view(*a.shape[:2], *b.shape[:2])


def inner(x: Factor, u: Tensor) -> Tensor:
    """(K, N) inner products with one vector `u` of the weight's size."""
    if isinstance(x, Dense):
        return x.values @ u.to(x.values.dtype).flatten()
    _, n, g, t, rows, columns = x.shape
    matrix = u.to(x.right.dtype).reshape(1, g, rows, columns)
    if x.is_lookup:
        group = torch.arange(g, device=u.device).view(1, g, 1)
        image = matrix[0][group, x.left[0]].unsqueeze(0)
    else:
        image = x.left @ matrix
    return (image * x.right).sum((2, 3, 4))


def _still_width(x: Outer) -> int:
    return 1 if x.is_lookup else x.still.shape[-1]


def _token_gram(x: Outer, y: Outer) -> Tensor:
    """(1, N, G, T, T) inner products between the still sides of each sample's tokens."""
    if x.is_lookup:
        return (x.still.unsqueeze(-1) == y.still.unsqueeze(-2)).to(x.moving.dtype)
    return x.still @ y.still.mT


def _gram_of_single_tokens(x: Outer, y: Outer) -> Tensor:
    if x.is_lookup:
        still = (x.still[0] == y.still[0].squeeze(-1).T.unsqueeze(0)).movedim(1, 0)  # (G, N, M)
    else:
        still = x.still[0, :, :, 0].movedim(1, 0) @ y.still[0, :, :, 0].permute(1, 2, 0)
    a = x.moving[..., 0, :].permute(2, 1, 0, 3)  # (G, N, K, D)
    b = y.moving[..., 0, :].permute(2, 1, 0, 3)
    moving = a.flatten(1, 2) @ b.flatten(1, 2).mT
    moving = moving.view(*a.shape[:3], *b.shape[1:3])
    return (moving * still[:, :, None, :, None]).sum(0)


def _gram_by_tokens(x: Outer, y: Outer) -> Tensor:
    k, n, g, t, _, _ = x.shape
    j, m, _, s, _, _ = y.shape
    columns = y.moving.permute(1, 2, 3, 0, 4).flatten(3)  # (M, G, S, J D)
    out = x.moving.new_empty((n, k, m, j))
    for i in range(n):
        a = x.still[0, i]  # (G, T, ...)
        if x.is_lookup:
            tokens = (a[None, :, :, None] == y.still[0][:, :, None, :]).to(columns.dtype)
        else:
            tokens = a @ y.still[0].mT  # (M, G, T, S)
        weighted = (tokens @ columns).unflatten(3, (j, -1)).movedim(3, 1)  # (M, J, G, T, D)
        out[i] = (weighted.flatten(2) @ x.moving[:, i].flatten(1).T).permute(2, 0, 1)
    return out
