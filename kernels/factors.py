"""Per-sample gradients of one weight, kept as factors, and their inner products.

For K cotangents and N samples the gradients of a weight are K N matrices. An operation that
multiplies a weight with T tokens a sample yields each as a sum of T outer products,

    dW[k, n] = sum_t moving[k, n, t] still[n, t]^T,

where one side, the operation's input, stands still: it is the same for all cotangents. Inner
products of such matrices need not form them:

    <dW[k, n], dW[j, m]> = sum_ts (still_nt . still_ms) (moving_knt . moving_jms).

Each contraction takes the cheaper of the two ways, by counts of multiplications and of numbers
written to memory; norms and Gram matrices on CUDA, by `nettrace.kernels.plan`, and by the kernels
of `nettrace.kernels.fused` where they compile. Temporary results are made in pieces that a core's
cache holds, whatever the sizes. All are plain sums.

Suffixes name axes: K cotangents, N samples, G groups, T tokens, D and M the columns of the still
and the moving side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nettrace.kernels.launch import is_compiled
from nettrace.kernels.plan import device_costs
from nettrace.kernels.still import TILE, Still, products, tiles

#: What writing a number to memory and reading it again costs, in multiplications.
_WRITE = 16
#: How many products are added up in the precision of the gradients.
_ADDED = 2**14


@dataclass(frozen=True)
class Outer:
    """Gradients as sums of outer products.

    Args:
        still: the side that is the same for all cotangents.
        moving: (K, N, G, T, M) the side that carries them.
        moves_left: whether the weight is laid out as (M, D) rather than (D, M).
    """

    still: Still
    moving: Tensor
    moves_left: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N, G, T, D, M)."""
        k, n, g, t, m = self.moving.shape
        return k, n, g, t, self.still.width, m


@dataclass(frozen=True)
class Dense:
    """Gradients written out: (K, N, P)."""

    values: Tensor


@dataclass(frozen=True)
class Sum:
    """Gradients of a weight that several operations use in different forms."""

    terms: tuple[Outer, ...]


Factor: TypeAlias = Outer | Dense | Sum


def dense(x: Factor) -> Tensor:
    """Gradients written out, (K, N, P), laid out as the weight is."""
    if isinstance(x, Dense):
        return x.values
    if isinstance(x, Sum):
        return total(x.terms)
    assert not x.still.ones, "a bias has no place in the weight's layout"
    written = torch.stack([x.still.outer(moving, slice(None)) for moving in x.moving])
    return (written if x.moves_left else written.mT).flatten(2)


def total(factors: Sequence[Factor]) -> Tensor:
    """The sum of gradients of one weight, written out, (K, N, P)."""
    # Those of lookups are mostly zero: they are added to the others, not written out themselves.
    lookups = [
        x for x in factors if isinstance(x, Outer) and x.still.is_lookup and not x.moves_left
    ]
    others = [x for x in factors if not any(x is lookup for lookup in lookups)] or [lookups.pop()]
    found = dense(others[0])
    found = found + dense(others[1]) if len(others) > 1 else found.clone()
    for x in others[2:]:
        found += dense(x)
    for x in lookups:
        x.still.add_lookups_(found, x.moving)
    return found


def _folded(x: Factor) -> Outer | Dense:
    """The same gradients with the K cotangents among the weight's columns, so that K = 1."""
    if not isinstance(x, Outer):
        return Dense(dense(x).movedim(0, 1).flatten(1).unsqueeze(0))
    moving = x.moving.movedim(0, -2).flatten(-2).unsqueeze(0) if len(x.moving) > 1 else x.moving
    return Outer(x.still, moving, x.moves_left)


def traced_gram_(out: Tensor, x: Factor, y: Factor, limit: int) -> None:
    """Adds the inner products at equal cotangents, summed over these, to `out`, (N, M).

    Where `x is y`, entries with n > m may be left out; `mirror_` fills them in. Temporary results
    hold `limit` numbers, or fewer.
    """
    if isinstance(x, Sum) and isinstance(y, Sum):  # whose terms carry cotangents on either side
        for a, b in zip(_each(x), _each(y), strict=True):
            gram_(out[:, None, :, None], a, a if x is y else b, limit)
    else:
        folded = _folded(x)
        gram_(out[:, None, :, None], folded, folded if x is y else _folded(y), limit)


def _each(x: Sum) -> list[Sum]:
    """The gradients for each cotangent alone."""
    return [
        Sum(tuple(Outer(t.still, t.moving[k : k + 1], t.moves_left) for t in x.terms))
        for k in range(len(x.terms[0].moving))
    ]


def sqnorms(x: Factor) -> Tensor:
    """(K, N) squared norms."""
    if isinstance(x, Sum):
        if not _pays(x, x, pairs=1):
            return sqnorms(Dense(dense(x)))
        found = torch.stack([sqnorms(term) for term in x.terms]).sum(0)
        for i, one in enumerate(x.terms):
            for other in x.terms[:i]:
                found += 2 * blocks(one, other).diagonal(dim1=1, dim2=2).T
        return found
    if isinstance(x, Dense):
        return _sqnorm(x.values)
    k, n, g, t, d, m = x.shape
    if t == 1:
        still = x.still.gram[:, :, 0, 0]
        return (_sqnorm(x.moving[..., 0, :]) * still).sum(-1)
    found = x.moving.new_empty((k, n))
    token: float = t * t * (x.still.gram_cost + k * m + k * _WRITE)
    written: float = k * (t + _WRITE) * d * m
    if x.moving.is_cuda:
        token, written = device_costs("sqnorm", x, n)
    by_tokens = token < written
    if is_compiled(x.moving) and (by_tokens or not x.still.is_lookup):
        from nettrace.kernels import fused

        found = fused.sqnorms(x, by_tokens)
    elif by_tokens:
        gram = x.still.gram
        for ns in tiles(n, g * t * t):
            for i in range(k):
                moving = x.moving[i, ns]
                found[i, ns] = (moving @ moving.mT).mul_(gram[ns]).sum((1, 2, 3))
        return found
    else:
        folded = x.moving.movedim(0, -2).flatten(-2)
        for ns in tiles(n, k * g * d * m):
            gradients = x.still.outer(folded[ns], ns).unflatten(2, (k, m))
            found[:, ns] = _sqnorm(gradients.flatten(3)).sum(1).T
    return found + sqnorms(_bias(x)) if x.still.ones else found


def blocks(x: Factor, y: Factor) -> Tensor:
    """(N, K, J) inner products between the cotangents of `x` and of `y`, sample by sample."""
    if isinstance(x, Sum) and isinstance(y, Sum) and _pays(x, y, pairs=1):
        return torch.stack([blocks(one, other) for one in x.terms for other in y.terms]).sum(0)
    if isinstance(x, Outer) and isinstance(y, Outer):
        k, n, g, t, d, m = x.shape
        j, s = y.shape[0], y.shape[3]
        found = x.moving.new_zeros((n, k, j))
        if x.moves_left != y.moves_left:  # they stand still on different sides
            for i in range(n):
                found[i] = _products_across(x, i, y, slice(i, i + 1)).view(k, j)
            return found
        still = x.still.gram if x.still is y.still else None
        if t == 1 == s:
            still = products(x.still, slice(None), y.still, slice(None)) if still is None else still
            a, b = (z.moving[..., 0, :].permute(1, 2, 0, 3) for z in (x, y))
            return ((a @ b.mT) * still).sum(1)
        token = t * s * (x.still.gram_cost + min(k, j) * m) + k * j * min(t, s) * m
        if token < (k * t + j * s) * d * m + (k * j + (k + j) * _WRITE) * d * m:
            for ns in tiles(n, g * t * (s + j * m)):
                tokens = products(x.still, ns, y.still, ns) if still is None else still[ns]
                a = x.moving[:, ns].movedim(0, 1).flatten(2)
                for i in range(j):
                    weighted = (tokens @ y.moving[i, ns]).flatten(1)
                    found[ns, :, i] = (a @ weighted.unsqueeze(-1)).squeeze(-1)
            return found
        for ns in tiles(n, g * (k + j) * d * m):
            a = torch.stack([x.still.outer(moving, ns) for moving in x.moving[:, ns]], 1).flatten(2)
            b = a
            if y is not x:
                b = torch.stack([y.still.outer(moving, ns) for moving in y.moving[:, ns]], 1)
            found[ns] = a @ b.flatten(2).mT
        return found + blocks(_bias(x), _bias(y)) if x.still.ones else found
    return dense(x).movedim(0, 1) @ dense(y).movedim(0, 1).mT


def gram_(out: Tensor, x: Factor, y: Factor, limit: int) -> None:
    """Adds the inner products between all gradients of `x` and all of `y` to `out`, (N, K, M, J).

    Where `x is y`, entries with a sample n > m may be left out; `mirror_` fills them in. Temporary
    results hold `limit` numbers, or fewer.
    """
    if isinstance(x, Sum) and isinstance(y, Sum) and _pays(x, y, pairs=len(out)):
        for one in x.terms:
            for other in y.terms:
                gram_(out, one, other, limit)
    elif isinstance(x, Outer) and isinstance(y, Outer):
        k, n, g, t, d, m = x.shape
        j, o, _, s, _, _ = y.shape
        if x.moves_left != y.moves_left:  # they stand still on different sides
            for i in range(n):
                out[i] += _products_across(x, i, y, slice(None))
            return
        if t == 1 == s:
            return _gram_of_single_tokens_(out, x, y)
        token, written = _gram_costs(x, y, n, o)
        if token < written and not _is_fused(x, y):
            return _gram_by_tokens_(out, x, y, limit)
        if token < written:
            from nettrace.kernels import fused

            fused.gram_(out[:, 0, :, 0], x, y, limit)
        else:
            each = max(k * n, j * o) * g * d
            mine, others = _written(x, each, limit), None if x is y else _written(y, each, limit)
            _gram_written_out_(out, mine, others)
        if x.still.ones:
            bias = _bias(x)
            gram_(out, bias, bias if x is y else _bias(y), limit)
    else:
        a = dense(x)
        _gram_written_out_(out, iter([a]), None if x is y else iter([dense(y)]))


def _gram_costs(x: Outer, y: Outer, n: int, o: int) -> tuple[float, float]:
    """By tokens and written out, what n samples of `x` with o of `y` cost, over groups."""
    k, _, _, t, d, m = x.shape
    j, _, _, s, _, _ = y.shape
    if x.moving.is_cuda and t * s > 1:
        return device_costs("gram", x, n, None if x is y else y, o)
    half = 2 if x is y else 1
    token = n * o * t * (s * (min(d, x.still.gram_cost or d) + j * m) + k * j * m) / half
    written = (k * n * (t + _WRITE) + (half == 1) * j * o * (s + _WRITE)) * d * m
    return token, written + k * n * j * o * d * m / half


def _is_fused(x: Outer, y: Outer) -> bool:
    """Whether compiled kernels make inner products by tokens: of one cotangent each."""
    lookup = x.still.is_lookup or y.still.is_lookup
    alone = len(x.moving) == 1 == len(y.moving) and not (lookup and x is not y)
    return alone and is_compiled(x.moving, y.moving)


def mirror_(matrix: Tensor) -> None:
    """Copies the entries above the diagonal of a square matrix to below it."""
    step = 256  # rows: so that what is read across fits a cache
    for start in range(0, len(matrix), step):
        stop = start + step
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def inner(x: Factor, u: Tensor) -> Tensor:
    """(K, N) inner products with one vector `u` of the weight's size."""
    if isinstance(x, Sum):
        return torch.stack([inner(term, u) for term in x.terms]).sum(0)
    if isinstance(x, Dense):
        return x.values @ u.to(x.values.dtype).flatten()
    k, n, g, t, d, m = x.shape
    matrix = u.to(x.moving.dtype).reshape((g, m, d) if x.moves_left else (g, d, m))
    matrix = matrix.mT if x.moves_left else matrix  # (G, D, M)
    found = x.moving.new_empty((k, n))
    for ns in tiles(n, g * t * (d + m)):
        tokens = x.still.tokens(ns)
        if x.still.is_lookup:
            image = matrix[torch.arange(g, device=u.device).view(1, g, 1), tokens]
        else:
            image = tokens @ matrix
        for i in range(k):
            found[i, ns] = (image * x.moving[i, ns]).sum((1, 2, 3))
    return found


def _products_across(x: Outer, i: int, y: Outer, ms: slice) -> Tensor:
    """(K, M, J) inner products of sample `i` of `x` with `y`, which moves on the other side."""
    assert not x.still.ones, "a bias has no other side"
    found = []
    own = Still(x.moving[:, i], 0)  # (K, G, T, .)
    for c in range(*ms.indices(y.moving.shape[1])):
        mine = products(own, slice(None), y.still, slice(c, c + 1))  # (K, G, T, S)
        theirs = products(x.still, slice(i, i + 1), Still(y.moving[:, c], 0), slice(None))
        found.append(mine.flatten(1) @ theirs.flatten(1).T)  # (K, J)
    return torch.stack(found, 1)


def _pays(x: Sum, y: Sum, pairs: int) -> bool:
    """Whether inner products of sums are cheaper term by term than written out."""
    tokens = sum(term.shape[3] for term in x.terms)
    others = sum(term.shape[3] for term in y.terms)
    k, _, _, _, d, m = x.terms[0].shape
    j = y.terms[0].shape[0]
    by_terms = pairs * tokens * others * (k * m + j * d)
    return by_terms < (k * tokens + j * others + k * j * pairs + (k + j) * _WRITE) * d * m


def _bias(x: Outer) -> Dense:
    """The gradients of the bias that the column of ones stands for."""
    return Dense(x.moving.sum(3).flatten(2))


def _sqnorm(values: Tensor) -> Tensor:
    """The squared norms along the last axis, read once."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.square()


def _written(x: Outer, each: int, limit: int) -> Iterator[Tensor]:
    """The gradients (K, N, P) without ones, as many columns at a time as of `each` fit a tile.

    They lie in the same memory each time: new memory is slow to touch.
    """
    k, n, g, _, d, m = x.shape
    memory: Tensor | None = None
    for ms in tiles(m, each, min(limit, x.still.at_once)):
        shape = (k, n, g, ms.stop - ms.start, d)
        if memory is None:
            memory = x.moving.new_empty(shape)
        found = memory.flatten()[: math.prod(shape)].view(shape)
        for moving, out in zip(x.moving, found, strict=True):
            x.still.outer(moving[..., ms], slice(None), out)
        yield found.flatten(2)


def _gram_written_out_(out: Tensor, x: Iterator[Tensor], y: Iterator[Tensor] | None) -> None:
    n, k, o, j = out.shape
    # In float64, of products over few columns: a long sum of squares in one float32 drifts.
    found = out.new_zeros((k * n, j * o), dtype=torch.float64)
    for a in x:
        rows = a.flatten(0, 1)
        columns = rows if y is None else next(y).flatten(0, 1)
        step = max(32, -(-len(rows) // 4)) if y is None else len(rows)
        for left, right in zip(rows.split(_ADDED, 1), columns.split(_ADDED, 1), strict=True):
            for start in range(0, len(rows), step):
                stop = start + step
                first = start if y is None else 0
                found[start:stop, first:] += left[start:stop] @ right[first:].T
    if y is None:
        found = found.triu() + found.triu(1).T
    out += found.view(k, n, j, o).permute(1, 0, 3, 2).to(out.dtype)


def _gram_of_single_tokens_(out: Tensor, x: Outer, y: Outer) -> None:
    n, k, o, j = out.shape
    for g in range(x.moving.shape[2]):
        a = x.moving[:, :, g, 0].movedim(0, 1)  # (N, K, M)
        b = a if x is y else y.moving[:, :, g, 0].movedim(0, 1)
        a = a.flatten(0, 1)
        b = a if x is y else b.flatten(0, 1)
        still = _products_of_single_tokens(x.still, y.still, g).repeat_interleave(j, 1)
        step = max(1, 2 * TILE // (k * o * j))
        for start in range(0, n, step):
            stop, first = start + step, start if x is y else 0
            found = a[start * k : stop * k] @ b[first * j :].T
            found.view(-1, k, found.shape[1]).mul_(still[start:stop, None, first * j :])
            out[start:stop, :, first:] += found.view(-1, k, o - first, j)


def _products_of_single_tokens(x: Still, y: Still, group: int) -> Tensor:
    """(N, M) inner products between all samples' only tokens."""
    a = Still(x.tokens()[:, group, 0][None, None], x.width, x.ones)
    b = Still(y.tokens()[:, group, 0][None, None], y.width, y.ones)
    return products(a, slice(None), b, slice(None))[0, 0]


def _gram_by_tokens_(out: Tensor, x: Outer, y: Outer, limit: int) -> None:
    k, n, g, t, d, _ = x.shape
    j, o, _, s, _, m = y.shape
    for held in tiles(o, g * s * (d + j * m), min(limit, 16 * TILE)):
        tokens = y.still.tokens(held)  # which may have to be made
        theirs = Still(tokens, y.still.width, y.still.ones, y.still.dtype)
        columns = y.moving[:, held].permute(1, 2, 3, 0, 4).flatten(3)  # (M, G, S, J M)
        for i in range(held.stop if x is y else n):
            mine = x.moving[:, i].flatten(1).T
            first = max(0, i - held.start) if x is y else 0
            for tile in tiles(len(tokens) - first, g * t * (s + j * m), min(limit, 4 * TILE)):
                ms = slice(first + tile.start, first + tile.stop)
                met = products(x.still, slice(i, i + 1), theirs, ms)  # (M, G, T, S)
                weighted = (met @ columns[ms]).unflatten(3, (j, -1)).movedim(3, 1).flatten(2)
                into = slice(held.start + ms.start, held.start + ms.stop)
                out[i, :, into] += (weighted @ mine).movedim(-1, 0)
