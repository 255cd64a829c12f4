"""Sampling in pieces: within a budget of time, with a progress bar, and never for nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tqdm import tqdm

from nettrace.missing import DoubtfulMeasureWarning, warn_missing

if TYPE_CHECKING:
    import xarray as xr

#: Seconds between two writings of what there is so far, at least.
_BETWEEN = 5.0
#: The share of the time that writing it may take.
_WRITING = 0.05
#: The largest integer of a file.
_LARGEST = 2**31 - 1


class Sampler(Protocol):
    """What explores a landscape, a piece at a time; has a result at any time."""

    #: What it does, in a few words.
    title: str

    @property
    def share(self) -> float:
        """How much of what was asked for is done, from 0 to 1."""

    def advance(self) -> None:
        """Goes on by a piece that takes a fraction of a second."""

    def settle(self) -> None:
        """Is told once, when half of the time is over: to end what only prepares."""

    def result(self) -> xr.Dataset:
        """What was found so far; doubts about it, one a line, in the attribute "doubts"."""


def run(
    sampler: Sampler,
    *,
    seconds: float | None = None,
    progress: bool = False,
    to: str | Path | None = None,
) -> xr.Dataset:
    """Lets a sampler work until it is done, its time is over or it is interrupted.

    Args:
        sampler: what does the work.
        seconds: how long it may take, give or take a piece, which takes a fraction of a second, but
            longer where a single evaluation of the network for all copies does; None for as long as
            it takes.
        progress: whether to show a progress bar.
        to: a file for the result, netCDF, which `xarray.open_dataset` reads. What there is so far
            is written every few seconds, each time whole or not at all, so that a process that is
            killed leaves it.

    Returns:
        What the sampler found, with attributes "stopped" ("done", "out of time" or "interrupted")
        and "seconds". Doubts are warned of, and kept as the attribute "doubts".

    Raises:
        ValueError: if there is no time, or `to` is a folder.
        Exception: whatever the sampler raises; a file then holds what was found before.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"expected seconds= to be positive, or None for any time, got {seconds!r}")
    if to is not None and Path(to).is_dir():
        raise ValueError(f"expected to= to be a file, got the folder {str(to)!r}")
    begun, settled, stopped = time.monotonic(), False, "done"
    written, writing = begun, 0.0
    bar = tqdm(
        total=100,
        desc=sampler.title,
        disable=not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
    )
    with bar:
        try:
            while sampler.share < 1:
                sampler.advance()
                now = time.monotonic()
                spent = 0.0 if seconds is None else (now - begun) / seconds
                bar.update(100 * min(1.0, max(sampler.share, spent)) - bar.n)
                if to is not None and now - written > max(_BETWEEN, writing / _WRITING):
                    write(_marked(sampler.result(), "unfinished", now - begun), to)
                    written = time.monotonic()
                    writing = written - now
                if spent >= 1 and sampler.share < 1:
                    stopped = "out of time"
                    break
                if spent >= 0.5 and not settled:
                    settled = True
                    sampler.settle()
        except KeyboardInterrupt:
            stopped = "interrupted"
        bar.update(100 - bar.n if stopped == "done" else 0)
    found = _marked(sampler.result(), stopped, time.monotonic() - begun)
    if to is not None:
        write(found, to)
    for doubt in filter(None, found.attrs.get("doubts", "").splitlines()):
        warn_missing(f"{sampler.title}: {doubt}", 2, DoubtfulMeasureWarning)
    return found


def write(found: xr.Dataset, to: str | Path) -> None:
    """Writes a result to a file, whole or not at all."""
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _narrowed(found).to_netcdf(unfinished, engine="scipy")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _narrowed(found: xr.Dataset) -> xr.Dataset:
    """The same as netCDF 3 can hold it.

    Integers of more than 32 bits are floating numbers. An axis of length 0 is taken for one of any
    length, which only the first may be: arrays with others are left out.
    """
    found = found.drop_vars([name for name, v in found.variables.items() if 0 in v.shape[1:]])
    wide = {
        name: one.astype(np.float64)
        for name, one in found.variables.items()
        if one.dtype.kind in "iu" and one.size and np.abs(one.values).max() > _LARGEST
    }
    numbers = {
        name: float(value)
        for name, value in found.attrs.items()
        if isinstance(value, (int, np.integer)) and abs(int(value)) > _LARGEST
    }
    return found.assign(wide).assign_attrs(numbers)


def _marked(found: xr.Dataset, stopped: str, seconds: float) -> xr.Dataset:
    return found.assign_attrs(stopped=stopped, seconds=round(seconds, 3))
