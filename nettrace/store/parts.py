"""The parts of a trace, whatever their format."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from nettrace.store import format_1, format_2
from nettrace.store.frames import MAGIC, DamagedTraceError
from nettrace.store.part import Collected, Header, Part

SUFFIX = ".ntl"


def part_files(folder: Path) -> list[Path]:
    """The files of a trace, in the order in which they were begun."""
    found = [p for p in folder.glob("part-*" + SUFFIX) if p.stem[5:].isdecimal() and p.is_file()]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """That of a part, from its file's name."""
    return int(path.stem[5:])


#: What was read of files, with their devices, numbers, sizes and times of change.
Kept: TypeAlias = dict[Path, tuple[tuple[int, ...], Collected]]


def parts(folder: str | Path, kept: Kept | None = None) -> list[Part]:
    """The parts of the trace in a folder, in the order in which they were begun.

    Each is read up to where it is cut off or damaged. Damage is said by a warning, as is the loss
    of what was complete.

    Args:
        folder: of the trace.
        kept: for those who read a trace again and again while it grows: what is read is kept
            here, and reading goes on from there.

    Raises:
        ValueError: if a part was written by a newer version.
        OSError: if a part cannot be read.
    """
    found = [part for path in part_files(Path(folder)) if (part := _read(path, kept)) is not None]
    sealed = {part.path.name for part in found if part.sealed}
    for part in found:
        if (before := part.header.continues) is not None and before not in sealed:
            warnings.warn(
                f"{part.path.with_name(before)} was complete and is not: it is cut off, damaged or "
                "not there",
                stacklevel=3,
            )
    return found


def header(path: Path) -> Header | None:
    """What a part begins with; None if that cannot be read, or is not there yet.

    Raises:
        ValueError: if it was written by a newer version.
    """
    try:
        found: Header | None = _format(path).header(path)
        return found
    except DamagedTraceError:
        return None


def _format(path: Path) -> ModuleType:
    with path.open("rb") as file:
        begin = file.read(len(format_1.MAGIC) + format_1.BEFORE)
    if begin[format_1.BEFORE :] == format_1.MAGIC:
        return format_1
    if not begin.startswith(MAGIC[: len(begin)]):
        raise DamagedTraceError(f"{path} is no part of a trace, or damaged where it begins")
    return format_2


def _read(path: Path, kept: Kept | None) -> Part | None:
    found = Collected()
    try:
        state = _state(path)
        before, known = (kept or {}).pop(path, ((), found))
        # Parts only ever grow: one that did not is another, or damaged.
        if before == state or (before[:2] == state[:2] and before[2] < state[2] and known.end):
            found = known
        if before != state:
            _format(path).read(path, found)
        if kept is not None:
            kept[path] = state, found
    except FileNotFoundError:  # it was taken away at this moment
        return None
    except DamagedTraceError as error:
        warnings.warn(f"{error}: what follows in it is left out", stacklevel=4)
    return found.part(path)


def _state(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
