"""A trace as a labelled data set, or several runs as one."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.core import indexing

import nettrace.accessor  # noqa: F401  registers data.nt
from nettrace.record import ERROR
from nettrace.store.layout import Layout
from nettrace.store.parts import SUFFIX, Kept, part_files, parts
from nettrace.store.rows import Integers, Rows, rows
from nettrace.store.values import Axis, Values


@dataclass(frozen=True)
class Run:
    """One trace among those that are opened.

    Args:
        label: what it is called.
        folder: where it is.
        rows: what counts of it.
        about: where it comes from.
    """

    label: str
    folder: Path
    rows: Rows
    about: Mapping[str, Any]


def dataset(
    paths: str | Path | Iterable[str | Path],
    names: str | Iterable[str] | None = None,
    attempt: int | None = None,
    kept: Kept | None = None,
) -> xr.Dataset:
    """What `nettrace.open` gives; `kept` is as for `parts`."""
    alone = isinstance(paths, (str, Path)) and not glob.has_magic(str(paths))
    folders = _folders([paths] if isinstance(paths, (str, Path)) else list(paths))
    runs = [
        _run(folder, label, attempt, kept)
        for folder, label in zip(folders, labels(folders), strict=True)
    ]
    known = {name for run in runs for name in run.rows.names()}
    wanted = sorted(known if names is None else quantities(names, known))
    steps = _steps(runs, None if names is None else wanted)
    builder = _Builder(runs, steps, known, alone)
    for name in wanted:
        builder.add(name)
    return builder.dataset()


class _Builder:
    """Makes variables, one after the other, and the axes that they share."""

    def __init__(self, runs: Sequence[Run], steps: Integers, known: set[str], alone: bool) -> None:
        self._runs, self._steps, self._known, self._alone = runs, steps, known, alone
        self._leading = ("step",) if alone else ("run", "step")
        self._axes: dict[str, Axis] = {}
        self._variables: list[tuple[str, xr.Variable]] = []
        #: Rows by step for quantities that are in the same layouts: most share them.
        self._where: dict[tuple[int, bytes], Integers] = {}

    def add(self, name: str) -> None:
        """Adds a quantity."""
        base = name.removesuffix(ERROR)
        base = base if base in self._known else name
        missing: dict[str, dict[str, str]] = {}
        where: list[Integers] = []
        used: list[Layout] = []
        for number, run in enumerate(self._runs):
            layouts = run.rows.layouts
            # A value without a standard error replaces one with it.
            having = np.array([bool({name, base} & {*x.arrays, *x.missing}) for x in layouts], bool)
            found = self._rows(number, having)
            reasons = _reasons(layouts, base)
            there = np.array([name in x.arrays for x in layouts], bool)
            kinds = np.where(found >= 0, run.rows.layout[found] if len(layouts) else -1, -1)
            if texts := _spans(self._steps, kinds, reasons):
                missing[run.label] = texts
            where.append(
                np.where((kinds >= 0) & there[kinds], found, -1) if len(layouts) else found
            )
            used += [layouts[k] for k in np.unique(kinds[where[-1] >= 0])]
        arrays = [layout.arrays[name] for layout in used]
        axes = self._shared(base, arrays)
        exact = all(
            shape == tuple(axis.length for axis in axes)
            and all(
                its.labels.get(d) in (None, a.labels) for d, a in zip(its.dims, axes, strict=True)
            )
            for _, shape, its in arrays
        )
        dtype = (
            np.result_type(*(np.dtype(dtype) for dtype, _, _ in arrays))
            if arrays
            else np.dtype(float)
        )
        if dtype.kind not in "fc" and not (exact and all((w >= 0).all() for w in where)):
            dtype = np.dtype(float)  # with room for NaN
        values = Values(name, [run.rows for run in self._runs], where, axes, dtype, self._alone)
        attributes = self._attributes(base)
        if missing:
            only = missing.get(self._runs[0].label) if self._alone else missing
            attributes["missing"] = json.dumps(only)
        dims = (*self._leading, *(axis.name for axis in axes))
        lazy: Any = indexing.LazilyIndexedArray(values)
        data = indexing.CopyOnWriteArray(lazy)  # what is assigned to is read first, and kept
        self._variables.append((name, xr.Variable(dims, data, {**attributes, "name": name})))

    def dataset(self) -> xr.Dataset:
        """All of it."""
        coordinates: dict[str, Any] = {"step": self._steps}
        if not self._alone:
            coordinates["run"] = [run.label for run in self._runs]
        coordinates |= {n: _texts(a.labels) for n, a in self._axes.items() if a.labels is not None}
        names = {n for run in self._runs for part in run.rows.parts for n in part.coordinates}
        for name in sorted(names):
            columns = [_coordinate(run.rows, name, self._steps) for run in self._runs]
            values = columns[0] if self._alone else np.stack(columns)
            coordinates[_free(name, {*coordinates, *self._axes})] = (self._leading, values)
        variables: dict[str, xr.Variable] = {}
        for name, variable in self._variables:
            taken = {*variables, *coordinates, *self._axes}
            variables[_free(name.replace("/", "_"), taken)] = variable
        return xr.Dataset(variables, coordinates, self._provenance())

    def _rows(self, run: int, having: np.ndarray) -> Integers:
        key = run, having.tobytes()
        if key not in self._where:
            self._where[key] = self._runs[run].rows.where(having, self._steps)
        return self._where[key]

    def _shared(self, base: str, arrays: Sequence[tuple[Any, ...]]) -> list[Axis]:
        """The axes of a quantity's arrays; another's of that name may differ."""
        if not arrays:
            return []
        axes: list[Axis] = []
        dims = max((its.dims for _, _, its in reversed(arrays)), key=len)
        for number, dim in enumerate(dims):
            # An array of fewer axes has length 1 along the others.
            having = [(shape, its) for _, shape, its in arrays if number < len(shape)]
            labels = _joined([its.labels.get(its.dims[number]) for _, its in having])
            labels = labels if len(having) == len(arrays) else None
            length = max(shape[number] for shape, _ in having) if labels is None else len(labels)
            length = max(length, int(len(having) < len(arrays)))
            taken = {*self._leading, *(axis.name for axis in axes)}
            names = [dim, f"{dim}_{base.replace('/', '_')}"]
            while True:
                called = names.pop(0) if len(names) > 1 else _free(names[0], taken)
                if called in taken:
                    continue
                axis = Axis(called, length, labels)
                if self._axes.setdefault(called, axis) == axis:
                    break
                taken.add(called)
            axes.append(axis)
        return axes

    def _attributes(self, base: str) -> dict[str, Any]:
        """Those that all runs agree on."""
        found: list[Mapping[str, Any]] = []
        for run in self._runs:
            of_run = [p.attributes[base] for p in run.rows.parts if base in p.attributes]
            found += [{name: _plain(value) for name, value in its.items()} for its in of_run[-1:]]
        return {
            name: value
            for name, value in (found[0] if found else {}).items()
            if all(name in its and its[name] == value for its in found)
        }

    def _provenance(self) -> dict[str, Any]:
        if self._alone:
            return {name: _plain(value) for name, value in self._runs[0].about.items()}
        found: dict[str, Any] = {}
        for name in dict.fromkeys(chain(*(run.about for run in self._runs))):
            values = {run.label: run.about.get(name) for run in self._runs}
            first = next(iter(values.values()))
            same = all(value == first for value in values.values())
            found[name] = _plain(first if same else values)
        return found


def _run(folder: Path, label: str, attempt: int | None, kept: Kept | None) -> Run:
    found = [part for part in parts(folder, kept) if len(part.steps)]  # others were killed at once
    counted = rows(found, attempt)
    of_attempts: dict[str, dict[str, Any]] = {}
    for part in found:
        new = {"start": part.start, "created": part.provenance.get("created"), "records": 0}
        of_attempts.setdefault(part.attempt, new)["records"] += len(part.steps)
    last: dict[str, Any] = {}
    for part in counted.parts:  # of the last attempt, several parts may know different things
        if part.attempt == counted.parts[-1].attempt:
            last |= part.provenance
    return Run(
        label, folder, counted, {**last, "folder": str(folder), "attempts": [*of_attempts.values()]}
    )


def _steps(runs: Sequence[Run], names: Sequence[str] | None) -> Integers:
    found = [np.empty(0, np.int64)]
    for run in runs:
        having = [
            names is None or any(n in layout.arrays or n in layout.missing for n in names)
            for layout in run.rows.layouts
        ]
        found.append(run.rows.step[np.array(having, bool)[run.rows.layout]])
    return np.unique(np.concatenate(found))


def _coordinate(its: Rows, name: str, steps: Integers) -> np.ndarray:
    """(s,) of a run: the last that is known at each step."""
    found = np.full(len(steps), np.nan)
    values = np.full(len(its.step), np.nan)
    kinds = set()
    for number, part in enumerate(its.parts):
        if name in part.coordinates:
            mine = np.flatnonzero((its.part == number) & np.isin(its.step, steps))
            values[mine] = part.coordinates[name][its.row[mine]]
            kinds.add(part.coordinates[name].dtype.kind)
    known = ~np.isnan(values)
    found[np.searchsorted(steps, its.step[known])] = values[known]
    whole = kinds == {"i"} and not np.isnan(found).any() and (abs(found) < 2**53).all()
    return found.astype(np.int64) if whole else found


def _reasons(layouts: Sequence[Layout], base: str) -> list[str | None]:
    """By layout, why a quantity is not there, or not on all of several probes."""
    on = [
        "; ".join(f"{label}: {why}" for label, why in layout.missing_on.get(base, {}).items())
        for layout in layouts
    ]
    return [
        layout.missing.get(base) or some or None for layout, some in zip(layouts, on, strict=True)
    ]


def _spans(steps: Integers, layouts: Integers, reasons: Sequence[str | None]) -> dict[str, str]:
    """Reasons by step, or by "first..last" where they are the same at steps one after the other."""
    if all(reason is None for reason in reasons):
        return {}
    numbers = {reason: number for number, reason in enumerate(dict.fromkeys(reasons))}
    texts = [*numbers]
    why = np.array([*(numbers[reason] for reason in reasons), numbers.get(None, -1)])[layouts]
    found = {}
    for group in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(why)) + 1):
        if len(group) and why[group[0]] >= 0 and (text := texts[why[group[0]]]) is not None:
            first, last = steps[group[0]], steps[group[-1]]
            found[str(first) if first == last else f"{first}..{last}"] = text
    return found


def _joined(labels: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """Labels of several arrays as one axis has them; None where some have none, or one twice."""
    found = [its for its in dict.fromkeys(labels) if its is not None]
    if len(found) < len(set(labels)):
        return None
    if len(found) > 1 and any(len(set(its)) < len(its) for its in found):
        return None
    return found[0] if len(found) == 1 else tuple(dict.fromkeys(chain(*found)))


def _texts(labels: Sequence[str]) -> np.ndarray:
    """As an array; NumPy gives all texts the room of the longest, which can be too much."""
    room = len(labels) * max(map(len, labels), default=0)
    return np.array(labels, object if room > 2**20 + 4 * sum(map(len, labels)) else str)


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or the first like it that is not taken."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    return found


def _plain(value: Any) -> Any:
    """What an attribute of a data set can be, in any format."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value)


def quantities(names: str | Iterable[str], known: set[str]) -> set[str]:
    """Quantities by their names or by those of groups, with their standard errors."""
    asked = [names] if isinstance(names, str) else list(names)
    found: set[str] = set()
    for name in asked:
        its = {k for k in known if k in (name, name + ERROR) or k.startswith(name + "/")}
        if not its:
            raise KeyError(f"there is no {name!r} in the trace, but {', '.join(sorted(known))}")
        found |= its
    return found


def _folders(paths: Sequence[str | Path]) -> list[Path]:
    folders: list[Path] = []
    for path in paths:
        if glob.has_magic(str(path)) and not Path(path).exists():
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            folders += [p for p in found if p.is_dir() and part_files(p)]
            if not folders:
                raise FileNotFoundError(f"there is no trace in any folder {path}")
            continue
        folder = Path(path)
        if not part_files(folder):
            files = chain(*(folder.glob(f"{any_}/part-*{SUFFIX}") for any_ in ("*", "*/*")))
            below = sorted({str(p.parent) for p in files})
            hint = f"; there are some in {', '.join(below[:5])}" if below else ""
            raise FileNotFoundError(
                f"there is no trace in {folder}: expected files part-*{SUFFIX}, as written by a "
                f"tracer or callback with to=...{hint}"
            )
        folders.append(folder)
    if not folders:
        raise ValueError("expected the folder of a trace, or several, got none")
    return folders


def labels(folders: Sequence[Path]) -> list[str]:
    """What of their paths tells traces apart."""
    split = [folder.absolute().parts for folder in folders]
    if len(set(split)) < len(split):
        raise ValueError(
            f"expected different traces, got one twice: {', '.join(map(str, folders))}"
        )
    if len(split) == 1:
        return [folders[0].name]
    while min(map(len, split)) > 1 and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    while min(map(len, split)) > 1 and len({parts[-1:] for parts in split}) == 1:
        split = [parts[:-1] for parts in split]
    return ["/".join(parts) for parts in split]
