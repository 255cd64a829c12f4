"""Measures of last-layer uncertainties, against scores computed otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

import nettrace as nt
from nettrace.uncertainty import scores

NAMES = ["uncertainty", "uncertainty/variance"]


def drawn(count: int = 200, classes: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network on features, with errors that grow with them."""
    x = torch.randn(count, 4, dtype=torch.float64)
    model = nn.Linear(4, 3 if classes else 1).double()
    with torch.no_grad():
        clean = model(x)
    if classes:
        return model, x, (clean + torch.randn_like(clean)).argmax(1)
    return model, x, clean + x.norm(dim=1, keepdim=True) * torch.randn_like(clean)


def measured(model: nn.Module, x: Any, y: Any, names: Any = NAMES, **options: Any) -> Any:
    probe = nt.Probe(x, y, **options)
    return {r.name: r for r in nt.Tracer(probe, names)(model, step=0)}


def test_of_numbers() -> None:
    model, x, y = drawn()
    found = measured(model, x, y)
    variance = found["uncertainty/variance"].value
    residuals = (y - model(x)).detach().numpy()[:, 0]
    losses = -norm.logpdf(residuals, scale=np.sqrt(variance))
    nll = found["uncertainty/nll"]
    np.testing.assert_allclose(nll.value, losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(nll.standard_error, losses.std(ddof=1) / 200**0.5, rtol=1e-12)
    nominal, observed = found["uncertainty/calibration"].value
    np.testing.assert_allclose(nominal, np.arange(1, 16) / 16)
    quantiles = norm.ppf(nominal[:, None], scale=np.sqrt(variance))
    np.testing.assert_allclose(observed, (residuals <= quantiles).mean(1), atol=1e-12)
    expected = np.abs(observed - nominal).mean()
    np.testing.assert_allclose(found["uncertainty/ece"].value, expected)
    np.testing.assert_allclose(found["uncertainty/sharpness"].value, np.sqrt(variance).mean())
    # Errors that grow with the features are what these variances are made for.
    assert nll.value < found["uncertainty/nll_plain"].value - 2 * nll.standard_error
    assert found["uncertainty/ece"].value < 0.06


def test_of_a_constant_variance_there_is_no_gain() -> None:
    model, x, _ = drawn(1000)
    y = model(x).detach() + torch.randn(1000, 1)
    found = measured(model, x, y)
    nll, plain = found["uncertainty/nll"], found["uncertainty/nll_plain"]
    assert nll.value > plain.value
    assert float(plain.value) == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.1)


def test_of_classes() -> None:
    model, x, y = drawn(classes=True)
    with torch.no_grad():
        model.weight.mul_(4)  # sure of itself
    found = measured(model, x, y)
    nll, plain = found["uncertainty/nll"], found["uncertainty/nll_plain"]
    with torch.no_grad():
        z, v = model(x), torch.tensor(found["uncertainty/variance"].value)[:, None]
    expected = torch.nn.functional.cross_entropy(z, y)
    np.testing.assert_allclose(plain.value, expected, rtol=1e-12)
    p = (z / (1 + torch.pi / 8 * v).sqrt()).softmax(1)
    np.testing.assert_allclose(nll.value, -p[range(200), y].log().mean(), rtol=1e-12)
    assert nll.value < plain.value - 2 * nll.standard_error
    confidence, chosen = p.max(1)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            off = (chosen == y)[inside].double().mean() - confidence[inside].mean()
            ece += float(inside.double().mean() * off.abs())
    np.testing.assert_allclose(found["uncertainty/ece"].value, ece, rtol=1e-9)
    curve = found["uncertainty/calibration"].value
    assert curve.shape == (2, 15)
    np.testing.assert_allclose(found["uncertainty/sharpness"].value, confidence.mean())
    weights = [len(part) for part in np.array_split(np.arange(200), 15)]
    np.testing.assert_allclose(np.average(curve[0], weights=weights), confidence.mean())


def test_standard_errors_are_the_scatter_over_probes() -> None:
    values, errors = [], []
    model = nn.Linear(4, 1).double()
    for _ in range(60):
        x = torch.randn(80, 4, dtype=torch.float64)
        y = model(x).detach() + x.norm(dim=1, keepdim=True) * torch.randn(80, 1).double()
        found = measured(model, x, y, ["uncertainty/nll"])["uncertainty/nll"]
        values.append(float(found.value))
        errors.append(float(found.standard_error))
    ratio = np.mean(errors) / np.std(values, ddof=1)
    assert 0.7 < ratio < 1.4


def test_each_sample_is_judged_without_itself() -> None:
    model, x, y = drawn(40)
    before = measured(model, x, y)["uncertainty/variance"].value
    y[7] += 100
    after = measured(model, x, y)["uncertainty/variance"].value
    changed = np.abs(after / before - 1) > 1e-9
    assert not changed[7]
    assert changed.sum() == 20


def test_positions_and_several_outputs() -> None:
    model = nn.Linear(4, 2).double()
    x = torch.randn(30, 5, 4).double()
    y = model(x).detach() + torch.randn(30, 5, 2)
    found = measured(model, x, y)
    assert found["uncertainty/variance"].value.shape == (30,)
    variances = y.sub(model(x)).detach().square().mean((0, 1))
    expected = 5 * (0.5 * (2 * torch.pi * torch.e * variances).log()).sum()
    assert float(found["uncertainty/nll_plain"].value) == pytest.approx(float(expected), rel=0.05)


def test_what_is_missing_says_why() -> None:
    model, x, y = drawn(40, classes=True)
    with pytest.warns(nt.MissingMeasureWarning):
        found = measured(nn.Sequential(model, nn.Softmax(1)), x, y, ["uncertainty/nll"])
    assert "behind it stands softmax" in found["uncertainty/nll"].missing
    with pytest.warns(nt.MissingMeasureWarning):
        found = measured(model, x, y * 0, ["uncertainty/nll"])
    assert "of class 0" in found["uncertainty/nll"].missing
    with pytest.warns(nt.MissingMeasureWarning):
        found = measured(model, x[:3], y[:3], ["uncertainty/nll"])
    assert "a probe of at least 4 samples, got 3" in found["uncertainty/nll"].missing
    found = measured(model, x, (x[:, :3] > 0).double(), ["uncertainty/nll"], likelihood="bernoulli")
    assert "uncertainty/nll" not in found


def test_coverage_of_normal_residuals_is_nominal() -> None:
    nominal, observed = scores.coverage(3 * torch.randn(20000), torch.full((20000,), 9.0))
    assert float((nominal - observed).abs().max()) < 0.01
