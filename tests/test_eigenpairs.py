"""Eigenpairs at both ends, signed, against dense matrices and SciPy."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from nettrace.eigenpairs import eigenpairs
from nettrace.krylov import NotSymmetricError


def rotated(spectrum, seed=0):
    """A dense symmetric matrix with known eigenvalues."""
    random = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q
    matrix = (basis * torch.as_tensor(spectrum, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def ends(matrix, top, bottom, **options):
    options = {"dtype": matrix.dtype, "device": "cpu", **options}
    return eigenpairs(lambda v: matrix @ v, len(matrix), top, bottom, **options)


def network_like(size=3000, outliers=10, seed=0):
    """A diagonal with few large values, a bulk near zero and few negative ones."""
    random = torch.Generator().manual_seed(seed)
    bulk = 0.01 * torch.randn(size, generator=random, dtype=torch.float64)
    bulk[:outliers] = torch.linspace(0.2, 1, outliers)
    bulk[-2:] = torch.tensor([-0.1, -0.15])
    return bulk


SPECTRA = {
    "two": [2.0, -20.0],
    "degenerate": [2.0, 2, 2, -20, -20],
    "identity": [1.0] * 12,
    "negative": [-1.0, -2, -3, -4],
    "zero": [0.0] * 5,
    "one": [3.0],
    "triple inside": [5.0, 5, 5, 4, 4, 4, 4, *np.linspace(-1, 1, 60), -3, -3],
    "wide": [*np.linspace(-1, 1, 80), 1e6, 1e3, -1e4],
}


@pytest.mark.parametrize("counts", [(1, 0), (0, 1), (1, 1), (3, 2), (5, 0), (0, 6), (99, 99)])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", ["diagonal", "rotated"])
def test_known_spectra(name, counts, shape):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64)
    a = torch.diag(spectrum) if shape == "diagonal" else rotated(spectrum)
    *found, products = ends(a, *counts, tolerance=1e-10)
    true = spectrum.sort().values
    scale = max(float(true.abs().max()), 1e-300)
    for pairs, right, count in zip(found, (true.flip(0), true), counts, strict=True):
        right = right[:count]
        assert pairs.values.dtype == torch.float64
        assert pairs.converged
        assert pairs.values.shape == right.shape
        assert float((pairs.values - right).abs().max() if len(right) else 0) <= 1e-10 * scale
        vectors = pairs.vectors
        assert vectors.shape == (len(a), len(right))
        assert torch.allclose(vectors.T @ vectors, torch.eye(len(right)).double(), atol=1e-10)
        again = (a @ vectors - vectors * pairs.values).norm(dim=0)
        assert torch.allclose(again, pairs.residuals, atol=1e-13 * scale * len(a), rtol=1e-3)
    assert products <= len(a)


def test_as_scipy_finds_them():
    a = rotated(network_like(400))
    top, bottom, products = ends(a, 3, 2, tolerance=1e-8)
    calls = []
    operator = LinearOperator(a.shape, lambda v: calls.append(1) or a.numpy() @ v, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=len(a))
    right = eigsh(operator, 3, which="LA", tol=1e-8, v0=start)[0][::-1]
    assert np.allclose(top.values.numpy(), right, atol=1e-8)
    assert np.allclose(bottom.values.numpy(), eigsh(a.numpy(), 2, which="SA")[0], atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_few_products_for_the_top_of_a_hessian(seed):
    spectrum = network_like()
    found = [ends_of_diagonal(spectrum, seed=10 * seed + k, tolerance=1e-3) for k in range(5)]
    errors = [float(abs(top.values - spectrum.max())) for top, _, _ in found]
    assert sum(error > 1e-3 for error in errors) == 0
    assert np.mean([products for *_, products in found]) <= 13


def ends_of_diagonal(spectrum, top=1, bottom=0, **options):
    options = {"dtype": spectrum.dtype, "device": "cpu", **options}
    return eigenpairs(lambda v: spectrum * v, len(spectrum), top, bottom, **options)


@pytest.mark.parametrize("gap", [0.004, 0.01])
def test_from_two_start_vectors_the_largest_of_a_close_pair_is_found(gap):
    for seed in range(10):
        random = torch.Generator().manual_seed(seed)
        spectrum = 0.1 * torch.rand(3000, generator=random)
        spectrum[:8], spectrum[8], spectrum[9] = torch.linspace(0.2, 0.6, 8), 1.0, 1 - gap
        top, *_ = ends_of_diagonal(spectrum, top=2, seed=seed, tolerance=1e-3)
        assert float(top.values[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_an_end_far_smaller_than_the_other_is_found(seed):
    """As the lowest eigenvalues of networks: to a tolerance of a tenth of the other."""
    spectrum = 1e-4 * torch.rand(2000, generator=torch.Generator().manual_seed(seed))
    spectrum[:5] = torch.tensor([1.0, 0.6, 0.3, -2e-3, -3e-3])
    _, bottom, _ = ends_of_diagonal(spectrum, 0, 1, seed=seed, tolerance=1e-3)
    assert float(bottom.values) == pytest.approx(-3e-3, abs=1e-4)


def test_rounding_is_no_asymmetry_and_counts_as_residual():
    """Where second derivatives cancel, single precision is symmetric to some 1e-3 of the norm."""
    a = rotated(network_like(60)).float()
    noise = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    top, _, _ = ends(a + 1e-4 * noise, 1, 0, tolerance=1e-3)
    assert float(top.values) == pytest.approx(1, abs=1e-3)
    assert 1e-4 < float(top.residuals) < 1e-2


def test_spare_pairs_are_given_beyond_those_asked_for():
    spectrum = network_like()
    top, bottom, products = ends_of_diagonal(spectrum, bottom=1, tolerance=1e-3, spare=2)
    assert top.values.shape == top.residuals.shape == (3,)
    assert top.vectors.shape[1] == 3
    assert bottom.values.shape == (1,)
    alone, _, fewer = ends_of_diagonal(spectrum, bottom=1, tolerance=1e-3)
    assert products == fewer
    assert_same(top.first(1), alone)


def assert_same(one, other):
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.vectors, other.vectors)


def test_values_close_together_are_not_taken_for_one():
    spectrum = network_like()
    spectrum[8] = 0.97
    for seed in range(10):
        top, *_ = ends_of_diagonal(spectrum, seed=seed, tolerance=1e-3)
        assert float(abs(top.values - 1)) < 1e-3


@pytest.mark.parametrize(("count", "most"), [(1, 3), (3, 6), (5, 9)])
def test_a_warm_start_follows_a_matrix_for_few_products(count, most):
    a = rotated(network_like(400))
    random = torch.Generator().manual_seed(1)
    change = torch.randn(400, 400, generator=random, dtype=torch.float64) / 400**0.5
    change = 0.001 * (change + change.T)
    top, _, cold = ends(a, count, 0, tolerance=1e-3)
    used = []
    for step in range(1, 8):
        now = a * (1 + 0.01 * step) + step * change
        top, _, products = ends(now, count, 0, tolerance=1e-3, start=top.vectors, seed=step)
        true = torch.linalg.eigvalsh(now).flip(0)[:count]
        assert float((top.values - true).abs().max()) < 1e-3 * float(true[0])
        used.append(products)
    assert np.mean(used) <= most < cold


def test_a_warm_start_finds_what_has_come_up_elsewhere():
    """Within few calls, even if the old vector is an exact eigenvector still."""
    spectrum = network_like(2000, outliers=3)
    top, *_ = ends_of_diagonal(spectrum, tolerance=1e-3)
    spectrum[0] = 2.0
    for step in range(6):
        top, _, _ = ends_of_diagonal(spectrum, tolerance=1e-3, start=top.vectors, seed=step)
    assert float(top.values) == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_may_be_beyond_single_precision(scale):
    spectrum = scale * torch.linspace(-0.5, 1, 200).square().neg()
    top, bottom, _ = ends_of_diagonal(spectrum, bottom=1, tolerance=1e-3)
    assert float(top.values) == pytest.approx(0, abs=1e-4 * scale)
    assert float(bottom.values) == pytest.approx(-scale, rel=1e-3)


def test_a_matrix_that_has_vanished_is_seen_to_be_zero():
    top, _, products = ends_of_diagonal(
        torch.zeros(500), tolerance=1e-3, start=torch.eye(500)[:2].T
    )
    assert float(top.values) == 0
    assert top.converged
    assert products <= 4


@pytest.mark.parametrize("top", [1, 4])
def test_short_memory_costs_products_not_truth(top):
    a = rotated(np.linspace(-1, 1, 300) ** 3)
    wide, _, few = ends(a, top, 1, tolerance=1e-7)
    narrow, low, many = ends(a, top, 1, tolerance=1e-7, memory=1, most_products=3000)
    assert narrow.converged
    assert low.converged
    assert many > few
    assert torch.allclose(narrow.values, wide.values, atol=1e-7)
    again = (a @ narrow.vectors - narrow.vectors * narrow.values).norm(dim=0)
    assert torch.allclose(again, narrow.residuals, atol=1e-12)


def test_float32_and_its_default_tolerance():
    a = rotated(network_like(500)).float()
    top, bottom, _ = ends(a, 2, 1)
    assert top.vectors.dtype == torch.float32
    true = torch.linalg.eigvalsh(a.double())
    assert float((top.values - true.flip(0)[:2]).abs().max()) < 3.5e-4
    assert float((bottom.values - true[:1]).abs().max()) < 3.5e-4
    again = (a.double() @ top.vectors.double() - top.vectors.double() * top.values).norm(dim=0)
    assert torch.allclose(again, top.residuals, rtol=0.01, atol=2e-6)


def test_giving_up_is_said():
    a = rotated(np.linspace(0, 1, 200))
    top, _, products = ends(a, 1, 0, tolerance=1e-9, most_products=5)
    assert products == 5
    assert not top.converged
    assert float(top.residuals) > 1e-3


def test_the_same_seed_gives_the_same_and_draws_nothing_from_others():
    a = rotated(network_like(100))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, other = (ends(a, 2, 1, seed=5)[0] for _ in range(2))
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.vectors, other.vectors)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_wrong_is_said():
    a = torch.eye(4)
    for arguments, options, message in [
        ((-1, 0), {}, "counts from 0"),
        ((1, 0), {"tolerance": 0.0}, "positive tolerance"),
        ((1, 0), {"start": torch.ones(3, 1)}, "start vectors"),
        ((1, 0), {"most_products": 0}, "at least one product"),
    ]:
        with pytest.raises(ValueError, match=message):
            ends(a, *arguments, **options)
    with pytest.raises(NotSymmetricError):
        ends(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)), 2, 1)
    with pytest.raises(ValueError, match="not finite"):
        ends(a * torch.nan, 1, 0)
