"""The critical batch size against dense Hessians and a population known in closed form."""

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import nettrace as nt
from nettrace import gradient_curvature
from nettrace.gradient_curvature import PARTS
from nettrace.measures import resolve
from nettrace.statistics import StepStatistics
from nettrace.training_step import StepTracer

NAME = "gradients/critical_batch_size"


class Normalised(nn.Module):
    """Batch normalisation by statistics that are given."""

    def __init__(self, like, x):
        super().__init__()
        axes = [0, 2][: x.dim() - 1]
        shape = (1, -1, 1)[: x.dim()]
        self.mean = x.mean(axes).detach().view(shape)
        self.scale = (x.var(axes, correction=0) + like.eps).rsqrt().detach().view(shape)
        self.weight, self.bias, self.shape = like.weight, like.bias, shape

    def forward(self, x):
        found = (x - self.mean) * self.scale
        if self.weight is None:
            return found
        return found * self.weight.view(self.shape) + self.bias.view(self.shape)


class Tied(nn.Module):
    """A recurrent reader whose embedding is its head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.memory = nn.Embedding(3, 4), nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.memory(self.embedding((x > 0).long()))[0] @ self.embedding.weight.T


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(1, 6), nn.Linear(2, 3)

    def forward(self, x):
        q, k, v = self.inner(x[:, None, :, None]).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolution():
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Softplus(), nn.GroupNorm(1, 2)),
        *(nn.Flatten(), nn.Linear(6, 3)),
    )


def penalised(model, x, y, reduction):
    return F.cross_entropy(model(x), y, reduction=reduction) + sum(
        p.square().square().sum() for p in model.parameters()
    )


def squared(model, x, y, reduction):
    errors = model(x) - F.one_hot(y, 3)
    losses = errors.square().sum(1) / 2 + 0.3 * errors[:, 0].cosh()
    return losses.mean() if reduction == "mean" else losses


def mse(model, x, y, reduction):
    found = F.mse_loss(model(x), F.one_hot(y, 3).double(), reduction=reduction)
    return found if reduction == "mean" else found.mean(1)


def tokens(model, x, y, reduction):
    targets = (x < 0.3).long()
    logits = model(x)
    found = F.cross_entropy(logits.reshape(-1, 3), targets.reshape(-1), reduction=reduction)
    return found if reduction == "mean" else found.view(targets.shape).mean(1)


CASES = {
    "penalty": (mlp, penalised),
    "own arithmetic": (mlp, squared),
    "reduced by the operation": (mlp, mse),
    "convolution": (convolution, squared),
    "tied weights": (Tied, tokens),
}


def batch(samples):
    torch.manual_seed(1)
    return torch.randn(samples, 4).double(), torch.randint(0, 3, (samples,))


def of_step(model, loss, samples, step=0, **options):
    """The record of a training step."""
    return StepTracer("raise").measure(
        lambda *_: StepStatistics(loss, model, samples, step, **options),
        *(model, step, resolve(NAME)),
    )[0]


def dense(model, x, y, losses):
    """(N, P) gradients and (N, P, P) Hessians of samples, by autograd of functions."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in parameters.items()}
    sizes = [p.numel() for p in parameters.values()]

    def of(flat, n):
        split = dict(zip(shapes, flat.split(sizes), strict=True))
        split = {name: p.view(shapes[name]) for name, p in split.items()}

        class At:  # the model with these weights
            def __call__(self, x):
                return functional_call(model, split, (x,))

            def parameters(self):
                return split.values()

        return losses(At(), x[n : n + 1], y[n : n + 1], "none")[0]

    flat = torch.cat([p.flatten() for p in parameters.values()])
    gradients = [jacobian(lambda w, n=n: of(w, n), flat) for n in range(len(x))]
    hessians = [hessian(lambda w, n=n: of(w, n), flat) for n in range(len(x))]
    return torch.stack(gradients).numpy(), torch.stack(hessians).numpy()


def truth(g, h, parts):
    """The numerator and the denominator, by the definition."""
    noise = signal = 0.0
    for part in parts:
        rest = np.setdiff1d(np.arange(len(g)), part)
        curved = h[part].mean(0)
        mean, covariance = g[rest].mean(0), np.cov(g[rest].T)
        product = np.trace(curved @ covariance)
        noise += product / len(parts)
        signal += (mean @ curved @ mean - product / len(rest)) / len(parts)
    return noise, signal


@pytest.mark.parametrize("scale", [1, 1024 / 4])
@pytest.mark.parametrize("case", CASES)
def test_exact_products_are_those_of_dense_hessians(case, scale, monkeypatch):
    monkeypatch.setattr(gradient_curvature, "PRODUCTS", 1000)
    samples = 10
    torch.manual_seed(0)
    make, losses = CASES[case]
    model, (x, y) = make().double(), batch(samples)
    found = of_step(model, losses(model, x, y, "mean") * scale, samples, scale=scale)
    assert found.attributes["squares"] == "exact"
    parts = [np.arange(m, samples, PARTS) for m in range(PARTS)]
    noise, signal = truth(*dense(model, x, y, losses), parts)
    assert found.attributes["hessian_noise"] == pytest.approx(noise, rel=1e-9)
    assert found.attributes["hessian_signal"] == pytest.approx(signal, rel=1e-8)
    assert found.value == pytest.approx(noise / signal, rel=1e-8)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
def test_statistics_of_the_batch_are_held_constant(dims, affine, monkeypatch):
    monkeypatch.setattr(gradient_curvature, "PRODUCTS", 1000)
    samples = 9
    torch.manual_seed(0)
    inner = nn.Linear(4, 4) if dims == 1 else nn.Conv1d(1, 4, 2)
    before = [inner] if dims == 1 else [nn.Unflatten(1, (1, 4)), inner]
    norm = nn.BatchNorm1d(4, affine=affine)
    after = [nn.Tanh(), nn.Flatten(), nn.Linear(4 if dims == 1 else 12, 3)]
    model, (x, y) = nn.Sequential(*before, norm, *after).double(), batch(samples)
    if affine:
        nn.init.uniform_(norm.weight)
    found = of_step(model, squared(model, x, y, "mean"), samples)
    assert "batch_statistics" in found.attributes
    held = Normalised(norm, nn.Sequential(*before)(x))
    parts = [np.arange(m, samples, PARTS) for m in range(PARTS)]
    noise, signal = truth(*dense(nn.Sequential(*before, held, *after), x, y, squared), parts)
    assert found.attributes["hessian_noise"] == pytest.approx(noise, rel=1e-9)
    assert found.attributes["hessian_signal"] == pytest.approx(signal, rel=1e-8)


@pytest.mark.parametrize("samples", [3, 4, 10])
def test_on_a_probe(samples, monkeypatch):
    if samples > 4:  # of few, all products are made in any case
        monkeypatch.setattr(gradient_curvature, "PRODUCTS", 1000)
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), batch(samples)
    tracer = nt.Tracer(nt.Probe(x, y), NAME, on_error="raise", max_seconds=None)
    found = tracer(model, step=0)[0]
    assert found.attributes["squares"] == "exact"
    parts = [np.arange(m, samples, PARTS) for m in range(min(PARTS, samples))]

    def losses(model, x, y, reduction):
        return F.cross_entropy(model(x), y, reduction=reduction)

    noise, signal = truth(*dense(model, x, y, losses), parts)
    assert found.value == pytest.approx(noise / signal, rel=1e-7)


class Detached(torch.autograd.Function):
    """A sine whose backward pass keeps what cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.cosine


class Wrong(mlp().__class__):
    def forward(self, x):
        return Detached.apply(super().forward(x))


REFUSED = {
    "fused attention": (Attention, "step", "SDPBackend.MATH"),
    "a function": (lambda: Wrong(nn.Linear(4, 3)), "step", "DetachedBackward is a backward"),
    "a function, on a probe": (lambda: Wrong(nn.Linear(4, 3)), "probe", "DetachedBackward is a"),
}


def taken(where, model, x, y):
    names = [NAME, "gradients/noise"]
    if where == "probe":
        return nt.Tracer(nt.Probe(x, y), names, max_seconds=None)(model, step=0)
    look = StepStatistics(F.cross_entropy(model(x), y), model, len(x), 0)
    return StepTracer("record").measure(lambda *_: look, model, 0, resolve(names))


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_differentiated_twice_is_missing(why):
    make, where, words = REFUSED[why]
    torch.manual_seed(0)
    model, (x, y) = make(), batch(8)
    with pytest.warns(nt.MissingMeasureWarning, match=words):
        found = taken(where, model, x.float(), y)
    assert words in found[0].missing
    assert found[1].missing is None


def test_attention_that_is_not_fused():
    torch.manual_seed(0)
    model, (x, y) = Attention().double(), batch(8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y)
    true = of_step(model, loss, 8)
    fused = nt.Tracer(nt.Probe(x, y), NAME, on_error="raise", max_seconds=None)(model, step=0)[0]
    assert fused.value == pytest.approx(true.value, rel=1e-8)  # as it is evaluated again


def test_wrong_second_derivatives_are_seen():
    """A product with a matrix that is not symmetric."""
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), batch(8)
    look = StepStatistics(F.cross_entropy(model(x), y), model, 8, 0)
    twice = look._twice
    skewed = replace(
        twice, gradient=lambda w: [g * g.detach().sin() + g for g in twice.gradient(w)]
    )
    with pytest.raises(gradient_curvature.NotTwiceDifferentiableError, match="not symmetric"):
        gradient_curvature.along_gradients(look.loss_gradients, skewed, 0)


def test_too_few_samples():
    model, (x, y) = mlp(), batch(2)
    with pytest.raises(ValueError, match="at least 3 samples, got 2"):
        of_step(model, F.cross_entropy(model(x.float()), y), 2)


def test_it_is_asked_for_by_name():
    assert NAME not in [measure.name for measure in resolve("gradients")]


def test_random_signs_are_without_bias():
    samples, steps = 12, 50
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), batch(samples)
    loss = squared(model, x, y, "mean")
    noises = [
        of_step(model, loss, samples, step).attributes["hessian_noise"] for step in range(steps)
    ]
    parts = [np.arange(m, samples, PARTS) for m in range(PARTS)]
    noise, _ = truth(*dense(model, x, y, squared), parts)
    assert np.std(noises) > 0
    assert abs(np.mean(noises) - noise) < 3.5 * np.std(noises) / math.sqrt(steps)


def test_a_population_that_is_known():
    """Linear regression on Gaussian inputs of variances s, where moments are Isserlis'.

    With y = e of unit variance and f = w x: H = diag(s), G = H w and Sigma = (w H w + 1) H + G G^T.
    """
    samples, repeats = 48, 80
    s = torch.tensor([2.0, 1.0, 0.5, 0.25]).double()
    w = torch.tensor([0.8, -0.8, 0.8, 0.8]).double()
    signal = float((w.square() * s**3).sum())
    noise = float(((w.square() * s).sum() + 1) * s.square().sum()) + signal
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)
    generator = torch.Generator().manual_seed(0)
    noises, signals, scales, errors = [], [], [], []
    for step in range(repeats):
        x = torch.randn(samples, 4, generator=generator).double() * s.sqrt()
        e = torch.randn(samples, 1, generator=generator).double()
        found = of_step(model, F.mse_loss(model(x), e) / 2, samples, step)
        noises.append(found.attributes["hessian_noise"])
        signals.append(found.attributes["hessian_signal"])
        scales.append(float(found.value))
        errors.append(float(found.standard_error))
    for values, true in ((noises, noise), (signals, signal)):
        assert abs(np.mean(values) - true) < 3.5 * np.std(values) / math.sqrt(repeats)
    assert np.median(scales) == pytest.approx(noise / signal, rel=0.15)
    spread = np.subtract(*np.percentile(scales, [84, 16])) / 2
    assert 0.75 < np.median(errors) / spread < 1.33


def test_the_steps_own_backward_pass_and_memory_are_left_alone():
    torch.manual_seed(0)
    model, (x, y) = convolution(), batch(12)
    before = F.cross_entropy(model(x.float()), y)
    before.backward()
    kept = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = F.cross_entropy(model(x.float()), y)
    gc.collect()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    assert np.isfinite(of_step(model, loss, 12).value)
    gc.collect()
    assert sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()) <= tensors
    loss.backward()
    assert all(map(torch.equal, kept, (p.grad for p in model.parameters())))
