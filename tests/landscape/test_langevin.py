"""Langevin chains against closed forms, and what they must leave alone."""

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.landscape import langevin, run
from nettrace.landscape.chains import Chains, mean_and_error
from nettrace.landscape.dynamics import LangevinWalkers, Settings
from nettrace.landscape.langevin_chains import Langevin
from nettrace.landscape.stiffness import FIRST, Stiffness
from nettrace.landscape.weight_loss import WeightLoss

CURVATURES = torch.logspace(0, -3, 6, dtype=torch.float64)


class Weights(nn.Module):
    """Gives its weights, whatever it sees."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        return self.weights.expand(len(x), -1)


def energies(losses, weights=None, likelihood="gaussian"):
    """A network of weights with a loss of one's own."""
    weights = torch.zeros(6, dtype=torch.float64) if weights is None else weights
    probe = nt.Probe(torch.zeros(2, 1), losses=lambda w, _: losses(w), likelihood=likelihood)
    return Weights(weights), probe


def quadratic(curvatures=CURVATURES):
    return energies(lambda w: (curvatures * w**2).sum(1) / 2, torch.zeros_like(curvatures))


def regression(samples=60, bias=True, dtype=torch.float32):
    """A linear network where its loss is least, with noise, and inputs of several widths."""
    x = torch.randn(samples, 4) * torch.tensor([1.0, 0.5, 0.3, 0.2])
    y = x @ torch.randn(4, 1) + 0.5 * torch.randn(samples, 1)
    model = nn.Linear(4, 1, bias=bias)
    columns = torch.cat([x, torch.ones(samples, 1)], 1) if bias else x
    least = torch.linalg.lstsq(columns, y).solution
    with torch.no_grad():
        model.weight.copy_(least[:4].T)
        if bias:
            model.bias.copy_(least[4])
    return model.to(dtype), nt.Probe(x.to(dtype), y.to(dtype))


def test_a_quadratic_energy_has_the_temperature_and_the_mean_of_theory(logged):
    """SCIENCE A9: half of n beta h / (n beta h + gamma) a direction, without bias of the step."""
    model, probe = quadratic()
    options = {"n": 1000, "beta": 0.145, "chains": 300, "warmup": 150}
    for dynamics, gamma, draws in [("underdamped", 10.0, 120), ("sgld", 100.0, 200)]:
        stiffness = 145 * CURVATURES + gamma
        options |= {"localisation": gamma, "dynamics": dynamics, "draws": draws}
        found = langevin(model, probe, **options)
        if dynamics == "underdamped":
            kinetic, error = found.kinetic_temperature, found.kinetic_temperature_standard_error
            expected = 1 - float(found.step_size) ** 2 * float(stiffness.mean()) / 4
            assert abs(kinetic - expected) < 4 * error
        for name, expected in {
            "energy": float((145 * CURVATURES / stiffness).sum() / 2),
            "configurational_temperature": 1,
            "squared_distance": float((1 / stiffness).sum()),
        }.items():
            error = float(found[name + "_standard_error"])
            assert 0 < error < 0.05 * expected
            assert abs(float(found[name]) - expected) < 4 * error + 0.01 * expected
        assert found.curvature == pytest.approx(float(stiffness.max()), rel=0.05)
        assert found.mean_loss == pytest.approx(float(found.energy) / 145)
    logged.clear()


def test_standard_errors_are_calibrated():
    """Of 100 groups of 4 chains: the errors that they tell are those that they make."""
    model, probe = quadratic(torch.tensor([1.0, 0.2, 0.05], dtype=torch.float64))
    with frozen(model):
        sampler = Langevin(
            WeightLoss(model, probe), 1000.0, Settings(chains=400, draws=400, warmup=300)
        )
        while sampler.share < 1:
            sampler.advance()
    truth = sum(1000 * h / (1000 * h + 1) for h in (1.0, 0.2, 0.05)) / 2
    groups = (1000 * sampler.excess()).reshape(100, 4, -1)
    found = [mean_and_error(group) for group in groups]
    deviations = np.array([(mean - truth) / error for mean, error in found])
    assert abs(deviations.mean()) < 4 / math.sqrt(100)
    assert 0.8 < deviations.std() < 1.3
    assert np.median([Chains.of(group).r_hat for group in groups]) < 1.05


@pytest.mark.parametrize("batch_size", [None, 4])
def test_what_is_measured_is_left_bitwise_alone(batch_size, logged):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    model[4].bias.requires_grad_(False)
    probe = nt.Probe(torch.randn(16, 3), torch.randint(0, 2, (16,)))
    model(probe.inputs).sum().backward()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    options = {"chains": 2, "draws": 20, "warmup": 10, "batch_size": batch_size, "spacing": 1}
    found = langevin(model, probe, **options)
    assert np.isfinite(found.loss).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is grad or torch.equal(parameter.grad, grad)
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.manual_seed(7)
    again = langevin(model, probe, **options)
    assert np.array_equal(found.loss, again.loss)
    other = langevin(model, probe, **options, seed=1)
    assert not np.array_equal(found.loss, other.loss)
    logged.clear()


def test_losses_are_those_in_evaluation_mode(logged):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    probe = nt.Probe(torch.randn(16, 3), torch.randint(0, 2, (16,)))
    model(torch.randn(16, 3) * 2)
    found = langevin(model.train(), probe, chains=2, draws=4, warmup=0)
    with torch.no_grad():
        truth = nn.functional.cross_entropy(model.eval()(probe.inputs), probe.targets)
    assert float(found.center_loss) == pytest.approx(float(truth), rel=1e-5)
    logged.clear()


def test_gradients_of_batches_are_unbiased_and_those_of_the_probe_at_the_centre():
    model, probe = regression()
    with frozen(model):
        loss = WeightLoss(model, probe)
        walkers = LangevinWalkers(loss, 60.0, Settings(chains=1500, batch_size=3))
        moved = loss.point + torch.randn(loss.size)
        whole = loss.gradients(loss.point[None])[1]
        assert (walkers.slopes - 60 * whole).abs().max() < 1e-3  # the control variate
        walkers.weights = moved.expand_as(walkers.weights)
        walkers.losses, walkers.slopes = walkers._at(walkers.weights, walkers._batches())
        truth = 60 * loss.gradients(moved[None])[1][0] + (moved - loss.point)
        errors = walkers.slopes.std(0) / math.sqrt(1500)
        assert ((walkers.slopes.mean(0) - truth).abs() < 4 * errors).all()
        assert (errors > 0).all()


@pytest.mark.parametrize("options", [{"dynamics": "sgld", "step_size": 0.004}, {"friction": 3.0}])
def test_the_noise_of_batches_is_taken_off(options, logged):
    model, probe = regression()
    x = torch.cat([probe.inputs, torch.ones(60, 1)], 1).double()
    h = torch.linalg.eigvalsh(x.T @ x / 60)
    settings = {"chains": 400, "draws": 60, "warmup": 200, "batch_size": 10, "spacing": 4}
    found = langevin(model, probe, localisation=10.0, **settings, **options)
    truth = float((60 * h / (60 * h + 10)).sum() / 2)
    error = float(found.energy_standard_error)
    assert error < 0.03 * truth
    assert abs(float(found.energy) - truth) < 4 * error + 0.01 * truth
    if "friction" in options:  # so little that the noise heats the chains
        assert 60 * float(found.step_size_bias) > 0.05 * truth
    logged.clear()


def test_chains_one_by_one_give_what_they_give_together(logged):
    class Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if float(self.weight.detach().sum()) < 1e9 else 2)

    model, probe = regression()
    asking = Asking(4, 1)
    asking.load_state_dict(model.state_dict())
    for batch_size in (None, 8):
        options = {"chains": 3, "draws": 15, "warmup": 5, "batch_size": batch_size, "spacing": 1}
        with frozen(asking):
            loss = WeightLoss(asking, probe)
            loss.gradients(loss.point.repeat(2, 1), torch.zeros(2, 5, dtype=torch.long))
            assert loss.apart["gradients of rows"] is not None
        together, apart = (langevin(m, probe, **options) for m in (model, asking))
        np.testing.assert_allclose(together.loss, apart.loss, rtol=1e-4)
    logged.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_give_the_same(dtype, logged):
    model, probe = regression(dtype=dtype)
    wide = copy.deepcopy(model).float()
    options = {"chains": 3, "draws": 20, "warmup": 20}
    found = langevin(model, probe, **options)
    expected = langevin(wide, probe.map(lambda t: t.float()), **options)
    assert next(model.parameters()).dtype == dtype
    if dtype != torch.float64:  # which draws other random numbers
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    assert np.isfinite(found.loss).all()
    logged.clear()


def test_complex_and_tied_weights_move(logged):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, dtype=torch.complex64)
            self.second = nn.Linear(3, 3, dtype=torch.complex64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x.to(torch.complex64))).abs()

    model = Model()
    x = torch.randn(20, 3)
    probe = nt.Probe(x, model(x).detach())
    found = langevin(model, probe, chains=50, draws=100, warmup=150, localisation=50.0)
    assert found.attrs["parameters"] == 2 * (9 + 3 + 3)
    assert float(found.configurational_temperature) == pytest.approx(1, abs=0.1)
    logged.clear()


def test_weights_that_the_loss_does_not_see_move_as_the_localisation_lets_them(logged):
    model, probe = quadratic()
    model.unused = nn.Parameter(torch.zeros(3))
    options = {"parameters": "unused", "chains": 300, "draws": 50, "warmup": 200}
    found = langevin(model, probe, localisation=4.0, **options)
    error = float(found.squared_distance_standard_error)
    assert abs(float(found.squared_distance) - 3 / 4) < 4 * error < 0.1
    assert not found.energy.any()
    logged.clear()


def test_one_chain_is_right_and_says_what_it_cannot_tell(logged):
    model, probe = quadratic(torch.ones(40, dtype=torch.float64))
    found = langevin(model, probe, n=100, chains=1, draws=700, warmup=100, friction=5.0)
    assert "one chain does not show" in logged.pop(0)
    assert np.isnan(found.r_hat)
    truth, error = 20 * 100 / 101, float(found.energy_standard_error)
    assert abs(float(found.energy) - truth) < 4 * error < 0.2 * truth


def test_chains_that_have_not_mixed_are_said_not_to_have(logged):
    generator = np.random.default_rng(0)
    still = generator.normal(size=(4, 500))
    assert Chains.of(still).doubts == ()
    for draws, expected in {
        "disagree": still + np.arange(4)[:, None],
        "drift": still + np.linspace(0, 1, 500),
        "independent ones": np.cumsum(still, 1),
        "tell no error": still[:, :3],
    }.items():
        assert any(draws in doubt for doubt in Chains.of(expected).doubts)
    assert Chains.of(np.ones((4, 50))).standard_error == 0
    model, probe = quadratic()
    langevin(model, probe, localisation=1e-4, chains=300, draws=20, warmup=20, n=1000)
    assert "have not spread" in "".join(logged)
    logged.clear()


def test_chains_that_diverge_are_named_and_left_out(logged):
    def losses(w):
        return (w**2).sum(1) / 2 + torch.where(w[:, 0] > 0.2, torch.nan, 0.0)

    model, probe = energies(losses, torch.zeros(2, dtype=torch.float64))
    options = {"n": 100, "chains": 40, "draws": 100, "warmup": 20, "step_size": 0.05}
    found = langevin(model, probe, **options)
    lost = [int(number) for number in found.attrs["diverged"].split()]
    assert 0 < len(lost) < 40
    finite = np.isfinite(found.loss).all("draw")
    assert sorted(np.flatnonzero(~finite)) == lost
    assert f"chains {', '.join(map(str, lost))} of 40 diverged" in "".join(logged)
    assert np.isfinite(found.energy)
    assert found.energy_standard_error > 0
    logged.clear()


def test_if_all_chains_diverge_it_is_an_error():
    model, probe = quadratic()
    with pytest.raises(FloatingPointError, match=r"all 3 chains diverged.*step_size="):
        langevin(model, probe, n=1000, chains=3, draws=500, warmup=0, step_size=1.0)


def test_chains_that_run_away_in_the_warm_up_begin_anew():
    model, probe = energies(
        lambda w: torch.where(w.abs() < 1e-3, w, torch.inf).square().sum(1),
        torch.zeros(2, dtype=torch.float64),
    )
    with pytest.raises(FloatingPointError):
        langevin(model, probe, chains=2, draws=100, warmup=50, localisation=1e-2)


def test_singular_points_are_left_without_running_away(logged):
    """Where the Hessian is zero at w*, only what chains meet tells how long steps may be."""
    model, probe = energies(lambda w: (w**4).sum(1), torch.zeros(3, dtype=torch.float64))
    found = langevin(model, probe, n=10**6, localisation=1e-2, chains=20, draws=200, warmup=300)
    assert found.attrs["diverged"] == ""
    # The curvature is 12 n w^2, at widths of w^4 = 1 / 4 n.
    assert 1e3 < float(found.curvature) < 1e5
    logged.clear()


def test_the_largest_curvature_is_found_and_followed():
    torch.manual_seed(1)
    matrix = torch.diag(torch.tensor([100.0, 30.0, 1.0, 0.1]))
    weights = torch.zeros(2, 4)
    found = Stiffness(torch.randn(2, 4), 1.0)
    for _ in range(FIRST):
        found.begin(lambda w: w @ matrix, weights, weights @ matrix)
    assert found.value == pytest.approx(100, rel=0.01)
    found.look(lambda w: 2 * w @ matrix, weights, weights)
    assert found.value == pytest.approx(200, rel=0.01)
    found.look(lambda w: w @ matrix, weights, weights)
    assert 100 < found.value < 200
    assert found.highest == pytest.approx(200, rel=0.01)


def test_its_time_is_kept_and_the_warm_up_ends_at_half_of_it(logged):
    model, probe = quadratic()
    found = langevin(model, probe, n=1000, draws=10**6, warmup=10**6, seconds=1.0)
    assert found.attrs["stopped"] == "out of time"
    assert found.attrs["warmup"] < 10**6
    assert found.sizes["draw"] > 0
    assert np.isfinite(found.loss).all()
    logged.clear()


def test_what_was_found_is_kept_when_it_is_stopped(monkeypatch, tmp_path, logged):
    model, probe = quadratic()
    moves = LangevinWalkers.move
    count = iter(range(10**6))

    def interrupted(self):
        if next(count) == 60:
            raise stop
        moves(self)

    monkeypatch.setattr(LangevinWalkers, "move", interrupted)
    stop = KeyboardInterrupt()
    options = {"n": 1000, "chains": 3, "draws": 1000, "warmup": 20}
    found = langevin(model, probe, **options)
    assert found.attrs["stopped"] == "interrupted"
    assert found.sizes["draw"] == 40

    stop, count = RuntimeError("killed"), iter(range(10**6))
    monkeypatch.setattr(sys.modules[run.__module__], "_BETWEEN", 0.0)
    monkeypatch.setattr(sys.modules[Langevin.__module__], "_PIECE", 0.0)
    monkeypatch.setattr(sys.modules[run.__module__], "_WRITING", 1e9)
    with pytest.raises(RuntimeError, match="killed"):
        langevin(model, probe, **options, to=tmp_path / "kept.nc")
    with xr.open_dataset(tmp_path / "kept.nc", engine="scipy") as kept:
        assert kept.attrs["stopped"] == "unfinished"
        assert 0 < kept.sizes["draw"] <= 40
        np.testing.assert_array_equal(kept.loss, found.loss[:, : kept.sizes["draw"]])
    logged.clear()


def test_results_are_there_before_any_draw():
    model, probe = quadratic()
    with frozen(model):
        found = Langevin(WeightLoss(model, probe), 100.0, Settings()).result()
    assert found.sizes["draw"] == 0
    assert np.isnan(found.energy)
    assert "tell no error" in found.attrs["doubts"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dynamics": "hmc"}, "dynamics= to be one of"),
        ({"chains": 0}, "chains= to be a whole number from 1 on, got 0"),
        ({"draws": 2.5}, "draws= to be a whole number"),
        ({"warmup": -1}, "warmup="),
        ({"batch_size": 0}, "batch_size="),
        ({"batch_size": 2}, "below the 2 samples of the probe"),
        ({"step_size": -1.0}, "step_size= to be positive, got -1.0"),
        ({"localisation": 0.0}, "localisation= to be positive"),
        ({"beta": float("nan")}, "beta= to be positive, got nan"),
        ({"n": 0}, "n= to be positive, got 0"),
        ({"friction": 1.0, "dynamics": "sgld"}, "leave it out"),
        ({"parameters": "bias"}, "no parameter that needs a gradient matches"),
        ({"seconds": 0}, "seconds= to be positive"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    model, probe = quadratic()
    with pytest.raises(ValueError, match=said):
        langevin(model, probe, **options)


def test_losses_that_are_not_numbers_are_refused():
    model, probe = quadratic()
    model.weights.data[0] = torch.nan
    with pytest.raises(ValueError, match="loss at the network's own weights is nan"):
        langevin(model, probe)


def test_without_arviz_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    model, probe = quadratic()
    with pytest.raises(ImportError, match=r"pip install 'nettrace\[landscape\]'"):
        langevin(model, probe)
