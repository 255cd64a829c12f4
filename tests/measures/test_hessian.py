"""The trace of the Hessian against the dense Hessian: where it is exact, and where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import nettrace as nt
from nettrace.piecewise import check_piecewise_linear
from nettrace.tape import Tape

N, C = 4, 3


class Residual(nn.Module):
    """Max pooling, batch normalisation with statistics of its own, a residual addition."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.prelu = nn.PReLU()
        self.head = nn.Linear(3, C)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.normal_()

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x.view(-1, 1, 4, 4)))), 2)
        x = x + F.leaky_relu(self.second(self.prelu(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Module(nn.Module):
    def __init__(self, forward, **parts):
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if torch.is_tensor(part) else part)
        self.head = nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.call(self, x[:, :4]))


def linear():
    return nn.Linear(4, 4)


#: Every one a network whose outputs are piecewise linear in each single weight.
EXACT = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 4), nn.Dropout(), nn.ReLU6(), nn.Linear(4, C)
    ),
    "residual": Residual,
    "low rank": lambda: Module(
        lambda m, x: F.relu(x @ m.a @ m.b), a=torch.randn(4, 2), b=torch.randn(2, 4)
    ),
    "used twice side by side": lambda: Module(
        lambda m, x: F.relu(m.layer(x)) + m.layer(x.flip(0) ** 2).flip(0), layer=linear()
    ),
    "normalised input": lambda: Module(lambda m, x: F.relu(m.norm(x)), norm=nn.LayerNorm(4)),
}


#: With what must be named in the refusal.
REFUSED = {
    "GeluBackward0": lambda: Module(lambda m, x: F.gelu(m.layer(x)), layer=linear()),
    "NativeGroupNormBackward0": lambda: Module(
        lambda m, x: F.relu(m.norm(m.layer(x))), layer=linear(), norm=nn.GroupNorm(2, 4)
    ),
    "NativeLayerNormBackward0": lambda: Module(
        lambda m, x: F.relu(m.norm(m.layer(x))), layer=linear(), norm=nn.LayerNorm(4)
    ),
    "'layer.weight'": lambda: Module(
        lambda m, x: m.layer(F.relu(m.layer(x))), layer=nn.Linear(4, 4)
    ),
    "'a'": lambda: Module(lambda m, x: F.relu(x @ m.a) @ m.a.T, a=torch.randn(4, 4)),
    "'w'": lambda: Module(lambda m, x: F.relu(x @ (m.w * m.w)), w=torch.randn(4, 4)),
    "'gate.bias'": lambda: Module(lambda m, x: m.gate(x) * F.relu(m.gate(x) + 1), gate=linear()),
    "MulBackward0 multiplies": lambda: Module(
        lambda m, x: m.layer(x) * m.layer(x).mean(1, keepdim=True), layer=linear()
    ),
    "SoftmaxBackward0|ScaledDotProduct|BmmBackward0": lambda: Module(
        lambda m, x: m.attend(*(3 * [x.view(-1, 2, 2)]))[0].flatten(1),
        attend=nn.MultiheadAttention(2, 1, batch_first=True),
    ),
    "WeightNorm|DivBackward0|NormBackward": lambda: Module(
        lambda m, x: F.relu(m.layer(x)), layer=parametrizations.weight_norm(linear())
    ),
}


def probes():
    x = torch.randn(N, 16, dtype=torch.float64)
    yield nt.Probe(x, torch.arange(N) % C)
    yield nt.Probe(x, torch.randn(N, C, dtype=torch.float64))
    yield nt.Probe(x, torch.rand(N, C, dtype=torch.float64), likelihood="bernoulli")
    yield nt.Probe(x, torch.arange(N * C).view(N, C) % 4, likelihood="poisson")
    variances = torch.tensor([0.5, 1, 3])
    y = torch.randn(N, C, dtype=torch.float64)
    yield nt.Probe(x, y, likelihood=nt.Gaussian(covariance=variances))


def dense_trace(model, probe):
    """Of the whole Hessian, by differences of gradients."""
    names, values = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([v.detach().flatten() for v in values])

    def loss(w):
        parts = w.split([v.numel() for v in values])
        named = {n: p.view_as(v) for n, p, v in zip(names, parts, values, strict=True)}
        outputs = functional_call(model, named, (probe.inputs,))
        y = probe.targets
        if probe.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(outputs, y, reduction="sum") / N
        if probe.likelihood == "poisson":
            return F.poisson_nll_loss(outputs, y, reduction="sum") / N
        if y.is_floating_point():
            variances = 1.0 if probe.likelihood is None else probe.likelihood.covariance
            return 0.5 * ((outputs - y).square() / variances).sum(1).mean()
        return F.cross_entropy(outputs, y)

    total = 0.0
    for i in range(len(flat)):
        pair = []
        for sign in (1, -1):
            w = flat.clone()
            w[i] += sign * 1e-6
            w.requires_grad_()
            pair.append(torch.autograd.grad(loss(w), w)[0][i])
        total += float(pair[0] - pair[1]) / 2e-6
    return total


def build(make):
    return make().double().eval()


def record(model, probe, what="hessian/trace"):
    return nt.Tracer(probe, what, on_error="raise", max_seconds=None)(model, 0)[0]


def found(model, probe, what="hessian/trace"):
    return float(record(model, probe, what).value)


@pytest.mark.parametrize("name", EXACT)
def test_it_is_that_of_the_dense_hessian(name):
    for probe in probes():
        model = build(EXACT[name])
        true = dense_trace(model, probe)
        assert true > 0.1
        exact = record(model, probe)
        assert exact.attributes["method"] == "exact"
        assert abs(float(exact.value) - true) < 1e-7 * true
        layers = record(model, probe, "hessian/trace_per_layer")
        assert abs(float(layers.value.sum()) - true) < 1e-7 * true


@pytest.mark.parametrize("names", REFUSED)
def test_what_bends_is_estimated_and_rightly_so(names):
    model = build(REFUSED[names])
    parameters = dict(model.named_parameters())
    for probe in list(probes())[::2]:
        with pytest.raises(ValueError, match=names):
            check_piecewise_linear(Tape.behind(model(probe.inputs), parameters, ()))
        true, gauss_newton = dense_trace(model, probe), found(model, probe, "fisher/trace")
        assert abs(true - gauss_newton) > 1e-3 * abs(true)
        estimate = record(model, probe)
        assert estimate.attributes["error_of"] == "estimator"
        off = abs(float(estimate.value) - true)
        assert off <= 6 * float(estimate.standard_error) + 1e-6 * abs(true)


def test_losses_of_ones_own_are_estimated():
    classes, *_ = probes()
    own = nt.Probe(
        classes.inputs,
        classes.targets,
        losses=lambda f, y: f.square().sum(1) / 2,
        likelihood="categorical",
    )
    model = build(EXACT["mlp"])
    squares = nt.Probe(classes.inputs, torch.zeros(N, C, dtype=torch.float64))
    true = dense_trace(model, squares)
    estimate = record(model, own)
    assert estimate.attributes["error_of"] == "estimator"
    assert abs(float(estimate.value) - true) <= 6 * float(estimate.standard_error) + 1e-9 * true


def test_frozen_weights_may_bend():
    for probe in probes():
        model = build(REFUSED["GeluBackward0"])
        model.layer.requires_grad_(False)
        x = F.gelu(model.layer(probe.inputs[:, :4])).detach()
        head = nt.Probe(x, probe.targets, likelihood=probe.likelihood)
        assert abs(found(model, probe) - dense_trace(model.head, head)) < 1e-8
