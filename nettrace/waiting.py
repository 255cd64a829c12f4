"""Measures that wait for a window of weights to be full."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from nettrace.measures import Measure
from nettrace.statistics import Statistics
from nettrace.window import WeightWindow


def reads_window(measure: Measure) -> bool:
    """Whether a measure is of the weights of the last updates."""
    return any(need.rpartition(".")[2] in Statistics.of_window for need in measure.needs)


def settings(window: WeightWindow) -> dict[str, Any]:
    """What a window was made with: another that is made with them sees the same."""
    return {name: getattr(window, name) for name in inspect.signature(WeightWindow).parameters}


class Waiting:
    """Which measures are not taken yet, and which of those never were.

    Args:
        window: that they are of, if there is one.
    """

    def __init__(self, window: WeightWindow | None) -> None:
        self._window = window
        #: Those that have waited, by name; None for what was taken since.
        self._waited: dict[str, Measure | None] = {}

    def ready(self, measures: Sequence[Measure]) -> list[Measure]:
        """Those of some measures which need not wait; a window that cannot be kept says so."""
        window = self._window
        if window is None or window.is_full or window.reason is not None:
            return list(measures)
        for measure in filter(reads_window, measures):
            self._waited.setdefault(measure.name, measure)
        return [measure for measure in measures if not reads_window(measure)]

    def taken(self, measures: Sequence[Measure]) -> None:
        """Notes that some measures are taken now."""
        self._waited |= dict.fromkeys((measure.name for measure in measures), None)

    def in_vain(self) -> list[Measure]:
        """Those that have waited, and were never taken."""
        return [measure for measure in self._waited.values() if measure is not None]
