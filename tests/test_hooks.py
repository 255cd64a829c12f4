"""Hooks on gradients and anomaly detection are the training's: measuring works beside them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import nettrace as nt

MEASURES = ["ntk/trace", "ntk/gram", "fisher/trace", "fisher/trace_empirical", "gradients"]


class Doubled(nn.Module):
    """A weight that is computed, by an operation that leaves no rule."""

    def __init__(self, hook=None):
        super().__init__()
        self.hook = hook

    def forward(self, weight):
        computed = weight.exp()
        if self.hook is not None and computed.requires_grad:
            computed.register_hook(self.hook)
        return computed


class Net(nn.Module):
    """A network whose forward may give hooks to what it computes."""

    def __init__(self, hook=None, kind="register_hook"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        parametrize.register_parametrization(
            self.second, "weight", Doubled(hook if kind == "of a computed weight" else None)
        )
        if kind == "of a parameter":
            self.first.weight.register_hook(hook)
        self.hook, self.kind = hook, kind

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.hook is not None and h.requires_grad:
            if self.kind == "register_hook":
                h.register_hook(self.hook)
            elif self.kind == "retain_grad":
                h.retain_grad()
        return self.second(h)


def probe():
    torch.manual_seed(1)
    return nt.Probe(torch.randn(6, 4), torch.arange(6) % 3)


def measured(model):
    records = nt.Tracer(probe(), MEASURES, on_error="raise")(model, 0)
    return {r.name: r.value for r in records if "seconds" not in r.name}


def same(found, expected):
    """But for rounding: passes of one cotangent add up in another order."""
    return found.keys() == expected.keys() and all(
        torch.allclose(*(torch.as_tensor(v[name]) for v in (found, expected)), rtol=1e-4, atol=1e-6)
        for name in found
    )


@pytest.mark.parametrize("kind", ["register_hook", "retain_grad", "of a computed weight"])
def test_hooks_see_one_cotangent_at_a_time(kind):
    seen = []

    def observe(gradient):
        seen.append(gradient.shape)
        seen[-1] = float(gradient.norm())

    assert same(measured(Net(observe, kind)), measured(Net()))
    assert all(isinstance(norm, float) for norm in seen)
    assert seen or kind == "retain_grad"
    before = Tensor.register_hook, "retain_grad" in vars(Tensor)
    assert before == (Tensor.register_hook, False)


def test_hooks_that_change_gradients_within_a_network_count():
    model = Net(lambda gradient: 3 * gradient)
    outputs = model(probe().inputs).flatten()
    rows = [torch.autograd.grad(o, list(model.parameters()), retain_graph=True) for o in outputs]
    trace = sum(float(share.square().sum()) for row in rows for share in row)
    assert measured(model)["ntk/trace"] == pytest.approx(trace, rel=1e-4)
    assert measured(Net())["ntk/trace"] < trace / 2


def test_hooks_of_parameters_are_not_called_and_are_there_afterwards():
    calls = []

    def clip(gradient):
        calls.append(1)
        return gradient.clamp(-1e-3, 1e-3)

    model = Net(clip, "of a parameter")
    assert same(measured(model), measured(Net()))
    assert not calls
    model(probe().inputs).sum().backward()
    assert calls
    assert float(model.first.weight.grad.abs().max()) == pytest.approx(1e-3)


def test_anomalies_are_not_looked_for_meanwhile():
    expected = measured(Net())
    with torch.autograd.set_detect_anomaly(True):
        assert same(measured(Net()), expected)
        assert torch.is_anomaly_enabled()
        model, x = Net(), probe().inputs
        gram = nt.jacobian(model(x), model).gram()
    assert torch.allclose(gram, nt.jacobian(model(x), model).gram(), rtol=1e-5)


class Exhausted(torch.autograd.Function):
    """Can be differentiated once, as some that free what they keep."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = iter([2.0])
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return next(ctx.kept) * gradient


class Silent(Exhausted):
    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


@pytest.mark.parametrize("function", [Exhausted, Silent])
def test_an_error_without_a_text_is_recorded_with_its_place(function):
    class Failing(Net):
        def forward(self, x):
            return super().forward(function.apply(self.first(x)[:, :4]))

    tracer = nt.Tracer(probe(), "ntk/trace")
    with pytest.warns(nt.MissingMeasureWarning, match="it says no more"):
        reason = tracer(Failing(), 0)[0].missing
    error = "StopIteration" if function is Exhausted else "NotImplementedError"
    line = function.backward.__code__.co_firstlineno + 2
    assert reason == f"{error}: it says no more ({__file__}, line {line})"
