"""Estimates: unbiased, with a standard error that is true, against written-out Jacobians."""

import math
import warnings
from functools import cache

import oracle
import pytest
import torch
import zoo
from oracle import relative_error
from torch import nn

import nettrace as nt
from nettrace.heads import reduce_outputs


@cache
def everything(name):
    """A model's outputs and parameters, its Jacobian (N, C, P) by parameter and whole, and ours.

    "logits" is the GPT with all of its outputs, "wide" a perceptron with many.
    """
    if name == "wide":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 30)).double()
        outputs, parameters = model(torch.randn(zoo.N, 5).double()), model
        coupled = False
    else:
        member = zoo.build("gpt" if name == "logits" else name)
        forward = zoo.call if name == "logits" else member.forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what old parts of torch say of each other
            outputs = forward(member.model, member.batch)
        parameters, coupled = member.target, member.coupled
    shares = oracle.jacobian(
        outputs, {k: p for k, p in parameters.named_parameters() if p.requires_grad}
    )
    found = nt.jacobian(outputs, parameters, coupled="rows" if coupled else "refuse")
    return shares, torch.cat(list(shares.values()), 2), found


@pytest.fixture(scope="module", params=["cnn", "wide", "logits"])
def case(request):
    return request.param, *everything(request.param)


def calibration(estimates, truth):
    """How far the mean is off in its own standard deviations, and true over claimed error."""
    values = torch.stack([e.value for e in estimates]).double()
    claimed = torch.stack([e.standard_error for e in estimates]).double()
    errors = values - truth
    off = errors.mean(0) / (values.std(0) / len(values) ** 0.5)
    return float(off), float(errors.square().mean().sqrt() / claimed.square().mean().sqrt())


@pytest.mark.parametrize(("method", "probes"), [("hutchinson", 3), ("hutch++", 3), ("xtrace", 7)])
def test_traces_are_unbiased_and_their_errors_are_true(case, method, probes):
    name, _, j, found = case
    if name == "logits" and method != "hutchinson":
        with pytest.raises(ValueError, match="sdpa_kernel"):
            found.estimate_trace(method, probes=probes)
        return
    repeats = 80
    estimates = [found.estimate_trace(method, probes=probes, seed=s) for s in range(repeats)]
    off, ratio = calibration(estimates, j.square().sum())
    assert {e.method for e in estimates} == {method}
    assert abs(off) < 4
    assert 0.7 < ratio < 1.4


def test_shares_of_layers_are_estimated_too():
    truth, _, found = everything("cnn")
    estimates = [found.estimate_layer_traces(probes=3, seed=s) for s in range(60)]
    for layer in ("first.weight", "second.weight"):
        off, ratio = calibration([e[layer] for e in estimates], truth[layer].square().sum())
        assert abs(off) < 4
        assert 0.7 < ratio < 1.4
    whole = found.estimate_trace(probes=3, seed=7)
    assert relative_error(sum(e.value for e in estimates[7].values()), whole.value) < 1e-10


def untied(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 9, bias=bias)).double()
    return model, torch.randn(zoo.N, 3, 4).double()


@pytest.mark.parametrize("head", ["tied", "bias", "no bias", "flat", "rank 2"])
def test_a_wide_head_is_exchanged_for_its_features_exactly(head):
    if head == "tied":
        member, _, found = everything("logits")
        features = 8 * 16
    else:
        model, x = untied(bias=head != "no bias")
        if head == "rank 2":
            with torch.no_grad():
                model[2].weight[:, 2:] = 0
        x = x[:, 0] if head == "flat" else x
        found = nt.jacobian(model(x), model)
        features = 5 if head == "flat" else 15
    reduced, left_out = reduce_outputs(found)
    assert reduced.outputs == features < found.outputs
    shares = reduced.trace(per_layer=True)
    for layer, true in found.trace(per_layer=True).items():
        assert relative_error(shares[layer] + left_out.get(layer, 0), true) < 1e-10


@pytest.mark.parametrize("name", ["mlp", "vit", "low-rank", "shared", "no-rule"])
def test_other_heads_are_left_alone(name):
    _, _, found = everything(name)
    assert reduce_outputs(found) == (found, {})
    projected = found.project(torch.randn(2, zoo.N, found.outputs))
    assert reduce_outputs(projected) == (projected, {})


def test_waves_suit_outputs_that_move_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    outputs = model(nn.functional.interpolate(torch.randn(zoo.N, 2, 3, 3), size=(9, 9)))
    found = nt.jacobian(outputs, model)
    truth = found.trace().double()
    waves = [found.estimate_trace(probes=4, seed=s) for s in range(30)]
    flat = nt.jacobian(outputs.flatten(1)[:, torch.randperm(243)], model)
    places = [flat.estimate_trace(probes=4, seed=s) for s in range(30)]
    for estimates in (waves, places):
        off, ratio = calibration(estimates, truth)
        assert abs(off) < 4
        assert 0.7 < ratio < 1.4
    errors = [sum(float(e.standard_error) for e in found) / 30 for found in (waves, places)]
    assert errors[0] < 0.8 * errors[1]  # 0.71 measured


def test_probes_are_added_until_the_error_is_as_wished():
    _, j, found = everything("logits")
    rough = found.estimate_trace(probes=2)
    fine = found.estimate_trace(probes=2, relative_error=0.02)
    assert rough.standard_error > 0.02 * rough.value
    assert fine.standard_error <= 0.02 * fine.value
    assert rough.probes < fine.probes < 128
    assert abs(fine.value / j.square().sum() - 1) < 0.08


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_as_many_probes_as_outputs_are_exact(method):
    _, j, found = everything("shared")
    for estimate in (
        found.estimate_trace(method, probes=20),
        found.estimate_trace(relative_error=1e-12, probes=2),
    ):
        assert estimate.method == "exact"
        assert estimate.standard_error == 0
        assert relative_error(estimate.value, j.square().sum()) < 1e-10


def test_a_kernel_of_low_rank_is_found_whole():
    member = zoo.build("cnn")
    outputs = member.forward(member.model, member.batch)
    found = nt.jacobian(outputs, {"bias": member.model.head.bias})  # 1 1^T over samples, rank 5
    for probes in (7, 12):
        assert float(found.estimate_trace("xtrace", probes=probes).value) == pytest.approx(20)
    true = torch.eye(5).double().expand(zoo.N, zoo.N, 5, 5).transpose(1, 2)
    assert relative_error(found.approximate_gram("nystrom", rank=7).value, true) < 1e-6
    assert found.spectrum(6).value.tolist() == pytest.approx([4] * 5 + [0], abs=1e-9)


def test_seeds_hold_for_any_budget():
    member = zoo.build("cnn")
    outputs = member.forward(member.model, member.batch)
    large, small = (nt.jacobian(outputs, member.model, memory_budget=m) for m in ("1GiB", 60_000))
    for draw in (
        lambda j, s: j.estimate_trace(probes=3, seed=s).value,
        lambda j, s: j.estimate_trace("hutch++", probes=2, seed=s).value,
        lambda j, s: j.sketch(2, seed=s),
        lambda j, s: j.approximate_gram("nystrom", rank=3, seed=s).value,
        lambda j, s: j.spectrum(2, seed=s).value,
        lambda j, s: j.pseudo("random", k=2, seed=s).gram(),
    ):
        assert relative_error(draw(large, 3), draw(small, 3)) < 1e-8
        assert not torch.equal(draw(large, 3), draw(large, 4))


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n != "compiled-inductor"])
def test_products_with_the_kernel(name):
    _, j, found = everything(name)
    tolerance, j = zoo.ZOO[name].tolerance, j.to(found.trace().dtype)
    kernel = torch.einsum("ncp,mdp->ncmd", j, j)
    v = torch.randn(j.shape[:2]).to(j)
    assert relative_error(found.gram_product(v), torch.einsum("ncmd,md->nc", kernel, v)) < tolerance
    mix = torch.randn(2, *j.shape[:2]).to(j)
    some = torch.einsum("knc,ncp->nkp", mix, j)
    true = torch.einsum("nkp,mlp,ml->nk", some, some, v[:, :1].expand(-1, 2))
    assert relative_error(found.project(mix).gram_product(v[:, :1].expand(-1, 2)), true) < tolerance


def test_a_backward_pass_that_only_seems_differentiable_is_seen_through():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * (0.5 * g + 0.5 * g.detach())

    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    outputs = second(Cube.apply(first(torch.randn(zoo.N, 3).double())))
    found = nt.jacobian(outputs, nn.ModuleList([first, second]))
    v = torch.randn(zoo.N, 2).double()
    true = torch.einsum("ncmd,md->nc", found.gram(), v)
    assert relative_error(found.gram_product(v), true) < 1e-10
    with pytest.raises(ValueError, match="cannot be differentiated"):
        found.estimate_trace("xtrace", probes=3)


@pytest.mark.parametrize("name", ["fourier", "forces", "shared"])
def test_sketches_are_unbiased_with_the_stated_error(name):
    _, j, found = everything(name)
    kernel = oracle.gram(j)
    estimates = [found.approximate_gram("sketch", rank=20, seed=s) for s in range(20)]
    assert found.sketch(20).shape == (*j.shape[:2], 20)
    scores = torch.stack([(e.value - kernel) / e.standard_error for e in estimates])
    mean = torch.stack([e.value for e in estimates]).mean(0) - kernel
    assert float((mean / estimates[0].standard_error).abs().max()) < 6 / math.sqrt(20)
    assert 0.6 < float(scores.square().mean().sqrt()) < 1.2


def test_nystrom_is_positive_and_knows_its_error():
    _, j, found = everything("cnn")
    kernel = oracle.gram(j)
    ratios = []
    for seed in range(12):
        estimate = found.approximate_gram("nystrom", rank=6, seed=seed)
        flat = estimate.value.view(20, 20)
        values = torch.linalg.eigvalsh(flat)
        assert values[0] > -1e-10 * values[-1]
        assert (values > 1e-8 * values[-1]).sum() == 6
        true = (flat - kernel.view(20, 20)).square().mean().sqrt()
        ratios.append(float(estimate.standard_error / true))
    assert 0.8 < sum(r * r for r in ratios) / len(ratios) < 1.25
    whole = found.approximate_gram("nystrom", rank=20)
    assert relative_error(whole.value, kernel) < 1e-6
    best = torch.linalg.eigvalsh(kernel.view(20, 20))[:-6].square().sum().sqrt() / 20
    assert true < 5 * best


@pytest.mark.parametrize("name", ["cnn", "convolutions", "vit", "degenerate"])
def test_the_largest_eigenvalues_with_their_bounds(name):
    if name == "degenerate":  # a linear model's eigenvalues come C at a time
        torch.manual_seed(0)
        model, x = nn.Linear(6, 4).double(), torch.randn(5, 6).double()
        found, rows = nt.jacobian(model(x), model), torch.cat([x, torch.ones(5, 1).double()], 1)
        true = torch.linalg.eigvalsh(rows @ rows.T).flip(0).repeat_interleave(4)
    else:
        _, j, found = everything(name)
        true = torch.linalg.eigvalsh(oracle.gram(j).flatten(2).flatten(0, 1)).flip(0)
    for k in (1, 3, len(true)):
        estimate = found.spectrum(k)
        error = estimate.value - true[:k]
        assert bool((error.abs() <= estimate.standard_error + 1e-9 * true[0]).all())
        assert bool((estimate.standard_error <= 1e-4 * true[0]).all())
        assert estimate.probes <= len(true)


def test_pseudo_kernels():
    _, j, found = everything("forces")
    c = j.shape[1]
    summed = j.sum(1) / c**0.5
    assert relative_error(found.pseudo().gram()[:, 0, :, 0], summed @ summed.T) < 1e-10
    traced = torch.einsum("ncp,mcp->nm", j, j)
    draws = torch.stack(
        [found.pseudo("random", k=2, seed=s).gram(trace_outputs=True) for s in range(100)]
    )
    draws *= c / 2
    assert float(((draws.mean(0) - traced) / (draws.std(0) / 10)).abs().max()) < 4.5


@pytest.mark.parametrize(("outputs", "method"), [(256, "exact"), (257, "hutchinson")])
def test_the_measure_says_whether_it_is_an_estimate(outputs, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, outputs)).double()
    x = torch.randn(zoo.N, 6).double()
    exact = nt.jacobian(model(x), model).trace(per_layer=True)
    tracer = nt.Tracer(nt.Probe(x), ["ntk/trace", "ntk/trace_per_layer"], on_error="raise")
    whole, layers, *_ = tracer(model, 0)
    assert whole.attributes["method"] == layers.attributes["method"] == method
    assert layers.value.sum() == pytest.approx(float(whole.value), rel=1e-12)
    true = torch.stack(list(exact.values())).numpy()
    if method == "exact":
        assert whole.attributes["error_of"] == layers.attributes["error_of"] == "samples"
        rows = nt.jacobian(model(x), model).norms(per_layer=True)
        shares = torch.stack([r.square().sum(1) for r in rows.values()]).numpy()
        error = shares.std(1, ddof=1) * zoo.N**0.5  # of a sum over the samples
        assert layers.standard_error == pytest.approx(error, rel=1e-9)
        error = shares.sum(0).std(ddof=1) * zoo.N**0.5
        assert whole.standard_error == pytest.approx(error, rel=1e-9)
        assert layers.value == pytest.approx(true, rel=1e-12)
    else:
        assert whole.attributes["error_of"] == layers.attributes["error_of"] == "estimator"
        assert 0 < whole.standard_error < 0.01 * whole.value
        assert abs(whole.value - true.sum()) < 4 * whole.standard_error
        assert (abs(layers.value - true) <= 5 * layers.standard_error + 1e-9 * true).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j: j.estimate_trace("exact"), "expected 'hutchinson', 'hutch\\+\\+' or 'xtrace'"),
        (lambda j: j.estimate_trace(probes=1), "at least 2 probes"),
        (lambda j: j.estimate_trace(relative_error=0), "positive relative error"),
        (lambda j: j.estimate_trace("xtrace", relative_error=0.1), "'hutchinson' or 'hutch"),
        (lambda j: j.gram_product(torch.ones(3)), r"shape \(4, 3\), got \(3,\)"),
        (lambda j: j.pseudo("mean"), "'sum' or 'random', got 'mean'"),
        (lambda j: j.pseudo("sum", k=2), "k = 1 for 'sum'"),
        (lambda j: j.sketch(0), "at least 1, got 0"),
        (lambda j: j.approximate_gram("svd", rank=2), "'sketch' or 'nystrom', got 'svd'"),
        (lambda j: j.approximate_gram(rank=13), "from 1 to N C = 12, got 13"),
        (lambda j: j.spectrum(0), "from 1 to N C = 12, got 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    member = zoo.build("mlp")
    found = nt.jacobian(member.forward(member.model, member.batch), member.model)
    with pytest.raises(ValueError, match=message):
        call(found)
