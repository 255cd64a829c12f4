"""Measures of curvature against dense matrices of small networks, and closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import trapezoid
from torch import nn

import nettrace as nt
from nettrace.measures import resolve
from nettrace.statistics import second_order

N, C = 12, 3


class Quadratic(nn.Module):
    """Outputs (N, 1) of which the mean is sum_i h_i w_i^2 / 2."""

    def __init__(self, curvatures, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, len(curvatures) + 1).to(dtype))
        self.register_buffer("h", torch.tensor(curvatures, dtype=dtype))

    def forward(self, x):
        return x + (self.h * self.w.square()).sum() / 2


class Product(nn.Module):
    """The product of single weights: a deep linear network of width one."""

    def __init__(self, *weights):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.tensor(w).double()) for w in weights)

    def forward(self, x):
        for w in self.layers:
            x = w * x
        return x


def own(samples=4):
    zeros = torch.zeros(samples, 1, dtype=torch.float64)
    return nt.Probe(zeros, losses=lambda f, _: f.sum(1))


def network(dtype=torch.float64):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, C)).to(dtype)
    return model, nt.Probe(torch.randn(N, 5).to(dtype), torch.arange(N) % C)


def measured(names, model, probe, optimizer=None, step=0, tracer=None):
    tracer = tracer or nt.Tracer(probe, names, on_error="raise", max_seconds=None)
    return {record.name: record for record in tracer(model, step, optimizer)}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def loss_of(model, probe):
    return F.cross_entropy(model(probe.inputs), probe.targets)


def dense_hessian(model, probe, loss=loss_of):
    """By autograd, row by row, reverse over reverse."""
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss(model, probe), parameters, create_graph=True)
    rows = [
        flat(torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True))
        for g in flat(first)
    ]
    return torch.stack(rows).detach().double()


def dense_gauss_newton(model, probe):
    parameters = list(model.parameters())
    outputs = model(probe.inputs)
    j = torch.stack(
        [flat(torch.autograd.grad(f, parameters, retain_graph=True)) for f in outputs.flatten()]
    ).unflatten(0, (N, C))
    p = outputs.detach().softmax(1)
    m = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", j, m, j).double() / N


@pytest.mark.parametrize(
    "curvatures", [(2.0, -20.0), (2.0, 2.0, 2.0, -20.0, -20.0), (1.0,), tuple(range(-40, 60))]
)
def test_known_signed_spectra(curvatures):
    names = ["hessian", "hessian/eigenvalues_lowest"]
    found = measured(names, Quadratic(curvatures), own())
    true = np.sort(np.asarray(curvatures, dtype=float))
    largest = abs(true).max()
    assert found["hessian/lambda_max"].value == pytest.approx(true[-1], abs=1e-6 * largest)
    assert found["hessian/lambda_min"].value == pytest.approx(true[0], abs=1e-6 * largest)
    top = found["hessian/eigenvalues"].value
    assert np.allclose(top, true[::-1][:10], rtol=0, atol=1e-6 * largest)
    assert len(top) == min(10, len(true))
    lowest = found["hessian/eigenvalues_lowest"].value
    assert np.allclose(lowest, true[:5], rtol=0, atol=1e-6 * largest)
    assert found["hessian/trace"].value == pytest.approx(true.sum(), abs=1e-6 * largest)
    norm = np.linalg.norm(true)
    frobenius = found["hessian/frobenius"]
    assert abs(frobenius.value - norm) <= 6 * frobenius.standard_error + 1e-6 * norm
    w = np.arange(1, len(curvatures) + 1)
    g = np.asarray(curvatures) * w
    rayleigh = (g**2 * curvatures).sum() / (g**2).sum()
    assert found["hessian/gradient_sharpness"].value == pytest.approx(rayleigh)


def test_a_gradient_that_does_not_see_the_top_does_not_hide_it():
    """The first look begins with the gradient, which has nothing along the top eigenvector."""
    curvatures = tuple(float(h) for h in range(-40, 60))
    model = Quadratic(curvatures)
    with torch.no_grad():
        model.w[-1] = 0
    found = measured(["hessian/lambda_max"], model, own())["hessian/lambda_max"]
    assert found.value == pytest.approx(59, rel=1e-6)
    with torch.no_grad():
        model.w[:] = 0
    found = measured(["hessian/lambda_max"], model, own())["hessian/lambda_max"]
    assert found.value == pytest.approx(59, rel=1e-6)


@pytest.mark.parametrize("weights", [(2.0, 0.5), (0.5, 2.0, 3.0)])
def test_minima_of_deep_linear_networks(weights):
    """At a minimum, H = x^2 v v^T with v_i the product of the other weights."""
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    product = np.prod(weights)
    found = measured("hessian", Product(*weights), nt.Probe(x, product * x))
    v = product / np.asarray(weights)
    assert found["hessian/lambda_max"].value == pytest.approx(2.5 * v @ v)
    assert found["hessian/trace"].value == pytest.approx(2.5 * v @ v)
    assert found["hessian/lambda_min"].value == pytest.approx(0, abs=1e-6 * v @ v)
    assert "hessian/gradient_sharpness" not in found  # where the gradient is zero


@pytest.mark.parametrize("group", ["hessian", "ggn", "fisher"])
def test_matrices_of_a_network(group):
    model, probe = network()
    matrix = dense_hessian(model, probe) if group == "hessian" else dense_gauss_newton(model, probe)
    values = torch.linalg.eigvalsh(matrix).flip(0).numpy()
    names = [f"{group}/{q}" for q in ("lambda_max", "eigenvalues", "frobenius", "density")]
    found = measured([*names, f"{group}/density_at"], model, probe)
    assert found[names[0]].value == pytest.approx(values[0], rel=1e-6)
    assert np.allclose(found[names[1]].value, values[:10], rtol=0, atol=1e-6 * values[0])
    assert found[names[0]].attributes["residual"] < 1e-3 * values[0]
    frobenius = found[names[2]]
    truth = np.linalg.norm(values)
    assert abs(frobenius.value - truth) <= 6 * frobenius.standard_error + 1e-6 * truth
    places, density = found[f"{group}/density_at"].value, found[names[3]]
    assert trapezoid(density.value, places) == pytest.approx(1, abs=1e-2)
    error = trapezoid(density.standard_error * abs(places), places)
    mean = trapezoid(density.value * places, places)
    assert abs(mean - values.mean()) <= 4 * error + 1e-2 * abs(values).mean()


def test_of_the_hessian_alone():
    model, probe = network()
    hessian = dense_hessian(model, probe)
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0), vectors.flip(1)
    names = ["hessian", "hessian/lambda_max_per_layer", "hessian/diagonal"]
    found = measured([*names, "hessian/eigenvalues_lowest"], model, probe)
    assert found["hessian/lambda_min"].value == pytest.approx(float(values[-1]), abs=1e-6)
    lowest = found["hessian/eigenvalues_lowest"].value
    assert np.allclose(lowest, values.flip(0)[:5], rtol=0, atol=2e-6 * float(values[0]))
    trace = found["hessian/trace"]
    assert abs(trace.value - float(hessian.trace())) <= 6 * trace.standard_error + 1e-9
    layers, diagonal = found["hessian/trace_per_layer"], found["hessian/diagonal"]
    off = abs(diagonal.value - hessian.diagonal().numpy())
    assert (off <= 8 * diagonal.standard_error + 1e-6).all()
    ends = np.cumsum([0] + [p.numel() for p in model.parameters()])
    tops = found["hessian/lambda_max_per_layer"].value
    for i, (a, b) in enumerate(pairwise(ends)):
        block = hessian[a:b, a:b]
        assert tops[i] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-5)
        assert abs(layers.value[i] - float(block.trace())) <= 6 * layers.standard_error[i] + 1e-6
    assert layers.coordinates["layer"] == [n for n, _ in model.named_parameters()]
    g = flat(torch.autograd.grad(loss_of(model, probe), list(model.parameters())))
    share = (vectors[:, :10].T @ g).square().sum() / g.square().sum()
    assert found["hessian/gradient_alignment"].value == pytest.approx(float(share), abs=1e-4)
    each = F.cross_entropy(model(probe.inputs), probe.targets, reduction="none")
    rows = [flat(torch.autograd.grad(e, list(model.parameters()), retain_graph=True)) for e in each]
    noise = torch.stack(rows) - g
    share = (noise @ vectors[:, :10]).square().sum() / noise.square().sum()
    aligned = found["hessian/noise_alignment"]
    assert aligned.value == pytest.approx(float(share), abs=1e-4)
    assert 0 < aligned.standard_error < 0.5


def test_the_update_since_the_look_before():
    model, probe = network()
    tracer = nt.Tracer(probe, ["hessian/update_sharpness"], on_error="raise")
    assert "hessian/update_sharpness" not in measured((), model, probe, tracer=tracer)
    u = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with torch.no_grad():
        parts = u.split([p.numel() for p in model.parameters()])
        for p, part in zip(model.parameters(), parts, strict=True):
            p += 0.1 * part.view_as(p)
    found = measured((), model, probe, step=1, tracer=tracer)["hessian/update_sharpness"]
    true = u @ dense_hessian(model, probe) @ u / u.square().sum()
    assert found.value == pytest.approx(float(true))
    assert found.attributes["reference_step"] == 0


def test_following_a_run_is_right_at_every_record():
    model, probe = network()
    tracer = nt.Tracer(probe, ["hessian/lambda_max"], on_error="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(30):
        true = float(torch.linalg.eigvalsh(dense_hessian(model, probe))[-1])
        found = measured((), model, probe, step=step, tracer=tracer)["hessian/lambda_max"]
        assert found.value == pytest.approx(true, rel=1e-6)
        optimizer.zero_grad()
        loss_of(model, probe).backward()
        optimizer.step()


class Bowl(nn.Module):
    """Outputs of which half the squared norm, as loss, has the Hessian diag(curvatures)."""

    def __init__(self, curvatures):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(curvatures)))
        self.curvatures = curvatures

    def forward(self, x):
        return x * self.curvatures.sqrt() * self.weight


def test_old_eigenvectors_are_left_where_they_have_become_flat():
    """As in a network that diverges: they are eigenvectors still, of small eigenvalues."""
    curvatures = torch.zeros(50_000)
    model = Bowl(curvatures)
    probe = nt.Probe(
        torch.ones(1, 50_000),
        torch.zeros(1),
        losses=lambda outputs, _: 0.5 * outputs.square().sum(1),
    )
    tracer = nt.Tracer(probe, ["hessian/lambda_max"], on_error="raise")
    for step, (old, new) in enumerate([(1.0, 0.0), (1e-3, 5e-3), (1e-3, 8e-3)]):
        curvatures[:2] = torch.tensor([old, 0.5 * old])
        curvatures[2:4] = torch.tensor([new, 0.5 * new])
        found = measured((), model, probe, step=step, tracer=tracer)["hessian/lambda_max"]
        assert found.value == pytest.approx(max(old, new), rel=1e-3)


def test_products_are_checked_at_the_records_number_1_2_4_and_where_parameters_change(monkeypatch):
    model, probe = network()
    steps, own = [], second_order.cross_check

    def noted(*arguments):
        steps.append(step)
        return own(*arguments)

    monkeypatch.setattr(second_order, "cross_check", noted)
    tracer = nt.Tracer(probe, ["hessian/lambda_max"], on_error="raise", max_seconds=None)
    for step in range(8):
        model[0].bias.requires_grad_(step < 5)
        found = measured((), model, probe, step=step, tracer=tracer)["hessian/lambda_max"]
        assert "as finite differences confirm" in found.attributes["second_derivatives"]
    assert steps == [0, 1, 3, 5, 7]
    resumed = nt.Tracer(probe, ["hessian/lambda_max"], on_error="raise", max_seconds=None)
    resumed.load_state_dict(tracer.state_dict())
    step = 8
    measured((), model, probe, step=step, tracer=resumed)
    assert steps == [0, 1, 3, 5, 7]


def test_derivatives_that_are_wrong_are_not_used_between_checks():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, C)).double()
    _, probe = network()
    tracer = nt.Tracer(probe, ["hessian/lambda_max"], on_error="raise")
    for step in range(4):
        found = measured((), model, probe, step=step, tracer=tracer)["hessian/lambda_max"]
        assert "in float64, as" in found.attributes["second_derivatives"]
        assert found.value == pytest.approx(top_by_differences(model, probe), rel=1e-3)


def top_by_differences(model, probe):
    """The largest eigenvalue of the Hessian, from gradients of the loss apart by 1e-5."""
    parameters = list(model.parameters())
    point = flat(parameters).detach()

    def gradient(weights):
        nn.utils.vector_to_parameters(weights, parameters)
        return flat(torch.autograd.grad(loss_of(model, probe), parameters))

    moves = 1e-5 * torch.eye(len(point)).double()
    columns = [(gradient(point + move) - gradient(point - move)) / 2e-5 for move in moves]
    nn.utils.vector_to_parameters(point, parameters)
    return float(torch.linalg.eigvalsh(torch.stack(columns))[-1])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("updates", [0, 100])
def test_the_top_is_not_missed_from_whichever_start(activation, updates):
    """Where several eigenvalues lie close together, as at the beginning and in flat minima."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    probe = nt.Probe(x, (x[:, :4].argmax(1) + (x[:, 4] > 1)).clamp_max(3))
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), activation(), nn.Linear(24, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        for _ in range(updates):
            optimizer.zero_grad()
            loss_of(model, probe).backward()
            optimizer.step()
        true = float(torch.linalg.eigvalsh(dense_hessian(model, probe))[-1])
        for start in range(4):
            found = measured(["hessian/lambda_max"], model, probe, step=start)
            assert found["hessian/lambda_max"].value == pytest.approx(true, rel=1e-3)


def test_single_precision():
    model, probe = network(torch.float32)
    true = torch.linalg.eigvalsh(dense_hessian(model, probe))
    found = measured("hessian", model, probe)
    assert found["hessian/lambda_max"].value == pytest.approx(float(true[-1]), rel=1e-3)
    assert found["hessian/lambda_min"].value == pytest.approx(
        float(true[0]), abs=1e-3 * float(true[-1])
    )


def test_what_optimizers_make_of_it():
    model, probe = network()
    top = float(torch.linalg.eigvalsh(dense_hessian(model, probe))[-1])
    names = ["hessian/stability", "hessian/stability_gd", "hessian/stability_sgd"]
    trace = float(dense_hessian(model, probe).trace())
    found = measured(names, model, probe, torch.optim.SGD(model.parameters(), 0.3))
    assert found[names[0]].value == pytest.approx(0.3 * top / 2, rel=1e-6)
    assert found[names[1]].value == pytest.approx(0.3 * top / 2, rel=1e-6)
    half = found[names[2]]
    assert abs(half.value - 0.3 * trace / 2) <= 6 * half.standard_error + 1e-9
    decayed = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5, weight_decay=0.1)
    found = measured(names[:1], model, probe, decayed)
    assert found[names[0]].value == pytest.approx(0.3 * (top + 0.1) / 3, rel=1e-6)
    rates = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}]
    apart = torch.optim.SGD(rates, 0.4)
    matrix = dense_hessian(model, probe)
    roots = flat(
        torch.full_like(p, {"0": 0.1, "2": 0.0, "3": 0.4}[name[0]] ** 0.5)
        for name, p in model.named_parameters()
    ).double()
    scaled = roots[:, None] * matrix * roots
    found = measured(names[:1], model, probe, apart)
    expected = float(torch.linalg.eigvalsh(scaled)[-1]) / 2
    assert found[names[0]].value == pytest.approx(expected, rel=1e-6)
    with pytest.raises(Exception, match="different learning rates"):
        measured(names[1:2], model, probe, apart)
    adam = torch.optim.Adam(model.parameters(), 0.01)
    assert names[0] not in measured(names[:1], model, probe, adam)  # before its first step
    for _ in range(3):
        adam.zero_grad()
        loss_of(model, probe).backward()
        adam.step()
    found = measured(names[:1], model, probe, adam)
    divisors = flat(
        (adam.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for p in model.parameters()
    ).double()
    roots = (0.01 / divisors).sqrt()
    expected = torch.linalg.eigvalsh(roots[:, None] * dense_hessian(model, probe) * roots)[-1]
    assert found[names[0]].value == pytest.approx(float(expected) / 38, rel=1e-6)


def test_faults_are_told():
    model, probe = network()
    with pytest.warns(nt.MissingMeasureWarning, match="optimizer is not known"):
        records = nt.Tracer(probe, "hessian/stability")(model, 0)
    assert "pass it on" in records[0].missing
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.warns(nt.MissingMeasureWarning, match="not finite|NaN|nan"):
        records = nt.Tracer(probe, "hessian/lambda_max")(model, 0)
    assert records[0].missing
    with pytest.warns(nt.MissingMeasureWarning, match="no parameter requires a gradient"):
        nt.Tracer(probe, "hessian/lambda_max")(network()[0].requires_grad_(False), 0)
    unknown = nt.Probe(probe.inputs)
    with pytest.warns(nt.MissingMeasureWarning, match="loss is not known"):
        nt.Tracer(unknown, "hessian/lambda_max")(network()[0], 0)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "fisher"])
def test_operators_for_notebooks(matrix):
    model, probe = network()
    model.append(nn.Dropout())  # which is to be off
    operator = nt.curvature(model, probe, matrix)
    assert model.training
    model.eval()
    true = dense_hessian(model, probe) if matrix == "hessian" else dense_gauss_newton(model, probe)
    assert torch.allclose(operator.dense(), true, rtol=0, atol=1e-10)
    values = torch.linalg.eigvalsh(true)
    top, bottom = operator.eigenpairs(2, 1, tolerance=1e-10)
    assert torch.allclose(top.values, values.flip(0)[:2], rtol=0, atol=1e-9)
    for pairs in (top, bottom):
        off = true @ pairs.vectors - pairs.vectors * pairs.values
        assert torch.allclose(off.norm(dim=0), pairs.residuals, rtol=1e-3, atol=1e-12)
    assert operator.density().moment(1).value == pytest.approx(float(values.mean()), abs=0.1)
    with pytest.raises(ValueError, match="jacobian"):
        nt.curvature(model, probe, "jacobian")


class OfOneType(nn.Module):
    """Casts its inputs to single precision, whatever its weights are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.float())).float())


def test_a_network_of_one_type_is_not_checked_and_that_is_said():
    torch.manual_seed(0)
    model, (_, probe) = OfOneType(), network(torch.float32)
    found = measured(["hessian/lambda_max"], model, probe)["hessian/lambda_max"]
    assert "not held against finite differences" in found.attributes["second_derivatives"]
    true = torch.linalg.eigvalsh(dense_hessian(model, probe))[-1]
    assert found.value == pytest.approx(float(true), rel=1e-3)


class Once(torch.autograd.Function):
    """A square whose backward pass hides how it depends on its cotangent."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2 * x * g.detach()) + 0.1 * x * g


def test_products_that_are_not_symmetric_are_refused_by_all_measures():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 40), nn.Linear(40, C)

        def forward(self, x):
            return self.last(Once.apply(self.first(x)))

    torch.manual_seed(0)
    model, (_, probe) = Hidden().double(), network()
    for name in ("ggn/lambda_max", "ggn/frobenius", "ggn/density"):
        with pytest.raises(Exception, match="symmetric"):
            measured([name], model, probe)


def test_noise_takes_two_samples():
    model, probe = network()
    alone = nt.Probe(probe.inputs[:1], probe.targets[:1])
    with pytest.raises(ValueError, match="at least 2 samples"):
        measured(["hessian/noise_alignment"], model, alone)


def test_groups_stand_for_what_a_network_and_a_probe_define():
    names = {measure.name for measure in resolve(["hessian", "ggn"])}
    assert {"hessian/lambda_max", "hessian/trace", "ggn/trace"} <= names
    assert not names & {"hessian/density", "hessian/stability", "ggn/density"}
