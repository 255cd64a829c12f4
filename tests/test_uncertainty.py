"""Last-layer uncertainties are those of Bayesian linear regression, and survive what is thrown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fitted_together
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nettrace.uncertainty import Covariance, fit, load, reading
from nettrace.uncertainty.calibration import Leverages

Batches = list[tuple[Tensor, Tensor]]


def cut(x: Tensor, y: Tensor, size: int = 50) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def regression(count: int = 400, outputs: int = 2) -> tuple[nn.Module, Batches, Batches]:
    """A two-layer network, and samples whose errors grow away from the middle."""
    net = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, outputs)).double()
    x = torch.randn(count, 3, dtype=torch.float64)
    noise = torch.randn(count, outputs) * x.norm(dim=1, keepdim=True)
    batches = cut(x, net(x).detach() + 0.3 * noise)
    return net, batches[: len(batches) // 2], batches[len(batches) // 2 :]


def classification(count: int = 400) -> tuple[nn.Module, Batches, Batches]:
    """A network that is too sure of itself."""
    net = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x = torch.randn(count, 3, dtype=torch.float64)
    with torch.no_grad():
        y = torch.distributions.Categorical(logits=net(x)).sample()
        net[2].weight.mul_(6)
    batches = cut(x, y)
    return net, batches[: len(batches) // 2], batches[len(batches) // 2 :]


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def augmented(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


# What it equals ----------------------------------------------------------------------------------


def test_of_a_linear_model_it_is_the_posterior_of_bayesian_regression_and_of_a_process() -> None:
    noise, prior = 0.3, 2.0
    model, x = nn.Linear(7, 1, bias=False).double(), torch.randn(60, 7, dtype=torch.float64)
    new = torch.randn(9, 7, dtype=torch.float64)
    found = fit(model, [x[:13], x[13:]], alpha=noise, ridge=noise / prior)(new).variance[:, 0]
    posterior = torch.linalg.inv(x.T @ x / noise**2 + eye(7) / prior**2)
    torch.testing.assert_close(found, (new @ posterior * new).sum(1), rtol=1e-12, atol=0)
    kernel = prior**2 * x @ x.T + noise**2 * eye(60)
    cross = prior**2 * new @ x.T
    before = prior**2 * new.square().sum(1)
    process = before - (cross @ torch.linalg.inv(kernel) * cross).sum(1)
    assert float(((found - process) / before).abs().max()) < 1e-12


def test_leverages_of_the_training_samples_sum_to_their_rank() -> None:
    x = torch.randn(60, 7, dtype=torch.float64)
    found = fit(nn.Linear(7, 1).double(), [x], alpha=1.0, ridge=0)
    assert float(found(x).variance.sum()) == pytest.approx(8, rel=1e-12)


def test_it_is_the_last_layer_laplace_posterior_of_a_regression() -> None:
    """As laplace-torch documents it: Sigma = (H / sigma_noise^2 + prior_precision)^-1.

    H is the sum of J^T J over samples, with J = f (x) 1 of the last layer, by autograd here.
    `benchmarks/results/uncertainty.md` has the comparison with the library itself.
    """
    net, train, _ = regression(outputs=2)
    sigma, precision = 0.4, 2.5
    x, new = torch.cat([x for x, _ in train]), torch.randn(6, 3).double()

    def jacobian(at: Tensor) -> Tensor:
        rows = []
        for out in net(at).flatten():
            slopes = torch.autograd.grad(out, list(net[2].parameters()), retain_graph=True)
            rows.append(torch.cat([slope.flatten() for slope in slopes]))
        return torch.stack(rows)

    J, at = jacobian(x), jacobian(new)
    posterior = torch.linalg.inv(J.T @ J / sigma**2 + precision * eye(J.shape[1]))
    expected = (at @ posterior * at).sum(1).view(6, 2)
    found = fit(net, train, alpha=sigma, ridge=sigma * precision**0.5)(new)
    torch.testing.assert_close(found.variance, expected, rtol=1e-10, atol=0)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_streamed_and_merged_covariances_are_those_of_all(cuts: list[int], seed: int) -> None:
    x = torch.randn(sum(cuts), 4, generator=torch.Generator().manual_seed(seed))
    parts = [Covariance.of(part) for part in x.split(cuts)]
    merged = sum(parts[1:], parts[0])
    assert merged.count == len(x)
    torch.testing.assert_close(merged.sums, x.double().T @ x.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", [regression, classification])
def test_any_batches_give_the_same(problem: Any) -> None:
    net, train, held_out = problem()
    whole = [[tuple(map(torch.cat, zip(*b, strict=True)))] for b in (train, held_out)]
    one, other = fit(net, train, held_out), fit(net, *whole)
    assert one.ridge == pytest.approx(other.ridge, rel=1e-12)
    torch.testing.assert_close(one.alpha, other.alpha, rtol=1e-12, atol=0)
    x = held_out[0][0]
    torch.testing.assert_close(one(x).variance, other(x).variance, rtol=1e-12, atol=0)


def test_leverages_of_left_out_samples_are_those_without_them() -> None:
    x = torch.randn(20, 5, dtype=torch.float64)
    found = Leverages(Covariance.of(x), x, left_out=True)(0.7)
    for n in range(20):
        others = torch.cat([x[:n], x[n + 1 :]])
        expected = x[n] @ torch.linalg.inv(others.T @ others + 0.49 * eye(5)) @ x[n]
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-10)


# Calibration -------------------------------------------------------------------------------------


def leverage(net: nn.Module, train: Batches, x: Tensor, ridge: float) -> Tensor:
    with torch.no_grad():
        F_ = augmented(net[:-1](torch.cat([x for x, _ in train])))
        f = augmented(net[:-1](x))
    return (f @ torch.linalg.inv(F_.T @ F_ + ridge**2 * eye(F_.shape[1])) * f).sum(1)


def test_alpha_and_ridge_of_a_regression_are_likeliest() -> None:
    net, train, held_out = regression()
    found = fit(net, train, held_out)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    squares = (net(x).detach() - y).square()

    def nll(ridge: float, scale: Any = 1.0) -> float:
        u = leverage(net, train, x, ridge)[:, None]
        variance = (squares / u).mean(0) * u * scale
        return float(((2 * torch.pi * variance).log() + squares / variance).sum(1).mean() / 2)

    u = leverage(net, train, x, found.ridge)[:, None]
    torch.testing.assert_close(found.alpha.square(), (squares / u).mean(0), rtol=1e-10, atol=0)
    least = nll(found.ridge)
    assert least <= min(nll(found.ridge * 10**k) for k in np.linspace(-1, 1, 41)) + 1e-5
    assert least < min(nll(found.ridge, torch.tensor([s, 1.0])) for s in (0.9, 1.1))
    assert found.doubts == ()
    assert found.calibrated_on == 200


def test_alpha_and_ridge_of_classes_are_likeliest() -> None:
    net, train, held_out = classification(2000)
    found = fit(net, train, held_out)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    logits = net(x).detach()

    def nll(alpha: float, ridge: float) -> float:
        v = alpha**2 * leverage(net, train, x, ridge)[:, None]
        return float(F.cross_entropy(logits / (1 + torch.pi / 8 * v).sqrt(), y))

    alpha = float(found.alpha[0])
    least = nll(alpha, found.ridge)
    assert least < float(F.cross_entropy(logits, y)) - 0.1
    around = [nll(alpha * a, found.ridge * r) for a in (0.8, 0.95, 1.05, 1.2) for r in (0.5, 1, 2)]
    assert least <= min(around) + 1e-6
    prediction = found(x)
    p = (logits / (1 + torch.pi / 8 * prediction.variance).sqrt()).softmax(1)
    torch.testing.assert_close(prediction.probabilities, p)
    assert torch.equal(prediction.mean, logits)
    torch.testing.assert_close(prediction.std.square(), prediction.variance)


def test_squared_logarithms_of_bins_are_least() -> None:
    net, train, held_out = regression(2000, outputs=1)
    found = fit(net, train, held_out, objective="ssl")
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    squares = (net(x).detach() - y).square()[:, 0]

    def ssl(ridge: float, scale: float = 1.0) -> float:
        u = leverage(net, train, x, ridge)
        bins = u.argsort().split(100)
        off = torch.stack([(squares[b].mean() / u[b].mean()).log() for b in bins])
        return float((off - off.mean() - np.log(scale)).square().sum())

    u = leverage(net, train, x, found.ridge)
    bins = u.argsort().split(100)
    off = torch.stack([(squares[b].mean() / u[b].mean()).log() for b in bins])
    assert float(found.alpha[0].square().log()) == pytest.approx(float(off.mean()), abs=1e-6)
    grid = [ssl(found.ridge * 10**k) for k in np.linspace(-1, 1, 21)]
    assert ssl(found.ridge) <= min(grid) * 1.05


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_features_of_any_scale_give_the_same_variances(scale: float) -> None:
    net, train, held_out = regression()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net[:-1], nn.Linear(12, 2).double()
            self.head.weight.data = net[-1].weight.data / scale
            self.head.bias = None
            self.shift = nn.Parameter(net[-1].bias.data)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) * scale)

    plain = nn.Sequential(*net[:-1], nn.Linear(12, 2, bias=False).double())
    plain[-1].weight.data = net[-1].weight.data
    one, other = fit(plain, train, held_out), fit(Scaled(), train, held_out)
    assert other.ridge == pytest.approx(one.ridge * scale, rel=1e-6)
    x = held_out[0][0]
    torch.testing.assert_close(other(x).variance, one(x).variance, rtol=1e-6, atol=0)


def test_training_samples_will_do_with_a_doubt() -> None:
    net, train, _ = regression()
    found = fit(net, train)
    assert "residuals of new samples are larger" in found.doubts[0]
    assert "doubt: alpha and the ridge are from training samples" in repr(found)


def test_what_is_given_is_kept() -> None:
    net, train, held_out = regression()
    both = fit(net, [x for x, _ in train], alpha=torch.tensor([1.0, 2.0]), ridge=0.5)
    assert (both.alpha.tolist(), both.ridge, both.calibrated_on) == ([1.0, 2.0], 0.5, 0)
    assert fit(net, train, held_out, ridge=0.5).ridge == 0.5
    assert fit(net, train, held_out, alpha=2.0).alpha.tolist() == [2.0, 2.0]
    net, train, held_out = classification()
    assert fit(net, train, held_out, ridge=0.5).ridge == pytest.approx(0.5)
    assert fit(net, train, held_out, alpha=2.0).alpha.tolist() == [2.0] * 4


def test_variance_rises_away_from_the_training_data() -> None:
    net, train, held_out = regression()
    found = fit(net, train, held_out)
    x = held_out[0][0]
    assert float(found(3 * x).variance.mean()) > 1.5 * float(found(x).variance.mean())


# Several samples together ------------------------------------------------------------------------


def tokens() -> tuple[nn.Module, Any]:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(40, 5, 3, dtype=torch.float64)
    return net, fit(net, [(x, net(x).detach() + 0.1 * torch.randn(40, 5, 2))])


def test_members_scatter_as_the_variance_says() -> None:
    net, found = tokens()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    members = found.sample(x, 20000)
    assert members.shape == (20000, 3, 5, 2)
    torch.testing.assert_close(members.var(0), found(x).variance, rtol=0.06, atol=0)
    torch.testing.assert_close(members.mean(0), net(x), rtol=0, atol=1e-2)
    assert torch.equal(found.sample(x, 3), found.sample(x, 3))
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(found.sample(x, 3, generator), found.sample(x, 3, generator))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        found.sample(x, 0)


DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "the sum over tokens": lambda out: out.sum(1),
    "a difference of samples": lambda out: out[0] - out[1],
    "products": lambda out: out[..., 0] * out[..., 1],
    "a ratio": lambda out: out[0].sum() / (10 + out[1].sum()),
    "outputs themselves": lambda out: out,
}


@pytest.mark.parametrize("name", DERIVED)
def test_propagation_is_what_members_give(name: str) -> None:
    net, found = tokens()
    found.alpha *= 0.02 / float(found(torch.randn(3, 5, 3).double()).std.mean())  # to first order
    x, function = torch.randn(3, 5, 3, dtype=torch.float64), DERIVED[name]
    derived = found.propagate(x, function)
    members = torch.stack([function(one) for one in found.sample(x, 8000)])
    torch.testing.assert_close(derived.variance, members.var(0), rtol=0.15, atol=1e-9)
    torch.testing.assert_close(derived.value, function(net(x)).detach())
    torch.testing.assert_close(derived.std.square(), derived.variance)
    if name == "outputs themselves":
        torch.testing.assert_close(derived.variance, found(x).variance)


def test_like_samples_differ_by_less_than_independent_ones() -> None:
    _, found = tokens()
    x = torch.randn(1, 5, 3, dtype=torch.float64).repeat(2, 1, 1)
    assert float(found.propagate(x, lambda out: out[0] - out[1]).variance.max()) < 1e-25
    with pytest.raises(ValueError, match="differentiable operations, got Tensor without"):
        found.propagate(x, lambda out: out.argmax(-1))


# Kinds of networks and batches -------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor
    labels: Tensor


def test_batches_of_all_kinds() -> None:
    net, train, _ = classification()
    expected = fit(net, train)
    (one,) = [tuple(map(torch.cat, zip(*train, strict=True)))]
    kinds: list[Any] = [
        [{"input": x, "labels": y} for x, y in train],
        [Batch(x, y) for x, y in train],
        DataLoader(TensorDataset(*one), batch_size=7),
        iter(train),
    ]
    for batches in kinds:
        assert fit(net, batches).ridge == pytest.approx(expected.ridge, rel=1e-9)


@pytest.mark.parametrize(("most", "kept"), [(2000, 100), (1, 1)])
def test_of_many_samples_some_are_kept_to_calibrate_on(
    most: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, train, held_out = regression()
    monkeypatch.setattr(reading, "MOST", most)
    found = fit(net, train, held_out)
    assert (found.covariance.count, found.calibrated_on) == (200, kept)


def test_ignored_classes_are_left_out() -> None:
    net = nn.Linear(3, 4).double()
    x, y = torch.randn(30, 5, 3).double(), torch.randint(0, 4, (30, 5))
    kept = torch.rand(30, 5) > 0.3
    found = fit(net, [(x, y.where(kept, -100))])
    expected = fit(net, [(x[kept], y[kept])])
    assert found.covariance.count == int(kept.sum())
    assert found.ridge == pytest.approx(expected.ridge, rel=1e-12)
    with pytest.raises(ValueError, match="from 0 to 3, or -100 for those to ignore, got 7"):
        fit(net, [(x, y.where(kept, 7))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_other_precisions(dtype: torch.dtype) -> None:
    net, train, held_out = regression()
    cast = [[(x.to(dtype), y.to(dtype)) for x, y in b] for b in (train, held_out)]
    found = fit(net.to(dtype), *cast)
    prediction = found(cast[1][0][0])
    assert prediction.mean.dtype == dtype
    assert prediction.variance.dtype == torch.float32
    assert bool((prediction.variance > 0).all())


def test_one_number_a_sample() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    x = torch.randn(50, 3)
    found = fit(net, [(x, torch.randn(50))])
    assert found(x).variance.shape == (50,)
    assert found.propagate(x, torch.sum).variance.shape == ()
    assert found.sample(x, 4).shape == (4, 50)


def test_images_with_a_head_of_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x, y = torch.randn(10, 1, 6, 6), torch.randint(0, 3, (10, 6, 6))
    found = fit(net, [(x, y)])(x)
    assert found.variance.shape == found.probabilities.shape == (10, 3, 6, 6)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(10, 6, 6))


def test_a_network_is_left_as_it_was() -> None:
    training.seed()
    net = training.delicate()()
    samples = training.Samples(count=40)
    data = DataLoader(samples, batch_size=8, shuffle=True)
    before = training.state(net)
    found = fit(net, data)
    assert not training.differences(before, training.state(net))
    found(samples.inputs)
    found.sample(samples.inputs, 3)
    found.propagate(samples.inputs, torch.sum)
    assert not training.differences(before, training.state(net))


def test_a_compiled_network() -> None:
    net, train, held_out = regression()
    found = fit(torch.compile(net, backend="eager"), train, held_out)
    assert found.ridge == fit(net, train, held_out).ridge
    assert found(held_out[0][0]).variance.shape == (50, 2)


def test_a_head_by_name_behind_a_softmax() -> None:
    net, train, _ = classification()
    whole = nn.Sequential(net, nn.Softmax(-1))
    with pytest.raises(ValueError, match="behind it stands softmax"):
        fit(whole, train)
    found = fit(whole, train, head="0.2")
    torch.testing.assert_close(found(train[0][0]).mean, net(train[0][0]))


# Saved and loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [regression, classification])
def test_saved_and_loaded(problem: Any, tmp_path: Path) -> None:
    net, train, held_out = problem()
    found = fit(net, train)
    found.save(tmp_path / "u.pt")
    again = load(tmp_path / "u.pt", net)
    x = held_out[0][0]
    assert torch.equal(again(x).variance, found(x).variance)
    assert repr(again) == repr(found)
    assert (again(x).probabilities is None) == (problem is regression)
    assert torch.equal(load(found.state_dict(), net)(x).variance, found(x).variance)
    with torch.no_grad():
        net[2].weight.add_(0.1)
    for one in (found, again):
        with pytest.raises(ValueError, match="buffers are not those that these uncertainties"):
            one(x)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected uncertainties"):
        load(tmp_path / "other.pt", net)


def test_functions_are_not_saved(tmp_path: Path) -> None:
    net, train, _ = regression()

    def forward(model: nn.Module, x: Tensor) -> Any:
        return model(x)

    found = fit(net, train, forward=forward)
    found.save(tmp_path / "u.pt")
    with pytest.raises(ValueError, match=r"pass load\(\.\.\., forward=\.\.\.\) too"):
        load(tmp_path / "u.pt", net)
    assert load(tmp_path / "u.pt", net, forward=forward).ridge == found.ridge


# Several processes -------------------------------------------------------------------------------


def launched(folder: Path, how: str) -> list[Any]:
    script = Path(fitted_together.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", str(script), str(folder), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]


def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    cases = [(c, h) for c in (False, True) for h in (False, True)]
    for both in zip(*launched(tmp_path, "fit"), cases, strict=True):
        *several, case = both
        alone = fitted_together.fitted(*case)
        for found in several:
            assert found["count"] == alone["count"]
            assert found["ridge"] == pytest.approx(alone["ridge"], rel=1e-10)
            for name in ("covariance", "alpha", "variance"):
                torch.testing.assert_close(found[name], alone[name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text"), [("weights", "with the same weights"), ("empty", "loader= is empty")]
)
def test_processes_fail_together(how: str, text: str, tmp_path: Path) -> None:
    for error in launched(tmp_path, how):
        assert text in error


# Bad input ---------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from (torch.randn(3) for _ in range(10))


def test_bad_arguments() -> None:
    net, train, held_out = classification()
    x, y = train[0]
    with pytest.raises(TypeError, match=r"iterable of batches, got tuple: pass \[\(x, y\)\]"):
        fit(net, (x, y))
    with pytest.raises(TypeError, match=r"got TensorDataset: pass .*DataLoader"):
        fit(net, TensorDataset(x, y))
    with pytest.raises(TypeError, match="calibration= to be a loader"):
        fit(net, train, x)
    with pytest.raises(ValueError, match="'nll' or 'ssl', got 'crps'"):
        fit(net, train, objective="crps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'ssl' is for regression"):
        fit(net, train, objective="ssl")
    with pytest.raises(ValueError, match="a ridge of at least 0, got -1"):
        fit(net, train, ridge=-1)
    with pytest.raises(TypeError, match="ridge= to be a number, got 'auto'"):
        fit(net, train, ridge="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha above 0, got 0"):
        fit(net, train, alpha=0)
    with pytest.raises(ValueError, match="one for each of 4 outputs, got 3"):
        fit(net, train, alpha=torch.ones(3))
    with pytest.raises(ValueError, match=r"gaussian or categorical likelihood.* is 'bernoulli'"):
        fit(net, [(x, torch.ones(50, 4))], likelihood="bernoulli")
    found = fit(net, train, held_out)
    with pytest.raises(ValueError, match=r"of samples \[1\] are not finite"):
        found(torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]).double())
    net, train, _ = regression(100)
    with pytest.raises(ValueError, match="bins of 100 samples, and two of them at least, got 50"):
        fit(net, train, objective="ssl")


def test_bad_samples() -> None:
    net, train, held_out = classification()
    x, y = train[0]
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="loader= is empty"):
            fit(net, empty)
    with pytest.raises(ValueError, match="calibration= is empty"):
        fit(net, train, [])
    with pytest.raises(ValueError, match="no batch of loader= has targets"):
        fit(net, [x])
    with pytest.raises(ValueError, match="all 50 samples to calibrate on are of class 0"):
        fit(net, train, [(x, 0 * y)])
    with pytest.raises(ValueError, match="features of batch 2 of loader= are not finite"):
        fit(net, [(x, y), (x, y), (x * torch.nan, y)])
    with pytest.raises(ValueError) as error:
        fit(net, train, [(x, y), (x, y[:, None, None])])
    assert error.value.__notes__ == ["in batch 1 of calibration="]
    net, train, _ = regression()
    x, y = train[0]
    with pytest.raises(ValueError, match="targets of batch 0 of loader= are not finite"):
        fit(net, [(x, y * torch.inf)])


def test_fewer_samples_than_features_rest_on_the_ridge() -> None:
    net, train, held_out = regression()
    few = [(train[0][0][:5], train[0][1][:5])]
    found = fit(net, few, held_out)
    assert "width 13 has rank 5" in found.doubts[-1]
    assert bool((found(held_out[0][0]).variance > 0).all())
    with pytest.raises(ValueError, match="no inverse without a ridge, got ridge=0"):
        fit(net, few, held_out, ridge=0)
    with pytest.raises(ValueError, match="no inverse without a ridge, got ridge=1e-30"):
        fit(net, few, held_out, ridge=1e-30)


@pytest.mark.parametrize("held_out", [False, True])
def test_constant_features_have_a_variance(held_out: bool) -> None:
    """With equal leverages, that of a constant: the mean squared residual."""
    net, train, other = regression(outputs=1)
    with torch.no_grad():
        net[0].weight.zero_()
    found = fit(net, train, other if held_out else None)
    x, y = (torch.cat(parts) for parts in zip(*(other if held_out else train), strict=True))
    expected = (net(x).detach() - y).square().mean()
    assert float(found(x).variance.mean()) == pytest.approx(float(expected), rel=0.02)


def test_features_that_are_all_zero_have_none() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].bias.fill_(-99)
    with pytest.raises(ValueError, match="all zero: no variance follows"):
        fit(net, [(torch.randn(9, 3), torch.randn(9, 1))])


def test_no_residuals_are_no_nan() -> None:
    net, train, _ = regression()
    found = fit(net, [(x, net(x).detach()) for x, _ in train])
    assert any("no residuals at all" in doubt for doubt in found.doubts)
    variance = found(train[0][0]).variance
    assert bool((variance > 0).all() & (variance < 1e-100).all())
