"""What one measurement leaves behind, and where it can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Record:
    """One quantity at one step.

    Args:
        name: "group/quantity".
        step: how many updates the weights have had.
        value: a number as a 0-dimensional array, or an array; NaN if missing.
        standard_error: of an estimate, of the same shape.
        dims: names of the value's axes.
        coordinates: labels along named axes.
        attributes: convention, source and whatever else belongs to the value.
        missing: why there is no value, if there is none.
    """

    name: str
    step: int
    value: npt.NDArray[np.generic]
    standard_error: npt.NDArray[np.generic] | None = None
    dims: tuple[str, ...] = ()
    coordinates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    missing: str | None = None

    @property
    def is_scalar(self) -> bool:
        """Whether the value is a single number."""
        return self.value.ndim == 0

    def __str__(self) -> str:
        if self.missing is not None:
            return f"{self.name} at step {self.step}: missing, {self.missing}"
        if not self.is_scalar:
            return f"{self.name} at step {self.step}: array {self.value.shape}"
        error = "" if self.standard_error is None else f" +- {float(self.standard_error):.2g}"
        return f"{self.name} at step {self.step}: {float(self.value):.6g}{error}"


class Sink(Protocol):
    """Something that takes the records of one step."""

    def write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """Takes records of one step, with coordinates of that step such as the epoch."""
