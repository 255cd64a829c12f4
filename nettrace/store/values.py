"""Arrays of a trace along its steps, read from the disk when they are asked for."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from xarray.backends import BackendArray
from xarray.core import indexing

from nettrace.store.frames import DamagedTraceError
from nettrace.store.layout import Place
from nettrace.store.rows import Integers, Rows

Array = npt.NDArray[Any]
#: How much is read at once, in bytes.
_BLOCK = 2**20
#: What lies further apart than this is not read at once.
_GAP = 2**13


@dataclass(frozen=True)
class Axis:
    """An axis that the arrays of all steps and runs share.

    Args:
        name: its name.
        length: that of the longest.
        labels: in the order in which they appeared; arrays are placed by theirs.
    """

    name: str
    length: int
    labels: tuple[str, ...] | None

    def places(self, place: Place, number: int) -> slice | Integers:
        """Where the entries of one array along its axis of that number belong."""
        if number >= len(place.shape):
            return slice(0, 1)
        its = place.axes.labels.get(place.axes.dims[number])
        if self.labels is None or its is None or its == self.labels:
            return slice(0, place.shape[number])
        where = {label: number for number, label in enumerate(self.labels)}
        return np.array([where[label] for label in its], np.int64)


class Values(BackendArray):
    """One quantity of one run or several.

    Args:
        name: of the quantity.
        runs: the rows of each run.
        where: for each run the row (s,) of each step, -1 for none.
        axes: of the values.
        dtype: of the result, with room for NaN if that is needed.
        alone: whether there is one run, and no axis for it.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Rows],
        where: Sequence[Integers],
        axes: Sequence[Axis],
        dtype: np.dtype[Any],
        alone: bool,
    ) -> None:
        self._name, self._runs, self._where, self._axes = name, runs, where, axes
        self._alone = alone
        self.dtype = dtype
        self.shape = (len(where[0]), *(axis.length for axis in axes))
        if not alone:
            self.shape = (len(runs), *self.shape)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        """What is asked for, along each axis by a number, a slice or numbers."""
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple[Any, ...]) -> Array:
        if self._alone:
            return self._run(0, key)
        which, key = np.arange(len(self._runs))[key[0]], key[1:]
        if which.ndim == 0:
            return self._run(int(which), key)
        found = [self._run(int(run), key) for run in which]
        return np.stack(found) if found else np.empty((0, *self._run(0, key).shape), self.dtype)

    def _run(self, run: int, key: tuple[Any, ...]) -> Array:
        """What is asked for of one run, a bounded number of rows at a time."""
        where = self._where[run][key[0]]
        asked = np.atleast_1d(where)
        lengths = [axis.length for axis in self._axes]
        inner = _select(np.broadcast_to(np.zeros((), self.dtype), (0, *lengths)), key[1:])
        absent = np.nan if self.dtype.kind in "fc" else 0
        out = np.full((len(asked), *inner.shape[1:]), absent, self.dtype)
        rows = self._runs[run]
        found = np.flatnonzero(asked >= 0)
        part, layout = rows.part[asked[found]], rows.layout[asked[found]]
        # As they lie on the disk, those of one layout together.
        order = np.lexsort((asked[found], layout, part))
        cuts = np.flatnonzero(np.diff(part[order]) | np.diff(layout[order])) + 1
        at_once = max(1, _BLOCK // max(1, math.prod(lengths) * self.dtype.itemsize))
        for group in np.split(found[order], cuts) if len(found) else ():
            first = asked[group[0]]
            place = rows.layouts[rows.layout[first]].places[self._name]
            its = rows.parts[rows.part[first]]
            for begin in range(0, len(group), at_once):
                some = group[begin : begin + at_once]
                values = _read(its.path, place, its.at[rows.row[asked[some]]])
                out[some] = _select(self._placed(values, place), key[1:])
        return cast(Array, out if where.ndim else out[0])

    def _placed(self, values: Array, place: Place) -> Array:
        """Arrays (n, ...) where their labels, or else their numbers, belong; NaN elsewhere."""
        where = [axis.places(place, number) for number, axis in enumerate(self._axes)]
        lengths = tuple(axis.length for axis in self._axes)
        if values.shape[1:] == lengths and all(isinstance(w, slice) for w in where):
            return values
        absent = np.nan if self.dtype.kind in "fc" else 0
        out = np.full((len(values), *lengths), absent, self.dtype)
        numbers = [
            np.arange(w.stop) if isinstance(w, slice) else w for w in (slice(len(values)), *where)
        ]
        fewer = len(lengths) - len(place.shape)
        out[np.ix_(*numbers)] = values.reshape(*values.shape, *[1] * fewer)
        return out


def _select(values: Array, key: tuple[Any, ...]) -> Array:
    """What is asked for of arrays (n, ...), along each axis for itself."""
    for axis in reversed(range(len(key))):
        values = values[(slice(None),) * (axis + 1) + (key[axis],)]
    return values


def _read(path: Path, place: Place, at: Integers) -> Array:
    """The arrays (n, ...) of rows that begin at `at`, in order.

    Raises:
        DamagedTraceError: if they are not those that were written.
    """
    size = place.size
    with path.open("rb", buffering=0) as file:
        found = _gather(file.fileno(), at + place.at, size)
        if found is not None and place.check is not None:
            checks = _gather(file.fileno(), at + place.check, 4)
            if (
                checks is None
                or [zlib.crc32(data) for data in found] != checks.view("<u4")[:, 0].tolist()
            ):
                found = None
    if found is None:
        raise DamagedTraceError(
            f"{path} is damaged between bytes {at[0]} and {at[-1] + place.at + size}: an array "
            "there does not match its checksum; the rest can be read, as by .isel(step=...)"
        )
    if not size:
        return np.empty((len(at), *place.shape), place.dtype)
    return found.view(place.dtype).reshape(len(at), *place.shape)


def _gather(file: int, at: Integers, size: int) -> npt.NDArray[np.uint8] | None:
    """The bytes (n, size) that begin at each place; those close together are read at once.

    Returns:
        None if the file is too short.
    """
    order = np.argsort(at, kind="stable")
    if not np.array_equal(order, np.arange(len(at))):  # steps that were written in another order
        found = _gather(file, at[order], size)
        return None if found is None else found[np.argsort(order)]
    out = np.empty((len(at), size), np.uint8)
    gaps = np.flatnonzero(np.diff(at) > size + _GAP) + 1
    begin = 0
    while begin < len(at):
        last = np.searchsorted(at, at[begin] + max(0, _BLOCK - size), "right")
        gap = np.searchsorted(gaps, begin, "right")
        end = min(int(last), int(gaps[gap]) if gap < len(gaps) else len(at))
        some = slice(begin, max(begin + 1, end))
        start, stop = int(at[begin]), int(at[some.stop - 1]) + size
        data = b"".join(_pieces(file, start, stop))
        if len(data) < stop - start:
            return None
        block = np.frombuffer(data, np.uint8)
        if size <= 64:
            out[some] = block[(at[some] - start)[:, None] + np.arange(size)]
        else:
            for row in range(some.start, some.stop):
                out[row] = block[int(at[row]) - start :][:size]
        begin = some.stop
    return out


def _pieces(file: int, start: int, stop: int) -> Iterator[bytes]:
    """Pieces, since the system reads no more than 2 GiB at once."""
    while start < stop and (data := os.pread(file, min(stop - start, 2**30), start)):
        yield data
        start += len(data)
