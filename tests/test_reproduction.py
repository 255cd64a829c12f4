"""Published phenomena of learning, seen through nettrace; most are slow: networks learn to the end.

What is asked of each is what independent computations without nettrace gave beforehand.
"""

import functools
import itertools
import math
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import nettrace as nt

# Two mechanisms of learning: Tovey et al. 2024, arXiv:2410.07451 ----------------------------------

MEASURES = [
    "ntk/trace",
    "ntk/entropy_normalised",
    "ntk/entropy_traced_normalised",
    "fisher/trace",
    "collective/chi_align",
    "loss/accuracy",
]
WIDTHS = {1: 100, 3: 50}  # by the number of hidden layers


@functools.cache
def learn_digits(depth, seed, steps=300):
    """Full-batch gradient descent on 500 digits; what 100 of them show, at log-spaced steps."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std()
    torch.manual_seed(seed)
    chosen = torch.randperm(len(x))[:500]
    x, y = x[chosen], torch.tensor(labels)[chosen]
    sizes = [64, *[WIDTHS[depth]] * depth]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(sizes[-1], 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with tempfile.TemporaryDirectory() as folder:
        every = [0, *np.unique(np.geomspace(1, steps, 12).astype(int))]
        tracer = nt.Tracer(nt.Probe(x[:100], y[:100]), MEASURES, every=every, to=folder)
        for step in range(steps + 1):
            tracer(model, step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return nt.open(folder).load()


def change(data, name):
    return float(data[name][-1] - data[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_deep_networks_form_structure_and_shallow_ones_compress(seed):
    deep, shallow = learn_digits(3, seed), learn_digits(1, seed)
    for data in (deep, shallow):
        assert data.loss_accuracy[-1] > 0.9
    assert change(deep, "ntk_entropy_normalised") > 0.05
    assert change(deep, "ntk_entropy_traced_normalised") > 0.05
    # Compression is slight here, and in the traced kernel not even of one sign.
    assert change(shallow, "ntk_entropy_normalised") < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_fisher_information_rises_and_falls_while_the_kernel_grows(depth, seed):
    data = learn_digits(depth, seed)
    fisher, kernel = data.fisher_trace.values, data.ntk_trace.values
    peak = fisher.argmax()
    assert 0 < peak < len(fisher) - 1
    assert fisher[peak] > 1.5 * fisher[0]
    assert fisher[-1] < fisher[peak] / 2
    assert kernel[-1] == kernel.max() > 5 * kernel[0]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "steps"), [(0, 1000), (1, 300), (2, 300)])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_loss_moves_down_the_spectrum(depth, seed, steps):
    alignment = learn_digits(depth, seed, steps).collective_chi_align.values
    # In the deep networks it rises first, as learning sets in.
    assert alignment[-1] < alignment.max() / 2
    if steps == 1000:
        assert alignment[-1] < alignment[0] / 2


# Grokking: Gromov 2023, arXiv:2301.02679; Kumar et al. 2024, arXiv:2310.06110 ---------------------


class ModularAddition(nn.Module):
    """One hidden layer of squares: the residue of a + b from a and b."""

    def __init__(self, p, width):
        super().__init__()
        self.a = nn.Parameter(torch.randn(p, width) / math.sqrt(2 * p))
        self.b = nn.Parameter(torch.randn(p, width) / math.sqrt(2 * p))
        self.out = nn.Parameter(torch.randn(width, p) / math.sqrt(width))

    def forward(self, pairs):
        a, b = pairs.unbind(1)
        return (self.a[a] + self.b[b]).square() @ self.out


@pytest.mark.slow
def test_modular_addition_is_understood_long_after_it_is_memorised():
    p = 31
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    residues = pairs.sum(1) % p
    order = torch.randperm(p * p)
    train, test = order[: int(0.4 * p * p)], order[int(0.4 * p * p) :]
    model = ModularAddition(p, width=256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1, betas=(0.9, 0.98))
    tracers = {
        name: nt.Tracer(nt.Probe(pairs[n], residues[n]), "loss/accuracy", every=50)
        for name, n in {"train": train, "test": test}.items()
    }
    learnt = {}
    for step in range(4001):
        for name, tracer in tracers.items():
            records = tracer(model, step)
            if records and records[0].value >= 0.99:
                learnt.setdefault(name, step)
        if "test" in learnt:
            break
        optimizer.zero_grad()
        F.mse_loss(model(pairs[train]), F.one_hot(residues[train], p).float()).backward()
        optimizer.step()
    assert learnt["train"] <= 100
    assert 500 <= learnt["test"] <= 4000


class Committee(nn.Module):
    """The mean of h + eps h^2 / 2 over projections h of the input."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.eps = eps

    def forward(self, x):
        h = x @ self.weight.T
        return (h + self.eps / 2 * h.square()).mean(1, keepdim=True)


@pytest.mark.slow
def test_polynomial_regression_groks_as_the_kernel_turns_to_the_target():
    dimension, samples, width, eps = 100, 550, 500, 0.25
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, x_test = normal(samples, dimension) / 10, normal(1000, dimension) / 10
    beta = normal(dimension)
    y, y_test = (((inputs @ beta).square() / 2).float()[:, None] for inputs in (x, x_test))
    x, x_test = x.float(), x_test.float()
    model = Committee(normal(width, dimension).float(), eps)
    optimizer = torch.optim.SGD(model.parameters(), lr=width)
    alignments = [centred_alignment(model, x, y)]
    tracer = nt.Tracer(nt.Probe(x_test, y_test), "loss/mean", every=100)
    losses = []
    for step in range(2001):
        losses += [float(record.value) for record in tracer(model, step)[:1]]
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    alignments.append(centred_alignment(model, x, y))
    assert max(losses) > 1.05 * losses[0]
    assert losses[-1] < 0.5 * losses[0]
    assert alignments[1] > 2 * alignments[0]


def centred_alignment(model, x, y):
    """CKA of the kernel and the targets: Cortes et al. 2012."""
    kernel = nt.jacobian(model(x), model).gram(trace_outputs=True)
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    y = y[:, 0] - y.mean()
    return float(y @ kernel @ y / (kernel.norm() * y.square().sum()))


# The edge of stability: Cohen et al. 2021, arXiv:2103.00065 ---------------------------------------


def sharpen(model, x, y, rate, steps, every):
    """Full-batch gradient descent on half the squared error; how stable it is, and the losses."""
    probe = nt.Probe(x, y, likelihood="gaussian")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    tracer = nt.Tracer(probe, "hessian/stability", every=every, on_error="raise")
    found, losses = {}, []
    for step in range(steps):
        for record in tracer(model, step, optimizer):
            if record.name == "hessian/stability":
                found[step] = float(record.value)
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum(1).mean() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return found, np.array(losses)


def dense_sharpness(model, x, y):
    """The largest eigenvalue of the whole Hessian, by plain autograd in float64."""
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach().double() for p in model.parameters()]

    def loss(flat):
        parts = flat.split([w.numel() for w in weights])
        given = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        outputs = torch.func.functional_call(model, given, (x.double(),))
        return (outputs - y.double()).square().sum(1).mean() / 2

    point = torch.cat([w.flatten() for w in weights])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, point))[-1])


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_gradient_descent_on_a_polynomial_settles_at_the_edge_of_stability(dtype):
    """Mean over the records of the last half; without nettrace it is 1.022 in float64."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 20, dtype=dtype)[:, None]
    y = 8 * x**4 - 8 * x**2 + 1
    model = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 1, bias=False))
    nn.init.xavier_normal_(model[0].weight, gain=1.9)
    nn.init.zeros_(model[0].bias)
    nn.init.xavier_normal_(model[2].weight)
    model.to(dtype)
    start = dense_sharpness(model, x, y)
    found, losses = sharpen(model, x, y, rate=0.4, steps=6000, every=100)
    assert found[0] == pytest.approx(0.4 * start / 2, rel=1e-4)
    assert start == pytest.approx(4.03, abs=0.01)
    assert 300 <= min(step for step, ratio in found.items() if ratio > 1) <= 500
    assert np.mean([r for step, r in found.items() if step >= 3000]) == pytest.approx(1, abs=0.03)
    assert losses[-1000:].mean() < losses[0] / 10
    assert (np.diff(losses[3000:]) > 0).mean() > 0.2  # although it rises at many steps


@pytest.mark.slow
def test_gradient_descent_on_digits_settles_at_the_edge_of_stability():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    x = ((x - x.mean(0)) / x.std())[:1000]
    y = F.one_hot(torch.tensor(labels[:1000]), 10).float()
    hidden = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    found, losses = sharpen(model, x, y, rate=0.2, steps=3000, every=50)
    assert 0.2 < found[0] < 0.24
    assert 700 <= min(step for step, ratio in found.items() if ratio > 1) <= 900
    assert np.mean([r for step, r in found.items() if step >= 2250]) == pytest.approx(1, abs=0.05)
    assert (np.diff(losses[1500:]) > 0).mean() > 0.2
