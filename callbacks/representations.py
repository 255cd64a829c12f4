"""The Lightning callback of what layers make of samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nettrace.callbacks.trace import Trace


class RepresentationGeometry(Trace):
    """`Trace` of representations as clouds of points: dimensions, similarities, neural collapse.

    `layers=` names the layers, as in `nettrace.activations`; by default they are the modules of the
    deepest level of the network of which there are no more than 32. Errors shrink, and dimensions
    can be told, with more `samples` than the 64 of other callbacks, so that the default is 512.
    """

    def __init__(
        self,
        measures: str | Iterable[str] = "geometry",
        *,
        samples: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(measures, samples=samples, **options)
