"""Sketches of gradients, against gradients written out in float64, and on average over seeds."""

import pytest
import torch
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import kron_signs, kron_sketch

#: The signs of the first row, as they were drawn once.
FIRST = [0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1]
#: N, T, I, O.
SHAPES = [(1, 1, 1, 1), (4, 1, 33, 20), (3, 40, 17, 9), (3, 9, 40, 50), (2, 33, 64, 32)]


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(SHAPES))
def test_gradients_between_two_matrices(shape, dtype, layout, where):
    n, t, i, o = shape
    options = {"dtype": dtype, "layout": layout, "device": where}
    a, g = drawn(n, t, i, **options), drawn(n, t, o, **options, seed=1)
    ra, rg = (r.to(where) for r in kron_signs(i, o, 32, 24, 3, "a layer"))
    found = kron_sketch(a, g, ra, rg)
    assert found.dtype == torch.float32
    assert torch.equal(found, kron_sketch(a, g, ra, rg))
    # Signs as they are, not as float32 rounds their divisor.
    signs = (ra.double().sign(), rg.double().sign())
    true = torch.einsum("nti,nto,ik,ol->nkl", a.double(), g.double(), *signs) / (32 * 24) ** 0.5
    assert_near(found, true.flatten(1), where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_size_of_signs_is_not_rounded_with_them(dtype, where):
    a = torch.ones(1, 1, 16, dtype=dtype, device=where)
    ra, rg = (r.to(where) for r in kron_signs(16, 16, 32, 24, 0, "a layer"))
    found = kron_sketch(a, a, ra, rg)
    true = ra.double().sum(0).outer(rg.double().sum(0)).flatten()
    assert_near(found[0], true, where)


@pytest.mark.parametrize("columns", [(16, 128), (128, 16), (130, 3), (1, 1)])
def test_any_number_of_columns(columns, where):
    a, g = drawn(2, 9, 20, device=where), drawn(2, 9, 12, device=where, seed=1)
    ra = drawn(20, columns[0], device=where, seed=2)
    rg = drawn(columns[1], 12, device=where, seed=3).T
    true = (a.double() @ ra.double()).mT @ (g.double() @ rg.double())
    assert_near(kron_sketch(a, g, ra, rg), true.flatten(1), where)


def test_sketches_are_unbiased():
    """And their norms vary as they should for gradients of rank one."""
    a, g = drawn(3, 2, 7).double(), drawn(3, 2, 6, seed=1).double()
    gradients = torch.einsum("nti,nto->nio", a, g).flatten(1)
    true = gradients @ gradients.T
    single = torch.ones(1, 1, 16)
    found, norms = [], []
    for seed in range(2000):
        sketches = kron_sketch(a, g, *(r.double() for r in kron_signs(7, 6, 16, 24, seed, "f")))
        found.append(sketches @ sketches.T)
        norms.append(
            kron_sketch(single, single, *kron_signs(16, 16, 16, 24, seed, "f")).norm() ** 2
        )
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    off = (found.mean(0) - true) / error
    assert float(off.abs().max()) < 3.5
    # Equal entries have a fourth moment that is smaller, by 2 / 16 of that of normal numbers.
    inner, outer = 2 / 16 * (1 - 1 / 16), 2 / 24 * (1 - 1 / 16)
    spread = float(torch.stack(norms).var()) / 256**2
    assert abs(spread / ((1 + inner) * (1 + outer) - 1) - 1) < 0.25


def test_signs_are_of_seed_and_name_alone():
    ra, rg = kron_signs(40, 30, 16, 24, 5, "blocks.0.weight")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = kron_signs(40, 30, 16, 24, 5, "blocks.0.weight")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again[0], ra)
    assert torch.equal(again[1], rg)
    assert ra.shape == (40, 16)
    assert rg.shape == (30, 24)
    torch.testing.assert_close(ra.abs(), torch.full_like(ra, 0.25))
    torch.testing.assert_close(rg.abs(), torch.full_like(rg, 24**-0.5))
    # The rows of a larger layer begin with them; the first are as they have always been.
    assert torch.equal(kron_signs(80, 30, 16, 24, 5, "blocks.0.weight")[0][:40], ra)
    assert (ra[0] > 0).int().tolist() == FIRST
    for other in (
        kron_signs(40, 30, 16, 24, 6, "blocks.0.weight"),
        kron_signs(40, 30, 16, 24, 5, "blocks.1.weight"),
    ):
        assert abs(float((other[0] * ra).sum())) < 4 * 40 / 640**0.5
    square = kron_signs(40, 40, 16, 16, 5, "blocks.0.weight")
    assert not torch.equal(*square)


@pytest.mark.parametrize(("n", "t", "i", "o"), [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5)])
def test_nothing(n, t, i, o, where):
    a, g = torch.empty(n, t, i, device=where), torch.empty(n, t, o, device=where)
    found = kron_sketch(a, g, *(r.to(where) for r in kron_signs(i, o, 16, 16, 0, "f")))
    assert torch.equal(found, torch.zeros(n, 256, device=where))


def test_it_is_an_operation_of_torch(where):
    a, g = drawn(3, 4, 8, device=where), drawn(3, 4, 6, device=where, seed=1)
    ra, rg = (r.to(where) for r in kron_signs(8, 6, 16, 16, 0, "f"))
    torch.library.opcheck(kron_sketch, (a, g, ra, rg))
    compiled = torch.compile(
        lambda a, g: kron_sketch(2 * a, g, ra, rg), backend="aot_eager", fullgraph=True
    )
    assert_near(compiled(a, g), 2 * kron_sketch(a.double(), g.double(), ra, rg), where)


def test_float64_is_kept():
    a, g = drawn(3, 4, 8).double(), drawn(3, 4, 6, seed=1).double()
    ra, rg = kron_signs(8, 6, 16, 16, 0, "f")
    assert kron_sketch(a, g, ra, rg).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"a": torch.ones(3, 4)}, r"a of shape \(N, T, I\)"),
        ({"g": torch.ones(3, 5, 6)}, "g of shape"),
        ({"ra": torch.ones(7, 16)}, "ra of 8 rows"),
        ({"rg": torch.ones(6)}, "rg of 6 rows"),
        ({"g": torch.ones(3, 4, 6, dtype=torch.complex64)}, "g of a real floating type"),
        ({"precision": "tf32x4"}, "tf32x4"),
    ],
)
def test_what_does_not_fit(change, match):
    given = {"a": torch.ones(3, 4, 8), "g": torch.ones(3, 4, 6)}
    given |= {"ra": torch.ones(8, 16), "rg": torch.ones(6, 16)}
    with pytest.raises(ValueError, match=match):
        kron_sketch(**{**given, **change})


def test_no_columns():
    with pytest.raises(ValueError, match="at least one column"):
        kron_signs(3, 4, 0, 16, 0, "f")
