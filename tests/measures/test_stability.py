"""Where steps of an optimizer begin to grow: predicted by measures, and seen in simulation."""

import math

import pytest
import torch
from torch import nn

import nettrace as nt

CURVATURES = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)


class Quadratic(nn.Module):
    """Outputs w_i sqrt(h_i): half their squares sum to a loss of Hessian diag(h)."""

    def __init__(self, curvatures, start=1.0):
        super().__init__()
        self.roots = curvatures.sqrt()
        self.w = nn.Parameter(torch.full_like(curvatures, start))

    def forward(self, x):
        return x * self.roots * self.w


def measured(model, optimizer, name, x, y):
    found = {}
    probe = nt.Probe(x, y, likelihood="gaussian")
    for record in nt.Tracer(probe, [name], on_error="raise")(model, 0, optimizer):
        found[record.name] = record
    return found[name]


def run(model, optimizer, steps, losses):
    """The distance from the minimum: before, at the most, and after."""
    norms = []
    for _ in range(steps):
        norms.append(float(model.w.detach().norm()))
        optimizer.zero_grad()
        losses(model).backward()
        optimizer.step()
    return norms[0], max(norms), float(model.w.detach().norm())


def quadratic(model):
    return model(torch.ones(1, len(model.w), dtype=model.w.dtype)).square().sum() / 2


RULES = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "light ball": {"momentum": 0.5},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "dampening for nothing": {"dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.2},
    "all": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov with decay": {"momentum": 0.6, "nesterov": True, "weight_decay": 0.3},
}


@pytest.mark.parametrize("rule", RULES)
def test_sgd_diverges_just_above_one_and_converges_just_below(rule):
    """Learning rates are set by the measure at another, as it is proportional to them."""
    x, y = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)

    def at(rate):
        model = Quadratic(CURVATURES)
        return model, torch.optim.SGD(model.parameters(), lr=rate, **RULES[rule])

    found = float(measured(*at(0.1), "hessian/stability", x, y).value)
    for stability, grows in ((1.02, True), (0.98, False)):
        model, optimizer = at(0.1 * stability / found)
        again = float(measured(model, optimizer, "hessian/stability", x, y).value)
        assert again == pytest.approx(stability, rel=1e-6)
        before, most, after = run(model, optimizer, 300, quadratic)
        assert most > 1e3 * before if grows else after < 0.9 * before


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("adam", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_with_what_it_has_seen_diverges_just_above_one(adam, momentum):
    """Second moments are as good as frozen: beta_2 is next to 1, after steps that set them."""
    x, y = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    options = {"betas": (momentum, 1 - 1e-12), "weight_decay": 0.0}

    def seen(rate):
        model = Quadratic(CURVATURES)
        optimizer = adam(model.parameters(), lr=rate, **options)
        run(model, optimizer, 1, quadratic)
        state = optimizer.state[model.w]
        state["step"].fill_(1e15)  # late: nothing is left of bias corrections
        state["exp_avg_sq"].copy_(torch.tensor([4.0, 0.01, 1.0]))
        return model, optimizer

    found = float(measured(*seen(1e-3), "hessian/stability", x, y).value)
    by_hand = float((CURVATURES / torch.tensor([2.0, 0.1, 1.0])).max())
    threshold = 2 * (1 + momentum) / (1 - momentum)
    assert found == pytest.approx(1e-3 * by_hand / threshold, rel=1e-6)
    for stability, grows in ((1.02, True), (0.98, False)):
        model, optimizer = seen(1e-3 * stability / found)
        before, most, after = run(model, optimizer, 300, quadratic)
        assert most > 1e3 * before if grows else after < before


def test_groups_of_parameters_have_a_learning_rate_each():
    """Which of two weights becomes unstable depends on curvature and rate together."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(2.0), model[1].weight.fill_(0.5)
    x, y = torch.ones(1, 1).double(), torch.ones(1, 1).double()  # at a minimum
    rates = (0.1, 0.7)
    groups = [{"params": part.parameters(), "lr": r} for part, r in zip(model, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    found = measured(model, optimizer, "hessian/stability", x, y)
    # By hand: f = a b, so g g^T with g = (b, a), scaled by the rates.
    assert float(found.value) == pytest.approx((0.1 * 0.5**2 + 0.7 * 2.0**2) / 2, rel=1e-6)


def test_a_warm_start_sees_an_eigenvalue_that_overtakes_another():
    """As at the edge of stability, where the leading two are held at the same value."""
    torch.manual_seed(0)
    size = 120
    base = torch.rand(size, dtype=torch.float64) * 0.5
    x, y = torch.ones(1, size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)
    probe = nt.Probe(x.float(), y.float(), likelihood="gaussian")
    tracer = nt.Tracer(probe, "hessian/lambda_max", on_error="raise")
    model = Quadratic(base.float())
    for step in range(30):
        base[3], base[7] = 5 + 0.1 * math.sin(step), 5 + 0.1 * math.cos(1.7 * step)
        model.roots = base.sqrt().float()
        value = float(tracer(model, step)[0].value)
        assert value == pytest.approx(float(base.max()), rel=1e-3)


# Noise: theory has it that SGD of single samples is stable up to eta tr H = 2 ---------------------


class Linear(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, size, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w.T


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("stability", [0.9, 0.98, 1.02, 1.1])
def test_sgd_of_single_samples_on_orthonormal_data_is_stable_up_to_one(samples, stability):
    """There the bound is met: mean squares over runs grow above it, and shrink below.

    Along sample n, w is multiplied by 1 - eta |x_n|^2 once in N steps on average, and is otherwise
    unchanged, so that mean squares change by 1 - (2 eta |x|^2 - eta^2 |x|^4) / N each step.
    """
    torch.manual_seed(0)
    x = 1.5 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][:samples]
    model = Linear(6)
    y = torch.zeros(samples, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = measured(model, optimizer, "hessian/stability_sgd", x, y)
    assert float(found.value) == pytest.approx(0.1 * 1.5**2 / 2, rel=1e-6)  # tr H = mean |x|^2
    rate = 0.1 * stability / float(found.value)
    runs, steps = 2000, 10 * samples
    w = torch.ones(runs, 6, dtype=torch.float64)
    for _ in range(steps):
        batch = x[torch.randint(samples, (runs,))]
        w -= rate * (w * batch).sum(1, keepdim=True) * batch
    start = (torch.ones(6, dtype=torch.float64) @ x.T).square().sum()
    growth = float((w @ x.T).square().sum(1).mean() / start)
    assert growth > 1 if stability > 1 else growth < 1


def test_the_bound_is_no_threshold_for_other_data():
    """For Gaussian data SGD of single samples is unstable before, as the mean-square map tells."""
    torch.manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64)
    model = Linear(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    y = torch.zeros(20, 1, dtype=torch.float64)
    stability = float(measured(model, optimizer, "hessian/stability_sgd", x, y).value)
    outer = torch.einsum("na,nb->nab", x, x)
    h, one = outer.mean(0), torch.eye(5, dtype=torch.float64)
    fourth = torch.einsum("nab,ncd->acbd", outer, outer).reshape(25, 25) / 20

    def grows(rate):
        mixed = torch.kron(h, one) + torch.kron(one, h)
        whole = torch.eye(25, dtype=torch.float64) - rate * mixed + rate**2 * fourth
        return float(torch.linalg.eigvals(whole).abs().max()) > 1

    edge = 0.01 / stability  # the rate at which the bound is met
    assert grows(edge)
    assert not grows(0.2 * edge)
