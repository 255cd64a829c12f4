"""How much of the wall time of a training may be spent on measuring it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from nettrace.record import Record

#: A measurement is expected to take so many times what others like it took: machines are shared.
MARGIN = 2


class Budget:
    """Keeps the share of wall time that is spent measuring under a limit, by leaving steps out.

    The share is the time spent measuring over the wall time since the budget was made, as the
    training begins. The first measurement has no past to go by, and is always allowed: whoever
    measures wants the network as it was initialised. It counts, and nothing else is allowed until
    it is paid back.

    A measurement is allowed where the share would still be within the limit at its end, if it took
    as long as is expected: as the first of its kind, which also imports, warms up and predicts
    prices; once there are others, twice as long as the dearest of them. One that is new is expected
    to take what the cheapest would that has all of it and more, or else the dearest of all. So
    there is always as much left as one measurement takes, which makes each a little late.

    So, from the end of a measurement on that took t seconds longer than expected, or t = 0, the
    time spent measuring is at most `limit` times the wall time and (1 - limit) t more. Once the
    first measurement is paid back, after its time over the limit, the share stays within the limit
    for as long as none takes longer than expected; after one that does, nothing is measured until
    it is paid back too.

    What was left out and waits longest may take all that there is; the others share half of what
    accrues meanwhile, so that what is cheap and frequent cannot starve what is dear and rare.

    Args:
        limit: the share, above 0 and at most 1, which allows everything.
        clock: the wall time in seconds.

    Raises:
        ValueError: if the limit is not such a share.
        TypeError: if it is no number.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit = check_budget(limit)
        self._clock = clock
        self._began = clock()
        self._spent = 0.0
        #: When the measurement that is going on began.
        self._running: float | None = None
        #: Of each kind of measurement: how often it was made, and the seconds to be expected.
        self._known: dict[frozenset[Hashable], tuple[int, float]] = {}
        #: What was left out since it was measured, the longest first, with the wall time and the
        #: time spent at that moment.
        self._waiting: dict[Hashable, tuple[float, float]] = {}

    def allows(self, what: frozenset[Hashable], reserve: frozenset[Hashable] = frozenset()) -> bool:
        """Whether to measure now.

        Args:
            what: the parts of the measurement; measurements of the same parts cost alike.
            reserve: those of one that is still to be affordable afterwards, if any.
        """
        if not self._known or self.limit == 1:
            return True
        wall = self._clock() - self._began
        cost = self.expected(what) + (MARGIN * self.expected(reserve) if reserve else 0)
        fits = self._spent + cost <= self.limit * (wall + cost)
        longest = next(iter(self._waiting), None)
        if longest is not None and longest not in what:
            since, spent = self._waiting[longest]
            fits = fits and self._spent + cost - spent <= self.limit / 2 * (wall + cost - since)
        if not fits:
            for part in what:
                self._waiting.setdefault(part, (wall, self._spent))
        return fits

    def expected(self, what: frozenset[Hashable]) -> float:
        """The seconds that a measurement is expected to take; infinity for the first of all."""
        if what in self._known:
            return self._known[what][1]
        known = {kind: seconds for kind, (_, seconds) in self._known.items()}
        more = [seconds for kind, seconds in known.items() if what < kind]
        return min(more, default=max(known.values(), default=np.inf))

    @contextmanager
    def measuring(self, what: frozenset[Hashable] = frozenset()) -> Iterator[None]:
        """Counts the time of what is done within as spent on measuring.

        Args:
            what: the parts of the measurement; none for what is done once, such as taking a probe.
        """
        self._running = start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._running = None
            self._spent += seconds
            if what:
                times, expected = self._known.get(what, (0, 0.0))
                seconds *= MARGIN if times else 1
                self._known[what] = (times + 1, max(expected, seconds) if times > 1 else seconds)
            for part in what:
                self._waiting.pop(part, None)

    @property
    def share(self) -> float:
        """The share of wall time spent on measuring until now; 0 where no time has passed."""
        now = self._clock()
        spent = self._spent + (0 if self._running is None else now - self._running)
        return spent / (now - self._began) if now > self._began else 0.0

    def record(self, step: int) -> Record:
        """The share, for a trace of the weights after so many updates."""
        attributes: dict[str, str | float] = {
            "convention": "time spent measuring over wall time since the training began, in this "
            "attempt and until this record is written",
            "budget": self.limit,
        }
        return Record("nettrace/share", step, np.asarray(self.share), attributes=attributes)


def left_out(step: int, number: int) -> Record:
    """How many steps were left out, for a trace of the weights after so many updates."""
    convention = (
        "how many steps that the schedule chose were left out since the record before, to stay "
        "within the budget"
    )
    attributes = {"convention": convention}
    return Record("nettrace/skipped", step, np.asarray(number), attributes=attributes)


def check_budget(limit: float) -> float:
    """The limit, if it is a share of wall time.

    Raises:
        ValueError: if it is not above 0 and at most 1.
        TypeError: if it is no number.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"expected budget= to be a share of wall time, got {limit!r}")
    if not 0 < limit <= 1:
        raise ValueError(
            f"expected budget= to be a share of wall time above 0 and at most 1, such as 0.05 for "
            f"5 %, got {limit!r}"
        )
    return float(limit)


def synchronise(model: nn.Module) -> None:
    """Waits for the devices, so that the time measured is that of what is done meanwhile."""
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
