"""Folders of traces and of landscape probes' results, as a report is given them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from nettrace import store
from nettrace.dashboard.landscapes import landscape_trace
from nettrace.landscape.folder import open as open_results
from nettrace.missing import told, warn_missing
from nettrace.record import ERROR
from nettrace.store.dataset import labels
from nettrace.store.parts import part_files

_RESULTS = "*/step_*.nc"


def opened(
    paths: Sequence[str], names: Sequence[str] = ()
) -> tuple[xr.Dataset, dict[str, xr.Dataset]]:
    """Traces with the results of landscape probes that belong to them.

    Results belong to a trace in whose folder they are, or in a folder in it; and to one trace that
    is given together with their own folder.

    Args:
        paths: folders of traces, or patterns; of results of landscape probes, as
            `nettrace.landscape.open` takes them; or exports.
        names: the quantities wanted, or their groups, such as "ntk" or "landscape/slice_1d"; by
            default all.

    Returns:
        What `nettrace.open` gives of the traces, without steps if there are results alone; and by
        run, or by "" of one, what `landscape_trace` gives of the results.

    Raises:
        FileNotFoundError: if there is neither.
        KeyError: if nothing has such a name.
        ValueError: if results are given with several traces in whose folders they are not.
    """
    alone = {path: several for path in paths if (several := _alone(Path(path)))}
    traces = [path for path in paths if path not in alone]
    of_landscapes = [n for n in names if n.split("/")[0] == "landscape"]
    of_traces = [n for n in names if n not in of_landscapes]
    if alone and not traces:
        if of_traces:
            raise KeyError(f"results of landscape probes alone have no {of_traces[0]!r}")
        runs = [""] if len(alone) == 1 else labels([Path(path) for path in alone])
        found = {run: _read(several) for run, several in zip(runs, alone.values(), strict=True)}
        found = _only(found, of_landscapes)
        if len(alone) == 1:
            return found[""].assign_attrs(folder=next(iter(alone))), {}
        return xr.Dataset(coords={"step": np.empty(0, int)}, attrs={"folder": "landscapes"}), found
    traces = _with_parts(traces)
    data = store.open(traces[0] if len(traces) == 1 else list(traces), of_traces or None)
    if names and not of_landscapes:
        return data, {}
    is_export = any(Path(path).suffix in (".nc", ".zarr") for path in traces)
    folders = {} if is_export else {run: _within(at) for run, at in _folders(data).items()}
    if alone and "run" in data.dims:
        raise ValueError(
            f"{next(iter(alone))} has results of landscape probes: with several traces it is not "
            "known whose they are. Put them in the folder of their trace, or give them with that "
            "trace alone"
        )
    for several in alone.values():
        folders[""] = [*folders.get("", []), *several]
    found = {run: _read(several) for run, several in folders.items() if several}
    found = _only(found, of_landscapes)
    if of_landscapes and not of_traces:
        if "run" not in data.dims:
            return found[""].assign_attrs(data.attrs), {}
        data = data.drop_vars(list(data.data_vars)).isel(step=slice(0))
    return data, found


def _with_parts(traces: list[str]) -> list[str]:
    """Of several folders those that hold something, unless none does; others are warned of."""
    empty = [one for one in traces if Path(one).is_dir() and not part_files(Path(one))]
    empty = [one for one in empty if Path(one).suffix != ".zarr"]
    if len(empty) == len(traces):
        return traces
    for one in empty:
        warn_missing(f"there is no trace in {one}: it is left out")
    return [one for one in traces if one not in empty]


def _alone(folder: Path) -> list[Path]:
    """The folders of results in one that has no trace."""
    if not folder.is_dir() or part_files(folder) or any(map(part_files, _below(folder))):
        return []
    return _within(folder)


def _below(folder: Path) -> list[Path]:
    return [one for one in sorted(folder.iterdir()) if one.is_dir()]


def _folders(data: xr.Dataset) -> Mapping[str, Path]:
    """Where the traces are, by run."""
    said = str(data.attrs.get("folder", ""))
    if "run" not in data.dims:
        return {"": Path(said)} if said else {}
    by_run = json.loads(said) if said.startswith("{") else {}
    return {str(run): Path(folder) for run, folder in by_run.items()}


def _within(folder: Path) -> list[Path]:
    """The folders of results that belong to a trace."""
    inside = [one for one in _below(folder) if not part_files(one)]
    return [one for one in (folder, *inside) if next(one.glob(_RESULTS), None) is not None]


def _read(folders: Sequence[Path]) -> xr.Dataset:
    """What is in some folders; functions of one name are told apart by their folders'."""
    found: dict[str, xr.Dataset] = {}
    for folder in dict.fromkeys(one.resolve() for one in folders):
        try:
            results = open_results(folder)
        except Exception as error:  # of another version, or of functions that changed
            warn_missing(f"the results in {folder} are left out ({told(error)})")
            continue
        for name, one in results.items():
            own = f"{folder.name} {name}" if name in found else name
            while own in found:
                own += "'"
            found[own] = one
    return landscape_trace(found)


def _only(by_run: Mapping[str, xr.Dataset], names: Sequence[str]) -> dict[str, xr.Dataset]:
    """The quantities that are named.

    Raises:
        KeyError: if there is none.
    """
    if not names:
        return dict(by_run)
    found = {}
    for run, data in by_run.items():
        others = [
            variable
            for variable, one in data.data_vars.items()
            if not any(f"{_base(one)}/".startswith(f"{name}/") for name in names)
        ]
        if len(others) < len(data.data_vars):
            found[run] = data.drop_vars(others)
    if not found:
        known = sorted({_base(one) for data in by_run.values() for one in data.data_vars.values()})
        raise KeyError(
            f"there are no results of {', '.join(names)}: there are "
            + (", ".join(known) or "no results of landscape probes")
        )
    return found


def _base(variable: xr.DataArray) -> str:
    return str(variable.attrs["name"]).removesuffix(ERROR)
