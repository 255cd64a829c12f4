"""Sums of squares along columns: of each entry of the weight, over samples and cotangents.

A gradient of one token is an outer product, and so are the squares of its entries,

    sum_kn dW[k, n]^2 = sum_n (sum_k moving[k, n]^2) (still[n]^2)^T.

A sum over several tokens has to be written out before it is squared. Axes are named as in
`nettrace.kernels.factors`.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.kernels.factors import Dense, Factor, Outer, Sum, total
from nettrace.kernels.launch import is_compiled
from nettrace.kernels.still import tiles


def column_sqnorms(x: Factor) -> Tensor:
    """(P,) squares of gradients, summed over cotangents and samples, laid out as the weight is."""
    if isinstance(x, Dense):
        return x.values.square().sum((0, 1))
    if isinstance(x, Sum):
        found = x.terms[0].moving.new_zeros(())
        for k in range(len(x.terms[0].moving)):
            terms = [Outer(t.still, t.moving[k : k + 1], t.moves_left) for t in x.terms]
            found = found + total(terms).square().sum((0, 1))
        return found
    assert not x.still.ones, "a bias has no place in the weight's layout"
    _, n, g, t, d, m = x.shape
    if t == 1:
        squares = x.moving[..., 0, :].square().sum(0).transpose(0, 1)  # (G, N, M)
        tokens = x.still.tokens()[:, :, 0].transpose(0, 1)  # (G, N, D), or (G, N) numbers
        if x.still.is_lookup:
            found = squares.new_zeros((g, d, m))
            found.scatter_add_(1, tokens.long().unsqueeze(-1).expand(-1, -1, m), squares)
            found = found.mT
        else:
            found = squares.mT @ tokens.square()
    elif is_compiled(x.moving) and not x.still.is_lookup:
        from nettrace.kernels import fused

        found = fused.squares(x)
    else:
        found = x.moving.new_zeros((g, m, d))
        for moving in x.moving:
            for ns in tiles(n, g * m * d):
                found += x.still.outer(moving[ns], ns).square_().sum(0)
    return (found if x.moves_left else found.mT).flatten()
