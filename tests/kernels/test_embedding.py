"""Inner products of gradients of embeddings, against gradients written out in float64."""

import pytest
import torch
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import embedding_gram, embedding_sqnorm

#: N, T, D.
SHAPES = [(1, 1, 1), (20, 3, 5), (3, 70, 17), (3, 33, 40), (5, 9, 33)]


def looked_up(n, t, rows, where="cpu", seed=7):
    """Ids of which few are frequent, as words are."""
    random = torch.Generator().manual_seed(seed)
    ids = (rows ** torch.rand(n, t, generator=random)).long() - 1
    return ids.to(where)


def true(ids, g):
    rows = torch.nn.functional.one_hot(ids).double()
    written = torch.einsum("ntv,ntd->nvd", rows, g.double()).flatten(1)
    return written @ written.T


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(SHAPES))
def test_samples_meet_at_common_ids(shape, dtype, layout, rows, where):
    n, t, d = shape
    ids = looked_up(n, t, rows, where)
    g = drawn(n, t, d, dtype=dtype, layout=layout, device=where)
    found = embedding_gram(ids, g)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert torch.equal(found, embedding_gram(ids, g))
    assert_near(found, true(ids, g), where)
    norms = embedding_sqnorm(ids, g)
    assert torch.equal(norms, embedding_sqnorm(ids, g))
    assert_near(norms, true(ids, g).diagonal(), where)
