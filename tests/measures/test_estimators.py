"""Estimates from random draws: unbiased, with errors that mean what they say."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import nettrace as nt
from nettrace.likelihood import Categorical, Gaussian
from nettrace.measures import fisher

N, D, C = 24, 5, 4


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Heads(nn.Module):
    """A linear network without bias whose C T outputs are laid out as (N, C, T)."""

    def __init__(self, positions):
        super().__init__()
        self.linear = nn.Linear(D, C * positions, bias=False).double()
        self.positions = positions

    def forward(self, x):
        outputs = self.linear(x).view(len(x), C, self.positions)
        return outputs[..., 0] if self.positions == 1 else outputs


def exact(model, x, kind):
    """Tr F by hand: the kernel's blocks are |x|^2 times the identity, M's trace is 1 - sum p^2."""
    z = (x @ model.linear.weight.T).detach().numpy().reshape(len(x), C, -1)
    information = C if kind == "gaussian" else (1 - (softmax(z, 1) ** 2).sum(1)).sum(-1)
    return float((x.square().sum(1).numpy() * information).mean())


def setting(kind):
    model, x = Heads(3 if kind == "sequence" else 1), torch.randn(N, D, dtype=torch.float64)
    if kind == "gaussian":
        return model, nt.Probe(x, torch.randn(N, C, dtype=torch.float64))
    shape = (N, 3) if kind == "sequence" else (N,)
    return model, nt.Probe(x, torch.randint(0, C, shape))


@pytest.mark.parametrize("kind", ["classes", "sequence", "gaussian"])
def test_drawn_fisher_is_unbiased_and_its_error_calibrated(kind):
    model, probe = setting(kind)
    true = exact(model, probe.inputs, kind)
    records = []
    for seed in range(12):
        tracer = nt.Tracer(probe, "fisher/trace_mc", seed=seed)
        records += [tracer(model, step)[0] for step in range(25)]
    assert records[0].attributes["n_probes"] == 8
    found = np.array([float(r.value) for r in records])
    errors = np.array([float(r.standard_error) for r in records])
    repeats = len(found)
    assert len(np.unique(found)) == repeats  # seed and step together choose the draws
    assert abs(found.mean() - true) < 3 * found.std(ddof=1) / repeats**0.5
    z = (found - true) / errors
    assert abs(z.mean()) < 3 / repeats**0.5
    assert 0.55 < np.mean(np.abs(z) < 1) < 0.80
    # The variance of a variance of near-normal estimates: relative sd sqrt(2 / repeats) = 0.08.
    assert np.mean(errors**2) / found.var(ddof=1) == pytest.approx(1, abs=0.25)


def test_error_of_drawn_fisher_by_hand():
    # two samples of variances 2 and 8, two draws each: the mean's is (2/2 + 8/2) / 2^2
    found = fisher.trace_mc(torch.tensor([[1.0, 3.0], [2.0, 6.0]]))
    assert float(found.value) == 3
    assert float(found.standard_error) == pytest.approx(5**0.5 / 2, rel=1e-14)
    assert found.attributes == {"n_probes": 2}


def test_drawn_fisher_is_the_same_for_the_same_seed_and_step():
    model, probe = setting("classes")
    a, b, c, d = (
        float(nt.Tracer(probe, "fisher/trace_mc", seed=seed)(model, step)[0].value)
        for seed, step in [(3, 5), (3, 5), (4, 5), (3, 6)]
    )
    assert a == b
    assert len({a, c, d}) == 3


def classes_of(scores, p, axis):
    """The classes that scores p - e_y were drawn with."""
    hot = (p - scores).round(decimals=9)
    assert torch.equal(hot.sum(axis), torch.ones_like(hot.sum(axis)))
    assert set(hot.unique().tolist()) == {0.0, 1.0}
    return hot.argmax(axis)


DRAWS = 20_000


@pytest.mark.parametrize("layout", ["classes", "classes-first", "classes-last"])
def test_drawn_classes_follow_softmax(layout):
    shape = {"classes": (3, C), "classes-first": (3, C, 2), "classes-last": (3, 2, C)}[layout]
    axis = 2 if layout == "classes-last" else 1
    outputs = 1.5 * torch.randn(shape, dtype=torch.float64)
    p = torch.tensor(softmax(outputs.numpy(), axis))
    scores = Categorical(axis).sampled_scores(outputs, DRAWS, torch.Generator().manual_seed(1))
    drawn = classes_of(scores.view(DRAWS, *shape), p, axis + 1).reshape(DRAWS, 3, -1)
    chances = p.movedim(axis, -1).reshape(3, -1, C)
    for n in range(3):
        # jointly over the positions of a sample, which are independent
        joint, number = chances[n, 0], drawn[:, n, 0]
        for q in range(1, drawn.shape[2]):
            joint = (joint[:, None] * chances[n, q]).flatten()
            number = number * C + drawn[:, n, q]
        counts = np.bincount(number.numpy(), minlength=len(joint))
        assert stats.chisquare(counts, DRAWS * joint.numpy()).pvalue > 1e-3
    # two samples are drawn apart from each other
    table = stats.contingency.crosstab(drawn[:, 0, 0].numpy(), drawn[:, 1, 0].numpy()).count
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_drawn_deviates_are_normal():
    outputs = torch.randn(2, 3, dtype=torch.float64)
    scores = Gaussian().sampled_scores(outputs, DRAWS, torch.Generator().manual_seed(1))
    assert scores.shape == (DRAWS, 2, 3)
    columns = scores.flatten(1).numpy()
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in columns.T)
    correlation = np.corrcoef(columns.T) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / DRAWS**0.5


@pytest.mark.parametrize("kind", ["classes", "sequence", "gaussian"])
def test_error_of_mean_loss_is_std_over_root_samples(kind):
    model, probe = setting(kind)
    f, y = model(probe.inputs).detach().numpy(), probe.targets.numpy()
    if kind == "gaussian":
        losses = 0.5 * ((f - y) ** 2).sum(1)
    else:
        chances = np.take_along_axis(softmax(f, 1), np.expand_dims(y, 1), 1)
        losses = -np.log(chances).reshape(N, -1).sum(1)
    record = nt.Tracer(probe, "loss/mean")(model, 0)[0]
    assert record.value == pytest.approx(losses.mean(), rel=1e-13)
    error = np.sqrt(((losses - losses.mean()) ** 2).sum() / (N - 1)) / np.sqrt(N)
    assert record.standard_error == pytest.approx(error, rel=1e-12)


def test_error_of_empirical_fisher_is_std_over_root_samples():
    model, probe = setting("classes")
    x = probe.inputs.numpy()
    residuals = softmax(model(probe.inputs).detach().numpy()) - np.eye(C)[probe.targets.numpy()]
    squares = (x**2).sum(1) * (residuals**2).sum(1)
    record = nt.Tracer(probe, "fisher/trace_empirical")(model, 0)[0]
    assert record.value == pytest.approx(squares.mean(), rel=1e-12)
    assert record.standard_error == pytest.approx(squares.std(ddof=1) / N**0.5, rel=1e-12)


def test_error_of_one_sample_is_unknown():
    model, probe = Heads(1), nt.Probe(torch.randn(1, D).double(), torch.tensor([2]))
    record = nt.Tracer(probe, "loss/mean")(model, 0)[0]
    assert np.isfinite(record.value)
    assert np.isnan(record.standard_error)
