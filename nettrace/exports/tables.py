"""Tables of a trace as CSV and Parquet: a row a step, or a row a run and step.

Complex numbers are two columns, `name.re` and `name.im`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nettrace.exports.datasets import as_json, block_of

if TYPE_CHECKING:
    import xarray as xr

_ROWS = {"run", "step"}


def write_csv_folder(data: xr.Dataset, path: Path) -> None:
    """Writes a folder: `scalars.csv`, a table for each array, and `attributes.json`."""
    path.mkdir()
    data = _numbered(data)
    arrays = _arrays(data)
    _write_csv(data.drop_vars(arrays), path / "scalars.csv")
    for name in arrays:
        alone = data[[name]]
        labels = [c for c in alone.coords if c not in alone.dims and c != "run"]
        _write_csv(alone.drop_vars(labels), path / f"{name}.csv")
    about = json.dumps(_about(data), indent=2, ensure_ascii=False, default=as_json)
    (path / "attributes.json").write_text(about + "\n", encoding="utf-8")


def write_csv(data: xr.Dataset, path: Path) -> None:
    """Writes one table of scalars.

    Raises:
        ValueError: if there are arrays.
    """
    if arrays := _arrays(data):
        names = ", ".join(str(data[name].attrs.get("name", name)) for name in arrays)
        raise ValueError(
            f"one table of a row a step cannot hold arrays, as there are of {names}: give a name "
            "without .csv, and the format csv, for a folder with a table for each; or open the "
            "trace with the names of scalars alone"
        )
    _write_csv(_numbered(data), path)


def write_parquet(data: xr.Dataset, path: Path) -> None:
    """Writes a file with a row a step; arrays are nested lists."""
    import pyarrow as pa
    from pyarrow import parquet

    about = {b"nettrace": json.dumps(_about(data), default=as_json).encode()}
    writer = None
    try:
        for block in _blocks(_numbered(data)):
            columns: dict[str, Any] = {}
            for name, variable in block.variables.items():
                if not (name in _ROWS or name in data.data_vars or "step" in variable.dims):
                    continue  # labels of an axis, which are among the metadata
                values = variable.transpose("step", ..., missing_dims="ignore").values
                if "step" not in variable.dims:
                    values = np.broadcast_to(values, (block.sizes["step"], *values.shape))
                columns |= _parts(str(name), values)
            first = [name for name in ("run", "step") if name in columns]
            names = [*first, *(name for name in columns if name not in first)]
            table = pa.table({name: _column(columns[name]) for name in names})
            if writer is None:
                writer = parquet.ParquetWriter(path, table.schema.with_metadata(about))
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _write_csv(data: xr.Dataset, path: Path) -> None:
    used = {dim for v in data.data_vars.values() for dim in v.dims} | _ROWS
    data = data.drop_vars([n for n, c in data.coords.items() if not used.issuperset(c.dims)])
    with path.open("w", encoding="utf-8", newline="") as file:
        for number, block in enumerate(_blocks(data)):
            if _arrays(block):
                block = block.isel(step=_found(block))
            real: dict[Any, Any] = {}
            for name, quantity in block.data_vars.items():
                for part, values in _parts(str(name), quantity.values).items():
                    real[part] = (quantity.dims, values)
            frame = block.drop_vars(list(block.data_vars)).assign(real).to_dataframe().reset_index()
            columns = [name for name in ("run", "step") if name in frame]
            columns += [name for name in frame if name not in columns]
            frame.to_csv(file, columns=columns, header=number == 0, index=False, na_rep="NaN")


def _arrays(data: xr.Dataset) -> list[Any]:
    """The quantities that are more than a number at each step."""
    return [name for name, v in data.data_vars.items() if not _ROWS.issuperset(v.dims)]


def _numbered(data: xr.Dataset) -> xr.Dataset:
    """The same where runs and steps have labels, if only numbers."""
    return data.assign_coords(
        {dim: np.arange(data.sizes[dim]) for dim in _ROWS & {*data.dims} - {*data.coords}}
    )


def _blocks(data: xr.Dataset) -> Iterator[xr.Dataset]:
    """The rows of each run, block by block, loaded."""
    runs = [data]
    if "run" in data.dims:
        runs = [data.isel(run=run) for run in range(data.sizes["run"])]
    for one in runs:
        size = one.sizes["step"]
        block = block_of(sum(v.nbytes for v in one.variables.values() if "step" in v.dims), size)
        for start in range(0, max(size, 1), block):
            yield one.isel(step=slice(start, start + block)).load()


def _found(block: xr.Dataset) -> Any:
    """Numbers of the steps at which there is an array that is not all NaN."""
    (quantity,) = block.data_vars.values()
    missing = quantity.isnull().all([dim for dim in quantity.dims if dim != "step"])
    return np.flatnonzero(~missing.values)


def _parts(name: str, values: Any) -> dict[str, Any]:
    """Real columns."""
    if values.dtype.kind != "c":
        return {name: values}
    return {f"{name}.re": values.real, f"{name}.im": values.imag}


def _column(values: Any) -> Any:
    """Arrays along axis 0 as a column of nested lists."""
    import pyarrow as pa

    if values.dtype.kind in "UOT":
        return pa.array([str(value) for value in values], pa.string())
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        count, length = int(np.prod(values.shape[:axis])), values.shape[axis]
        offsets = np.arange(count + 1, dtype=np.int32) * np.int32(length)
        column = pa.ListArray.from_arrays(pa.array(offsets), column)
    return column


def _about(data: xr.Dataset) -> dict[str, Any]:
    """What tables do not say: attributes, labels of axes, names of axes and dtypes."""
    return {
        "attributes": dict(data.attrs),
        "coordinates": {
            str(name): c.values.tolist()
            for name, c in data.coords.items()
            if not _ROWS.issuperset(c.dims)
        },
        "variables": {
            str(name): {
                "dims": list(variable.dims),
                "dtype": str(variable.dtype),
                "attributes": dict(variable.attrs),
            }
            for name, variable in data.variables.items()
        },
    }
