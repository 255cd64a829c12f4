"""One part of a trace, as far as it is read when the trace is opened: everything but the arrays."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nettrace.store.layout import Layout


@dataclass(frozen=True)
class Header:
    """What a part begins with.

    Args:
        attempt: which attempt at the run it belongs to.
        start: from which step on it supersedes earlier attempts; None for nothing.
        rank: of the process that wrote it.
        continues: the file that was full before this one was begun.
        provenance: versions, seeds, the probe's fingerprint and the like.
    """

    attempt: str
    start: int | None
    rank: int
    continues: str | None
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """What one writer left in one file.

    Args:
        path: the file.
        header: what it begins with.
        layouts: of its rows.
        steps: (n,) of its rows, in the order in which they were written.
        layout: (n,) numbers of the rows' layouts.
        at: (n,) where the rows begin in the file, in bytes.
        coordinates: (n,) each, beside the step; NaN in rows that have none of that name.
        attributes: the last ones of each quantity.
        sealed: whether it was full, and its end is there.
    """

    path: Path
    header: Header
    layouts: list[Layout]
    steps: npt.NDArray[np.int64]
    layout: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]
    coordinates: Mapping[str, npt.NDArray[Any]]
    attributes: Mapping[str, Mapping[str, Any]]
    sealed: bool

    @property
    def attempt(self) -> str:
        """Which attempt at the run it belongs to."""
        return self.header.attempt

    @property
    def start(self) -> int | None:
        """From which step on it supersedes earlier attempts; None for nothing."""
        return self.header.start

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Versions, seeds, the probe's fingerprint and the like."""
        return self.header.provenance


class Collected:
    """What is found in a part, row by row."""

    def __init__(self) -> None:
        self.header: Header | None = None
        self.sealed = False
        #: The byte up to which the file was read; 0 where reading cannot go on from there.
        self.end = 0
        self.layouts: list[Layout] = []
        self.attributes: dict[str, Mapping[str, Any]] = {}
        self._steps, self._layout, self._at = array("q"), array("q"), array("q")
        #: By layout, the numbers of its rows, and their coordinates as bytes.
        self._of_layout: list[tuple[array[int], bytearray]] = []

    def describe(self, layout: Layout) -> None:
        """Adds a layout, which gets the next number."""
        self.layouts.append(layout)
        self._of_layout.append((array("q"), bytearray()))

    def add(self, step: int, layout: int, at: int, coordinates: bytes) -> None:
        """Adds a row.

        Raises:
            OverflowError: if the step has more than 64 bits; nothing is added then.
        """
        self._steps.append(step)
        self._layout.append(layout)
        self._at.append(at)
        rows, data = self._of_layout[layout]
        rows.append(len(self._steps) - 1)
        data += coordinates

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._steps)

    def part(self, path: Path) -> Part | None:
        """All of it; None if it has no beginning."""
        if self.header is None:
            return None
        steps, layout, at = (np.array(x, np.int64) for x in (self._steps, self._layout, self._at))
        columns: dict[str, list[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]] = {}
        for its, (mine, data) in zip(self.layouts, self._of_layout, strict=True):
            if mine and its.coordinates:
                values = np.frombuffer(bytes(data), "<i8").reshape(len(mine), -1).T.copy()
                for (name, kind), column in zip(its.coordinates.items(), values, strict=True):
                    columns.setdefault(name, []).append((np.array(mine), column.view(kind)))
        coordinates = {}
        for name, found in columns.items():
            everywhere = sum(len(rows) for rows, _ in found) == len(steps)
            whole = everywhere and all(column.dtype.kind == "i" for _, column in found)
            coordinates[name] = np.full(len(steps), 0 if whole else np.nan)
            coordinates[name] = coordinates[name].astype(np.int64 if whole else np.float64)
            for rows, column in found:
                coordinates[name][rows] = column
        return Part(
            path,
            self.header,
            self.layouts,
            steps,
            layout,
            at,
            coordinates,
            self.attributes,
            self.sealed,
        )
