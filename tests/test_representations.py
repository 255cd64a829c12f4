"""Activations are what the layers gave, sample by sample, and nothing of the network is touched."""

import copy

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import nettrace as nt
from nettrace.operator import OverBudgetError
from nettrace.representations import MOST

N = 6


def state(model):
    """All that a forward pass or hooks could change."""
    hooks = [
        len(found)
        for m in model.modules()
        for found in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]
    return copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], hooks


class Functional(nn.Module):
    """No module computes anything; one nonlinearity is in place, on what another gave."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(x @ self.w[0])
        h = F.gelu(h @ self.w[1])
        h += x
        return F.relu(h, inplace=True) @ self.w[2]


class Twice(nn.Module):
    """A layer that is called twice, with a nonlinearity in place."""

    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.layer(self.act(self.layer(x)))))


def test_what_exists_only_in_functions():
    model, x = Functional(), torch.randn(N, 4)
    found = nt.activations(model, nt.Probe(x), ["matmul", "tanh", "gelu", "add", "relu"])
    first, second, third = (w.detach() for w in model.w)
    a = x @ first
    b = a.tanh() @ second
    c = F.gelu(b) + x
    expected = {"matmul": a, "tanh": a.tanh(), "matmul#2": b, "gelu": F.gelu(b)}
    expected |= {"add": c, "relu": c.relu(), "matmul#3": c.relu() @ third}
    assert list(found) == list(expected)  # "iadd" is another function
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_layer_called_twice():
    model, x = Twice(), torch.randn(N, 4)
    probe = nt.Probe(x)
    first = model.layer(x).detach()
    second = model.layer(first.relu()).detach()
    expected = {"layer": first, "act": first.relu(), "layer#2": second, "act#2": second.relu()}
    found = nt.activations(model, probe)
    assert set(found) == {*expected, "head"}
    for name, value in expected.items():  # not what is written over it in place
        torch.testing.assert_close(found[name], value)
    assert list(nt.activations(model, probe, "layer")) == ["layer", "layer#2"]
    assert list(nt.activations(model, probe, "layer#1")) == ["layer"]
    assert list(nt.activations(model, probe, ["layer#2", "act#2.relu"])) == [
        "layer#2",
        "act#2.relu",
    ]


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_within_a_compiled_module():
    model, probe = Twice(), nt.Probe(torch.randn(N, 4))
    names = ["layer", "act.relu", "head"]
    plain = nt.activations(model, probe, names)
    compiled = Twice()
    compiled.load_state_dict(model.state_dict())
    compiled.layer = torch.compile(compiled.layer)
    for one in (torch.compile(model), compiled):
        found = nt.activations(one, probe, names)
        assert list(found) == list(plain)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_within_a_scripted_module_is_refused():
    inner = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(N, 4))
    model, probe = nn.Sequential(inner, nn.Linear(4, 2)), nt.Probe(torch.randn(N, 4))
    with pytest.raises(ValueError, match=r"'0.tanh'.*scripted"):
        nt.activations(model, probe, "0.tanh")
    torch.testing.assert_close(nt.activations(model, probe, "0")["0"], inner(probe.inputs))


def test_samples_are_found_wherever_they_lie():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5), nn.Linear(5, 2)

        def forward(self, x):  # (N, T, 3), with T = N
            hidden, _ = self.lstm(x.transpose(0, 1))
            flat = hidden.reshape(-1, 5).sigmoid()  # rows of all times, samples within
            return self.head(flat.view(len(x[0]), len(x), 5)[-1]) + x.reshape(-1, 3).exp()[0, 0] * 0

    model, x = Rows(), torch.randn(N, N, 3)
    found = nt.activations(model, nt.Probe(x), ["lstm", "sigmoid", "exp", "head"])
    shapes = {name: tuple(one.shape) for name, one in found.items()}
    assert shapes == {
        **{"lstm[0]": (N, N, 5), "lstm[1]": (N, 1, 5), "lstm[2]": (N, 1, 5)},
        **{"sigmoid": (N, N, 5), "head": (N, 2), "exp": (N, N, 3)},
    }
    hidden, _ = model.lstm(x.transpose(0, 1))
    torch.testing.assert_close(found["lstm[0]"], hidden.transpose(0, 1))
    torch.testing.assert_close(found["sigmoid"], hidden.transpose(0, 1).sigmoid())
    torch.testing.assert_close(found["exp"], x.exp())


def test_what_has_no_samples_or_mixes_them():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.place = nn.Linear(4, 4), nn.Embedding(N, 4)

        def forward(self, x):
            h = self.inner(x)
            mixed = torch.softmax(h, 0)
            return h + 0 * mixed.sum() + 0 * self.place(torch.arange(4)).sum()

    model, probe = Mixing(), nt.Probe(torch.randn(N, 4))
    assert list(nt.activations(model, probe)) == ["inner"]
    assert list(nt.activations(model, probe, "*")) == ["inner"]
    assert list(nt.activations(model, probe, ["*max", "inne?"])) == ["inner"]
    for name in ("place", "softmax"):
        with pytest.raises(ValueError, match=f"'{name}'.*no axis.*{N} samples"):
            nt.activations(model, probe, name)


def test_noise_of_the_forward_is_no_mixing():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head((self.inner(x) + torch.randn(len(x), 4)).tanh())

    found = nt.activations(Noisy(), nt.Probe(torch.randn(N, 4)), ["inner", "tanh", "head"])
    assert {name: one.shape[0] for name, one in found.items()} == dict.fromkeys(found, N)
    assert len(found) == 3


def test_the_default_is_few_layers():
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(MOST)))
    found = nt.activations(deep, nt.Probe(torch.randn(N, 4)))
    assert list(found) == [str(i) for i in range(MOST)]
    assert "0.0" in nt.activations(deep[:3], nt.Probe(torch.randn(N, 4)))
    idle = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(inplace=True), nn.Flatten())
    assert list(nt.activations(idle, nt.Probe(torch.randn(N, 4)))) == ["0", "2"]

    class Long(nn.Module):
        def forward(self, x):
            for _ in range(50):
                x = x.sin().cos()
            return x

    assert len(nt.activations(Long(), nt.Probe(torch.randn(N, 4)))) == MOST
    functions = nt.activations(Functional(), nt.Probe(torch.randn(N, 4)))
    assert list(functions)[:3] == ["matmul", "tanh", "matmul#2"]


def test_memory_is_bounded():
    model, probe = (
        nn.Sequential(nn.Linear(4, 1000), nn.Linear(1000, 2)),
        nt.Probe(torch.randn(N, 4)),
    )
    with pytest.raises(OverBudgetError, match=r"20,000 bytes.*'0'.*layers="):
        nt.activations(model, probe, memory_budget=20_000)
    assert list(nt.activations(model, probe, "1", memory_budget=20_000)) == ["1"]


def test_one_sample_and_samples_that_cannot_be_told_apart():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    assert nt.activations(model, nt.Probe(torch.randn(1, 4)))["0"].shape == (1, 3)
    forward = lambda model, inputs: model(inputs[0].view(N, 4))  # noqa: E731
    probe = nt.Probe((torch.randn(2, 2 * N),), forward=forward)
    assert nt.activations(model, probe)["0"].shape == (N, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit|.*deprecated")
@pytest.mark.parametrize("name", zoo.ZOO)
def test_zoo(name):
    """By default some layer of each, sample by sample what it is alone, and nothing is touched."""
    member = zoo.build(name)
    if member.singles is not None or isinstance(member.batch, tuple):
        pytest.skip("its samples are not rows of one tensor")
    before, noise = state(member.model), torch.get_rng_state()
    probe = nt.Probe(member.batch, forward=member.forward)
    found = nt.activations(member.model, probe)
    after = state(member.model)
    assert torch.equal(torch.get_rng_state(), noise)
    assert after[1:] == before[1:]
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    assert found
    for value in found.values():
        assert len(value) == zoo.N
        assert not value.requires_grad
    if member.alone and not member.coupled:
        one = lambda i: nt.Probe(member.batch[i : i + 1], forward=member.forward)  # noqa: E731
        alone = [nt.activations(member.model, one(i), list(found)) for i in range(zoo.N)]
        for label in found:
            rows = torch.cat([one[label].reshape(1, -1) for one in alone])
            torch.testing.assert_close(
                found[label].reshape(zoo.N, -1), rows, rtol=1e-3, atol=1e-5, equal_nan=True
            )
