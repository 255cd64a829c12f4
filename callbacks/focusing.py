"""The Lightning callback of how far weights focus on a few nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nettrace.callbacks.trace import Trace


class Focusing(Trace):
    """`Trace` of how far the weights focus on a few nodes of each layer, and if layers alternate.

    "focus/path_focusing", of all paths from inputs to outputs, "focus/strengths", of each node, and
    "focus/alternation_p_weights", against shuffled weights, are to be asked for by name.
    """

    def __init__(self, measures: str | Iterable[str] = "focus", **options: Any) -> None:
        super().__init__(measures, **options)
