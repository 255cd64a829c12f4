"""Traces for other programs, written block by block of steps, and appearing when they are whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from nettrace import store

if TYPE_CHECKING:
    import xarray as xr

Format: TypeAlias = Literal["netcdf", "zarr", "csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[str, Format] = {
    ".nc": "netcdf",
    ".zarr": "zarr",
    ".csv": "csv",
    ".parquet": "parquet",
}
_PACKAGES: Mapping[Format, tuple[str, ...]] = {
    "netcdf": ("h5netcdf", "h5py", "dask"),
    "zarr": ("zarr", "dask"),
    "csv": (),
    "parquet": ("pyarrow",),
}
#: What lies in a folder that is an export, and in none that is a trace.
_MARKS = (".zgroup", "attributes.json")
#: What files begin with that are exports: HDF5, Parquet, and tables by run or step.
_BEGINNINGS = (b"\x89HDF\r\n", b"PAR1", b"step,", b"step\n", b"run,")


def export(
    trace: str | Path | Iterable[str | Path] | xr.Dataset,
    to: str | Path,
    format: Format | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a trace in a format that other programs read.

    It is written beside its place under a name that begins with a dot, and renamed when it is
    whole. Of each variable, 8 MiB are in memory at a time, or one step if that is more.

    - netCDF: one compressed file, for readers of netCDF-4. Complex numbers have a last dimension
      `complex`: re, im. `nettrace.open` reads it as the same data set.
    - zarr: a folder of format 2, for zarr 2 and 3. `nettrace.open` reads it too.
    - Parquet: one file with a row a step, or a row a run and step; arrays are nested lists.
      Attributes, labels of axes and dtypes are JSON in its metadata under "nettrace".
    - CSV: a folder with such rows of numbers in `scalars.csv`; a table for each quantity that is an
      array, as `ntk_spectrum.csv`, in long form with a column for each axis, without steps at which
      all of it is NaN; and the JSON in `attributes.json`. A name that ends in .csv stands for the
      table of numbers alone. Digits are as many as tell a number from others of its dtype.

    In tables, complex numbers are two columns, `name.re` and `name.im`.

    Args:
        trace: the folder of a trace, several, or what `nettrace.open` gave.
        to: a file, or a folder for zarr and CSV.
        format: "netcdf", "zarr", "csv" or "parquet"; by default what the suffix says: .nc, .zarr,
            .csv or .parquet.
        overwrite: whether to replace an earlier export.

    Returns:
        Where it is.

    Raises:
        FileExistsError: if something is there and is not to be replaced, or is no export.
        FileNotFoundError: if there is no trace.
        ImportError: if packages for the format are missing.
        ValueError: if there is no such format, or arrays are to go into one CSV table.
    """
    import xarray as xr

    from nettrace.exports import datasets, tables

    to = Path(to)
    format = format or SUFFIXES.get(to.suffix)
    if format not in FORMATS:
        given = f"{to} has none of these suffixes" if format is None else f"got {format!r}"
        raise ValueError(
            f"expected one of the formats {', '.join(FORMATS)}, or a name that ends in "
            f"{', '.join(SUFFIXES)}; {given}"
        )
    if (to.exists() or to.is_symlink()) and not overwrite:
        raise FileExistsError(
            f"{to} is there already: choose another name, or replace it by --overwrite "
            "(overwrite=True)"
        )
    if to.exists() and not _is_export(to):
        raise FileExistsError(f"{to} is no earlier export, it is not overwritten")
    datasets.require(format, *_PACKAGES[format])
    data = trace if isinstance(trace, xr.Dataset) else store.open(trace)
    if "step" not in data.dims:
        raise ValueError(f"expected a trace, with a dimension step, got {dict(data.sizes)}")
    write = {
        "netcdf": datasets.write_netcdf,
        "zarr": datasets.write_zarr,
        "csv": tables.write_csv if to.suffix == ".csv" else tables.write_csv_folder,
        "parquet": tables.write_parquet,
    }[format]
    new = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        write(data.drop_encoding(), new)
        _replace(to, new)
    finally:
        _remove(new)
    return to


def _is_export(path: Path) -> bool:
    if path.is_dir():
        return any((path / mark).exists() for mark in _MARKS)
    with path.open("rb") as file:
        return file.read(16).startswith(_BEGINNINGS)


def _replace(old: Path, new: Path) -> None:
    """Puts what is new in the place of what may be there."""
    if not old.is_dir() and not new.is_dir():
        os.replace(new, old)
        return
    aside = new.with_name(f"{new.name}.old")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
