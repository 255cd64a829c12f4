"""The measures against closed forms, numbers worked out by hand, and plain autograd."""

import copy
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import digamma
from torch import nn

import nettrace as nt
from nettrace.measures import spectrum

N, C = 5, 3


def measured(model, probe, *names):
    """The records of some measures by name; whatever goes wrong is raised."""
    records = nt.Tracer(probe, names, on_error="raise", max_seconds=None)(model, step=0)
    return {r.name: r for r in records}


def number(model, probe, name):
    return float(measured(model, probe, name)[name].value)


def linear(inputs, outputs, bias=False):
    return nn.Linear(inputs, outputs, bias=bias).double()


def mlp(inputs=4, outputs=C):
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def squared_gradient(model, scalar):
    """Plain autograd, flat: sum of squares of d scalar / d parameters."""
    return sum(float(g.square().sum()) for g in gradient(model, scalar))


def gradient(model, scalar):
    return torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)


def jacobian_of(model, x, forward=zoo.call):
    """(N, C, P), one sample and one output at a time."""
    rows = []
    for n in range(len(x)):
        for output in forward(model, x[n : n + 1])[0]:
            g = torch.autograd.grad(
                output, list(model.parameters()), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([part.flatten() for part in g]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


def numpy_entropy(kernel):
    p = np.linalg.eigvalsh(np.asarray(kernel))
    p = p[p > 1e-12 * p.max()] / p.sum()
    return -(p * np.log(p)).sum()


# The kernel in closed form ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 4])
def test_linear_kernel_is_gram_of_inputs(bias, outputs):
    model, x = linear(7, outputs, bias), normal(N, 7)
    true = torch.einsum("nm,cd->ncmd", x @ x.T + bias, torch.eye(outputs).double())
    found = measured(model, nt.Probe(x), "ntk/gram", "ntk/trace")
    assert oracle.relative_error(nt.jacobian(model(x), model).gram(), true) < 1e-14
    assert oracle.relative_error(torch.tensor(found["ntk/gram"].value), true) < 1e-14
    trace = outputs * sum(float(row @ row) + bias for row in x)
    assert found["ntk/trace"].value == pytest.approx(trace, rel=1e-14)


def test_two_layer_linear_kernel_in_closed_form():
    first, second = linear(4, 6), linear(6, C)
    x, w1, w2 = normal(N, 4), first.weight.detach(), second.weight.detach()
    probe, model = nt.Probe(x), nn.Sequential(first, second)
    hidden = x @ w1.T
    true = torch.einsum("nm,cd->ncmd", x @ x.T, w2 @ w2.T)
    true += torch.einsum("nm,cd->ncmd", hidden @ hidden.T, torch.eye(C).double())
    found = measured(model, probe, "ntk/gram", "ntk/trace_per_layer")
    assert oracle.relative_error(torch.tensor(found["ntk/gram"].value), true) < 1e-14
    layers = found["ntk/trace_per_layer"]
    assert layers.coordinates == {"layer": ["0.weight", "1.weight"]}
    shares = [float(x.square().sum() * w2.square().sum()), C * float(hidden.square().sum())]
    assert layers.value == pytest.approx(shares, rel=1e-13)


# The kernel at infinite width ---------------------------------------------------------------------


def arc_cosine_kernel(x, layers, sw2=2.0):
    """The kernel of an infinitely wide ReLU network with `layers` hidden layers (Cho and Saul)."""
    sigma = sw2 * x @ x.T / x.shape[1]
    theta = sigma.clone()
    for _ in range(layers):
        norms = sigma.diagonal().sqrt()
        scale = norms[:, None] * norms
        r = (sigma / scale).clamp(-1, 1)
        angle = math.pi - r.acos()
        sigma = sw2 / 2 * scale * ((1 - r**2).sqrt() + r * angle) / math.pi
        theta = sigma + theta * (sw2 / 2) * angle / math.pi
    return theta


class Wide(nn.Module):
    """ReLU in the kernel's parametrisation: weights N(0, 1), scaled by sqrt(sw2 / fan-in)."""

    def __init__(self, inputs, width, layers, sw2=2.0):
        super().__init__()
        sizes = [inputs, *[width] * layers, 1]
        self.weights = nn.ParameterList(normal(b, a) for a, b in itertools.pairwise(sizes))
        self.sw2 = sw2

    def forward(self, x):
        for i, w in enumerate(self.weights):
            x = x.relu() if i else x
            x = x @ w.T * math.sqrt(self.sw2 / w.shape[1])
        return x


@pytest.mark.parametrize("layers", [1, 2])
def test_relu_kernel_nears_arc_cosine_as_inverse_root_width(layers):
    x = normal(8, 5)
    true = arc_cosine_kernel(x, layers)
    assert true.diagonal() == pytest.approx((layers + 1) * 2 * (x**2).mean(1), rel=1e-7)
    widths, seeds, errors = [32, 64, 128, 256, 512], 24, []
    for width in widths:
        squares = []
        for _ in range(seeds):
            model = Wide(5, width, layers)
            found = nt.jacobian(model(x), model).gram()[:, 0, :, 0]
            squares.append(float((found - true).square().sum() / true.square().sum()))
        errors.append(np.mean(squares) ** 0.5)
    slope, _ = np.polyfit(np.log(widths), np.log(errors), 1)
    assert -0.6 <= slope <= -0.4, (slope, errors)
    assert errors[-1] < 0.15


# Euler's identity ---------------------------------------------------------------------------------


def bias_free(*sizes):
    parts = [(linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*parts))[:-1]


def bias_free_cnn():
    convolution = nn.Conv2d(2, 4, 3, bias=False).double()
    pooled = nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*pooled, linear(16, 8), nn.ReLU(), linear(8, C))


@pytest.mark.parametrize(
    ("build", "shape", "depth"),
    [
        (lambda: bias_free(6, C), (6,), 1),
        (lambda: bias_free(6, 9, C), (6,), 2),
        (lambda: bias_free(6, 9, 8, 7, C), (6,), 4),
        (bias_free_cnn, (2, 6, 6), 3),
    ],
    ids=["linear", "2-layers", "4-layers", "cnn"],
)
def test_euler_bias_free_relu_is_homogeneous(build, shape, depth):
    model = build()
    outputs = model(normal(N, *shape))
    assert float(outputs.detach().abs().max()) > 0
    J, theta = nt.jacobian(outputs, model), dict(model.named_parameters())
    flat = torch.cat([p.flatten() for p in theta.values()])
    for u in (theta, flat):
        torch.testing.assert_close(J.jvp(u), depth * outputs.detach(), rtol=1e-12, atol=1e-14)
    layers = J.jvp(theta, per_layer=True)
    assert list(layers) == list(theta)
    assert len(layers) == depth
    for share in layers.values():
        torch.testing.assert_close(share, outputs.detach(), rtol=1e-12, atol=1e-14)


# Fisher -------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """Classes on axis 1: (N, T, features) to (N, V, T)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).transpose(1, 2)


class Case:
    """A network, its probe, and log p of any outcome of one sample's targets, written out."""

    def __init__(self, kind):
        self.kind = kind
        sequence = kind not in ("classes", "gaussian")
        self.x = normal(N, 2, 4) if sequence else normal(N, 4)
        model = mlp()
        with torch.no_grad():
            model[2].weight.mul_(2)  # far from uniform
            outputs = model(self.x)
        self.model = Transposed(model) if kind == "classes-first" else model
        # The least likely classes, for which the empirical Fisher is well above the true one.
        self.y = normal(N, C) if kind == "gaussian" else outputs.argmin(-1)
        self.probe = nt.Probe(self.x, self.y)

    def log_p(self, n, y):
        f = self.model(self.x[n : n + 1])[0]
        if self.kind == "gaussian":
            return -0.5 * (f - y).square().sum()
        f = f.T if self.kind == "classes-first" else f
        chances = torch.log_softmax(f.reshape(-1, C), -1)  # (positions, C)
        return sum(chances[t, y_t] for t, y_t in enumerate(torch.as_tensor(y).reshape(-1)))

    def outcomes(self, n):
        """All targets of a sample with their chances: jointly over the positions of a sequence."""
        if self.kind == "gaussian":
            # E is over a quadratic, for which one standard deviation up or down, evenly, is exact.
            f = self.model(self.x[n : n + 1])[0].detach()
            for signs in itertools.product([-1.0, 1.0], repeat=C):
                yield f + torch.tensor(signs).double(), 2.0**-C
        else:
            for y in itertools.product(range(C), repeat=self.y[n].numel()):
                yield y, math.exp(self.log_p(n, y).item())

    def fisher(self):
        """The matrix (P, P): mean over samples, expectation over outcomes."""
        matrix = 0
        for n in range(N):
            for y, chance in self.outcomes(n):
                g = gradient(self.model, self.log_p(n, y))
                g = torch.cat([part.flatten() for part in g])
                matrix = matrix + chance * torch.outer(g, g) / N
        return matrix


CASES = ["classes", "classes-last", "classes-first", "gaussian"]


@pytest.mark.parametrize("kind", CASES)
def test_fisher_routes_agree_with_explicit_matrix(kind):
    case = Case(kind)
    true = float(case.fisher().trace())
    found = measured(case.model, case.probe, "fisher")
    assert found["fisher/trace"].value == pytest.approx(true, rel=1e-12)
    assert found["fisher/trace_ntk"].value == pytest.approx(true, rel=1e-12)
    drawn = found["fisher/trace_mc"]
    assert 0 < drawn.standard_error < 0.5 * true
    assert abs(drawn.value - true) < 3 * drawn.standard_error


@pytest.mark.parametrize("kind", CASES)
def test_empirical_fisher_is_mean_squared_loss_gradient(kind):
    case = Case(kind)
    squares = [squared_gradient(case.model, case.log_p(n, case.y[n])) for n in range(N)]
    found = measured(case.model, case.probe, "fisher")
    assert found["fisher/trace_empirical"].value == pytest.approx(np.mean(squares), rel=1e-12)
    if kind != "gaussian":
        # another number than the true Fisher, or the test could not tell them apart
        assert np.mean(squares) > 1.1 * found["fisher/trace"].value


def centred(module, x):
    """Outputs that are zero, so that all classes are as likely, with the network's Jacobian."""
    outputs = module(x)
    return outputs - outputs.detach()


def test_fisher_of_uniform_classes_in_closed_form():
    model, x = mlp(), normal(N, 4)
    j = jacobian_of(model, x)
    true = sum(float(r.square().sum() / C - r.sum(0).square().sum() / C**2) for r in j) / N
    probe = nt.Probe(x, torch.zeros(N, dtype=torch.long), forward=centred)
    assert number(model, probe, "fisher/trace") == pytest.approx(true, rel=1e-12)
    assert number(model, probe, "fisher/trace_ntk") == pytest.approx(true, rel=1e-12)


def test_fisher_of_zeroed_linear_classifier():
    model, x = linear(2, 4), torch.tensor([[3.0, 4.0], [0.0, 1.0]]).double()
    nn.init.zeros_(model.weight)
    probe = nt.Probe(x, torch.zeros(2, dtype=torch.long))
    # |x|^2 (1 - 1/4) = 25 3/4 and 1 3/4, of which the mean
    assert number(model, probe, "fisher/trace") == pytest.approx(9.75, rel=1e-14)


@pytest.mark.parametrize("scale", [0.01, 1, 30])
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_fisher_of_softmax_is_below_half_the_kernel(scale, classes):
    model, x = mlp(outputs=classes), normal(N, 4)
    with torch.no_grad():
        model[2].weight.mul_(scale)
    probe = nt.Probe(x, torch.zeros(N, dtype=torch.long))
    kernel = float(jacobian_of(model, x).square().sum())
    for name in ("fisher/trace", "fisher/trace_ntk"):
        assert 0 < number(model, probe, name) < kernel / (2 * N)


def test_fisher_reaches_half_the_kernel():
    # Logits w.x and -w.x at w = 0: the Jacobian lies along M's leading direction (1, -1)/sqrt(2).
    model, x = linear(4, 1), normal(N, 4)
    nn.init.zeros_(model.weight)

    def opposite(module, x):
        return torch.cat([module(x), -module(x)], 1)

    probe = nt.Probe(x, torch.zeros(N, dtype=torch.long), forward=opposite)
    bound = float(2 * x.square().sum()) / (2 * N)
    for name in ("fisher/trace", "fisher/trace_ntk"):
        assert number(model, probe, name) == pytest.approx(bound, rel=1e-13)


# Entropies ----------------------------------------------------------------------------------------


ENTROPIES = [
    f"ntk/{name}"
    for name in (
        "entropy",
        "entropy_traced",
        "entropy_normalised",
        "entropy_traced_normalised",
        "effective_rank",
    )
]


def geometric(n, q):
    """Inputs with the kernel diag(q^k), and the entropy of its spectrum in closed form."""
    mean = q / (1 - q) - n * q**n / (1 - q**n)
    entropy = -math.log((1 - q) / (1 - q**n)) - math.log(q) * mean
    return torch.diag(q ** (torch.arange(n).double() / 2)), entropy


def rotation(n):
    return torch.linalg.qr(normal(n, n))[0]


SPECTRA = {
    "identity": lambda: (rotation(6), math.log(6)),
    "rank-one": lambda: (torch.ones(6, 1).double() * normal(4), 0.0),
    "projector": lambda: (rotation(6)[:, :3], math.log(3)),
    "geometric": lambda: geometric(6, 0.3),
    "steep": lambda: geometric(6, 1e-3),
}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_entropy_of_known_spectrum(spectrum, outputs):
    # A linear network's kernel is X X^T for each of the outputs, which add ln C if not summed over.
    x, true = SPECTRA[spectrum]()
    model = linear(x.shape[1], outputs)
    found = {k: r.value for k, r in measured(model, nt.Probe(x), *ENTROPIES).items()}
    total = true + math.log(outputs)
    assert found["ntk/entropy"] == pytest.approx(total, abs=1e-11)
    assert found["ntk/entropy_traced"] == pytest.approx(true, abs=1e-11)
    assert found["ntk/effective_rank"] == pytest.approx(math.exp(total), rel=1e-11)
    assert found["ntk/entropy_normalised"] == pytest.approx(
        total / math.log(6 * outputs), abs=1e-11
    )
    assert found["ntk/entropy_traced_normalised"] == pytest.approx(true / math.log(6), abs=1e-11)


def test_spectrum_is_that_of_the_kernel_largest_first():
    x, model = geometric(6, 0.3)[0], linear(6, 2)
    found = measured(model, nt.Probe(x), "ntk/spectrum")["ntk/spectrum"]
    assert found.value == pytest.approx(np.repeat(0.3 ** np.arange(6), 2), rel=1e-13)


def test_traced_and_full_entropy_of_a_network():
    model, x = mlp(), normal(N, 4)
    j = jacobian_of(model, x)
    full = j.flatten(0, 1) @ j.flatten(0, 1).T
    traced = torch.einsum("ncp,mcp->nm", j, j)
    found = measured(model, nt.Probe(x), *ENTROPIES)
    assert found["ntk/entropy"].value == pytest.approx(numpy_entropy(full), abs=1e-11)
    assert found["ntk/entropy_traced"].value == pytest.approx(numpy_entropy(traced), abs=1e-11)


@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8),
    scale=st.floats(-12, 12).map(lambda power: 10.0**power),
)
def test_entropy_does_not_see_scale(weights, scale):
    p = np.array(weights) / np.sum(weights)
    true = -(p * np.log(p)).sum()
    found = float(spectrum.shannon(torch.tensor(weights, dtype=torch.float64) * scale))
    assert found == pytest.approx(true, abs=1e-12)


def test_entropy_does_not_see_order_of_samples():
    model, x, order = mlp(), normal(N, 4), [3, 0, 4, 2, 1]
    names = ("ntk/spectrum", "ntk/entropy", "ntk/entropy_traced", "ntk/trace")
    a, b = (measured(model, nt.Probe(v), *names, "ntk/gram") for v in (x, x[order]))
    for name in names:
        assert a[name].value == pytest.approx(b[name].value, rel=1e-10, abs=1e-10 * N)
    shuffled = a["ntk/gram"].value[order][:, :, order]
    assert b["ntk/gram"].value == pytest.approx(shuffled, rel=1e-10)
    assert not np.allclose(a["ntk/gram"].value, shuffled)


def test_entropy_counts_rounding_below_zero_as_zero():
    assert float(spectrum.shannon(torch.tensor([3.0, 1.0, -1e-17]))) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-15
    )


@pytest.mark.parametrize("weights", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_entropy_of_no_kernel_is_refused(weights):
    with pytest.raises(ValueError, match="not defined"):
        spectrum.shannon(torch.tensor(weights))


def test_entropy_of_random_kernel_is_pages():
    # Page (1993): the mean over complex Wishart matrices A A^H, with A of shape (m, n), m <= n.
    m, n, repeats = 10, 30, 600
    true = digamma(m * n + 1) - digamma(n + 1) - (m - 1) / (2 * n)
    a = torch.randn(repeats, m, n, dtype=torch.complex128)
    found = np.array([float(spectrum.shannon(e)) for e in torch.linalg.eigvalsh(a @ a.mH)])
    error = found.std(ddof=1) / repeats**0.5
    assert error < 1e-3
    assert abs(found.mean() - true) < 3 * error


# The squared gradient -----------------------------------------------------------------------------

LOSSES = {
    "cross-entropy": (lambda f, y: F.cross_entropy(f, y, reduction="none"), {}),
    "squared": (lambda f, y: 0.5 * (f - y).square().sum(1), {}),
    "own": (lambda f, y: (f - y).abs().pow(1.5).mean(1), {"losses": None}),
}


def setting(member, loss):
    """A member of the zoo, its targets, and what the loss is for a probe."""
    member = zoo.build(member)
    with torch.no_grad():
        outputs = member.forward(member.model, member.batch)
    classes = torch.randint(0, outputs.shape[1], (zoo.N,))
    targets = classes if loss == "cross-entropy" else torch.randn_like(outputs)
    written, options = LOSSES[loss]
    options = {name: written for name in options}
    probe = nt.Probe(member.batch, targets, forward=member.forward, **options)
    return member, targets, written, probe


CHI = [f"collective/{q}" for q in ("chi_loss", "chi_net", "chi_align", "gradient_sqnorm")]
POSITION = [f"collective/spectral_position{unit}" for unit in ("", "_mean", "_largest")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("member", ["mlp", "cnn", "gpt"])
def test_squared_gradient_is_product_of_three(member, loss):
    member, targets, losses, probe = setting(member, loss)
    records = measured(member.model, probe, *CHI, *POSITION)
    found = [float(r.value) for r in records.values() if r.is_scalar]
    chi_loss, chi_net, chi_align, sqnorm, position, in_means, in_largest = found[:7]

    twin = copy.deepcopy(member.model)
    outputs = member.forward(twin, member.batch)
    outputs.retain_grad()
    losses(outputs, targets).mean().backward()
    squares = [p.grad.square().sum() for p in twin.parameters() if p.grad is not None]
    true = float(sum(squares))
    assert sqnorm == pytest.approx(true, rel=1e-12)
    assert chi_loss * chi_net * chi_align == pytest.approx(true, rel=1e-12)
    assert chi_loss == pytest.approx(float(outputs.grad.square().sum()), rel=1e-12)

    # chi_align in the kernel's own modes: sum over k of (lambda_k / Tr) (v_k . g / |g|)^2
    j = jacobian_of(member.model, member.batch, member.forward).flatten(0, 1).numpy()
    kernel = j @ j.T
    assert chi_net == pytest.approx(np.trace(kernel), rel=1e-12)
    values, vectors = np.linalg.eigh(kernel)
    g = outputs.grad.numpy().ravel()
    weights = (vectors.T @ g / np.linalg.norm(g)) ** 2
    assert chi_align == pytest.approx((values / values.sum()) @ weights, rel=1e-10)
    assert values[0] / values.sum() - 1e-12 <= chi_align <= values[-1] / values.sum() + 1e-12

    # and the spectral position, the mean of lambda_k with those weights
    assert position == pytest.approx(values @ weights, rel=1e-10)
    assert in_means == pytest.approx(values @ weights / values.mean(), rel=1e-10)
    assert in_largest == pytest.approx(values @ weights / values[-1], rel=1e-10)


def test_spectral_position_of_a_gradient_in_one_mode_is_its_eigenvalue():
    # K = x x^T has the eigenvalues 9, 4 and 1 for unit inputs scaled by 3, 2 and 1; half the
    # squared error of outputs 0 has the gradient -y.
    model, x = linear(3, 1), torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
    nn.init.zeros_(model.weight)
    for mode, eigenvalue in enumerate([9, 4, 1]):
        y = torch.eye(3).double()[:, mode : mode + 1] * 0.7
        found = measured(model, nt.Probe(x, y, likelihood="gaussian"), *POSITION)
        values = [float(found[name].value) for name in POSITION]
        assert values == pytest.approx([eigenvalue, eigenvalue / (14 / 3), eigenvalue / 9])


def test_spectral_position_averages_to_the_mean_eigenvalue():
    # over isotropic loss gradients; here over all signs of y, which is exact
    model, x = linear(4, 1), normal(3, 4)
    nn.init.zeros_(model.weight)
    found = [
        number(model, nt.Probe(x, torch.tensor(y)[:, None].double()), POSITION[1])
        for y in itertools.product([-0.7, 0.7], repeat=3)
    ]
    assert np.mean(found) == pytest.approx(1, rel=1e-12)


def test_spectral_position_without_a_gradient_is_refused():
    model, x = linear(4, 1), normal(3, 4)
    probe = nt.Probe(x, model(x).detach())
    for name in POSITION:
        with pytest.raises(ValueError, match="no gradient"):
            measured(model, probe, name)


@pytest.mark.parametrize("times", [2, 5])
def test_chi_of_repeated_samples(times):
    model, x, y = mlp(), normal(N, 4), torch.randint(0, C, (N,))
    probes = nt.Probe(x, y), nt.Probe(x.repeat(times, 1), y.repeat(times))
    once, more = (measured(model, p, "collective") for p in probes)
    factors = (1 / times, times, 1, 1, times, times, 1)
    for name, factor in zip([*CHI, *POSITION], factors, strict=True):
        assert more[name].value == pytest.approx(factor * once[name].value, rel=1e-11), name


# Loss and accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_mean_loss_is_torchs(kind):
    case = Case(kind)
    outputs = case.model(case.x)
    if kind == "gaussian":
        true = 0.5 * F.mse_loss(outputs, case.y, reduction="sum") / N
    else:
        logits = outputs.transpose(1, 2) if kind == "classes-last" else outputs
        true = F.cross_entropy(logits, case.y, reduction="sum") / N
    assert number(case.model, case.probe, "loss/mean") == pytest.approx(true.item(), rel=1e-14)


def named_classes(rows):
    """Inputs whose largest entry, which an identity network returns, is at the given classes."""
    return F.one_hot(torch.tensor(rows), C).double() + 0.1 * torch.rand(C).double()


def identity():
    model = linear(C, C)
    nn.init.eye_(model.weight)
    return model


@pytest.mark.parametrize(
    ("said", "targets", "true", "error"),
    [
        # 1, 1, 1, 0: mean 3/4, variance 1/4, over sqrt(4)
        ([0, 2, 1, 1], [0, 2, 1, 0], 3 / 4, 1 / 4),
        # by sample 1, 1/2, 0: mean 1/2, variance 1/4, over sqrt(3)
        ([[0, 2], [1, 1], [2, 2]], [[0, 2], [1, 0], [1, 0]], 1 / 2, 0.5 / 3**0.5),
    ],
    ids=["classes", "sequence"],
)
@pytest.mark.parametrize("first", [False, True], ids=["classes-last", "classes-first"])
def test_accuracy_by_hand(said, targets, true, error, first):
    x, targets = named_classes(said), torch.tensor(targets)
    model = Transposed(identity()) if first and x.dim() == 3 else identity()
    probe = nt.Probe(x, targets)
    found = measured(model, probe, "loss/accuracy")["loss/accuracy"]
    assert found.value == pytest.approx(true, rel=1e-14)
    assert found.standard_error == pytest.approx(error, rel=1e-14)


def test_accuracy_of_real_numbers_is_left_out_without_a_word():
    case = Case("gaussian")  # warnings are errors here
    found = measured(case.model, case.probe, "loss")
    assert [name for name in found if not name.startswith("nettrace/")] == ["loss/mean"]


def own_loss(outputs, targets):
    return (outputs - targets[:, None]).square().mean(1)


PROBES = {
    "no-targets": {},
    "own-loss": {"targets": torch.arange(N) % C, "losses": own_loss},
}


@pytest.mark.parametrize(
    ("probe", "name", "advice"),
    [
        ("no-targets", "loss/mean", "pass Probe(inputs, targets)"),
        ("no-targets", "loss/accuracy", "pass Probe(inputs, targets)"),
        ("no-targets", "fisher/trace_empirical", "pass Probe(inputs, targets)"),
        ("no-targets", "collective/chi_loss", "losses=..."),
        ("no-targets", "collective/chi_align", "losses=..."),
        ("no-targets", "fisher/trace", "pass Probe(..., likelihood='categorical')"),
        ("own-loss", "fisher/trace", "pass Probe(..., likelihood='categorical')"),
        ("own-loss", "fisher/trace_ntk", "or 'gaussian'"),
        ("own-loss", "fisher/trace_mc", "pass Probe(..., likelihood='categorical')"),
        ("own-loss", "loss/accuracy", "pass Probe(..., likelihood='categorical')"),
    ],
)
def test_what_cannot_be_measured_says_what_to_pass(probe, name, advice):
    x, model = normal(N, 4), mlp()
    probe = nt.Probe(x, **PROBES[probe])
    tracer = nt.Tracer(probe, [name, "ntk/trace"])
    with pytest.warns(nt.MissingMeasureWarning, match=f"^{name} is missing at step 7: ") as caught:
        missing, trace, *_ = tracer(model, step=7)
    assert len(caught) == 1
    assert missing.name == name
    assert advice in missing.missing
    assert np.isnan(missing.value)
    assert trace.missing is None  # the others are measured
    assert trace.value == pytest.approx(float(jacobian_of(model, x).square().sum()), rel=1e-12)
    again = tracer(model, step=8)[0]  # a second warning would be an error here
    assert again.missing == missing.missing
    with pytest.raises(Exception, match="pass Probe"):
        nt.Tracer(probe, name, on_error="raise")(model, step=7)


def test_likelihood_beside_own_loss_defines_fisher():
    model, x = mlp(), normal(N, 4)
    y = torch.arange(N) % C
    probe = nt.Probe(x, y, losses=own_loss, likelihood="categorical")
    found = measured(model, probe, "fisher/trace", "loss")
    plain = number(model, nt.Probe(x, y, likelihood="categorical"), "fisher/trace")
    assert found["fisher/trace"].value == pytest.approx(plain, rel=1e-14)
    mean = own_loss(model(x), y).mean().item()
    assert found["loss/mean"].value == pytest.approx(mean, rel=1e-14)
    right = float((model(x).argmax(1) == y).double().mean())
    assert found["loss/accuracy"].value == pytest.approx(right, rel=1e-14)
