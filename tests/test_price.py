"""Prices told before the run are near what is paid, and what is too dear is refused, unstarted."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import nettrace as nt
from nettrace import pieces, price
from nettrace.freeze import frozen
from nettrace.kernels import Dense, Outer, Still, Sum, gram_cost, is_written_out, repeated
from nettrace.measures import resolve, statistics
from nettrace.operator import Jacobian
from nettrace.statistics import Statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import workloads

SMALL = {
    "mlp": lambda: workloads.mlp(samples=64, width=256),
    "lenet": lambda: workloads.lenet(samples=16),
    "resnet": lambda: workloads.resnet(samples=2, width=8),
    "vit": lambda: workloads.vit(samples=4, width=48, depth=2),
    "gpt": lambda: workloads.gpt(samples=4, context=32, width=64, depth=2),
}
#: Prices are within a factor of two on an idle machine; machines that run tests are not idle.
BOUND = 4


def probe(w):
    targets = w.targets if w.targets.dim() == 1 else w.targets[:, -1] % workloads.CLASSES
    return nt.Probe(w.inputs, targets, forward=lambda model, x: workloads.select(model(x)))


def small(outputs=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs))
    return model, nt.Probe(torch.randn(6, 4), torch.arange(6) % outputs)


@pytest.mark.parametrize("name", SMALL)
def test_predicted_times_are_near_those_taken(name, monkeypatch):
    monkeypatch.setattr(pieces, "clock", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    w = SMALL[name]()
    with frozen(w.model):
        found = pieces.Pieces(Statistics(w.model, probe(w)))
        for measure in resolve(["ntk/trace", "collective/chi_net", "ntk/spectrum"]):
            predicted = price.price(found, measure.needs).seconds
            taken = []
            for _ in range(2):
                look = Statistics(w.model, probe(w), measure.needs)
                start = time.process_time()
                measure(look)
                taken.append(time.process_time() - start)
            assert 1 / BOUND < predicted / min(taken) < BOUND, (measure.name, predicted, taken)
    torch.set_num_threads(threads)


def test_the_count_of_multiplications_is_that_of_the_form():
    still = Still(torch.randn(2, 1, 5, 7), 7)
    outer = Outer(still, torch.randn(1, 2, 1, 5, 3))
    many = repeated(outer, 4)
    assert many.moving.shape == (4, 2, 1, 5, 3)
    assert many.moving.untyped_storage().nbytes() == outer.moving.untyped_storage().nbytes()
    # By tokens: T S (D + K M) + K K T M for each of three pairs of two samples.
    assert not is_written_out(many, 2)
    assert gram_cost(many, 2) == 3 * (5 * 5 * (7 + 4 * 3) + 4 * 4 * 5 * 3)
    long = repeated(Outer(Still(torch.randn(2, 1, 500, 7), 7), torch.randn(1, 2, 1, 500, 3)), 4)
    assert is_written_out(long, 2)
    assert gram_cost(long, 20) < 20**2 * 500**2
    rows = repeated(Dense(torch.randn(1, 2, 11)), 4)
    assert gram_cost(rows, 200) / gram_cost(rows, 100) == pytest.approx(4, rel=0.1)
    assert gram_cost(repeated(Sum((outer, outer)), 4), 2) == 4 * 2 * 7 * 3 * (10 + 4 * 2 / 2)


def test_what_is_shared_is_paid_once():
    model, data = small()
    with frozen(model):
        found = pieces.Pieces(Statistics(model, data))
        alone = {n: price.price(found, [n]) for n in ("gram", "eigenvalues", "blocks", "trace")}
        both = price.price(found, ["gram", "eigenvalues", "first.blocks", "previous.gram"])
    assert alone["gram"].passes == alone["blocks"].passes == alone["trace"].passes == 3
    assert both.passes == 3
    assert both.seconds == pytest.approx(alone["eigenvalues"].seconds)
    assert alone["gram"].seconds > alone["blocks"].seconds > 0


@pytest.mark.parametrize(
    ("needs", "passes"),
    [
        (["losses", "outputs", "model"], 0),
        (["loss_gradient_sqnorms"], 1),
        (["mean_gradient_sqnorm"], 1),
        (["drawn_sqnorms"], 8),
        (["trace", "fisher_sqnorms", "hessian_trace"], 3),  # turned onto eigenvectors: one pass
        (["trace", "gram"], 6),
    ],
)
def test_backward_passes_are_counted(needs, passes, monkeypatch):
    model, data = small()
    pulled = []
    basis = Jacobian._basis
    monkeypatch.setattr(
        Jacobian, "_basis", lambda self, ks: pulled.append(ks.stop - ks.start) or basis(self, ks)
    )
    with frozen(model):
        assert price.price(pieces.Pieces(Statistics(model, data)), needs).passes == passes
        pulled.clear()
        look = Statistics(model, data, needs)
        for need in needs:
            getattr(look, need)
    assert sum(pulled) + ("mean_gradient_sqnorm" in needs) == passes


def test_every_statistic_has_a_price_and_unknown_ones_that_of_a_trace():
    model, data = small()
    assert set(statistics()) <= set(price.PRICES), set(statistics()) - set(price.PRICES)
    with frozen(model):
        found = pieces.Pieces(Statistics(model, data))
        assert price.price(found, ["unheard_of"]).passes == price.price(found, ["trace"]).passes
    names = {name for name in price.PRICES if not name.startswith("_")}
    assert names <= set(statistics())


def test_what_would_take_too_long_is_not_started(monkeypatch):
    model, data = small()
    monkeypatch.setattr(Jacobian, "gram_and_layer_blocks", lambda self: pytest.fail("started"))
    monkeypatch.setattr(pieces.Pieces, "eigenvalues", lambda self, order: 1e-3 * order**3)
    tracer = nt.Tracer(data, ["ntk/entropy", "loss/mean", "collective/chi_net"], max_seconds=5)
    with pytest.warns(nt.MissingMeasureWarning, match="TooDear: ntk/entropy would take about"):
        records = {record.name: record for record in tracer(model, 0)}
    missing = records["ntk/entropy"].missing
    for text in ("12 s and", "above max_seconds=5", "Jacobian.spectrum", "of 4 samples fits"):
        assert text in missing
    assert records["loss/mean"].missing is None
    assert records["collective/chi_net"].missing is None  # the blocks alone, without the matrix
    with pytest.raises(nt.TooDear, match="max_seconds=5"):
        nt.Tracer(data, "ntk/entropy", max_seconds=5, on_error="raise")(model, 0)


def test_what_would_not_fit_into_memory_is_refused_with_what_would():
    model, data = small()
    tracer = nt.Tracer(data, ["ntk/gram", "ntk/trace"], memory_budget=1000)
    with pytest.warns(nt.MissingMeasureWarning, match=r"above memory_budget=1e\+03 B|1 kB"):
        gram, trace = tracer(model, 0)[:2]
    assert "samples fits" in gram.missing
    fitting = int(gram.missing.partition(" samples fits")[0].rpartition(" ")[2])
    assert 0 < fitting < 6
    fewer = nt.Probe(data.inputs[:fitting], data.targets[:fitting])
    assert nt.Tracer(fewer, "ntk/gram", memory_budget=1000)(model, 0)[0].missing is None
    assert trace.missing is None


def test_prices_are_told_once_for_a_tape_and_disturb_nothing(monkeypatch):
    model, data = small()
    told = []
    monkeypatch.setattr(
        pieces.Pieces, "gram", lambda self, told=told: told.append(self.samples) or 0.0
    )
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    tracer = nt.Tracer(data, "ntk/gram")
    for step in range(4):
        tracer(model, step)
    assert len(told) == 1
    model.insert(2, nn.Tanh())
    tracer(model, 4)
    assert len(told) == 2
    assert nt.Tracer(data, "ntk/gram", max_seconds=None)(model, 0)[0].missing is None
    assert len(told) == 2
    explanation = tracer.explain(model)
    model.pop(2)
    assert "ntk/gram" in str(explanation)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_explanation_prices_each_and_all_together():
    model, data = small()
    tracer = nt.Tracer(data, ["ntk", "fisher", "loss"], max_seconds=1e-9)
    found = tracer.explain(model)
    assert set(found.measures) == {measure.name for measure in tracer.measures}
    assert set(found.refused) == {n for n, p in found.measures.items() if p.seconds > 1e-9}
    assert "all without *" in str(found)
    assert found.look.bytes > sum(p.nbytes for p in model.parameters())
    assert all(len(line) <= 80 for line in found.table(80).splitlines())
    found = nt.Tracer(data, ["ntk", "fisher", "loss"]).explain(model)
    assert not found.refused
    assert found.together.seconds < sum(p.seconds for p in found.measures.values())
    with pytest.raises(ValueError, match="max_seconds above 0"):
        nt.Tracer(data, "loss", max_seconds=0)


def test_a_callback_explains_and_passes_its_limit_on():
    from nettrace.callbacks import Trace

    model, data = small()
    assert "ntk/trace" in Trace("ntk", probe=data).explain(model).measures
    assert Trace("ntk", probe=data, max_seconds=1e-9).explain(model).refused
    with pytest.raises(ValueError, match="pass probe="):
        Trace("ntk").explain(model)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.0123, "12 ms"), (75, "1.2 min"), (7e5, "190 h")]
)
def test_durations_are_told_to_two_digits(seconds, text):
    assert price.duration(seconds) == text
