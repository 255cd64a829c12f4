"""The trace on disk, and the labelled view of it.

A trace is a folder of append-only parts, one for each writer. A part is a sequence of frames, each
with its length and checksums: whatever was cut off or damaged, what stands before it is right. A
row of arrays belongs to one step. An attempt, such as a run resumed from a checkpoint, supersedes
what earlier attempts recorded from its start on; nothing is ever rewritten. A trace can be read
while it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nettrace.store.frames import DamagedTraceError
from nettrace.store.part import Part
from nettrace.store.parts import parts
from nettrace.store.writer import TraceWriter

if TYPE_CHECKING:
    import xarray as xr


def open(
    paths: str | Path | Iterable[str | Path],
    names: str | Iterable[str] | None = None,
    attempt: int | None = None,
) -> xr.Dataset:
    """A trace as a labelled data set, with dimension `step`; or several along a dimension `run`.

    The variable of "ntk/trace" is `ntk_trace`, with attribute `name`; an estimate's standard error
    is `..._standard_error`. Arrays are read when they are asked for, and each time anew: `load`
    keeps them. Those that change their shape along steps are padded with NaN, as are steps at which
    a quantity was not recorded; integers are float64 then, exact to 2**53. Where it is missing, the
    attribute `missing` says why, as JSON by step or by "first..last"; of several runs, by run. With
    several probes there is a dimension `probe`, or `pair`; where a quantity is missing on some of
    them, the reason names these.

    Args:
        paths: what was given as `to=`; or several such folders, or a pattern such as "runs/*",
            which are then told apart by what their paths do not share. Or one file that
            `nettrace.export` wrote, which ends in .nc or .zarr.
        names: the quantities wanted, or their groups, such as "ntk/gram" or "ntk"; only the steps
            at which one of them was recorded are there then.
        attempt: the number of an attempt at the run, from 0, whose records are wanted, also those
            that later attempts superseded; the attribute `attempts` lists them.

    Raises:
        FileNotFoundError: if there is no trace.
        ValueError: if its format is newer than this version can read.
        KeyError: if a quantity was never recorded.
        IndexError: if there is no such attempt.
        ImportError: if it is an export, and packages for its format are missing.
        DamagedTraceError: on reading a large array that is not as it was written. Other damage ends
            the part of the trace that it is in, with a warning.
    """
    if isinstance(paths, (str, Path)) and Path(paths).suffix in (".nc", ".zarr"):
        from nettrace.exports.datasets import read

        return read(Path(paths), names)
    from nettrace.store.dataset import dataset  # xarray takes long to import

    return dataset(paths, names, attempt)


__all__ = ["DamagedTraceError", "Part", "TraceWriter", "open", "parts"]
