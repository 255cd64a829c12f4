"""Likelihoods against torch's own losses and distributions, autograd, and sums over outcomes."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.autograd.functional import hessian

import nettrace as nt

N, C = 4, 3
DRAWS = 20_000
COVARIANCE = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]]).double()
VARIANCES = torch.tensor([0.25, 1.0, 9.0]).double()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def counts():
    return torch.randint(0, 6, (N, C))


#: A likelihood, drawn targets, and the distribution of all targets of a sample by torch.
KINDS = {
    "categorical": (
        nt.Categorical(1),
        lambda: torch.arange(N) % C,
        lambda f: D.Categorical(None, f),
    ),
    "bernoulli": (
        nt.Bernoulli(),
        lambda: torch.randint(0, 2, (N, C)).double(),
        lambda f: D.Independent(D.Bernoulli(logits=f), 1),
    ),
    "poisson": (nt.Poisson(), counts, lambda f: D.Independent(D.Poisson(f.exp()), 1)),
    "gaussian": (nt.Gaussian(), lambda: normal(N, C), lambda f: D.Independent(D.Normal(f, 1), 1)),
    "variance": (
        nt.Gaussian(covariance=4.0),
        lambda: normal(N, C),
        lambda f: D.Independent(D.Normal(f, 2.0), 1),
    ),
    "variances": (
        nt.Gaussian(covariance=VARIANCES),
        lambda: normal(N, C),
        lambda f: D.Independent(D.Normal(f, VARIANCES.sqrt()), 1),
    ),
    "covariance": (
        nt.Gaussian(covariance=COVARIANCE),
        lambda: normal(N, C),
        lambda f: D.MultivariateNormal(f, COVARIANCE),
    ),
}


def drawn(likelihood, f, seed=1):
    return likelihood.sampled_scores(f, DRAWS, torch.Generator().manual_seed(seed))


def outcomes(name, f):
    """All targets (K, ...) of one sample whose chance is not negligible, and their chances (K,)."""
    if name == "categorical":
        return torch.arange(C), f.softmax(0)
    if name in ("bernoulli", "poisson"):
        ys = torch.tensor(list(itertools.product(range(25 if name == "poisson" else 2), repeat=C)))
        chances = KINDS[name][2](f).log_prob(ys.double()).exp()
        assert float(chances.sum()) == pytest.approx(1, abs=1e-13)
        return ys.double(), chances
    # Gauss-Hermite with two points an axis is exact for the quadratic outer products of scores.
    given = {"gaussian": torch.ones(C), "variance": 4 * torch.ones(C), "variances": VARIANCES}
    covariance = COVARIANCE if name == "covariance" else given[name].double().diag()
    points = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=C))).double()
    return f + points @ torch.linalg.cholesky(covariance).T, torch.full((2**C,), 2.0**-C).double()


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_torchs_but_for_what_targets_alone_decide(name):
    likelihood, targets, distribution = KINDS[name]
    y = targets()
    first, second = normal(N, C), normal(N, C)
    found = likelihood.losses(first, y) - likelihood.losses(second, y)
    true = distribution(second).log_prob(y) - distribution(first).log_prob(y)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-13)


def test_losses_are_those_of_torch_functional():
    f, y = normal(N, 2, C), torch.rand(N, 2, C).double()
    for found, true in [
        (nt.Bernoulli().losses(f, y), F.binary_cross_entropy_with_logits(f, y, reduction="none")),
        (nt.Poisson().losses(f, 9 * y), F.poisson_nll_loss(f, 9 * y, reduction="none")),
        (nt.Gaussian().losses(f, y), 0.5 * F.mse_loss(f, y, reduction="none")),
        (
            nt.Gaussian(9.0).losses(f, y),
            F.gaussian_nll_loss(f, y, torch.full_like(f, 9.0), reduction="none") - math.log(3),
        ),
        (
            nt.Categorical(2).losses(f, y.argmax(2)),
            F.cross_entropy(f.mT, y.argmax(2), reduction="none"),
        ),
    ]:
        torch.testing.assert_close(found, true.flatten(1).sum(1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", KINDS)
def test_metric_is_expected_outer_product_of_autograds_scores(name):
    likelihood, _, distribution = KINDS[name]
    f = 0.4 * normal(N, C)
    expected = []
    for sample in f:
        ys, chances = outcomes(name, sample)
        z = sample.repeat(len(ys), 1).requires_grad_()
        (scores,) = torch.autograd.grad(-distribution(z).log_prob(ys).sum(), z)
        expected.append(torch.einsum("k,kc,kd->cd", chances, scores, scores))
    expected = torch.stack(expected)
    roots = likelihood.weighted_scores(f)
    torch.testing.assert_close(likelihood.metric(f), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.einsum("knc,knd->ncd", roots, roots), expected)


@pytest.mark.parametrize("name", KINDS)
def test_metric_is_hessian_of_the_loss_at_any_targets(name):
    likelihood, targets, _ = KINDS[name]
    f, y = normal(N, C), targets()
    for n in range(N):
        at = hessian(lambda z, n=n: likelihood.losses(z[None], y[n : n + 1]).sum(), f[n])
        torch.testing.assert_close(likelihood.metric(f)[n], at, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (nt.Categorical(1), torch.arange(2 * C) % 4),
        (nt.Categorical(2), torch.arange(2 * 4) % C),
        (nt.Bernoulli(), torch.rand(2, 4, C)),
        (nt.Poisson(), torch.arange(2 * 4 * C)),
        (nt.Gaussian(torch.arange(1.0, 1 + 4 * C)), torch.rand(2, 4, C)),
    ],
    ids=["classes-first", "classes-last", "bernoulli", "poisson", "gaussian"],
)
def test_outputs_with_several_axes_are_counted_in_their_order(likelihood, targets):
    f = normal(2, 4, C)
    shape = {("categorical", 1): (2, C), ("categorical", 2): (2, 4)}
    y = targets.view(shape.get((likelihood.name, getattr(likelihood, "axis", 0)), f.shape))
    at = [
        hessian(lambda z, n=n: likelihood.losses(z[None], y[n : n + 1]).sum(), f[n])
        for n in range(2)
    ]
    true = torch.stack(at).reshape(2, 4 * C, 4 * C)
    torch.testing.assert_close(likelihood.metric(f), true, rtol=1e-11, atol=1e-13)
    roots = likelihood.weighted_scores(f)
    torch.testing.assert_close(torch.einsum("knc,knd->ncd", roots, roots), true)
    scores = likelihood.sampled_scores(f, 4000, torch.Generator().manual_seed(0))
    products = torch.einsum("knc,knd->kncd", scores, scores)
    z = (products.mean(0) - true) / (products.std(0) / 4000**0.5 + 1e-12)
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("name", KINDS)
def test_drawn_scores_have_mean_zero_and_the_metric_as_covariance(name):
    likelihood, _, _ = KINDS[name]
    f = normal(2, C)
    scores = drawn(likelihood, f)
    error = scores.std(0) / DRAWS**0.5
    assert float((scores.mean(0).abs() / error).max()) < 4.5
    products = torch.einsum("knc,knd->kncd", scores, scores)
    z = (products.mean(0) - likelihood.metric(f)) / (products.std(0) / DRAWS**0.5 + 1e-12)
    assert float(z.abs().max()) < 4.5
    across = torch.einsum("kc,kd->kcd", scores[:, 0], scores[:, 1])
    assert float((across.mean(0) / (across.std(0) / DRAWS**0.5)).abs().max()) < 4.5


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_gradients_of_the_loss(name):
    """A drawn score is the gradient of the loss at some targets of the right kind."""
    likelihood, _, _ = KINDS[name]
    f = normal(N, C)
    (score,) = likelihood.sampled_scores(f, 1, torch.Generator().manual_seed(3))
    if name == "categorical":
        y = (f.softmax(1) - score).argmax(1)
    elif name == "bernoulli":
        y = (f.sigmoid() - score).round()
    elif name == "poisson":
        y = (f.exp() - score).round()
        torch.testing.assert_close(f.exp() - score, y)
    else:
        y = f - torch.linalg.solve(likelihood.metric(f), score)
    z = f.clone().requires_grad_()
    (true,) = torch.autograd.grad(likelihood.losses(z, y).sum(), z)
    torch.testing.assert_close(score, true, rtol=1e-10, atol=1e-12)


def test_drawn_counts_and_labels_follow_their_distributions():
    f = torch.tensor([[-1.0, 0.5, 2.5]]).double()
    y = f.exp() - drawn(nt.Poisson(), f)
    for c, rate in enumerate(f[0].exp().tolist()):
        top = int(stats.poisson.ppf(1 - 1e-3, rate))
        found = np.bincount(y[:, 0, c].round().long().clamp_max(top + 1), minlength=top + 2)
        chances = np.append(stats.poisson.pmf(range(top + 1), rate), stats.poisson.sf(top, rate))
        assert stats.chisquare(found, DRAWS * chances).pvalue > 1e-3
    y = (f.sigmoid() - drawn(nt.Bernoulli(), f)).round()
    number = (y[:, 0] @ torch.tensor([1.0, 2, 4]).double()).long()
    p = f[0].sigmoid()
    chances = [
        math.prod(float(p[c] if k >> c & 1 else 1 - p[c]) for c in range(C)) for k in range(8)
    ]
    found = np.bincount(number, minlength=8)
    assert stats.chisquare(found, DRAWS * np.array(chances)).pvalue > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_draws_do_not_depend_on_precision(name):
    likelihood, _, _ = KINDS[name]
    f = normal(N, C).float()
    wide, narrow = (
        likelihood.sampled_scores(z, 50, torch.Generator().manual_seed(2)) for z in (f.double(), f)
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide.float(), rtol=1e-5, atol=2e-6)


# Extremes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_networks_keep_their_digits(dtype):
    """1 - p to full precision where p rounds to 1."""
    odds = torch.tensor([[30.0, 20.0, -10.0], [60.0, -60.0, 0.0], [-60.0, 40.0, 40.0]], dtype=dtype)
    mp = pytest.importorskip("mpmath")
    mp.mp.dps = 60
    categorical, bernoulli = nt.Categorical(1).metric(odds), nt.Bernoulli().metric(odds)
    rtol = 20 * torch.finfo(dtype).eps
    for n, row in enumerate(odds.tolist()):
        weights = [mp.exp(z) for z in row]
        p = [w / sum(weights) for w in weights]
        for c in range(3):
            for d in range(3):
                true = float(p[c] * (1 - p[c]) if c == d else -p[c] * p[d])
                assert float(categorical[n, c, d]) == pytest.approx(true, rel=rtol, abs=1e-37)
            s = 1 / (1 + mp.exp(-row[c]))
            assert float(bernoulli[n, c, c]) == pytest.approx(float(s * (1 - s)), rel=rtol)
    for likelihood, metric in [(nt.Categorical(1), categorical), (nt.Bernoulli(), bernoulli)]:
        roots = likelihood.weighted_scores(odds)
        again = torch.einsum("knc,knd->ncd", roots, roots)
        torch.testing.assert_close(again, metric, rtol=10 * rtol, atol=1e-37)


@pytest.mark.parametrize("likelihood", [nt.Categorical(1), nt.Bernoulli()], ids=lambda k: k.name)
@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_huge_logits_give_finite_numbers(likelihood, scale):
    f = (scale * torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.0, 1.0]])).requires_grad_()
    y = torch.tensor([1, 0]) if likelihood.name == "categorical" else torch.ones(2, 3)
    losses = likelihood.losses(f, y)
    (gradient,) = torch.autograd.grad(losses.sum(), f)
    found = [losses, gradient, likelihood.metric(f), likelihood.weighted_scores(f)]
    found.append(likelihood.sampled_scores(f, 3, torch.Generator().manual_seed(0)))
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize("f", [-80.0, -5.0, 20.0, 21.0, 36.0, 80.0])
def test_drawn_counts_at_extreme_rates(f):
    """Variance e^f within 4.5 standard errors; at e^36, that of torch.poisson is 10 % too low."""
    rate, count = math.exp(f), 4000
    outputs = torch.full((1, count), f)  # float32
    scores = nt.Poisson().sampled_scores(outputs, 1, torch.Generator().manual_seed(0)).double()
    assert bool(scores.isfinite().all())
    if rate < 1e-4:  # no count is ever drawn
        torch.testing.assert_close(scores, torch.full_like(scores, rate), rtol=1e-5, atol=0)
        return
    z = scores.flatten() / rate**0.5
    assert abs(float(z.mean())) < 4.5 / count**0.5
    kurtosis = 2 + 1 / rate
    assert abs(float(z.square().mean()) - 1) < 4.5 * (kurtosis / count) ** 0.5


@given(p=st.lists(st.floats(-700, 700), min_size=2, max_size=6))
def test_categorical_metric_has_no_gauge(p):
    f = torch.tensor([p]).double()
    metric = nt.Categorical(1).metric(f)
    assert float(metric.sum(2).abs().max()) <= 1e-14
    # 4e-13: what rounding f + 100 does to differences of logits up to 800
    torch.testing.assert_close(nt.Categorical(1).metric(f + 100), metric, rtol=1e-11, atol=1e-300)
    assert float(torch.linalg.eigvalsh(metric).max()) <= 0.5 + 1e-12


# Which one is meant -------------------------------------------------------------------------------


def probe(targets, likelihood=None):
    return nt.Probe(torch.zeros(N, 2), targets, likelihood=likelihood)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bernoulli", nt.Bernoulli),
        ("poisson", nt.Poisson),
        ("gaussian", nt.Gaussian),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_likelihoods_by_name(name, kind, dtype):
    targets = (torch.arange(N * C).view(N, C) % 2).to(dtype)
    found = probe(targets, name)
    assert isinstance(found.distribution(normal(N, C)), kind)
    f = normal(N, C)
    true = kind().losses(f, targets.double())
    torch.testing.assert_close(found.per_sample_losses(f), true, rtol=1e-14, atol=0)


def test_a_likelihood_of_ones_own_is_taken_as_it_is():
    given = nt.Gaussian(covariance=COVARIANCE)
    assert probe(normal(N, C), given).distribution(normal(N, C)) is given
    assert probe(normal(N, C), given).map(lambda t: t).likelihood is given


def test_labels_may_have_an_axis_more():
    f, y = normal(N), torch.arange(N) % 2
    found = probe(y[:, None], "bernoulli").per_sample_losses(f)
    true = F.binary_cross_entropy_with_logits(f, y.double(), reduction="none")
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: probe(None, nt.Gaussian), "Gaussian.covariance=4.0.*got <class"),
        (lambda: probe(None, 3), "'bernoulli', 'poisson'.*got 3"),
        (lambda: probe(torch.zeros(N, C)).distribution(normal(N, C)), "likelihood='bernoulli'"),
        (
            lambda: probe(torch.zeros(N, 2), "poisson").distribution(normal(N, C)),
            r"\(4, 3\) for the poisson likelihood, got shape \(4, 2\)",
        ),
        (lambda: nt.Poisson().losses(normal(N, C), -torch.ones(N, C)), "at least 0.*got -1"),
        (lambda: nt.Bernoulli().losses(normal(N, C), 2 * torch.ones(N, C)), "0 to 1.*got 2"),
        (lambda: nt.Bernoulli().losses(normal(N, C), torch.full((N, C), math.nan)), "got nan"),
        (lambda: nt.Bernoulli().losses(normal(N, C), torch.ones(N)), r"\(4, 3\), got shape \(4,\)"),
        (lambda: nt.Categorical(-1), "at least 1.*got -1"),
        (lambda: nt.Gaussian(-1.0), "least variance is -1"),
        (lambda: nt.Gaussian(math.nan), "least variance is nan"),
        (lambda: nt.Gaussian(torch.tensor([1.0, 0.0])), "least variance is 0"),
        (lambda: nt.Gaussian(torch.ones(2, 2)), "least eigenvalue is "),
        (lambda: nt.Gaussian(torch.tensor([[1.0, 0.5], [0.0, 1]])), "transpose by up to 0.5"),
        (lambda: nt.Gaussian(torch.ones(2, 3)), r"got shape \(2, 3\)"),
        (lambda: nt.Gaussian(VARIANCES).metric(normal(N, 2)), r"the 2 outputs.*got shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("name", ["variance", "variances", "covariance"])
def test_the_loss_says_that_it_leaves_the_determinant_out(name):
    assert "without the log-determinant" in KINDS[name][0].loss
    assert nt.Gaussian().loss == "half the squared error, summed over outputs"
