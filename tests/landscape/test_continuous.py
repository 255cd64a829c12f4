import copy
import time
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import integrate, stats
from torch import Tensor, nn
from zoo import build, losses

import nettrace as nt
from nettrace.estimators import generator
from nettrace.freeze import frozen
from nettrace.landscape import canonical, continuous, loss_density
from nettrace.landscape.continuous import ContinuousWalkers
from nettrace.landscape.continuous_density import LossDensity
from nettrace.landscape.descent import Level
from nettrace.landscape.prior import prior_of
from nettrace.landscape.spacing import Spacing
from nettrace.landscape.weight_loss import WeightLoss


class Bowl(nn.Module):
    """The squared length of the first few of the weights, halved, plus a constant."""

    def __init__(self, size: int, first: int | None = None, floor: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, dtype=torch.float64))
        self.first, self.floor = first, floor

    def forward(self, x: Tensor) -> Tensor:
        return self.w[: self.first].square().sum() / 2 + self.floor + 0 * x[:, 0]


def values(outputs, _):
    return outputs


EMPTY = nt.Probe(torch.zeros(1, 1).double(), losses=values)


def exact(found: xr.Dataset, law: Any) -> np.ndarray:
    """S of the result's bins, by the cumulative distribution of the loss."""
    share = law.cdf(found["loss_high"].values) - law.cdf(found["loss_low"].values)
    return np.log(share) - np.log(found.attrs["bin_width"])


def off(found: xr.Dataset, expected: np.ndarray) -> np.ndarray:
    """By how many standard errors each bin is off."""
    return ((found["entropy"] - expected) / found["entropy_standard_error"]).values


def halved_chi_square(degrees: int) -> Any:
    return stats.gamma(degrees / 2)


@pytest.fixture(scope="module")
def three() -> xr.Dataset:
    torch.manual_seed(0)
    return loss_density(
        Bowl(3), EMPTY, scale=1.0, range=(1e-2, 6.0), bins=10, error=0.1, walkers=64
    )


def test_quadratic_loss_has_the_law_of_chi_square(three):
    expected = exact(three, halved_chi_square(3))
    assert np.abs(off(three, expected)).max() < 4
    assert three["entropy_standard_error"].max() < 0.101
    # The power law, dS / d ln E = d / 2 but for the prior's exp(-E).
    small = three.isel(loss=slice(5))
    slope = np.polyfit(np.log(small["loss"]), small["entropy"] + small["loss"], 1)[0]
    assert slope == pytest.approx(1.5, abs=0.1)
    for name, low, high in [("below", 0, 1e-2), ("above", 6, np.inf)]:
        truth = np.log(halved_chi_square(3).sf(low) - halved_chi_square(3).sf(high))
        share = three[f"log_share_{name}"]
        assert abs(share - truth) < 4 * three[f"log_share_{name}_standard_error"]
    assert three.attrs["stopped"] == three.attrs["stage"] == "done"
    assert three.attrs["doubts"] == ""


def test_shares_add_up_to_one(three):
    inside = np.exp(three["entropy"]).sum() * three.attrs["bin_width"]
    outside = np.exp(three["log_share_below"]) + np.exp(three["log_share_above"])
    assert float(inside + outside) == pytest.approx(1.0, rel=1e-12)


def test_microcanonical_averages_are_those_of_bins(three):
    density = halved_chi_square(3).pdf
    for bin_ in range(three.sizes["loss"]):
        low, high = float(three["loss_low"][bin_]), float(three["loss_high"][bin_])
        mean = integrate.quad(lambda e: density(e) * (2 * e) ** 0.5, low, high)[0]
        mean /= integrate.quad(density, low, high)[0]
        here = three.isel(loss=bin_)
        assert abs(here["norm"] - mean) < 4 * here["norm_standard_error"] + 1e-3 * mean
        # By symmetry.
        assert abs(here["overlap"]) < 4 * here["overlap_standard_error"]


def test_canonical_averages_by_reweighting(three):
    found = canonical(three, [0.05, 0.5, 2.0])
    for here in (found.isel(temperature=k) for k in range(3)):
        t = float(here["temperature"])
        # Z = (1 + 1 / T)^(-d / 2), and the energy's average d T / 2 (1 + T); up to the bins' width.
        free = 1.5 * t * np.log(1 + 1 / t)
        assert float(here["free_energy"]) == pytest.approx(free, rel=0.06)
        assert float(here["energy"]) == pytest.approx(1.5 * t / (1 + t), rel=0.1)


def test_deep_tail_in_many_dimensions():
    """Down to e^-40 of the prior, in a range that is found, though there is little time."""
    model = Bowl(20)
    with frozen(model):
        sampler = LossDensity(
            *(model, EMPTY, "gaussian", 1.0, None, 10, "log", "*", None),
            **{"walkers": 64, "windows": 1, "error": 0.05, "seed": 0},
        )
        while sampler.sampling is None:
            sampler.advance()
        for piece in range(24):
            sampler.advance()
            if piece == 8:
                sampler.settle()
        found = sampler.result()
    expected = exact(found, halved_chi_square(20))
    assert float(found["log_share_below"]) < -38
    assert np.abs(found["entropy"] - expected).max() < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 50])
def test_deep_tail_as_well_as_asked_for(size):
    found = loss_density(Bowl(size), EMPTY, scale=1.0, bins=20, error=0.2, walkers=64)
    expected = exact(found, halved_chi_square(size))
    assert float(found["log_share_below"]) < -38
    assert np.abs(off(found, expected)).max() < 4
    assert np.abs(found["entropy"] - expected).max() < 0.6


def test_sphere_has_the_law_of_beta():
    """The first 4 of 12 coordinates on a sphere."""
    model = Bowl(12, first=4)
    radius = float(model.w.detach().norm())
    found = loss_density(
        model, EMPTY, prior="sphere", range=(0.1, 0.4 * radius**2), bins=10, error=0.15, walkers=64
    )
    expected = exact(found, stats.beta(2, 4, scale=radius**2 / 2))
    assert np.abs(off(found, expected)).max() < 4
    np.testing.assert_allclose(found["norm"], radius, rtol=1e-9)


class Curve(nn.Module):
    """a tanh(b x)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.5))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * torch.tanh(self.b * x)


def test_small_regression_is_as_by_quadrature():
    model = Curve()
    x = torch.linspace(-2, 2, 8)[:, None]
    y = torch.tanh(x) + 0.1 * torch.randn(8, 1)
    other = nt.Probe(x + 0.1, y)
    found = loss_density(
        model,
        nt.Probe(x, y),
        scale={"a": 2.0, "b": 1.0},
        range=(0.02, 2.0),
        bins=6,
        error=0.1,
        walkers=64,
        observables={"test": other, "b": lambda w: w["b"].abs()},
    )
    # Quantiles of the prior, on a grid.
    q = torch.from_numpy(stats.norm.ppf((np.arange(3000) + 0.5) / 3000))
    a, b = 2 * q[:, None, None], q
    each = []
    for part in (x, x + 0.1):
        fields = torch.tanh(b[:, None] * part[:, 0])
        each.append(sum((a[..., 0] * f - t) ** 2 for f, t in zip(fields.T, y[:, 0], strict=True)))
    train, test = ((sums / 8 / 2).numpy().ravel() for sums in each)
    edges = np.append(found["loss_low"], found["loss_high"][-1])
    counts, _ = np.histogram(train, edges)
    seen = counts > 200
    expected = np.log(np.maximum(counts, 1) / train.size) - np.log(found.attrs["bin_width"])
    assert seen.all()
    assert np.abs(off(found, expected)[seen]).max() < 4
    for name, weights in [("test_loss", test), ("b", np.tile(q.abs().numpy(), 3000))]:
        means = np.histogram(train, edges, weights=weights)[0] / np.maximum(counts, 1)
        apart = (found[name] - means) / (found[f"{name}_standard_error"] + 1e-3 * means)
        assert np.abs(apart[seen]).max() < 4


def test_losses_may_be_negative_where_bins_are_linear():
    options: dict[str, Any] = {"scale": 1.0, "range": (-1.0, 3.0), "bins": 8, "walkers": 64}
    found = loss_density(Bowl(3, floor=-1.0), EMPTY, spacing="linear", error=0.15, **options)
    assert np.abs(off(found, exact(found, stats.gamma(1.5, loc=-1)))).max() < 4
    assert found["loss"].values.tolist() == pytest.approx((np.arange(8) / 2 - 0.75).tolist())


class Half(Bowl):
    """Of which half of the weights have no loss."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.where(self.w[0] > 0, 0.0, torch.nan)


def test_weights_without_a_finite_loss_do_not_count(logged):
    model = Half(3)
    nn.init.ones_(model.w)
    options: dict[str, Any] = {"scale": 1.0, "range": (0.05, 4.0), "bins": 6, "walkers": 64}
    with pytest.warns(nt.DoubtfulMeasureWarning, match=r"not finite at 0\.\d+ of the weights"):
        found = loss_density(model, EMPTY, error=0.15, **options)
    assert np.abs(off(found, exact(found, halved_chi_square(3)))).max() < 4


def walkers_of(model: Bowl, kind: str, copies: int) -> tuple[ContinuousWalkers, Tensor]:
    """Walkers that are distributed as exp(-S) times the prior, and S, which is no smooth one."""
    loss = WeightLoss(model, EMPTY)
    loss.gradients(loss(loss.point[None])[:, None] * loss.point)  # of few, compared with one by one
    prior = prior_of(model, loss, kind, None)
    edges = np.log([0.1, 0.2, 0.5, 0.9, 1.5, 2.5])
    s = torch.tensor([-1.0, -2.0, -0.5, 0.7, 0.0, 1.0, 0.3, torch.inf], dtype=torch.float64)
    draws = generator(0, kind)
    x = prior.draw(30 * copies, draws)
    values = loss(prior.weights(x))
    bins = torch.searchsorted(torch.from_numpy(edges), values.log(), right=True)
    kept = torch.rand(len(x), generator=draws) < (-2 - s[bins]).exp()
    chosen = kept.nonzero()[:copies, 0]
    assert len(chosen) == copies
    levels = [Level(0.5, 0.0, 0.3), Level(-3.0, -9.0, -1.5)]
    where = x[chosen], values[chosen]
    return ContinuousWalkers(loss, prior, Spacing("log"), edges, levels, *where, draws), s


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
@pytest.mark.parametrize("guided", [0.0, 1.0])
def test_moves_leave_the_distribution_as_it_is(kind, guided, monkeypatch):
    """What they say of S is exact whatever the steps, the force and the bins."""
    monkeypatch.setattr(continuous, "_GUIDED", guided)
    monkeypatch.setattr(continuous, "_HALF", 0)
    copies, model, draws = 20_000, Bowl(3, first=2), generator(1, "acceptance")
    with frozen(model):
        walkers, s = walkers_of(model, kind, copies)
        walkers.stage = "multicanonical"
        before, x = torch.bincount(walkers.energies, minlength=7), walkers.x.clone()
        moved = 0.0
        for _ in range(8):
            at = walkers.energies
            to, odds = walkers.propose(s)
            gained = s[at] - s[to] + (0 if odds is None else odds)
            which = torch.rand(copies, generator=draws).log() <= gained
            moved += float(which.double().mean()) / 8
            walkers.accept(which)
    after = torch.bincount(walkers.energies, minlength=7)
    assert 0.2 < moved
    assert ((walkers.x - x).norm(dim=1) > 0.1).double().mean() > 0.7
    # Twice the variance of counts, as they are drawn from draws.
    apart = (after - before) / (3 * before).sqrt()
    assert float(apart.abs().max()) < 3.5


def test_free_moves_are_symmetric_with_respect_to_the_prior():
    """Which is why proposals that are not made count as well."""
    model = Bowl(3)
    with frozen(model):
        walkers, s = walkers_of(model, "gaussian", 20_000)
        flow = torch.zeros(7, 7, dtype=torch.float64)
        # Weighted back to the prior.
        weights = (s[walkers.energies]).exp()
        to, odds = walkers.propose(s)
    assert odds is None
    assert bool((to >= 0).all())
    flow.view(-1).index_add_(0, walkers.energies * 7 + to, weights)
    squares = torch.zeros(49, dtype=torch.float64)
    squares.index_add_(0, walkers.energies * 7 + to, weights**2)
    noise = (squares.view(7, 7) + squares.view(7, 7).T).sqrt()
    apart = (flow - flow.T)[noise > 0] / noise[noise > 0]
    assert float(apart.abs().max()) < 3.5
    assert float(flow.diagonal().sum() / flow.sum()) < 0.9


def classifier() -> tuple[nn.Module, nt.Probe]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    return model, nt.Probe(torch.randn(12, 4), torch.randint(2, (12,)))


def test_default_scales_are_those_of_fan_in():
    model, probe = classifier()
    with frozen(model):
        loss = WeightLoss(model, probe)
        scales = loss.split(prior_of(model, loss, "gaussian", None).scales)
        named = prior_of(model, loss, "gaussian", {"0.*": 0.5, "*": 2.0}).scales
        radius = prior_of(model, loss, "sphere", None).draw(5, generator(0, "x"))
    assert {name: float(s.flatten()[0]) for name, s in scales.items()} == pytest.approx(
        {
            **{"0.weight": 0.5, "0.bias": 0.5, "1.weight": 1.0, "1.bias": 1.0},
            **{"3.weight": 3**-0.5, "3.bias": 3**-0.5},
        }
    )
    assert named.tolist() == [0.5] * 15 + [2.0] * 14
    np.testing.assert_allclose(radius.norm(dim=1), 29**0.5, rtol=1e-5)


def test_network_and_random_numbers_are_left_as_they_were(logged, tmp_path):
    model, probe = classifier()
    model.train()
    model(probe.inputs).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = loss_density(
        model, probe, seconds=1.5, walkers=16, observables={"test": probe}, to=tmp_path / "a.nc"
    )
    logged.clear()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)
    assert model.training
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1] == np.random.get_state()[1].tolist()
    assert found.attrs["stopped"] == "out of time"
    assert "seconds" in found.attrs
    xr.testing.assert_identical(xr.open_dataset(tmp_path / "a.nc").load(), found)


def test_same_seed_gives_the_same(logged):
    found = []
    for seed in (0, 0, 1):
        torch.rand(3)
        model = Bowl(2)
        options: dict[str, Any] = {"scale": 1.0, "range": (0.3, 2.0), "bins": 3, "error": 0.8}
        found.append(loss_density(model, EMPTY, walkers=8, seed=seed, **options)["entropy"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])
    logged.clear()  # of the errors of 8 walkers


def test_there_is_a_result_at_any_time():
    model, probe = classifier()
    with frozen(model):
        sampler = LossDensity(
            *(model, probe, "gaussian", None, None, 10, "log", "*", {"test": probe}),
            **{"walkers": 8, "windows": 1, "error": 0.5, "seed": 0},
        )
        stages = []
        for piece in range(400):
            found = sampler.result()
            assert found["entropy"].sizes == {"loss": 10}
            assert found.attrs["doubts"]
            stages.append(found.attrs["stage"])
            sampler.advance()
            if piece == 10:
                sampler.settle()
            if stages.count("multicanonical") > 3:
                break
    assert stages[0] == "descent"
    assert stages[-1] == "multicanonical"
    assert np.isfinite(sampler.result()["test_error_rate"]).any()


def test_time_is_kept(logged):
    model, probe = classifier()
    begun = time.monotonic()
    found = loss_density(model, probe, seconds=0.5, walkers=8)
    assert time.monotonic() - begun < 30
    assert found.attrs["stopped"] == "out of time"
    logged.clear()


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_any_network_may_be_sampled(name, logged):
    member = build(name)
    probe = nt.Probe(
        member.batch, forward=member.forward, losses=lambda outputs, _: losses(outputs)
    )
    with frozen(member.model):
        sampler = LossDensity(
            *(member.model, probe, "gaussian", None, None, 5, "log", "*", None),
            **{"walkers": 4, "windows": 1, "error": 0.5, "seed": 0},
        )
        sampler.settle()
        while sampler.sampling is None or not sampler.sampling.visits:
            sampler.advance()
        assert np.isfinite(sampler.result()["entropy"]).any()


def bad(
    match: str, model: nn.Module | None = None, probe: nt.Probe = EMPTY, **options: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        loss_density(Bowl(3) if model is None else model, probe, **{"walkers": 16, **options})


def test_wrong_arguments_are_refused():
    bad("two|walkers= to be 2 or more, got 1", walkers=1)
    bad("bins= to be 1 or more, got 0", bins=0)
    bad("'gaussian' or 'sphere', got 'flat'", prior="flat")
    bad("'log' or 'linear', got 'square'", spacing="square")
    bad(r"from a loss to a higher one, got \(1.0, 1.0\)", range=(1.0, 1.0))
    bad("to a higher one", range=(2.0, 1.0))
    bad("to a higher one", range=(0.1, float("nan")))
    bad("begin above zero for bins of the logarithm, got 0", range=(0.0, 1.0))
    bad("scale= to be positive and finite, got -1", scale=-1.0)
    bad("says nothing of 'w'", scale={"b": 1.0})
    bad("the radius", prior="sphere", scale={"w": 1.0})
    bad("two weights or more", Bowl(1), prior="sphere")
    bad("error= to be positive", error=0.0, range=(0.1, 1.0))
    bad("windows=", windows=3, range=(0.1, 1.0))
    bad("probes or functions, got int", observables={"x": 3})
    bad(
        "gives? a number for each|to give a number",
        range=(0.1, 1.0),
        error=1.0,
        observables={"x": lambda w: w["w"]},
    )


def test_ranges_that_are_never_visited_are_refused():
    bad(
        r"no weights with a loss in range=\(0.01, 0.5\) were found.*from 1",
        Bowl(2, floor=1.0),
        range=(0.01, 0.5),
    )
    bad(r"no weights with a loss in range=\(1000.0, 2000.0\)", range=(1e3, 2e3), error=1.0)


def test_losses_that_are_none_are_refused():
    bad("has no logarithm: pass spacing='linear'", Bowl(3, floor=-100.0))
    bad("own weights is nan", Bowl(3, floor=float("nan")))

    class Pole(Bowl):
        """Finite at the network's own weights alone."""

        def forward(self, x: Tensor) -> Tensor:
            own = (self.w.detach() - 1).abs().sum() < 1e-9
            return super().forward(x) + torch.where(own, 0.0, torch.nan)

    model = Pole(3)
    nn.init.ones_(model.w)
    bad("no finite number at .* drawn from the prior", model)


def test_weights_of_whole_numbers_are_refused():
    model = nn.Linear(2, 1)
    model.weight = nn.Parameter(torch.ones(1, 2, dtype=torch.int64), requires_grad=False)
    bad("'weight' is of torch.int64: weights of whole numbers", model)
    bad("needs a gradient matches", Bowl(3).requires_grad_(False))


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["gaussian", "sphere"])
def test_errors_are_calibrated_over_seeds(prior):
    scores = []
    for seed in range(20):
        torch.manual_seed(0)
        model = Bowl(10, first=6)
        found = loss_density(
            *(model, EMPTY),
            prior=prior,
            scale=1.0 if prior == "gaussian" else None,
            **{"range": (1e-2, 3.0), "bins": 12, "error": 0.1, "walkers": 128, "seed": seed},
        )
        radius = float(model.w.detach().norm())
        law = {"gaussian": stats.gamma(3), "sphere": stats.beta(3, 2, scale=radius**2 / 2)}[prior]
        scores.append(off(found, exact(found, law)))
    scores = np.array(scores)
    assert (np.abs(scores) < 3).mean() >= 0.98
    assert 0.7 < np.sqrt((scores**2).mean()) < 1.35
