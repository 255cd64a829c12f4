"""Alignment with targets, classes and residuals: closed forms, brute force, invariances."""

import numpy as np
import pytest
import torch
from features import Features, measured, normal, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrace as nt
from nettrace.statistics import Statistics

ALIGNMENTS = ["ntk/alignment", "ntk/alignment_centred"]


def one_hot(classes):
    return np.eye(int(classes.max()) + 1)[classes]


def cosine(a, b, centred):
    """The definition: through centring matrices."""
    h = np.eye(len(a)) - centred / len(a)
    a, b = h @ a @ h, h @ b @ h
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def without_each(function, samples):
    """Of all samples, and the jackknife's standard error by leaving each out."""
    numbers = np.arange(samples)
    left = np.array([function(numbers[numbers != n]) for n in numbers])
    error = np.sqrt((samples - 1) / samples * ((left - left.mean()) ** 2).sum())
    return function(numbers), error


TARGETS = {
    "classes": lambda n: torch.arange(n) % 3,
    "positions": lambda n: torch.randint(0, 3, (n, 2)),
    "real": lambda n: normal(n, 3),
}


@pytest.mark.parametrize("centred", [0, 1])
@pytest.mark.parametrize("kind", TARGETS)
def test_alignment_and_its_error_by_definition(kind, centred):
    n, outputs = 11, 3
    jacobian, targets = 0.5 + normal(n, outputs, 4), TARGETS[kind](n)
    kernel = np.einsum("ncp,mcp->nm", jacobian, jacobian)
    y = targets.numpy() if kind == "real" else one_hot(targets.numpy()).reshape(n, -1)
    target = y @ y.T
    value, error = without_each(
        lambda s: cosine(kernel[np.ix_(s, s)], target[np.ix_(s, s)], centred), n
    )
    found = measured(jacobian, ALIGNMENTS[centred], targets=targets)[ALIGNMENTS[centred]]
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.standard_error == pytest.approx(error, rel=1e-9)


def test_alignment_with_one_real_target():
    jacobian, y = normal(6, 1, 4), normal(6, 1)
    kernel = jacobian[:, 0] @ jacobian[:, 0].T
    true = float(y[:, 0] @ kernel @ y[:, 0] / (kernel.norm() * y.square().sum()))
    found = measured(jacobian, "ntk/alignment", targets=y)["ntk/alignment"]
    assert found.value == pytest.approx(true, rel=1e-13)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_kernel_that_is_the_targets_is_aligned(name):
    y = normal(9, 1)
    aligned = measured(y.unsqueeze(-1), name, targets=y)[name]
    assert aligned.value == pytest.approx(1, abs=1e-12)
    assert aligned.standard_error == pytest.approx(0, abs=1e-7)
    classes = torch.arange(9) % 3
    hot = torch.tensor(one_hot(classes.numpy()))
    jacobian = torch.einsum("np,c->ncp", hot, torch.ones(3).double())
    assert measured(jacobian, name, targets=classes)[name].value == pytest.approx(1, abs=1e-12)


def test_centred_alignment_of_independent_features_is_biased_as_stated():
    n, q = 60, 20
    for p in (20, 60):
        found = [
            measured(normal(n, 1, p).expand(n, q, p) / q**0.5, ALIGNMENTS[1], targets=normal(n, q))
            for _ in range(10)
        ]
        mean = np.mean([f[ALIGNMENTS[1]].value for f in found])
        assert mean == pytest.approx((p * q / ((p + n) * (q + n))) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ALIGNMENTS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(3, 8),
    parameters=st.integers(1, 5),
    scale=st.integers(-6, 6).map(lambda power: 10.0**power),
)
def test_alignment_is_between_0_and_1_and_invariant(name, seed, samples, parameters, scale):
    """Under scaling of kernel and targets, permutation of samples, rotation of the targets."""
    torch.manual_seed(seed)
    jacobian, y = normal(samples, 2, parameters), normal(samples, 2)
    order = torch.randperm(samples)
    a = measured(jacobian, name, targets=y)[name]
    b = measured(scale * jacobian[order], name, targets=(y @ rotation(2) / scale)[order])[name]
    assert 0 <= a.value <= 1
    assert a.value == pytest.approx(b.value, rel=1e-9, abs=1e-12)
    assert a.standard_error == pytest.approx(b.standard_error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_alignment_with_nothing_is_refused(name):
    with pytest.raises(ValueError, match="the same for all samples"):
        measured(torch.zeros(4, 1, 2).double(), name, targets=normal(4, 1))
    if name == ALIGNMENTS[1]:
        for constant in (torch.full((4, 1), 0.3).double(), torch.ones(4).long()):
            with pytest.raises(ValueError, match="the same for all samples"):
                measured(normal(4, 1 + (constant.dim() == 1), 2), name, targets=constant)


# Classes ------------------------------------------------------------------------------------------


def test_class_blocks_and_ratio_by_brute_force():
    n, outputs = 10, 4
    jacobian, classes = 0.3 + normal(n, outputs, 5), torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 3, 1])
    kernel = np.einsum("ncp,mcp->nm", jacobian, jacobian)
    pairs = {
        (a, b): [
            kernel[i, j] for i in range(n) for j in range(n) if i != j
            and (classes[i], classes[j]) == (a, b)
        ]
        for a in range(outputs) for b in range(outputs)
    }  # fmt: skip
    found = measured(jacobian, "ntk/class_blocks", "ntk/class_ratio", targets=classes)
    blocks, ratio = found["ntk/class_blocks"], found["ntk/class_ratio"]
    assert blocks.dims == ("class", "class_2")
    for (a, b), entries in pairs.items():
        true = np.mean(entries) if entries else np.nan  # of class 3, there is one sample
        assert blocks.value[a, b] == pytest.approx(true, rel=1e-12, nan_ok=True)
    assert np.isnan(blocks.value).sum() == 1

    def by_hand(s):
        within = [kernel[i, j] for i in s for j in s if i != j and classes[i] == classes[j]]
        between = [kernel[i, j] for i in s for j in s if classes[i] != classes[j]]
        return np.mean(within) / np.mean(between)

    value, error = without_each(by_hand, n)
    assert ratio.value == pytest.approx(value, rel=1e-12)
    assert ratio.standard_error == pytest.approx(error, rel=1e-9)


def test_blocks_are_for_classes():
    found = measured(normal(4, 2, 3), "ntk/class_blocks", "ntk/class_ratio", targets=normal(4, 2))
    assert not [name for name in found if name.startswith("ntk")]
    with pytest.raises(ValueError, match="two samples of one class"):
        measured(normal(4, 4, 3), "ntk/class_ratio", targets=torch.arange(4))


# Residuals ----------------------------------------------------------------------------------------


def test_residual_modes_by_hand_and_through_the_gradient():
    jacobian, classes = normal(5, 3, 20), torch.tensor([0, 2, 1, 1, 2])
    names = ["ntk/residual_modes", "ntk/spectrum", "collective/gradient_sqnorm"]
    modes, spectrum, gradient = list(measured(jacobian, *names, targets=classes).values())[:3]
    rows = jacobian.numpy().reshape(15, -1)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    f = rows.sum(1).reshape(5, 3)
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    residual = (p - np.eye(3)[classes]).flatten()
    size = residual @ residual
    true = (vectors[:, ::-1].T @ residual) ** 2 / size
    assert modes.value == pytest.approx(true, rel=1e-8)
    assert modes.value.sum() == pytest.approx(1, rel=1e-12)
    # g^T K g is the squared gradient of the sum of losses, found by a backward pass
    through = (modes.value * spectrum.value).sum() * size / 25
    assert through == pytest.approx(float(gradient.value), rel=1e-11)


def test_no_residual_has_no_modes():
    jacobian = normal(3, 1, 2)
    with pytest.raises(ValueError, match="squared norm is 0"):
        measured(jacobian, "ntk/residual_modes", targets=jacobian.sum(-1))


def taken(model, probe, *names):
    """The values of some measures, in their order."""
    records = nt.Tracer(probe, names, on_error="raise", max_seconds=None)(model, 0)
    return [r.value for r in records][: len(names)]


def descend(model, x, y, rate, steps):
    """Plain gradient descent on the mean over samples of half the squared error."""
    for _ in range(steps):
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= rate * g


def test_linear_network_decays_as_predicted():
    steps, jacobian, y = 60, normal(8, 2, 20), normal(8, 2)
    names = ["ntk/residual_modes", "ntk/decay_rates", "loss/mean"]
    model, probe = Features(20), nt.Probe(jacobian, y)
    before, rates, first = taken(model, probe, *names)
    rate = 1 / float(rates[0])
    descend(model, jacobian, y, rate, steps)
    after, _, last = taken(model, probe, *names)
    predicted = before * first * (1 - rate * rates) ** (2 * steps)
    assert (after * last) == pytest.approx(predicted, abs=1e-10 * first, rel=1e-6)
    assert predicted[1:].max() > 1e-3 * first  # and some has decayed, some not


class Scaled(torch.nn.Module):
    """alpha (f - f_0) of one hidden layer in the kernel's parametrisation: lazy for large alpha.

    Chizat, Oyallon and Bach, On lazy training (2019), arXiv:1812.07956.
    """

    def __init__(self, width, alpha):
        super().__init__()
        self.inner = torch.nn.Parameter(normal(width, 3))
        self.outer = torch.nn.Parameter(normal(width, 1) / width**0.5)
        self.start = [self.inner.detach().clone(), self.outer.detach().clone()]
        self.alpha = alpha

    def forward(self, x):
        return self.alpha * (self.plain(x, self.inner, self.outer) - self.plain(x, *self.start))

    @staticmethod
    def plain(x, inner, outer):
        return torch.tanh(x @ inner.T / 3**0.5) @ outer


@pytest.mark.parametrize(
    ("width", "alpha", "lazy"),
    [(2048, 1.0, True), (2048, 0.02, False), (16, 1.0, False)],
    ids=["wide", "small outputs", "narrow"],
)
def test_modes_decay_as_predicted_in_the_lazy_regime_alone(width, alpha, lazy):
    n, steps = 12, 200
    x, y = normal(n, 3), normal(n, 1)
    model = Scaled(width, alpha)
    start = Statistics(model, nt.Probe(x, y), ["eigenvalues", "eigenvectors"])
    modes = start.eigenvectors[:, 0].T
    before = modes @ (model(x) - y).detach()
    rates = taken(model, nt.Probe(x, y), "ntk/decay_rates")[0]
    descend(model, x, y, 1 / rates[0], steps)
    after = modes @ (model(x) - y).detach()
    predicted = (1 - torch.tensor(rates / rates[0])) ** steps
    assert predicted.min() < 0.01
    assert predicted.max() > 0.9
    assert ((predicted > 0.02) & (predicted < 0.8)).sum() >= 4  # modes that tell rates apart
    off = ((after / before)[:, 0] - predicted).abs().max()
    assert (off < 0.02) if lazy else (off > 0.3)
