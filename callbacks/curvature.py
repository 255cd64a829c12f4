"""The Lightning callbacks of the loss's curvature, and of what it says of stability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nettrace.callbacks.trace import Trace

#: What tells whether a training is stable at its learning rate.
_OF_STABILITY = ("hessian/trace", "loss/mean")


class Curvature(Trace):
    """`Trace` of the curvature of the loss."""

    def __init__(self, measures: str | Iterable[str] = "hessian", **options: Any) -> None:
        super().__init__(measures, **options)


class StabilityMonitor(Trace):
    """`Trace` of whether a training is stable at its learning rate: curvature beside the loss."""

    def __init__(self, measures: str | Iterable[str] = _OF_STABILITY, **options: Any) -> None:
        super().__init__(measures, **options)
