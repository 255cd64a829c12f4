"""Statistics of per-sample gradients against rows written out, known populations and tails."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nettrace as nt
from nettrace.measures import gradients, resolve
from nettrace.statistics import Statistics, StepStatistics
from nettrace.training_step import StepTracer

NAMES = [m.name for m in resolve("gradients")] + ["gradients/gram"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(samples=20):
    torch.manual_seed(1)
    return torch.randn(samples, 4).double(), torch.randint(0, 3, (samples,))


def rows(model, x, y):
    """By parameter, (N, P) gradients in NumPy, one sample at a time."""
    found = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, g in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            found[name].append(g.flatten().numpy())
    return {name: np.stack(several) for name, several in found.items()}


def of_step(model, loss, samples, names=NAMES, **options):
    """The records of some measures of a training step, by name."""
    records = StepTracer("raise").measure(
        lambda *_: StepStatistics(loss, model, samples, 0, **options), model, 0, resolve(names)
    )
    return {record.name: record for record in records}


def of_probe(model, x, y):
    """The same of a probe."""
    names = [name for name in NAMES if "conflict" not in name]
    records = nt.Tracer(nt.Probe(x, y), names, on_error="raise", max_seconds=None)(model, step=0)
    return {record.name: record for record in records}


def numbers(g):
    """Signal, noise and scale of rows (N, P), by the covariance matrix."""
    covariance = np.cov(g.T)
    noise = np.trace(covariance)
    signal = np.square(g.mean(0)).sum() - noise / len(g)
    return {
        "gradients/signal": signal,
        "gradients/noise": noise,
        "gradients/noise_scale": noise / signal,
    }


@pytest.mark.parametrize("pairs", [512, 4])
@pytest.mark.parametrize("where", ["step", "probe"])
def test_values_are_those_of_rows_written_out(where, pairs, monkeypatch):
    monkeypatch.setattr(Statistics, "most_pairs", pairs)
    monkeypatch.setattr(StepStatistics, "most_pairs", pairs)
    model, (x, y) = mlp(), batch()
    if where == "step":
        found = of_step(model, F.cross_entropy(model(x), y), len(x))
    else:
        found = of_probe(model, x, y)
    layers = rows(model, x, y)
    g = np.concatenate(list(layers.values()), 1)
    without = [numbers(np.delete(g, n, 0)) for n in range(len(g))]
    for name, true in numbers(g).items():
        assert found[name].value == pytest.approx(true, rel=1e-9)
        scatter = np.array([w[name] for w in without])
        error = math.sqrt((len(g) - 1) * scatter.var())
        assert found[name].standard_error == pytest.approx(error, rel=1e-7)
    assert found["gradients/norms"].value == pytest.approx(np.linalg.norm(g, axis=1))
    assert found["gradients/gram"].value == pytest.approx(g @ g.T)
    squares = np.square(g).sum(1)
    assert found["gradients/fisher_trace"].value == pytest.approx(squares.mean())
    error = squares.std(ddof=1) / math.sqrt(len(g))
    assert found["gradients/fisher_trace"].standard_error == pytest.approx(error)
    spectrum = np.linalg.eigvalsh(np.cov(g.T, bias=True))[::-1][: len(g)]
    assert found["gradients/covariance_spectrum"].value == pytest.approx(spectrum, abs=1e-12)
    per_layer = found["gradients/signal_to_noise_per_layer"]
    assert per_layer.coordinates["layer"] == list(layers)
    true = [1 / numbers(h)["gradients/noise_scale"] for h in layers.values()]
    assert per_layer.value == pytest.approx(true, rel=1e-8)


def test_the_scale_of_the_loss_is_taken_out():
    model, (x, y) = mlp(), batch()
    names = [name for name in NAMES if "conflict" not in name]
    plain = of_step(model, F.cross_entropy(model(x), y), len(x), names)
    loss = F.cross_entropy(model(x), y) * 1024 / 4
    scaled = of_step(model, loss, len(x), names, scale=1024 / 4)
    for name in names:
        assert scaled[name].value == pytest.approx(plain[name].value, rel=1e-10, abs=1e-14)


def test_signal_and_noise_are_unbiased_and_their_errors_calibrated():
    """Linear regression on Gaussian inputs, of which the gradients' moments are known.

    With y = e, of unit variance, and f = w x: g = (w x - e) x, so that G = w and, by Isserlis,
    E |g|^2 = (|w|^2 + 1) d + 2 |w|^2.
    """
    d, samples, draws = 5, 24, 400
    w = torch.full((1, d), 0.4).double()
    signal = float(w.square().sum())
    noise = (signal + 1) * d + 2 * signal - signal
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)
    generator = torch.Generator().manual_seed(0)
    found = {"gradients/signal": [], "gradients/noise": []}
    errors = {name: [] for name in found}
    tracer, measures = StepTracer("raise"), resolve(list(found))
    for _ in range(draws):
        x = torch.randn(samples, d, generator=generator).double()
        e = torch.randn(samples, 1, generator=generator).double()
        loss = F.mse_loss(model(x), e) / 2
        look = StepStatistics(loss, model, samples, 0)
        for record in tracer.measure(lambda *_, look=look: look, model, 0, measures):
            if record.name in found:
                found[record.name].append(float(record.value))
                errors[record.name].append(float(record.standard_error))
    for name, true in (("gradients/signal", signal), ("gradients/noise", noise)):
        values, claimed = np.array(found[name]), np.array(errors[name])
        assert abs(values.mean() - true) < 3.5 * values.std() / math.sqrt(draws)
        assert 0.85 < math.sqrt(np.square(claimed).mean()) / values.std() < 1.25


def test_the_noise_scale_is_the_batch_size_at_which_signal_and_noise_are_equal():
    """The variance of mean gradients over batches of that size is the squared signal."""
    model, (x, y) = mlp(), batch(1000)
    scale = float(
        of_step(model, F.cross_entropy(model(x), y), len(x))["gradients/noise_scale"].value
    )
    size, generator = round(scale), torch.Generator().manual_seed(0)
    means = []
    for _ in range(300):
        drawn = torch.randint(0, len(x), (size,), generator=generator)
        loss = F.cross_entropy(model(x[drawn]), y[drawn])
        means.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        )
    means = torch.stack(means)
    variance = float(means.var(0).sum())
    signal = float(means.mean(0).square().sum()) - variance / len(means)
    assert variance / signal == pytest.approx(scale / size, rel=0.15)


@pytest.mark.parametrize("index", [1.2, 2.0, 4.0])
def test_the_tail_index_of_pareto_distances(index):
    generator = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(200):
        distances = generator.pareto(index, 2500) + 1
        squares = torch.from_numpy(np.square(distances))
        found = gradients.tail_index({"w": squares}, {"w": torch.zeros(2500).double()})
        estimates.append(float(found.value))
        errors.append(float(found.standard_error))
    assert np.mean(estimates) == pytest.approx(index, rel=4 / math.sqrt(50 * 200))
    assert np.std(estimates) == pytest.approx(np.mean(errors), rel=0.2)


@pytest.mark.parametrize("shape", [None, (), (1,)])
def test_conflicts_are_cosines_between_the_gradients_of_terms(shape):
    model, (x, y) = mlp(), batch()
    parts = [
        F.cross_entropy(model(x), y),
        0.5 * model(x).square().mean(),
        0.1 * sum(p.square().sum() for p in model.parameters()),
    ]
    g = [torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in parts]
    loss = sum(parts) if shape is None else sum(part.view(shape) for part in parts).view(())
    found = of_step(model, loss, len(x), ["gradients/conflict", "gradients/conflict_per_layer"])
    flat = np.stack([torch.cat([h.flatten() for h in one]).numpy() for one in g])
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    conflict = found["gradients/conflict"]
    assert conflict.value == pytest.approx(unit @ unit.T)
    assert conflict.coordinates["term"] == ["NllLoss", "Mean", "penalty"]
    for layer, several in enumerate(zip(*g, strict=True)):
        flat = np.stack([h.flatten().numpy() for h in several])
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        value = found["gradients/conflict_per_layer"].value[layer]
        assert value == pytest.approx(unit @ unit.T)


def groups(model, named):
    """Two optimizers with three groups; one more has a tensor that is none of the model's."""
    first, last = model[0], model[2]
    name = {"name": "head"} if named else {}
    return [
        torch.optim.SGD([{"params": first.weight}, {"params": last.parameters(), **name}], 0.1),
        torch.optim.SGD([torch.ones(3, requires_grad=True)], 0.1),
        torch.optim.SGD([{"params": first.bias, **name}], 0.1),
    ]


@pytest.mark.parametrize("named", [False, True])
def test_conflicts_within_each_group_of_the_optimizers(named):
    model, (x, y) = mlp(), batch()
    parts = [F.cross_entropy(model(x), y), 0.5 * model(x).square().mean()]
    found = of_step(
        *(model, sum(parts), len(x), ["gradients/conflict_per_group"]),
        optimizers=groups(model, named),
    )["gradients/conflict_per_group"]
    labels = ["group0", "head", "head 3"] if named else ["group0", "group1", "group3"]
    assert found.coordinates["group"] == labels
    assert found.coordinates["term"] == ["NllLoss", "Mean"]
    several = [[model[0].weight], list(model[2].parameters()), [model[0].bias]]
    for value, parameters in zip(found.value, several, strict=True):
        g = [torch.autograd.grad(part, parameters, retain_graph=True) for part in parts]
        flat = np.stack([torch.cat([h.flatten() for h in one]).numpy() for one in g])
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        assert value == pytest.approx(unit @ unit.T)


@pytest.mark.parametrize("optimizers", [0, 1])
def test_one_group_has_no_conflicts_of_its_own(optimizers):
    model, (x, y) = mlp(), batch()
    loss = F.cross_entropy(model(x), y) + model(x).square().mean()
    several = [torch.optim.SGD(model.parameters(), 0.1)] * optimizers
    found = of_step(model, loss, len(x), optimizers=several)
    assert "gradients/conflict" in found
    assert "gradients/conflict_per_group" not in found


def test_one_term_has_no_conflicts():
    model, (x, y) = mlp(), batch()
    assert "gradients/conflict" not in of_step(model, F.cross_entropy(model(x), y), len(x))


def test_one_sample_does_not_tell_signal_from_noise():
    model, (x, y) = mlp(), batch(1)
    with pytest.warns(nt.MissingMeasureWarning, match="at least 2 samples, got 1"):
        records = StepTracer("record").measure(
            lambda *_: StepStatistics(F.cross_entropy(model(x), y), model, 1, 0),
            *(model, 0, resolve("gradients")),
        )
    missing = {record.name for record in records if record.missing is not None}
    assert "gradients/signal" in missing
    assert "gradients/norms" not in missing


def test_few_samples_have_no_tail():
    model, (x, y) = mlp(), batch(15)
    assert "gradients/tail_index" not in of_step(model, F.cross_entropy(model(x), y), 15)
