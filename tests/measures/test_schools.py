"""What each school makes of a kernel: by hand, by the schools' formulas and by their packages."""

import importlib
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nettrace as nt
from nettrace.measures import available, collective, schools, spectrum

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measured(model, probe, *names):
    """The records of some measures by name; whatever goes wrong is raised."""
    return {
        r.name: r
        for r in nt.Tracer(probe, names, on_error="raise", max_seconds=None)(model, step=0)
    }


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False).double()


@pytest.fixture
def formulas(monkeypatch):
    """The schools' own, which `benchmarks/schools.py` has, and share nothing with nettrace."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("schools")


# By hand ------------------------------------------------------------------------------------------

PAPYRUS = [
    f"collective/{quantity}_papyrus"
    for quantity in ("trace", "entropy", "magnitude_distribution", "self_entropy")
]

# K = [[1, 2, 0], [2, 4, 0], [0, 0, 9]]: the first block has trace 5 and determinant 0.
K = [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 9.0]]
EIGENVALUES = [9.0, 5.0, 0.0]
BLOCKS = [[[1.0]], [[4.0]], [[9.0]]]
ROOT = [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]  # K = ROOT ROOT^T

TRACE = 14 / 3
MAGNITUDES = [1 / 6, 2 / 6, 3 / 6]  # sqrt(1), sqrt(4), sqrt(9), over their sum
SELF_ENTROPY = 1.0114042647073518  # ln(6)/6 + ln(3)/3 + ln(2)/2
ENTROPY = 0.6517565611726531  # p = 9/14, 5/14: (9/14) ln(14/9) + (5/14) ln(14/5)
# At 1e-14 K the zero is raised to 1e-14, beside 9e-14 and 5e-14: p = 9/15, 5/15, 1/15 and the
# entropy 0.6 ln(5/3) + ln(3)/3 + ln(15)/15. At 1e-15 K all three are raised to it: ln(3).
CLIPPED = {1e-14: 0.8532361505557784, 1e-15: 1.0986122886681098}


@pytest.mark.parametrize(
    ("scale", "true"), [(1.0, ENTROPY), (1e6, ENTROPY), *CLIPPED.items()], ids=str
)
def test_papyrus_entropy_clips_before_it_normalises(scale, true):
    assert np.linalg.eigvalsh(K)[::-1] == pytest.approx(EIGENVALUES, abs=1e-14)
    eigenvalues = torch.tensor(EIGENVALUES, dtype=torch.float64) * scale
    assert float(schools.entropy(eigenvalues)) == pytest.approx(true, abs=1e-12)
    assert float(spectrum.shannon(eigenvalues)) == pytest.approx(ENTROPY, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_papyrus_of_blocks_by_hand(scale):
    blocks = torch.tensor(BLOCKS, dtype=torch.float64) * scale
    assert float(schools.mean_diagonal(blocks).value) == pytest.approx(TRACE * scale, rel=1e-14)
    assert schools.magnitude_distribution(blocks).tolist() == pytest.approx(MAGNITUDES)
    assert float(schools.self_entropy(blocks)) == pytest.approx(SELF_ENTROPY, rel=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-14])
def test_papyrus_of_network_with_that_kernel(scale):
    model, x = linear(2, 1), torch.tensor(ROOT, dtype=torch.float64) * scale**0.5
    found = {k: r.value for k, r in measured(model, nt.Probe(x), *PAPYRUS).items()}
    assert found["collective/trace_papyrus"] == pytest.approx(TRACE * scale, rel=1e-12)
    assert found["collective/entropy_papyrus"] == pytest.approx(
        CLIPPED.get(scale, ENTROPY), abs=1e-12
    )
    assert found["collective/magnitude_distribution_papyrus"] == pytest.approx(
        MAGNITUDES, rel=1e-12
    )
    assert found["collective/self_entropy_papyrus"] == pytest.approx(SELF_ENTROPY, rel=1e-12)


def test_papyrus_rows_count_outputs_within_samples():
    # sqrt of the diagonals 1, 4 | 9, 16: 1, 2, 3, 4 of 10; what is off the diagonal is not read
    blocks = torch.tensor([[[1.0, 7.0], [7.0, 4.0]], [[9.0, -5.0], [-5.0, 16.0]]])
    assert float(schools.mean_diagonal(blocks).value) == 30 / 4
    assert schools.magnitude_distribution(blocks).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # 0.1 ln(10) + 0.2 ln(5) + 0.3 ln(10/3) + 0.4 ln(5/2)
    assert float(schools.self_entropy(blocks)) == pytest.approx(1.2798542258336676, rel=1e-7)
    assert float(collective.chi_net(blocks)) == 30


def test_five_traces_of_one_kernel():
    # N = 2, C = 2: diagonals 1, 2 | 3, 6; per sample 3 and 9, whose mean is 6 and whose deviation
    # from it 3, so that the standard error is 3 sqrt(2) / sqrt(2) = 3.
    blocks = torch.diag_embed(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    for value, factor in [
        (schools.mean_diagonal(blocks), 1 / 2),
        (schools.regression_fisher_trace(blocks), 1),
        (schools.trace_per_target(blocks, torch.zeros(2)), 1),  # classes
        (schools.trace_per_target(blocks, torch.zeros(2, 5)), 1 / 5),  # five tokens each
        (schools.trace_per_target(blocks, torch.zeros(2, 2)), 1 / 2),  # one-hot
    ]:
        assert float(value.value) == pytest.approx(6 * factor, rel=1e-14)
        assert float(value.standard_error) == pytest.approx(3 * factor, rel=1e-14)


def test_magnitude_variance_by_hand():
    # norms 1, 2, 3, 4: mean 5/2, mean square 15/2; (15/2) / (25/4) - 1 = 1/5
    blocks = torch.diag_embed(torch.tensor([[1.0, 4.0], [9.0, 16.0]]))
    assert float(schools.magnitude_variance(blocks)) == pytest.approx(1 / 5, rel=1e-14)


def test_cosines_forget_the_norms():
    # rows of directions 1, 1, 2 of any lengths, and a zero row: cosines have the eigenvalues
    # 2, 1, 0 and 0, clipped at 1e-14; without the zero row there would be one zero fewer
    model, x = linear(2, 1), torch.tensor([[3.0, 0.0], [0.1, 0.0], [0.0, 7.0], [0.0, 0.0]])
    found = measured(model, nt.Probe(x.double()), "collective/covariance_entropy_papyrus")
    true = np.log(3) - 2 / 3 * np.log(2)
    assert found["collective/covariance_entropy_papyrus"].value == pytest.approx(true, abs=1e-11)


# By symmetry --------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)


def random_blocks(seed):
    j = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return j @ j.mT


@given(SEEDS, st.floats(1e-6, 1e6))
def test_magnitudes_forget_the_scale_and_the_order(seed, scale):
    blocks = random_blocks(seed)
    changed = scale * blocks[torch.randperm(4, generator=torch.Generator().manual_seed(seed))]
    for function in (schools.self_entropy, schools.magnitude_variance):
        assert float(function(changed)) == pytest.approx(float(function(blocks)), rel=1e-10)
    assert 0 <= float(schools.self_entropy(blocks)) <= np.log(12) + 1e-12


@given(SEEDS, st.floats(1e-6, 1e6))
def test_traces_scale_with_the_kernel(seed, scale):
    blocks = random_blocks(seed)
    for function in (schools.mean_diagonal, schools.regression_fisher_trace):
        once, more = function(blocks), function(scale * blocks)
        assert float(more.value) == pytest.approx(scale * float(once.value), rel=1e-10)
        error = scale * float(once.standard_error)
        assert float(more.standard_error) == pytest.approx(error, rel=1e-10)


@given(SEEDS)
def test_covariance_entropy_forgets_each_gradients_norm(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    norms = torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.1
    name = "collective/covariance_entropy_znnl"
    model = linear(6, 1)
    once, more = (measured(model, nt.Probe(inputs), name)[name].value for inputs in (x, norms * x))
    assert more == pytest.approx(once, rel=1e-9)


# By formulas --------------------------------------------------------------------------------------


def cross_entropies(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("member", ["mlp", "cnn", "gpt"])
def test_schools_of_a_network(member, one_hot, formulas):
    j = torch.cat(list(oracle.one_sample_jacobian(member).values()), -1).numpy()
    member = zoo.build(member)
    with torch.no_grad():
        outputs = member.forward(member.model, member.batch)
    n, c = outputs.shape
    classes = torch.arange(n) % c
    targets = F.one_hot(classes, c).double() if one_hot else classes
    probe = nt.Probe(member.batch, targets, forward=member.forward, losses=cross_entropies)
    found = measured(member.model, probe, "collective")

    kernel = np.einsum("ncp,mdp->ncmd", j, j)
    flat = kernel.reshape(n * c, n * c)
    g = formulas.derivative(outputs.numpy(), classes.numpy())
    traced = np.einsum("ncmc->nm", kernel) / c
    true = {
        **formulas.papyrus(flat, g),
        **formulas.znnl(flat, g),
        **formulas.perspic(j, g, n * c if one_hot else n),
        "collective/gram_neural_tangents": traced,
        "collective/trace_neural_tangents": traced.diagonal().mean(),
        "collective/trace_nngeometry": flat.trace() / n,
    }
    for name, value in true.items():
        assert found[name].value == pytest.approx(value, rel=1e-8, abs=1e-13), name
    assert {name for name in found if name.endswith(tuple(SCHOOLS))} <= set(true)


SCHOOLS = {
    "papyrus": "papyrus",
    "znnl": "ZnNL",
    "perspic": "perspic",
    "neural_tangents": "neural-tangents",
    "nngeometry": "nngeometry",
}


@pytest.mark.parametrize("school", SCHOOLS)
def test_a_school_says_so_in_each_convention(school):
    of_it = [m for m in available() if m.name.endswith("_" + school)]
    assert len(of_it) >= 1
    for measure in of_it:
        assert measure.convention.startswith(SCHOOLS[school]), measure.name


# By packages --------------------------------------------------------------------------------------


def test_nngeometry_agrees(formulas):
    pytest.importorskip("nngeometry")
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    true = formulas.nngeometry(model, x)
    found = measured(model, nt.Probe(x, y), *true)
    for name, value in true.items():
        assert found[name].value == pytest.approx(value, rel=1e-5, abs=1e-6), name
