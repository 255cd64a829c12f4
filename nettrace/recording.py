"""From measures to records: what they found, or why it is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from nettrace.certificate import Certificate, SpotCheckError
from nettrace.measures import Measure, Value
from nettrace.measures.registry import Numbers
from nettrace.record import Record
from nettrace.statistics import Inapplicable

OnError = Literal["record", "raise"]


class MissingMeasureWarning(UserWarning):
    """A measure could not be taken; its record says why, and the training goes on."""


class Measured(Protocol):
    """What measures are functions of, and what to note beside them."""

    def about(self, needs: Sequence[str]) -> Mapping[str, str]:
        """What to note beside a measure that needs some statistics."""


class Recorder:
    """Takes measures, and makes a record of each.

    Args:
        on_error: "record" notes why a measure is missing, warns once and goes on; "raise" raises.
        where: what is measured, for warnings.

    Raises:
        ValueError: if `on_error` is neither.
    """

    def __init__(self, on_error: OnError, where: str = "") -> None:
        if on_error not in ("record", "raise"):
            raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")
        self.on_error: OnError = on_error
        self._where = where
        self._warned: set[str] = set()

    def _take(
        self,
        measures: Sequence[Measure],
        step: int,
        found: Any,
        refused: Mapping[str, Exception],
    ) -> list[Record]:
        """The records of some measures of statistics, or of why there are none.

        Raises:
            Exception: whatever goes wrong, if `on_error="raise"`.
        """
        records = {}
        # Those of others come last: what they may do to the network is undone afterwards.
        for measure in sorted(measures, key=lambda measure: not measure.is_own):
            try:
                if isinstance(found, Exception):
                    raise found
                if measure.name in refused:
                    raise refused[measure.name]
                records[measure.name] = _record(measure, step, measure(found), found)
            except Inapplicable:
                continue
            except Exception as error:
                if self.on_error == "raise":
                    raise
                records[measure.name] = self._missing(measure, step, error)
        return [records[m.name] for m in measures if m.name in records]

    def _missing(self, measure: Measure, step: int, error: Exception) -> Record:
        reason = f"{type(error).__name__}: {error}"
        self._warn(reason, f"{measure.name} is missing at step {step}{self._where}: {reason}")
        shape = (0,) * len(measure.dims)
        value = np.full(shape, np.nan)
        return Record(
            measure.name, step, value, dims=measure.dims, attributes=_about(measure), missing=reason
        )

    def _warn(self, once: str, text: str) -> None:
        if once not in self._warned:
            self._warned.add(once)
            warnings.warn(text, MissingMeasureWarning, stacklevel=5)


def timed(step: int, seconds: float, name: str = "nettrace/seconds") -> Record:
    """The record of what a measurement took."""
    convention = {"convention": "wall time of this measurement, in seconds", "units": "s"}
    return Record(name, step, np.asarray(seconds), attributes=convention)


def spot_check(
    step: int, found: Certificate | SpotCheckError, name: str = "nettrace/spot_check"
) -> Record:
    """The record of a spot check, whether it passed or not."""
    if isinstance(found, SpotCheckError):
        return Record(name, step, np.asarray(np.nan), missing=f"SpotCheckError: {found}")
    attributes = {
        "convention": "largest difference from plain autograd in a few entries of the Jacobian, "
        "over the norms of its rows",
        "certificate": found.as_json(),
    }
    return Record(name, step, np.asarray(found.error), attributes=attributes)


def _record(measure: Measure, step: int, found: Value, measured: Measured) -> Record:
    return Record(
        measure.name,
        step,
        _array(found.value),
        None if found.standard_error is None else _array(found.standard_error),
        measure.dims,
        found.coordinates,
        {**_about(measure), **measured.about(measure.needs), **found.attributes},
    )


def _about(measure: Measure) -> dict[str, str]:
    return {"convention": measure.convention, "source": measure.source}


def _array(value: Numbers) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
