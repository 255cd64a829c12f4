"""Inner products of gradients of embeddings, against gradients written out in float64."""

import pytest
import torch
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import embedding_gram, embedding_sqnorm

#: N, T, D.
SHAPES = [(1, 1, 1), (20, 3, 5), (2, 40, 17), (2, 33, 40), (5, 9, 33)]


def looked_up(n, t, rows, where="cpu", seed=7):
    """Ids of which few are frequent, as words are."""
    random = torch.Generator().manual_seed(seed)
    ids = (rows ** torch.rand(n, t, generator=random)).long() - 1
    return ids.to(where)


def true(ids, g):
    rows = torch.nn.functional.one_hot(ids).double()
    written = torch.einsum("ntv,ntd->nvd", rows, g.double()).flatten(1)
    return written @ written.T


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(SHAPES))
def test_samples_meet_at_common_ids(shape, dtype, layout, where):
    n, t, d = shape
    ids = looked_up(n, t, 30, where)
    g = drawn(n, t, d, dtype=dtype, layout=layout, device=where)
    found = embedding_gram(ids, g)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    assert torch.equal(found, embedding_gram(ids, g))
    assert_near(found, true(ids, g), where)
    norms = embedding_sqnorm(ids, g)
    assert torch.equal(norms, embedding_sqnorm(ids, g))
    assert_near(norms, true(ids, g).diagonal(), where)


def test_ids_that_nobody_shares(where):
    """Blocks of tokens skip each other, and what is next to them in memory is not met."""
    ids = (torch.arange(5 * 40).reshape(5, 40) - 100).to(where)
    g = drawn(5, 40, 6, device=where)
    found = embedding_gram(ids, g)
    norms = g.double().square().sum((1, 2))
    assert_near(found, norms.diag(), where)
    assert torch.equal(found, found.diagonal().diag())
    assert_near(embedding_sqnorm(ids, g), norms, where)


def test_one_id_for_all(where):
    """Which fills more than one block with equal ids."""
    ids = torch.full((3, 40), 2**40, device=where)
    g = drawn(3, 40, 6, device=where)
    whole = g.double().sum(1)
    assert_near(embedding_gram(ids, g), whole @ whole.T, where)
    assert_near(embedding_sqnorm(ids, g), whole.square().sum(1), where)


def test_gradients_of_an_embedding(where):
    """By autograd."""
    ids = looked_up(4, 7, 9, where)
    weight = torch.zeros(10, 5, dtype=torch.float64, device=where, requires_grad=True)
    g = drawn(4, 7, 5, device=where)
    gradients = [
        torch.autograd.grad(torch.nn.functional.embedding(i, weight), weight, x.double())[0]
        for i, x in zip(ids, g, strict=True)
    ]
    gradients = torch.stack(gradients).flatten(1)
    assert_near(embedding_gram(ids, g), gradients @ gradients.T, where)


def test_samples_and_tokens_in_another_order(where):
    ids, g = looked_up(4, 20, 9, where), drawn(4, 20, 5, device=where)
    random = torch.Generator().manual_seed(0)
    samples, tokens = torch.randperm(4, generator=random), torch.randperm(20, generator=random)
    found = embedding_gram(ids[samples][:, tokens], g[samples][:, tokens])
    assert_near(found, embedding_gram(ids, g)[samples][:, samples].double(), where)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_ids_of_other_types(dtype, where):
    ids, g = looked_up(4, 7, 9, where), drawn(4, 7, 5, device=where)
    assert torch.equal(embedding_gram(ids.to(dtype), g), embedding_gram(ids, g))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing(shape, where):
    ids = torch.zeros(shape[:2], dtype=torch.long, device=where)
    g = torch.empty(shape, device=where)
    assert torch.equal(embedding_gram(ids, g), g.new_zeros(shape[0], shape[0]))
    assert torch.equal(embedding_sqnorm(ids, g), g.new_zeros(shape[0]))


def test_they_are_operations_of_torch(where):
    ids, g = looked_up(3, 4, 5, where), drawn(3, 4, 8, device=where)
    torch.library.opcheck(embedding_gram, (ids, g))
    torch.library.opcheck(embedding_sqnorm, (ids, g))
    compiled = torch.compile(
        lambda ids, g: embedding_gram(ids, 2 * g).diagonal() - embedding_sqnorm(ids, g),
        backend="aot_eager",
        fullgraph=True,
    )
    assert_near(compiled(ids, g), 3 * true(ids, g).diagonal(), where)


def test_float64_is_kept():
    ids, g = looked_up(3, 4, 5), drawn(3, 4, 8).double()
    assert embedding_gram(ids, g).dtype == embedding_sqnorm(ids, g).dtype == torch.float64


@pytest.mark.parametrize("op", [embedding_gram, embedding_sqnorm])
@pytest.mark.parametrize(
    ("ids", "g", "match"),
    [
        (torch.ones(3, 4, 1).long(), torch.ones(3, 4, 5), r"ids of shape \(N, T\)"),
        (torch.ones(3, 4).long(), torch.ones(3, 5, 5), r"g of shape \(N, T, D\)"),
        (torch.ones(3, 4), torch.ones(3, 4, 5), "integer type, got torch.float32"),
        (torch.ones(3, 4).long(), torch.ones(3, 4, 5).long(), "floating type, got torch.int64"),
    ],
)
def test_what_does_not_fit(op, ids, g, match):
    with pytest.raises(ValueError, match=match):
        op(ids, g)
