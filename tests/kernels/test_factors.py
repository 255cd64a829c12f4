"""Contractions of factored gradients against the same on gradients written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrace.kernels.factors as factors
from nettrace.kernels import (
    Dense,
    Geometry,
    Outer,
    Patches,
    Still,
    Sum,
    blocks,
    column_sqnorms,
    dense,
    gram_,
    inner,
    mirror_,
    patches,
    sqnorms,
    total,
    traced_gram_,
)

#: K cotangents, N samples, G groups, T tokens, D and M columns of the still and the moving side.
SIZES = st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([1, 2, 9]), *[st.integers(1, 6)] * 2)
LIMIT = 10**6
KINDS = ["right", "left", "lookup", "ones"]


def random(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def outer(kind, sizes, samples, seed):
    k, _, g, t, d, m = sizes
    if kind == "lookup":
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(d, (samples, g, t), generator=generator)
        still = Still(numbers, d, dtype=torch.float64)
    else:
        still = Still(random((samples, g, t, d), seed), d, ones=kind == "ones")
    return Outer(still, random((k, samples, g, t, m), seed + 1000), kind == "left")


def written_out(x):
    """(K, N, P) as the definition says, the column of ones included."""
    if isinstance(x, Sum):
        return sum(map(written_out, x.terms))
    tokens = x.still.tokens()
    if x.still.is_lookup:
        tokens = F.one_hot(tokens, x.still.width).double()
    order = "kngmd" if x.moves_left else "kngdm"
    matrix = torch.einsum(f"kngtm,ngtd->{order}", x.moving, tokens).flatten(2)
    bias = x.moving.sum(3).flatten(2)
    return torch.cat([matrix, bias], 2) if x.still.ones else matrix


def gram(x, y):
    a, b = written_out_if_need_be(x), written_out_if_need_be(y)
    found = torch.zeros(a.shape[1], a.shape[0], b.shape[1], b.shape[0], dtype=a.dtype)
    gram_(found, x, y, LIMIT)
    if x is y:
        mirror_(found.view(a.shape[0] * a.shape[1], -1))
    return found


def written_out_if_need_be(x):
    return x.values if isinstance(x, Dense) else written_out(x)


@pytest.fixture(params=["tiles of any size", "small tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(factors, "TILE", 7)
        monkeypatch.setattr(factors.tiles, "__defaults__", (7,))
        monkeypatch.setattr(Still, "at_once", 5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, others=st.integers(1, 3), seed=st.integers(0, 99), writing=st.booleans())
def test_contractions_are_those_of_written_out_gradients(kind, sizes, others, seed, writing):
    x = outer(kind, sizes, sizes[1], seed)
    y = outer(kind, (sizes[0] + 1, *sizes[1:]), others, seed + 1)
    z = outer(kind, (sizes[0] + 1, *sizes[1:]), sizes[1], seed + 2)
    cost, factors._WRITE = factors._WRITE, -(10**6) if writing else 10**6  # take either way
    try:
        check(x, y, z)
    finally:
        factors._WRITE = cost


@pytest.mark.parametrize("kind", KINDS)
def test_contractions_in_small_tiles(kind, tiles):
    sizes = (3, 4, 2, 5, 6, 3)
    for t in (1, 5):
        sizes = (3, 4, 2, t, 6, 3)
        x, z = (outer(kind, sizes, 4, seed) for seed in (0, 1))
        check(x, outer(kind, sizes, 5, 2), z)


def check(x, y, z):
    a, b, c = written_out(x), written_out(y), written_out(z)
    pairs = [
        (sqnorms(x), a.square().sum(2)),
        (gram(x, y), torch.einsum("knp,jmp->nkmj", a, b)),
        (gram(x, x), torch.einsum("knp,jmp->nkmj", a, a)),
        (blocks(x, z), torch.einsum("knp,jnp->nkj", a, c)),
        (blocks(x, x), torch.einsum("knp,jnp->nkj", a, a)),
        (traced(x, x), torch.einsum("knp,kmp->nm", a, a)),
    ]
    if len(a) == len(b):
        pairs.append((traced(x, y), torch.einsum("knp,kmp->nm", a, b)))
    if not x.still.ones:
        u = random(a.shape[2], 7)
        pairs += [
            (dense(x), a),
            (column_sqnorms(x), a.square().sum((0, 1))),
            (column_sqnorms(Dense(a)), a.square().sum((0, 1))),
            (inner(x, u), a @ u),
            (inner(Dense(a), u), a @ u),
            (gram(x, Dense(b)), torch.einsum("knp,jmp->nkmj", a, b)),
            (blocks(Dense(a), z), torch.einsum("knp,jnp->nkj", a, c)),
            (sqnorms(Dense(a)), a.square().sum(2)),
        ]
    for found, true in pairs:
        torch.testing.assert_close(found, true)


def traced(x, y):
    found = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    traced_gram_(found, x, y, LIMIT)
    if x is y:
        mirror_(found)
    return found


@pytest.mark.parametrize("kinds", [("right", "left"), ("lookup", "left"), ("lookup", "right")])
@pytest.mark.parametrize("writing", [False, True])
def test_sums_of_different_forms(kinds, writing, monkeypatch):
    monkeypatch.setattr(factors, "_WRITE", -(10**6) if writing else 10**6)

    def several(k, n, seed):
        terms = []
        for i, kind in enumerate(kinds):
            terms.append(outer(kind, (k, n, 1, 2 + i, 4, 4), n, seed + i))
        return Sum(tuple(terms))

    x, y, z = several(3, 4, 0), several(2, 5, 10), several(2, 4, 20)
    a, b, c = map(written_out, (x, y, z))
    u = random(a.shape[2], 7)
    same = torch.zeros(4, 4, dtype=torch.float64)
    traced_gram_(same, x, x, LIMIT)
    mirror_(same)
    for found, true in [
        (dense(x), a),
        (sqnorms(x), a.square().sum(2)),
        (column_sqnorms(x), a.square().sum((0, 1))),
        (gram(x, y), torch.einsum("knp,jmp->nkmj", a, b)),
        (gram(x, x), torch.einsum("knp,jmp->nkmj", a, a)),
        (blocks(x, z), torch.einsum("knp,jnp->nkj", a, c)),
        (inner(x, u), a @ u),
        (same, torch.einsum("knp,kmp->nm", a, a)),
    ]:
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize(
    "kinds", ["lookup right", "lookup lookup", "right left", "lookup written", "right", "written"]
)
def test_the_total_leaves_its_summands_as_they_are(kinds):
    def make(i, kind):
        if kind == "written":
            return Dense(random((3, 4, 16), i))
        return outer(kind, (3, 4, 1, 2 + i, 4, 4), 4, i)

    summands = [make(i, kind) for i, kind in enumerate(kinds.split())]
    true = sum(map(written_out_if_need_be, summands))
    for _ in range(2):
        torch.testing.assert_close(total(summands), true)


GEOMETRIES = [
    Geometry((1, 1), (3, 3), (1, 1), (1, 1), 1),
    Geometry((0, 1), (3, 2), (2, 1), (1, 2), 2),
    Geometry((1,), (3,), (2,), (1,), 1),
    Geometry((0, 0, 1), (2, 1, 2), (1, 1, 1), (1, 1, 1), 2),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("length", [4, 9])  # 81 places and more go by one grouped convolution
def test_patches_are_what_a_convolution_multiplies_with_its_filter(geometry, images, length):
    axes, g, n, m = len(geometry.size), geometry.groups, 3, 5
    if axes == 3 and length == 9:
        length = 5
    x = random((n, images, 4, *[length] * axes), 0)
    weight = random((g * m, 4 // g, *geometry.size), 1).requires_grad_()
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    out = convolve(
        x.flatten(0, 1), weight, None, geometry.stride, geometry.padding, geometry.dilation, g
    )
    met = patches(x, geometry)
    filters = weight.detach().view(g, m, -1)
    again = torch.einsum("ngtd,gmd->ngmt", met, filters)
    again = again.unflatten(3, (images, -1)).permute(0, 3, 1, 2, 4).reshape(out.shape)
    torch.testing.assert_close(again, out.detach())

    still = Patches(x, geometry)
    assert (still.samples, still.length) == (n, met.shape[2])
    g_out = random(out.shape, 2).unflatten(0, (n, images))
    moving = g_out.flatten(3).unflatten(2, (g, m)).permute(0, 2, 1, 4, 3).flatten(2, 3)
    for sample in range(n):
        (true,) = torch.autograd.grad(
            out.unflatten(0, (n, images))[sample], weight, g_out[sample], retain_graph=True
        )
        found = still.outer(moving[sample : sample + 1], slice(sample, sample + 1))
        torch.testing.assert_close(found.flatten(), true.flatten())
