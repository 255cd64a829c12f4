"""What became of each quantity of a trace: its last value, or why there is none."""

from __future__ import annotations

import json
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
        value: the last that is known, of several runs the median of theirs; None of an array, or
            if there is none.
        standard_error: of that value, if it is an estimate's; None of several runs.
        step: at which it was recorded; of several runs, the last of all.
        axes: of an array, its axes and their lengths, such as {"mode": 600}.
        units: if they are known.
        convention: what is summed or averaged over what.
        missing: where it is missing last, and why; empty if it never is.
        track: (S,) its values along steps, of several runs their median; NaN where there is none.
    """

    name: str
    value: complex | None
    standard_error: float | None
    step: int | None
    axes: Mapping[str, int]
    units: str
    convention: str
    missing: str
    track: npt.NDArray[Any] = field(compare=False)


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
    value = error = step = None
    track = np.empty(0)
    if not axes and variable.dtype.kind in "biufc":
        values = np.atleast_2d(variable.values)
        track = _median(values)
        last = [(np.flatnonzero(~np.isnan(row)), row) for row in values]
        found = [(row[there[-1]], there[-1]) for there, row in last if len(there)]
        if found:
            value = complex(_median(np.array([[one] for one, _ in found]))[0])
            place = max(place for _, place in found)
            step = int(data["step"].values[place])
            if name + ERROR in data and not several:
                error = float(data[name + ERROR].values[place])
    return Quantity(
        str(attributes.get("name", name)),
        value,
        error if error is None or np.isfinite(error) else None,
        step,
        {str(dim): variable.sizes[dim] for dim in axes},
        str(attributes.get("units", "")),
        str(attributes.get("convention", "")),
        _missing(str(attributes.get("missing", "{}")), several),
        track,
    )


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
