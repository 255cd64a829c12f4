"""Inner products of gradients of linear maps, against gradients written out in float64."""

import inspect

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


@pytest.mark.parametrize(
    ("shape", "others"), [((3, 5, 6, 4), (7, 2, 6, 4)), ((1, 1, 6, 4), (40, 3, 6, 4))]
)
def test_samples_meet_others(shape, others, where):
    a, g = sides(shape, where=where)
    b, h = sides(others, where=where, seed=7)
    found = ghost_gram(a, g, b, h)
    assert_near(found, true(a, g, b, h), where)
    assert torch.equal(found, ghost_gram(a, g, b, h))


def test_sides_of_different_types(where):
    a, g = sides((3, 5, 6, 4), where=where)
    b, h = sides((2, 4, 6, 4), torch.float16, where=where, seed=7)
    assert_near(ghost_gram(a, g, b, h), true(a, g, b, h), where)
    half = g.half()
    assert_near(ghost_gram(a, half), true(a, half), where)
    assert_near(ghost_sqnorm(a, half), true(a, half).diagonal(), where)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_rounding_leaves_no_negative_eigenvalue(tokens, where):
    a, g = sides((20, tokens, 3, 2), where=where)
    found = ghost_gram(a, g).double()
    values = torch.linalg.eigvalsh(found)
    assert float(values[0]) > -1e-6 * float(values[-1])


def test_samples_in_another_order(where):
    a, g = sides((9, 3, 6, 4), where=where)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_near(ghost_gram(a[order], g[order]), ghost_gram(a, g)[order][:, order].double(), where)
    assert_near(ghost_sqnorm(a[order], g[order]), ghost_sqnorm(a, g)[order].double(), where)


def test_gradients_of_a_linear_map(where):
    """By autograd."""
    a, g = sides((4, 3, 6, 5), where=where)
    weight = torch.zeros(6, 5, dtype=torch.float64, device=where, requires_grad=True)
    gradients = [
        torch.autograd.grad(x.double() @ weight, weight, y.double())[0]
        for x, y in zip(a, g, strict=True)
    ]
    gradients = torch.stack(gradients).flatten(1)
    assert_near(ghost_gram(a, g), gradients @ gradients.T, where)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0)])
def test_nothing(shape, where):
    a, g = sides(shape, where=where)
    n = shape[0]
    assert torch.equal(ghost_gram(a, g), a.new_zeros(n, n))
    assert torch.equal(ghost_gram(a, g, a[:1], g[:1]), a.new_zeros(n, min(n, 1)))
    assert torch.equal(ghost_sqnorm(a, g), a.new_zeros(n))


def test_they_are_operations_of_torch(where):
    a, g = sides((3, 4, 8, 6), where=where)
    torch.library.opcheck(ghost_gram, (a, g))
    torch.library.opcheck(ghost_gram, (a, g, a[:2], g[:2]))
    torch.library.opcheck(ghost_sqnorm, (a, g))
    compiled = torch.compile(
        lambda a, g: ghost_gram(2 * a, g).diagonal() - ghost_sqnorm(a, g),
        backend="aot_eager",
        fullgraph=True,
    )
    assert_near(compiled(a, g), 3 * true(a, g).diagonal(), where)


def test_float64_is_kept():
    a, g = (x.double() for x in sides((3, 4, 8, 6)))
    assert ghost_gram(a, g).dtype == ghost_sqnorm(a, g).dtype == torch.float64
    torch.testing.assert_close(ghost_gram(a, g), true(a, g))


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 5, 6)])
def test_shapes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="expected"):
        ghost_gram(torch.ones(3, 4, 5), torch.ones(3, 4, 6), torch.ones(sizes), torch.ones(3, 4, 5))


@pytest.mark.parametrize("op", [ghost_gram, ghost_sqnorm])
def test_what_does_not_fit(op):
    a, g = sides((3, 4, 8, 6))
    with pytest.raises(ValueError, match=r"a of shape \(N, T, I\)"):
        op(a[0], g)
    with pytest.raises(ValueError, match="floating type, got"):
        op(a, g.to(torch.complex64))
    with pytest.raises(ValueError, match="fp8"):
        op(a, g, precision="fp8")


def test_one_of_the_others_alone():
    a, g = sides((3, 4, 8, 6))
    with pytest.raises(ValueError, match="both of b and h"):
        ghost_gram(a, g, a)


def test_several_devices_are_refused():
    a, g = drawn(2, 3, 4), drawn(2, 3, 5)
    with pytest.raises(ValueError, match="on one device, got a on cpu, b on meta"):
        ghost_gram(a, g, a.to("meta"), g.to("meta"))
    with pytest.raises(ValueError, match="on one device, got a on cpu, g on meta"):
        ghost_sqnorm(a, g.to("meta"))


def test_autocast_around_changes_nothing():
    a, g = drawn(2, 3, 4), drawn(2, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = ghost_gram(a, g)
    assert torch.equal(found, ghost_gram(a, g))


def test_operations_tell_what_they_take():
    assert "inner products of samples' gradients" in ghost_gram.__doc__.lower()
    assert list(inspect.signature(ghost_gram).parameters) == ["a", "g", "b", "h", "precision"]


def test_there_is_no_derivative():
    a, g = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 5)
    with pytest.raises(RuntimeError, match="ghost_sqnorm has no derivative: detach"):
        ghost_sqnorm(a, g).sum().backward()
