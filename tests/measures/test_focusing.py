"""Focusing against closed forms, formulas written out in NumPy, and enumeration of paths."""

from __future__ import annotations

import copy
import itertools
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import ZOO, build, losses

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.landscape.nodes import Nodes
from nettrace.measures import focusing, resolve
from nettrace.statistics import Inapplicable, Statistics


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def nodes_of(model: nn.Module, x, **options) -> Nodes:
    with frozen(model):
        return Nodes(model, nt.Probe(x, **options), 0)


def found(model: nn.Module, x, **options) -> dict[str, np.ndarray]:
    """(2, n) strengths by layer."""
    return {name: s.numpy() for name, s in nodes_of(model, x, **options).strengths().items()}


def measured(model: nn.Module, x, *names: str, **options):
    tracer = nt.Tracer(nt.Probe(x, **options), names, on_error="raise", max_seconds=None)
    return {r.name: r for r in tracer(model, step=0) if not r.name.startswith("nettrace/")}


def squares(*weights: Tensor) -> list[np.ndarray]:
    return [w.detach().abs().double().numpy() ** 2 for w in weights]


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.dim() > 1]


def plain(strengths: np.ndarray) -> tuple[float, float, float]:
    """Focusing, inverse participation ratio and entropy, from the definitions."""
    pi = strengths[0] * strengths[1]
    p = pi / pi.sum()
    ratio = pi.sum() ** 2 / (pi**2).sum()
    return 1 - ratio / len(pi), (p**2).sum(), -(p[p > 0] * np.log(p[p > 0])).sum()


# Which weights write, and which read --------------------------------------------------------------


def test_dense_networks():
    model, x = mlp(5, 7, 6, 3), normal(4, 5)
    w1, w2, w3 = squares(*weights(model))
    strengths = found(model, x)
    assert list(strengths) == ["0.weight[0]", "2.weight[0]"]
    np.testing.assert_allclose(strengths["0.weight[0]"], [w1.sum(1), w2.sum(0)], rtol=1e-13)
    np.testing.assert_allclose(strengths["2.weight[0]"], [w2.sum(1), w3.sum(0)], rtol=1e-13)
    records = measured(model, x, "focus", "focus/strengths")
    expected = np.array([plain(s) for s in strengths.values()])
    names = ["focusing", "inverse_participation", "entropy"]
    for name, values in zip(names, expected.T, strict=True):
        record = records[f"focus/{name}"]
        np.testing.assert_allclose(record.value, values, rtol=1e-12)
        assert record.coordinates == {"nodes": list(strengths)}
    assert "focus/alternation" not in records  # of two layers
    rows = records["focus/strengths"]
    assert rows.value.shape == (2, 2, 7)
    np.testing.assert_allclose(rows.value[:, 0], strengths["0.weight[0]"])
    np.testing.assert_allclose(rows.value[:, 1, :6], strengths["2.weight[0]"])
    assert np.isnan(rows.value[:, 1, 6]).all()
    assert rows.coordinates["direction"] == ["in", "out"]


class InputsFirst(nn.Module):
    """x @ W, and the last as W x."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(normal(5, 7))
        self.second = nn.Parameter(normal(7, 6))
        self.third = nn.Parameter(normal(3, 6))
        self.vector = nn.Parameter(normal(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.tanh(x @ self.first) @ self.second)
        return torch.tanh(self.third @ x.mT).mT @ self.vector


def test_it_does_not_matter_how_weights_are_kept():
    model = InputsFirst()
    w1, w2, w3, v = squares(*model.parameters())
    strengths = found(model, normal(4, 5))
    assert list(strengths) == ["first[1]", "second[1]", "third[0]"]
    np.testing.assert_allclose(strengths["first[1]"], [w1.sum(0), w2.sum(1)])
    np.testing.assert_allclose(strengths["second[1]"], [w2.sum(0), w3.sum(0)])
    np.testing.assert_allclose(strengths["third[0]"], [w3.sum(1), v])


def test_convolutions_have_channels():
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(5 * 25, 3)),
    ).double()
    w1, w2, w3 = squares(model[0].weight, model[3].weight, model[6].weight)
    w1 /= 1 + model[1].eps
    strengths = found(model, normal(4, 2, 6, 6))
    assert list(strengths) == ["0.weight[0]", "3.weight[1]"]
    np.testing.assert_allclose(strengths["0.weight[0]"], [w1.sum((1, 2, 3)), w2.sum((1, 2, 3))])
    last = w3.reshape(3, 5, 25).sum((0, 2))
    np.testing.assert_allclose(strengths["3.weight[1]"], [w2.sum((0, 2, 3)), last])


def test_convolutions_in_groups_have_groups_and_channels_within_them():
    model = nn.Sequential(nn.Conv1d(3, 6, 2), nn.ReLU(), nn.Conv1d(6, 8, 2, groups=2), nn.ReLU())
    model = nn.Sequential(model, nn.Conv1d(8, 3, 1)).double()
    w1, w2, w3 = squares(*weights(model))
    strengths = found(model, normal(4, 3, 5))
    group = [w1.reshape(2, 3, -1), w2.reshape(2, 4, -1), w3.sum((0, 2)).reshape(2, 4)]
    assert [s.shape[1] for s in strengths.values()] == [2, 3, 4]
    groups, first, second = strengths.values()
    writes, reads = group[0].sum((1, 2)) + group[1].sum((1, 2)), group[1].sum((1, 2))
    np.testing.assert_allclose(groups, [writes, reads + group[2].sum(1)])
    np.testing.assert_allclose(first, [group[0].sum((0, 2)), w2.sum((0, 2))])
    np.testing.assert_allclose(second, [group[1].sum((0, 2)), group[2].sum(0)])


def test_a_depthwise_convolution_reads_and_writes_its_channels():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=4), nn.ReLU())
    model = nn.Sequential(model, nn.Conv1d(4, 2, 1)).double()
    w1, w2, w3 = squares(*weights(model))
    (only,) = found(model, normal(4, 3, 5)).values()
    along = w2.sum((1, 2))
    np.testing.assert_allclose(only, [w1.sum((1, 2)) + along, along + w3.sum((0, 2))])


class Attention(nn.Module):
    """Two heads of three features; fused or not."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.into = nn.Linear(4, 6)
        self.fused = nn.MultiheadAttention(6, 2, batch_first=True) if fused else None
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        if self.fused is not None:
            y = self.fused(x, x, x, need_weights=False)[0]
        else:
            q, k, v = (m(x).unflatten(-1, (2, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
            y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + y).mean(1)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_has_heads_and_features_within_heads(fused):
    model = Attention(fused).double()
    strengths = found(model, normal(4, 5, 4))
    if fused:
        parts = model.fused.in_proj_weight.detach().chunk(3)
        out = model.fused.out_proj.weight
    else:
        parts, out = [m.weight for m in (model.q, model.k, model.v)], model.o.weight
    q, k, v = (w.reshape(2, 3, 6) for w in squares(*parts))
    (o,) = squares(out)
    into, head = squares(model.into.weight, model.head.weight)
    read = (o.sum(0)).reshape(2, 3)
    both = (q + k + v).sum((1, 2)), read.sum(1)
    within = (q + k + v if fused else v).sum((0, 2)), read.sum(0)
    stream = into.sum(1) + o.sum(1), (q + k + v).sum((0, 1)) + head.sum(0)
    given = dict(zip(("stream", "heads", "within"), strengths.values(), strict=True))
    for name, expected in (("stream", stream), ("heads", both), ("within", within)):
        np.testing.assert_allclose(given[name], expected, err_msg=name)


class Residual(nn.Module):
    """A stream with two blocks."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.up = nn.ModuleList(nn.Linear(4, 5, bias=False) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(5, 4, bias=False) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)


def test_a_residual_stream_is_one_layer():
    model = Residual().double()
    into, head = squares(model.into.weight, model.head.weight)
    up, down = (squares(*(m.weight for m in several)) for several in (model.up, model.down))
    strengths = found(model, normal(4, 3))
    assert list(strengths) == ["into.weight[0]", "up.0.weight[0]", "up.1.weight[0]"]
    writes = into.sum(1) + down[0].sum(1) + down[1].sum(1)
    reads = up[0].sum(0) + up[1].sum(0) + head.sum(0)
    np.testing.assert_allclose(strengths["into.weight[0]"], [writes, reads])
    np.testing.assert_allclose(strengths["up.1.weight[0]"], [up[1].sum(1), down[1].sum(0)])


class Tied(nn.Module):
    """Tokens in, logits of tokens out, by one weight, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.place = nn.Parameter(torch.randn(5, 4))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.place
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.out(x)[:, -1]


def test_tied_weights_count_once_in_each_role():
    model = Tied().double()
    words, up, down = squares(model.words.weight, model.up.weight, model.down.weight)
    stream, hidden = found(model, torch.randint(9, (4, 5))).values()
    np.testing.assert_allclose(stream, [words.sum(0) + down.sum(1), words.sum(0) + up.sum(0)])
    np.testing.assert_allclose(hidden, [up.sum(1), down.sum(0)])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


def test_recurrent_weights_count_once_however_long_the_sequence():
    model = Recurrent().double()
    into, along, head = squares(*weights(model))
    (hidden,) = found(model, normal(4, 6, 3)).values()
    expected = [into.sum(1) + along.sum(1), along.sum(0) + head.sum(0)]
    np.testing.assert_allclose(hidden, expected)


def test_weights_count_as_they_are_when_they_are_used():
    """Weight normalisation, a low-rank product, and one in half precision."""
    torch.manual_seed(1)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)), nn.ReLU(), nn.Linear(5, 2))
    model = model.double()
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    w1, w2 = squares(model[0].weight, model[2].weight)
    (hidden,) = found(model, normal(4, 3)).values()
    np.testing.assert_allclose(hidden, [w1.sum(1), w2.sum(0)])
    half = mlp(3, 5, 2).half()
    w1, w2 = squares(*weights(half))
    (hidden,) = found(half, torch.randn(4, 3).half()).values()
    np.testing.assert_allclose(hidden, [w1.sum(1), w2.sum(0)])


class PerHead(nn.Module):
    """A weight for each of two experts, broadcast along the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(normal(2, 3, 5)), nn.Parameter(normal(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, None] @ self.first
        return (x.relu() @ self.second).sum((1, 2))


def test_weights_that_are_copied_for_each_sample_count_once():
    model = PerHead()
    w1, w2 = squares(*model.parameters())
    strengths = found(model, normal(6, 3))
    experts, hidden = (strengths[n] for n in ("first[0]", "first[2]"))
    np.testing.assert_allclose(hidden, [w1.sum((0, 1)), w2.sum((0, 2))])
    both = w1.sum((1, 2)) + w2.sum((1, 2))
    np.testing.assert_allclose(experts, [both, both])


def test_complex_weights_count_by_their_magnitudes():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 5, dtype=torch.complex128))
            self.second = nn.Parameter(torch.randn(5, 2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return ((x.cdouble() @ self.first) @ self.second).abs()

    model = Complex()
    w1, w2 = squares(*model.parameters())
    (hidden,) = found(model, normal(4, 3)).values()
    np.testing.assert_allclose(hidden, [w1.sum(0), w2.sum(1)])


# Known values -------------------------------------------------------------------------------------


def filled(widths: list[int], focused: set[int], small: float = 0.0) -> nn.Sequential:
    """All weights are one; of focused layers, those of all nodes but one are small."""
    model = mlp(*widths, bias=False)
    with torch.no_grad():
        for number, w in enumerate(p for p in model.parameters()):
            w.fill_(1.0)
            if number + 1 in focused:
                w[1:] = small
    return model


def test_uniform_layers_have_no_focus_and_one_node_all():
    x = normal(4, 3)
    records = measured(filled([3, 6, 5, 4, 2], {2}), x, "focus", "focus/path_focusing")
    for name in ("focus/focusing", "focus/path_focusing"):
        np.testing.assert_allclose(records[name].value, [0, 1 - 1 / 5, 0], atol=1e-15)
    ratios = records["focus/inverse_participation"].value
    np.testing.assert_allclose(1 / ratios, [6, 1, 4])
    entropies = records["focus/entropy"].value
    np.testing.assert_allclose(entropies, [math.log(6), 0, math.log(4)], atol=1e-14)


@pytest.mark.parametrize("depth", [8, 12])
def test_alternating_layers(depth):
    torch.manual_seed(0)
    model = filled([6] * (depth + 2), set(range(2, depth + 1, 2)), small=0.3)
    names = ("focus", "focus/alternation_p_weights")
    records = {k: r.value for k, r in measured(model, normal(4, 6), *names).items()}
    phi = records["focus/focusing"]
    assert (np.diff(phi)[::2] > 0).all()
    assert (np.diff(phi)[1::2] < 0).all()
    assert records["focus/alternation"] == pytest.approx(-1, abs=1.5 / depth)
    # Of all orders of two values, two alternate.
    p = 2 * math.factorial(depth // 2) ** 2 / math.factorial(depth)
    error = 0 if depth <= 8 else (p / focusing.ORDERS) ** 0.5
    assert records["focus/alternation_p_layers"] == pytest.approx(p, rel=1e-12, abs=5 * error)
    assert records["focus/alternation_p_weights"] < 0.01


def of_values(phi: list[float], n: int = 50) -> dict[str, Tensor]:
    """Strengths of layers of given focusing: one node apart from all others."""
    found = {}
    for number, value in enumerate(phi):
        # 1 - (a + n - 1)^2 / (n (a^2 + n - 1)) = value, solved for a >= 1.
        c = n * (1 - value)
        roots = np.roots([1 - c, 2 * (n - 1), (n - 1) ** 2 - c * (n - 1)])
        q = np.ones(n)
        q[0] = max(roots.real)
        found[str(number)] = torch.tensor(np.stack([q, np.ones(n)]))
    return found


def autocorrelation(phi: np.ndarray) -> float:
    at = np.arange(len(phi))
    d = phi - np.polyval(np.polyfit(at, phi, 1), at)
    return float((d[1:] * d[:-1]).sum() / (d**2).sum())


@pytest.mark.parametrize("count", [4, 5, 7])
def test_alternation_and_its_significance_are_those_of_all_orders(count):
    phi = np.random.default_rng(count).uniform(0.1, 0.6, count)
    strengths = of_values(list(phi))
    np.testing.assert_allclose(focusing._phi(strengths), phi, rtol=1e-9)
    given = autocorrelation(phi)
    assert float(focusing.alternation(strengths).value) == pytest.approx(given, rel=1e-6)
    null = [autocorrelation(phi[list(o)]) for o in itertools.permutations(range(count))]
    found = focusing.alternation_p_layers(strengths)
    expected = np.mean([r <= given + 1e-9 for r in null])
    assert float(found.value) == pytest.approx(expected, rel=1e-12)
    assert found.attributes["null_mean"] == pytest.approx(np.mean(null), abs=1e-9)
    assert found.attributes["null_deviation"] == pytest.approx(np.std(null), rel=1e-6)
    assert found.attributes["draws"] == math.factorial(count)


def test_random_orders_are_those_of_all_orders_but_for_noise(monkeypatch):
    phi = np.random.default_rng(3).uniform(0.1, 0.6, 8)
    strengths = of_values(list(phi))
    exact = focusing.alternation_p_layers(strengths)
    monkeypatch.setattr(focusing, "MOST_ENUMERATED", 7)
    drawn = focusing.alternation_p_layers(strengths)
    assert drawn.attributes["draws"] == focusing.ORDERS
    p = float(exact.value)
    error = (p * (1 - p) / focusing.ORDERS) ** 0.5
    assert float(drawn.value) == pytest.approx(p, abs=5 * error)
    assert drawn.attributes["null_mean"] == pytest.approx(exact.attributes["null_mean"], abs=0.02)
    assert float(focusing.alternation_p_layers(strengths).value) == float(drawn.value)


def test_chance_makes_p_values_uniform_over_layers():
    rng = np.random.default_rng(0)
    values = [
        float(focusing.alternation_p_layers(of_values(list(rng.uniform(0.1, 0.6, 7)))).value)
        for _ in range(150)
    ]
    assert kstest(values, "uniform").pvalue > 0.01


def test_chance_makes_p_values_uniform_over_weights(monkeypatch):
    """Weights that are independent and alike are exchangeable."""
    monkeypatch.setattr(Statistics, "shuffles", 49)
    values = []
    for seed in range(60):
        torch.manual_seed(seed)
        model = mlp(6, *[6] * 5, 6)
        with frozen(model):
            look = Statistics(model, nt.Probe(normal(2, 6)), seed=seed)
            found = focusing.alternation_p_weights(look.node_strengths, look.shuffled_strengths)
        values.append(float(found.value))
        assert found.attributes["draws"] == 49
    assert min(values) >= 0.02
    assert kstest(values, "uniform").pvalue > 0.01


def test_strengths_of_random_weights_have_the_participation_ratio_of_chi_squares():
    """E PR(s_in) / n is about d / (d + 2) for d weights each, N(0, s^2), and many nodes."""
    for d in (3, 10):
        model = nn.Sequential(nn.Linear(d, 4000), nn.ReLU(), nn.Linear(4000, 2)).double()
        nn.init.normal_(model[0].weight, std=0.3)
        ((given, _),) = found(model, normal(2, d)).values()
        ratio = given.sum() ** 2 / (given**2).sum() / 4000
        spread = (given**2).std() / (given**2).mean() / 4000**0.5
        assert ratio == pytest.approx(d / (d + 2), abs=5 * spread)


class Chunks(nn.Module):
    """A weight used in two roles, and two parts of another."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.parts = nn.Parameter(normal(5, 7)), nn.Parameter(normal(8, 7))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.tied).relu()
        one, other = self.parts.chunk(2)
        gate = F.linear(hidden, other).sigmoid()
        return self.head(F.linear(hidden, one) * gate).sum(1) + (hidden @ self.tied.T).sum(1)


def test_parameters_are_shuffled_once_for_all_that_is_made_of_them():
    model = Chunks().double()
    nodes = nodes_of(model, normal(4, 5))
    tied, parts, head = squares(model.tied, model.parts, model.head.weight)
    wide, narrow = nodes.strengths().values()
    np.testing.assert_allclose(wide, [tied.sum(0), tied.sum(0) + parts.sum(0)])
    np.testing.assert_allclose(narrow, [parts.reshape(2, 4, 7).sum((0, 2)), head.sum(0)])
    draws = torch.Generator().manual_seed(0)
    found = [list(nodes.shuffled(draws).values()) for _ in range(3)]
    for shuffled, thin in found:
        assert not np.allclose(shuffled[0], wide[0])
        columns = shuffled[1] - shuffled[0]  # of the parts alone: the tied weight cancels
        assert float(columns.sum()) == pytest.approx(parts.sum())
        assert float(thin[0].sum()) == pytest.approx(parts.sum())
        assert float(shuffled[0].sum()) == pytest.approx(tied.sum())
        assert (columns > 0).all()
    assert not torch.equal(found[0][0], found[1][0])


# Invariances --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.integers(2, 7), min_size=3, max_size=5), st.data())
def test_permuting_nodes_permutes_strengths_and_rescaling_leaves_those_of_paths(seed, widths, data):
    torch.manual_seed(seed)
    model, x = mlp(*widths), normal(2, widths[0])
    own, loads = nodes_of(model, x).strengths(), nodes_of(model, x).loads()
    twin, orders = copy.deepcopy(model), [torch.randperm(n) for n in widths[1:-1]]
    for number, order in enumerate(orders):
        before, behind = twin[2 * number], twin[2 * number + 2]
        before.weight.data, before.bias.data = before.weight[order], before.bias[order]
        behind.weight.data = behind.weight[:, order]
    moved = nodes_of(twin, x)
    for (name, strengths), order in zip(moved.strengths().items(), orders, strict=True):
        torch.testing.assert_close(strengths, own[name][:, order])
        torch.testing.assert_close(moved.loads()[name], loads[name][order])
    torch.testing.assert_close(focusing._phi(moved.strengths()), focusing._phi(own))

    number = data.draw(st.integers(0, len(widths) - 3))
    factor = 2 + torch.rand(widths[number + 1]).double()
    scaled = copy.deepcopy(model)
    scaled[2 * number].weight.data *= factor[:, None]
    scaled[2 * number].bias.data *= factor
    scaled[2 * number + 2].weight.data /= factor
    torch.testing.assert_close(scaled(x), model(x))
    found, name = nodes_of(scaled, x), list(own)[number]
    strengths = found.strengths()[name]
    torch.testing.assert_close(strengths.prod(0), own[name].prod(0))
    torch.testing.assert_close(strengths[0], own[name][0] * factor**2)
    for each, load in found.loads().items():
        torch.testing.assert_close(load, loads[each])


# Paths --------------------------------------------------------------------------------------------


def test_paths_of_ones_are_counted_by_widths():
    loads = nodes_of(filled([3, 6, 5, 4, 2], set()), normal(4, 3)).loads()
    for n, load in zip([6, 5, 4], loads.values(), strict=True):
        assert load.tolist() == [3 * 6 * 5 * 4 * 2 / n] * n


def test_loads_of_a_chain_are_products_of_magnitudes():
    model = mlp(3, 6, 5, 4, 2)
    magnitudes = [w.abs().numpy() for w in weights(model)]
    loads = list(nodes_of(model, normal(4, 3)).loads().values())
    for number, load in enumerate(loads):
        ahead, behind = np.ones(3), np.ones(2)
        for w in magnitudes[: number + 1]:
            ahead = w @ ahead
        for w in magnitudes[:number:-1]:
            behind = behind @ w
        np.testing.assert_allclose(load, ahead * behind)
    value = measured(model, normal(4, 3), "focus/path_focusing")["focus/path_focusing"].value
    expected = [1 - float(q.sum() ** 2 / (q**2).sum()) / len(q) for q in loads]
    np.testing.assert_allclose(value, expected)


def test_loads_of_a_residual_network_are_those_of_all_paths():
    """Each path written out: at each block it stays on its node or goes through the block."""
    model = Residual().double()
    into, head = (m.weight.detach().abs().numpy() for m in (model.into, model.head))
    up, down = ([m.weight.detach().abs().numpy() for m in s] for s in (model.up, model.down))
    loads = {"stream": np.zeros(4), "0": np.zeros(5), "1": np.zeros(5)}
    for x, start, out in itertools.product(range(3), range(4), range(2)):
        paths = [(into[start, x], [("stream", start)], start)]
        for block in range(2):
            longer = []
            for weight, seen, at in paths:
                for hidden, to in itertools.product(range(5), range(4)):
                    factor = up[block][hidden, at] * down[block][to, hidden]
                    entered = [*seen, (str(block), hidden), ("stream", to)]
                    longer.append((weight * factor, entered, to))
            paths += longer
        for weight, seen, at in paths:
            for layer, node in seen:
                loads[layer][node] += weight * head[out, at]
    given = nodes_of(model, normal(4, 3)).loads().values()
    for expected, load in zip(loads.values(), given, strict=True):
        np.testing.assert_allclose(load, expected)


def test_loads_of_a_convolution_sum_over_places():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    w1, w2 = (p.detach().abs().numpy() for p in (model[0].weight, model[3].weight))
    (load,) = nodes_of(model, normal(4, 2, 5)).loads().values()
    np.testing.assert_allclose(load, w1.sum((1, 2)) * w2.sum(0).reshape(3, 4).sum(1))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(x).chunk(2, 1)
        return self.head(one * other.sigmoid())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Concatenated, "head.weight reads activations that were joined side by side"),
        (Halved, "what a.weight gives does not reach head.weight node by node"),
        (lambda: Attention(True), "what fused.in_proj_weight gives does not reach"),
    ],
)
def test_paths_that_are_not_followed_are_refused_with_the_reason(kind, says):
    model = kind().double()
    x = normal(4, 5, 4) if isinstance(model, Attention) else normal(4, 3)
    with pytest.raises(ValueError, match=says):
        measured(model, x, "focus/path_focusing")
    assert np.isfinite(measured(model, x, "focus/focusing")["focus/focusing"].value).all()


# What is not ordinary -----------------------------------------------------------------------------


def test_dead_networks_have_values():
    model, x = mlp(3, *[4] * 5, 2), normal(4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    names = ("focus", "focus/path_focusing", "focus/strengths", "focus/alternation_p_weights")
    records = measured(model, x, *names)
    assert (records["focus/focusing"].value == 0).all()
    assert records["focus/focusing"].attributes["all_zero"].count("weight") == 5
    np.testing.assert_allclose(records["focus/inverse_participation"].value, 1 / 4)
    np.testing.assert_allclose(records["focus/entropy"].value, math.log(4))
    assert (records["focus/path_focusing"].value == 0).all()
    assert (records["focus/strengths"].value == 0).all()
    assert records["focus/alternation"].value == 0
    assert records["focus/alternation_p_layers"].value == 1
    assert records["focus/alternation_p_weights"].value == 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_large_weights_give_what_others_do(size):
    model, x = mlp(3, *[4] * 4, 2, bias=False), normal(4, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(size)
    a, b = (measured(m, x, "focus", "focus/path_focusing") for m in (model, twin))
    for name in a:
        np.testing.assert_allclose(a[name].value, b[name].value, rtol=1e-9)


def test_weights_that_are_not_finite_are_refused():
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights of 0\.weight are not finite"):
        measured(model, normal(4, 3), "focus")


def test_networks_without_hidden_units_are_refused_and_few_layers_left_out():
    with pytest.raises(ValueError, match="no layer of two or more hidden units was found, for"):
        measured(nn.Linear(3, 2).double(), normal(4, 3), "focus")
    names = measured(mlp(3, 4, 4, 4, 2), normal(4, 3), "focus")
    assert sorted(names) == ["focus/entropy", "focus/focusing", "focus/inverse_participation"]
    with pytest.raises(ValueError, match="hidden units was found, for operation _trilinear"):
        measured(nn.Sequential(Bilinear(), nn.Linear(4, 2)).double(), normal(4, 3), "focus")


class Bilinear(nn.Bilinear):
    def __init__(self) -> None:
        super().__init__(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x)


def test_products_by_hand_are_doubtful():
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Parameter(normal(4, 5))
            self.third = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.third((self.first(x)[:, :, None] * self.second).sum(1))

    model = ByHand().double()
    with frozen(model):
        look = Statistics(model, nt.Probe(normal(4, 3)))
        with pytest.raises(ValueError, match=r"no weight reads these nodes: second\[0\]"):
            _ = look.node_strengths
    model.more = nn.Linear(2, 4).double()
    model.forward = lambda x: model.more(ByHand.forward(model, x)).tanh()  # type: ignore
    nodes = nodes_of(model, normal(4, 3))
    assert nodes.uncounted == ["second"]
    assert nodes.left_out == {
        "second[0]": "no weight reads these nodes",
        "second[1]": "no weight writes to these nodes",
    }
    wide = nn.Sequential(mlp(3, 4, 3), model).double()
    with frozen(wide):
        look = Statistics(wide, nt.Probe(normal(4, 3)))
        value = focusing.focusing(look.node_strengths, look.nodes)
    assert "1.second number by number" in str(value.attributes["warning"])


def test_groups_are_tried_once_a_structure(monkeypatch):
    tried = []
    from nettrace.landscape import nodes

    symmetries = nodes.Symmetries
    monkeypatch.setattr(nodes, "Symmetries", lambda *a: tried.append(1) or symmetries(*a))
    model, x = mlp(3, 4, 5, 2), normal(4, 3)
    before = found(model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = found(model, x)
    assert tried == [1]
    np.testing.assert_allclose(after["0.weight[0]"][0], 4 * before["0.weight[0]"][0])
    first, last = model[0], model[4]
    model.forward = lambda x: last(torch.cat([x, first(x)[:, :2]], 1).relu())
    with pytest.raises(AssertionError):  # the order of all is fixed now
        assert found(model, x) == before
    assert len(tried) == 2


def test_what_is_trained_is_left_as_it_was():
    model = nn.Sequential(
        *(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 4)),
        *(nn.ReLU(), nn.Linear(4, 2)),
    )
    model[0].requires_grad_(False)
    model(torch.randn(4, 3)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    stream = torch.get_rng_state()
    names = ("focus", "focus/path_focusing", "focus/strengths")
    records = measured(model, torch.randn(4, 3, generator=torch.Generator()), *names)
    assert len(records["focus/focusing"].value) == 2  # the frozen layer counts too
    assert torch.equal(stream, torch.get_rng_state())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad, gradient)


def test_inputs_may_be_a_mapping_and_the_network_compiled():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3, 5, 2)

        def forward(self, values: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(values) * scale}

    x, scale = normal(4, 3), normal(4, 1)
    model = Named()
    (own,) = found(model, {"values": x, "scale": scale}).values()
    w1, w2 = squares(*weights(model))
    np.testing.assert_allclose(own, [w1.sum(1), w2.sum(0)])
    compiled = nn.Sequential(torch.compile(model.net, backend="eager"))
    ((name, own),) = found(compiled, x).items()
    assert name == "0.0.weight[0]"
    np.testing.assert_allclose(own, [w1.sum(1), w2.sum(0)])


SLOW = {"compiled-inductor", "compiled-aot-eager"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ZOO]
)
@pytest.mark.filterwarnings("ignore")
def test_any_network_has_values_or_a_reason(name):
    member = build(name)
    options = {"forward": member.forward, "losses": lambda outputs, _: losses(outputs)}
    with frozen(member.model):
        look, reasons = Statistics(member.model, nt.Probe(member.batch, **options)), []
        for measure in resolve(["focus", "focus/path_focusing", "focus/alternation_p_weights"]):
            with suppress(Inapplicable):
                try:
                    value = measure(look)
                except ValueError as error:
                    reasons.append(str(error))
                    continue
                assert bool(value.value.isfinite().all())
                assert (value.value >= -1).all()
    refused = ("no layer of two or more hidden units", "paths")
    assert all(any(said in text for said in refused) for text in reasons)
