"""Windows of weights against snapshots that are stored, and what trainings may do to them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from nettrace.kernels import weight_welford_
from nettrace.weight_sketch import BUCKETS, WeightSketch, buckets
from nettrace.window import WeightWindow


def network(*widths, **options):
    return nn.Sequential(*[nn.Linear(a, b, **options) for a, b in pairwise(widths)])


def flat(model):
    vectors = [torch.view_as_real(p) if p.is_complex() else p for p in model.parameters()]
    return torch.cat([v.detach().flatten().float() for v in vectors])


def wandering(model, window, steps, scale=1e-2, **seen):
    """Feeds a window with weights that move at random; returns all of them, stored."""
    generator, stored = torch.Generator().manual_seed(1), []
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        window.see(model, step, **seen)
        stored.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
    return torch.stack(stored)


@pytest.mark.parametrize("steps", [3, 10, 23])
def test_snapshots_are_the_last_bit_for_bit_and_in_order(steps):
    model, window = network(3, 4, 2), WeightWindow(10)
    stored = wandering(model, window, steps)
    assert window.kind == "snapshots"
    assert window.count == min(steps, 10)
    assert window.is_full == (steps >= 10)
    assert list(window.steps) == list(range(steps))[-10:]
    rows = torch.cat([window.rows(name) for name in window.names], 1)
    assert torch.equal(rows, stored[-10:])
    assert window.size == stored.shape[1]


@pytest.mark.parametrize("keep", ["snapshots", "sketch", "moments"])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_a_stream_of_5000_steps_is_as_what_was_stored(keep, level):
    """Weights of 1e3 with fluctuations of 1e-4, in float64; the sketch is whole for so few."""
    steps = 5000
    model = network(3, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p += level
    window = WeightWindow(steps, keep=keep)
    stored = wandering(model, window, steps, 1e-4).numpy()
    assert window.is_full
    centred = stored - stored.mean(0)
    expected = (centred**2).mean(0)
    found = torch.stack(list(window.variations().values()))
    parts = np.split(expected, np.cumsum([p.numel() for p in model.parameters()])[:-1])
    # What the level leaves of the digits of float64.
    tolerance = 1e-9 if level == 0 else 1e-7
    np.testing.assert_allclose(found, [p.sum() for p in parts], rtol=tolerance)
    moved = np.linalg.norm(stored[-1] - stored[0])
    assert window.displacement() == pytest.approx(moved, rel=tolerance)
    if keep == "moments":
        np.testing.assert_allclose(window.moments.squares / steps, expected, rtol=tolerance)
        mean = (window.moments.first + window.moments.means).numpy()
        np.testing.assert_allclose(mean, stored.mean(0), rtol=1e-12, atol=1e-12)


def test_moments_in_single_precision_keep_small_fluctuations_of_large_weights():
    model, window = network(30, 20), WeightWindow(4, keep="moments")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1000.0)
    stored = wandering(model, window, 500, 1e-3).double()
    expected = (stored - stored[0]).var(0, correction=0).sum()
    assert float(sum(window.variations().values())) == pytest.approx(float(expected), rel=1e-5)
    assert window.count == 500  # they do not forget


def test_welford_is_its_specification():
    rows = torch.randn(50, 7).double() + 5
    means, squares = [torch.full((7,), 3.0).double()], [torch.zeros(7).double()]
    for n, row in enumerate(rows, 1):
        weight_welford_([row.clone()], means, squares, n)
    torch.testing.assert_close(means[0], rows.mean(0))
    torch.testing.assert_close(squares[0], rows.var(0, correction=0) * 50)


def test_sketches_are_without_bias_and_tell_their_error():
    x = torch.randn(3, 40_000).double()
    x[1] += 0.5 * x[0]
    weights = [torch.zeros(30_000).double(), torch.zeros(100).double(), torch.zeros(9_900).double()]
    truth, found, told = x @ x.mT, [], []
    for seed in range(60):
        sketch = WeightSketch(weights, [300, 10, 99], seed)
        rows = torch.empty(3, sketch.length).double()
        for row, one in zip(rows, x, strict=True):
            sketch(one.split([30_000, 100, 9_900]), row)
        assert sketch.length <= BUCKETS
        found.append(rows @ rows.mT)
        told.append(float((rows[0] * rows[1]).square().sum().sqrt()))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - truth).abs() < 4 * error).all())
    scatter = float(found[:, 0, 1].std())
    assert scatter < 1.3 * np.median(told) < 3 * scatter
    assert scatter < 1.5 * math.sqrt(2 / BUCKETS) * float((truth[0, 0] * truth[1, 1]).sqrt())


def test_of_many_weights_some_stand_for_all():
    """Motion of low rank, as gradients are, and of different sizes in two layers."""
    torch.manual_seed(0)
    sizes, rows = [700 * 1000, 1000, 500 * 700, 300], [1000, 1000, 700, 300]
    weights = [torch.randn(n, dtype=torch.float64) for n in sizes]
    moves = []
    for _ in range(3):
        parts = [
            torch.outer(torch.randn(n // r), torch.randn(r)).flatten() * (0.1 + i)
            for i, (n, r) in enumerate(zip(sizes, rows, strict=True))
        ]
        moves.append([part.double() for part in parts])
    moves[2] = [0.5 * a + b for a, b in zip(moves[0], moves[2], strict=True)]
    flat = torch.stack([torch.cat(move) for move in moves])
    true = flat @ flat.T
    found = []
    for seed in range(60):
        sketch = WeightSketch(weights, rows, seed)
        out = torch.empty(3, sketch.length, dtype=torch.float64)
        for row, move in zip(out, moves, strict=True):
            sketch([w + m for w, m in zip(weights, move, strict=True)], row)
        found.append(out @ out.T)
        assert sketch.length <= BUCKETS
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - true).abs() < 4 * error).all())
    norms = true.diagonal().sqrt()
    assert bool((found.std(0) < 0.08 * norms[:, None] * norms).all())


def test_what_fits_into_a_sketch_is_whole():
    weights = [torch.randn(50), torch.randn(3, 7).flatten()]
    sketch = WeightSketch(weights, [1, 7], 0)
    out = torch.empty(sketch.length)
    sketch([w + 1 for w in weights], out)
    assert sketch.length == 71
    torch.testing.assert_close(out, torch.ones(71))
    assert buckets([50, 21], [1, 7]) == [50, 21]
    assert sum(buckets([10**6, 500, 10**6], [1000, 1, 512])) <= BUCKETS
    assert all(math.gcd(k, 512) == 1 for k in buckets([10**6], [512]))


@pytest.mark.parametrize(
    ("memory", "kind"),
    [("2.1MB", "snapshots"), ("1MB", "sketch"), ("300kB", "moments"), ("100kB", None)],
)
def test_the_shapes_decide_what_fits(memory, kind):
    model, window = network(100, 100, 28), WeightWindow(40, memory=memory)
    for step in range(40):
        window.see(model, step)
    assert window.kind == kind
    if kind is None:
        assert "name fewer parameters, or raise memory" in window.reason
    else:
        assert window.reason is None
        assert window.is_full


def test_what_is_asked_for_is_kept_or_refused():
    window = WeightWindow(8, keep="snapshots", memory="1kB")
    window.see(network(10, 10), 0)
    assert "a window of snapshots of 110 numbers takes 3.52e+03 bytes" in window.reason
    assert window.kind is None


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("*", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("1.*", ["1.weight", "1.bias"]),
        (["0.bias", "*.weight"], ["0.weight", "0.bias", "1.weight"]),
    ],
)
def test_parameters_by_name_and_pattern(parameters, names):
    window = WeightWindow(4, parameters=parameters)
    window.see(network(2, 3, 2), 0)
    assert window.names == names


def test_no_parameter_matches():
    window = WeightWindow(4, parameters="encoder.*")
    window.see(network(2, 3), 0)
    assert "no parameter that requires a gradient matches ['encoder.*']" in window.reason
    assert "0.weight" in window.reason


def test_a_stride_skips_and_a_gap_begins_anew():
    model, window = network(2, 3), WeightWindow(4, stride=5)
    for step in range(31):
        window.see(model, step)
    assert list(window.steps) == [15, 20, 25, 30]
    window.see(model, 30)  # seen already
    assert window.count == 4
    window.see(model, 40)
    assert (window.count, window.gap) == (1, 10)
    window.see(model, 45)
    window.see(model, 20)  # another run
    assert (window.count, window.gap) == (1, 0)


@pytest.mark.parametrize("change", ["shape", "frozen", "more", "type"])
def test_parameters_that_change_begin_it_anew(change):
    model, window = network(2, 3, 2), WeightWindow(4)
    for step in range(4):
        window.see(model, step)
    if change == "shape":
        model[0].weight = nn.Parameter(torch.randn(3, 4))
    elif change == "frozen":
        model[0].weight.requires_grad_(False)
    elif change == "more":
        model.append(nn.Linear(2, 2))
    else:
        model.double()
    window.see(model, 4)
    assert window.count == 1
    window.see(model, 5)
    assert window.count == 2
    assert window.size == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_half_precision_complex_numbers_and_tied_weights():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.Parameter(torch.randn(3).bfloat16())
            self.pairs = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
            self.again = self.low
            self.scalar = nn.Parameter(torch.randn(()))

    for keep in ("snapshots", "sketch", "moments"):
        model, window = Odd(), WeightWindow(4, keep=keep)
        stored = []
        for step in range(4):
            with torch.no_grad():
                model.low += 1
                model.pairs *= 1j
            window.see(model, step)
            stored.append(flat(model))
        assert window.reason is None
        assert window.sizes == {"low": 3, "pairs": 8, "scalar": 1}
        stored = torch.stack(stored)
        if keep == "snapshots":
            assert torch.equal(torch.cat([window.rows(n) for n in window.names], 1), stored)
        expected = stored.double().var(0, correction=0).sum()
        torch.testing.assert_close(sum(window.variations().values()), expected)


def test_it_raises_nothing_of_what_a_training_may_do():
    class Broken(nn.Module):
        def named_parameters(self, *args, **options):
            raise RuntimeError("gone")

    window = WeightWindow(4)
    window.see(network(2, 2), 0)
    window.see(Broken(), 1)
    assert window.reason == "RuntimeError: gone"
    assert window.count == 0
    lazy = nn.Sequential(nn.LazyLinear(2))
    window.see(lazy, 2)
    assert "no parameter" in window.reason
    lazy(torch.randn(1, 3))
    window.see(lazy, 3)
    assert (window.reason, window.count) == (None, 1)


def test_weights_that_are_spread_are_refused(monkeypatch):
    monkeypatch.setattr("nettrace.window.is_spread", lambda p: True)
    window = WeightWindow(4)
    window.see(network(2, 2), 0)
    assert "'0.weight' is spread over processes" in window.reason


def test_learning_rate_momentum_and_samples_are_noted():
    model, window = network(2, 3, 1), WeightWindow(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=1e-3)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        window.see(model, step, [optimizer], 32.0 * step)
    np.testing.assert_allclose(window.learning_rates, 0.5 / np.arange(3, 7))
    np.testing.assert_allclose(window.momenta, 0.9)
    np.testing.assert_allclose(window.samples, 32 * np.arange(2, 6))
    assert window.rule["optimizer"] == "SGD"
    assert window.rule["weight_decay"] == 1e-3
    # As a checkpoint does, which replaces the groups.
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 7.0
    window.see(model, 6, [optimizer])
    assert window.learning_rates[-1] == 7.0
    assert math.isnan(window.samples[-1])


def test_learning_rates_of_several_groups_and_optimizers():
    model = network(2, 3, 1)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.3), betas=(0.8, 0.9))
    for parameters, rate in (("*", math.nan), ("0.*", 0.3), ("1.*", 0.1)):
        window = WeightWindow(4, parameters=parameters)
        for step in range(4):
            window.see(model, step, [optimizer])
        np.testing.assert_allclose(window.learning_rates, rate, rtol=1e-6)
        np.testing.assert_allclose(window.momenta, 0.8)
    window = WeightWindow(4)
    window.see(model, 0)
    assert math.isnan(window.learning_rates[0])
    assert window.rule == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 3}, "at least 4 snapshots, got length=3"),
        ({"stride": 0}, "at least 1 update"),
        ({"keep": "all"}, "keep to be one of"),
        ({"memory": "much"}, "much"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        WeightWindow(**options)


def test_the_network_is_only_read():
    model, window = network(2, 3, 2), WeightWindow(4)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    for keep in ("snapshots", "sketch", "moments"):
        window = WeightWindow(4, keep=keep)
        for step in range(6):
            window.see(model, step)
    for name, p in model.named_parameters():
        pointer, value = before[name]
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)
        assert p.grad is None
    assert torch.equal(torch.get_rng_state(), state)
