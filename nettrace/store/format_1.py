"""The first format, which is only read: frames of JSON headers and arrays, checked as a whole."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nettrace.record import ERROR
from nettrace.store.frames import DamagedTraceError
from nettrace.store.layout import Layout, Place, array_of, fitting, read_json, whole
from nettrace.store.part import Collected, Header

#: What its first header begins with, after as many bytes.
MAGIC, BEFORE = b'{"format":', 12
_FRAME = struct.Struct("<II")  # length and CRC-32 of what follows
_LENGTH = struct.Struct("<I")  # of the header
_ROW = b'{"step":'  # what all other headers begin with


def read(path: Path, found: Collected) -> None:
    """Collects what is in a part.

    Raises:
        DamagedTraceError: where it is damaged; what stands before has been collected.
    """
    about: dict[str, Any] = {}
    numbers: dict[str, int] = {}
    for text, at, length in _frames(path):
        try:
            if found.header is None:
                found.header = _header(text)
                continue
            if text["about"]:
                about.update(text["about"])
                found.attributes |= {n: dict(its["attributes"]) for n, its in text["about"].items()}
                numbers = {}  # the same may mean something else from here on
            kinds = ["<i8" if isinstance(v, int) else "<f8" for v in text["coordinates"].values()]
            on = text.get("missing_on", {})
            key = repr((text["values"], [*text["coordinates"]], kinds, text["missing"], on))
            if key not in numbers:
                found.describe(_layout(text, about, kinds))
                numbers[key] = len(found.layouts) - 1
            places = found.layouts[numbers[key]].places
            if sum(place.size for place in places.values()) != length:
                raise ValueError("a row whose arrays do not fit")
            values = zip(kinds, text["coordinates"].values(), strict=True)
            row = b"".join(np.array(value, kind).tobytes() for kind, value in values)
            if len(row) != 8 * len(kinds):
                raise ValueError("a coordinate that is no number")
            found.add(whole(text["step"]), numbers[key], at, row)
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
        end = os.fstat(file.fileno()).st_size
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            begin = file.tell()
            body = file.read(min(length, end - begin))
            try:
                if len(body) < length:
                    if not any(map(_is_whole, _after(body))):
                        return  # cut off
                    raise ValueError("a length")
                if not _is_whole(head + body):
                    raise ValueError("which does not match its checksum")
                (size,) = _LENGTH.unpack_from(body)
                text = read_json(body[_LENGTH.size : _LENGTH.size + size])
            except (ValueError, struct.error) as error:
                at = begin + len(body)
                raise DamagedTraceError(f"{path} is damaged before byte {at}, {error}") from error
            at = _LENGTH.size + size
            yield text, begin + at, length - at


def _is_whole(data: bytes | memoryview) -> bool:
    """Whether bytes begin with a frame that is as it was written."""
    length, checksum = _FRAME.unpack_from(data)
    body = data[_FRAME.size : _FRAME.size + length]
    return bool(len(body) == length and zlib.crc32(body) == checksum)


def _after(data: bytes) -> Iterator[memoryview]:
    """What begins at each place where a frame may begin."""
    before = _FRAME.size + _LENGTH.size
    place = data.find(_ROW)
    while place >= 0:
        if place >= before:
            yield memoryview(data)[place - before :]
        place = data.find(_ROW, place + 1)


def _header(text: dict[str, Any]) -> Header:
    return Header(str(text["attempt"]), whole(text["start"]), 0, None, dict(text["provenance"]))


def _layout(text: dict[str, Any], about: dict[str, Any], kinds: Sequence[str]) -> Layout:
    arrays = {}
    for name, dtype, shape in text["values"]:
        its = about.get(name.removesuffix(ERROR), {})
        axes = fitting(its.get("dims", []), its.get("coordinates", {}), shape)
        arrays[name] = array_of(dtype, shape, axes)
    coordinates = dict(zip(text["coordinates"], kinds, strict=True))
    missing = {name: str(why) for name, why in text["missing"].items()}
    on = {
        name: {label: str(why) for label, why in its.items()}
        for name, its in text.get("missing_on", {}).items()
    }
    return _Layout(coordinates, arrays, missing, on)
