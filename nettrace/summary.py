"""What became of each quantity of a trace: its last value, or why there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nettrace.record import ERROR

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Quantity:
    """One quantity of a trace.

    Args:
        name: "group/quantity".
        values: (R,) the last that is known of each of R runs, NaN where there is none; () of an
            array at each step.
        standard_errors: (R,) of these; NaN of what is no estimate.
        step: at which the last was recorded, of several runs the last of all; None if none was.
        axes: of an array, its axes and their lengths, such as {"mode": 600}.
        units: if they are known.
        convention: what is summed or averaged over what.
        missing: where it is missing last, and why; empty if it never is.
        track: (S,) its values along steps, of several runs their median; NaN where there is none.
    """

    name: str
    values: npt.NDArray[Any] = field(compare=False)
    standard_errors: npt.NDArray[np.float64] = field(compare=False)
    step: int | None
    axes: Mapping[str, int]
    units: str
    convention: str
    missing: str
    track: npt.NDArray[Any] = field(compare=False)

    @property
    def value(self) -> complex | None:
        """The last that is known, of several runs the median of theirs; None if there is none."""
        known = self.values[~np.isnan(self.values)]
        return complex(_median(known[:, None])[0]) if len(known) else None

    @property
    def standard_error(self) -> float | None:
        """Of that value, if it is an estimate of one run."""
        one = float(self.standard_errors[0]) if len(self.standard_errors) == 1 else np.nan
        return one if np.isfinite(one) else None


def summary(data: xr.Dataset) -> list[Quantity]:
    """All quantities of a trace, by name; arrays are not read.

    Args:
        data: as `nettrace.open` gives it, of one trace or several.
    """
    names = [str(name) for name in data.data_vars]
    errors = {name for name in names if name.endswith(ERROR) and name.removesuffix(ERROR) in names}
    return [_quantity(data, name) for name in names if name not in errors]


def _quantity(data: xr.Dataset, name: str) -> Quantity:
    variable = data[name]
    attributes = variable.attrs
    axes = [dim for dim in variable.dims if dim not in ("run", "step")]
    several = "run" in variable.dims
    values, errors, step, track = np.empty(0), np.empty(0), None, np.empty(0)
    if not axes and variable.dtype.kind in "biufc":
        along = np.atleast_2d(variable.values)
        track = _median(along)
        known = ~np.isnan(along)
        rows = np.arange(len(along))
        there = known.any(1)
        last = along.shape[1] - 1 - known[:, ::-1].argmax(1) if along.shape[1] else 0 * rows
        values = np.full(len(rows), np.nan, np.result_type(along, float))
        values[there] = along[rows[there], last[there]]
        errors = np.full(len(rows), np.nan)
        if name + ERROR in data:
            errors[there] = np.atleast_2d(data[name + ERROR].values)[rows[there], last[there]]
        if there.any():
            step = int(data["step"].values[last[there].max()])
    return Quantity(
        str(attributes.get("name", name)),
        values,
        errors,
        step,
        {str(dim): variable.sizes[dim] for dim in axes},
        str(attributes.get("units", "")),
        str(attributes.get("convention", "")),
        _missing(str(attributes.get("missing", "{}")), several),
        track,
    )


def said(value: complex, error: float = np.nan) -> str:
    """A number in a few digits; of one with an error, those that this leaves."""
    if value.imag:
        text = f"{value.real:.4g} {'+' if value.imag > 0 else '-'} {abs(value.imag):.4g}i"
        return text + (f" ± {error:.2g}" if np.isfinite(error) else "")
    if not (np.isfinite(error) and error > 0 and np.isfinite(value.real)):
        return f"{value.real:.5g}" + (" ± 0" if error == 0 else "")
    largest, digit = (math.floor(math.log10(size)) for size in (max(abs(value), error), error))
    scale = 0 if -4 <= largest < 6 else largest
    decimals = max(0, scale + 1 - digit)
    if decimals > 9:  # as good as exact
        return f"{value.real:.10g} ± {error:.2g}"
    both = [f"{one / 10.0**scale:.{decimals}f}" for one in (value.real, error)]
    return " ± ".join(both) if not scale else f"({' ± '.join(both)})e{scale:+03d}"


def _median(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(S,) of (R, S), of those that are known; of complex ones, of each part."""
    found: npt.NDArray[Any]
    if len(values) == 1:
        found = values[0]
        return found
    if np.iscomplexobj(values):
        found = _median(values.real) + 1j * _median(values.imag)
        return found
    found = np.full(values.shape[1], np.nan)
    known = ~np.isnan(values).all(0)
    found[known] = np.nanmedian(values[:, known], axis=0)
    return found


def _missing(text: str, several: bool) -> str:
    """The last reason among those by step, or by run and step."""
    said = json.loads(text) or {}
    if several:
        reasons = [f"{run}, {_last(spans)}" for run, spans in said.items() if spans]
        return reasons[-1] if reasons else ""
    return _last(said) if said else ""


def _last(spans: dict[str, str]) -> str:
    where, why = list(spans.items())[-1]
    return f"{'steps' if '..' in where else 'step'} {where}: {why}"
