"""When to measure: schedules are functions from a step to yes or no."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

Schedule: TypeAlias = Callable[[int], bool]
#: What `every=` takes: a period, "log", the steps themselves, or any schedule.
Every: TypeAlias = int | str | Iterable[int] | Schedule


# Classes rather than closures, so that a callback can be pickled to another process.


@dataclass(frozen=True)
class _Period:
    period: int

    def __call__(self, step: int) -> bool:
        return step >= 0 and step % self.period == 0


@dataclass(frozen=True)
class _LogSpaced:
    per_decade: int

    def __call__(self, step: int) -> bool:
        if step < 1:
            return step == 0
        nearest = round(self.per_decade * math.log10(step))
        exponents = [k / self.per_decade for k in (nearest - 1, nearest, nearest + 1)]
        return any(round(10**exponent) == step for exponent in exponents)


@dataclass(frozen=True)
class _Steps:
    steps: frozenset[int]

    def __call__(self, step: int) -> bool:
        return step in self.steps


def every(period: int) -> Schedule:
    """Fires at step 0 and then each `period` steps.

    Raises:
        ValueError: if the period is not a positive integer.

    Example:
        >>> [step for step in range(10) if every(4)(step)]
        [0, 4, 8]
    """
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"expected a period of at least 1 step, got {period!r}")
    return _Period(period)


def log_spaced(per_decade: int = 10) -> Schedule:
    """Fires at step 0 and then at steps evenly spaced in the logarithm.

    Args:
        per_decade: how many steps in a factor of ten; fewer where whole steps do not allow as many.

    Raises:
        ValueError: if `per_decade` is not a positive integer.

    Example:
        >>> [step for step in range(1000) if log_spaced(4)(step)]
        [0, 1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562]
    """
    if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:
        raise ValueError(f"expected at least 1 step per decade, got {per_decade!r}")

    return _LogSpaced(per_decade)


def at(steps: Iterable[int]) -> Schedule:
    """Fires at the given steps.

    Raises:
        ValueError: if no step is given, or one is negative.
        TypeError: if one is not a whole number.
    """
    chosen = frozenset(operator.index(step) for step in steps)
    wrong = sorted(step for step in chosen if step < 0)
    if not chosen:
        raise ValueError("a schedule without steps never fires: give one or more steps")
    if wrong:
        raise ValueError(f"expected steps of at least 0, got {wrong}: they never come")
    return _Steps(chosen)


def schedule(every_: Every) -> Schedule:
    """A schedule from what `every=` takes.

    Raises:
        TypeError: if it is nothing of the kind.
        ValueError: if it never fires.
    """
    if isinstance(every_, str):
        if every_ != "log":
            raise ValueError(f"expected a period, 'log', steps or a schedule, got {every_!r}")
        return log_spaced()
    if isinstance(every_, SupportsIndex):
        return every(operator.index(every_))
    if callable(every_):
        return every_
    if isinstance(every_, Iterable):
        return at(every_)
    raise TypeError(f"expected a period, 'log', steps or a schedule, got {every_!r}")
