"""What one measurement leaves behind, and where it can go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Protocol

import numpy as np
import numpy.typing as npt

#: What the name of a standard error ends in, after that of its quantity.
ERROR = "_standard_error"
#: Axes of a value, at most: NumPy 1 takes 32, of which there are one each for runs, steps, probes.
MOST_AXES = 29


class MissingMeasureWarning(UserWarning):
    """A measure could not be taken; its record says why, and the training goes on."""


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
        missing_on: why there is none on some of several probes, by their names; NaN there.
    """

    name: str
    step: int
    value: npt.NDArray[np.generic]
    standard_error: npt.NDArray[np.generic] | None = None
    dims: tuple[str, ...] = ()
    coordinates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    missing: str | None = None
    missing_on: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_scalar(self) -> bool:
        """Whether the value is a single number."""
        return self.value.ndim == 0

    def apart(self) -> Iterator[Record]:
        """What was found on each of several probes, named "group/quantity/probe"; else itself."""
        if self.dims[:1] not in (("probe",), ("pair",)):
            yield self
            return
        axis, *dims = self.dims
        for place, label in enumerate(self.coordinates[axis]):
            if label in self.missing_on:
                continue
            value = np.asarray(self.value[place])
            # What was added to make the probes alike is left out.
            there = ~np.isnan(value) if "padded" in self.attributes else np.full(value.shape, True)
            kept = [_any(there, d) for d in range(value.ndim)]
            labels = {
                dim: list(compress(self.coordinates[dim], where))
                for dim, where in zip(dims, kept, strict=True)
                if dim in self.coordinates
            }
            errors = None if self.standard_error is None else np.asarray(self.standard_error[place])
            yield replace(
                self,
                name=f"{self.name}/{label}",
                value=value[np.ix_(*kept)],
                standard_error=None if errors is None else errors[np.ix_(*kept)],
                dims=tuple(dims),
                coordinates=labels,
                missing_on={},
            )

    def __str__(self) -> str:
        if self.missing is not None:
            return f"{self.name} at step {self.step}: missing, {self.missing}"
        if not self.is_scalar:
            return f"{self.name} at step {self.step}: array {self.value.shape}"
        error = "" if self.standard_error is None else f" +- {float(self.standard_error):.2g}"
        return f"{self.name} at step {self.step}: {self.value.item():.6g}{error}"


class Sink(Protocol):
    """Something that takes the records of one step."""

    def write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """Takes records of one step, with coordinates of that step such as the epoch."""


def _any(there: npt.NDArray[np.bool_], axis: int) -> npt.NDArray[np.bool_]:
    """Where along an axis there is anything."""
    return np.asarray(there.any(tuple(d for d in range(there.ndim) if d != axis)))
