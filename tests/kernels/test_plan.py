"""Which form is cheapest: crossovers in closed form, counts by brute force, times on a GPU."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import nettrace.kernels as kernels
import nettrace.kernels.plan as planning
from nettrace.kernels import Outer, Still, factors, gram_cost, is_written_out
from nettrace.kernels.plan import CEILINGS, Ceilings, Layer, gram_work, norm_work, plan

#: Of no device: memory that is never waited for, and no form that gets more of it than another.
COUNTS = Ceilings(1.0, 1.0, 1.0, math.inf)
WIDTHS = [(768, 768), (768, 3072), (576, 64), (2048, 8192)]
BF16 = torch.bfloat16


def chosen(quantity, samples, tokens, inputs, outputs, dtype=BF16, ceilings=CEILINGS["sm90"]):
    layer = Layer(samples, tokens, inputs, outputs)
    return plan(quantity, layer, dtype=dtype, ceilings=ceilings).form


def crossover(quantity, samples, *widths, **options):
    """The first number of tokens at which ghost is no longer the cheapest."""
    for tokens in range(2, 5000):
        if chosen(quantity, samples, tokens, *widths, **options) != "ghost":
            return tokens
    raise AssertionError("there is none")


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_operations_cross_where_they_are_equal(inputs, outputs):
    harmonic = inputs * outputs / (inputs + outputs)

    def operations(works, t, n=32):
        return {form: work.operations for form, work in works(Layer(n, t, inputs, outputs)).items()}

    t = 2 * harmonic
    below, above = (operations(norm_work, n) for n in (math.floor(t) - 1, math.ceil(t) + 1))
    assert below["ghost"] < below["psg"]
    assert above["ghost"] > above["psg"]
    # N^2 T^2 (I + O) = 2 N T I O + N^2 I O, which has T = sqrt(I O / (I + O)) for many samples.
    for n in (32, 10**6):
        t = harmonic / n + math.sqrt((harmonic / n) ** 2 + harmonic)
        below, above = (operations(gram_work, x, n) for x in (int(0.9 * t), math.ceil(t) + 1))
        assert below["ghost"] < below["written"]
        assert above["ghost"] > above["written"]


@pytest.mark.parametrize(("inputs", "outputs"), WIDTHS)
def test_norms_cross_near_the_harmonic_mean(inputs, outputs):
    t = crossover("sqnorm", 32, inputs, outputs)
    assert t == pytest.approx(2 * inputs * outputs / (inputs + outputs), rel=0.25)


def test_gram_matrices_cross_at_20_to_50_tokens():
    for samples, dtype in ((256, BF16), (1024, BF16), (256, torch.float32)):
        for widths in WIDTHS[:2]:
            assert 16 <= crossover("gram", samples, *widths, dtype=dtype) <= 50
    # Of few samples, gradients that are written are waited for, and more tokens may meet.
    assert 50 < crossover("gram", 32, 768, 768) < 150


@given(
    samples=st.integers(1, 512),
    widths=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    cotangents=st.sampled_from([1, 10]),
    quantity=st.sampled_from(["sqnorm", "gram"]),
    name=st.sampled_from(sorted(CEILINGS)),
    dtype=st.sampled_from([torch.float64, torch.float32, BF16, torch.complex64]),
)
def test_more_tokens_never_make_ghost_the_cheapest_again(
    samples, widths, cotangents, quantity, name, dtype
):
    forms = [
        plan(
            quantity, Layer(samples, t, *widths, cotangents), dtype=dtype, ceilings=CEILINGS[name]
        ).form
        for t in (1, 2, 3, 5, 9, 17, 40, 100, 300, 1000, 5000)
    ]
    assert forms[0] == "single"
    is_ghost = [form == "ghost" for form in forms[1:]]
    assert is_ghost == sorted(is_ghost, reverse=True)


def test_a_table_of_layers():
    """Of transformers, a ResNet and an MLP: N, T, I, O, norms, Gram matrix."""
    for *layer, norms, gram in [
        (32, 197, 768, 2304, "ghost", "written"),
        (16, 1024, 768, 768, "psg", "written"),
        (64, 3136, 576, 64, "psg", "written"),
        (64, 49, 512, 2048, "ghost", "ghost"),
        (256, 16, 768, 768, "ghost", "ghost"),
        (1024, 1, 1024, 1024, "single", "single"),
    ]:
        assert chosen("sqnorm", *layer) == norms
        assert chosen("gram", *layer) == gram


def test_a_pair_of_layers_is_twice_its_half():
    layer = Layer(8, 5, 7, 3, cotangents=2)
    own, pair = gram_work(layer), gram_work(layer, layer)
    assert pair["ghost"].operations == 2 * own["ghost"].operations
    assert pair["written"].operations == 2 * own["written"].operations


def test_lookups_are_compared_not_multiplied():
    words, vectors = (Layer(8, 100, 50_000, 64, lookup=x) for x in (True, False))
    assert norm_work(words)["ghost"].operations < norm_work(vectors)["ghost"].operations / 100
    assert plan("sqnorm", words, dtype=BF16, ceilings=CEILINGS["sm90"]).form == "ghost"


def test_a_quantity_that_there_is_not():
    with pytest.raises(ValueError, match="sqnorm or gram, got 'norm'"):
        plan("norm", Layer(1, 1, 1, 1), dtype=BF16, ceilings=COUNTS)


def test_the_engine_asks_on_cuda_alone(monkeypatch):
    """Tensors of a device that is not there, of which shapes alone are read."""
    asked = []

    def noted(quantity, *layers, **options):
        asked.append((quantity, *layers))
        return plan(quantity, *layers, **options)

    monkeypatch.setattr(planning, "plan", noted)
    monkeypatch.setattr(planning, "architecture", lambda device: "sm90")

    def outer(tokens, device):
        a = torch.empty(4, 1, tokens, 768, device=device)
        g = torch.empty(1, 4, 1, tokens, 3072, device=device)
        return Outer(Still(a, 768), g, moves_left=True)

    x = outer(8, "cpu")
    gram_cost(x, 32)
    factors.sqnorms(x)
    assert asked == []
    with FakeTensorMode():
        few, many = outer(8, "cuda"), outer(500, "cuda")
        assert not is_written_out(few, 32)
        assert is_written_out(many, 32)
        assert 1.9 <= gram_cost(many, 64) / gram_cost(many, 32) <= 4
        with pytest.raises(RuntimeError):  # where it would compute
            factors.sqnorms(few)
    layer = Layer(32, 8, 768, 3072)
    assert ("gram", layer) in asked
    assert ("sqnorm", layer._replace(samples=4)) in asked


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 16, 64, 197])
@pytest.mark.parametrize("samples", [32, 128])
def test_the_cheapest_form_is_nearly_the_fastest(samples, tokens):
    """Against all forms, timed: what is chosen takes at most twice as long as the best."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    a, g = (torch.randn(samples, tokens, width, device="cuda", dtype=BF16) for width in (768, 3072))

    def written():
        p = (a.mT @ g).flatten(1)
        return p @ p.T

    forms = {
        "sqnorm": {
            "ghost": lambda: kernels.ghost_sqnorm(a, g),
            "psg": lambda: kernels.psg_moments(a, g, dw=False),
        },
        "gram": {"ghost": lambda: kernels.ghost_gram(a, g), "written": written},
    }
    ceilings = CEILINGS[kernels.launch.architecture(a.device)]
    for quantity, calls in forms.items():
        taken = {form: median_time(call) for form, call in calls.items()}
        layer = Layer(samples, tokens, 768, 3072)
        form = plan(quantity, layer, dtype=BF16, ceilings=ceilings).form
        assert taken[form] <= 2 * min(taken.values()), taken


def median_time(call, repeats=20):
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2]
