"""Measures of a window of weights, against dense covariances, autograd and theory."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.measures import available, resolve, statistics
from nettrace.statistics import Statistics, Unavailable
from nettrace.window import WeightWindow

OF_WINDOW = [m for m in available() if set(m.needs) & Statistics.of_window and m.is_own]
OF_LOSS = [m for m in OF_WINDOW if m.function.__module__.endswith(".flatness")]


def look(model, probe, window, names, step=0):
    """What was measured, by name."""
    measures = resolve(names)
    with frozen(model):
        needs = {need for m in measures for need in m.needs}
        found = Statistics(model, probe, needs, step=step, window=window)
        return {m.name: m(found) for m in measures}


def trained(model, x, y, window, updates, batch, rate=0.1, momentum=0.0, loss=F.cross_entropy):
    """SGD on batches out of shuffled epochs, with all weights of the window stored."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)
    stored, order = [], []
    for step in range(1, updates + 1):
        order = order if len(order) >= batch else torch.randperm(len(x)).tolist()
        some, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss(model(x[some]), y[some]).backward()
        optimizer.step()
        window.see(model, step, [optimizer], float(step * batch))
        chosen = dict(model.named_parameters())
        parts = [chosen[n].detach().flatten() for n in window.names]
        parts = [torch.view_as_real(p).flatten() if p.is_complex() else p for p in parts]
        stored.append(torch.cat([p.double() for p in parts]))
    return torch.stack(stored[-window.length :]).numpy()


def small(window, **options):
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    y[::7] = 0
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    stored = trained(model, x, y, window, 500, 10, **options)
    return model, nt.Probe(x, y), stored


def test_the_window_against_dense_covariances():
    window = WeightWindow(400)
    model, probe, stored = small(window)
    x = stored - stored.mean(0)
    names = ["variance", "variation", "variation_per_layer", "drift", "layer_correlations"]
    names += ["correlation_time", "stationarity", "mean_squared_displacement", "update_ratio"]
    found = look(model, probe, window, [f"weights/{n}" for n in names])
    covariance = x.T @ x / 400
    values = np.linalg.eigvalsh(covariance)[::-1]
    got = found["weights/variance"].value.numpy()
    assert 40 <= len(got) <= stored.shape[1]  # some directions of a softmax are still
    np.testing.assert_allclose(got[:20], values[:20], rtol=1e-6)
    assert found["weights/variation"].value == pytest.approx(np.trace(covariance))
    parts = np.cumsum([p.numel() for p in model.parameters()])[:-1]
    layers = [p.sum() for p in np.split(covariance.diagonal(), parts)]
    per_layer = found["weights/variation_per_layer"]
    np.testing.assert_allclose(per_layer.value, layers)
    assert per_layer.coordinates["layer"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    moved = np.linalg.norm(stored[-1] - stored[0])
    assert found["weights/drift"].value == pytest.approx(moved)
    blocks = [np.split(rows, parts, 1) for rows in np.split(covariance, parts)]
    norms = np.array([[np.linalg.norm(block) for block in row] for row in blocks])
    expected = norms / np.sqrt(np.outer(norms.diagonal(), norms.diagonal()))
    np.testing.assert_allclose(found["weights/layer_correlations"].value, expected, rtol=1e-6)
    lags = found["weights/mean_squared_displacement"].coordinates["lag"]
    each = [np.square(stored[int(k) :] - stored[: -int(k)]).sum(1).mean() for k in lags]
    np.testing.assert_allclose(found["weights/mean_squared_displacement"].value, each, rtol=1e-6)
    steps = np.diff(stored, axis=0)
    ratio = -2 * (x[:-1] * steps).sum() / np.square(steps).sum()
    assert found["weights/stationarity"].value == pytest.approx(ratio, rel=1e-6)
    rms = [np.sqrt(np.square(p).sum(1).mean()) for p in np.split(steps, parts, 1)]
    norms = [float(p.detach().norm()) for p in model.parameters()]
    np.testing.assert_allclose(
        found["weights/update_ratio"].value, np.divide(rms, norms), rtol=1e-4
    )


def test_the_landscape_along_directions_against_autograd():
    window = WeightWindow(120, parameters="0.*", population=60)
    model, probe, stored = small(window)
    model = model.double()
    probe = nt.Probe(probe.inputs.double(), probe.targets)
    names = [m.name for m in OF_LOSS]
    found = look(model, probe, window, names)
    x = stored - stored.mean(0)
    vectors = np.linalg.svd(x, full_matrices=False)[2]
    (weight, bias), rest = list(model[0].parameters()), model[1:]
    sizes, x_, y_ = (24, 6), probe.inputs, probe.targets

    for p in model.parameters():
        p.requires_grad_(False)

    def losses(flat):
        w, b = flat.split(sizes)
        return F.cross_entropy(rest(F.linear(x_, w.view(6, 4), b)), y_, reduction="none")

    point = torch.cat([weight.detach().flatten(), bias.detach()])
    hessian = torch.autograd.functional.hessian(lambda w: losses(w).mean(), point).numpy()
    gradients = torch.autograd.functional.jacobian(losses, point).numpy()
    k = 12  # directions that rounding does not mix
    p = vectors[:k]
    h = np.einsum("kp,pq,kq->k", p, hessian, p)
    np.testing.assert_allclose(found["weights/curvature"].value[:k], h, rtol=1e-5, atol=1e-9)
    c = np.var(gradients @ p.T, axis=0, ddof=1)
    np.testing.assert_allclose(found["weights/gradient_noise"].value[:k], c, rtol=1e-5)
    mean = torch.from_numpy(stored.mean(0))
    least = float(losses(mean).mean())
    finite = 0
    for i in range(k):
        sides = [
            _crossing(losses, mean, s * torch.from_numpy(p[i]), math.e * least) for s in (1, -1)
        ]
        finite += math.isfinite(sum(sides))
        assert found["weights/flatness"].value[i] == pytest.approx(sum(sides), rel=2e-3)
    assert finite >= 4
    all_h = found["weights/curvature"].value.sum()
    all_c = found["weights/gradient_noise"].value.sum()
    assert found["weights/noise_to_hessian"].value == pytest.approx(float(all_c / all_h))
    # Of a softmax the Fisher is the expectation over its own targets.
    probabilities = F.softmax(rest(F.linear(x_, weight, bias)), 1).detach().numpy()
    fisher = np.zeros((30, 30))
    for outcome in range(3):

        def drawn(flat, outcome=outcome):
            w, b = flat.split(sizes)
            logits = rest(F.linear(x_, w.view(6, 4), b))
            return F.cross_entropy(logits, torch.full((60,), outcome), reduction="none")

        g = torch.autograd.functional.jacobian(drawn, point).numpy()
        fisher += np.einsum("np,nq,n->pq", g, g, probabilities[:, outcome]) / 60
    ratio = float(all_c) / np.trace(fisher)  # over a basis of all 30
    assert found["weights/noise_to_fisher"].value == pytest.approx(ratio, rel=1e-4)


def _crossing(losses, mean, direction, target):
    """Where the loss first reaches the target, by small steps and bisection."""
    far = torch.logspace(-2, 2.5, 1000).double()
    above = [float(losses(mean + d * direction).mean()) >= target for d in far]
    if not any(above):
        return math.inf
    low, high = float(far[above.index(True) - 1]), float(far[above.index(True)])
    for _ in range(40):
        middle = (low + high) / 2
        below = float(losses(mean + middle * direction).mean()) < target
        low, high = (middle, high) if below else (low, middle)
    return low


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_variance_that_is_predicted_is_measured(momentum):
    """Linear regression at its minimum: noise of the residuals, shuffled epochs, known population.

    Curvatures are far apart, so that modes are the Hessian's directions.
    """
    torch.manual_seed(0)
    samples, scales = 400, torch.tensor([3.0, 1.5, 0.7, 0.35, 0.15, 1.0, 2.1, 0.5, 0.25]).double()
    x = torch.randn(samples, 9).double() * scales
    y = torch.randn(samples, 1).double()
    model = nn.Linear(9, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
    updates, rate = 6000, 0.05 * (1 - momentum)
    window = WeightWindow(updates - 1000, population=samples)

    def half(outputs, targets):
        return (outputs - targets).square().mean() / 2

    trained(model, x, y, window, updates, 20, rate, momentum, half)
    probe = nt.Probe(x, y, likelihood="gaussian")
    names = ["weights/variance", "weights/variance_predicted", "weights/correlation_time"]
    names += ["weights/temperature", "weights/equilibration"]
    found = look(model, probe, window, names)
    predicted = found["weights/variance_predicted"]
    assert predicted.attributes["sampling"] == "epochs of 20"
    measured = found["weights/variance"]
    assert predicted.attributes["log_correlation"] > 0.98
    ratio = (measured.value / predicted.value).numpy()
    error = (measured.standard_error / measured.value).numpy()
    resolved = np.isfinite(error)
    assert resolved.sum() >= 7
    assert np.median(ratio[resolved]) == pytest.approx(1, abs=0.15)
    assert (np.abs(ratio - 1)[resolved] < 4 * error[resolved] + 0.2).all()
    temperature = found["weights/temperature"]
    assert temperature.value == pytest.approx(rate / 20)
    assert temperature.attributes["with_momentum"] == pytest.approx(0.05 / 20)
    assert found["weights/equilibration"].value > 0.8
    assert "warning" not in found["weights/equilibration"].attributes
    if momentum == 0:  # independent batches would be another matter
        independent = WeightWindow(updates - 1000)
        independent.__dict__.update({**window.__dict__, "population": None})
        free = look(model, probe, independent, "weights/variance_predicted")
        assert free["weights/variance_predicted"].attributes["sampling"] == "independent"
        there = free["weights/variance_predicted"].value / predicted.value
        assert float(there.min()) > 1
        assert float(there.max()) > 2


def digits_network(seed, epochs, window):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(seed)
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    widths = (64, 50, 50, 10)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    batches = len(x) // 50
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(epochs):
        order = torch.randperm(len(x))
        for j in range(batches):
            some = order[j * 50 : (j + 1) * 50]
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            step = 1 + j + epoch * batches
            window.see(model, step, [optimizer], 50.0 * step)
    return model, nt.Probe(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_inverse_variance_flatness_relation_on_digits(seed):
    """Feng and Tu's window of ten epochs, after 200."""
    window = WeightWindow(350, parameters="2.weight", population=1750)
    model, probe = digits_network(seed, 210, window)
    names = ["weights/flatness_exponent", "weights/variance_predicted"]
    names += ["weights/flatness_exponent_predicted", "weights/equilibration"]
    found = look(model, probe, window, names)
    psi = found["weights/flatness_exponent"]
    assert 3.3 < float(psi.value) < 4.5
    assert psi.attributes["interval_low"] < float(psi.value) < psi.attributes["interval_high"]
    assert psi.attributes["r_squared"] > 0.9
    assert "warning" in psi.attributes  # ten epochs are short: it says so
    predicted = found["weights/variance_predicted"].attributes
    assert predicted["log_correlation"] > 0.95
    assert predicted["sampling"] == "epochs of 35"
    parts = found["weights/flatness_exponent_predicted"].attributes
    assert 1 < parts["gamma"] < 2
    assert parts["psi_stationary"] < parts["psi_short_window"] < psi.value


@pytest.mark.parametrize("kind", ["sketch", "moments"])
def test_what_is_kept_decides_what_there_is(kind):
    window = WeightWindow(100, keep=kind)
    model, probe, stored = small(window)
    found = look(model, probe, window, ["weights/variation", "weights/drift"])
    rows = stored if kind == "sketch" else None
    if rows is not None:
        total = rows.var(0).sum()
        assert found["weights/variation"].value == pytest.approx(total, rel=1e-5)
        names = [m.name for m in OF_WINDOW if m not in OF_LOSS and m.name != "weights/tail_index"]
        assert len(look(model, probe, window, names)) == len(names)
    assert found["weights/variation"].attributes["kept"] == kind
    dear = "weights/flatness" if kind == "sketch" else "weights/variance"
    with pytest.raises(Unavailable, match="name fewer parameters by WeightWindow"):
        look(model, probe, window, dear)


def test_a_sketch_of_many_weights_tells_its_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 2))
    window = WeightWindow(40, keep="sketch")
    stored = []
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)
        window.see(model, step)
        stored.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    probe = nt.Probe(torch.randn(8, 100), torch.zeros(8).long())
    found = look(model, probe, window, ["weights/variation", "weights/variance"])
    variation = found["weights/variation"]
    truth = float(torch.stack(stored).double().var(0, correction=0).sum())
    error = variation.attributes["sketch_error"]
    assert 0.002 < error < 0.05
    assert float(variation.value) == pytest.approx(truth, rel=4 * error)
    rows = torch.stack(stored).double()
    exact = torch.linalg.svdvals(rows - rows.mean(0)).square() / 40
    np.testing.assert_allclose(found["weights/variance"].value, exact[:39], rtol=0.25)


FAULTS = {
    "no window": (lambda: None, "pass Tracer"),
    "not full": (lambda: _seen(range(12)), "the window has 12 of 40 snapshots: it fills"),
    "a gap": (lambda: _seen([0, 10, 20]), r"1 of 40 .* pass stride=10"),
    "no parameter": (lambda: _seen(range(40), parameters="x.*"), "no parameter that requires"),
    "memory": (lambda: _seen(range(40), memory="1B"), "above memory=1 bytes"),
}


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _seen(steps, change=lambda p, step: p.mul_(1 + 0.001 * (step % 7)), **options):
    window, model = WeightWindow(40, **options), _model()
    for step in steps:
        with torch.no_grad():
            for p in model.parameters():
                change(p, step)
        window.see(model, step)
    return window


def _probe():
    return nt.Probe(torch.randn(10, 4), torch.arange(10) % 3)


@pytest.mark.parametrize("measure", OF_WINDOW, ids=lambda m: m.name)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_says_what_to_do(fault, measure):
    make, words = FAULTS[fault]
    with pytest.raises(Unavailable, match=words):
        look(_model(), _probe(), make(), measure.name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    window = _seen(range(40), lambda p, step: p.fill_(value if step == 20 else step))
    for name in ("variance", "stationarity", "flatness", "mean_squared_displacement"):
        with pytest.raises(ValueError, match=r"of '0.weight', weights in the window are not"):
            look(_model(), _probe(), window, f"weights/{name}")


def test_weights_that_do_not_move():
    window = _seen(range(40), lambda p, step: p)
    for name in ("variance", "equilibration", "flatness", "mean_squared_displacement"):
        with pytest.raises(ValueError, match="do not move"):
            look(_model(), _probe(), window, f"weights/{name}")
    assert look(_model(), _probe(), window, "weights/variation")["weights/variation"].value == 0


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (None, "the learning rate or the momentum is not known"),
        (lambda p: torch.optim.Adam(p), "weights are updated by Adam"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), "SGD with nesterov=True"),
        (lambda p: torch.optim.SGD(p, 0.1), "how many samples an update sees is not known"),
    ],
)
def test_theory_of_other_updates_is_not_told(optimizer, words):
    model, window = _model(), WeightWindow(40)
    optimizers = [] if optimizer is None else [optimizer(model.parameters())]
    samples = math.nan if words.startswith("how many") else 8.0
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=generator)
        window.see(model, step, optimizers, samples * step)
    with pytest.raises((ValueError, Unavailable), match=words):
        look(model, _probe(), window, "weights/variance_predicted")


def test_layers_as_they_are():
    model = nn.Sequential(nn.Linear(4, 5), nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))
    with torch.no_grad():
        u, v = torch.linalg.qr(torch.randn(5, 4)).Q, torch.linalg.qr(torch.randn(4, 4)).Q
        model[0].weight.copy_(u * torch.tensor([4.0, 2.0, 2.0, 0.0]) @ v.mT)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    norms, ranks, values = (
        m.function(weights)
        for m in resolve(["weights/norms", "weights/effective_rank", "weights/singular_values"])
    )
    assert norms.coordinates["layer"] == list(weights)
    np.testing.assert_allclose(norms.value, [w.norm() for w in weights.values()], rtol=1e-6)
    assert ranks.coordinates["layer"] == ["0.weight", "1.weight"]
    assert float(ranks.value[0]) == pytest.approx(2**1.5, rel=1e-4)
    np.testing.assert_allclose(values.value[0], [4, 2, 2, 0], atol=1e-5)
    conv = torch.linalg.svdvals(weights["1.weight"].flatten(1).double())
    np.testing.assert_allclose(values.value[1], [*conv, np.nan], rtol=1e-6)


class Odd(nn.Module):
    """Complex numbers that begin anywhere, a parameter that is still, and one that is a number."""

    def __init__(self):
        super().__init__()
        self.scale, self.still = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(2))
        self.inner, self.head = nn.Linear(4, 6, dtype=torch.complex64), nn.Linear(6, 3)

    def forward(self, x):
        found = self.head(self.inner(x.to(self.inner.weight.dtype)).abs()) * self.scale
        return found + self.still.sum() * 0


class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self[2].weight = self[0].weight


NETWORKS = {
    "complex": Odd,
    "tied": Tied,
    "half": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16(),
    "convolution": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(9, 3)),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name):
    torch.manual_seed(0)
    model, window = NETWORKS[name](), WeightWindow(64, population=30)
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    x = x.bfloat16() if name == "half" else x
    trained(model, x, y, window, 100, 5, rate=0.05, momentum=0.5)
    names = [m.name for m in OF_WINDOW if m.name != "weights/tail_index"]
    found = look(model.eval(), nt.Probe(x, y), window, names)
    for one in names:
        if one not in ("weights/layer_correlations", "weights/variance_predicted"):
            assert bool(torch.as_tensor(found[one].value).isnan().sum() == 0), one
    total = found["weights/variance"].value.sum()
    assert float(total) == pytest.approx(float(found["weights/variation"].value), rel=1e-4)
    if name == "complex":
        assert found["weights/update_ratio"].value[1] == 0
        assert bool(found["weights/layer_correlations"].value[1].isnan().all())


def test_records_say_of_which_updates_they_are():
    look = Statistics(_model(), _probe(), step=49, window=_seen(range(10, 50)))
    assert look.about(["window_modes"])["window"] == (
        "snapshots of 40 updates from step 10 to 49, 43 numbers of 4 parameters"
    )
    assert "window" not in look.about(["outputs"])
    assert Statistics.of_window <= statistics().keys()


def test_window_measures_are_asked_for_by_name():
    names = {m.name for m in resolve("weights")}
    assert not names & {m.name for m in OF_WINDOW}
    assert "weights/norms" in names
