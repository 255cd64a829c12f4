"""The format that is written: frames of checked heads, with large arrays in their bodies.

The kinds of frames are "p" for the part's header, which comes first, "l" for a layout, "a" for
attributes, "r" for a row and "e" for the end of a part that is full, with its number of rows.
"""

from __future__ import annotations

import struct
from pathlib import Path

from nettrace.store.frames import MAGIC, DamagedTraceError, Frame, scan
from nettrace.store.layout import ROW, decode, read_json, whole
from nettrace.store.part import Collected, Header

FORMAT = 2


def read(path: Path, found: Collected) -> None:
    """Collects what is in a part, or what has come to it since that was done before.

    Raises:
        DamagedTraceError: where it is damaged; what stands before has been collected.
        ValueError: if it is of a newer format.
    """
    for frame in scan(path, found.end or len(MAGIC)):
        if found.header is None:
            found.header = _header(path, frame)
        elif found.sealed:
            raise _damaged(path, frame, "something follows its end")
        elif frame.kind == b"r":
            _row(path, frame, found)
        elif frame.kind == b"l":
            try:
                found.describe(decode(frame.head))
            except ValueError as error:
                raise _damaged(path, frame, error) from error
        elif frame.kind == b"a":
            found.attributes |= _attributes(path, frame)
        elif frame.kind == b"e":
            if frame.head != b'{"rows":%d}' % len(found):
                raise _damaged(path, frame, f"an end after {len(found)} rows")
            found.sealed = True
        found.end = frame.at + len(frame.head) + frame.body


def header(path: Path) -> Header | None:
    """What a part begins with; None if that cannot be read."""
    try:
        first = next(scan(path), None)
        return None if first is None else _header(path, first)
    except DamagedTraceError:
        return None


def _row(path: Path, frame: Frame, found: Collected) -> None:
    try:
        step, number = ROW.unpack_from(frame.head)
        layout = found.layouts[number]
    except (struct.error, IndexError) as error:
        raise _damaged(path, frame, error) from error
    if (len(frame.head), frame.body) != layout.sizes:
        raise _damaged(path, frame, "a row that does not fit its layout")
    found.add(step, number, frame.at, frame.head[ROW.size : layout.before])


def _attributes(path: Path, frame: Frame) -> dict[str, dict[str, object]]:
    try:
        found = read_json(frame.head)
    except ValueError as error:
        raise _damaged(path, frame, error) from error
    if not all(isinstance(its, dict) for its in found.values()):
        raise _damaged(path, frame, "attributes that have no names")
    return found


def _header(path: Path, frame: Frame) -> Header:
    try:
        if frame.kind != b"p":
            raise ValueError("it has no header")
        text = read_json(frame.head)
        number, start, before = int(text["format"]), text["start"], text["continues"]
        if number <= FORMAT:
            return Header(
                str(text["attempt"]),
                None if start is None else whole(start),
                whole(text["rank"]),
                None if before is None else str(before),
                dict(text["provenance"]),
            )
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise _damaged(path, frame, error) from error
    raise ValueError(
        f"{path} has format {number}, this version of nettrace reads up to {FORMAT}: install a "
        "newer nettrace"
    )


def _damaged(path: Path, frame: Frame, why: object) -> DamagedTraceError:
    return DamagedTraceError(f"{path} is damaged before byte {frame.at}, {why}")
