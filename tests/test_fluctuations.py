"""Fluctuations, exponents and displacements against closed forms and simulated processes."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.stats import levy_stable

from nettrace.diffusion import displacements
from nettrace.flatness import width
from nettrace.fluctuations import (
    correlation_times,
    directions,
    factor,
    halves,
    layer_correlations,
    modes,
    stationarity,
    variance_errors,
)
from nettrace.heavy_tails import stable_index, update_tail_index
from nettrace.power_law import power_law
from nettrace.stationary import (
    batch_variance,
    noise_autocovariance,
    stationary_covariance,
    window_variances,
)


def descent(h, c, rate, momentum, steps, generator, noise=None, chains=()):
    """SGD on a quadratic of curvatures h with noise of covariance diag(c), from its mean."""
    w, v = (np.zeros((*chains, len(h))) for _ in range(2))
    burn = int(5 * (1 + momentum) / (1 - momentum) / (rate * h.min())) if noise is None else 0
    found = []
    for t in range(burn + steps):
        xi = generator.normal(size=w.shape) * np.sqrt(c) if noise is None else noise[t]
        v = momentum * v + h * w + xi
        w = w - rate * v
        if t >= burn:
            found.append(w)
    return np.array(found)


def walk(steps, size, seed, memory=1.0):
    generator = np.random.default_rng(seed)
    w, found = generator.normal(size=size) / math.sqrt(1 - min(memory, 0.999) ** 2), []
    for _ in range(steps):
        w = memory * w + generator.normal(size=size)
        found.append(w)
    return np.array(found)


# Principal components ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 30), (40, 5), (12, 12)])
def test_modes_are_those_of_the_dense_covariance(shape):
    rows = torch.randn(shape).double() * torch.logspace(0, -2, shape[1]) + 1e3
    x = rows.numpy() - rows.numpy().mean(0)
    values, vectors = np.linalg.eigh(x.T @ x / shape[0])
    found = modes([factor(rows)])
    k = min(shape[0] - 1, shape[1])
    assert len(found.variances) == k
    np.testing.assert_allclose(found.variances, values[::-1][:k], rtol=1e-7)
    p = directions(rows, found, k).numpy()
    np.testing.assert_allclose(p @ p.T, np.eye(k), atol=1e-6)
    overlaps = np.abs(p @ vectors[:, ::-1][:, :k])
    np.testing.assert_allclose(overlaps, np.eye(k), atol=1e-4)
    np.testing.assert_allclose(x @ p.T, found.coordinates, atol=1e-6)


def test_directions_by_parts_are_those_of_the_whole():
    rows = torch.randn(9, 50)
    found = modes([factor(rows)])
    parts = [directions(part, found, 4) for part in rows.split([20, 30], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), directions(rows, found, 4))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.full((8, 3), math.nan), "not finite"),
        (torch.ones(8, 3), "do not move"),
    ],
)
def test_windows_without_fluctuations(rows, words):
    with pytest.raises(ValueError, match=words):
        modes([factor(rows)])


# Correlation times -------------------------------------------------------------------------------


def test_correlation_times_of_autoregressive_series_and_their_errors():
    times, taus, errors, variances, spreads = [], [], [], [], []
    for seed in range(40):
        for rho in (0.5, 0.9):
            series = torch.from_numpy(walk(4000, 3, seed, rho))
            tau, error = correlation_times(series)
            taus.append(tau.numpy())
            errors.append(error.numpy())
            times.append(0.5 + rho / (1 - rho))
            variances.append(series.var(0, correction=0).numpy() * (1 - rho**2))
            spreads.append(variance_errors(series).numpy() * (1 - rho**2))
    deviations = (np.array(taus) - np.array(times)[:, None]) / np.array(errors)
    assert abs(deviations.mean()) < 0.5  # Sokal's window leaves some out
    assert 0.7 < deviations.std() < 1.4
    deviations = (np.array(variances) - 1) / np.array(spreads)
    assert abs(deviations.mean()) < 0.35
    assert 0.8 < deviations.std() < 1.3


def test_correlation_times_that_a_window_does_not_resolve_say_so():
    tau, error = correlation_times(torch.from_numpy(walk(400, 5, 0, 0.99)))
    assert bool(error.isinf().all())
    tau, error = correlation_times(torch.from_numpy(walk(400, 5, 0, 0.0)))
    assert bool(error.isfinite().all())
    np.testing.assert_allclose(tau, 0.5, atol=0.4)


# What a window makes of a random walk -------------------------------------------------------------


def test_a_random_walk_has_components_of_its_own_and_is_seen():
    found = modes([factor(torch.from_numpy(walk(400, 3000, 0)))])
    shares = (found.variances / found.variances.sum())[:4].numpy()
    np.testing.assert_allclose(shares, 6 / (np.pi * np.arange(1, 5)) ** 2, rtol=0.06)
    seen = halves(found.coordinates)
    assert abs(seen.slope) < 0.1
    assert seen.kept < 0.1
    assert seen.shift == pytest.approx(4, rel=0.05)


def test_a_window_in_equilibrium_is_seen():
    rows = walk(3000, 30, 0, 0.8) * np.logspace(0, -3, 30)
    seen = halves(torch.from_numpy(rows))
    assert seen.slope == pytest.approx(1, abs=0.05)
    assert seen.kept == pytest.approx(1, abs=0.2)
    assert seen.shift < 0.1


def test_stationarity_is_one_and_less_where_weights_spread():
    ratio, error = stationarity(torch.from_numpy(walk(2000, 10, 0, 0.5)))
    assert abs(ratio - 1) < 4 * error < 0.05
    rows = walk(2000, 10, 0, 0.5) * np.linspace(0.1, 3, 2000)[:, None] ** 2
    x = rows - rows.mean(0)
    ratio, _ = stationarity(torch.from_numpy(rows))
    expected = -2 * (x[:-1] * np.diff(x, axis=0)).sum() / np.square(np.diff(x, axis=0)).sum()
    assert ratio == pytest.approx(expected)
    assert ratio < 1


def test_blocks_between_layers_are_those_of_the_dense_covariance():
    x, y = torch.randn(50, 4).double(), torch.randn(50, 6).double()
    y[:, :2] += 2 * x[:, :2]
    found = layer_correlations([factor(x), factor(y)])
    dense = np.cov(np.hstack([x, y]).T, ddof=0)
    norms = [[np.linalg.norm(dense[a, b]) for b in (slice(4), slice(4, 10))]
             for a in (slice(4), slice(4, 10))]  # fmt: skip
    expected = norms[0][1] / math.sqrt(norms[0][0] * norms[1][1])
    np.testing.assert_allclose(found, [[1, expected], [expected, 1]], rtol=1e-9)


# Theory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_has_the_covariance_of_the_lyapunov_equation(momentum):
    """4,000 chains of SGD on a quadratic with noise that does not commute with its Hessian."""
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    hessian = (turn * [1.5, 0.8, 0.3]) @ turn.T
    root = generator.normal(size=(3, 3)) / 3
    rate, chains = 0.3, 4000
    found = stationary_covariance(hessian, root @ root.T, rate, momentum)
    if momentum == 0:
        residual = hessian @ found + found @ hessian - rate * hessian @ found @ hessian
        np.testing.assert_allclose(residual, rate * root @ root.T, atol=1e-12)
    w, v = np.zeros((chains, 3)), np.zeros((chains, 3))
    for _ in range(400):
        v = momentum * v + w @ hessian + generator.normal(size=(chains, 3)) @ root.T
        w = w - rate * v
    products = w[:, :, None] * w[:, None, :]
    error = products.std(0) / math.sqrt(chains)
    assert (np.abs(products.mean(0) - found) < 4 * error).all()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_one_mode_is_that_of_the_lyapunov_equation(momentum):
    for rate, h in ((0.1, 1.0), (0.5, 2.0), (1.0, 0.01)):
        step = np.array([[1 - rate * h, -rate * momentum], [h, momentum]])
        kick = np.array([-rate, 1.0])
        exact = solve_discrete_lyapunov(step, np.outer(kick, kick))[0, 0]
        found = window_variances(np.array([h]), np.ones(1), rate, momentum)
        assert found[0] == pytest.approx(exact, rel=1e-10)
    with pytest.raises(ValueError, match="expected a stable descent"):
        stationary_covariance(np.eye(2) * 5, np.eye(2), 1.0, momentum)
    assert np.isnan(window_variances(np.array([5.0, -1.0]), np.ones(2), 1.0, momentum)).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batches", [None, 12])
def test_windows_of_descent_have_the_variances_of_the_theory(momentum, batches):
    """Means over chains of variances about windows' means, as simulated; also what is too short."""
    generator = np.random.default_rng(1)
    h, rate, length, stride, chains = np.array([2.0, 0.3, 0.05]), 0.1, 60, 2, 1500
    burn = int(8 / (rate * h.min()) * (1 - momentum) + 20 / (1 - momentum))
    steps = burn + (length - 1) * stride + 1
    if batches is None:
        noise = generator.normal(size=(steps, chains, 1))
        c = 1.0
    else:  # 48 samples in batches of 4, each epoch in an order of its own, from anywhere in it
        samples = generator.normal(size=48)
        samples -= samples.mean()
        c = float(batch_variance(samples.var(ddof=1), 4, 48))
        epochs = -(-steps // batches) + 1
        order = np.argsort(generator.random((chains, epochs, 48)), -1)
        means = samples[order].reshape(chains, epochs * batches, 4).mean(-1)
        begin = generator.integers(0, batches, chains)
        noise = np.stack([row[b : b + steps] for row, b in zip(means, begin, strict=True)], 1)
        noise = noise[..., None]
    chain = descent(h, None, rate, momentum, steps, None, noise, (chains,))[burn::stride]
    each = chain.var(0)
    expected = window_variances(
        h, np.full(3, c), rate, momentum, length=length, stride=stride, batches=batches
    )
    error = each.std(0) / math.sqrt(chains)
    assert (np.abs(each.mean(0) - expected) < 4 * error).all()
    assert (error < 0.1 * expected).all()


def test_noise_of_shuffled_epochs_is_anticorrelated_and_sums_to_zero():
    found = noise_autocovariance(12)
    assert found[0] + 2 * found[1:].sum() == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(found[[1, 11]], [-1 / 12, -1 / 132])
    np.testing.assert_array_equal(noise_autocovariance(None), [1])
    np.testing.assert_array_equal(noise_autocovariance(1), [1])


def test_limits_of_the_window_law():
    one, rate = np.ones(1), 0.1
    free = window_variances(np.zeros(1), one, rate, length=360)
    assert free[0] == pytest.approx(rate**2 * 360 / 6, rel=1e-2)
    shuffled = window_variances(np.zeros(1), one, rate, batches=36)
    assert shuffled[0] == pytest.approx(rate**2 * 37 / 6, rel=1e-5)
    stiff = window_variances(np.array([0.5]), one, rate, length=10**5)
    assert stiff[0] == pytest.approx(rate / (2 * 0.5) / (1 - rate * 0.5 / 2), rel=1e-2)


@pytest.mark.parametrize(
    ("gamma", "stationary", "short", "shuffled"),
    [(1.0, 0.01, 1.34, 1.87), (1.5, 1.01, 2.34, 2.87), (2.0, 2.01, 3.34, 3.87)],
)
def test_exponents_of_the_theory(gamma, stationary, short, shuffled):
    """The table of psi for eta = 0.1 and curvatures from 1e-3 to 1."""
    h = np.geomspace(1e-3, 1, 20)
    options = ({}, {"length": 360}, {"batches": 36})
    fits = [power_law(h**-0.5, window_variances(h, h**gamma, 0.1, **more)) for more in options]
    found = [-fit.exponent for fit in fits]
    np.testing.assert_allclose(found, [stationary, short, shuffled], atol=0.006)


# Exponents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.92), (0.8, 0.86)])
def test_intervals_of_exponents_cover(memory, least):
    """Scatter that grows along the modes, and of which neighbours share some."""
    x, trials, hits, bent = np.geomspace(1, 1e3, 199), 300, 0, 0
    for seed in range(trials):
        scatter = walk(199, 1, seed, memory)[:, 0] * math.sqrt(1 - memory**2)
        found = power_law(x, 3 * x**-2.0 * np.exp(scatter * np.linspace(0.2, 0.8, 199)))
        hits += found.low < -2 < found.high
        assert found.low < found.exponent < found.high
        bent += abs(found.curvature_t) > 3
    assert least < hits / trials < 0.99
    assert bent / trials < (0.02 if memory == 0 else 0.1)


def test_exponents_of_exact_and_of_bent_laws():
    x = np.geomspace(0.1, 10, 50)
    exact = power_law(x, 7 * x**1.5)
    assert exact.exponent == pytest.approx(1.5)
    assert exact.intercept == pytest.approx(math.log(7))
    assert exact.r_squared == pytest.approx(1)
    assert exact.span == pytest.approx(100)
    noisy = np.exp(0.01 * np.random.default_rng(0).normal(size=50))
    assert "fit_warning" not in power_law(x, x**1.5 * noisy).attributes()
    bent = power_law(x, np.exp(0.3 * np.log(x) ** 2) * x * noisy)
    assert bent.curvature == pytest.approx(0.3, abs=0.02)
    assert "fit_warning" in bent.attributes()


def test_exponents_of_too_few_points():
    x = np.arange(1.0, 20)
    y = np.where(x > 7, np.nan, x)
    with pytest.raises(ValueError, match=r"at least 8 points with positive .* got 7 of 19"):
        power_law(x, y)
    with pytest.raises(ValueError, match="several x"):
        power_law(np.ones(10), np.ones(10))
    y = np.where(x > 18, -1, x**2)
    assert power_law(x, y).points == 18


# Displacements -----------------------------------------------------------------------------------


def fractional(steps, hurst, size, seed):
    """Fractional Brownian motion, by the circulant embedding of Davies and Harte."""
    generator = np.random.default_rng(seed)
    k = np.arange(steps + 1.0)
    r = (np.abs(k + 1) ** (2 * hurst) - 2 * k ** (2 * hurst) + np.abs(k - 1) ** (2 * hurst)) / 2
    row = np.concatenate([r, r[-2:0:-1]])
    scale = np.sqrt(np.fft.fft(row).real.clip(0) / len(row))
    z = generator.normal(size=(size, len(row))) + 1j * generator.normal(size=(size, len(row)))
    return np.fft.fft(scale * z, axis=1).real[:, :steps].cumsum(1).T


@pytest.mark.parametrize("hurst", [0.25, 0.5, 0.75])
def test_exponents_of_fractional_brownian_motion(hurst):
    found, hits = [], 0
    for seed in range(20):
        x = fractional(512, hurst, 16, seed)
        one = displacements(x)
        found.append(one.exponent)
        hits += abs(one.exponent - 2 * hurst) < 2.365 * one.exponent_error
    assert np.mean(found) == pytest.approx(2 * hurst, abs=0.03)
    assert hits >= 14


def test_displacements_of_drift_and_confinement():
    x = np.arange(400.0)[:, None] * np.ones(3)
    drift = displacements(x)
    np.testing.assert_allclose(drift.means, 3 * drift.lags.astype(float) ** 2)
    assert drift.exponent == pytest.approx(2)
    np.testing.assert_allclose(drift.ageing, 1)
    x = walk(4000, 8, 0, 0.9)
    found = displacements(x)
    expected = 2 * 8 / (1 - 0.9**2) * (1 - 0.9**found.lags)
    assert (np.abs(found.means - expected) < 5 * found.errors).all()
    assert (found.errors < 0.1 * expected).all()
    each = np.square(x[7:] - x[:-7]).sum(1).mean()
    lagged = displacements(x, per_octave=20)
    assert lagged.means[list(lagged.lags).index(7)] == pytest.approx(each)


def test_weights_that_slow_down_age():
    steps = np.random.default_rng(0).normal(size=(600, 30)) / np.sqrt(np.arange(1, 601))[:, None]
    x = steps.cumsum(0)
    found = displacements(x)
    assert (found.ageing < 0.35).all()
    with pytest.raises(ValueError, match="at least 32 snapshots"):
        displacements(np.eye(20))
    with pytest.raises(ValueError, match="do not move"):
        displacements(np.ones((40, 3)))


# Tails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_the_index_of_stable_laws(alpha):
    x = torch.from_numpy(levy_stable.rvs(alpha, 0, size=40_000, random_state=3))
    found, error = stable_index(x)
    assert abs(found - alpha) < 3.5 * error < 0.35


def test_light_tails_that_belong_together_are_not_taken_for_heavy():
    """Entries of several scales, which move together."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(120, 1, generator=generator)
    own = torch.randn(120, 4096, generator=generator)
    rows = ((common + own) * torch.logspace(0, -4, 4096)).cumsum(0)
    index, error, updates = update_tail_index(rows, 0)
    assert updates == 119
    assert index == pytest.approx(2, abs=0.15)
    heavy = torch.from_numpy(levy_stable.rvs(1.3, 0, size=(120, 4096), random_state=1)).cumsum(0)
    assert update_tail_index(heavy, 0)[0] < 1.7
    with pytest.raises(ValueError, match="at least 64 values that are not zero, got 0"):
        stable_index(torch.zeros(100))
    with pytest.raises(ValueError, match="not finite"):
        stable_index(torch.full((100,), math.inf))


# Flatness ----------------------------------------------------------------------------------------

LOSSES = {
    "parabola": (lambda x: 1 + x**2, math.sqrt(math.e - 1)),
    "quartic": (lambda x: 1e-4 * (1 + x**4), (math.e - 1) ** 0.25),
    "exponential": (lambda x: math.exp(min(x, 700)), 1.0),
    "kink": (lambda x: 1 + 1e3 * max(0.0, x - 1), 1 + (math.e - 1) / 1e3),
    "wall": (lambda x: 1.0 if x < 2 else math.inf, 2.0),
    "broken": (lambda x: 1.0 + x if x < 3 else math.nan, math.e - 1),
}


@pytest.mark.parametrize("guess", [1e-4, 0.5, 1.3, 40.0])
@pytest.mark.parametrize("name", LOSSES)
def test_widths(name, guess):
    loss, expected = LOSSES[name]
    made = 0

    def counted(x):
        nonlocal made
        made += 1
        return loss(x)

    found = width(counted, loss(0.0), guess, 1e6)
    assert found == pytest.approx(expected, rel=2e-3)
    assert made <= (40 if name in ("kink", "wall") else 20)
    if name == "parabola" and 0.5 <= guess <= 1.3:
        assert made <= 5


def test_widths_that_are_none():
    assert math.isinf(width(lambda x: 1.0, 1.0, 1.0, 1e3))
    assert math.isinf(width(lambda x: math.exp(-x), 1.0, 1e5, 1e3))
    for least in (0.0, -1.0, math.nan, math.inf):
        assert math.isnan(width(lambda x: 1.0, least, 1.0, 1e3))


@pytest.mark.parametrize("curvature", [0.1, 1.0])
def test_correlation_times_of_what_swings(curvature):
    """One weight on a quadratic, by a heavy ball with momentum 0.9 and white noise."""
    # w' = (1 + m - h) w - m w_before + noise: AR(2), of which the spectrum at 0 is exact.
    momentum, n = 0.9, 4000
    a, b = 1 + momentum - curvature, -momentum
    rho = [1.0, a / (1 - b)]
    for _ in range(400):
        rho.append(a * rho[-1] + b * rho[-2])
    true = sum(rho) - 0.5
    noise = np.random.default_rng(0).standard_normal((n + 500, 40))
    w = np.zeros_like(noise)
    for t in range(2, len(w)):
        w[t] = a * w[t - 1] + b * w[t - 2] + noise[t]
    times, errors = correlation_times(torch.from_numpy(w[500:]))
    assert bool((times > 0).float().mean() > 0.5)
    scores = (times - true) / errors
    assert abs(float(scores.mean())) < 0.7
    assert float(scores.abs().max()) < 4
