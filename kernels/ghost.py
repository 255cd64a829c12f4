"""Inner products of gradients of linear maps between samples, without the gradients.

The gradient of sample n is sum_t a_nt g_nt^T, with T inputs a and as many gradients g by outputs,
so that (Goodfellow, 2015, arXiv 1510.01799, for T = 1; Li et al., 2022, arXiv 2110.05679)

    <P_n, Q_m> = sum_ts (a_nt . b_ms) (g_nt . h_ms).

By multiplications it pays up to T of about IO / (I + O) tokens for norms, and up to the root of
that for all pairs of many samples; beyond, gradients are better written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.kernels.factors import Outer, gram_, mirror_, sqnorms
from nettrace.kernels.launch import check_device, check_real, is_compiled, known, operation, summing
from nettrace.kernels.still import Still

#: How many numbers temporary results of torch hold.
_LIMIT = 2**24


@operation("ghost_sqnorm")
def ghost_sqnorm(a: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    """Squared norms of samples' gradients, sum_ts (a_nt . a_ns) (g_nt . g_ns).

    Args:
        a: (N, T, I) what a linear map is applied to, of any floating types and strides.
        g: (N, T, O) the gradient by what it returns.
        precision: of products of float32: "tf32", "tf32x3" or "ieee".

    Returns:
        (N,) in float32 at least, added up in that. The sum may cancel, as that of any products.

    Raises:
        ValueError: if shapes or types do not fit, or there is no such precision.
    """
    how = known(precision)
    _check("a", a, "g", g)
    if not (a.numel() and g.numel()):
        return a.new_zeros(len(a), dtype=summing(a, g))
    if is_compiled(a, g):
        from nettrace.kernels.jit.ghost import launch_sqnorm

        return launch_sqnorm(a, g, how)
    return sqnorms(_factor(a, g, summing(a, g)))[0]


@operation("ghost_gram")
def ghost_gram(
    a: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    h: Tensor | None = None,
    precision: str = "tf32x3",
) -> Tensor:
    """Inner products of samples' gradients, sum_ts (a_nt . b_ms) (g_nt . h_ms).

    Args:
        a: (N, T, I) what a linear map is applied to, of any floating types and strides.
        g: (N, T, O) the gradient by what it returns.
        b: (M, S, I) the same of other samples; without, samples meet each other.
        h: (M, S, O)
        precision: of products of float32: "tf32", "tf32x3" or "ieee".

    Returns:
        (N, M) in float32 at least, added up in that; without `b` and `h` symmetric to the last bit,
        and positive semidefinite up to rounding.

    Raises:
        ValueError: if shapes or types do not fit, there is no such precision, or one of b and h is
            missing.
    """
    how = known(precision)
    _check_pair(a, g, b, h)
    others = [x for x in (b, h) if x is not None]
    given = [a, g, *others]
    wide = summing(*given)
    if not all(x.numel() for x in given):
        return a.new_zeros((len(a), len(a if b is None else b)), dtype=wide)
    if is_compiled(*given):
        from nettrace.kernels.jit.ghost import launch_gram

        return launch_gram(a, g, b, h, how)
    x = _factor(a, g, wide)
    y = x if b is None or h is None else _factor(b, h, wide)
    found = a.new_zeros((len(a), y.shape[1]), dtype=wide)
    gram_(found[:, None, :, None], x, y, _LIMIT)
    if y is x:
        mirror_(found)
    return found


@ghost_sqnorm.register_fake
def _(a: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    known(precision)
    _check("a", a, "g", g)
    return a.new_empty(a.shape[0], dtype=summing(a, g))


@ghost_gram.register_fake
def _(
    a: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    h: Tensor | None = None,
    precision: str = "tf32x3",
) -> Tensor:
    known(precision)
    _check_pair(a, g, b, h)
    others = [x for x in (b, h) if x is not None]
    columns = (a if b is None else b).shape[0]
    return a.new_empty((a.shape[0], columns), dtype=summing(a, g, *others))


def _factor(a: Tensor, g: Tensor, dtype: torch.dtype) -> Outer:
    return Outer(Still(a.to(dtype).unsqueeze(1), a.shape[2]), g.to(dtype)[None, :, None])


def _check(one: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dim() != 3 or y.dim() != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"expected {one} of shape (N, T, I) and {other} of shape (N, T, O), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    check_real(**{one: x, other: y})


def _check_pair(a: Tensor, g: Tensor, b: Tensor | None, h: Tensor | None) -> None:
    _check("a", a, "g", g)
    if (b is None) != (h is None):
        raise ValueError("expected both of b and h, or neither")
    if b is not None and h is not None:
        _check("b", b, "h", h)
        check_device(a=a, b=b)
        if b.shape[2] != a.shape[2] or h.shape[2] != g.shape[2]:
            raise ValueError(
                f"expected b and h as wide as a and g, ({a.shape[2]}, {g.shape[2]}), "
                f"got ({b.shape[2]}, {h.shape[2]})"
            )
