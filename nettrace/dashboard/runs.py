"""Several runs that are seen together: what each says of itself, and which belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

#: What differs between runs without saying how they were made.
_OWN = {"attempts", "created", "folder"}


def grouped(data: xr.Dataset, key: str) -> dict[str, str]:
    """By run, what its provenance, configuration or hyperparameters say of something, in order.

    Raises:
        KeyError: if none of the runs knows it.
    """
    if "run" not in data.dims:
        raise KeyError("one run alone cannot be grouped")
    said = {run: dict(_leaves(about)) for run, about in _by_run(data).items()}
    if not any(one.get(key) is not None for one in said.values()):
        known = sorted({key for one in said.values() for key in one})
        raise KeyError(f"no run says what its {key!r} is: they know {', '.join(known)}")
    values = {run: one.get(key) for run, one in said.items()}
    return {
        run: f"{key}={'unknown' if value is None else value}"
        for run, value in sorted(values.items(), key=lambda one: _rank(one[1]))
    }


def differing(data: xr.Dataset) -> list[str]:
    """By which keys `grouped` puts some runs together, and others apart."""
    if "run" not in data.dims:
        return []
    said = [dict(_leaves(about)) for about in _by_run(data).values()]
    keys = {key for one in said for key in one} - _OWN
    return sorted(key for key in keys if 1 < len({str(one.get(key)) for one in said}) < len(said))


def of_one(data: xr.Dataset, run: str) -> xr.Dataset:
    """The data of one of several runs, as if it had been opened alone."""
    one = data.sel(run=run, drop=True)
    for variable in one.variables.values():
        if "missing" in variable.attrs:
            own = json.loads(variable.attrs["missing"]).get(run, {})
            variable.attrs = {**variable.attrs, "missing": json.dumps(own)}
    one.attrs = _by_run(data)[run]
    return one


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers first, and in their order."""
    try:
        return False, float(value), ""
    except (TypeError, ValueError):
        return True, 0.0, str(value)


def _by_run(data: xr.Dataset) -> dict[str, dict[str, Any]]:
    """What the provenance says of each of several runs."""
    found: dict[str, dict[str, Any]] = {str(run): {} for run in data["run"].values}
    for key, value in data.attrs.items():
        own = parsed(value)
        own = own if isinstance(own, dict) else {}
        for run, about in found.items():
            about[str(key)] = own.get(run, value)
    return found


def _leaves(about: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a provenance says, with what is within a configuration or its hyperparameters."""
    for key, value in about.items():
        inner = parsed(value)
        if isinstance(inner, dict):
            yield from _leaves(inner)
        else:
            yield key, inner


def parsed(value: Any) -> Any:
    """What an attribute says, which may be JSON of an object."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
