import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from zoo import HOUSE, build, losses

import nettrace as nt
from nettrace.landscape import barrier, followed, match
from nettrace.landscape.axes import Factor, axis, factors, join, leaves, reshape
from nettrace.landscape.symmetries import Symmetries

FOUND = {
    "mlp": [7, 6],
    "cnn": [2, 4, 4],  # groups, and channels within groups before and behind
    "resnet": [4, 6, 4, 6],  # two streams of residuals, and the inside of each branch
    "gpt": [16, 2, 8, 64, 2, 8, 64],  # features, then heads, within heads, hidden
    "vit": [16, 2, 8, 64],
    "convolutions": [2, 2, 3, 3],
    "recurrent": [5],
    "attention": [3, 2, 4],  # queries, heads, and within heads
    "low-rank": [2, 6, 5],
    "u-net": [3],
    "paddings": [4, 2, 3],
    "llama": [8, 2, 6, 2, 6],  # grouped queries, whose pairs of features turn with the position
    "lstm": [4],
    "router": [4],  # units of all experts alike
    "pinn": [6, 6],  # differentiates in its forward pass
}


def probe_of(member) -> nt.Probe:
    return nt.Probe(member.batch, forward=member.forward, losses=lambda outputs, _: losses(outputs))


def shuffled(model: nn.Module, probe: nt.Probe, seed: int = 3) -> nn.Module:
    """A copy with all units permuted that may be."""
    with nt.freeze.frozen(model):
        known = Symmetries(model, probe, 0)
    torch.manual_seed(seed)
    orders = {g.name: torch.randperm(g.size) for g in known.groups}
    twin = copy.deepcopy(model)
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    moved = known.permuted({n: t.detach().clone() for n, t in state.items()}, orders)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(moved[name])
    return twin


@pytest.mark.parametrize("name", FOUND)
def test_units_that_may_be_permuted_are_found(name):
    member = build(name)
    with nt.freeze.frozen(member.model):
        known = Symmetries(member.model, probe_of(member), 0)
    assert sorted(g.size for g in known.groups) == sorted(FOUND[name])
    before = member.forward(member.model.eval(), member.batch)
    for seed in range(3):
        twin = shuffled(member.model, probe_of(member), seed).eval()
        torch.testing.assert_close(member.forward(twin, member.batch), before)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", [*HOUSE, "recurrent", "attention", "u-net"])
def test_a_permuted_copy_is_matched_and_has_no_barrier(name, by):
    member = build(name)
    probe = probe_of(member)
    other = shuffled(member.model, probe)
    found = match(member.model, probe, other, by=by)
    assert found.distance[0] > 0.1
    assert found.distance[1] == 0
    assert found.dropped == {}
    for key, value in member.model.state_dict().items():
        assert torch.equal(found.state[key], value), key
    after = barrier(member.model, probe, other, matched=by, points=5)
    assert float(after["barrier"]) == 0
    assert after.attrs["distance"] == 0
    assert f"match w0 by {by}" in after.attrs["convention"]


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", HOUSE)
def test_a_matched_network_computes_what_it_did(name, by):
    member, other = build(name), build(name, seed=1)
    found = match(member.model, probe_of(member), other.model, by=by)
    if by == "weights":
        assert found.distance[1] < found.distance[0]
    twin = copy.deepcopy(member.model)
    twin.load_state_dict(found.state)
    torch.testing.assert_close(
        member.forward(twin.eval(), member.batch),
        member.forward(other.model.eval(), member.batch),
    )
    assert any(not torch.equal(p, torch.arange(len(p))) for p in found.permutations.values())
    assert found.axes.keys() == found.permutations.keys()


def mlp(seed: int, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def permuted(model: nn.Sequential, orders: list[Tensor]) -> list[Tensor]:
    """Weights of an MLP with its hidden units in other orders, written out."""
    found, before = [], torch.arange(model[0].in_features)
    for layer, order in zip(model[::2], [*orders, None], strict=True):
        order = torch.arange(layer.out_features) if order is None else order
        found += [layer.weight.detach()[order][:, before], layer.bias.detach()[order]]
        before = order
    return found


def squared(one: nn.Sequential, weights: list[Tensor]) -> float:
    pairs = zip(one.parameters(), weights, strict=True)
    return sum(float((a.detach() - b).square().sum()) for a, b in pairs)


EVERY = [torch.tensor(p) for p in itertools.permutations(range(4))]


def test_one_layer_is_matched_as_well_as_by_trying_all_permutations():
    for seed in range(5):
        one, other = mlp(seed, 3, 4, 2), mlp(seed + 50, 3, 4, 2)
        found = match(one, nt.Probe(torch.randn(5, 3).double()), other)
        order = found.permutations["0.weight[0]"]
        for value, expected in zip(found.state.values(), permuted(other, [order]), strict=True):
            assert torch.equal(value, expected)
        least = min(squared(one, permuted(other, [p])) for p in EVERY)
        assert found.distance[1] == pytest.approx(least**0.5, rel=1e-9)


def test_no_permutation_of_one_layer_matches_better():
    """Of several layers, what is found need not be the best of all."""
    for seed in range(5):
        one, other = mlp(seed, 3, 4, 4, 2), mlp(seed + 50, 3, 4, 4, 2)
        found = match(one, nt.Probe(torch.randn(5, 3).double()), other)
        first, second = (found.permutations[f"{i}.weight[0]"] for i in (0, 2))
        rivals = [[p, second] for p in EVERY] + [[first, p] for p in EVERY]
        least = min(squared(one, permuted(other, pair)) for pair in rivals)
        assert found.distance[1] == pytest.approx(least**0.5, rel=1e-9)
        best = min(squared(one, permuted(other, [p, q])) for p in EVERY for q in EVERY)
        assert found.distance[1] < 1.05 * best**0.5


def test_activations_are_matched_by_their_correlations():
    """Against the assignment of a matrix of correlations written out."""
    from scipy.optimize import linear_sum_assignment

    one, other = mlp(1, 3, 6, 2), mlp(2, 3, 6, 2)
    x = torch.randn(40, 3).double()
    found = match(one, nt.Probe(x), other, by="activations")
    total = np.zeros((6, 6))
    for depth in (1, 2):  # before and behind the activation function
        a, b = (m[:depth](x).detach().numpy() for m in (one, other))
        total += np.corrcoef(a.T, b.T)[:6, 6:]
    _, best = linear_sum_assignment(total, maximize=True)
    assert found.permutations["0.weight[0]"].tolist() == best.tolist()


def digits() -> tuple[nt.Probe, Callable[[int], nn.Sequential]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3).float(), torch.tensor(labels)

    def trained(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        hidden = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(64, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(30):
            for rows in torch.randperm(1400).split(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return model

    return nt.Probe(x, y), trained


def test_barrier_between_digit_networks_falls_when_they_are_matched():
    probe, trained = digits()
    one, other = trained(1), trained(2)
    before = barrier(one, probe, other, points=11)
    after = barrier(one, probe, other, matched=True, points=11)
    np.testing.assert_allclose(before["loss"][[0, -1]], after["loss"][[0, -1]], rtol=1e-5)
    assert float(before["barrier"]) > 20 * float(before["barrier_standard_error"])
    assert float(after["barrier"]) < 0.1 * float(before["barrier"])
    assert float(after["error_barrier"]) < 0.1 * float(before["error_barrier"])
    copied = barrier(one, probe, shuffled(one, probe), matched=True, points=5)
    assert float(copied["barrier"]) == 0
    assert float(barrier(one, probe, shuffled(one, probe), points=5)["barrier"]) > 0.05


@pytest.mark.parametrize("name", HOUSE)
def test_networks_are_left_as_they_were(name):
    member, other = build(name), build(name, seed=1)
    member.model.train()
    before = [
        {n: t.clone() for n, t in m.state_dict().items()} for m in (member.model, other.model)
    ]
    random = torch.get_rng_state()
    match(member.model, probe_of(member), other.model)
    for m, state in zip((member.model, other.model), before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
    assert all(m.training for m in member.model.modules())
    assert torch.equal(torch.get_rng_state(), random)


class Flipped(nn.Module):
    """The order of hidden units matters."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
        self.gain, self.head = nn.Parameter(torch.randn(5)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(torch.tanh(self.first(x))) * self.gain
        return self.head(torch.tanh(self.second(x)))


def test_groups_that_change_outputs_are_dropped_and_named(monkeypatch):
    """Were the rule of an operation wrong, also where outputs are the same by chance."""
    monkeypatch.setitem(followed._RULES, "flip", followed._same)
    one, other = (Flipped(lambda x: x.flip(1)).double() for _ in range(2))
    nn.init.zeros_(one.second.weight)
    found = match(one, nt.Probe(torch.randn(6, 3).double()), other)
    assert found.permutations.keys() == {"second.weight[0]"}
    assert found.dropped.keys() == {"gain[0]"}
    assert "when its 5 units on gain, first.weight, first.bias" in found.dropped["gain[0]"]


def test_operations_that_are_not_known_are_named():
    one, other = (Flipped(lambda x: torch.fft.fft(x).abs()).double() for _ in range(2))
    found = match(one, nt.Probe(torch.randn(6, 3).double()), other)
    assert found.permutations.keys() == {"second.weight[0]"}
    assert list(found.dropped) == ["operation _fft_r2c"]


def test_nothing_to_permute_is_an_error():
    with pytest.raises(ValueError, match="no units of Linear may be permuted"):
        match(nn.Linear(3, 2), nt.Probe(torch.randn(4, 3)), nn.Linear(3, 2))


class Unsaved(nn.Module):
    """A buffer that is not saved, which units meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("scale", torch.rand(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * self.scale)


def test_buffers_that_are_not_saved_hold_units_in_place():
    """The state of a permuted network could not be used with them."""
    with pytest.raises(ValueError, match="may be permuted"):
        match(Unsaved(), nt.Probe(torch.randn(4, 3)), Unsaved())


class Tied(nn.Module):
    """One table at both ends, saved under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        return self.head(y + torch.tanh(self.hidden(y)))


def test_tied_weights_are_permuted_once():
    one, probe = Tied(), nt.Probe(torch.randint(9, (5, 3)))
    other = shuffled(one, probe)
    assert not torch.equal(other.table.weight, one.table.weight)
    found = match(one, probe, other.state_dict())
    assert found.permutations.keys() == {"table.weight[1]"}
    assert found.state.keys() == one.state_dict().keys()
    assert found.distance[1] == 0
    assert torch.equal(found.state["head.weight"], one.head.weight)


class Complex(nn.Module):
    """Complex hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6, dtype=torch.cdouble)
        self.head = nn.Linear(6, 2, dtype=torch.cdouble)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.cdouble())
        return torch.view_as_real(self.head(z / (1 + z.abs()))).flatten(1)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_complex_weights_are_matched(by):
    one, probe = Complex(), nt.Probe(torch.randn(8, 3), torch.randint(4, (8,)))
    found = match(one, probe, shuffled(one, probe), by=by)
    assert found.distance[1] == 0
    assert torch.equal(found.state["first.weight"], one.first.weight)


def test_half_precision_weights_are_matched_and_stay_so():
    one = mlp(1, 4, 6, 3).half()
    probe = nt.Probe(torch.randn(9, 4).half(), torch.randint(3, (9,)))
    other = shuffled(one, probe)
    found = match(one, probe, other)
    assert found.distance[1] == 0
    assert found.state["0.weight"].dtype == torch.float16
    assert float(barrier(one, probe, other, matched=True, points=3)["barrier"]) == 0


def test_inputs_may_be_named_and_networks_compiled():
    one = mlp(1, 4, 6, 3)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = one

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    model = torch.compile(Named(), backend="eager")
    probe = nt.Probe({"x": torch.randn(9, 4).double()}, torch.randint(3, (9,)))
    found = match(model, probe, mlp(2, 4, 6, 3).state_dict())
    assert len(found.permutations) == 1
    model.load_state_dict(found.state)


def test_bad_arguments_are_named():
    one, probe = mlp(1, 4, 6, 3), nt.Probe(torch.randn(9, 4).double(), torch.randint(3, (9,)))
    with pytest.raises(ValueError, match="'weights' or 'activations', got 'logits'"):
        match(one, probe, one, by="logits")
    with pytest.raises(ValueError, match="matched= to be True, False"):
        barrier(one, probe, one, matched="logits")
    with pytest.raises(ValueError, match=r"0.weight of shape \(7, 4\) where the network has"):
        match(one, probe, mlp(1, 4, 7, 3))
    broken = copy.deepcopy(one)
    nn.init.constant_(broken[2].bias, torch.nan)
    with pytest.raises(ValueError, match=r"the other network has weights that are not finite.*2"):
        match(one, probe, broken)


def sizes(several: list[Factor] | tuple[Factor, ...]) -> list[int]:
    return [factor.size for factor in several]


def test_axes_that_meet_are_divided_alike():
    a, b = axis(12, fixed=False), axis(12, fixed=False)
    heads, features = reshape([a], [3, 4])
    join(a, b)
    assert sizes(leaves(b)) == [3, 4]
    assert leaves(b) == (*leaves(heads), *leaves(features))
    reshape([b], [6, 2])
    assert sizes(leaves(features)) == [2, 2]
    assert sizes(factors(reshape([a], [3, 2, 2]))) == [3, 2, 2]
    assert not any(f.fixed for f in leaves(a))


def test_axes_that_cannot_be_divided_alike_are_fixed():
    a, b = axis(12, fixed=False), axis(12, fixed=False)
    reshape([a], [3, 4])
    reshape([b], [4, 3])
    join(a, b)
    assert all(f.fixed for f in (*leaves(a), *leaves(b)))
