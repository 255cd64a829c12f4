"""Results of landscape probes as figures take them: one data set along steps, like a trace."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import xarray as xr

import nettrace.accessor  # noqa: F401  registers data.nt
from nettrace.measures.registry import View
from nettrace.record import ERROR

#: What says of a step how its result came about; see `nettrace.landscape.open`.
_OF_STEP = ("stopped", "seconds", "doubts", "missing")
#: What densities of states have beside what is looked at: bins' edges, and what doubts tell too.
_HELPERS = {"loss_low", "loss_high", "left_out"}
_UNFINISHED = "unfinished: its process was killed, or works on it still"
_NATS = re.compile(r"\bnats( a sample)?$")
#: How many axes beside that of steps an array has that is drawn, at most.
_AXES = 3


def landscape_trace(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Results of landscape probes as one data set, for `figures`, `figure` and `.nt.plot()`.

    Args:
        found: results by the name of their function, as `nettrace.landscape.open` gives them.

    Returns:
        On the dimension "step", which has the steps of all functions, "landscape_<function>_<x>"
        for each quantity x, with attribute `name`, "landscape/<function>/<x>", and standard errors
        beside them; "landscape_<function>_seconds" is what the probe took. `missing` says why
        there is no value at a step, and `doubts` what makes one doubtful, as JSON by step. Groups
        of walkers, of which errors were made, and other axes than three are left out.

    Example:
        >>> import tempfile, torch, nettrace as nt
        >>> from nettrace.dashboard import figures, landscape_trace
        >>> from nettrace.landscape import Prober, open, slice_1d
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randn(8, 1))
        >>> folder = tempfile.mkdtemp()
        >>> _ = Prober(slice_1d, probe, to=folder)(torch.nn.Linear(3, 1), 0)
        >>> figures(landscape_trace(open(folder)))[0]
        'landscape/slice_1d/loss'
    """
    steps = np.unique(np.concatenate([np.empty(0, int), *(one["step"] for one in found.values())]))
    # What all functions were given alike.
    said = {
        key: {str(one.attrs[key]) for one in found.values() if key in one.attrs}
        for key in ("model", "probe")
    }
    about = {key: texts.pop() for key, texts in said.items() if len(texts) == 1}
    joined = xr.Dataset(coords={"step": steps}, attrs=about)
    for function, one in found.items():
        part = _of_function(function, one, joined.variables).reindex(step=steps)
        joined = joined.assign_coords(part.coords).assign(part.data_vars)
    return joined


def landscape_numbers(by_run: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """The numbers of several runs along a dimension "run", as they are compared.

    Args:
        by_run: by run, what `landscape_trace` gives.
    """
    runs = []
    for run, data in by_run.items():
        names = [name for name, one in data.data_vars.items() if one.dims == ("step",)]
        numbers = data[names].copy()
        for variable in numbers.data_vars.values():
            for said in ("missing", "doubts"):
                own = json.loads(variable.attrs.get(said, "{}"))
                variable.attrs[said] = json.dumps({run: own} if own else {})
        runs.append(numbers.drop_vars(set(numbers.coords) - {"step"}))
    joined = xr.concat(
        runs,
        xr.DataArray(list(by_run), dims="run", name="run"),
        data_vars="all",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs=_joined_attributes,
    )
    return joined


def _joined_attributes(several: list[dict[str, Any]], context: object = None) -> dict[str, Any]:
    """Those of the first run, with what is said of each."""
    found = dict(several[0]) if several else {}
    for said in ("missing", "doubts"):
        if said in found:
            by_run = [json.loads(one.get(said, "{}")) for one in several]
            found[said] = json.dumps({run: text for one in by_run for run, text in one.items()})
    return found


def _of_function(function: str, one: xr.Dataset, taken: Collection[Any]) -> xr.Dataset:
    """The results of a function by the names that they have among others."""
    of_step = {name: one[name].values for name in _OF_STEP if name in one.variables}
    steps = one["step"].values.tolist()
    about = str(one.attrs.get("convention", ""))
    kept = one[[name for name in one.data_vars if _is_drawn(one, str(name))]].copy()
    kept = kept.drop_vars([name for name in _OF_STEP if name in kept.coords])
    kept = kept.assign_coords(step=steps).assign_coords(
        {
            dim: np.arange(size)
            for dim, size in kept.sizes.items()
            if dim not in kept.coords and str(dim).removesuffix("_index") not in kept.coords
        }
    )
    if "trajectory" in kept and kept["trajectory"].dims == ("step", "snapshot", "direction"):
        kept = kept.set_coords("trajectory")  # it is drawn upon planes
    seconds = of_step.get("seconds", np.full(len(steps), np.nan)).astype(float)
    doubts = _doubts(of_step, steps)
    reasons = of_step.get("missing", np.full(len(steps), ""))
    if np.isfinite(seconds).any() or not kept.data_vars:  # where nothing was found, this says why
        said = {"units": "s", "convention": "how long the probe took"}
        kept["seconds"] = ("step", seconds, said)
    for name, variable in kept.data_vars.items():
        text, values = str(name), variable.values
        there = np.isfinite(values).reshape(len(steps), -1).any(1)
        missing = {
            str(step): f"{reason}" if reason else doubts[step]
            for step, reason, has in zip(steps, reasons, there, strict=True)
            if not has and (reason or step in doubts)
        }
        base = text.removesuffix(ERROR)
        own = str(variable.attrs.get("convention", ""))
        units = variable.attrs.get("units") or _units(one, base)
        view = _view(kept, text)
        variable.attrs = {
            **variable.attrs,
            "name": f"landscape/{function}/{name}",
            "convention": f"{own}; {about}" if own and about and text != "seconds" else own,
            **({"units": units} if units else {}),
            **({"view": view} if view else {}),
            **({"missing": json.dumps(missing)} if missing else {}),
            **({"doubts": json.dumps(doubts)} if doubts and text != "seconds" else {}),
        }
    for name, coordinate in kept.coords.items():
        if name != "step":
            coordinate.attrs = {**coordinate.attrs, "name": str(name)}
    start = f"landscape_{function}_".replace("/", "_")
    names = [name for name in (*kept.variables, *kept.dims) if name != "step"]
    while any(f"{start}{name}" in taken for name in names):  # "a" has "b_c", and "a_b" has "c"
        start += "_"
    return kept.rename({name: f"{start}{name}" for name in names})


def _is_drawn(one: xr.Dataset, name: str) -> bool:
    variable = one[name]
    return (
        variable.dtype.kind in "biuf"
        and variable.dims[:1] == ("step",)
        and variable.ndim <= 1 + _AXES
        and variable.size > 0
        and "group" not in variable.dims
        and name not in _HELPERS
        and name not in _OF_STEP
    )


def _doubts(of_step: Mapping[str, Any], steps: list[int]) -> dict[int, str]:
    """What makes the results of steps doubtful."""
    found = {}
    nothing = [""] * len(steps)
    kinds, doubts, reasons = (of_step.get(k, nothing) for k in ("stopped", "doubts", "missing"))
    for step, kind, doubt, reason in zip(steps, kinds, doubts, reasons, strict=True):
        said = {"done": "", "unfinished": _UNFINISHED}.get(kind, str(kind))
        texts = [f"{said}: {reason}" if reason else said, *str(doubt).splitlines()]
        if any(texts):
            found[step] = "; ".join(filter(None, texts))
    return found


def _units(one: xr.Dataset, name: str) -> str:
    """What a convention ends with, of a quantity or that of which it is the error."""
    about = str(one[name].attrs.get("convention", "")) if name in one else ""
    match = _NATS.search(about)
    return match[0] if match else ""


def _view(data: xr.Dataset, name: str) -> View | None:
    """How a quantity is best seen, where its axes alone do not tell."""
    axes = [str(dim) for dim in data[name].dims[1:]]
    labels = [data.coords.get(axis, data.coords.get(axis.removesuffix("_index"))) for axis in axes]
    are_places = all(one is not None and one.dtype.kind in "iuf" for one in labels)
    if name == "entropy" and [a.removesuffix("_index") for a in axes] in (["energy"], ["loss"]):
        return "density"
    if axes == ["direction"]:
        return "eigenvalues"
    if axes == ["chain"]:
        return "distribution"
    if len(axes) == 1:
        return "curves" if are_places else "layers"
    if [axis.removesuffix("_index") for axis in axes] == ["x", "y"] and are_places:
        return "plane"
    return "matrix" if axes else None
