"""Per-sample gradients from the scalar loss of a training step, against plain autograd."""

import copy
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nettrace as nt
from nettrace.certificate import certify
from nettrace.reduction import tape_of, terms_of

N, T, V = 4, 6, 11


def rows_of(losses, parameters):
    """(N, P) by one backward pass a sample."""
    j = oracle.jacobian(losses.unsqueeze(1), dict(enumerate(parameters)))
    return torch.cat([share[:, 0] for share in j.values()], 1)


def assert_same(jacobian, rows, tolerance=1e-10):
    """All that a Jacobian of losses gives is what the rows (N, P) say."""
    for found, true in (
        (jacobian.norms(), rows.norm(dim=1)),
        (jacobian.gram(), rows @ rows.T),
        (jacobian.mean(), rows.mean(0)),
        (torch.stack([jacobian.rows(n) for n in range(len(rows))]), rows),
        (sum(s.square() for s in jacobian.norms(per_layer=True).values()), rows.square().sum(1)),
        (sum(jacobian.gram(per_layer=True).values()), rows @ rows.T),
        (torch.cat([g.flatten() for g in jacobian.mean(per_layer=True).values()]), rows.mean(0)),
        (sum(jacobian.jvp(jacobian.mean(per_layer=True)).values()), rows @ rows.mean(0)),
    ):
        assert oracle.relative_error(found, true) < tolerance


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def penalty(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def hidden(model, x):
    return model[1](model[0](x))


HOT = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]).double()
LOSSES = {
    "cross-entropy": lambda m, x, y: F.cross_entropy(m(x), y),
    "label smoothing": lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    "classes by probability": lambda m, x, y: F.cross_entropy(m(x), HOT[y] * 0.9 + 0.03),
    "negative log-likelihood": lambda m, x, y: F.nll_loss(m(x).log_softmax(1), y),
    "squared error": lambda m, x, y: F.mse_loss(m(x), HOT[y]),
    "squared error by hand": lambda m, x, y: ((m(x) - HOT[y]) ** 2).sum(1).mean() / 2,
    "absolute error": lambda m, x, y: F.l1_loss(m(x), HOT[y]),
    "Huber": lambda m, x, y: F.huber_loss(m(x), HOT[y], delta=0.3),
    "smooth absolute": lambda m, x, y: F.smooth_l1_loss(m(x), HOT[y], beta=0.3),
    "binary with logits": lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), HOT[y]),
    "binary": lambda m, x, y: F.binary_cross_entropy(m(x).sigmoid(), HOT[y]),
    "divergence": lambda m, x, y: F.kl_div(
        m(x).log_softmax(1), HOT[y] * 0.7 + 0.1, reduction="batchmean"
    ),
    "Poisson": lambda m, x, y: F.poisson_nll_loss(m(x), HOT[y]),
    "normal": lambda m, x, y: F.gaussian_nll_loss(m(x), HOT[y], 0.1 + hidden(m, x)[:, :3].square()),
    "margin": lambda m, x, y: F.multi_margin_loss(m(x), y),
    "several margins": lambda m, x, y: F.multilabel_soft_margin_loss(m(x), HOT[y]),
    "by hand": lambda m, x, y: -(HOT[y] * m(x).log_softmax(-1)).sum() / len(x),
    "gathered": lambda m, x, y: -m(x).log_softmax(1).gather(1, y[:, None]).mean(),
    "picked in a loop": lambda m, x, y: (
        sum(row[k] for row, k in zip(m(x).exp(), y, strict=True)) / len(x)
    ),
    "penalised": lambda m, x, y: F.cross_entropy(m(x), y) + penalty(m),
    "penalised twice": lambda m, x, y: (
        F.cross_entropy(m(x), y) + (p := penalty(m)) - 2 * p.square() + p.exp()
    ),
    "penalised samples": lambda m, x, y: (m(x).square().sum(1) + penalty(m)).mean(),
    "two terms": lambda m, x, y: F.cross_entropy(m(x), y) + 0.3 * hidden(m, x).square().mean(),
    "subtracted": lambda m, x, y: F.cross_entropy(m(x), y) - 0.3 * m(x).logsumexp(1).mean(),
    "stacked": lambda m, x, y: torch.stack([F.cross_entropy(m(x), y), m(x).sin().mean()]).mean(),
    "means in another order": lambda m, x, y: m(x).sin().mean(0).sum(),
    "linear": lambda m, x, y: m(x).mean(),
    "projected": lambda m, x, y: (m(x).sin() @ torch.arange(3.0).double()).mean(),
    "in single precision": lambda m, x, y: m(x).square().mean().float().double() * 2,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_each_samples_share_is_what_it_gives_alone(name, samples, mlp):
    x, y = torch.randn(samples, 6).double(), torch.arange(samples) % 3
    loss = LOSSES[name]
    alone = torch.stack([loss(mlp, x[n : n + 1], y[n : n + 1]) for n in range(samples)])
    jacobian = nt.loss_jacobian(loss(mlp, x, y), mlp, samples=samples)
    tolerance = 1e-6 if "single" in name else 1e-10
    assert_same(jacobian, rows_of(alone, mlp.parameters()), tolerance)
    assert certify(jacobian.shares).error < 1e-6


class Weighted(nn.Module):
    """Two losses with weights that are learned, as for uncertainties of several tasks."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(0.3))
        self.other = nn.Parameter(torch.tensor(-0.2))

    def forward(self, x, y):
        first = F.cross_entropy(self.net(x), y, reduction="none")
        second = self.net(x).square().mean(1)
        first = (first * (-self.scale).exp()).mean() + self.scale
        return self.other + first + (second * (-self.other).exp()).mean() - self.other * self.scale


def test_weights_of_losses_are_learned_beside_a_penalty_on_them():
    torch.manual_seed(0)
    model, x, y = Weighted().double(), torch.randn(5, 6).double(), torch.arange(5) % 3
    alone = torch.stack([model(x[n : n + 1], y[n : n + 1]) for n in range(5)])
    loss = model(x, y)
    assert_same(nt.loss_jacobian(loss, model, samples=5), rows_of(alone, model.parameters()))
    terms = terms_of(loss, tape_of(loss, 5, dict(model.named_parameters()), ()))
    assert [term.name for term in terms] == ["penalty", "Mean", "Mean 2"]


def test_one_root_behind_another_is_counted_once(mlp):
    x = torch.randn(5, 6).double()

    def loss(x):
        h = hidden(mlp, x)
        return h.mean() + h.exp().mean() + mlp[2](h.exp()).square().mean()

    alone = torch.stack([loss(x[n : n + 1]) for n in range(5)])
    assert_same(nt.loss_jacobian(loss(x), mlp, samples=5), rows_of(alone, mlp.parameters()))


def test_a_sum_gives_the_gradients_of_what_is_summed(mlp):
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 3
    losses = F.cross_entropy(mlp(x), y, reduction="none")
    jacobian = nt.loss_jacobian(losses.sum(), mlp, samples=5, reduction="sum")
    assert_same(jacobian, rows_of(losses, mlp.parameters()))
    summed = nt.loss_jacobian(losses.sum() + penalty(mlp), mlp, samples=5, reduction="sum")
    gradient = torch.autograd.grad(
        losses.sum() + penalty(mlp), list(mlp.parameters()), retain_graph=True
    )
    flat = torch.cat([g.flatten() for g in gradient])
    assert oracle.relative_error(5 * summed.mean(), flat) < 1e-10


@pytest.mark.parametrize(
    "weights", [{"weight": torch.tensor([0.2, 1.0, 3.0]).double()}, {"ignore_index": 1}]
)
def test_of_a_weighted_mean_the_rows_have_its_gradient_as_their_mean(weights, mlp):
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 3
    loss = F.cross_entropy(mlp(x), y, **weights)
    each = F.cross_entropy(mlp(x), y, **weights, reduction="none")
    total = weights["weight"][y].sum() if "weight" in weights else (y != 1).sum()
    assert_same(nt.loss_jacobian(loss, mlp, samples=5), rows_of(each * 5 / total, mlp.parameters()))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, t):
        return self.head(self.layer(self.embedding(t)))


def masked(logits, t):
    each = F.cross_entropy(logits.view(-1, V), t.view(-1), reduction="none")
    return each[(torch.arange(T) != 2).repeat(len(t))].mean()


OF_TOKENS = {
    "flat": lambda logits, t: F.cross_entropy(logits.view(-1, V), t.view(-1)),
    "the next": lambda logits, t: F.cross_entropy(
        logits[:, :-1].reshape(-1, V), t[:, 1:].reshape(-1)
    ),
    "classes second": lambda logits, t: F.cross_entropy(logits.transpose(1, 2), t),
    "one mask for all": masked,
    "a sum over tokens": lambda logits, t: -logits.log_softmax(-1)[..., 0].sum(1).mean(),
}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_tokens_belong_to_their_texts(name):
    torch.manual_seed(0)
    model, t = Language().double(), torch.randint(0, V, (N, T))
    loss = OF_TOKENS[name]
    alone = torch.stack([loss(model(t[n : n + 1]), t[n : n + 1]) for n in range(N)])
    jacobian = nt.loss_jacobian(loss(model(t), t), model, samples=N)
    assert_same(jacobian, rows_of(alone, model.parameters()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "compiled" in n else ()) for n in zoo.ZOO],
)
def test_every_member_of_the_zoo_by_its_mean_loss(name):
    member = zoo.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what old parts of torch say of each other
        losses = zoo.losses(member.forward(member.model, member.batch))
    loss = losses.mean()
    try:
        jacobian = nt.loss_jacobian(loss, member.target, samples=len(losses))
        norms = jacobian.norms()
    except nt.CoupledSamplesError:
        assert member.coupled
        return
    if jacobian.holds_statistics:
        assert member.coupled  # see below for what is right then
        return
    assert not member.coupled
    rows = rows_of(losses, member.parameters.values())
    tolerance = max(member.tolerance, 1e-10)
    assert oracle.relative_error(norms.double(), rows.double().norm(dim=1)) < tolerance
    assert oracle.relative_error(jacobian.gram().double(), (rows @ rows.T).double()) < tolerance


class Normalised(nn.Module):
    """Batch normalisation of both kinds, and instance normalisation, which is within samples."""

    def __init__(self):
        super().__init__()
        self.convolution, self.images = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.instances = nn.InstanceNorm2d(4, affine=True)
        self.linear, self.vectors = nn.Linear(4 * 16, 6), nn.BatchNorm1d(6, affine=False)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = self.instances(F.relu(self.images(self.convolution(x))))
        return self.out(torch.tanh(self.vectors(self.linear(h.flatten(1)))))


def test_statistics_of_a_batch_are_held_constant_and_the_training_goes_on_without():
    torch.manual_seed(0)
    model, x, y = Normalised().double(), torch.randn(5, 2, 4, 4).double(), torch.arange(5) % 3
    held, seen = copy.deepcopy(model), {}
    for name in ("images", "vectors"):
        getattr(model, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].detach()})
        )
    loss = F.cross_entropy(model(x), y)
    for name, inputs in seen.items():
        norm, dims = getattr(held, name).eval(), [0, 2, 3][: inputs.dim() - 1]
        norm.running_mean.copy_(inputs.mean(dims))
        norm.running_var.copy_(inputs.var(dims, correction=0))
    alone = torch.stack([F.cross_entropy(held(x[n : n + 1]), y[n : n + 1]) for n in range(5)])
    before = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    jacobian = nt.loss_jacobian(loss, model, samples=5)
    assert_same(jacobian, rows_of(alone, held.parameters()))
    assert jacobian.holds_statistics
    after = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def contrastive(model, x):
    z = F.normalize(model(x), dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(x)))


def differences(outputs):
    return (outputs - outputs.roll(1, 0)).square().mean()


def two_views(model, x):
    """In one batch, one after the other."""
    return F.cross_entropy(model(torch.cat([x, x.flip(1)])), torch.arange(10) % 3)


COUPLED = {
    "a square of the mean": (lambda m, x: m(x).square().mean() ** 2, "PowBackward0"),
    "a product of means": (lambda m, x: m(x).mean() * m(x).square().mean(), "MulBackward0"),
    "a quotient of means": (lambda m, x: m(x).mean() / m(x).square().mean(), "DivBackward0"),
    "a deviation": (lambda m, x: m(x).std(), "StdBackward0"),
    "a norm": (lambda m, x: m(x).norm(), "NormBackward"),
    "a maximum": (lambda m, x: m(x).max(), "MaxBackward1"),
    "over the batch": (lambda m, x: m(x)[:, 0].logsumexp(0), "LogsumexpBackward0"),
    "contrasts": (contrastive, "samples are coupled"),
    "differences": (lambda m, x: differences(m(x)), "samples are coupled"),
    "two views of each": (lambda m, x: two_views(m, x), "10 rows for 5 samples"),
    "of single numbers": (lambda m, x: sum(row[0].exp() for row in m(x)), "ExpBackward0"),
    "of none": (lambda m, x: penalty(m), "parameters alone"),
    "a parameter beside numbers": (
        lambda m, x: torch.cat([m(x).mean(1), m[2].bias]).mean(),
        "adds a parameter itself",
    ),
    "a weight of the loss": (lambda m, x: m(x).mean() * m[0].bias.sum(), "MulBackward0"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_no_sum_over_samples_is_refused_with_the_reason(name, mlp):
    loss, why = COUPLED[name]
    x = torch.randn(5, 6).double()
    with pytest.raises(nt.CoupledSamplesError, match=why):
        nt.loss_jacobian(loss(mlp, x), mlp, samples=5).norms()


def test_wrong_numbers_are_refused(mlp):
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 3
    loss = F.cross_entropy(mlp(x), y)
    with pytest.raises(ValueError, match=r"of shape \(N,\).*samples=N"):
        nt.loss_jacobian(loss, mlp)
    with pytest.raises(ValueError, match="at least one sample, got samples=0"):
        nt.loss_jacobian(loss, mlp, samples=0)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        nt.loss_jacobian(loss, mlp, samples=5, reduction="none")
    with pytest.raises(ValueError, match=r"rows.*one number"):
        nt.loss_jacobian(loss, mlp, samples=5, coupled="rows")
    with pytest.raises(ValueError, match="expected 4 losses, got 5"):
        nt.loss_jacobian(F.cross_entropy(mlp(x), y, reduction="none"), mlp, samples=4)
    with pytest.raises(nt.CoupledSamplesError, match="not a mean or sum over 3 samples"):
        nt.loss_jacobian(loss, mlp, samples=3).norms()
    with pytest.raises(ValueError, match="the loss is NaN"):
        nt.loss_jacobian(loss * torch.nan, mlp, samples=5)


# Arithmetic that nobody thought of ---------------------------------------------------------------

# Each takes values in which samples are apart along axis 0, and a number of samples.
STEPS = {
    "scaled": lambda v: 0.7 * v,
    "negated": lambda v: 1 - v,
    "weighted": lambda v: v * torch.linspace(-1, 1, v[0].numel()).double().view(v.shape[1:]),
    "doubled": lambda v: torch.stack([v, 2 * v], -1),
    "joined": lambda v: torch.cat([v, -0.5 * v], -1),
    "last summed": lambda v: v.sum(-1, keepdim=True),
    "last averaged": lambda v: v.mean(-1, keepdim=True),
    "cut": lambda v: v[..., : max(1, v.shape[-1] - 1)],
    "flat": lambda v: v.flatten(1),
    "turned": lambda v: v.movedim(-1, 1),
    "squashed": lambda v: v.tanh(),
}
ENDS = {
    "mean": lambda v: v.mean(),
    "sum": lambda v: v.sum() / len(v),
    "first axis last": lambda v: v.flatten(1).sum(1).mean(),
    "first axis first": lambda v: v.mean(0).sum(),
    "one by one": lambda v: sum(part.sum() for part in v) / len(v),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(sorted(STEPS)), max_size=4), st.sampled_from(sorted(ENDS))
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 4),
    st.booleans(),
)
def test_any_arithmetic_that_keeps_samples_apart(terms, samples, penalised):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def loss(x):
        total = penalty(model) if penalised else 0
        for steps, end in terms:
            values = model(x).cos()
            for step in steps:
                values = STEPS[step](values)
            total = total + ENDS[end](values)
        return total

    x = torch.randn(samples, 3).double()
    alone = torch.stack([loss(x[n : n + 1]) for n in range(samples)])
    rows = rows_of(alone, model.parameters())
    found = nt.loss_jacobian(loss(x), model, samples=samples)
    # Squares, as terms may cancel each other.
    squares = rows.square().sum(1)
    assert torch.allclose(found.norms().square(), squares, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.gram(), rows @ rows.T, rtol=1e-10, atol=1e-12)


def test_sparse_gradients_of_embeddings_are_those_of_dense_ones():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, sparse=sparse)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 3)).double()
        outputs = model(torch.arange(15).view(5, 3) % 9)
        jacobian = nt.jacobian(outputs, model)
        losses = nt.loss_jacobian(outputs.square().mean(), model, samples=5)
        found.append([jacobian.vjp(torch.ones(5, 3)), jacobian.rows(1), losses.mean()])
        assert certify(jacobian).error < 1e-6
    for dense, sparse in zip(*found, strict=True):
        assert torch.equal(dense, sparse)


# Terms -------------------------------------------------------------------------------------------


def test_the_terms_of_a_loss_add_up_to_it(mlp):
    x, y = torch.randn(5, 6).double(), torch.arange(5) % 3
    parts = [
        F.cross_entropy(mlp(x), y),
        0.3 * mlp(x).square().mean(),
        -(mlp(x).sin().mean() / 2),
        penalty(mlp),
    ]
    loss = sum(parts) / 4
    parameters = dict(mlp.named_parameters())
    terms = terms_of(loss, tape_of(loss, 5, parameters, ()))
    assert [term.name for term in terms] == ["NllLoss", "Mean", "Mean 2", "penalty"]
    for term, part in zip(terms, parts, strict=True):
        found = torch.autograd.grad(
            term.edges, list(parameters.values()), term.flows, retain_graph=True
        )
        true = torch.autograd.grad(part / 4, list(parameters.values()), retain_graph=True)
        for a, b in zip(found, true, strict=True):
            assert oracle.relative_error(a, b) < 1e-10
