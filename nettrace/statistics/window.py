"""Statistics of the weights of the last updates."""

from __future__ import annotations

from nettrace.statistics.look import Look, Unavailable
from nettrace.window import WeightWindow


class WindowStatistics(Look):
    """The window of weights."""

    #: The statistics that a window of weights has to be seen for.
    of_window = frozenset({"window"})

    @property
    def window(self) -> WeightWindow:
        """The weights of the last updates."""
        window = self._window
        if window is None:
            raise Unavailable("no window of weights was seen")
        if not window.is_full:
            why = window.reason or f"{window.count} of {window.length} snapshots"
            raise Unavailable(f"the window of weights is not full: {why}")
        return window
