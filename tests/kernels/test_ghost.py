"""Inner products of gradients of linear maps, against gradients written out in float64."""

import pytest
import torch
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import ghost_gram, ghost_sqnorm

#: N, T, I, O.
SHAPES = [
    (1, 1, 1, 1),
    (70, 1, 5, 3),
    (9, 3, 17, 9),
    (3, 33, 40, 50),
    (5, 9, 33, 20),
    (2, 40, 7, 5),
]


def sides(shape, dtype=torch.float32, layout="contiguous", where="cpu", seed=0):
    n, t, i, o = shape
    options = {"dtype": dtype, "layout": layout, "device": where}
    return drawn(n, t, i, **options, seed=seed), drawn(n, t, o, **options, seed=seed + 1)


def true(a, g, b=None, h=None):
    mine = torch.einsum("nti,nto->nio", a.double(), g.double()).flatten(1)
    theirs = mine if b is None else torch.einsum("mti,mto->mio", b.double(), h.double()).flatten(1)
    return mine @ theirs.T


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(SHAPES))
def test_samples_meet_each_other(shape, dtype, layout, where):
    a, g = sides(shape, dtype, layout, where)
    found = ghost_gram(a, g)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert torch.equal(found, ghost_gram(a, g))
    assert_near(found, true(a, g), where)
    norms = ghost_sqnorm(a, g)
    assert norms.dtype == torch.float32
    assert torch.equal(norms, ghost_sqnorm(a, g))
    assert_near(norms, true(a, g).diagonal(), where)
