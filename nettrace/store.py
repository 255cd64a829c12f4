"""The trace on disk, and the labelled view of it.

A trace is a folder of append-only parts, one for each writer. A part is a sequence of
frames, each with its length and checksum: whatever was cut off or damaged, what stands before it is
right. A frame holds one step: a JSON header with names, types, shapes, coordinates and conventions,
then the arrays' bytes. An attempt, such as a run resumed from a checkpoint, supersedes what earlier
attempts recorded from its first step on; nothing is ever rewritten. A trace can be read while it is
written.
"""

from __future__ import annotations

import json
import os
import platform
import struct
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from nettrace.record import Record

if TYPE_CHECKING:
    import xarray as xr

FORMAT = 1
_SUFFIX = ".ntl"
_FRAME = struct.Struct("<II")  # length and CRC-32 of what follows
_LENGTH = struct.Struct("<I")  # of the header
_PROCESS = uuid.uuid4().hex
Array: TypeAlias = npt.NDArray[Any]


class TraceWriter:
    """Appends the records of a run to a folder.

    Args:
        folder: where; made if it is not there.
        attempt: names the attempt at the run; writers of one attempt complement each other. By
            default, the process.
        provenance: what to keep with the trace, such as the probe's fingerprint.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, attempt: str = _PROCESS, **provenance: str) -> None:
        self.folder = Path(folder)
        self._attempt = attempt
        self.folder.mkdir(parents=True, exist_ok=True)
        self._provenance = provenance
        self._file: int | None = None
        self._described: dict[str, dict[str, Any]] = {}

    def write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """Appends the records of one step by a single write.

        Args:
            records: of one step.
            coordinates: of that step, such as the epoch.
        """
        if not records:
            return
        step = records[0].step
        if self._file is None:
            self._file = self._begin(step)
        values, arrays, about = [], [], {}
        for record in records:
            for suffix, array in (("", record.value), ("_standard_error", record.standard_error)):
                if array is not None:
                    array = array.astype(array.dtype.newbyteorder("<"), order="C")
                    arrays.append(array.tobytes())
                    values.append([record.name + suffix, array.dtype.str, list(array.shape)])
            described = {
                "dims": list(record.dims),
                "coordinates": {k: list(v) for k, v in record.coordinates.items()},
                "attributes": dict(record.attributes),
            }
            if record.missing is None and self._described.get(record.name) != described:
                about[record.name] = self._described[record.name] = described
        header = {
            "step": step,
            "coordinates": {"wall_time": time.time(), **coordinates},
            "values": values,
            "about": about,
            "missing": {r.name: r.missing for r in records if r.missing is not None},
            "missing_on": {r.name: dict(r.missing_on) for r in records if r.missing_on},
        }
        try:
            self._append(self._file, header, arrays)
        except OSError:
            self._close()  # what may be half a frame ends this part; the next write begins another
            raise

    def _begin(self, step: int) -> int:
        self._described = {}
        self._check_probe()
        number = 0
        while True:
            try:
                path = self.folder / f"part-{number:05d}{_SUFFIX}"
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                break
            except FileExistsError:
                number += 1
        header = {
            "format": FORMAT,
            "attempt": self._attempt,
            "start": step,
            "provenance": {
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "threads": torch.get_num_threads(),
                **self._provenance,
            },
        }
        self._append(file, header, [])
        return file

    def _check_probe(self) -> None:
        for part in self.folder.glob("part-*" + _SUFFIX):
            header = next((header for header, _ in _frames(part)), {})
            theirs, ours = header.get("provenance", {}), self._provenance
            if header.get("attempt") == self._attempt and theirs.get("probe") != ours.get("probe"):
                raise ValueError(
                    f"{self.folder} holds the trace of another probe: give each probe a folder of "
                    "its own"
                )

    @staticmethod
    def _append(file: int, header: Mapping[str, Any], arrays: Sequence[bytes]) -> None:
        text = json.dumps(header, separators=(",", ":")).encode()
        body = b"".join([_LENGTH.pack(len(text)), text, *arrays])
        frame = _FRAME.pack(len(body), zlib.crc32(body)) + body
        written = os.write(file, frame)
        if written < len(frame):
            raise OSError(f"only {written} of {len(frame)} bytes were written: is the disk full?")

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._close()


def open(folder: str | Path) -> xr.Dataset:
    """A trace as a labelled data set, with dimension `step`.

    The variable of "ntk/trace" is `ntk_trace`, with attribute `name`; an estimate's standard error
    is `..._standard_error`. Arrays that grow along steps are padded with NaN. A quantity that is
    missing at a step is NaN there, and the attribute `missing` says why, as JSON by step. With
    several probes there is a dimension `probe`, or `pair`; where a quantity is missing on some of
    them, the reason names these.

    Args:
        folder: what was given as `to=`.

    Raises:
        FileNotFoundError: if there is no trace.
        ValueError: if its format is newer than this version can read.
    """
    folder = Path(folder)
    if folder.suffix in (".nc", ".zarr"):
        from nettrace.exports.datasets import read

        return read(folder)
    parts = sorted(folder.glob("part-*" + _SUFFIX))
    if not parts:
        raise FileNotFoundError(
            f"there is no trace in {folder}: expected files part-*{_SUFFIX}, as written by a "
            "tracer or callback with to=..."
        )
    rows: dict[tuple[str, int], _Row] = {}
    about: dict[str, dict[str, Any]] = {}
    provenance: dict[str, Any] = {}
    attempt = ""
    for part in parts:
        for header, arrays in _frames(part):
            if "format" in header:
                if header["format"] > FORMAT:
                    raise ValueError(
                        f"{part} has format {header['format']}, this version of nettrace reads up "
                        f"to {FORMAT}: install a newer nettrace"
                    )
                attempt, start = header["attempt"], header["start"]
                rows = {k: row for k, row in rows.items() if k[0] == attempt or k[1] < start}
                provenance = header["provenance"]
                continue
            about.update(header["about"])
            row = rows.setdefault((attempt, header["step"]), _Row(header["step"]))
            row.add(header, arrays)
    by_step = {row.step: row for row in rows.values()}
    return _dataset(by_step, about, {**provenance, "folder": str(folder)})


class _Row:
    """What is known of one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.values: dict[str, Array] = {}
        self.coordinates: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def add(self, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        self.values.update({k: v for k, v in arrays.items() if k not in header["missing"]})
        self.coordinates.update(header["coordinates"])
        for name, on in header.get("missing_on", {}).items():
            self.missing[name] = "; ".join(f"{label}: {why}" for label, why in on.items())
        self.missing.update(header["missing"])


def _frames(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
    """The frames of a part, up to the first that is cut off or damaged."""
    with path.open("rb") as file:
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            body = file.read(length)
            if len(body) < length:  # cut off, or being written at this moment
                return
            if zlib.crc32(body) != checksum:
                warnings.warn(
                    f"{path} is damaged before byte {file.tell()}: what follows in it is left out",
                    stacklevel=3,
                )
                return
            (size,) = _LENGTH.unpack_from(body)
            header = json.loads(body[_LENGTH.size : _LENGTH.size + size])
            arrays, offset = {}, _LENGTH.size + size
            for name, dtype, shape in header.get("values", ()):
                count = int(np.prod(shape))
                flat = np.frombuffer(body, dtype, count, offset)
                arrays[name] = flat.reshape(shape)
                offset += flat.nbytes
            yield header, arrays


def _dataset(
    rows: Mapping[int, _Row], about: Mapping[str, Any], attributes: Mapping[str, Any]
) -> xr.Dataset:
    import xarray as xr

    steps = sorted(rows)
    names = sorted({n for row in rows.values() for n in [*row.values, *row.missing]})
    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {"step": np.asarray(steps, dtype=np.int64)}
    for name in sorted({name for row in rows.values() for name in row.coordinates}):
        column = [rows[step].coordinates.get(name, np.nan) for step in steps]
        coordinates[name] = ("step", np.asarray(column))
    lengths: dict[str, int] = {}
    for name in names:
        base = name.removesuffix("_standard_error")
        described = about.get(base, {"dims": [], "coordinates": {}, "attributes": {}})
        values = [rows[step].values.get(name) for step in steps]
        stacked = _stacked(values, len(described["dims"]))
        dims = []
        for dim, length in zip(described["dims"], stacked.shape[1:], strict=True):
            labels = described["coordinates"].get(dim)
            if lengths.setdefault(dim, length) != length:  # another quantity's axis of that name
                dim = f"{dim}_{base.replace('/', '_')}"
                lengths[dim] = length
            dims.append(dim)
            if labels is not None and len(labels) == length:
                coordinates[dim] = labels
        missing = {str(s): rows[s].missing[base] for s in steps if base in rows[s].missing}
        attrs = {"name": name, **described["attributes"]}
        if missing:
            attrs["missing"] = json.dumps(missing)
        variables[name.replace("/", "_")] = (("step", *dims), stacked, attrs)
    return xr.Dataset(variables, coordinates, attributes)


def _stacked(values: Sequence[Array | None], ndim: int) -> Array:
    """Arrays along steps in one, padded with NaN to the largest."""
    found = [v for v in values if v is not None]
    shape = tuple(max((v.shape[d] for v in found), default=0) for d in range(ndim))
    dtype = np.result_type(*found) if found else np.dtype(float)
    if any(v is None or v.shape != shape for v in values):
        dtype = np.result_type(dtype, np.float16) if dtype.kind not in "fc" else dtype
        out = np.full((len(values), *shape), np.nan, dtype)
    else:
        out = np.empty((len(values), *shape), dtype)
    for row, value in enumerate(values):
        if value is not None:
            where: Any = (row, *map(slice, value.shape))
            out[where] = value
    return out
