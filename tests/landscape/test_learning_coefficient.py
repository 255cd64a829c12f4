"""Learning coefficients against d/2, closed forms, quadrature and Aoyagi's theorem."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.landscape import learning_coefficient
from nettrace.landscape.dynamics import LangevinWalkers, Settings
from nettrace.landscape.weight_loss import WeightLoss

EULER = 0.5772156649015329


class Weights(nn.Module):
    """Gives its weights, whatever it sees."""

    def __init__(self, count):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x):
        return self.weights.expand(len(x), -1)


def energies(losses, count=1):
    """A network of weights with a loss of one's own, said to be a likelihood's."""
    return Weights(count), nt.Probe(
        torch.zeros(2, 1), losses=lambda w, _: losses(w), likelihood="gaussian"
    )


def regression(samples=200, noise=1.0):
    """A linear network where its loss is least, and the curvatures of the loss."""
    x = torch.randn(samples, 3)
    y = x @ torch.randn(3, 2) + noise * torch.randn(samples, 2)
    columns = torch.cat([x, torch.ones(samples, 1)], 1)
    least = torch.linalg.lstsq(columns, y).solution
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(least[:3].T)
        model.bias.copy_(least[3])
    h = torch.linalg.eigvalsh((columns.T @ columns / samples).double()).repeat(2)
    return model, nt.Probe(x, y), h.numpy()


class ReducedRank(nn.Module):
    """x -> B A x with A (H, M) and B (N, H)."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x):
        return x @ self.first.T @ self.second.T


def reduced_rank(m, hidden, n, rank, seed):
    """Reduced-rank regression at a minimum of the population's loss, |BA - B0 A0|^2 / 2."""
    random = torch.Generator().manual_seed(seed)
    turns = [torch.linalg.qr(torch.randn(k, k, generator=random)).Q for k in (m, hidden, n)]
    sizes = 0.8 + 0.4 * torch.rand(2, rank, generator=random)
    first, second = torch.zeros(hidden, m), torch.zeros(n, hidden)
    first[range(rank), range(rank)], second[range(rank), range(rank)] = sizes
    model = ReducedRank(turns[1] @ first @ turns[0].T, turns[2] @ second @ turns[1].T)
    x = math.sqrt(m) * torch.eye(m)  # of which the covariance is one
    return model, nt.Probe(x, model(x).detach(), likelihood="gaussian")


def aoyagi(m, hidden, n, rank):
    """The coefficient and its multiplicity: Aoyagi and Watanabe 2005, Neural Networks 18, 924."""
    if n + rank <= m + hidden and m + rank <= n + hidden and hidden + rank <= m + n:
        odd = (m + n + hidden + rank) % 2
        squares = -((hidden + rank) ** 2) - m**2 - n**2
        return (squares + 2 * (hidden + rank) * (m + n) + 2 * m * n + odd) / 8, 1 + odd
    if m + hidden < n + rank:
        return (hidden * m - hidden * rank + n * rank) / 2, 1
    if n + hidden < m + rank:
        return (hidden * n - hidden * rank + m * rank) / 2, 1
    return m * n / 2, 1


def within(found, truth, relative=0.01):
    """Whether an estimate is right within four errors, which are no excuse."""
    value = float(found.learning_coefficient)
    error = float(found.learning_coefficient_standard_error)
    return abs(value - truth) < 4 * error + relative * truth and 0 < error < 0.05 * truth


def test_a_regular_model_has_half_its_parameters(logged):
    model, probe, h = regression()
    options = {"chains": 200, "draws": 100, "warmup": 150, "localisation": 1e-3}
    found = learning_coefficient(model, probe, n=10**5, **options)
    assert within(found, 4.0)
    assert found.attrs["inverse_temperature"] == pytest.approx(10**5 / math.log(10**5))
    each = found.learning_coefficient_of_chain
    assert float(each.mean()) == pytest.approx(float(found.learning_coefficient))
    logged.clear()


def test_the_number_of_samples_is_that_of_the_probe_whatever_the_batches(logged):
    """And what the localisation takes is what is said."""
    model, probe, h = regression()
    options = {"chains": 100, "draws": 60, "warmup": 100, "localisation": 5.0}
    scale = 200 / math.log(200)
    truth = float((scale * h / (scale * h + 5)).sum() / 2)
    whole = learning_coefficient(model, probe, **options)
    batches = learning_coefficient(model, probe, **options, batch_size=20, spacing=3)
    with torch.no_grad():
        loss = (model(probe.inputs) - probe.targets).square().sum(1).mean() / 2
    for found in (whole, batches):
        assert found.attrs["inverse_temperature"] == pytest.approx(scale)
        assert float(found.center_loss) == pytest.approx(float(loss), rel=1e-5)
        assert within(found, truth, 0.02)
        assert float(found.localisation_energy) == pytest.approx(4 - truth, rel=0.1)
    logged.clear()


@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_quadratic_energies_follow_the_closed_form_of_the_step_and_the_localisation(gamma, logged):
    """SCIENCE A9: (1/2) sum n beta h / (k (1 - e k / 4)), and without the bias of the step."""
    h = torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64)
    model, probe = energies(lambda w: (h * w**2).sum(1) / 2, 3)
    options = {"n": 1000, "beta": 1.0, "dynamics": "sgld", "step_size": 1e-3}
    options |= {"chains": 400, "draws": 120, "warmup": 30, "localisation": gamma}
    found = learning_coefficient(model, probe, **options)
    k = 1000 * h.numpy() + gamma
    exact = (1000 * h.numpy() / k).sum() / 2
    biased = (1000 * h.numpy() / k / (1 - 1e-3 * k / 4)).sum() / 2
    assert biased > 1.1 * exact
    assert within(found, exact)
    error = float(found.learning_coefficient_uncorrected_standard_error)
    assert abs(float(found.learning_coefficient_uncorrected) - biased) < 4 * error < 0.1 * biased
    logged.clear()


def test_powers_of_a_weight_have_one_over_the_power(logged):
    """SCIENCE A9: 1 / 2k for w^2k at any n beta; three weights side by side make three times it."""
    for k in (1, 2, 3):
        model, probe = energies(lambda w, k=k: (w ** (2 * k)).sum(1), 3)
        options = {"chains": 400, "draws": 100, "warmup": 200, "localisation": 1e-2}
        found = learning_coefficient(model, probe, n=10**5, **options)
        assert within(found, 3 / (2 * k), 0.015), k
    logged.clear()


def quadrature(scale, weight, edge):
    """n beta <w1^2 w2^2> by quadrature: the logarithm of one weight, then the other's width."""
    w = np.exp(np.linspace(np.log(1e-14), np.log(edge), 20001))
    nodes, shares = np.polynomial.legendre.leggauss(200)
    norm = mean = 0.0
    for part in np.array_split(w, 20):
        width = np.minimum(edge, 12 / np.sqrt(2 * scale * part**2 + 1e-300))
        u = width[:, None] * (nodes + 1) / 2
        density = np.exp(-scale * (part[:, None] * u) ** 2) * weight(part[:, None]) * weight(u)
        jacobian = (width * part)[:, None] / 2 * shares
        norm += (density * jacobian).sum()
        mean += (density * jacobian * scale * (part[:, None] * u) ** 2).sum()
    return mean / norm


def test_crossing_valleys_are_low_by_a_logarithm(logged):
    """SCIENCE A9: w1^2 w2^2, of coefficient 1/2 and multiplicity 2, in a box and as it is here."""
    for scale in (1e2, 1e4):
        expected = 1 / 2 - 1 / math.log(4 * math.exp(EULER) * scale)
        assert quadrature(scale, np.ones_like, 1.0) == pytest.approx(expected, abs=1e-3)
    model, probe = energies(lambda w: w[:, 0] ** 2 * w[:, 1] ** 2, 2)
    options = {"chains": 500, "draws": 200, "warmup": 400, "localisation": 10.0}
    found = learning_coefficient(model, probe, n=10**4, beta=1.0, friction=15.0, **options)
    expected = quadrature(1e4, lambda w: np.exp(-10 * w**2 / 2), 3.0)
    assert 0.3 < expected < 0.45
    assert within(found, expected, 0.02)
    logged.clear()


RRR = {"n": 200_000, "chains": 50, "draws": 300, "warmup": 500}


def test_reduced_rank_regression_has_aoyagis_coefficient(logged):
    shape = (5, 3, 5, 1)
    model, probe = reduced_rank(*shape, seed=0)
    found = learning_coefficient(model, probe, **RRR)
    assert float(found.learning_coefficient) == pytest.approx(aoyagi(*shape)[0], rel=0.05)
    logged.clear()


def test_copies_are_taken_together_at_a_minimum_whose_gradient_is_rounding():
    model, probe = reduced_rank(5, 4, 5, 1, seed=0)
    with frozen(model):
        loss = WeightLoss(model, probe)
        LangevinWalkers(loss, 1e4, Settings())
    assert loss.apart == {"gradients": None}


SGLD = {"dynamics": "sgld", "spacing": 5, "step_size": 0.2 * math.log(200_000) / 200_000}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 3, 5, 3), {}),
        ((5, 3, 5, 1), {}),
        ((4, 3, 8, 0), {}),
        ((3, 8, 4, 0), {}),
        ((5, 3, 5, 3), SGLD),
    ],
)
def test_reduced_rank_regression_of_multiplicity_one_in_many_seeds(shape, options, logged):
    truth, multiplicity = aoyagi(*shape)
    assert multiplicity == 1
    errors = []
    for seed in range(20):
        model, probe = reduced_rank(*shape, seed)
        found = learning_coefficient(model, probe, **RRR, **options, seed=seed)
        errors.append(float(found.learning_coefficient) / truth - 1)
    print(shape, options, np.mean(errors), np.min(errors), np.max(errors))
    assert sum(abs(error) < 0.1 for error in errors) >= 18, errors
    logged.clear()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 3, 5, 0), (5, 4, 5, 1)])
def test_reduced_rank_regression_of_multiplicity_two_is_low_by_a_logarithm(shape, logged):
    truth, multiplicity = aoyagi(*shape)
    assert multiplicity == 2
    expected = truth - 1 / math.log(200_000 / math.log(200_000))
    errors = []
    for seed in range(20):
        model, probe = reduced_rank(*shape, seed)
        found = learning_coefficient(model, probe, **RRR, seed=seed)
        errors.append(float(found.learning_coefficient) / expected - 1)
    assert sum(abs(error) < 0.1 for error in errors) >= 18, errors
    print(shape, np.mean(errors), np.min(errors), np.max(errors))
    logged.clear()


def test_weights_that_are_no_minimum_are_said_not_to_be(logged):
    model, probe, h = regression()
    with torch.no_grad():
        model.bias += 1
    found = learning_coefficient(model, probe, chains=4, draws=200, warmup=100)
    assert found.learning_coefficient < 0
    assert "w* is no minimum of the loss" in found.attrs["doubts"]
    assert "w* is no minimum of the loss" in "".join(logged)
    logged.clear()


def test_losses_of_ones_own_are_said_to_be_doubtful(logged):
    model, probe, h = regression()
    probe.losses = lambda outputs, targets: (outputs - targets).abs().sum(1)
    found = learning_coefficient(model, probe, chains=4, draws=50, warmup=10)
    assert "negative log likelihoods" in found.attrs["doubts"]
    logged.clear()


def test_layers_are_restricted_to_their_parameters(logged):
    model, probe, h = regression()
    options = {"chains": 150, "draws": 50, "warmup": 100, "n": 10**5}
    found = learning_coefficient(model, probe, per_layer=True, **options)
    assert list(found.layer.values) == ["weight", "bias"]
    assert found.learning_coefficient.dims == ("layer",)
    assert found.loss.dims == ("layer", "chain", "draw")
    for name, expected in {"weight": 3.0, "bias": 1.0}.items():
        layer = found.sel(layer=name)
        assert within(layer, expected, 0.02)
    alone = learning_coefficient(model, probe, parameters="bias", **options)
    assert np.array_equal(layer.loss, alone.loss)
    assert layer.learning_coefficient == alone.learning_coefficient
    logged.clear()


def test_a_layer_of_which_all_chains_diverge_leaves_the_others(logged):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            broken = torch.where(self.bad.abs().sum() > 1e-6, torch.nan, 0.0)
            return x * self.good + broken

    probe = nt.Probe(torch.randn(30, 2), torch.zeros(30, 2), likelihood="gaussian")
    options = {"chains": 3, "draws": 30, "warmup": 10}
    found = learning_coefficient(Fragile(), probe, per_layer=True, **options)
    assert np.isfinite(found.learning_coefficient.sel(layer="good"))
    assert np.isnan(found.learning_coefficient.sel(layer="bad"))
    assert "bad: all 3 chains diverged" in found.attrs["doubts"]
    with pytest.raises(FloatingPointError, match="all 3 chains diverged"):
        learning_coefficient(Fragile(), probe, per_layer=True, parameters="bad", **options)
    logged.clear()


def test_what_was_found_of_each_layer_is_kept_when_time_is_over(tmp_path, logged):
    model, probe, h = regression()
    options = {"draws": 10**5, "per_layer": True, "seconds": 2.0, "to": tmp_path / "kept.nc"}
    found = learning_coefficient(model, probe, **options)
    assert found.attrs["stopped"] == "out of time"
    assert np.isfinite(found.learning_coefficient).all()
    with xr.open_dataset(tmp_path / "kept.nc", engine="scipy") as kept:
        assert np.array_equal(kept.learning_coefficient, found.learning_coefficient)
    logged.clear()


def test_it_is_left_bitwise_alone(logged):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    probe = nt.Probe(torch.randn(16, 3), torch.randint(0, 2, (16,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    learning_coefficient(model, probe, chains=2, draws=10, warmup=5, per_layer=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    logged.clear()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 1}, "n= to be more than 1, got 1"),
        ({"beta": 0.0}, "beta= to be positive, or None for 1 / ln n, got 0.0"),
        ({"parameters": "weight"}, "no parameter that needs a gradient matches"),
        ({"chains": 0}, "chains="),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    model, probe = energies(lambda w: w.square().sum(1))
    with pytest.raises(ValueError, match=said):
        learning_coefficient(model, probe, **options)


def test_a_file_without_a_draw_can_be_read(tmp_path, logged):
    model, probe = torch.nn.Linear(3, 1), nt.Probe(torch.randn(50, 3), torch.randn(50, 1))
    learning_coefficient(model, probe, seconds=1e-6, to=tmp_path / "a.nc")
    logged.clear()
    with xr.open_dataset(tmp_path / "a.nc", engine="scipy") as kept:
        assert kept.stopped == "out of time"
        assert np.isnan(kept.learning_coefficient)
