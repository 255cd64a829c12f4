"""When to measure: schedules are functions from a step to yes or no.

Step k is that of the weights after k updates, so that the last of a training of K updates is K. A
schedule that goes by the length of the training or of an epoch is told it as an argument, or by
`bound`, as callbacks do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Windows:
    starts: Schedule
    width: int

    def __call__(self, step: int) -> bool:
        return any(self.starts(first) for first in range(max(0, step - self.width + 1), step + 1))


@dataclass(frozen=True)
class _Filled:
    updates: int
    burn_in: int

    def __call__(self, step: int) -> bool:
        seen = step - self.burn_in
        return seen > 0 and seen % self.updates == 0


@dataclass(frozen=True)
class _Epochs:
    period: int
    steps_per_epoch: float | None

    def __call__(self, step: int) -> bool:
        each = self.steps_per_epoch
        if each is None or math.isinf(each):
            raise ValueError(
                "it is not known how many steps an epoch has: pass epochs(..., steps_per_epoch=...)"
            )
        return step >= 0 and step % (self.period * int(each)) == 0

    def bound(self, total_steps: float, steps_per_epoch: float) -> _Epochs:
        known = self.steps_per_epoch is not None
        return self if known else replace(self, steps_per_epoch=steps_per_epoch)


@dataclass(frozen=True)
class _WithLast:
    schedule: Schedule
    total_steps: float | None

    #: Callbacks measure last, whichever step that turns out to be.
    last = True

    def __call__(self, step: int) -> bool:
        if self.total_steps is None:
            raise ValueError(
                "it is not known which step is the last: pass with_last(..., total_steps=...)"
            )
        return step == self.total_steps or self.schedule(step)

    def bound(self, total_steps: float, steps_per_epoch: float) -> _WithLast:
        total = total_steps if self.total_steps is None else self.total_steps
        return _WithLast(bound(self.schedule, total_steps, steps_per_epoch), total)


def every(period: int) -> Schedule:
    """Fires at step 0 and then each `period` steps.

    Raises:
        ValueError: if the period is not a positive integer.

    Example:
        >>> [step for step in range(10) if every(4)(step)]
        [0, 4, 8]
    """
    return _Period(_positive(period, "a period of at least 1 step"))


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
    return _LogSpaced(_positive(per_decade, "at least 1 step per decade"))


def windows(width: int, every: int) -> Schedule:
    """Fires at `width` consecutive steps, from step 0 and then from each `every`-th.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> [step for step in range(12) if windows(2, every=5)(step)]
        [0, 1, 5, 6, 10, 11]
    """
    starts = _Period(_positive(every, "windows that begin at least 1 step apart"))
    return _Windows(starts, _positive(width, "a window of at least 1 step"))


def log_windows(per_decade: int = 10, width: int = 5) -> Schedule:
    """Fires at `width` consecutive steps from each step of `log_spaced(per_decade)`.

    Windows that overlap are one longer window.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> [step for step in range(200) if log_windows(1, width=3)(step)]
        [0, 1, 2, 3, 10, 11, 12, 100, 101, 102]
    """
    return _Windows(log_spaced(per_decade), _positive(width, "a window of at least 1 step"))


def filled(updates: int, burn_in: int = 0) -> Schedule:
    """Fires when a window of so many updates has been seen, and then after as many more each time.

    Args:
        updates: how many make up a window.
        burn_in: how many come before the first.

    Raises:
        ValueError: if a number is no positive integer, or the burn-in is negative.

    Example:
        >>> [step for step in range(12) if filled(3, burn_in=2)(step)]
        [5, 8, 11]
    """
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"expected a burn-in of at least 0 updates, got {burn_in!r}")
    return _Filled(_positive(updates, "a window of at least 1 update"), burn_in)


def epochs(period: int = 1, *, steps_per_epoch: int | None = None) -> Schedule:
    """Fires at step 0 and then after each `period` epochs.

    Args:
        period: in epochs.
        steps_per_epoch: how many updates an epoch has; callbacks know it of their trainer, in a
            loop of your own it has to be given.

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        >>> [step for step in range(20) if epochs(2, steps_per_epoch=4)(step)]
        [0, 8, 16]
    """
    if steps_per_epoch is not None:
        steps_per_epoch = _positive(steps_per_epoch, "at least 1 step per epoch")
    return _Epochs(_positive(period, "a period of at least 1 epoch"), steps_per_epoch)


def with_last(every: Every, *, total_steps: int | None = None) -> Schedule:
    """Fires as another schedule does, and at the last step.

    Args:
        every: the other schedule, or a period, "log" or the steps themselves.
        total_steps: how many updates there will be, which is the last step; callbacks know it of
            their trainer, and measure last where it stops early. In a loop of your own it has to
            be given, and the tracer be called once more after the last update.

    Raises:
        ValueError: if `total_steps` is not a positive integer, or the other schedule never fires.

    Example:
        >>> [step for step in range(21) if with_last("log", total_steps=20)(step) and step > 5]
        [6, 8, 10, 13, 16, 20]
    """
    if total_steps is not None:
        total_steps = _positive(total_steps, "at least 1 step in total")
    return _WithLast(schedule(every), total_steps)


def bound(schedule: Schedule, total_steps: float, steps_per_epoch: float) -> Schedule:
    """The schedule for a training of so many steps; itself if it does not go by that.

    Args:
        schedule: any.
        total_steps: of the training; infinity if it is not known.
        steps_per_epoch: likewise.
    """
    binding: Callable[[float, float], Schedule] | None = getattr(schedule, "bound", None)
    return schedule if binding is None else binding(total_steps, steps_per_epoch)


def has_last_after(schedule: Schedule, step: int) -> bool:
    """Whether a schedule has the last step, and that is still to come as far as is known."""
    return getattr(schedule, "last", False) and getattr(schedule, "total_steps", None) != step


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


def _positive(number: int, what: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"expected {what}, got {number!r}")
    return number
