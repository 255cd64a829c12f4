"""Densities of states against enumeration of all networks."""

import itertools
import math

import numpy as np
import pytest
import torch
import xarray as xr

from nettrace.landscape import (
    DiscreteNetwork,
    canonical,
    committee,
    density_of_states,
    local_entropy,
    margin,
    multilayer,
    overlap,
    parity,
    patterns,
    perceptron,
    wrong_share,
)
from nettrace.landscape.crossings import Crossings
from nettrace.landscape.density import DensityOfStates
from nettrace.landscape.transitions import stationary
from nettrace.landscape.walkers import Walkers
from nettrace.landscape.wang_landau import WangLandau
from nettrace.missing import DoubtfulMeasureWarning


def signs(count, inputs, seed=0):
    """Random patterns of signs with random labels."""
    return patterns(count, inputs, seed=seed)


def enumerated(network):
    """All states: weights (states, outputs, inputs) of each layer."""
    free = [layer.isnan() for layer in network.layers]
    states = torch.tensor(list(itertools.product(network.levels, repeat=network.weights)))
    found, begin = [], 0
    for layer, mask in zip(network.layers, free, strict=True):
        weights = layer.nan_to_num(0.0).float().repeat(len(states), 1, 1)
        count = int(mask.sum())
        weights[:, mask] = states[:, begin : begin + count].float()
        begin += count
        found.append(weights.double())
    return found


def errors(network, weights, x, y):
    """(states,) by a forward pass of its own."""
    h = x.T.double().expand(len(weights[0]), -1, -1)
    for number, w in enumerate(weights):
        h = torch.einsum("soi,sip->sop", w, h)
        h = torch.where(h.abs() < 1e-9, 0.0, h)
        if number + 1 < len(weights) or network.output == "product":
            h = (
                torch.where(h >= 0, 1.0, -1.0).double()
                if network.activation == "sign"
                else network.activation(h)
            )
    out = torch.where(h.double().prod(1) >= 0, 1, -1)
    return (out != y).sum(1)


NETWORKS = {
    "perceptron": (perceptron(13), 11),
    "even": (perceptron(10), 9),  # with fields that are 0
    "ternary": (perceptron(7, levels=(-1, 0, 1)), 9),
    "potts": (perceptron(6, levels=(-2, -1, 1, 2)), 8),
    "uneven levels": (perceptron(7, levels=(0.0, 0.3, 1.7)), 8),
    "tree committee": (committee(12, 3, tree=True), 10),
    "committee": (committee(4, 3), 9),
    "parity": (parity(12, 3, tree=True), 10),
    "full parity": (parity(5, 2), 9),
    "multilayer": (multilayer(4, 2, 1), 9),
    "deep": (multilayer(3, 2, 2, 1), 9),
    "deep parity": (
        DiscreteNetwork(
            (torch.full((2, 3), torch.nan), torch.full((2, 2), torch.nan)), output="product"
        ),
        8,
    ),
    "tanh": (multilayer(4, 2, 1, activation=torch.tanh), 9),
    "relu": (multilayer(3, 3, 1, activation=torch.relu), 8),
    "partly fixed": (
        DiscreteNetwork((torch.tensor([[1.0, *[math.nan] * 9, -1.0]], dtype=torch.float64),)),
        9,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_of_states_are_those_of_enumeration(name):
    network, count = NETWORKS[name]
    x, y = signs(count, network.layers[0].shape[1])
    if name == "tanh":
        x = x * torch.linspace(0.5, 1.5, x.shape[1])
    states = enumerated(network)
    truth = np.bincount(errors(network, states, x, y), minlength=count + 1)
    found = density_of_states(network, x, y, error=0.08, walkers=128)
    assert found.stopped == "done"
    assert np.isnan(found.entropy.values[truth == 0]).all()
    there = truth > 0
    off = found.entropy.values[there] - np.log(truth[there])
    assert (np.abs(off) < 5 * found.entropy_standard_error.values[there]).all()
    assert np.exp(found.entropy.values[there]).sum() == pytest.approx(network.states)


def calibration(seeds, network, count):
    scores, uncertain = [], []
    for seed in seeds:
        x, y = signs(count, network.layers[0].shape[1], seed)
        truth = np.bincount(errors(network, enumerated(network), x, y), minlength=count + 1)
        found = density_of_states(network, x, y, error=0.05, walkers=128, seed=seed)
        there = truth > 0
        error = found.entropy_standard_error.values
        scores.append((found.entropy.values[there] - np.log(truth[there])) / error[there])
        uncertain.append(error[truth >= 5])
        assert np.isnan(found.entropy.values[~there]).all()
    return np.concatenate(scores), np.concatenate(uncertain)


@pytest.mark.parametrize(
    ("network", "count", "seeds"),
    [
        (perceptron(13), 13, range(12)),
        pytest.param(perceptron(15), 15, range(20), marks=pytest.mark.slow),
        pytest.param(committee(15, 3, tree=True), 15, range(20), marks=pytest.mark.slow),
        pytest.param(perceptron(20), 20, range(5), marks=pytest.mark.slow),
    ],
)
def test_standard_errors_are_right(network, count, seeds):
    scores, uncertain = calibration(seeds, network, count)
    assert (np.abs(scores) < 3).mean() >= (0.99 if len(scores) > 99 else 0.97)
    assert 0.7 < scores.std() < 1.3
    assert uncertain.max() <= 0.05


def test_windows_give_the_same():
    x, y = signs(31, 14)
    truth = np.bincount(errors(perceptron(14), enumerated(perceptron(14)), x, y), minlength=32)
    there, scores = truth > 0, []
    for seed in range(3):
        found = density_of_states(
            perceptron(14), x, y, error=0.08, walkers=128, windows=4, seed=seed
        )
        off = found.entropy.values[there] - np.log(truth[there])
        scores.append(off / found.entropy_standard_error.values[there])
    assert np.abs(scores).max() < 4.5
    assert np.std(scores) < 1.4


def test_the_error_of_wang_landau_falls_with_the_root_of_time():
    network, (x, y) = perceptron(11), signs(9, 11)
    truth = np.bincount(errors(network, enumerated(network), x, y), minlength=10)
    exact = np.log(truth[truth > 0] / truth.sum())
    curves = []
    for seed in range(2):
        sampler = DensityOfStates(network, x, y, error=1e-4, walkers=64, seed=seed)
        while len(sampler.history) < 6:
            sampler.advance()
        rms, times = [], []
        for _, log_f, log_g in sampler.history:
            log_g = log_g[truth > 0] - np.logaddexp.reduce(log_g[truth > 0])
            rms.append(np.sqrt(((log_g - exact) ** 2).mean()))
            times.append(1 / log_f)
        curves.append(rms)
    fall = np.polyfit(np.log(times), np.log(np.mean(curves, 0)), 1)[0]
    assert -0.85 < fall < -0.3


def test_mirrored_networks_make_the_other_errors():
    x, y = signs(15, 15)
    found = density_of_states(perceptron(15), x, y, error=0.05)
    entropy, error = found.entropy.values, found.entropy_standard_error.values
    there = ~np.isnan(entropy)
    assert (there == there[::-1]).all()
    off = (entropy - entropy[::-1])[there]
    assert (np.abs(off) < 5 * np.hypot(error, error[::-1])[there]).all()


def test_numbers_of_states_that_others_published_are_found():
    """A perceptron of 15 weights whose states make 0 to 15 errors as often as the authors found.

    The data set is not public, and so another is looked for that has two solutions too; the mean
    over data sets is known: 2^N C(P, E) 2^-P.
    """
    published = np.array([2, 20, 113, 471, 1396, 2960, 5021, 6401])
    network, weights = perceptron(15), enumerated(perceptron(15))
    counts = []
    for seed in range(24):
        x, y = signs(15, 15, seed)
        counts.append(np.bincount(errors(network, weights, x, y), minlength=16))
    counts = np.array(counts)
    apart = np.abs(counts[:, :8] - published) / counts[:, :8].std(0)
    assert apart.mean(1).min() < 0.6  # it is a data set like others
    nearest = int(apart.mean(1).argmin())
    x, y = signs(15, 15, nearest)
    found = density_of_states(network, x, y, error=0.03)
    truth = counts[nearest]
    off = found.entropy.values[truth > 0] - np.log(truth[truth > 0])
    assert (np.abs(off) < 4 * found.entropy_standard_error.values[truth > 0]).all()
    expected = 2**15 * np.array([math.comb(15, e) for e in range(16)]) / 2**15
    assert counts.mean(0)[2:14] == pytest.approx(expected[2:14], rel=0.5)


def test_observables_and_temperatures_are_those_of_enumeration():
    network, (x, y) = perceptron(11), signs(9, 11)
    other_x, other_y = signs(20, 11, seed=7)
    weights = enumerated(network)
    reference = [weights[0][5]]
    found = density_of_states(
        network,
        x,
        y,
        error=0.03,
        observables={
            "test_error": wrong_share(other_x, other_y),
            "margin": margin(x, y),
            "overlap": overlap(reference),
        },
    )
    energy = errors(network, weights, x, y).numpy()
    fields = (weights[0][:, 0] @ x.T.double()).numpy()
    truth = {
        "test_error": errors(network, weights, other_x, other_y).numpy() / 20,
        "margin": (fields * y.numpy()).min(1),
        "overlap": (weights[0][:, 0] @ reference[0][0]).numpy() / 11,
    }
    for name, value in truth.items():
        for e in np.unique(energy):
            error = max(float(found[f"{name}_standard_error"][e]), 1e-12)
            assert abs(float(found[name][e]) - value[energy == e].mean()) < 5 * error
    hot = [0.3, 1.0, 5.0, -2.0]
    warm = canonical(found, hot)
    for place, t in enumerate(hot):
        z = np.exp(-energy / t)
        mean = (energy * z).sum() / z.sum()
        expected = {
            "free_energy": -t * np.log(z.sum()),
            "energy": mean,
            "heat_capacity": ((energy - mean) ** 2 * z).sum() / z.sum() / t**2,
            "entropy": np.log(z.sum()) + mean / t,
            "test_error": (truth["test_error"] * z).sum() / z.sum(),
        }
        for name, value in expected.items():
            error = float(warm[f"{name}_standard_error"][place])
            assert abs(float(warm[name][place]) - value) < 5 * error, (name, t)


def test_energies_that_are_left_out_are_missed_at_low_temperatures_alone():
    found = density_of_states(perceptron(15), *signs(15, 15), error=0.1, walkers=64)
    assert canonical(found, [0.1, 1e3]).doubts == ""
    least = int(found.entropy.notnull().values.argmax())
    found.entropy[least] = np.nan
    found.left_out[least] = 1
    with pytest.warns(DoubtfulMeasureWarning, match=f"at temperatures 0.1 to 0.1, .*{least + 1}"):
        warm = canonical(found, [0.1, 1e3])
    assert "are missing" in warm.doubts
    assert canonical(found, [1e3]).doubts == ""


def test_a_range_of_energies_has_the_right_ratios():
    network, (x, y) = perceptron(13), signs(13, 13)
    truth = np.bincount(errors(network, enumerated(network), x, y), minlength=14)
    found = density_of_states(network, x, y, energies=(2, 6), error=0.05)
    assert np.isnan(found.entropy.values[7:]).all()
    expected = np.log(truth[2:7] / truth[2:7].sum())
    off = found.entropy.values[2:7] - expected
    assert (np.abs(off) < 4 * found.entropy_standard_error.values[2:7]).all()


def test_local_entropy_is_that_of_enumeration():
    network, (x, y) = perceptron(12), signs(6, 12)
    weights = enumerated(network)
    energy = errors(network, weights, x, y).numpy()
    states = weights[0][:, 0].numpy()
    solution = states[np.flatnonzero(energy <= 1)[0]]
    distance = (states != solution).sum(1)
    # What is connected with it by single changes among those of few errors.
    index = {tuple(s): k for k, s in enumerate(states)}
    start = index[tuple(solution)]
    reached, edge = {start}, [start]
    while edge:
        state = states[edge.pop()].copy()
        for place in range(12):
            state[place] *= -1
            k = index[tuple(state)]
            state[place] *= -1
            if energy[k] <= 1 and k not in reached:
                reached.add(k)
                edge.append(k)
    truth = np.bincount(distance[list(reached)], minlength=13)
    found = local_entropy(network, x, y, [torch.tensor(solution)[None]], errors=1, error=0.05)
    there = truth > 0
    assert np.isnan(found.entropy.values[~there]).all()
    off = found.entropy.values[there] - np.log(truth[there])
    assert (np.abs(off) <= 4 * found.entropy_standard_error.values[there] + 1e-12).all()
    assert np.exp(found["all"].values).sum() == pytest.approx(2**12)


def test_a_seed_says_all():
    x, y = signs(9, 9)
    one, other = (density_of_states(perceptron(9), x, y, error=0.1, seed=3) for _ in range(2))
    volatile = ["seconds", "flips_per_second"]
    for found in (one, other):
        for name in volatile:
            del found.attrs[name]
    xr.testing.assert_identical(one, other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"walkers": 1}, "two walkers"),
        ({"energies": (3, 30)}, "0 to 9"),
        ({"energies": (5, 5)}, "0 to 9"),
        ({"windows": 3}, "divide"),
        ({"error": 0.0}, "positive"),
        ({"observables": {"entropy": len}}, "got 'entropy', which the result uses"),
        ({"observables": {"x_without": len}}, "names of their own"),
        ({"observables": {"x": lambda w: w.energies[:, None]}}, r"'x' to give .* \(256, 1\)"),
        ({"to": "."}, "to be a file"),
    ],
)
def test_wrong_arguments_are_told(options, said):
    with pytest.raises(ValueError, match=said):
        density_of_states(perceptron(9), *signs(9, 9), **options)


def test_wrong_data_are_told():
    x, y = signs(9, 9)
    with pytest.raises(ValueError, match="expected inputs of shape"):
        density_of_states(perceptron(8), x, y)
    with pytest.raises(ValueError, match="each -1 or 1"):
        density_of_states(perceptron(9), x, (y + 1) / 2)
    with pytest.raises(ValueError, match="not finite"):
        density_of_states(perceptron(9), x * math.nan, y)
    with pytest.raises(ValueError, match="no weight is free"):
        DiscreteNetwork((torch.ones(1, 3),))
    with pytest.raises(ValueError, match="errors, and errors=0 are allowed"):
        local_entropy(perceptron(9), x, y, [-torch.ones(1, 9)], errors=0)
    with pytest.raises(ValueError, match="among the levels"):
        local_entropy(perceptron(9), x, y, [torch.full((1, 9), 0.5)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, y: density_of_states(torch.nn.Linear(9, 1), x, y), "see loss_density"),
        (lambda x, y: density_of_states(perceptron(9), x.numpy(), y), "got ndarray"),
        (lambda x, y: density_of_states(perceptron(9), x.cfloat(), y), "real numbers"),
        (lambda x, y: density_of_states(perceptron(9), x, y.tolist()), "labels= .* got list"),
        (lambda x, y: margin(x, (y + 1) / 2), "each -1 or 1"),
        (lambda x, y: wrong_share(x, y > 0), "each -1 or 1"),
        (lambda x, y: overlap(torch.ones(1, 9)), "a tensor for each layer"),
        (lambda x, y: perceptron(9, levels=(1, math.inf)), "levels to be finite"),
        (lambda x, y: multilayer(9, 2, 1, activation="relu"), "or a function, got 'relu'"),
    ],
)
def test_what_is_of_another_kind_is_told(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call(*signs(9, 9))


def test_a_solution_without_others_around_it_is_told(logged):
    network = perceptron(11)
    for seed in range(20):
        x, _ = signs(7, 11, seed)
        given = torch.randn(1, 11, generator=torch.Generator().manual_seed(seed)).sign()
        y = ((x @ given[0].to(x) >= 0) * 2 - 1).to(x)
        near = given.repeat(11, 1).to(x) * (1 - 2 * torch.eye(11).to(x))
        if all(((x @ w >= 0) * 2 - 1 != y).any() for w in near):
            break
    else:
        pytest.fail("there is none")
    found = local_entropy(network, x, y, [given])
    assert found.entropy.values[0] == 0
    assert found.entropy[1:].isnull().all()
    assert "no other network is connected" in found.doubts
    logged.clear()


def test_networks_of_weights_that_are_all_0_have_no_overlap():
    network = perceptron(3, levels=(-1, 0, 1))
    x, y = signs(3, 3)
    seen = {"overlap": overlap([torch.ones(1, 3)])}
    found = density_of_states(network, x, y, observables=seen, error=0.1)
    states = enumerated(network)
    energies = errors(network, states, x, y)
    w = states[0][:, 0].double()
    exact = w.sum(1) / 3**0.5 / w.norm(dim=1).clamp_min(1e-9)
    for energy, value in zip(found.energy.values, found.overlap.values, strict=True):
        if (energies == energy).any():
            assert abs(value - float(exact[energies == energy].mean())) < 0.1


def test_few_groups_and_what_is_not_finite_are_doubted(logged):
    seen = {"x": lambda walkers: walkers.energies * math.nan}
    found = density_of_states(perceptron(9), *signs(9, 9), walkers=8, error=0.2, observables=seen)
    assert "8 groups of walkers" in found.doubts
    assert "'x' was not finite" in found.doubts
    logged.clear()


def test_a_range_that_is_never_visited_is_told():
    x, y = signs(40, 9)  # which no network classifies
    with pytest.raises(ValueError, match="was not visited"):
        density_of_states(perceptron(9), x, y, energies=(0, 1))
    with pytest.raises(ValueError, match="was not visited"):
        density_of_states(perceptron(9), x, y, energies=(0, 1), seconds=0.3)


def test_what_was_found_in_little_time_is_kept(logged, tmp_path):
    x, y = signs(60, 61)
    found = density_of_states(
        perceptron(61), x, y, error=1e-3, seconds=1.0, to=tmp_path / "density.nc"
    )
    assert found.stopped == "out of time"
    assert found.seconds < 20  # on a busy machine too
    assert any("density of states" in text for text in logged)
    logged.clear()
    kept = xr.open_dataset(tmp_path / "density.nc", engine="scipy")
    assert kept.entropy.values == pytest.approx(found.entropy.values, nan_ok=True)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.2},
        {"separation": 4.0},
        {"mislabelled": 0.3},
        {"dimension": 3.0},
        {"offset": 1.0},
    ],
)
def test_patterns_are_as_asked_for(options):
    x, y = patterns(4000, 20, binary=False, seed=1, **options)
    if "mislabelled" not in options:
        assert (y > 0).double().mean() == pytest.approx(options.get("share", 0.5), abs=1e-3)
    centres = x[y > 0].mean(0) - x[y < 0].mean(0)
    assert centres.norm() == pytest.approx(options.get("separation", 0.0), abs=0.2)
    assert x.mean() == pytest.approx(options.get("offset", 0.0), abs=0.1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T))
    if "separation" not in options:
        ratio = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
        assert ratio == pytest.approx(options.get("dimension", 20), rel=0.05)


def test_labels_follow_inputs_as_asked_for():
    x, clean = patterns(4000, 20, correlation=1.0, seed=2)
    _, noisy = patterns(4000, 20, correlation=1.0, mislabelled=0.25, seed=2)
    assert (clean != noisy).double().mean() == pytest.approx(0.25, abs=1e-3)
    x, y = patterns(9, 12, share=0.3, correlation=1.0, seed=4)
    assert errors(perceptron(12), enumerated(perceptron(12)), x, y).min() == 0
    x, y = patterns(400, 21, correlation=1.0, binary=False, seed=3)
    fit = torch.linalg.lstsq(x, y[:, None]).solution
    assert ((x @ fit)[:, 0].sign() == y).double().mean() > 0.9
    for wrong in ({"share": 2.0}, {"correlation": -1}, {"dimension": 0.5}, {"separation": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            patterns(10, 5, **wrong)


def test_a_stationary_distribution_of_any_range_is_found():
    generator = np.random.default_rng(0)
    entropy = -(np.abs(np.arange(30) - 10.0) ** 1.8)  # down to e^-220
    proposals = generator.uniform(0.5, 1.5, (30, 30))
    flow = np.minimum(np.exp(entropy)[:, None], np.exp(entropy)[None]) * (proposals + proposals.T)
    counts = flow / np.exp(entropy)[:, None]
    counts[np.abs(np.subtract.outer(range(30), range(30))) > 4] = 0
    np.fill_diagonal(counts, 0.0)
    np.fill_diagonal(counts, 20.0 - counts.sum(1))  # proposals that lead nowhere
    found = stationary(counts * 1e9)  # so many that half of one does not count
    assert np.diff(found) == pytest.approx(np.diff(entropy), rel=1e-6, abs=1e-6)


def test_ways_back_are_counted():
    crossings = Crossings(2, 1, 9)
    crossings.home = 4
    crossings.forget()
    crossings.follow(torch.tensor([[3, 5], [1, 8]]))
    assert crossings.returns.tolist() == [0] * 9
    crossings.follow(torch.tensor([[2, 7], [4, 6]]))
    assert crossings.returns.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0]
    crossings.follow(torch.tensor([[2, 7], [5, 3]]))
    assert crossings.returns.tolist() == [0, 1, 2, 3, 3, 2, 1, 1, 1]


def test_wang_landau_takes_any_walkers():
    """Coins of which one is turned at a time: S(heads) is that of the binomial."""

    class Coins(Walkers):
        def __init__(self):
            self.heads = torch.zeros(64, 12, dtype=torch.int64)
            self.random = torch.Generator().manual_seed(0)
            self.energies = self.heads.sum(1)

        def propose(self, entropy):
            self.coin = torch.randint(12, (64, 1), generator=self.random)
            return self.energies + 1 - 2 * self.heads.gather(1, self.coin)[:, 0], None

        def accept(self, which):
            turned = (self.heads.gather(1, self.coin) + which[:, None]) % 2
            self.heads.scatter_(1, self.coin, turned)
            self.energies = self.heads.sum(1)

    sampler = WangLandau(Coins(), 13, error=0.04, sweep=12)
    while sampler.share < 1:
        sampler.advance()
    entropy, without = sampler.entropies()
    exact = np.log([math.comb(12, k) / 2**12 for k in range(13)])
    error = np.sqrt((len(without) - 1) / len(without) * ((without - without.mean(0)) ** 2).sum(0))
    assert (np.abs(entropy - exact) < 4 * error).all()


def test_doubts_are_told(logged):
    x, y = signs(40, 41)
    found = density_of_states(perceptron(41), x, y, error=1e-3, seconds=0.4)
    assert any("more time" in text for text in logged)
    assert found.doubts.splitlines() == [
        text.removeprefix("density of states: ") for text in logged
    ]
    logged.clear()
