"""Standard errors over samples: exact where that is known, and calibrated over fresh probes."""

from functools import cache

import numpy as np
import pytest
import torch
from features import measured, normal
from torch import nn

import nettrace as nt
from nettrace.jackknife import (
    bias_corrected,
    delete_one_error,
    infinitesimal_error,
    parts_of,
    spectral_error,
)
from nettrace.measures import spectrum


def test_errors_of_a_mean_and_of_a_sum():
    x = normal(9)
    s = x.numpy().std(ddof=1)
    assert float(infinitesimal_error(x / 9)) == pytest.approx(s / 3, rel=1e-13)
    assert float(infinitesimal_error(x)) == pytest.approx(s * 3, rel=1e-13)
    left = torch.stack([torch.cat([x[:n], x[n + 1 :]]).mean() for n in range(9)])
    assert float(delete_one_error(left)) == pytest.approx(s / 3, rel=1e-12)
    pairs = infinitesimal_error(torch.stack([x, 2 * x], 1))
    assert pairs.tolist() == pytest.approx([3 * s, 6 * s], rel=1e-13)


def test_one_sample_has_no_error():
    found = measured(normal(1, 2, 3), "ntk/entropy", "ntk/trace", "ntk/effective_rank_traced")
    for name in ("ntk/entropy", "ntk/trace", "ntk/effective_rank_traced"):
        assert np.isfinite(found[name].value)
        assert np.isnan(found[name].standard_error)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        measured(normal(1, 2, 3), "ntk/entropy_corrected")


FUNCTIONALS = {
    "entropy": spectrum.shannon,
    "effective_rank": lambda e: spectrum.shannon(e).exp(),
    "participation_ratio": lambda e: e.sum() ** 2 / e.square().sum(),
}


@pytest.mark.parametrize("rank", [3, 30])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONALS)
def test_spectral_error_is_that_of_weighed_samples(name, outputs, rank):
    """Against differences between eigendecompositions of D^1/2 K D^1/2."""
    n, step = 6, 1e-5
    jacobian = normal(n, outputs, rank)
    kernel = torch.einsum("ncp,mdp->ncmd", jacobian, jacobian)

    def at(weights):
        root = weights.sqrt()
        k = torch.einsum("n,ncmd,m->ncmd", root, kernel, root).reshape(n * outputs, -1)
        return FUNCTIONALS[name](torch.linalg.eigvalsh(k).clamp_min(0))

    one, unit = torch.ones(n).double(), torch.eye(n).double() * step
    slopes = torch.stack([(at(one + u) - at(one - u)) / (2 * step) for u in unit])
    true = float(slopes.std(correction=1)) * n**0.5
    values, vectors = torch.linalg.eigh(kernel.reshape(n * outputs, -1))
    found = spectral_error(FUNCTIONALS[name], values, vectors.view(n, outputs, -1))
    assert float(found) == pytest.approx(true, rel=1e-6)
    record = measured(jacobian, f"ntk/{name}")[f"ntk/{name}"]
    assert record.standard_error == pytest.approx(true, rel=1e-6)


def test_entropy_has_the_closed_form_of_its_slopes():
    """d S / d w_n = sum_k p_k (-ln p_k - S) sum_c v_k[n, c]^2."""
    a = normal(7, 7)
    values, vectors = torch.linalg.eigh(a @ a.T)
    p = values / values.sum()
    entropy = -(p * p.log()).sum()
    slopes = vectors.square() @ (p * (-p.log() - entropy))
    assert float(slopes.sum()) == pytest.approx(0, abs=1e-13)  # scale changes nothing
    found = spectral_error(spectrum.shannon, values, vectors)
    assert float(found) == pytest.approx(float(slopes.square().sum() * 7 / 6) ** 0.5, rel=1e-10)


@pytest.mark.parametrize("samples", [2, 9, 16, 45])
def test_corrected_mean_is_the_mean_and_corrected_variance_unbiased(samples):
    x = normal(samples)
    parts = [x[s] for s in parts_of(samples)]
    mean, error = bias_corrected(x.mean(), torch.stack([p.mean() for p in parts]), samples)
    assert float(mean) == pytest.approx(float(x.mean()), rel=1e-12)
    s = x.numpy().std(ddof=1)
    if samples <= 16:  # each sample is a group of its own: exact
        assert float(error) == pytest.approx(s / samples**0.5, rel=1e-12)
        without = torch.stack([p.var(correction=0) for p in parts])
        found, _ = bias_corrected(x.var(correction=0), without, samples)
        assert float(found) == pytest.approx(s**2, rel=1e-12)
    else:
        assert float(error) == pytest.approx(s / samples**0.5, rel=0.5)


@pytest.mark.slow
def test_corrected_entropy_nears_that_of_all_samples():
    """Of a linear network, whose inputs have covariance diag(q^k): known at infinite N."""
    n, d, repeats = 48, 8, 60
    variances = 0.85 ** torch.arange(d).double()
    true = float(spectrum.shannon(variances))
    names = ["ntk/entropy_traced", "ntk/entropy_traced_corrected"]
    found = np.array(
        [
            [[float(r.value), float(r.standard_error)] for r in list(records.values())[:2]]
            for records in (
                measured((normal(n, d) * variances.sqrt()).unsqueeze(1), *names)
                for _ in range(repeats)
            )
        ]
    )
    values, errors = found[..., 0], found[..., 1]
    plain, corrected = values.mean(0) - true
    of_mean = values.std(0, ddof=1) / repeats**0.5
    assert plain < -5 * of_mean[0]
    assert abs(corrected) < 3 * of_mean[1]
    covered = (np.abs(values - true) < errors).mean(0)
    assert covered[0] < 0.3
    assert 0.5 < covered[1] < 0.85


# Calibration: 200 probes of fresh samples ---------------------------------------------------------

REPEATS = 200
CALIBRATED = (
    "ntk/trace ntk/trace_per_output ntk/entropy ntk/entropy_traced ntk/entropy_corrected "
    "ntk/entropy_traced_corrected ntk/effective_rank ntk/effective_rank_traced "
    "ntk/participation_ratio ntk/participation_ratio_traced ntk/alignment ntk/alignment_centred "
    "fisher/trace loss/mean"
).split()


@cache
def repeated(samples, inputs, width, outputs, names):
    """Values and standard errors (REPEATS,) by name, of one network on fresh probes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    teacher, found = normal(inputs, outputs), {name: [] for name in names}
    for _ in range(REPEATS):
        x = normal(samples, inputs)
        y = x @ teacher + normal(samples, outputs)
        probe = nt.Probe(x, y if outputs == 1 else y.argmax(1))
        for record in nt.Tracer(probe, names, on_error="raise", max_seconds=None)(model, 0):
            if record.name in found:
                found[record.name].append((float(record.value), float(record.standard_error)))
    return {name: np.array(pairs).T for name, pairs in found.items()}


@pytest.mark.parametrize("name", CALIBRATED)
def test_68_percent_interval_covers(name):
    values, errors = repeated(60, 3, 4, 2, tuple(CALIBRATED))[name]
    scatter = values.std(ddof=1)
    covered = (np.abs(values - values.mean()) < errors).mean()
    assert 0.60 <= covered <= 0.76
    assert 0.8 < errors.mean() / scatter < 1.3


@pytest.mark.parametrize("name", ["ntk/entropy", "ntk/participation_ratio", "ntk/alignment"])
def test_errors_are_cautious_where_there_are_fewer_samples_than_modes(name):
    names = ("ntk/entropy", "ntk/participation_ratio", "ntk/alignment")
    values, errors = repeated(24, 40, 24, 1, names)[name]
    assert 0.9 < errors.mean() / values.std(ddof=1) < 2
