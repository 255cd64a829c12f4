"""Contractions of factored gradients against the same on gradients written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrace.kernels import Dense, Outer, blocks, dense, fold, gram, inner, sqnorms, total

SIZES = st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([1, 2, 9]), *[st.integers(1, 6)] * 2)


def outer(kind, sizes, samples, seed):
    k, _, g, t, rows, columns = sizes
    generator = torch.Generator().manual_seed(seed)

    def side(count, width):
        shape = (count, samples, g, t, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "lookup":
        left = torch.randint(rows, (1, samples, g, t), generator=generator)
        return Outer(left, side(k, columns), rows)
    if kind == "left":
        return Outer(side(k, rows), side(1, columns), rows, moves_left=True)
    return Outer(side(1, rows), side(k, columns), rows)


def written_out(x):
    left = torch.nn.functional.one_hot(x.left, x.rows).double() if x.is_lookup else x.left
    k, n, *_ = x.shape
    return torch.stack(
        [
            torch.einsum("ngtl,ngtr->nglr", left[i % len(left)], x.right[i % len(x.right)]).flatten(
                1
            )
            for i in range(k)
        ]
    )


@pytest.mark.parametrize("kind", ["right", "left", "lookup"])
@given(sizes=SIZES, others=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_contractions_are_those_of_written_out_gradients(kind, sizes, others, seed):
    x = outer(kind, sizes, sizes[1], seed)
    y = outer(kind, (sizes[0] + 1, *sizes[1:]), others, seed + 1)
    z = outer(kind, (sizes[0] + 1, *sizes[1:]), sizes[1], seed + 2)
    a, b, c = written_out(x), written_out(y), written_out(z)
    u = torch.randn(a.shape[2], dtype=torch.float64)
    for found, true in [
        (dense(x), a),
        (sqnorms(x), a.square().sum(2)),
        (gram(x, y), torch.einsum("knp,jmp->nkmj", a, b)),
        (gram(x, Dense(b)), torch.einsum("knp,jmp->nkmj", a, b)),
        (blocks(x, z), torch.einsum("knp,jnp->nkj", a, c)),
        (blocks(Dense(a), z), torch.einsum("knp,jnp->nkj", a, c)),
        (inner(x, u), a @ u),
        (inner(Dense(a), u), a @ u),
        (sqnorms(fold(x))[0], a.square().sum((0, 2))),
        (gram(fold(y), fold(z))[:, 0, :, 0], torch.einsum("knp,kmp->nm", b, c)),
    ]:
        torch.testing.assert_close(found, true)


def test_the_total_of_factors_leaves_them_as_they_are():
    g = torch.Generator().manual_seed(0)
    rows, columns = 5, 3
    lookup = Outer(
        torch.randint(rows, (1, 2, 1, 7), generator=g), torch.randn(4, 2, 1, 7, columns), rows
    )
    outer = Outer(torch.randn(1, 2, 1, 6, rows), torch.randn(4, 2, 1, 6, columns), rows)
    written = Dense(torch.randn(4, 2, rows * columns))
    for factors in ([lookup, outer, written], [lookup, lookup], [written, lookup], [outer]):
        kept = written.values.clone()
        torch.testing.assert_close(total(factors), torch.stack([dense(f) for f in factors]).sum(0))
        assert torch.equal(written.values, kept)
