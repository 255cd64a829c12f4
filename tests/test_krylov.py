"""Krylov spaces, against dense matrices."""

import pytest
import torch

from nettrace.krylov import Krylov, NotSymmetricError


def symmetric(size, seed=0):
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def grown(matrix, starts, steps, which=0):
    space = Krylov(lambda v: matrix @ v, len(matrix), matrix.dtype, "cpu")
    for k in range(starts):
        random = torch.Generator().manual_seed(k)
        assert space.start(torch.randn(len(matrix), generator=random))
    for _ in range(steps):
        space.step(which)
    return space


@pytest.mark.parametrize(("starts", "steps"), [(1, 1), (1, 12), (3, 11), (2, 40), (4, 38)])
@pytest.mark.parametrize("which", [0, -1])
def test_residuals_are_those_of_the_vectors(starts, steps, which):
    a = symmetric(40)
    space = grown(a, starts, steps, which)
    values, coefficients, residuals = space.ritz()
    vectors = space.combine(coefficients).T
    assert torch.allclose(vectors.T @ vectors, torch.eye(steps).double(), atol=1e-12)
    assert torch.allclose((a @ vectors - vectors * values).norm(dim=0), residuals, atol=1e-12)
    assert space.products == steps
    assert space.ahead == min(starts, 40 - steps)


def test_one_start_vector_makes_the_projection_tridiagonal():
    a = symmetric(30)
    space = grown(a, 1, 10)
    values, coefficients, _ = space.ritz()
    basis = space.combine(torch.eye(10).double()).T
    projected = basis.T @ a @ basis
    assert torch.allclose(torch.linalg.eigvalsh(projected), values, atol=1e-12)
    assert float((projected.triu(2)).abs().max()) < 1e-12


def test_a_restart_keeps_what_it_is_given():
    a = symmetric(40)
    space = grown(a, 2, 12)
    values, coefficients, residuals = space.ritz()
    space.restart(values[-4:], coefficients[:, -4:])
    assert len(space) == 4
    found = space.ritz()
    assert torch.allclose(found[0], values[-4:])
    assert torch.allclose(found[2], residuals[-4:])
    for _ in range(9):
        space.step()
    values, coefficients, residuals = space.ritz()
    vectors = space.combine(coefficients).T
    assert torch.allclose((a @ vectors - vectors * values).norm(dim=0), residuals, atol=1e-11)


def test_an_invariant_subspace_ends_it_until_another_vector_is_given():
    a = torch.diag(torch.tensor([3.0, 3, 3, 1, 1]).double())
    space = grown(a, 1, 2)
    assert space.ahead == 0
    assert float(space.ritz()[2].max()) < 1e-14
    assert space.start(torch.arange(5.0))
    assert not space.start(torch.zeros(5))
    while space.ahead:
        space.step()
    assert len(space) == 4
    assert torch.allclose(space.ritz()[0], torch.tensor([1.0, 1, 3, 3]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_symmetric_is_refused(dtype):
    a = symmetric(30).to(dtype)
    grown(a, 1, 20)
    skew = torch.zeros_like(a)
    skew[3, 5] = 0.05 if dtype == torch.float64 else 1.0
    with pytest.raises(NotSymmetricError, match=r"differ by .* at a norm of"):
        grown(a + skew, 1, 20)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"product number 1 .* not finite"):
        grown(torch.full((4, 4), torch.nan), 1, 1)
    space = Krylov(lambda v: v, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match="finite start vector"):
        space.start(torch.full((3,), torch.inf))
