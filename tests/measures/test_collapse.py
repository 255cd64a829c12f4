"""Neural collapse against closed forms on a simplex, and NumPy on any features."""

import numpy as np
import pytest
import torch
from torch import nn

import nettrace as nt

K, D, RADIUS = 4, 6, 3.0
NAMES = [m.name for m in nt.measures.resolve("geometry") if "/nc" in m.name]


def simplex():
    """K vertices (K, D), equally long and far apart, around the origin."""
    corners = np.eye(K) - 1 / K
    corners *= RADIUS / np.linalg.norm(corners[0])
    return np.pad(corners, ((0, 0), (0, D - K)))


def around(centres, width):
    """Samples around each centre of which the covariance is width^2 times the unit matrix."""
    steps = np.vstack([np.eye(D), -np.eye(D)]) * width * np.sqrt(D)
    return np.vstack([c + steps for c in centres]), np.repeat(np.arange(K), 2 * D)


def collapse(features, classes, weight, names=NAMES):
    """The measures of a network that is a last layer alone."""
    head = nn.Linear(features.shape[1], len(weight)).double()
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.zero_()
    probe = nt.Probe(torch.as_tensor(features), torch.as_tensor(classes))
    tracer = nt.Tracer(probe, names, on_error="raise", max_seconds=None)
    return {r.name.partition("/")[2]: r for r in tracer(head, 0)}


def test_simplex():
    """S_B = r^2 / (K - 1) on K - 1 axes, so that NC1 = width^2 (K - 1)^2 / (K r^2)."""
    width = 0.3
    features, classes = around(simplex() + 5.0, width)
    found = collapse(features, classes, 7 * simplex())
    closed = width**2 * (K - 1) ** 2 / (K * RADIUS**2)
    assert float(found["nc1_variability"].value) == pytest.approx(closed, rel=1e-10)
    for name in ("nc2_equinorm", "nc2_equiangular", "nc2_maximal_angle", "nc3_self_duality"):
        assert float(found[name].value) == pytest.approx(0, abs=1e-10), name
    assert 0 <= float(found["nc4_nearest_mean"].value) <= 1


def test_total_collapse_is_zero():
    features = np.repeat(simplex(), 6, axis=0)
    found = collapse(features, np.repeat(np.arange(K), 6), simplex())
    for name, record in found.items():
        if name.startswith("nc"):
            assert float(record.value) == pytest.approx(0, abs=1e-12), name
            assert float(record.standard_error) == pytest.approx(0, abs=1e-12), name


def test_a_classifier_that_points_the_other_way():
    found = collapse(np.repeat(simplex(), 6, axis=0), np.repeat(np.arange(K), 6), -simplex())
    assert float(found["nc3_self_duality"].value) == pytest.approx(4)
    assert float(found["nc4_nearest_mean"].value) == 1


def test_any_features_by_numpy():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 2, 3], [8, 12, 20])  # one class of the head is not in the probe
    features = rng.normal(size=(40, D)) + 2 * rng.normal(size=(4, D))[classes]
    weight = rng.normal(size=(4, D))
    found = {k: r.value for k, r in collapse(features, classes, weight).items()}
    labels = [0, 2, 3]
    means = np.stack([features[classes == k].mean(0) for k in labels])
    centred = means - means.mean(0)
    between = centred.T @ centred / 3
    within = np.mean(
        [np.cov(features[classes == k].T, bias=True) for k in labels],
        axis=0,
    )
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / 3
    assert found["nc1_variability"] == pytest.approx(nc1, rel=1e-8)
    norms = np.linalg.norm(centred, axis=1)
    assert found["nc2_equinorm"] == pytest.approx(norms.std() / norms.mean())
    cosines = (centred @ centred.T / np.outer(norms, norms))[np.triu_indices(3, 1)]
    assert found["nc2_equiangular"] == pytest.approx(cosines.std())
    assert found["nc2_maximal_angle"] == pytest.approx(np.abs(cosines + 0.5).mean())
    chosen = weight[labels]
    gap = chosen / np.linalg.norm(chosen) - centred / np.linalg.norm(centred)
    assert found["nc3_self_duality"] == pytest.approx((gap**2).sum())
    apart = ((features[:, None] - means) ** 2).sum(-1)
    nearest = np.array(labels)[apart.argmin(1)]
    decided = (features @ weight.T).argmax(1)
    assert found["nc4_nearest_mean"] == pytest.approx((nearest != decided).mean())


def test_errors_are_calibrated():
    centres = np.random.default_rng(99).normal(size=(K, D))
    weight = np.random.default_rng(98).normal(size=(K, D))
    names = ["geometry/nc1_variability", "geometry/nc3_self_duality"]
    values, errors = {n: [] for n in names}, {n: [] for n in names}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        classes = np.arange(160) % K
        features = centres[classes] + 0.5 * rng.normal(size=(160, D))
        found = collapse(features, classes, weight, names)
        for name in names:
            record = found[name.partition("/")[2]]
            values[name].append(float(record.value))
            errors[name].append(float(record.standard_error))
    for name in names:
        assert 0.65 < np.std(values[name]) / np.mean(errors[name]) < 1.5, name


def test_of_a_network_and_of_functions_alone():
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.b1 = model[0].weight, model[0].bias
            self.w2, self.b2 = model[2].weight, model[2].bias

        def forward(self, x):
            return (x @ self.w1.T + self.b1).relu() @ self.w2.T + self.b2

    tracers = [nt.Tracer(nt.Probe(x, y), NAMES, on_error="raise") for _ in range(2)]
    one, other = (
        [r for r in t(m, 0) if "/nc" in r.name]
        for t, m in zip(tracers, (model, Functional()), strict=True)
    )
    for a, b in zip(one, other, strict=True):
        assert float(a.value) == pytest.approx(float(b.value), rel=1e-4), a.name


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_class(name):
    with pytest.raises(ValueError, match="two classes or more, the probe has 1"):
        collapse(
            np.random.default_rng(0).normal(size=(8, D)), np.zeros(8, int), np.ones((2, D)), [name]
        )


def test_constant_features():
    names = [n for n in NAMES if "nc4" not in n]
    for name in names:
        with pytest.raises(ValueError, match="the mean"):
            collapse(np.ones((8, D)), np.arange(8) % 2, np.ones((2, D)), [name])


def test_classes_that_the_head_does_not_have():
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        collapse(
            np.random.default_rng(0).normal(size=(8, D)),
            *(np.arange(8) % 4, np.ones((2, D)), ["geometry/nc3_self_duality"]),
        )


def test_a_class_of_one_sample_has_no_error():
    features, classes = around(simplex(), 0.3)
    features = np.vstack([features, [[9.0, 8, 7, 6, 5, 4]]])
    classes = np.append(classes, K)
    record = collapse(features, classes, np.ones((K + 1, D)), NAMES[:1])["nc1_variability"]
    assert np.isfinite(record.value)
    assert record.standard_error is None


def test_a_head_that_is_not_linear():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    probe = nt.Probe(torch.randn(9, 4), torch.arange(9) % 3, likelihood="categorical")
    with pytest.raises(ValueError, match="softmax"):
        nt.Tracer(probe, NAMES, on_error="raise")(model, 0)
