"""Bad input gets an error that says what was wrong and what to do."""

import numpy as np
import pytest
import torch
from torch import nn

import nettrace as nt


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


X, Y = torch.randn(6, 3), torch.arange(6) % 2


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: nt.jacobian(m(X).detach(), m), ValueError, r"no gradient.*torch\.no_grad"),
        (lambda m: nt.jacobian(m(X), nn.ReLU()), ValueError, "ReLU.*no parameters"),
        (lambda m: nt.jacobian(m(X), {}), ValueError, "no parameters"),
        (
            lambda m: nt.jacobian(m(X), model().requires_grad_(False)),
            ValueError,
            r"none requires a gradient.*requires_grad_\(\)",
        ),
        (lambda m: nt.jacobian(m(X), model()), ValueError, "do not depend on any of the 4"),
        (lambda m: nt.jacobian(m(X * torch.nan), m), ValueError, "NaN in 6 of 6 samples"),
        (lambda m: nt.jacobian(m(X).sum(), m), ValueError, r"shape \(N, \.\.\.\).*got shape \(\)"),
        (lambda m: nt.jacobian(m(X[:0]), m), ValueError, r"N >= 1, got shape \(0, 2\)"),
        (lambda m: nt.jacobian(m(X).numpy, m), TypeError, "expected outputs to be a tensor"),
        (lambda m: nt.jacobian(m(X) + 0j, m), TypeError, "view_as_real"),
        (lambda m: nt.jacobian(m(X), m, memory_budget="lots"), ValueError, "'2GiB', got 'lots'"),
        (lambda m: nt.jacobian(m(X), m, memory_budget=0), ValueError, "got 0"),
        (lambda m: nt.jacobian(m(X), m, coupled="yes"), ValueError, "'refuse' or 'rows'"),
        (lambda m: nt.jacobian(m(X), [1.0]), TypeError, "got float for '0'"),
        (lambda m: nt.jacobian(m(X), [m[0].bias, m[0].bias]), ValueError, "same tensor.*once"),
        (
            lambda m: nt.jacobian(X @ (w := 2 * m[0].weight).T, {"v": m[0].weight, "w": w}),
            ValueError,
            "'w' is computed from 'v'.*one of them",
        ),
        (lambda m: nt.loss_jacobian(m(X), m), ValueError, r"shape \(N,\).*reduction='none'"),
        (lambda m: nt.jacobian(m(X), m).vjp(torch.ones(3)), ValueError, r"shape \(6, 2\)"),
        (lambda m: nt.jacobian(m(X), m).jvp(torch.ones(3)), ValueError, r"shape \(26,\)"),
        (lambda m: nt.jacobian(m(X), m).jvp({}), ValueError, r"u\['0.weight'\].*got nothing"),
        (lambda m: nt.jacobian(m(X), m).rows(6), IndexError, "below 6, got 6"),
        (lambda m: nt.jacobian(m(X), m).project(X), ValueError, r"\(K, 6, 2\)"),
        (lambda m: nt.Probe(X[:0]), ValueError, "probe is empty"),
        (lambda m: nt.Probe({}), ValueError, "probe is empty"),
        (lambda m: nt.Probe(X, Y[:4]), ValueError, "4 targets and 6 inputs"),
        (lambda m: nt.Probe(X, likelihood="student"), ValueError, "got 'student'"),
        (lambda m: nt.Probe.from_dataset([], 4), ValueError, "probe is empty.*0 samples"),
        (lambda m: nt.Probe.from_dataset(iter([1])), TypeError, r"stream.*probe=nettrace\.Probe"),
        (lambda m: nt.Probe(X.to("meta")).look(m), ValueError, r"meta.*call probe\.to\('cpu'\)"),
        (lambda m: nt.Probe((X, X)).look(m), TypeError, "positional argument"),
        (
            lambda m: nt.Probe(X, forward=lambda m, x: (m(x), m(x))).look(m),
            TypeError,
            r"tuple of 0: \(6, 2\), 1: \(6, 2\).*select=.*forward=lambda",
        ),
        (
            lambda m: nt.Probe(X, losses=lambda f, y: f).per_sample_losses(m(X)),
            ValueError,
            "reduction='none'",
        ),
        (
            lambda m: nt.Probe(X, Y - 1).per_sample_losses(m(X)),
            ValueError,
            "classes from 0 to 1, got -1.*losses=",
        ),
        (lambda m: nt.Probe(X, forward=lambda m, x: m(x).sum()).look(m), ValueError, "one row"),
        (
            lambda m: nt.Probe(X, Y[:, None], likelihood="categorical").distribution(m(X)),
            ValueError,
            r"outputs of shape \(6, 2\) and targets of shape \(6, 1\)",
        ),
        (lambda m: nt.Tracer(nt.Probe(X), "nkt/trase"), ValueError, "did you mean 'ntk/trace'"),
        (lambda m: nt.Tracer(nt.Probe(X), ["fischer"]), ValueError, "did you mean 'fisher'"),
        (lambda m: nt.Tracer(nt.Probe(X), []), ValueError, "at least one measure"),
        (lambda m: nt.Tracer((X, Y), "ntk"), TypeError, r"Probe\(inputs, targets\)"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", on_error="no"), ValueError, "'record' or 'raise'"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", every=[]), ValueError, "never fires"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", every=0), ValueError, "at least 1 step, got 0"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", every=[-5]), ValueError, r"\[-5\].*never come"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", every="lin"), ValueError, "'log'.*got 'lin'"),
        (lambda m: nt.Tracer(nt.Probe(X), "ntk", every=0.1), TypeError, "got 0.1"),
        (lambda m: nt.open("/nowhere"), FileNotFoundError, "no trace in /nowhere"),
    ],
)
def test_the_error_teaches(call, error, says):
    with pytest.raises(error, match=says):
        call(model())


def test_a_graph_that_was_freed_says_so():
    m = model()
    outputs = m(X)
    outputs.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        nt.jacobian(outputs, m).trace()


@pytest.mark.parametrize(
    ("every", "fires"),
    [
        (3, [0, 3, 6, 9]),
        ([2, 5, np.int64(7)], [2, 5, 7]),
        (range(0, 10, 4), [0, 4, 8]),
        (lambda step: step in (1, 8), [1, 8]),
        (nt.every(5), [0, 5]),
        (nt.at({9}), [9]),
        ("log", [0, 1, 2, 3, 4, 5, 6, 8]),
        (nt.log_spaced(2), [0, 1, 3]),
    ],
)
def test_schedules(every, fires):
    tracer = nt.Tracer(nt.Probe(X), "ntk/trace", every=every)
    assert [step for step in range(10) if tracer.due(step)] == fires


def test_log_spacing_is_even_in_the_logarithm():
    steps = np.array([step for step in range(1, 100_001) if nt.log_spaced(4)(step)])
    assert np.abs(np.diff(np.log10(steps[steps > 10])) - 0.25).max() < 0.03
    assert set(10 ** np.arange(6)) <= set(steps)


def test_a_computed_tensor_can_be_the_parameter():
    weight = 2 * torch.randn(2, 3, requires_grad=True)
    kernel = nt.jacobian(X @ weight.T, weight).gram(trace_outputs=True)
    torch.testing.assert_close(kernel, 2 * X @ X.T)
