"""Schedules fire where their definitions say, and at no other steps."""

import pickle
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nettrace as nt
from nettrace.schedule import bound

small = st.integers(1, 12)


def fired(schedule, total):
    """The steps at which a training of so many updates is measured."""
    return [step for step in range(total + 1) if schedule(step)]


@given(width=small, period=small, total=st.integers(1, 60))
def test_windows_are_consecutive_steps_from_each_start(width, period, total):
    starts = range(0, total + 1, period)
    union = {first + k for first in starts for k in range(width) if first + k <= total}
    assert fired(nt.windows(width, every=period), total) == sorted(union)


@given(width=small, per_decade=small, total=st.integers(1, 2000))
def test_log_windows_are_consecutive_steps_from_each_log_spaced_one(width, per_decade, total):
    starts = fired(nt.log_spaced(per_decade), total)
    union = {first + k for first in starts for k in range(width) if first + k <= total}
    found = fired(nt.log_windows(per_decade, width), total)
    assert found == sorted(union)
    assert set(starts) <= set(found)


@pytest.mark.parametrize(
    ("total", "per_decade", "width"), [(100, 10, 5), (1000, 10, 5), (85, 10, 5)], ids=str
)
def test_log_windows_with_the_last_step_have_it_and_whole_windows(total, per_decade, width):
    found = fired(nt.with_last(nt.log_windows(per_decade, width), total_steps=total), total)
    assert found[-1] == total
    for first in fired(nt.log_spaced(per_decade), total):  # none is cut short by another
        assert set(range(first, min(first + width, total + 1))) <= set(found)


INNER = [
    1,
    7,
    "log",
    [2, 3],
    nt.windows(2, every=5),
    nt.log_windows(2, width=3),
    lambda step: False,
]


@given(inner=st.sampled_from(INNER), total=st.integers(1, 200))
def test_the_last_step_is_added_to_any_schedule(inner, total):
    plain = fired(nt.Tracer(nt.Probe(torch.ones(2, 2)), "loss", every=inner).due, total)
    expected = sorted({*plain, total})
    assert fired(nt.with_last(inner, total_steps=total), total) == expected
    assert fired(bound(nt.with_last(inner), total, 1), total) == expected


@given(period=small, each=small, total=st.integers(1, 60))
def test_epochs_end_after_so_many_steps(period, each, total):
    expected = list(range(0, total + 1, period * each))
    assert fired(nt.epochs(period, steps_per_epoch=each), total) == expected
    assert fired(bound(nt.epochs(period), inf, each), total) == expected
    both = bound(nt.with_last(nt.epochs(period)), total, each)
    assert fired(both, total) == sorted({*expected, total})


def test_what_is_given_stands_and_what_is_bound_is_another_schedule():
    own = nt.with_last(nt.epochs(1, steps_per_epoch=3), total_steps=7)
    assert fired(bound(own, 10, 5), 10) == [0, 3, 6, 7, 9]
    unbound = nt.epochs(1)
    assert fired(bound(unbound, 10, 5), 10) == [0, 5, 10]
    with pytest.raises(ValueError, match="steps_per_epoch="):
        unbound(0)
    assert bound(len, 10, 5) is len  # any function


@pytest.mark.parametrize("schedule", [nt.epochs(1), nt.with_last(nt.epochs(2)), *INNER[4:6]])
def test_schedules_can_be_sent_to_another_process(schedule):
    sent = bound(pickle.loads(pickle.dumps(schedule)), 20, 3)
    assert sent == bound(schedule, 20, 3)
    assert fired(sent, 20) == fired(bound(schedule, 20, 3), 20)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nt.windows(0, every=3), "window of at least 1 step, got 0"),
        (lambda: nt.windows(2, every=0), "at least 1 step apart, got 0"),
        (lambda: nt.log_windows(0), "per decade, got 0"),
        (lambda: nt.log_windows(3, width=-1), "got -1"),
        (lambda: nt.epochs(0), "at least 1 epoch, got 0"),
        (lambda: nt.epochs(1, steps_per_epoch=2.5), "per epoch, got 2.5"),
        (lambda: nt.with_last(3, total_steps=0), "in total, got 0"),
        (lambda: nt.with_last([]), "never fires"),
    ],
)
def test_the_error_teaches(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("every", "says"),
    [(nt.epochs(1), "steps_per_epoch="), (nt.with_last("log"), "total_steps=")],
    ids=["epochs", "last"],
)
def test_a_loop_of_ones_own_has_to_say_how_long_it_is(every, says):
    tracer = nt.Tracer(nt.Probe(torch.ones(2, 2)), "ntk/trace", every=every)
    with pytest.raises(ValueError, match=says):
        tracer(torch.nn.Linear(2, 1), 0)
