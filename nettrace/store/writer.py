"""The trace's writer: records go to the end of a part, and nothing is ever rewritten."""

from __future__ import annotations

import json
import operator
import os
import threading
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from nettrace.record import ERROR, Record
from nettrace.store.format_2 import FORMAT
from nettrace.store.frames import MAGIC, encode
from nettrace.store.layout import DTYPES, INLINE, ROW, Layout, array_of, fitting
from nettrace.store.parts import SUFFIX, header, number_of, part_files
from nettrace.store.provenance import of_process

#: A part that has grown to so many bytes is sealed, and another begun.
FULL = 2**26
#: The attempt of this process that writes to a folder, and the last step that it wrote.
_ATTEMPTS: dict[Path, tuple[str, int]] = {}
#: Of the threads that may share a writer or a folder, one writes at a time.
_TURN = threading.RLock()
Array = npt.NDArray[Any]
Frame: TypeAlias = tuple[bytes, Sequence[bytes], Sequence[bytes]]


def _renew() -> None:
    """In a forked process there is no other thread that could give up its turn."""
    global _TURN
    _TURN = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


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
        self._place = self.folder.resolve()  # wherever the process may go
        #: Kept with each part that is begun from now on.
        self.provenance = provenance
        self._given = attempt
        self._start = operator.index(start) if isinstance(start, SupportsIndex) else start
        self._rank = rank
        self._attempt: str | None = None
        self._began: int | None = None  # from where on it supersedes
        self._file: int | None = None
        self._full: str | None = None  # the part before, if that is sealed
        self._unsynced: set[Path] = set()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """Copies, also in another process, write to parts of their own."""
        return {**self.__dict__, "_file": None}

    def _reset(self) -> None:
        """Nothing is described in a part that is new."""
        self._process = os.getpid()
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
            OSError: if it cannot be written, as on a full disk. This step may be lost; the next
                begins another part.
            TypeError: if a value is not of numbers.
            ValueError: if an array has more than 30 axes, or the folder holds the trace of another
                probe.
        """
        if records:
            with _TURN:
                self._write(records, coordinates)

    def _write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        step = operator.index(records[0].step)
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
                    arrays[record.name + ERROR] = record.standard_error
        at = {"wall_time": time(), **coordinates}
        try:
            begin = self._begin() if self._file is None or self._is_lost(self._file) else []
            description = self._describe(records, arrays, at)
            self._append([*begin, *description, self._row(step, at, arrays)])
            self._rows += 1
            if self._given is None:
                _ATTEMPTS[self._place] = attempt, step
            if self._size >= FULL:
                self._append([(b"e", [_json({"rows": self._rows})], [])])
                self.sync()
                full = self._path.name
                self.close()
                self._full = full
        except BaseException:  # what may be half said ends this part; the next write begins another
            if self._file is not None and not self._rows:
                self._unsynced.discard(self._path)
                self._path.unlink(missing_ok=True)
            self.close()
            raise

    def take_up(self, step: int) -> None:
        """Goes on from a step: what was recorded after it is superseded.

        Other writers of this process in this folder that go on from there share the attempt.
        """
        with _TURN:
            self._start = step + 1
            if self._place in _ATTEMPTS and _ATTEMPTS[self._place][1] > step:
                del _ATTEMPTS[self._place]

    def sync(self) -> None:
        """Waits until what is written has reached the disk.

        Raises:
            OSError: if it cannot.
        """
        if self._unsynced:
            for path in (*self._unsynced, self._place):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
            self._unsynced.clear()

    def close(self) -> None:
        """Lets go of the file; a later write begins another part."""
        file, self._file, self._full = self._file, None, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _is_lost(self, file: int) -> bool:
        """Whether the file belongs to a process that this was forked from, or was removed."""
        if os.getpid() == self._process and os.fstat(file).st_nlink:
            return False
        self.close()
        return True

    def _own_attempt(self, step: int) -> str:
        """The attempt of this process in this folder, or another if the step is before its last."""
        attempt, last = _ATTEMPTS.get(self._place) or (uuid.uuid4().hex, step)
        return attempt if step >= last else uuid.uuid4().hex

    def _begin(self) -> list[Frame]:
        """Makes the file of a part, and says what it begins with."""
        self._place.mkdir(exist_ok=True)  # it may have been removed; a disk that is gone stays so
        self._check_probe()
        number = max((number_of(p) for p in part_files(self._place)), default=-1) + 1
        while True:
            try:
                self._path = self._place / f"part-{number:05d}{SUFFIX}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o644)
                break
            except FileExistsError:  # of another writer that began at this moment
                number += 1
        self._reset()
        head = {
            "format": FORMAT,
            "attempt": self._attempt,
            "start": self._began,
            "rank": self._rank,
            "continues": self._full,
            "provenance": {**of_process(), **self.provenance},
        }
        return [(b"p", [_json(head)], [])]

    def _check_probe(self) -> None:
        for part in part_files(self._place):
            found = header(part)
            if found is None:
                continue
            together = found.attempt == self._attempt or None in (self._began, found.start)
            theirs, ours = found.provenance.get("probe"), self.provenance.get("probe")
            # What is measured without a probe, as in training steps, goes with any.
            if together and None not in (theirs, ours) and theirs != ours:
                raise ValueError(
                    f"{self.folder} holds the trace of another probe: give each probe a folder of "
                    "its own"
                )

    def _describe(
        self, records: Sequence[Record], arrays: Mapping[str, Array], at: Mapping[str, float]
    ) -> list[Frame]:
        """Frames that say what is not known yet of the next row's layout and attributes."""
        frames: list[Frame] = []
        # Most rows are like the one before: this is what is compared each time.
        signature = (
            [(n, a.dtype, a.shape) for n, a in arrays.items()],
            [(r.name, r.dims, _labels(r), r.missing, r.missing_on) for r in records],
            [(name, type(value)) for name, value in at.items()],
        )
        if signature != self._signature:
            text = _layout(records, arrays, at).encode()
            if text not in self._layouts:
                frames.append((b"l", [text], []))
                self._layouts[text] = len(self._layouts)
            self._number, self._signature = self._layouts[text], signature
        changed = {
            r.name: dict(r.attributes)
            for r in records
            if r.missing is None and self._attributes.get(r.name) != r.attributes
        }
        if changed:
            frames.append((b"a", [_json(changed)], []))
            self._attributes |= changed
        return frames

    def _row(self, step: int, at: Mapping[str, float], arrays: Mapping[str, Array]) -> Frame:
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
        return b"r", [ROW.pack(step, self._number), *places, *small, *checks], large

    def _append(self, frames: Sequence[Frame]) -> None:
        assert self._file is not None
        begin = b"" if self._size else MAGIC
        data = begin + encode(frames, self._size + len(begin))
        self._unsynced.add(self._path)
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]
        self._size += len(data)


def _layout(
    records: Sequence[Record], arrays: Mapping[str, Array], at: Mapping[str, float]
) -> Layout:
    about = {}
    for record in records:
        about[record.name] = about[record.name + ERROR] = record
    types = {name: array.dtype.newbyteorder("<").str for name, array in arrays.items()}
    if wrong := [name for name, dtype in types.items() if dtype not in DTYPES]:
        name = wrong[0]
        raise TypeError(
            f"{name} is of type {arrays[name].dtype}: a trace takes booleans, integers, and real "
            "and complex numbers of at most 64 bits each"
        )
    return Layout(
        {name: "<i8" if _is_whole(value) else "<f8" for name, value in at.items()},
        {
            n: array_of(types[n], a.shape, fitting(about[n].dims, _labels(about[n]), a.shape))
            for n, a in arrays.items()
        },
        {r.name: r.missing for r in records if r.missing is not None},
        {r.name: r.missing_on for r in records if r.missing_on},
    )


def _labels(record: Record) -> Mapping[str, tuple[str, ...]]:
    """As they are now: what gave them may change them."""
    return {k: tuple(v) for k, v in record.coordinates.items()} if record.coordinates else {}


def _is_whole(value: float) -> bool:
    return isinstance(value, (int, np.integer)) and -(2**63) <= value < 2**63


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=_plain).encode()


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else str(value)
