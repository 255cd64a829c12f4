"""The spectral density by Lanczos quadrature, against dense matrices and laws of random ones."""

import numpy as np
import pytest
import torch

from nettrace.estimators import signs
from nettrace.spectral_density import quadrature


def gaussian(rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random, dtype=torch.float64)


def semicircle(size):
    a = gaussian(size, size)
    return (a + a.T) / (2 * size) ** 0.5


def of(matrix, **options):
    options = {"dtype": matrix.dtype, "device": "cpu", **options}
    return quadrature(lambda v: matrix @ v, len(matrix), **options)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_moments_of_each_draw_are_exact(steps):
    a = semicircle(60)
    found = of(a, steps=steps, draws=3, seed=4)
    assert found.products == 3 * steps
    for k in range(3):
        z = signs((60,), 4, f"density {k}").double() / 60**0.5
        for order in range(2 * steps):
            right = z @ torch.linalg.matrix_power(a, order) @ z
            mine = (found.weights[k] * found.nodes[k] ** order).sum()
            assert float(mine) == pytest.approx(float(right), rel=1e-11, abs=1e-12)


def test_moments_are_unbiased_and_their_errors_true():
    a = semicircle(50) + torch.diag(torch.tensor([4.0, -3] + [0] * 48).double())
    densities = [of(a, steps=3, draws=5, seed=s) for s in range(200)]
    for order in (1, 2, 3, 5):
        found = [f.moment(order) for f in densities]
        values = torch.stack([f.value for f in found])
        claimed = torch.stack([f.standard_error for f in found])
        true = torch.linalg.matrix_power(a, order).trace() / 50
        assert abs(float((values.mean() - true) / (values.std() / 200**0.5))) < 4
        ratio = (values - true).square().mean().sqrt() / claimed.square().mean().sqrt()
        assert 0.85 < float(ratio) < 1.15


def test_the_semicircle():
    found = of(semicircle(1500), steps=40, draws=4)
    places = torch.linspace(-1.6, 1.6, 33)
    right = (4 - places.square()).sqrt() / (2 * np.pi)
    density = found.density(places, width=0.05)
    assert float((density.value - right).abs().max()) < 0.03
    below = 0.5 + places * (4 - places.square()).sqrt() / (4 * np.pi) + (places / 2).asin() / np.pi
    assert float((found.cumulative(places).value - below).abs().max()) < 0.04


def test_marchenko_pastur_with_outliers_of_their_weights():
    x = gaussian(600, 1200) / 1200**0.5
    a = x @ x.T
    outlier = gaussian(600, 2, seed=1)
    outlier = torch.linalg.qr(outlier).Q
    a = a + 20 * outlier @ outlier.T
    found = of(a, steps=30, draws=10)
    high = found.nodes > 10
    weights = (found.weights * high).sum(1)
    assert float(weights.mean()) == pytest.approx(2 / 600, abs=4 * float(weights.std()) / 10**0.5)
    assert found.range[1] == pytest.approx(float(torch.linalg.eigvalsh(a).max()), rel=1e-6)
    low, top = (1 - 0.5**0.5) ** 2, (1 + 0.5**0.5) ** 2
    places = torch.linspace(low + 0.45, top - 0.3, 20)
    right = ((top - places) * (places - low)).sqrt() / (2 * np.pi * 0.5 * places)
    density = found.density(places, width=0.008)
    assert float((density.value - right).abs().max()) < 0.08


@pytest.mark.parametrize("width", [0.01, 0.1])
def test_the_density_is_that_of_the_eigenvalues_and_integrates_to_one(width):
    a = semicircle(80)
    found = of(a, steps=80, draws=40)
    grid = found.grid(width)
    density = found.density(width=width)
    assert torch.trapezoid(density.value, grid) == pytest.approx(1, abs=1e-5)
    assert torch.equal(density.value, found.density(grid, width).value)
    values = torch.linalg.eigvalsh(a)
    scale = width * (found.range[1] - found.range[0])
    normal = torch.distributions.Normal(values[:, None], torch.tensor(scale).double())
    right = normal.log_prob(grid).exp().mean(0)
    off = (density.value - right)[right > 0.01] / density.standard_error[right > 0.01]
    assert float(off.abs().max()) < 5
    assert float(off.square().mean()) < 2.5
    part = found.cumulative(torch.tensor([-10.0, 0, 10]))
    assert part.value[0] == 0
    assert float(part.value[1]) == pytest.approx(float((values <= 0).double().mean()), abs=0.1)
    assert float(part.value[2]) == pytest.approx(1)


@pytest.mark.parametrize("values", [[2.0, -20.0], [3.0], [1.0] * 6, [5.0, 5, 5, -1, -1, -1, -1]])
def test_small_matrices_are_told_exactly(values):
    a = torch.diag(torch.tensor(values, dtype=torch.float64))
    found = of(a, steps=30)
    for order in range(4):
        moment = found.moment(order)
        assert float(moment.value) == pytest.approx(float((a.diagonal() ** order).mean()))
    assert found.range == (pytest.approx(min(values)), pytest.approx(max(values)))
    assert torch.allclose(found.weights.sum(1), torch.ones(4).double())
    assert torch.trapezoid(found.density().value, found.grid()) == pytest.approx(1, abs=1e-4)


def test_float32_and_seeds():
    a = semicircle(300).float()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = (of(a, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.nodes, same.nodes)
    assert not torch.equal(one.nodes, other.nodes)
    wide = of(a.double(), seed=1)
    assert torch.allclose(one.moment(4).value, wide.moment(4).value, rtol=1e-5)


def test_what_is_wrong_is_said():
    a = torch.zeros(4, 4)
    found = of(a)
    assert float(found.moment(2).value) == 0
    with pytest.raises(ValueError, match="a matrix that is not 0"):
        found.density()
    with pytest.raises(ValueError, match="positive width"):
        of(torch.eye(4)).density(width=0)
    with pytest.raises(ValueError, match="order from 0"):
        found.moment(-1)
    for options in ({"draws": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="at least 2 draws"):
            of(a, **options)
