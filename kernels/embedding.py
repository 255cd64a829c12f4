"""Inner products of gradients of embeddings between samples, without the gradients.

The gradient of sample n has, in the row of each id, the sum of the gradients g of the tokens that
it looked up, so that products of tokens with one id are what two samples have in common.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.kernels.factors import Outer, gram_, mirror_, sqnorms
from nettrace.kernels.launch import check_device, check_real, is_compiled, known, operation, summing
from nettrace.kernels.still import Still

#: How many numbers temporary results of torch hold.
_LIMIT = 2**24


@operation("embedding_sqnorm")
def embedding_sqnorm(ids: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    """Squared norms of samples' gradients, sum_ts [ids_nt = ids_ns] g_nt . g_ns.

    Args:
        ids: (N, T) integers, which rows were looked up. Of an id that is not trained, such as that
            of padding, `g` has to be zero.
        g: (N, T, D) the gradient by what was returned, of any floating type and strides.
        precision: of products of float32: "tf32", "tf32x3" or "ieee".

    Returns:
        (N,) in float32 at least.

    Raises:
        ValueError: if shapes or types do not fit, or there is no such precision.
    """
    how = known(precision)
    _check(ids, g)
    if not g.numel():
        return g.new_zeros(len(g), dtype=summing(g))
    if is_compiled(ids, g):
        from nettrace.kernels.jit.embedding import launch

        return launch(ids, g, how, norms=True)
    return sqnorms(_factor(ids, g))[0]


@operation("embedding_gram")
def embedding_gram(ids: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    """Inner products of samples' gradients, sum_ts [ids_nt = ids_ms] g_nt . g_ms.

    Args:
        ids: (N, T) as in `embedding_sqnorm`.
        g: (N, T, D)
        precision: of products of float32: "tf32", "tf32x3" or "ieee".

    Returns:
        (N, N) in float32 at least; symmetric to the last bit, positive semidefinite up to rounding.

    Raises:
        ValueError: if shapes or types do not fit, or there is no such precision.
    """
    how = known(precision)
    _check(ids, g)
    if not g.numel():
        return g.new_zeros((len(g), len(g)), dtype=summing(g))
    if is_compiled(ids, g):
        from nettrace.kernels.jit.embedding import launch

        return launch(ids, g, how, norms=False)
    x = _factor(ids, g)
    found = g.new_zeros((len(g), len(g)), dtype=summing(g))
    gram_(found[:, None, :, None], x, x, _LIMIT)
    mirror_(found)
    return found


@embedding_sqnorm.register_fake
def _(ids: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    known(precision)
    _check(ids, g)
    return g.new_empty(g.shape[0], dtype=summing(g))


@embedding_gram.register_fake
def _(ids: Tensor, g: Tensor, precision: str = "tf32x3") -> Tensor:
    known(precision)
    _check(ids, g)
    return g.new_empty((g.shape[0], g.shape[0]), dtype=summing(g))


def _factor(ids: Tensor, g: Tensor) -> Outer:
    # Numbered by what there is: a row that nobody looked up takes no memory.
    met, numbers = ids.unique(return_inverse=True)
    still = Still(numbers.unsqueeze(1), len(met), dtype=summing(g))
    return Outer(still, g.to(summing(g))[None, :, None])


def _check(ids: Tensor, g: Tensor) -> None:
    if ids.dim() != 2 or g.dim() != 3 or g.shape[:2] != ids.shape:
        raise ValueError(
            f"expected ids of shape (N, T) and g of shape (N, T, D), "
            f"got {tuple(ids.shape)} and {tuple(g.shape)}"
        )
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"expected ids of an integer type, got {ids.dtype}")
    check_real(g=g)
    check_device(ids=ids, g=g)
