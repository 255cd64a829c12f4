"""The first format, which is only read: frames of JSON headers and arrays, checked as a whole."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nettrace.store.frames import DamagedTraceError
from nettrace.store.layout import Layout, Place, array_of, axes_of
from nettrace.store.part import Collected, Header

#: What its first header begins with, after as many bytes.
MAGIC, BEFORE = b'{"format":', 12
_FRAME = struct.Struct("<II")  # length and CRC-32 of what follows
_LENGTH = struct.Struct("<I")  # of the header


def read(path: Path, found: Collected) -> None:
    """Collects what is in a part.

    Raises:
        DamagedTraceError: where it is damaged; what stands before has been collected.
    """
    about: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for text, at, length in _frames(path):
        try:
            if "format" in text:
                found.header = _header(text)
                continue
            if found.header is None:
                raise ValueError("it has no header")
            about.update(text["about"])
            found.attributes |= {n: dict(its["attributes"]) for n, its in text["about"].items()}
            layout = _layout(text, about)
            if sum(place.size for place in layout.places.values()) != length:
                raise ValueError("a row whose arrays do not fit")
            key = repr(layout)
            if key not in numbers:
                numbers[key] = len(numbers)
                found.describe(layout)
            kinds = np.dtype(list(layout.coordinates.items()))
            row = np.array(tuple(text["coordinates"].values()), kinds)
            found.add(int(text["step"]), numbers[key], at, row.tobytes())
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DamagedTraceError(f"{path} is damaged before byte {at}, {error!r}") from error


def header(path: Path) -> Header | None:
    """What a part begins with; None if that cannot be read."""
    try:
        first = next(_frames(path), None)
        return None if first is None else _header(first[0])
    except (AttributeError, DamagedTraceError, KeyError, TypeError, ValueError):
        return None


class _Layout(Layout):
    """All arrays lie one after the other, and are checked with their header."""

    @property
    def places(self) -> dict[str, Place]:
        at, found = 0, {}
        for name, array in self.arrays.items():
            found[name] = Place(*array, at, None)
            at += found[name].size
        return found


def _frames(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Headers, with where their arrays begin and how long they are."""
    with path.open("rb") as file:
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            begin = file.tell()
            body = file.read(length)
            if len(body) < length:  # cut off
                return
            try:
                if zlib.crc32(body) != checksum:
                    raise ValueError("which does not match its checksum")
                (size,) = _LENGTH.unpack_from(body)
                text = json.loads(body[_LENGTH.size : _LENGTH.size + size])
                if not isinstance(text, dict):
                    raise ValueError(f"a header that is a {type(text).__name__}")
            except (RecursionError, ValueError, struct.error) as error:
                end = file.tell()
                raise DamagedTraceError(f"{path} is damaged before byte {end}, {error}") from error
            at = _LENGTH.size + size
            yield text, begin + at, length - at


def _header(text: dict[str, Any]) -> Header:
    return Header(str(text["attempt"]), int(text["start"]), 0, dict(text["provenance"]))


def _layout(text: dict[str, Any], about: dict[str, Any]) -> Layout:
    arrays = {}
    for name, dtype, shape in text["values"]:
        its = about.get(name.removesuffix("_standard_error"), {})
        dims = its.get("dims", [])
        if len(dims) != len(shape):
            dims = [f"dim_{d}" for d in range(len(shape))]
        lengths = dict(zip(dims, shape, strict=True))
        labels = its.get("coordinates", {})
        labels = {dim: its for dim, its in labels.items() if lengths.get(dim) == len(its)}
        arrays[name] = array_of(dtype, shape, axes_of(dims, labels))
    coordinates = {
        name: "<i8" if isinstance(value, int) else "<f8"
        for name, value in text["coordinates"].items()
    }
    on = {name: dict(its) for name, its in text.get("missing_on", {}).items()}
    return _Layout(coordinates, arrays, dict(text["missing"]), on)
