"""The geometry of clouds of points against closed forms, brute force and SciPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from scipy.stats import ortho_group, spearmanr
from torch import nn

import nettrace as nt
from nettrace.measures import similarity
from nettrace.measures.similarity import cka, hsic
from nettrace.statistics import Statistics


def identity(units):
    """A network whose only layer, "0", gives what it is given."""
    layer = nn.Linear(units, units, bias=False).double()
    nn.init.eye_(layer.weight)
    return nn.Sequential(layer)


def of(points, *names, targets=None):
    """The records of measures of a cloud of points (N, d), of one layer, by name."""
    points = torch.as_tensor(points, dtype=torch.float64)
    targets = None if targets is None else torch.as_tensor(targets)
    tracer = nt.Tracer(nt.Probe(points, targets), names, on_error="raise", max_seconds=None)
    return {r.name: r for r in tracer(identity(points.shape[1]), 0)}


def one(points, name, targets=None):
    """The value and standard error of one measure."""
    record = of(points, name, targets=targets)[name]
    assert record.coordinates["representation"] == ["0"]
    return float(record.value[0]), float(record.standard_error[0])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def kernels(*several):
    """(1, n, n) centred Gram matrices."""
    return [torch.tensor((x - x.mean(0)) @ (x - x.mean(0)).T)[None] for x in several]


# Participation ratio ------------------------------------------------------------------------------


def test_participation_ratio_of_a_known_covariance():
    values = np.array([5.0, 3.0, 1.0, 0.5])
    basis = np.linalg.qr(np.hstack([np.ones((30, 1)), normal(30, 4)]))[0][:, 1:]
    found, _ = one(basis * np.sqrt(values), "geometry/participation_ratio")
    assert found == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-12)


def test_participation_ratio_of_isotropic_samples():
    """1 / PR = 1 / d + 1 / (N - 1), and d once corrected (SCIENCE: 45.45 for d = 50, N = 500)."""
    raw = [one(normal(200, 50, seed=s), "geometry/participation_ratio")[0] for s in range(5)]
    assert np.mean(raw) == pytest.approx(1 / (1 / 50 + 1 / 199), rel=0.01)
    name = "geometry/participation_ratio_corrected"
    found = [one(normal(200, 50, seed=s), name)[0] for s in range(10)]
    assert np.mean(found) == pytest.approx(50, abs=4 * np.std(found) / 10**0.5)


@pytest.mark.parametrize("kind", ["", "_corrected"])
def test_errors_of_participation_ratios_are_calibrated(kind):
    """Where directions differ; where all are alike, errors are twice too wide."""
    widths = np.array([4.0, 2, 1, 1, 0.5])
    name = f"geometry/participation_ratio{kind}"
    values, errors = np.array([one(normal(100, 5, seed=s) * widths, name) for s in range(30)]).T
    assert 0.65 < values.std() / errors.mean() < 1.4
    if kind:
        true = (widths**2).sum() ** 2 / (widths**4).sum()
        assert abs(values.mean() - true) < 3 * values.std() / 30**0.5


def test_corrected_ratio_is_one_of_unbiased_estimates():
    """Against sums over all quadruples of distinct samples, one by one."""
    x = normal(7, 3)
    squared, square = [], []
    for i, j, k, l in itertools.permutations(range(7), 4):  # noqa: E741
        one_pair, other = x[i] - x[j], x[k] - x[l]
        squared.append((one_pair @ one_pair) * (other @ other) / 4)
        square.append((one_pair @ other) ** 2 / 4)
    found, _ = one(x, "geometry/participation_ratio_corrected")
    assert found == pytest.approx(np.mean(squared) / np.mean(square), rel=1e-12)


# Intrinsic dimension ------------------------------------------------------------------------------


def circle(n, rng):
    t = rng.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(t), np.sin(t), 0.3 * np.cos(3 * t)], 1)


def sphere(n, rng):
    x = rng.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def torus(n, rng, d=3):
    t = rng.uniform(0, 2 * np.pi, (n, d))
    return np.hstack([np.cos(t), np.sin(t)])


def curved_torus(n, rng):
    """One of revolution, which is curved, uniform by area."""
    u, v = [], []
    while len(u) < n:
        a, b = rng.uniform(0, 2 * np.pi, 2)
        if rng.uniform() < (2 + np.cos(b)) / 3:
            u.append(a), v.append(b)
    u, v = np.array(u), np.array(v)
    return np.stack([(2 + np.cos(v)) * np.cos(u), (2 + np.cos(v)) * np.sin(u), np.sin(v)], 1)


MANIFOLDS = {"circle": (circle, 1), "sphere": (sphere, 2), "torus": (torus, 3)}
MANIFOLDS["curved torus"] = (curved_torus, 2)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_dimension_of_manifolds(manifold):
    """In a rotated space of 12 dimensions, within errors of which the scatter is as stated."""
    draw, dimension = MANIFOLDS[manifold]
    scores = {"geometry/dimension_two_nn": [], "geometry/dimension_mle": []}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        points = draw(600, rng)
        points = np.pad(points, ((0, 0), (0, 12 - points.shape[1]))) @ ortho_group.rvs(
            12, random_state=seed
        )
        for name, record in of(points, *scores).items():
            if name in scores:
                scores[name].append((record.value[0] - dimension) / record.standard_error[0])
    two, mle = (np.array(found) for found in scores.values())
    assert np.abs(two).max() < 3.5
    assert abs(two.mean()) < 3 / 8**0.5
    # Ten neighbours reach far enough to see curvature: 3 % of the dimension here.
    assert np.abs(mle).max() < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometry/dimension_two_nn", "geometry/dimension_mle"])
def test_errors_of_dimensions_are_calibrated(name):
    found = np.array([one(torus(500, np.random.default_rng(s), 2), name) for s in range(80)])
    values, errors = found.T
    assert 0.8 < values.std() / errors.mean() < 1.25
    # Independent logarithms would have the error d / sqrt(N (k - 1)).
    assert errors.mean() > values.mean() / math.sqrt(500 * (1 if "two" in name else 9))


def test_dimension_by_brute_force():
    x = normal(40, 5)
    near = np.sort(cdist(x, x), 1)
    found, _ = one(x, "geometry/dimension_two_nn")
    assert found == pytest.approx(39 / np.log(near[:, 2] / near[:, 1]).sum(), rel=1e-10)
    logs = np.log(near[:, 10:11] / near[:, 1:10]).mean(1)
    found, _ = one(x, "geometry/dimension_mle")
    assert found == pytest.approx((1 - 1 / 360) / logs.mean(), rel=1e-10)


def test_samples_that_are_the_same_count_as_one():
    x = normal(40, 5)
    names = ["geometry/dimension_two_nn", "geometry/dimension_mle"]
    single, double = of(x, *names), of(np.vstack([x, x[:20]]), *names)
    for name in names:
        assert single[name].value == pytest.approx(double[name].value, rel=1e-12)


def test_dimension_far_from_the_origin():
    x = normal(40, 5)
    found, _ = one(1e6 + x, "geometry/dimension_two_nn")
    assert found == pytest.approx(one(x, "geometry/dimension_two_nn")[0], rel=1e-6)


# Similarity ---------------------------------------------------------------------------------------


def brute_hsic(k, l):  # noqa: E741
    """HSIC_1 by sums over all quadruples of distinct samples (Song et al. 2012, eq. 4)."""
    total = 0.0
    for i, j, q, r in itertools.permutations(range(len(k)), 4):
        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
    n = len(k)
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_hsic_by_brute_force():
    (k,), (l,) = kernels(normal(7, 3)), kernels(normal(7, 2, seed=1))  # noqa: E741
    assert float(hsic(k, l)) == pytest.approx(brute_hsic(k[0].numpy(), l[0].numpy()), rel=1e-10)
    assert float(hsic(k, k)) == pytest.approx(brute_hsic(k[0].numpy(), k[0].numpy()), rel=1e-10)


clouds = st.tuples(st.integers(5, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))


@given(clouds)
@settings(max_examples=30)
def test_cka_identities(sizes):
    n, d, e, seed = sizes
    x, y = normal(n, d, seed=seed), normal(n, e, seed=seed + 100)
    x, y = torch.tensor(x), torch.tensor(y)
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-9) or cka(x, x) == 0  # of noise alone
    assert cka(x, y) == pytest.approx(cka(y, x), rel=1e-9, abs=1e-12)
    assert cka(3 * x @ q + 5, y) == pytest.approx(cka(x, y), rel=1e-6, abs=1e-9)
    order = torch.randperm(n)
    assert cka(x[order], y[order]) == pytest.approx(cka(x, y), rel=1e-6, abs=1e-9)


def test_cka_of_independent_units_is_zero():
    """Where the plain estimate is p / (p + n): 0.5 for 100 units and samples (SCIENCE A11)."""
    found = [
        cka(torch.tensor(normal(100, 100, seed=s)), torch.tensor(normal(100, 100, seed=s + 50)))
        for s in range(30)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 30**0.5
    assert np.std(found) < 0.05


def test_errors_of_cka_are_calibrated():
    mix = normal(6, 8, seed=99)
    found = []
    for seed in range(40):
        x = normal(80, 6, seed=seed)
        y = x @ mix + normal(80, 8, seed=seed + 1000)
        value, error = one(x, "geometry/cka_targets", targets=y)
        assert value == pytest.approx(cka(torch.tensor(x), torch.tensor(y)), rel=1e-9)
        found.append((value, error))
    values, errors = np.array(found).T
    assert 0.6 < values.std() / errors.mean() < 1.4


def test_minibatches(monkeypatch):
    monkeypatch.setattr(Statistics, "minibatch", 20)
    x = normal(60, 4)
    y = x[:, :2] + 0.5 * normal(60, 2, seed=1)
    value, _ = one(x, "geometry/cka_targets", targets=y)
    parts = [(x[i::3], y[i::3]) for i in range(3)]
    products = [
        np.mean([float(hsic(*kernels(p[a], p[b]))) for p in parts])
        for a, b in ((0, 1), (0, 0), (1, 1))
    ]
    assert value == pytest.approx(products[0] / math.sqrt(products[1] * products[2]), rel=1e-9)


def test_cka_of_classes_and_between_layers_and_looks():
    x, y = torch.tensor(normal(40, 6)), torch.arange(40) % 4
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    names = ["geometry/cka_layers", "geometry/cka_targets", "geometry/cka_inputs"]
    names += ["geometry/cka_first", "geometry/cka_previous"]
    tracer = nt.Tracer(nt.Probe(x, y), names, on_error="raise", max_seconds=None)
    before = nt.activations(model, nt.Probe(x))
    first = {r.name: r for r in tracer(model, 0)}
    assert first["geometry/cka_first"].value == pytest.approx(1)
    assert "geometry/cka_previous" not in first
    with torch.no_grad():
        model[0].weight.add_(0.5)
    after = nt.activations(model, nt.Probe(x))
    second = {r.name: r for r in tracer(model, 1)}
    for name in ("geometry/cka_first", "geometry/cka_previous"):
        expected = [cka(before[k], after[k]) for k in "012"]
        assert second[name].value == pytest.approx(expected, rel=1e-9)
    onehot = torch.nn.functional.one_hot(y).double()
    expected = [cka(after[k], onehot) for k in "012"]
    assert second["geometry/cka_targets"].value == pytest.approx(expected, rel=1e-9)
    expected = [cka(after[k], x) for k in "012"]
    assert second["geometry/cka_inputs"].value == pytest.approx(expected, rel=1e-9)
    expected = np.array([[cka(after[k], after[j]) for j in "012"] for k in "012"])
    assert second["geometry/cka_layers"].value == pytest.approx(expected, rel=1e-9)


def test_rank_correlations():
    x, y = normal(30, 4), np.arange(30) % 3
    target = pdist(np.eye(3)[y])
    value, _ = one(x, "geometry/rsa_targets", targets=y)
    assert value == pytest.approx(spearmanr(pdist(x), target).statistic, rel=1e-9)
    z = normal(30, 2, seed=1)
    value, _ = one(x, "geometry/rsa_targets", targets=z)
    assert value == pytest.approx(spearmanr(pdist(x), pdist(z)).statistic, rel=1e-9)
    assert one(x, "geometry/rsa_inputs")[0] == pytest.approx(1)


def test_errors_of_rank_correlations_are_calibrated():
    found = []
    for seed in range(40):
        x = normal(60, 4, seed=seed)
        y = x[:, :2] + normal(60, 2, seed=seed + 1000)
        found.append(one(x, "geometry/rsa_targets", targets=y))
    values, errors = np.array(found).T
    assert 0.6 < values.std() / errors.mean() < 1.5


# Classes ------------------------------------------------------------------------------------------


def test_separation_by_brute_force():
    x, y = normal(30, 4), np.repeat([0, 1, 5], [5, 10, 15])
    x[:5] += 3
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = 1 - unit @ unit.T
    labels = np.unique(y)
    inner = np.mean([apart[np.ix_(y == k, y == k)].mean() for k in labels])
    outer = np.mean([apart[np.ix_(y == j, y == k)].mean() for j in labels for k in labels])
    assert one(x, "geometry/separation", targets=y)[0] == pytest.approx(1 - inner / outer)


# Bad input ----------------------------------------------------------------------------------------

OF_LAYERS = ["participation_ratio", "participation_ratio_corrected", "dimension_two_nn"]
OF_LAYERS += ["dimension_mle", "cka_inputs", "cka_targets", "rsa_inputs", "rsa_targets"]
OF_LAYERS += ["separation", "cka_layers", "cka_first"]


def taken(model, probe, names):
    tracer = nt.Tracer(probe, names, on_error="raise", max_seconds=None)
    return {r.name: r for r in tracer(model, 0)}


@pytest.mark.parametrize("kind", ["all", "constant"])
def test_constant_activations_have_dimension_and_similarity_0(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0 if kind == "all" else 0.7)
    names = [f"geometry/{name}" for name in OF_LAYERS]
    probe = nt.Probe(torch.tensor(normal(20, 4)), torch.arange(20) % 3)
    for name, record in taken(model, probe, names).items():
        if name.startswith("geometry/"):
            assert np.array_equal(record.value, np.zeros_like(record.value)), name
            assert np.array_equal(record.standard_error, np.zeros_like(record.value)), name


def test_points_equally_far_apart_have_no_finite_dimension():
    assert one(np.eye(20), "geometry/dimension_two_nn") == (math.inf, 0)


@pytest.mark.parametrize("samples", [1, 4])
def test_too_few_samples(samples):
    with pytest.raises(ValueError, match=f"5 samples or more, got {samples}"):
        one(normal(samples, 3), "geometry/participation_ratio")


def test_one_class():
    with pytest.raises(ValueError, match="one class"):
        one(normal(20, 3), "geometry/separation", targets=np.zeros(20, int))


def test_what_is_not_finite():
    with pytest.raises(ValueError, match="'0' are not finite"):
        one(np.full((20, 3), np.nan), "geometry/dimension_two_nn")


def test_other_samples():
    with pytest.raises(ValueError, match="same 4 samples or more, got 5 and 6"):
        similarity.cka(torch.randn(5, 2), torch.randn(6, 2))


def test_targets_that_are_no_classes():
    assert "geometry/separation" not in of(
        normal(20, 3), "geometry/separation", "geometry/dimension_mle", targets=normal(20, 3)
    )
