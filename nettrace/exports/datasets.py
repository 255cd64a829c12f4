"""Data sets as netCDF and zarr, and back.

What a format cannot hold is said in JSON in the attribute "nettrace": other dtypes, and attributes
that are neither text nor finite numbers, or whose names the format keeps to itself.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xarray.backends.common import BackendArray
from xarray.core import indexing

from nettrace.store.dataset import quantities as chosen

if TYPE_CHECKING:
    import xarray as xr

_BLOCK = 8 << 20  # bytes; also of what zarr and HDF5 compress at once
_OVERHEAD = 1 << 20  # bytes of a file without numbers, at most
_OURS = "nettrace"
#: Names of attributes that mean something to xarray and HDF5, as does a leading underscore.
_RESERVED = set(
    "add_offset ancillary_variables bounds calendar cell_measures coordinates dtype formula_terms "
    "grid_mapping missing_value scale_factor CLASS DIMENSION_LIST NAME REFERENCE_LIST".split()
) | {_OURS}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def write_netcdf(data: xr.Dataset, path: Path) -> None:
    """Writes one compressed file, by h5netcdf.

    Raises:
        OSError: if there may be too little room on the disk, where HDF5 would crash the process.
    """
    import dask

    free = shutil.disk_usage(path.parent).free
    if data.nbytes + _OVERHEAD > free:
        raise OSError(
            errno.ENOSPC,
            f"netCDF may take {data.nbytes + _OVERHEAD:,} bytes and {free:,} are free; zarr and "
            "parquet may be tried with less",
            str(path.parent),
        )
    data = _representable(data, netcdf=True)
    compressed = {"zlib": True, "complevel": 1, "shuffle": True}
    encoding = {
        name: {"_FillValue": None, **(compressed if v.ndim and v.size else {})}
        | ({"chunksizes": _block(v)} if v.chunks else {})
        for name, v in data.variables.items()
        if v.dtype.kind in "biuf"
    }
    with dask.config.set(scheduler="synchronous"):  # each thread would hold a block
        data.to_netcdf(path, engine="h5netcdf", encoding=encoding)


def write_zarr(data: xr.Dataset, path: Path) -> None:
    """Writes a folder of zarr's format 2, which has complex numbers and which zarr 3 reads too."""
    import dask
    import zarr

    data = _representable(data, netcdf=False)
    encoding = {
        name: {"_FillValue": None, **({"chunks": _block(v)} if v.chunks else {})}
        for name, v in data.variables.items()
        if v.dtype.kind in "biufc"
    }
    version: dict[str, Any] = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) > 2 else {}
    with dask.config.set(scheduler="synchronous"):
        data.to_zarr(path, encoding=encoding, consolidated=True, **version)


def read(path: Path, names: str | Iterable[str] | None = None) -> xr.Dataset:
    """What was exported as netCDF or zarr, lazily loaded; others' files are read too.

    Args:
        path: ends in .nc or .zarr.
        names: the quantities wanted, or their groups.

    Raises:
        FileNotFoundError: if it is not there.
        KeyError: if a quantity is not in it.
        ImportError: if packages for the format are missing.
    """
    import xarray as xr

    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.suffix == ".zarr":
        require("zarr", "zarr")
    else:
        require("netcdf", "h5netcdf", "h5py")
    engine = "zarr" if path.suffix == ".zarr" else "h5netcdf"
    data = xr.open_dataset(path, engine=engine, decode_times=False, decode_timedelta=False)
    variables = {name: _restored(v) for name, v in data.variables.items()}
    if not any("complex" in variable.dims for n, variable in variables.items() if n != "complex"):
        variables.pop("complex", None)
    coordinates = {name: v for name, v in variables.items() if name in data.coords}
    quantities = {name: v for name, v in variables.items() if name not in data.coords}
    found = xr.Dataset(quantities, coordinates, _all_attributes(data.attrs)[0])
    if names is not None:
        known = {str(v.attrs.get("name", name)): name for name, v in found.data_vars.items()}
        found = found[[known[name] for name in sorted(chosen(names, set(known)))]]
    found.set_close(data.close)
    return found


def require(format: str, *packages: str) -> None:
    """Imports packages.

    Raises:
        ImportError: if one is missing, with what to install.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{format} needs {package}: pip install 'nettrace[export]'", name=package
            ) from error


def block_of(size: int, steps: int) -> int:
    """How many steps to have in memory at once, of so many that take `size` bytes together."""
    return max(1, min(steps, _BLOCK * steps // max(1, size)))


def as_json(value: Any) -> Any:
    """What JSON makes of values that it does not know."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _representable(data: xr.Dataset, netcdf: bool) -> xr.Dataset:
    """The same with attributes, and for netCDF dtypes, that the format has."""
    import xarray as xr

    variables: dict[Any, Any] = {}
    for name, variable in data.variables.items():
        other = {}
        kept = _blocked(variable)
        if netcdf and (variable.dtype.kind == "c" or variable.dtype == np.float16):
            other["dtype"] = str(variable.dtype)
            kept = _parted(kept) if variable.dtype.kind == "c" else kept.astype(np.float32)
        kept = kept.copy(deep=False)
        kept.attrs = _plain_attributes(variable.attrs, other)
        variables[name] = kept
    if any("complex" in variable.dims for variable in variables.values()):
        variables["complex"] = xr.Variable("complex", ["re", "im"])
    names = {*data.coords, "complex"}
    coordinates = {name: v for name, v in variables.items() if name in names}
    quantities = {name: v for name, v in variables.items() if name not in names}
    return xr.Dataset(quantities, coordinates, _plain_attributes(data.attrs, {}))


def _restored(variable: xr.Variable) -> xr.Variable:
    import xarray as xr

    attributes, told = _all_attributes(variable.attrs)
    dtype = np.dtype(told or variable.dtype)
    if dtype.kind == "c" and variable.dtype.kind == "f":
        whole = indexing.LazilyIndexedArray(_Complex(variable, dtype))
        return xr.Variable(variable.dims[:-1], whole, attributes)
    if variable.dtype.kind in "OT":
        variable = variable.astype(str)
    elif dtype != variable.dtype:
        variable = variable.astype(dtype)
    variable = variable.copy(deep=False)
    variable.attrs = attributes
    return variable


class _Complex(BackendArray):
    """Complex numbers from parts along a last axis, when they are asked for."""

    def __init__(self, parts: xr.Variable, dtype: np.dtype[Any]) -> None:
        self._parts = parts
        self.shape = parts.shape[:-1]
        self.dtype = dtype

    def __getitem__(self, key: Any) -> Any:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._get)

    def _get(self, key: tuple[int | slice, ...]) -> Any:
        parts = np.ascontiguousarray(self._parts[(*key, slice(None))].values)
        return parts.view(self.dtype)[..., 0]


def _parted(variable: Any) -> Any:
    """Complex numbers in blocks as parts along a last dimension `complex`."""
    import xarray as xr

    def parts(numbers: Any) -> Any:
        return np.stack([numbers.real, numbers.imag], -1)

    if not variable.chunks:
        return xr.Variable((*variable.dims, "complex"), parts(variable.values))
    data = variable.data
    dtype = np.zeros((), data.dtype).real.dtype
    chunks = (*data.chunks, (2,))
    data = data.map_blocks(parts, dtype=dtype, chunks=chunks, new_axis=data.ndim)
    return xr.Variable((*variable.dims, "complex"), data)


def _blocked(variable: Any) -> Any:
    """A variable in blocks of steps, as dask sees it; numbers by step as they are."""
    if "step" not in variable.dims or variable.ndim == 1 or not variable.size:
        return variable
    apart = {"run": 1} if "run" in variable.dims else {}
    size = variable.nbytes // (variable.sizes["run"] if apart else 1)
    blocks = {"step": block_of(size, variable.sizes["step"]), **apart}
    return variable.chunk(blocks, name=uuid.uuid4().hex)  # else dask looks at all values for one


def _block(variable: Any) -> tuple[int, ...]:
    return tuple(sizes[0] for sizes in variable.chunks)


def _plain_attributes(attributes: Mapping[Any, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Attributes as every format and reader takes them, all others as JSON."""
    plain = {name: value for name, value in attributes.items() if _is_plain(name, value)}
    rest = {name: value for name, value in attributes.items() if name not in plain}
    if rest:
        other = {**other, "attributes": rest}
    return {**plain, _OURS: json.dumps(other, default=as_json)} if other else plain


def _all_attributes(attributes: Mapping[Any, Any]) -> tuple[dict[Any, Any], str | None]:
    """What `_plain_attributes` was given: the attributes, and the dtype if it is another."""
    found = dict(attributes)
    other = json.loads(found.pop(_OURS, "{}"))
    return {**found, **other.get("attributes", {})}, other.get("dtype")


def _is_plain(name: str, value: Any) -> bool:
    if not name or name.startswith("_") or name in _RESERVED or _NO_TEXT.search(name):
        return False
    if isinstance(value, str):
        return not _NO_TEXT.search(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return -(2**63) <= int(value) < 2**63
    return isinstance(value, (float, np.floating)) and math.isfinite(value)
