"""The Fisher information against the explicit P x P matrix, by autograd over all outcomes."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Poisson

import nettrace as nt
from nettrace.measures import fisher
from nettrace.statistics import Statistics

N, C = 5, 3
COVARIANCE = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]]).double()

#: The group, and those that it leaves out.
FISHER = ["fisher", *(f"fisher/{q}" for q in "diagonal diagonal_empirical".split())]
FISHER += ["fisher/spectrum", "fisher/block_spectrum"]


def measured(model, probe, *names, seed=0):
    records = nt.Tracer(probe, names, on_error="raise", seed=seed)(model, step=0)
    return {r.name: r for r in records}


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Case:
    """A network and its probe; the matrix by autograd of log p, at every outcome."""

    def __init__(self, kind):
        self.kind = kind
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
        self.x = normal(N, 4)
        self.y, likelihood = {
            "categorical": (torch.arange(N) % C, None),
            "bernoulli": (torch.rand(N, C).double(), "bernoulli"),
            "poisson": (torch.randint(0, 5, (N, C)), "poisson"),
            "gaussian": (normal(N, C), None),
            "covariance": (normal(N, C), nt.Gaussian(covariance=COVARIANCE)),
        }[kind]
        self.probe = nt.Probe(self.x, self.y, likelihood=likelihood)

    def outcomes(self, f):
        """All targets (K, ...) of one sample of any weight, and their chances (K,)."""
        if self.kind == "categorical":
            return torch.arange(C), f.softmax(0)
        if self.kind in ("bernoulli", "poisson"):
            most = 22 if self.kind == "poisson" else 2
            ys = torch.tensor(list(itertools.product(range(most), repeat=C))).double()
            chances = (-self.minus_log_p(f.expand(len(ys), -1), ys)).exp()
            assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
            return ys, chances
        # Gauss-Hermite with two points an axis is exact for the outer products of scores.
        points = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=C))).double()
        chances = torch.full((len(points),), 2.0**-C).double()
        return f + points @ torch.linalg.cholesky(self.covariance).T, chances

    @property
    def covariance(self):
        return COVARIANCE if self.kind == "covariance" else torch.eye(C).double()

    def minus_log_p(self, f, y):
        """(K,) by torch's distributions."""
        if self.kind == "categorical":
            return -Categorical(logits=f).log_prob(y)
        if self.kind == "bernoulli":
            return F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1)
        if self.kind == "poisson":
            return -Poisson(f.exp()).log_prob(y).sum(1)
        return -MultivariateNormal(f, self.covariance).log_prob(y)

    def expected(self, f):
        """sum_y p(y) g g^T of the gradients g of log p by one sample's outputs, by autograd."""
        ys, chances = self.outcomes(f)
        z = f.detach().repeat(len(ys), 1).requires_grad_()
        (g,) = torch.autograd.grad(self.minus_log_p(z, ys).sum(), z)
        return torch.einsum("k,kc,kd->cd", chances, g, g)

    def jacobian(self):
        rows = []
        for n in range(N):
            for output in self.model(self.x[n : n + 1])[0]:
                g = torch.autograd.grad(output, list(self.model.parameters()), retain_graph=True)
                rows.append(torch.cat([part.flatten() for part in g]))
        return torch.stack(rows).unflatten(0, (N, C))

    def fisher(self):
        """(N, P, P): of each sample."""
        outputs = self.model(self.x).detach()
        m = torch.stack([self.expected(f) for f in outputs])
        return torch.einsum("ncp,ncd,ndq->npq", self.jacobian(), m, self.jacobian())


KINDS = ["categorical", "bernoulli", "poisson", "gaussian", "covariance"]


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    case = Case(request.param)
    case.samples = case.fisher()
    case.matrix = case.samples.mean(0)
    case.found = measured(case.model, case.probe, *FISHER)
    return case


def spans(model):
    start = 0
    for name, p in model.named_parameters():
        yield name, slice(start, start + p.numel())
        start += p.numel()


@pytest.mark.parametrize("name", ["fisher/trace", "fisher/trace_ntk"])
def test_trace_and_its_error(case, name):
    traces = case.samples.diagonal(dim1=1, dim2=2).sum(1).numpy()
    assert case.found[name].value == pytest.approx(traces.mean(), rel=1e-11)
    error = traces.std(ddof=1) / N**0.5
    assert case.found[name].standard_error == pytest.approx(error, rel=1e-8, abs=1e-12)


def test_trace_of_each_layer_and_its_error(case):
    found = case.found["fisher/trace_per_layer"]
    assert list(found.coordinates["layer"]) == [name for name, _ in spans(case.model)]
    for i, (_, span) in enumerate(spans(case.model)):
        traces = case.samples[:, span, span].diagonal(dim1=1, dim2=2).sum(1).numpy()
        assert found.value[i] == pytest.approx(traces.mean(), rel=1e-11)
        error = traces.std(ddof=1) / N**0.5
        assert found.standard_error[i] == pytest.approx(error, rel=1e-8, abs=1e-12)
    assert found.value.sum() == pytest.approx(float(case.found["fisher/trace"].value), rel=1e-12)


def test_diagonal(case):
    found = case.found["fisher/diagonal"].value
    np.testing.assert_allclose(found, case.matrix.diagonal().numpy(), rtol=1e-10, atol=1e-13)
    assert found.sum() == pytest.approx(float(case.found["fisher/trace"].value), rel=1e-12)


def test_spectrum_is_that_of_the_matrix(case):
    true = torch.linalg.eigvalsh(case.matrix).flip(0).numpy()
    found = case.found["fisher/spectrum"].value
    assert found.shape == (N * C,)
    np.testing.assert_allclose(found, true[: N * C], rtol=1e-9, atol=1e-12)
    assert np.abs(true[N * C :]).max() < 1e-12  # nothing is left out


def test_spectra_of_blocks_are_those_of_the_matrixs(case):
    found = case.found["fisher/block_spectrum"]
    modes = found.attributes["modes"]
    assert found.value.shape == (4, modes) == (4, 8)
    for row, (_, span) in zip(found.value, spans(case.model), strict=True):
        true = torch.linalg.eigvalsh(case.matrix[span, span]).flip(0)[:modes].numpy()
        np.testing.assert_allclose(row[: len(true)], true, rtol=1e-9, atol=1e-12)
        assert np.abs(row[len(true) :]).max(initial=0) < 1e-12  # a bias of few parameters


def test_empirical_trace_and_diagonal(case):
    squares = []
    for n in range(N):
        loss = case.minus_log_p(case.model(case.x[n : n + 1]), case.y[n : n + 1]).sum()
        g = torch.autograd.grad(loss, list(case.model.parameters()))
        squares.append(torch.cat([part.flatten() for part in g]).square())
    squares = torch.stack(squares).numpy()
    found = case.found["fisher/diagonal_empirical"].value
    np.testing.assert_allclose(found, squares.mean(0), rtol=1e-10, atol=1e-13)
    trace = case.found["fisher/trace_empirical"]
    assert trace.value == pytest.approx(squares.sum(1).mean(), rel=1e-11)
    error = squares.sum(1).std(ddof=1) / N**0.5
    assert trace.standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("kind", ["bernoulli", "poisson", "covariance"])
def test_drawn_trace_is_unbiased_and_its_error_calibrated(kind):
    """Of 300 repeats; categorical and unit Gaussian ones are in test_estimators."""
    case = Case(kind)
    true = float(case.fisher().mean(0).trace())
    tracer, records = nt.Tracer(case.probe, "fisher/trace_mc", on_error="raise"), []
    for step in range(300):
        records.append(tracer(case.model, step)[0])
    assert records[0].attributes["n_probes"] == 8
    found = np.array([float(r.value) for r in records])
    errors = np.array([float(r.standard_error) for r in records])
    assert abs(found.mean() - true) < 3.5 * found.std(ddof=1) / 300**0.5
    assert np.mean(errors**2) / found.var(ddof=1) == pytest.approx(1, abs=0.25)
    assert 0.55 < np.mean(np.abs(found - true) < errors) < 0.80


@pytest.mark.parametrize(
    "needs", [["fisher/trace"], ["fisher/trace_per_layer"], ["fisher/spectrum"]]
)
@pytest.mark.parametrize("beside", [[], ["ntk/trace"], ["ntk/trace_per_layer", "hessian"]])
def test_what_is_asked_for_beside_changes_no_number(needs, beside):
    case = Case("categorical")
    case.model[1] = nn.ReLU()
    alone, together = (measured(case.model, case.probe, *needs, *b) for b in ([], beside))
    for name in needs:
        np.testing.assert_allclose(together[name].value, alone[name].value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("most", [1, 256])
def test_sequences_and_many_outputs(most, monkeypatch):
    """By one pass for two traces, or by weighted scores, which is taken where outputs are many."""
    monkeypatch.setattr(Statistics, "exact_outputs", most)
    member = zoo.build("mlp")
    x, f = member.batch, member.model(member.batch).detach()
    probe = nt.Probe(x, torch.zeros(len(f), dtype=torch.long))
    found = measured(member.model, probe, *FISHER, "ntk/trace")
    j = nt.jacobian(member.model(x), member.model)
    j = torch.stack([j.rows(n) for n in range(len(f))])
    p = f.softmax(1)
    m = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    true = float(torch.einsum("ncp,ncd,ndp->", j, m, j)) / len(f)
    for name in ("fisher/trace", "fisher/trace_ntk"):
        assert found[name].value == pytest.approx(true, rel=1e-11)
    assert found["fisher/trace_per_layer"].value.sum() == pytest.approx(true, rel=1e-11)


# Gauge --------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Logits with 5 x_1 w of the first weight added to all of a sample: f -> f + c(x) 1."""

    def __init__(self, model, axis=1, strength=5.0):
        super().__init__()
        self.model, self.axis, self.strength = model, axis, strength

    def forward(self, x):
        shift = self.strength * x[:, :1] * next(self.model.parameters()).flatten()[0]
        f = self.model(x)
        return f + shift.view(-1, *[1] * (f.dim() - 1))


class Positions(nn.Module):
    """Logits of classes at two positions, with the classes on a given axis."""

    def __init__(self, axis):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2 * C)).double()
        self.axis = axis

    def forward(self, x):
        f = self.model(x).view(len(x), 2, C)
        return f.mT if self.axis == 1 else f


@pytest.mark.parametrize("layout", ["classes", "classes-first", "classes-last"])
def test_fisher_and_centred_trace_do_not_see_a_shift_of_all_logits(layout):
    x = normal(N, 4)
    if layout == "classes":
        model, y = Case("categorical").model, torch.arange(N) % C
    else:
        model, y = Positions(1 if layout == "classes-first" else 2), torch.zeros(N, 2).long()
    probe = nt.Probe(x, y)
    names = [*FISHER, "ntk/trace", "ntk/trace_centred"]
    before, after = (measured(m, probe, *names) for m in (model, Shifted(model)))
    assert after["ntk/trace"].value > 1.1 * before["ntk/trace"].value
    for name in [
        *(f"fisher/trace{end}" for end in ("", "_per_layer", "_ntk", "_mc", "_empirical")),
        *("fisher/diagonal", "fisher/spectrum", "fisher/block_spectrum", "ntk/trace_centred"),
    ]:
        np.testing.assert_allclose(after[name].value, before[name].value, rtol=1e-8, atol=1e-11)

    outputs = model(x)
    j = nt.jacobian(outputs, model)
    j = torch.stack([j.rows(n) for n in range(N)]).view(*outputs.shape, -1)
    axis = 1 if layout != "classes-last" else 2
    true = float((j - j.mean(axis, keepdim=True)).square().sum())
    assert before["ntk/trace_centred"].value == pytest.approx(true, rel=1e-11)
    assert true < before["ntk/trace"].value


def test_numbers_of_an_independent_script():
    """That script contracts Jacobians by torch.func.jacrev; N = 20, C = 4, seed 0."""
    torch.manual_seed(0)
    x, first, second = normal(20, 6), normal(16, 6) / 6**0.5, normal(4, 16) / 4
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4, bias=False)).double()
    model.load_state_dict({"0.weight": first, "0.bias": torch.zeros(16), "2.weight": second})
    for network, kernel in [(model, 44.02), (Shifted(model), 175.62)]:
        probe = nt.Probe(x, torch.zeros(20).long())
        found = measured(network, probe, *FISHER, "ntk/trace", "ntk/trace_centred")
        for name in ("fisher/trace", "fisher/trace_ntk"):
            assert found[name].value == pytest.approx(7.831481236008, abs=1e-11)
        assert found["fisher/spectrum"].value.sum() == pytest.approx(7.831481236008, abs=1e-11)
        assert found["ntk/trace"].value / 20 == pytest.approx(kernel, abs=0.005)
        assert found["ntk/trace_centred"].value / 20 == pytest.approx(34.437686, abs=5e-7)


def test_a_shift_of_logits_is_seen_where_outputs_are_no_classes():
    case = Case("bernoulli")
    before = measured(case.model, case.probe, "fisher/trace")["fisher/trace"].value
    after = measured(Shifted(case.model), case.probe, "fisher/trace")["fisher/trace"].value
    assert abs(after - before) > 0.1 * before


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_centred_trace_is_for_classes_alone(kind):
    case = Case(kind)
    found = measured(case.model, case.probe, "ntk/trace", "ntk/trace_centred")
    assert "ntk/trace_centred" not in found
    untold = measured(case.model, nt.Probe(case.x), "ntk/trace", "ntk/trace_centred")
    assert "ntk/trace_centred" not in untold


def test_centred_trace_of_many_outputs_is_an_estimate(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 16)).double()
    probe = nt.Probe(normal(N, 4), torch.arange(N))
    exact = measured(model, probe, "ntk/trace_centred")["ntk/trace_centred"]
    assert exact.standard_error is None
    monkeypatch.setattr(Statistics, "exact_outputs", 1)
    monkeypatch.setattr(Statistics, "relative_error", 1.0)
    z = []
    for seed in range(60):
        found = measured(model, probe, "ntk/trace_centred", seed=seed)["ntk/trace_centred"]
        assert found.attributes == {**found.attributes, "method": "hutchinson", "n_probes": 8}
        z.append(float((found.value - exact.value) / found.standard_error))
    assert abs(np.mean(z)) < 4 / 60**0.5
    assert 0.7 < np.std(z) < 1.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), scale=st.floats(0.01, 30))
def test_softmax_fisher_is_at_most_half_the_centred_kernel(seed, classes, scale):
    torch.manual_seed(seed)
    model = nn.Linear(3, classes).double()
    with torch.no_grad():
        model.weight.mul_(scale)
    probe = nt.Probe(normal(4, 3), torch.zeros(4, dtype=torch.long))
    found = measured(model, probe, "fisher/trace", "ntk/trace", "ntk/trace_centred")
    trace, whole, centred = (float(r.value) for r in list(found.values())[:3])
    assert 0 < trace <= centred / 8 * (1 + 1e-12)
    assert centred < whole


# Closed forms -------------------------------------------------------------------------------------


def test_linear_regression_at_a_given_variance_in_closed_form():
    """F = (1 / sigma^2) (x x^T mean): a covariance of 4 quarters it, rather than multiplying it."""
    model, x = nn.Linear(4, 1, bias=False).double(), normal(N, 4)
    probe = nt.Probe(x, normal(N, 1), likelihood=nt.Gaussian(covariance=4.0))
    found = measured(model, probe, *FISHER)
    true = (x.T @ x / N / 4).numpy()
    assert found["fisher/trace"].value == pytest.approx(np.trace(true), rel=1e-13)
    np.testing.assert_allclose(found["fisher/diagonal"].value, np.diag(true), rtol=1e-12)
    np.testing.assert_allclose(
        found["fisher/spectrum"].value[:4], np.linalg.eigvalsh(true)[::-1], rtol=1e-10
    )


def test_logistic_and_poisson_regression_in_closed_form():
    model, x = nn.Linear(4, 1, bias=False).double(), normal(N, 4)
    f = (x @ model.weight.detach().T)[:, 0]
    for name, information in [
        ("bernoulli", f.sigmoid() * (-f).sigmoid()),
        ("poisson", f.exp()),
    ]:
        probe = nt.Probe(x, torch.ones(N, 1), likelihood=name)
        found = measured(model, probe, *FISHER)
        true = torch.einsum("n,np,nq->pq", information, x, x).numpy() / N
        assert found["fisher/trace"].value == pytest.approx(np.trace(true), rel=1e-13)
        np.testing.assert_allclose(found["fisher/diagonal"].value, np.diag(true), rtol=1e-12)


def test_two_classes_are_one_label():
    """Logits (z, 0) as classes and z as a label: the same loss, Fisher information and Hessian."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double(), normal(N, 4)

    def paired(model, x):
        z = model(x)
        return torch.cat([z, 0 * z.detach()], 1)

    label = torch.arange(N) % 2
    one = nt.Probe(x, label[:, None], likelihood="bernoulli")
    two = nt.Probe(x, 1 - label, forward=paired)
    names = ["loss/mean", "fisher/trace", "fisher/trace_empirical", "fisher/diagonal", "hessian"]
    first, second = measured(model, one, *names), measured(model, two, *names)
    for name in [*names[:-1], "hessian/trace"]:
        np.testing.assert_allclose(first[name].value, second[name].value, rtol=1e-10, atol=1e-14)


def test_measures_say_what_was_assumed():
    case = Case("covariance")
    found = measured(case.model, case.probe, *FISHER)
    for name in found:
        if name.startswith("fisher/"):
            assert found[name].attributes["likelihood"] == "gaussian"
            assert "without the log-determinant" in found[name].attributes["loss"]
    assert "same for centred logits" in found["fisher/trace"].attributes["convention"]


class Laplace:
    """A likelihood from outside the package: its Fisher metric is no Hessian of its loss."""

    name, loss = "laplace", "absolute error, summed over outputs"

    def losses(self, outputs, targets):
        return (outputs - targets).abs().sum(1)

    def metric(self, outputs):
        return torch.eye(outputs.shape[1]).to(outputs).expand(len(outputs), -1, -1)

    def weighted_scores(self, outputs):
        return self.metric(outputs).movedim(1, 0)

    def sampled_scores(self, outputs, count, generator):
        shape = (count, *outputs.shape)
        return 2.0 * torch.randint(0, 2, shape, generator=generator).to(outputs) - 1


def test_a_likelihood_from_outside_has_a_fisher_but_no_exact_trace_of_the_hessian():
    model, x = nn.Linear(4, C).double(), normal(N, 4)
    probe = nt.Probe(x, normal(N, C), likelihood=Laplace())
    found = measured(model, probe, *FISHER, "loss/mean")
    true = C * float((x.square().sum(1) + 1).mean())
    assert found["fisher/trace"].value == pytest.approx(true, rel=1e-12)
    # each outcome has scores of the same squares: but for signs, nothing varies
    assert abs(found["fisher/trace_mc"].value - true) < 1e-12 * true
    assert found["fisher/trace"].attributes["likelihood"] == "laplace"
    trace = measured(model, probe, "hessian/trace")["hessian/trace"]
    assert trace.attributes["error_of"] == "estimator"
    assert abs(trace.value) < 1e-9 * true  # moduli do not bend


def test_error_of_one_layer_by_hand():
    # two samples of 1 and 3 in one layer, 2 and 2 in the other
    shares = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 2.0])}
    found = fisher.trace_per_layer(shares)
    assert found.value.tolist() == [2, 2]
    assert found.standard_error.tolist() == pytest.approx([math.sqrt(2) / math.sqrt(2), 0])
    assert found.coordinates == {"layer": ["a", "b"]}
