"""The trace's writer: records go to the end of a part, and nothing is ever rewritten."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nettrace.record import Record
from nettrace.store.format_2 import FORMAT
from nettrace.store.frames import MAGIC, encode
from nettrace.store.layout import DTYPES, INLINE, ROW, Axes, Layout
from nettrace.store.parts import SUFFIX, header, number_of, part_files
from nettrace.store.provenance import of_process

#: A part that has grown to so many bytes is sealed, and another begun.
FULL = 2**26
#: The attempt of this process that writes to a folder, and the last step that it wrote.
_ATTEMPTS: dict[Path, tuple[str, int]] = {}
Array = npt.NDArray[Any]


class TraceWriter:
    """Appends the records of a run to a folder, each step by a single write.

    What is written survives the process, however it ends; `sync` makes it survive the machine. A
    part that is full is sealed and never touched again. Several writers may share a folder.

    Args:
        folder: where; made if it is not there.
        attempt: names the attempt at the run; writers of one attempt complement each other. By
            default, that of this process in this folder; a step before its last begins another.
        start: the step from which on this attempt supersedes what earlier ones recorded, or
            "first" for the first that it writes. With None, its records complement theirs.
        rank: of the process among several. Of a quantity that several recorded at a step, the one
            of the lowest rank is read.
        provenance: what to keep with the trace, such as the probe's fingerprint: texts and numbers.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        attempt: str | None = None,
        *,
        start: int | Literal["first"] | None = "first",
        rank: int = 0,
        **provenance: Any,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place = self.folder.resolve()
        #: Kept with each part that is begun from now on.
        self.provenance = provenance
        self._given = attempt
        self._start = start
        self._rank = rank
        self._attempt: str | None = None
        self._began: int | None = None  # from where on it supersedes
        self._file: int | None = None
        self._reset()

    def _reset(self) -> None:
        """Nothing is described in a part that is new."""
        self._size = self._rows = 0
        self._signature: object = None
        self._number = 0
        self._layouts: dict[bytes, int] = {}
        self._attributes: dict[str, dict[str, Any]] = {}

    def write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """Appends the records of one step by a single write.

        Args:
            records: of one step.
            coordinates: of that step, such as the epoch.

        Raises:
            OSError: if it cannot be written, as on a full disk. This step is lost; the next begins
                another part.
            TypeError: if a value is not of numbers.
            ValueError: if the folder holds the trace of another probe.
        """
        if not records:
            return
        step = records[0].step
        attempt = self._given or self._own_attempt(step)
        if attempt != self._attempt:
            self.close()
            self._attempt = attempt
            self._began = step if self._start == "first" else self._start
        arrays: dict[str, Array] = {}
        for record in records:
            if record.missing is None:
                arrays[record.name] = record.value
                if record.standard_error is not None:
                    arrays[record.name + "_standard_error"] = record.standard_error
        file = self._begin() if self._file is None else self._file
        at = {"wall_time": time(), **coordinates}
        frames = [*self._describe(records, arrays, at), self._row(step, at, arrays)]
        self._append(file, b"".join(frames))
        self._rows += 1
        if self._given is None:
            _ATTEMPTS[self._place] = attempt, step
        if self._size >= FULL:
            self._append(file, encode(b"e", [json.dumps({"rows": self._rows}).encode()]))
            self.sync()
            self.close()

    def sync(self) -> None:
        """Waits until what is written has reached the disk.

        Raises:
            OSError: if it cannot.
        """
        if self._file is not None:
            os.fsync(self._file)
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Lets go of the file; a later write begins another part."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _own_attempt(self, step: int) -> str:
        """The attempt of this process in this folder, or another if the step is before its last."""
        attempt, last = _ATTEMPTS.get(self._place) or (uuid.uuid4().hex, step)
        return attempt if step >= last else uuid.uuid4().hex

    def _begin(self) -> int:
        self._check_probe()
        number = max((number_of(p) for p in part_files(self.folder)), default=-1) + 1
        while True:
            try:
                path = self.folder / f"part-{number:05d}{SUFFIX}"
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                break
            except FileExistsError:  # of another writer that began at this moment
                number += 1
        self._file = file
        self._reset()
        head = {
            "format": FORMAT,
            "attempt": self._attempt,
            "start": self._began,
            "rank": self._rank,
            "provenance": {**of_process(), **self.provenance},
        }
        self._append(file, MAGIC + encode(b"p", [_json(head)]))
        return file

    def _check_probe(self) -> None:
        for part in part_files(self.folder):
            found = header(part)
            if found is None:
                continue
            together = found.attempt == self._attempt or None in (self._began, found.start)
            theirs, ours = found.provenance.get("probe"), self.provenance.get("probe")
            if together and theirs != ours:
                raise ValueError(
                    f"{self.folder} holds the trace of another probe: give each probe a folder of "
                    "its own"
                )

    def _describe(
        self, records: Sequence[Record], arrays: Mapping[str, Array], at: Mapping[str, float]
    ) -> list[bytes]:
        """Frames that say what is not known yet of the next row's layout and attributes."""
        frames = []
        # Most rows are like the one before: this is what is compared each time.
        signature = (
            [(n, a.dtype, a.shape) for n, a in arrays.items()],
            [(r.name, r.dims, _labels(r), r.missing, r.missing_on) for r in records],
            [(name, type(value)) for name, value in at.items()],
        )
        if signature != self._signature:
            text = _layout(records, arrays, at).encode()
            if text not in self._layouts:
                frames.append(encode(b"l", [text]))
                self._layouts[text] = len(self._layouts)
            self._number, self._signature = self._layouts[text], signature
        changed = {
            r.name: dict(r.attributes)
            for r in records
            if r.missing is None and self._attributes.get(r.name) != r.attributes
        }
        if changed:
            frames.append(encode(b"a", [_json(changed)]))
            self._attributes |= changed
        return frames

    def _row(self, step: int, at: Mapping[str, float], arrays: Mapping[str, Array]) -> bytes:
        small, large, checks = [], [], []
        for array in arrays.values():
            swapped = array.dtype.byteorder == ">"
            data = (array.astype(array.dtype.newbyteorder("<")) if swapped else array).tobytes()
            if len(data) > INLINE:
                large.append(data)
                checks.append(zlib.crc32(data).to_bytes(4, "little"))
            else:
                small.append(data)
        places = [
            np.asarray(value, "<i8" if _is_whole(value) else "<f8").tobytes()
            for value in at.values()
        ]
        return encode(b"r", [ROW.pack(step, self._number), *places, *small, *checks], large)

    def _append(self, file: int, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(file, left) :]
        except OSError:
            self.close()  # what may be half a frame ends this part; the next write begins another
            raise
        self._size += len(data)


def _layout(
    records: Sequence[Record], arrays: Mapping[str, Array], at: Mapping[str, float]
) -> Layout:
    axes = {}
    for record in records:
        its = Axes(record.dims, {k: tuple(map(str, v)) for k, v in record.coordinates.items()})
        axes[record.name] = axes[record.name + "_standard_error"] = its
    types = {name: array.dtype.newbyteorder("<").str for name, array in arrays.items()}
    if wrong := [name for name, dtype in types.items() if dtype not in DTYPES]:
        name = wrong[0]
        raise TypeError(
            f"{name} is of type {arrays[name].dtype}: a trace takes booleans, integers, and real "
            "and complex numbers of at most 64 bits each"
        )
    return Layout(
        {name: "<i8" if _is_whole(value) else "<f8" for name, value in at.items()},
        {name: (types[name], array.shape, axes[name]) for name, array in arrays.items()},
        {r.name: r.missing for r in records if r.missing is not None},
        {r.name: r.missing_on for r in records if r.missing_on},
    )


def _labels(record: Record) -> Mapping[str, tuple[str, ...]]:
    """As they are now: what gave them may change them."""
    return {k: tuple(v) for k, v in record.coordinates.items()} if record.coordinates else {}


def _is_whole(value: float) -> bool:
    return isinstance(value, (int, np.integer)) and -(2**63) <= value < 2**63


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode()
