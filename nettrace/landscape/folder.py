"""Results of probes on disk: a folder for each function, with a file for each step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

_FILE = re.compile(r"step_(\d+)\.nc")
#: What a result says of itself that is another at each step, with what stands for nothing.
_OF_STEP: dict[str, str | float] = {
    "stopped": "unfinished",
    "seconds": np.nan,
    "doubts": "",
    "missing": "",
}


def file_of(folder: str | Path, name: str, step: int) -> Path:
    """Where the result of a function at a step lies."""
    return Path(folder) / name / f"step_{step:08d}.nc"


def read(path: Path) -> xr.Dataset:
    """One result, all of it in memory.

    Raises:
        ValueError: if the file is none, or damaged.
    """
    import xarray as xr

    try:
        return xr.load_dataset(path, engine="scipy")
    except Exception as error:  # whatever a damaged file leads to
        text = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no result of a probe, or is damaged ({text})") from error


def open(folder: str | Path) -> dict[str, xr.Dataset]:
    """What probes found in a training or on its checkpoints, by the name of their function.

    Files that cannot be read are left out, with a warning.

    Args:
        folder: what was given as `to=` to `LandscapeProbe`, `Prober` or `probe_checkpoints`.

    Returns:
        For each function the results of all steps, joined on the dimension "step", in memory.
        "stopped", by step, says which are whole: "done", "out of time", "interrupted",
        "unfinished" (the process was killed, or works on it still) or "failed"; "missing" has the
        reason where it failed, "doubts" what makes the result doubtful. Where axes are not the same
        at all steps, values are placed by their labels, and NaN where a step has none; but if the
        labels are real numbers, such as the places along a slice, these have an axis for the step
        too, and another name has the axis that they share: "x" (step, x_index).

    Raises:
        FileNotFoundError: if there are no results.
    """
    files: dict[str, dict[int, Path]] = {}
    for path in Path(folder).glob("*/step_*.nc"):
        if match := _FILE.fullmatch(path.name):
            files.setdefault(path.parent.name, {})[int(match[1])] = path
    if not files:
        raise FileNotFoundError(
            f"there are no results of probes in {folder}: expected files such as "
            f"{file_of(folder, 'slice_1d', 100)}"
        )
    found: dict[str, dict[int, xr.Dataset]] = {}
    for name, by_step in sorted(files.items()):
        for step, path in sorted(by_step.items()):
            try:
                found.setdefault(name, {})[step] = read(path)
            except ValueError as error:
                warnings.warn(f"{error}: it is left out", stacklevel=2)
    return {name: joined(by_step) for name, by_step in found.items()}


def joined(found: Mapping[int, xr.Dataset]) -> xr.Dataset:
    """Results by step as `open` gives them, with an axis for their steps."""
    import xarray as xr

    # Coordinates that label no axis are values like others.
    several = [one.reset_coords() for one in found.values()]
    placed: set[str] = set()
    for dim in sorted({str(dim) for one in several for dim in one.dims}):
        if _are_places(dim, several):
            several = [_by_number(dim, one) for one in several]
            placed.add(dim)
    sizes: dict[str, int] = {}
    for one in several:
        unlabelled = {str(d): size for d, size in one.sizes.items() if d not in one.coords}
        sizes |= {d: max(size, sizes.get(d, 0)) for d, size in unlabelled.items()}
    # So that what is shorter is filled up.
    numbered = [
        one.assign_coords({d: np.arange(one.sizes[d]) for d in sizes if d in one.sizes})
        for one in several
    ]
    steps = xr.DataArray(list(found), dims="step", name="step")
    whole = xr.concat(
        numbered,
        steps,
        data_vars="all",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs="drop_conflicts",
    )
    of_step = {
        name: ("step", [one.attrs.get(name, nothing) for one in found.values()])
        for name, nothing in _OF_STEP.items()
    }
    whole.attrs = {name: said for name, said in whole.attrs.items() if name not in _OF_STEP}
    whole = whole.drop_vars([d for d in sizes if d in whole.coords]).set_coords(sorted(placed))
    return whole.assign_coords(of_step)


def _are_places(dim: str, several: Sequence[xr.Dataset]) -> bool:
    """Whether what labels an axis are places on it, others at other steps, rather than names."""
    labels = [one.indexes[dim] for one in several if dim in one.indexes]
    if all(labels[0].equals(one) for one in labels[1:]):
        return False
    return any(one.dtype.kind == "f" or not one.is_unique for one in labels)


def _by_number(dim: str, one: xr.Dataset) -> xr.Dataset:
    if dim not in one.dims:
        return one
    places = one[dim].variable
    turned = one.drop_vars(dim).rename_dims({dim: f"{dim}_index"})
    return turned.assign({dim: (f"{dim}_index", places.values, places.attrs)})
