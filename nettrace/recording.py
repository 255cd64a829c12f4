"""From measures to records: what they found, or why it is missing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from nettrace.allowance import Allowance, is_out_of_memory
from nettrace.certificate import Certificate, SpotCheckError
from nettrace.measures import Measure, Value
from nettrace.measures.registry import Numbers
from nettrace.missing import (
    DoubtfulMeasureWarning,
    MissingMeasureWarning,
    regardless_of_numbers,
    told,
    warn_missing,
)
from nettrace.operator import OverBudgetError
from nettrace.price import TooDear, size
from nettrace.ranks import ALONE
from nettrace.record import Record
from nettrace.statistics import Inapplicable

OnError = Literal["record", "raise"]


class Measured(Protocol):
    """What measures are functions of, and what to note beside them."""

    def about(self, needs: Sequence[str]) -> Mapping[str, str]:
        """What to note beside a measure that needs some statistics."""


@dataclass
class Taken:
    """What came of measuring at one step.

    Args:
        records: of the measures, by name.
        seconds: that each took, by name, of those that are there.
        checks: of the spot check, if there was one.
    """

    records: dict[str, Record] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: list[Record] = field(default_factory=list)

    def in_order(self, measures: Sequence[Measure]) -> list[Record]:
        """The records of some measures."""
        return [self.records[m.name] for m in measures if m.name in self.records]

    def times(self, step: int, seconds: float, of: str = "") -> list[Record]:
        """What the measurement took, as records.

        Args:
            step: how many updates the weights have had.
            seconds: in all.
            of: what begins the names of these records.
        """
        whole = {"convention": "wall time of this measurement, in seconds", "units": "s"}
        parts = {
            "convention": "wall time of each measure, in seconds; what several need is found once, "
            "in the time of the first that needs it, and the look at the network in that of none",
            "units": "s",
        }
        name, values = f"nettrace/{of}seconds", np.asarray(list(self.seconds.values()))
        found = [Record(name, step, np.asarray(seconds), attributes=whole)]
        if self.seconds:
            names = {"measure": list(self.seconds)}
            each = Record(
                f"{name}_per_measure",
                *(step, values),
                dims=("measure",),
                coordinates=names,
                attributes=parts,
            )
            found.append(each)
        return found


class Recorder:
    """Takes measures, and makes a record of each.

    Args:
        on_error: "record" notes why a measure is missing, warns once and goes on; "raise" raises.
        memory_budget: as in `nettrace.jacobian`; less, once memory ran out.
        where: what is measured, for warnings.

    Raises:
        ValueError: if `on_error` is neither, or the budget cannot be read.
    """

    def __init__(self, on_error: OnError, memory_budget: int | str, where: str = "") -> None:
        if on_error not in ("record", "raise"):
            raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")
        self.on_error: OnError = on_error
        self._memory_budget = memory_budget
        self._allow_all()
        #: Measures for which memory ran out whatever the budget.
        self._too_large: set[str] = set()
        self._where = where
        #: The processes that measure together.
        self._ranks = ALONE
        self._warned: set[str] = set()

    def _allow_all(self) -> None:
        """Allows the whole memory budget again."""
        self._allowance = Allowance(self._memory_budget)

    def _take(
        self,
        measures: Sequence[Measure],
        step: int,
        found: Any,
        refused: Mapping[str, TooDear],
        taken: Taken,
    ) -> list[Measure]:
        """Adds a record of each measure; returns those for which memory ran out, to try again."""
        left = []
        # Those of others come last: what they may do to the network is undone afterwards.
        for measure in sorted(measures, key=lambda measure: not measure.is_own):
            try:
                if isinstance(found, Exception):
                    raise found
                if measure.name in refused:
                    raise refused[measure.name]
                start = time.perf_counter()
                with self._ranks.together():
                    record = recorded(measure, step, measure(found), found)
                if self._allowance.is_reduced:
                    reduced = {"memory_budget": self._allowance.bytes}
                    record = replace(record, attributes={**record.attributes, **reduced})
                taken.records[measure.name] = record
                if caution := str(record.attributes.get("warning", "")):
                    text = f"{measure.name} at step {step}{self._where}: {caution}"
                    self._warn(regardless_of_numbers(caution), text, DoubtfulMeasureWarning)
                taken.seconds[measure.name] = time.perf_counter() - start
            except Inapplicable:
                continue
            except Exception as error:
                if self._allowance.may_help(error) and measure.name not in self._too_large:
                    left.append(measure)
                    continue
                if self._defers(measure, error):
                    continue
                if self.on_error == "raise":
                    raise
                taken.records[measure.name] = self._missing(measure, step, error)
        return left

    def _defers(self, measure: Measure, error: Exception) -> bool:
        """Whether what failed is to be found in another way, later."""
        return False

    def _missing(self, measure: Measure, step: int, error: Exception) -> Record:
        reason = told(error)
        once = regardless_of_numbers(reason)
        over = isinstance(error, OverBudgetError) and self._allowance.is_reduced
        if over or is_out_of_memory(error):
            self._too_large.add(measure.name)
            within = f"the last try was within memory_budget={size(self._allowance.bytes)}"
            reason = f"memory ran out, {reason} ({within}: take a smaller probe)"
            once = "out of memory"  # whose amounts come in several units
        what = f"{measure.name} is missing at step {step}{self._where}: {reason}"
        self._warn(once, f"{what}. The training goes on without; on_error='raise' would raise this")
        return missing(measure, step, reason)

    def _warn(
        self, once: str, text: str, category: type[UserWarning] = MissingMeasureWarning
    ) -> None:
        if once not in self._warned:
            self._warned.add(once)
            warn_missing(text, 5, category)


def recorded(measure: Measure, step: int, found: Value, measured: Measured) -> Record:
    """The record of a value, and of what it rests on."""
    return Record(
        measure.name,
        step,
        _array(found.value),
        None if found.standard_error is None else _array(found.standard_error),
        measure.dims,
        found.coordinates,
        {**_about(measure), **measured.about(measure.needs), **found.attributes},
    )


def missing(measure: Measure, step: int, reason: str) -> Record:
    """The record of a measure that could not be taken."""
    value = np.full((0,) * len(measure.dims), np.nan)
    return Record(
        measure.name, step, value, dims=measure.dims, attributes=_about(measure), missing=reason
    )


def spot_check(
    step: int, found: Certificate | SpotCheckError, name: str = "nettrace/spot_check"
) -> Record:
    """The record of a spot check, passed or not."""
    if isinstance(found, SpotCheckError):
        return Record(name, step, np.asarray(np.nan), missing=f"SpotCheckError: {found}")
    attributes = {
        "convention": "largest difference from plain autograd in a few entries of the Jacobian, "
        "over the norms of its rows",
        "certificate": found.as_json(),
    }
    return Record(name, step, np.asarray(found.error), attributes=attributes)


def _about(measure: Measure) -> dict[str, str]:
    about = {"convention": measure.convention, "source": measure.source}
    return about if measure.view is None else {**about, "view": measure.view}


def _array(value: Numbers) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
