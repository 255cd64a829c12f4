"""The kernel as the optimizer sees it, against explicit Jacobians and the optimizer's own steps."""

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nettrace as nt
from nettrace.statistics import Statistics

N, C = 6, 3
NAMES = ["ntk/preconditioned_trace", "ntk/preconditioned_spectrum"]


def made():
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, C)).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    return model, nt.Probe(x, torch.arange(N) % C)


def trained(model, probe, *optimizers, steps=3):
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(probe.inputs), probe.targets).backward()
        for optimizer in optimizers:
            optimizer.step()


def measured(model, probe, optimizer):
    return nt.Tracer(probe, NAMES, on_error="raise", max_seconds=None)(model, 3, optimizer)[:2]


def eigenvalues(model, probe, weights):
    j = oracle.jacobian(model(probe.inputs), dict(model.named_parameters()))
    scaled = torch.cat([j[n] * weights[n].flatten() for n in j], 2).flatten(0, 1)
    return np.linalg.eigvalsh((scaled @ scaled.T).numpy())[::-1]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_kernel_is_that_of_the_explicit_matrix(kind, amsgrad):
    model, probe = made()
    optimizer = kind(model.parameters(), 0.05, betas=(0.8, 0.9), eps=1e-3, amsgrad=amsgrad)
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    largest = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for _ in range(4):
        trained(model, probe, optimizer, steps=1)
        for n, p in model.named_parameters():
            squares[n] = 0.9 * squares[n] + 0.1 * p.grad**2
            largest[n] = largest[n].maximum(squares[n]) if amsgrad else squares[n]
    root = {n: ((v / (1 - 0.9**4)).sqrt() + 1e-3) ** -0.5 for n, v in largest.items()}
    true = eigenvalues(model, probe, root)
    trace, spectrum = measured(model, probe, optimizer)
    assert trace.value == pytest.approx(true.sum(), rel=1e-10)
    np.testing.assert_allclose(spectrum.value, true, rtol=1e-8, atol=1e-10 * true[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgds_kernel_is_the_plain_one(momentum):
    model, probe = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    names = [*NAMES, "ntk/trace", "ntk/spectrum"]
    found = {
        r.name: r
        for r in nt.Tracer(probe, names, on_error="raise", max_seconds=None)(model, 0, optimizer)
    }
    for name in ("trace", "spectrum"):
        plain = found[f"ntk/{name}"].value
        np.testing.assert_allclose(found[f"ntk/preconditioned_{name}"].value, plain, atol=1e-12)


def test_adams_kernel_moves_the_outputs_as_adam_does():
    # Without momentum a step is -eta P^-1 g, with the second moments that hold this gradient; so
    # the outputs move by -eta J P^-1 J^T dL/df to first order in eta.
    model, probe = made()
    optimizer = torch.optim.Adam(model.parameters(), 1e-7, betas=(0.0, 0.9), eps=1e-2)
    trained(model, probe, optimizer, steps=4)
    x, y = probe.inputs, probe.targets
    before = model(x)
    F.cross_entropy(before, y).backward(), model.zero_grad()
    trained(model, probe, optimizer, steps=1)
    motion = (model(x) - before).detach()
    jacobian = Statistics(model, probe, optimizers=[optimizer])._preconditioned
    leaf = before.detach().requires_grad_()
    (dl,) = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)
    assert oracle.relative_error(-1e-7 * jacobian.gram_product(dl), motion) < 1e-5


def test_parameters_of_several_optimizers_are_joined_and_those_of_none_do_not_count():
    model, probe = made()
    first, last = model[0], model[2]
    adam = torch.optim.Adam(first.parameters(), 0.01)
    sgd = torch.optim.SGD([last.weight], 0.01)
    trained(model, probe, adam, sgd)
    v = {n: adam.state[p]["exp_avg_sq"] for n, p in first.named_parameters()}
    weights = {f"0.{n}": ((m / (1 - 0.999**3)).sqrt() + 1e-8) ** -0.5 for n, m in v.items()}
    weights |= {"2.weight": torch.ones_like(last.weight), "2.bias": torch.zeros_like(last.bias)}
    true = eigenvalues(model, probe, weights)
    trace, spectrum = measured(model, probe, [adam, sgd])
    assert trace.value == pytest.approx(true.sum(), rel=1e-10)
    np.testing.assert_allclose(spectrum.value, true, rtol=1e-8, atol=1e-10 * true[0])


def test_complex_weights_are_divided_as_adam_divides_them():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2, bias=False, dtype=torch.complex128)

        def forward(self, x):
            return torch.view_as_real(self.linear(x.to(torch.complex128))).flatten(1)

    model, x = Complex(), torch.randn(N, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, betas=(0.0, 0.9), eps=1e-3)
    (model(x) - 1).square().sum().backward()
    optimizer.step()
    g = torch.view_as_real(model.linear.weight.grad)
    weights = {"linear.weight": (g.abs() + 1e-3) ** -0.5}  # v is g^2 after one step
    true = eigenvalues(model, nt.Probe(x), weights)
    trace, _ = measured(model, nt.Probe(x), optimizer)
    assert trace.value == pytest.approx(true.sum(), rel=1e-9)


def test_many_outputs_are_estimated(monkeypatch):
    monkeypatch.setattr(Statistics, "exact_outputs", 8)
    monkeypatch.setattr(Statistics, "relative_error", 1.0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40)).double()
    probe = nt.Probe(torch.randn(N, 4).double(), torch.arange(N))
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=1e-3)
    trained(model, probe, optimizer, steps=1)
    tracer = nt.Tracer(probe, NAMES[0], on_error="raise")
    record = tracer(model, 1, optimizer)[0]
    roots = {n: (p.grad.abs() + 1e-3) ** -0.5 for n, p in model.named_parameters()}
    true = eigenvalues(model, probe, roots).sum()
    assert record.attributes["method"] == "hutchinson"
    assert abs(record.value - true) < 4 * record.standard_error < 0.4 * true


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (lambda m: None, r"the optimizer is not known: pass it on.*tracer\(model, step, optim"),
        (lambda m: [], "the optimizer is not known"),
        (lambda m: torch.optim.Adam(m.parameters()), "no second moments before its first step"),
        (lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters()), "is that of another network"),
        (lambda m: torch.optim.RMSprop(m.parameters()), "how RMSprop divides gradients is not"),
    ],
)
def test_what_is_not_known_of_the_optimizer_is_said(optimizer, says):
    model, probe = made()
    with pytest.raises(Exception, match=says):
        measured(model, probe, optimizer(model))


def test_a_group_does_not_ask_for_an_optimizer():
    assert not set(NAMES) & {m.name for m in nt.measures.resolve("ntk")}
    assert set(NAMES) <= {m.name for m in nt.measures.available()}
