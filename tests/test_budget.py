"""The share of wall time spent measuring stays within its budget, whatever things cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nettrace as nt
from nettrace import tracer as tracer_module
from nettrace.budget import MARGIN, Budget

ALL = frozenset({"all"})
#: What rounding may add to a share.
ROUNDING = 1e-9


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Training:
    """A training of which steps and measurements take as long as one says."""

    def __init__(self, limit: float = 0.05) -> None:
        self.clock = Clock()
        self.budget = Budget(limit, self.clock)
        self.spent = 0.0
        #: (step, spent, wall time) at the end of each measurement, where the share is largest.
        self.measured: list[tuple[int, float, float]] = []

    @property
    def wall(self) -> float:
        return self.clock.now - 1000

    def candidate(self, step: int, cost: float, what: frozenset = ALL, **options: Any) -> bool:
        if not self.budget.allows(what, **options):
            return False
        with self.budget.measuring(what):
            self.clock.now += cost
            self.spent += cost
            if self.wall:
                assert self.budget.share == pytest.approx(self.spent / self.wall)
        self.measured.append((step, self.spent, self.wall))
        return True

    def run(
        self, steps: Iterable[int], seconds: float, cost: Callable[[int], float] | float
    ) -> None:
        for step in steps:
            self.candidate(step, cost(step) if callable(cost) else cost)
            self.clock.now += seconds

    def over(self, limit: float = 0.05) -> list[int]:
        """The steps after whose measurement the share was above the limit."""
        return [s for s, spent, wall in self.measured if spent > limit * wall * (1 + ROUNDING)]


RATIOS = [*range(1, 20), *range(20, 100, 10), *range(100, 1001, 100)]


@pytest.mark.parametrize("ratio", [*RATIOS, *(1 / ratio for ratio in RATIOS)])
@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_the_share_stays_within_the_budget_and_uses_it(ratio: float, limit: float) -> None:
    training = Training(limit)
    training.run(range(int(10 * max(ratio, 1) / limit)), 1.0, ratio)
    assert training.over(limit) == [0]  # the first alone, which is paid back
    affordable = min(training.wall * limit / ratio, training.wall / (1 + ratio))
    assert len(training.measured) >= affordable - 1 - MARGIN


@given(
    costs=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200),
    seconds=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20),
    limit=st.floats(0.001, 1),
)
def test_what_is_over_is_what_was_not_expected(
    costs: list[float], seconds: list[float], limit: float
) -> None:
    training = Training(limit)
    dearest: list[float] = []
    for step, cost in enumerate(costs):
        expected = MARGIN * max(dearest[1:]) if dearest[1:] else sum(dearest)  # the first apart
        before = training.spent / training.wall if training.wall else 0
        if training.candidate(step, cost):
            over = training.spent - limit * training.wall
            rounding = 1e-12 * training.clock.now
            assert over <= (1 - limit) * max(0, cost - expected) + rounding
            assert before <= limit * (1 + 1e-6)  # nothing while it is to be paid back
            dearest.append(cost)
        training.clock.now += seconds[step % len(seconds)]


@pytest.mark.parametrize("factor", [0.001, 0.1, 3, 30])
def test_a_cost_that_changes_in_the_middle_is_paid_back_and_known_from_then_on(
    factor: float,
) -> None:
    training = Training()
    training.run(range(40_000), 0.1, lambda step: 1 if step < 5000 else factor)
    changed = next(step for step, *_ in training.measured if step >= 5000)
    assert training.over() == ([0, changed] if factor > 1 else [0])
    after = [step for step, *_ in training.measured if step > changed]
    affordable = 0.05 * (35_000 * 0.1 - 20 * (1 + factor)) / factor
    assert len(after) > min(affordable / 2, 30_000)


def test_a_first_that_is_dearer_than_the_rest_is_forgotten_once_there_is_a_second() -> None:
    training = Training()
    training.run(range(1000), 1.0, lambda step: 10 if step == 0 else 1)
    assert training.over() == [0]
    first, second, third, *_ = [step for step, *_ in training.measured]
    assert (first, second) == (0, 390 - 10)  # 20 x 2 x 10 seconds, less what they take
    assert third == second + 1  # of what was saved up


def test_what_is_dearer_now_and_then_is_expected_from_the_second_on() -> None:
    training = Training()
    training.run(range(4000), 1.0, lambda step: 3 if len(training.measured) % 4 == 3 else 1)
    assert training.over() == [0, training.measured[3][0]]
    assert len(training.measured) > 60


def test_the_cheap_and_frequent_does_not_starve_the_dear_and_rare() -> None:
    cheap, dear = frozenset({"loss"}), frozenset({"loss", "ntk"})
    training = Training()
    counts = {cheap: 0, dear: 0}
    for step in range(30_000):
        what = dear if step % 100 == 0 else cheap
        counts[what] += training.candidate(step, 20 if what is dear else 0.2, what)
        training.clock.now += 1
    assert training.over() == [0]
    assert counts[dear] * 20 >= training.spent / 5
    assert counts[cheap] * 0.2 >= training.spent / 5
    assert training.spent >= 0.045 * training.wall


def test_what_is_new_is_expected_to_take_as_long_as_the_cheapest_that_had_it_and_more() -> None:
    a, b, c = frozenset("a"), frozenset("b"), frozenset("c")
    training = Training()
    assert training.budget.expected(a) == np.inf
    for what, cost in ((a | b | c, 5), (a | b, 3)):
        with training.budget.measuring(what):
            training.clock.now += cost
    assert training.budget.expected(a) == 3
    assert training.budget.expected(c) == 5
    assert training.budget.expected(frozenset("d")) == 5
    with training.budget.measuring():  # is counted, and teaches nothing
        training.clock.now += 100
    assert training.budget.share == 1
    assert training.budget.expected(frozenset("d")) == 5


def test_what_is_kept_for_the_last_step_is_there() -> None:
    for seconds in (0.5, 1.0, 1.7, 3.1):
        kept, plain = Training(), Training()
        for step in range(500):
            kept.candidate(step, 1, reserve=ALL)
            plain.candidate(step, 1)
            kept.clock.now += seconds
            plain.clock.now += seconds
            # Whichever step turns out to be the last, it is affordable once anything was.
            if step and len(kept.measured) > 1:
                assert kept.budget.allows(ALL)
        assert len(plain.measured) - 2 * MARGIN <= len(kept.measured) <= len(plain.measured)


def test_a_whole_share_allows_everything() -> None:
    training = Training(1)
    training.run(range(100), 0.0, lambda step: 10.0**step)
    assert len(training.measured) == 100


@pytest.mark.parametrize(
    ("limit", "kind", "says"),
    [
        (0, ValueError, "above 0 and at most 1, .*got 0"),
        (-0.1, ValueError, "got -0.1"),
        (5, ValueError, "such as 0.05 for 5 %, got 5"),
        (float("nan"), ValueError, "got nan"),
        ("5%", TypeError, "share of wall time, got '5%'"),
        (True, TypeError, "got True"),
    ],
)
def test_a_budget_that_is_no_share_is_refused(limit: Any, kind: type, says: str) -> None:
    probe = nt.Probe(torch.ones(2, 2))
    with pytest.raises(kind, match=says):
        nt.Tracer(probe, "loss", budget=limit)


# A loop of one's own -----------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of budgets, by which a measurement takes two seconds."""
    clock = Clock()
    measure = nt.Tracer.measure

    def slow(self: nt.Tracer, *args: Any) -> list[nt.Record]:
        clock.now += 2
        return measure(self, *args)

    monkeypatch.setattr(tracer_module, "Budget", partial(Budget, clock=clock))
    monkeypatch.setattr(nt.Tracer, "measure", slow)
    return clock


def loop(tracer: nt.Tracer, clock: Clock, total: int) -> list[nt.Record]:
    model = torch.nn.Linear(4, 3)
    found = []
    for step in range(total + 1):
        found += tracer(model, step)
        clock.now += 1
    return found


def probe() -> nt.Probe:
    return nt.Probe(torch.randn(6, 4), torch.arange(6) % 3)


def test_a_tracer_leaves_steps_out_and_says_how_many(clock: Clock, tmp_path: Path) -> None:
    tracer = nt.Tracer(probe(), "loss/mean", every=2, budget=0.05, to=tmp_path)
    loop(tracer, clock, 400)
    trace = nt.open(tmp_path)
    steps = trace.step.values
    assert steps[0] == 0
    assert 8 <= len(steps) <= 11
    assert (trace.nettrace_share.values[1:] <= 0.05 * (1 + ROUNDING)).all()
    assert trace.nettrace_share.values[-1] > 0.04
    assert trace.nettrace_share.attrs["budget"] == 0.05
    left_out = np.diff(steps, prepend=-2) // 2 - 1
    assert trace.nettrace_skipped.values.tolist() == left_out.tolist()
    assert '"budget": 0.05' in trace.attrs["configuration"]


def test_time_before_the_first_call_is_no_training(clock: Clock) -> None:
    tracer = nt.Tracer(probe(), "loss/mean", every=range(10, 1000), budget=0.05)
    clock.now += 1e6
    found = [r.step for r in loop(tracer, clock, 100) if r.name == "loss/mean"]
    assert found[0] == 10
    assert len(found) <= 3


def test_the_last_step_is_kept_for_and_thinned_where_that_does_not_suffice(clock: Clock) -> None:
    def measured(total: int) -> list[int]:
        every = nt.with_last(1, total_steps=total)
        tracer = nt.Tracer(probe(), "loss/mean", every=every, budget=0.05)
        return [r.step for r in loop(tracer, clock, total) if r.name == "loss/mean"]

    assert measured(30) == [0]
    for total in range(120, 160, 7):
        assert measured(total)[-1] == total


def test_without_a_budget_all_is_measured_and_nothing_said_of_it(clock: Clock) -> None:
    found = loop(nt.Tracer(probe(), "loss/mean"), clock, 5)
    assert [r.step for r in found if r.name == "loss/mean"] == [0, 1, 2, 3, 4, 5]
    assert not {"nettrace/share", "nettrace/skipped"} & {r.name for r in found}


def test_what_is_explained_has_how_often_at_most() -> None:
    model = torch.nn.Linear(4, 3)
    explained = nt.Tracer(probe(), "ntk/trace", budget=0.05).explain(model)
    assert "within budget=0.05: a record every " in str(explained)
    assert "budget" not in str(nt.Tracer(probe(), "ntk/trace").explain(model))


# What each measure took --------------------------------------------------------------------------


def test_the_time_of_each_measure_is_recorded(tmp_path: Path) -> None:
    @nt.measure("slow/whole", needs=["outputs"], convention="as it is")
    def slow(outputs: torch.Tensor) -> torch.Tensor:
        end = perf_counter() + 0.05
        while perf_counter() < end:
            pass
        return outputs.sum()

    tracer = nt.Tracer(probe(), ["loss/mean", "slow/whole", "ntk/velocity"], to=tmp_path)
    for step in range(2):
        tracer(torch.nn.Linear(4, 3), step)
    trace = nt.open(tmp_path)
    each = trace.nettrace_seconds_per_measure
    assert each.attrs["units"] == "s"
    assert "the first that needs it" in each.attrs["convention"]
    found = each.sel(step=1).to_series()
    assert set(found.index) == {"loss/mean", "slow/whole", "ntk/velocity"}
    assert 0.05 <= found["slow/whole"] < 0.5
    assert (found > 0).all()
    assert float(each.sel(step=1).sum()) <= float(trace.nettrace_seconds.sel(step=1))
    assert each.sel(step=0).isnull().values.tolist().count(True) == 1  # there is no velocity yet


def test_the_times_of_several_probes_are_told_apart() -> None:
    tracer = nt.Tracer({"a": probe(), "b": probe()}, ["loss/mean", "ntk/cross"])
    found = {r.name: r for r in tracer(torch.nn.Linear(4, 3), 0)}
    times = found["nettrace/seconds_per_measure"]
    assert times.dims == ("probe", "measure")
    assert times.coordinates == {"probe": ["a", "b"], "measure": ["loss/mean"]}
    of_pairs = found["nettrace/seconds_per_measure_of_pairs"]
    assert of_pairs.coordinates == {"pair": ["a-b"], "measure": ["ntk/cross"]}
    assert (times.value > 0).all()
