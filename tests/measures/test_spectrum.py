"""The kernel's spectrum: closed forms, brute force, invariances."""

import math

import numpy as np
import pytest
import torch
from features import Features, measured, normal, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrace as nt
from nettrace.measures import spectrum
from nettrace.statistics import Statistics

BOTH = ["ntk/entropy{}", "ntk/effective_rank{}", "ntk/participation_ratio{}"]


def test_eigenvalues_are_bitwise_what_they_were_unless_vectors_are_wanted():
    x = normal(5, 2, 7)
    for need in ("eigenvalues", "traced_eigenvalues"):
        plain = Statistics(Features(7), nt.Probe(x), [need])
        kernel = plain.traced_gram if "traced" in need else plain.gram.reshape(10, 10)
        true = torch.linalg.eigvalsh(kernel).flip(0)
        assert torch.equal(getattr(plain, need), true)
        vectors = need.replace("values", "vectors")
        both = Statistics(Features(7), nt.Probe(x), [need, vectors])
        values, v = getattr(both, need), getattr(both, vectors).reshape(len(kernel), -1)
        assert torch.equal(values, torch.linalg.eigh(kernel)[0].flip(0))
        assert torch.allclose(v.T @ v, torch.eye(len(v)).double(), atol=1e-13)
        assert torch.allclose(v @ values.diag() @ v.T, kernel, atol=1e-12)


def geometric(n, q):
    """sum l, sum l^2 of 1, q, ..., q^(n - 1)."""
    return (1 - q**n) / (1 - q), (1 - q ** (2 * n)) / (1 - q**2)


#: Square roots of kernels of 6 samples with one output, and their participation ratios.
RATIOS = {
    "identity": lambda: (rotation(6), 6),
    "rank-one": lambda: (torch.ones(6, 1).double() * normal(4), 1),
    "projector": lambda: (rotation(6)[:, :3], 3),
    "geometric": lambda: (
        torch.diag(0.3 ** (torch.arange(6).double() / 2)),
        geometric(6, 0.3)[0] ** 2 / geometric(6, 0.3)[1],
    ),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("kind", RATIOS)
def test_participation_ratio_of_known_spectrum(kind, outputs):
    root, true = RATIOS[kind]()
    jacobian = torch.einsum("np,cd->ncdp", root, torch.eye(outputs).double()).flatten(2)
    found = measured(jacobian, "ntk/participation_ratio", "ntk/participation_ratio_traced")
    assert found["ntk/participation_ratio"].value == pytest.approx(true * outputs, rel=1e-12)
    assert found["ntk/participation_ratio_traced"].value == pytest.approx(true, rel=1e-12)


def test_condition_and_smallest_eigenvalue():
    jacobian = (rotation(6) * 0.3 ** torch.arange(6).double()).unsqueeze(1) @ rotation(6)
    for suffix in ("", "_traced"):
        names = [f"ntk/condition_number{suffix}", f"ntk/smallest_eigenvalue{suffix}"]
        condition, smallest = list(measured(jacobian, *names).values())[:2]
        assert condition.value == pytest.approx(0.3**-10, rel=1e-9)
        assert smallest.value == pytest.approx(0.3**10, rel=1e-9)
        assert condition.attributes["resolved_modes"] == smallest.attributes["resolved_modes"] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_condition_of_a_singular_kernel_is_a_bound(dtype):
    jacobian = (rotation(8)[:, :3].unsqueeze(1) @ rotation(3)).to(dtype)
    found = measured(jacobian, "ntk/condition_number", "ntk/smallest_eigenvalue")
    condition, smallest = found["ntk/condition_number"], found["ntk/smallest_eigenvalue"]
    assert condition.value == pytest.approx(1 / (8 * torch.finfo(dtype).eps), rel=1e-4)
    assert condition.attributes["resolved_modes"] == 3
    assert abs(smallest.value) < smallest.attributes["rounding"]


def test_no_kernel_has_no_condition():
    with pytest.raises(ValueError, match="zero"):
        measured(torch.zeros(3, 1, 2).double(), "ntk/condition_number")


def test_trace_per_output_is_the_mean_and_errors_are_over_samples():
    jacobian = normal(7, 3, 4)
    found = measured(jacobian, "ntk/trace", "ntk/trace_per_output", "ntk/trace_per_layer")
    shares = jacobian.square().sum((1, 2)).numpy()
    whole, mean, layers = list(found.values())[:3]
    assert whole.value == pytest.approx(shares.sum(), rel=1e-13)
    assert mean.value == pytest.approx(shares.mean() / 3, rel=1e-13)
    assert mean.standard_error == pytest.approx(shares.std(ddof=1) / 7**0.5 / 3, rel=1e-12)
    for record in (whole, layers):
        assert record.standard_error == pytest.approx(shares.std(ddof=1) * 7**0.5, rel=1e-12)
        assert record.attributes["error_of"] == "samples"


def test_traced_spectrum_is_that_of_the_sum_over_outputs():
    jacobian = normal(4, 3, 9)
    kernel = sum(jacobian[:, c] @ jacobian[:, c].T for c in range(3)).numpy()
    found = measured(jacobian, "ntk/spectrum", "ntk/spectrum_traced")
    true = np.linalg.eigvalsh(kernel)[::-1]
    assert found["ntk/spectrum_traced"].value == pytest.approx(true, rel=1e-11)
    assert found["ntk/spectrum"].value.shape == (12,)
    assert found["ntk/spectrum"].dims != found["ntk/spectrum_traced"].dims


def test_entropy_of_few_samples_is_too_low_by_the_stated_amount():
    m, n, repeats = 20, 60, 200
    a = normal(repeats, m, n)
    found = np.array([float(spectrum.shannon(e)) for e in torch.linalg.eigvalsh(a @ a.mT)])
    assert found.mean() == pytest.approx(2.8214, abs=4 * found.std() / repeats**0.5 + 5e-4)
    assert abs(found.mean() - (math.log(m) - m / (2 * n))) < 0.01


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(2, 6),
    outputs=st.integers(1, 3),
    parameters=st.integers(1, 9),
    scale=st.integers(-8, 8).map(lambda power: 10.0**power),
)
def test_entropies_and_ranks_are_invariant(seed, samples, outputs, parameters, scale):
    """Under scaling, permutation of samples, rotation of outputs; with their errors."""
    torch.manual_seed(seed)
    jacobian, order = normal(samples, outputs, parameters), torch.randperm(samples)
    turned = scale * torch.einsum("cd,ndp->ncp", rotation(outputs), jacobian[order])
    names = [name.format(suffix) for name in BOTH for suffix in ("", "_traced")]
    a, b = measured(jacobian, *names), measured(turned, *names)
    for name in names:
        assert a[name].value == pytest.approx(b[name].value, rel=1e-8, abs=1e-8)
        assert a[name].standard_error == pytest.approx(b[name].standard_error, rel=1e-6, abs=1e-6)
    for suffix, modes in (("", samples * outputs), ("_traced", samples)):
        entropy, rank, ratio = (a[name.format(suffix)].value for name in BOTH)
        assert -1e-9 <= entropy <= math.log(modes) + 1e-9
        assert 1 - 1e-9 <= ratio <= rank * (1 + 1e-9)  # Renyi's entropies fall with their order
