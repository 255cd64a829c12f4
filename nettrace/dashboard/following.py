"""Traces that are followed while they are written: which there are, and what is in them by now."""

from __future__ import annotations

import glob
import hashlib
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import xarray as xr

from nettrace.store.dataset import dataset, labels
from nettrace.store.parts import SUFFIX, Kept, part_files

#: Files are looked at no more often than this, in seconds.
_PAUSE = 0.2
#: How long traces are read before those that are read by then are shown, in seconds.
_PATIENCE = 0.4
_BEING_READ = "it is being read"
#: How deep traces lie below a folder that is given, at most.
_BELOW = ("*", "*/*", "*/*/*")


@dataclass(frozen=True)
class Followed:
    """A trace as it was read last.

    Args:
        folder: where it is.
        label: what tells it apart from others; its path if it cannot be read.
        version: changes with what is in it.
        data: as `nettrace.open` gives it, if it can be read.
        problem: why it cannot be read, or what is damaged.
    """

    folder: Path
    label: str
    version: str
    data: xr.Dataset | None
    problem: str


class Following:
    """The traces in some folders, and below them; nothing is written.

    A trace is read again when its files have changed in number, size or time, and then from where
    it had ended. Threads may share it.

    Args:
        paths: folders of traces, folders that have some below them, or patterns; those that match
            later appear then.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._turn = threading.RLock()
        self._kept: Kept = {}
        self._looked = float("-inf")
        #: Whether there are traces that have not been read yet.
        self.is_reading = False
        self._read: dict[Path, tuple[str, xr.Dataset | None, str]] = {}
        self._shown: dict[Path, tuple[str, xr.Dataset | None, str]] = {}
        #: When each was read last: those that waited longest come first.
        self._when: dict[Path, float] = {}
        self._runs: list[Followed] = []
        self._together: xr.Dataset | None = None

    def look(self) -> None:
        """Reads what has changed, for less than a second: what is left is read the next time."""
        with self._turn:
            if self.is_reading or time.monotonic() - self._looked >= _PAUSE:
                self._look()
                self._looked = time.monotonic()

    def runs(self) -> list[Followed]:
        """All traces as they were found by `look`, those that cannot be read too."""
        return list(self._runs)

    def readable(self) -> list[str]:
        """The labels of those that can be read."""
        return [run.label for run in self.runs() if run.data is not None]

    def data(self, chosen: Sequence[str]) -> xr.Dataset:
        """One run alone, or several along a dimension run.

        Args:
            chosen: labels of runs that can be read; none for all of these.

        Raises:
            KeyError: if there is no such run.
            ValueError: if none can be read.
        """
        with self._turn:
            there = {run.label: run for run in self._runs if run.data is not None}
            if unknown := [label for label in chosen if label not in there]:
                raise KeyError(f"there is no run {unknown[0]!r} that can be read")
            chosen = chosen or list(there)
            if not chosen:
                raise ValueError("there is no run that can be read yet")
            alone = there[chosen[0]].data
            if len(chosen) == 1 and alone is not None:
                return alone
            if self._together is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said of each run
                    folders = [run.folder for run in there.values()]
                    self._together = dataset(folders, kept=self._kept)
            rows = [label in set(chosen) for label in there]  # in the same order
            return self._together if all(rows) else self._together.isel(run=rows)

    def _look(self) -> None:
        folders = _found(self._paths)
        known, self._read = self._read, {}
        end = time.monotonic() + _PATIENCE
        opened = 0
        for folder in sorted(folders, key=lambda one: self._when.get(one, 0.0)):
            version = _version(folder)
            before = known.get(folder)
            if before is not None and before[0] == version:
                self._read[folder] = before
            elif time.monotonic() < end or not opened:
                self._read[folder] = version, *self._open(folder)
                self._when[folder] = time.monotonic()
                opened += 1
            else:  # next time; until then as it was
                self._read[folder] = before or ("", None, _BEING_READ)
        self.is_reading = any(why == _BEING_READ for _, _, why in self._read.values())
        # What is read first is shown at once, the rest together: each time costs a drawing.
        if self._runs and (self.is_reading or self._read == self._shown):
            return
        self._shown = dict(self._read)
        self._together = None
        readable = [
            f for f in folders if self._read[f][1] is not None or self._read[f][2] == _BEING_READ
        ]
        called = dict(zip(readable, labels(readable), strict=True)) if readable else {}
        if len(readable) == 1:  # nothing to tell it from; its name alone is often "trace"
            called = {readable[0]: "/".join(readable[0].absolute().parts[-2:])}
        self._runs = [
            Followed(folder, _readable(called.get(folder, str(folder))), *self._read[folder])
            for folder in folders
        ]

    def _open(self, folder: Path) -> tuple[xr.Dataset | None, str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if folder.suffix in (".nc", ".zarr") and folder.exists():
                    return None, "it was exported, and stays as it is: nettrace report draws it"
                if not folder.is_dir():
                    return None, "there is no such folder yet"
                if not part_files(folder):
                    return None, f"there is no trace in it: no files part-*{SUFFIX} yet"
                data = dataset(folder, kept=self._kept)
            except Exception as error:  # whatever files there are, the others are shown
                return None, f"it cannot be read: {error}"
        problem = "; ".join(dict.fromkeys(str(warning.message) for warning in said))
        if not data.sizes["step"]:
            return None, problem or "nothing has been recorded yet"
        return data, problem


def _found(paths: Sequence[str]) -> list[Path]:
    """The folders of traces, and those that are given and have none."""
    found: list[Path] = []
    for path in paths:
        if glob.has_magic(path) and not Path(path).exists():
            matching = [Path(p) for p in sorted(glob.glob(path, recursive=True))]
            found += chain(*(_below(p) or [p] for p in matching if p.is_dir()))
            continue
        found += _below(Path(path)) or [Path(path)]
    unique = {folder.absolute(): folder for folder in found}
    return list(unique.values())


def _below(folder: Path) -> list[Path]:
    if part_files(folder):
        return [folder]
    files: Iterator[Path] = chain(*(folder.glob(f"{one}/part-*{SUFFIX}") for one in _BELOW))
    return sorted({file.parent for file in files})


def _readable(text: str) -> str:
    """Names of files may be no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _version(folder: Path) -> str:
    """Changes with the files of a trace."""
    said = []
    try:
        for path in part_files(folder):
            found = path.stat()
            said.append((path.name, found.st_ino, found.st_size, found.st_mtime_ns))
    except OSError as error:  # taken away at this moment
        said.append((str(error), 0, 0, 0))
    return hashlib.sha256(repr((folder.is_dir(), said)).encode()).hexdigest()[:16]
