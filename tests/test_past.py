"""What is kept of earlier looks, and of which step."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import nettrace as nt
from nettrace import measures
from nettrace.measures import registry
from nettrace.past import Past

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(5) % 2


class Look:
    """Statistics that say of which step they are."""

    def __init__(self, step):
        self.step = step
        self.gram = torch.full((2,), float(step))
        self.weights = {"w": torch.full((3,), float(step))}
        self.asked = []

    def together(self):
        return nullcontext()

    def __getattr__(self, name):
        raise ValueError(f"there is no {name}")


def found(past, reference, step):
    kept = past.before(reference, step)
    return None if kept is None else (kept.step, {n: float(kept[n][0]) for n in reference[1:]})


FIRST, PREVIOUS = ("first", "gram"), ("previous", "gram")


def test_what_is_first_and_previous_is_kept_for_each_reference_with_its_own_step():
    past = Past()
    past.keep(Look(0), [FIRST])
    past.keep(Look(10), [FIRST, PREVIOUS])
    past.keep(Look(20), [PREVIOUS])
    past.keep(Look(25), [("first", "gram", "step"), ("first",)])
    assert found(past, FIRST, 30) == (0, {"gram": 0})
    assert found(past, PREVIOUS, 30) == (20, {"gram": 20})
    assert past.before(("first",), 30)["step"] == 25
    assert past.before(("first", "weights"), 30) is None


def test_a_look_taken_again_at_one_step_finds_the_same():
    past = Past()
    for step in (0, 10, 20, 20, 20):
        before = [found(past, reference, 20) for reference in (FIRST, PREVIOUS)]
        past.keep(Look(step), [FIRST, PREVIOUS])
    assert before == [(0, {"gram": 0}), (10, {"gram": 10})]
    assert found(past, PREVIOUS, 21) == (20, {"gram": 20})


def test_an_earlier_step_begins_another_run():
    past = Past()
    for step in (0, 10):
        past.keep(Look(step), [FIRST, PREVIOUS])
    assert found(past, FIRST, 5) is found(past, PREVIOUS, 5) is None
    past.keep(Look(5), [PREVIOUS])
    assert found(past, FIRST, 20) is None
    assert found(past, PREVIOUS, 20) == (5, {"gram": 5})


def test_what_cannot_be_had_is_not_kept():
    past = Past()
    past.keep(Look(0), [("first", "absent"), ("first", "absent", "gram"), FIRST])
    assert found(past, FIRST, 1) == (0, {"gram": 0})
    assert past.before(("first", "absent", "gram"), 1) is None


def test_what_is_kept_is_a_copy_shared_by_all_who_ask_for_it():
    past, look = Past(), Look(3)
    both = ("first", "gram", "weights")
    past.keep(look, [FIRST, both, PREVIOUS])
    look.gram.fill_(-1), look.weights["w"].fill_(-1)
    assert past.before(both, 4)["gram"].tolist() == [3, 3]
    assert past.before(both, 4)["weights"]["w"].tolist() == [3, 3, 3]
    places = {past.before(r, 4)["gram"].data_ptr() for r in (FIRST, both, PREVIOUS)}
    assert len(places) == 1


def test_a_past_is_saved_as_tensors_and_numbers(tmp_path):
    past, other = Past(), Past()
    for step in (0, 7, 9):
        past.keep(Look(step), [FIRST, PREVIOUS, ("first", "weights"), ("first",)])
    torch.save(past.state_dict(), tmp_path / "past.pt")
    other.load_state_dict(torch.load(tmp_path / "past.pt", weights_only=True))
    for step in (0, 5, 9, 10):
        for reference in (FIRST, PREVIOUS):
            assert found(other, reference, step) == found(past, reference, step)
    assert other.before(("first", "weights"), 10)["weights"]["w"].tolist() == [0, 0, 0]
    assert other.before(("first",), 10).step == 0


# In measures --------------------------------------------------------------------------------------


@pytest.fixture
def register(monkeypatch):
    """Registers measures for one test."""
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    return lambda name, needs: registry.measure(name, needs=needs, convention="as asked")


def test_a_measure_gets_values_and_steps_of_one_look(register):
    seen = {}

    @register("own/one", ["step", "first.outputs", "first.step", "outputs"])
    def one(step, earlier, earlier_step, outputs):
        seen["one", step] = earlier_step, float(earlier[0, 0])
        return outputs.mean()

    @register("own/both", ["step", "first.outputs", "first.weights", "first.step"])
    def both(step, earlier, weights, earlier_step):
        seen["both", step] = earlier_step, float(earlier[0, 0]), float(weights["bias"][0])
        return 0.0

    @register("own/last", ["step", "previous.outputs", "previous.step"])
    def last(step, earlier, earlier_step):
        seen["last", step] = earlier_step, float(earlier[0, 0])
        return 0.0

    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    tracer = nt.Tracer(nt.Probe(X), "own", on_error="raise")
    due = {0: "one", 10: "one both", 20: "both last", 30: "one both last", 45: "one last"}
    for step, names in due.items():
        nn.init.constant_(model.bias, step)
        names = measures.resolve([f"own/{name}" for name in names.split()])
        records = tracer.measure(model, step, names)
        for record in records:
            name = record.name.partition("/")[2]
            if (name, step) in seen:
                assert record.attributes["reference_step"] == seen[name, step][0]
    firsts = {("one", s): (0, 0) for s in (0, 10, 30, 45)}
    both_of_ten = {("both", s): (10, 10, 10) for s in (10, 20, 30)}
    assert seen == firsts | both_of_ten | {("last", 30): (20, 20), ("last", 45): (30, 30)}


def test_nothing_is_computed_or_kept_that_no_measure_asked_for(monkeypatch):
    unasked = property(lambda _: pytest.fail("nobody asked"))
    for name in ("gram", "eigenvectors", "linearised_outputs", "constants"):
        monkeypatch.setattr(nt.statistics.Statistics, name, unasked)
    tracer = nt.Tracer(nt.Probe(X), ["weights/displacement", "ntk/trace"], on_error="raise")
    for step in range(3):
        tracer(nn.Linear(3, 2), step)
    (state,) = tracer.state_dict().values()
    assert list(state["kept"]) == ["first weights"]
    plain = nt.Tracer(nt.Probe(X), "ntk/trace", on_error="raise")
    plain(nn.Linear(3, 2), 0)
    (state,) = plain.state_dict().values()
    assert state["kept"] == {}


def test_what_keeps_a_measure_from_its_first_value_is_said_at_once():
    class Coupled(nn.Linear):
        def forward(self, x):
            return super().forward(x) - super().forward(x).mean(0)

    tracer = nt.Tracer(nt.Probe(X), "ntk/velocity")
    with pytest.warns(nt.MissingMeasureWarning, match="ntk/velocity is missing at step 0"):
        assert tracer(Coupled(3, 2), 0)[0].missing


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (["first.trace"], "cannot keep 'trace'.*tensor or one for each parameter"),
        (["previous.likelihood"], "cannot keep 'likelihood'"),
        (["last.gram"], "unknown statistic 'last.gram'"),
        (["first.gram", "previous.gram"], "compare with one earlier look, got .*first.*previous"),
        (["linearised_outputs", "first.gram"], "compare with one earlier look"),
    ],
)
def test_needs_that_cannot_be_met_are_refused_where_they_are_declared(register, needs, says):
    with pytest.raises(ValueError, match=says):
        register("own/measure", needs)


def test_a_tracer_takes_up_where_another_was_saved(tmp_path):
    names = ["ntk/velocity", "ntk/distance_first", "weights"]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def step_of(tracer, step):
        torch.manual_seed(step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return values(tracer(model, step))

    def values(records):
        return {
            r.name: (r.value.tolist(), r.attributes.get("reference_step"))
            for r in records
            if not r.name.startswith("nettrace/")
        }

    whole = nt.Tracer(nt.Probe(X, Y), names, on_error="raise")
    for step in (0, 2, 5):
        last = step_of(whole, step)
    torch.save(whole.state_dict(), tmp_path / "past.pt")
    resumed = nt.Tracer(nt.Probe(X, Y), names, on_error="raise")
    resumed.load_state_dict(torch.load(tmp_path / "past.pt", weights_only=True))
    assert values(resumed(model, 5)) == last  # the look that the checkpoint was taken at
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = step_of(whole, 9)
    model.load_state_dict(weights)
    assert step_of(resumed, 9) == expected
    assert expected["ntk/velocity"][1] == 5
    assert expected["weights/displacement"][1] == 0
    with pytest.raises(ValueError, match="looks on other samples cannot be compared"):
        nt.Tracer(nt.Probe(X + 1, Y), names).load_state_dict(whole.state_dict())
