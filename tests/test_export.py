"""Exports: what other programs read from them is what the trace holds."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nettrace as nt
from nettrace.store import TraceWriter

pytest.importorskip("h5py")

DTYPES = "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ? c8 c16".split()
ODD = {
    "name": "a/b",
    "convention": "mean over samples, in nats; Σᵢ λᵢ — 核",
    "long": "µ" * 200_000,
    "empty": "",
    "n": 3,
    "huge": 2**80,
    "x": 1.5,
    "nan": float("nan"),
    "flag": True,
    "nothing": None,
    "list": ["a", 1, None],
    "nested": {"device": "cpu", "seeds": [0, 1]},
    "units": "seconds",
    "dtype": "a dtype of its own",
    "coordinates": "polar",
    "scale_factor": 2.0,
    "_FillValue": 0.0,
    "zero": "a\0b",
}


def numbers(dtype, shape, seed=0):
    random = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    values = random.standard_normal(shape).astype(dtype.type(0).real.dtype)
    if dtype.kind == "c":
        values = values.astype(dtype)
        values.imag = random.standard_normal(shape)
    if values.size > 3:
        values.flat[:3] = [np.nan, np.inf, -0.0]
        if dtype.kind == "c":
            values.flat[1] = complex(1, np.inf)
    return values


def everything(runs=None):
    """A data set such as `nettrace.open` gives, with each dtype as number, array and nothing."""
    lead = ("step",) if runs is None else ("run", "step")
    shape = (7,) if runs is None else (runs, 7)
    variables = {}
    for i, dtype in enumerate(DTYPES):
        kind = dtype.replace("?", "b1")
        variables[f"number_{kind}"] = (lead, numbers(dtype, shape, i), {"name": f"number/{kind}"})
        variables[f"array_{kind}"] = ((*lead, "layer", "mode"), numbers(dtype, (*shape, 3, 2), i))
        variables[f"empty_{kind}"] = ((*lead, "none"), numbers(dtype, (*shape, 0)))
    missing = {"name": "a/missing", "missing": json.dumps({str(s): "no: “why”" for s in range(7)})}
    variables["a_missing"] = (lead, np.full(shape, np.nan), missing)
    variables["a_b"] = ((*lead, "mode_a_b"), numbers("f8", (*shape, 4)), ODD)
    coordinates = {
        "step": np.array([0, 1, 2, 5, 10, 100, 2**40]),
        "epoch": (lead, numbers("f8", shape)),
        "wall_time": (lead, 1.7e9 + numbers("f8", shape), {"units": "s"}),
        "layer": ["0.weight", "0.bias", "größe 核"],
    }
    if runs is not None:
        coordinates["run"] = [f"runs/seed {i}" for i in range(runs)]
    return xr.Dataset(variables, coordinates, {**ODD, "folder": "runs/x"})


def same(found, expected):
    xr.testing.assert_identical(found, expected)
    for name, variable in expected.variables.items():
        assert found[name].dtype.kind == variable.dtype.kind, name
        if variable.dtype.kind != "U":
            assert found[name].dtype == variable.dtype, name
        assert found[name].dims == variable.dims


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("runs", [None, 2])
def test_a_data_set_comes_back_as_it_was(tmp_path, suffix, runs):
    data = everything(runs)
    assert nt.export(data, tmp_path / f"x{suffix}") == tmp_path / f"x{suffix}"
    found = nt.open(tmp_path / f"x{suffix}")
    same(found, data)
    chosen = {"step": [0, 2, 6], "layer": slice(1, 3)}
    for name in ("array_c8", "array_f8", "array_b1"):
        xr.testing.assert_identical(
            nt.open(tmp_path / f"x{suffix}")[name].isel(chosen), data[name].isel(chosen)
        )
    nt.export(found, tmp_path / f"y{suffix}")  # what was read can be exported
    same(nt.open(tmp_path / f"y{suffix}"), data)


def test_any_reader_of_xarray_finds_names_numbers_and_attributes(tmp_path):
    data = everything().drop_vars("a_b")
    netcdf, zarr = nt.export(data, tmp_path / "x.nc"), nt.export(data, tmp_path / "x.zarr")
    with xr.open_dataset(netcdf, engine="h5netcdf") as file:
        for name, variable in data.variables.items():
            found = file[name]
            values = variable.values
            if values.dtype.kind == "c":
                assert found.dims[-1] == "complex"
                assert file["complex"].values.tolist() == ["re", "im"]
                values = np.stack([values.real, values.imag], -1)
            np.testing.assert_array_equal(found, values)
            if values.dtype.kind not in "U" and values.dtype != np.float16:
                assert found.dtype == values.dtype
            assert variable.attrs.items() <= found.attrs.items()
        assert file.attrs["convention"] == ODD["convention"]
        assert json.loads(file.attrs["nettrace"])["attributes"]["nested"] == ODD["nested"]
    for options in ({}, {"consolidated": False}):
        with xr.open_dataset(zarr, engine="zarr", **options) as folder:
            for name, variable in data.variables.items():
                np.testing.assert_array_equal(folder[name], variable.values)
                assert folder[name].dtype.kind in (variable.dtype.kind, "O", "T")
                assert variable.attrs.items() <= folder[name].attrs.items()


def test_h5py_finds_compressed_blocks(tmp_path):
    h5py = pytest.importorskip("h5py")
    values = np.zeros((100, 300, 300))
    nt.export(xr.Dataset({"a_b": (("step", "i", "j"), values)}), tmp_path / "x.nc")
    assert (tmp_path / "x.nc").stat().st_size < values.nbytes / 50
    with h5py.File(tmp_path / "x.nc") as file:
        assert file["a_b"].chunks == (11, 300, 300)  # 8 MiB
        assert file["a_b"].compression == "gzip"


@pytest.mark.parametrize("runs", [None, 2])
def test_parquet_has_a_row_a_step_with_names_dtypes_and_attributes(tmp_path, runs, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("nettrace.exports.datasets._BLOCK", 500)  # several blocks
    data = everything(runs)
    table = parquet.read_table(nt.export(data, tmp_path / "x.parquet"))
    assert table.num_rows == 7 * (runs or 1)
    order = ["run", "step"] if runs else ["step"]
    assert table.column_names[: len(order)] == order
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups > 1
    for name in [*data.data_vars, "epoch", "wall_time", "step"]:
        values = data[name].values
        if runs and name != "step":
            values = values.reshape(runs * 7, *values.shape[2:])
        elif runs:
            values = np.tile(values, runs)
        parts = {str(name): values}
        if values.dtype.kind == "c":
            parts = {f"{name}.re": values.real, f"{name}.im": values.imag}
        for part, expected in parts.items():
            kind = table.schema.field(part).type
            for _ in range(expected.ndim - 1):
                kind = kind.value_type
            assert np.dtype(kind.to_pandas_dtype()) == expected.dtype, part
            found = np.array(table[part].to_pylist(), dtype=expected.dtype)
            np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    if runs:
        assert table["run"].to_pylist() == [f"runs/seed {i}" for i in range(2) for _ in range(7)]
    about = json.loads(table.schema.metadata[b"nettrace"])
    assert about["coordinates"]["layer"] == ["0.weight", "0.bias", "größe 核"]
    assert about["variables"]["a_b"]["attributes"]["convention"] == ODD["convention"]
    assert about["variables"]["array_c8"]["dims"][-2:] == ["layer", "mode"]
    assert about["variables"]["array_c8"]["dtype"] == "complex64"
    frame = pytest.importorskip("pandas").read_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(frame["number_f8"], data["number_f8"].values.reshape(-1))


@pytest.mark.parametrize("runs", [None, 2])
def test_csv_has_tables_whose_digits_are_enough(tmp_path, runs, monkeypatch):
    monkeypatch.setattr("nettrace.exports.datasets._BLOCK", 500)
    data = everything(runs)
    folder = nt.export(data, tmp_path / "x", "csv")
    lead = ["run", "step"] if runs else ["step"]
    tables = {}
    for file in folder.glob("*.csv"):
        with file.open(encoding="utf-8", newline="") as lines:
            head, *rows = csv.reader(lines)
        assert head[: len(lead)] == lead
        tables[file.stem] = {name: [row[i] for row in rows] for i, name in enumerate(head)}
    for name, quantity in data.data_vars.items():
        values = quantity.values.reshape(-1)
        alone = set(quantity.dims) <= {"run", "step"}
        table = tables["scalars" if alone else str(name)]
        if not alone:
            assert set(table) - {f"{name}.re", f"{name}.im"} == {*quantity.dims, name} - (
                {name} if values.dtype.kind == "c" else set()
            )
        read = {"True": True, "False": False}.__getitem__ if values.dtype.kind == "b" else None
        read = read or (int if values.dtype.kind in "iu" else float)

        def column(part, read=read, table=table):
            return [read(text) for text in table[part]]

        if values.dtype.kind == "c":
            part = values.real.dtype
            np.testing.assert_array_equal(np.array(column(f"{name}.re"), part), values.real)
            np.testing.assert_array_equal(np.array(column(f"{name}.im"), part), values.imag)
        else:
            np.testing.assert_array_equal(np.array(column(name), values.dtype), values)
    labels = [str(layer) for layer in data.layer.values for _ in range(2)]
    assert tables["array_i8"]["layer"] == labels * 7 * (runs or 1)
    assert tables["array_i8"]["mode"][:4] == ["0", "1", "0", "1"]
    about = json.loads((folder / "attributes.json").read_text(encoding="utf-8"))
    assert about["variables"]["a_b"]["attributes"]["nested"] == ODD["nested"]


def test_a_long_table_leaves_out_steps_without_an_array(tmp_path):
    values = np.full((5, 3), np.nan)
    values[3] = [1, np.nan, 2]
    data = xr.Dataset({"a_b": (("step", "mode"), values)}, {"step": range(5)})
    text = (nt.export(data, tmp_path / "x", "csv") / "a_b.csv").read_text()
    assert text.splitlines() == ["step,mode,a_b", "3,0,1.0", "3,1,NaN", "3,2,2.0"]


def test_one_csv_table_is_for_numbers(tmp_path):
    data = everything()
    with pytest.raises(ValueError, match=r"cannot hold arrays.*array_f4.*without \.csv"):
        nt.export(data, tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []
    nt.export(data[["number_f8", "number_f4"]], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"step", "epoch", "wall_time", "number_f8", "number_f4"}
    for name in ("number_f8", "number_f4"):
        found = np.array([float(row[name]) for row in rows], data[name].dtype)
        np.testing.assert_array_equal(found, data[name])


@given(
    values=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.complex64, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=3),
    ),
    attributes=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "name"),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
        max_size=3,
    ),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_any_array_with_any_attributes_comes_back(tmp_path_factory, suffix, values, attributes):
    dims = ("step", *(f"d{i}" for i in range(values.ndim - 1)))
    data = xr.Dataset({"a_b": (dims, values, {"name": "a/b", **attributes})}, attrs=attributes)
    file = nt.export(data, tmp_path_factory.mktemp("export") / f"x{suffix}")
    found = nt.open(file)
    same(found, data)
    assert found.a_b.attrs == data.a_b.attrs
    assert found.attrs == data.attrs


@pytest.fixture
def trace(tmp_path):
    writer = TraceWriter(tmp_path / "trace", "one")
    for step in range(4):
        numbers = [nt.Record("a/number", step, np.asarray(step / 3))]
        numbers += [nt.Record("a/kernel", step, np.ones((2, 2)) * step, dims=("i", "j"))]
        numbers += [nt.Record("a/never", step, np.asarray(np.nan), missing="no")]
        writer.write(numbers, {"epoch": step // 2})
    return tmp_path / "trace"


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_trace_comes_back_as_it_is_opened(tmp_path, suffix, runs):
    torch.manual_seed(0)
    folders = [tmp_path / f"seed {i}" for i in range(runs)]
    for folder in folders:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        probes = {"train": torch.randn(5, 3), "validation": torch.randn(4, 3)}
        probe = {name: nt.Probe(x, torch.arange(len(x)) % 2) for name, x in probes.items()}
        tracer = nt.Tracer(probe, ["ntk", "fisher", "loss"], to=folder)
        for step in range(3):
            tracer(model, step, epoch=step / 2)
    data = nt.open(folders if runs > 1 else folders[0])
    file = nt.export(folders if runs > 1 else folders[0], tmp_path / f"x{suffix}")
    same(nt.open(file), data)
    some = nt.open(file, names=["ntk/gram", "loss"])
    assert set(some) == {n for n in data if n.startswith(("ntk_gram", "loss_"))}
    with pytest.raises(KeyError, match="there is no 'ntk/grm'"):
        nt.open(file, names="ntk/grm")


@pytest.mark.parametrize("name", ["x.nc", "x.zarr", "x.parquet", "folder"])
def test_what_is_there_is_replaced_when_that_is_said_and_whole_at_any_time(
    trace, tmp_path, name, monkeypatch
):
    format = "csv" if name == "folder" else None
    to = nt.export(trace, tmp_path / "new" / name, format)
    before = {p: p.read_bytes() for p in [to, *to.rglob("*")] if p.is_file()}
    with pytest.raises(FileExistsError, match="is there already"):
        nt.export(trace, to, format)
    for broken in (
        "datasets.write_netcdf",
        "datasets.write_zarr",
        "tables._write_csv",
        "tables._column",
    ):

        def fails(*arguments, **options):
            raise OSError("disk full")

        monkeypatch.setattr(f"nettrace.exports.{broken}", fails)
    with pytest.raises(OSError, match="disk full"):
        nt.export(trace, to, format, overwrite=True)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in [to, *to.rglob("*")] if p.is_file()} == before
    nt.export(nt.open(trace).isel(step=slice(2)), to, format, overwrite=True)
    assert list(to.parent.iterdir()) == [to]
    after = {p: p.read_bytes() for p in [to, *to.rglob("*")] if p.is_file()}
    assert after != before


@pytest.mark.parametrize("format", ["zarr", "csv", "netcdf"])
def test_a_folder_that_is_no_export_is_never_replaced(trace, format):
    before = sorted(trace.iterdir())
    with pytest.raises(FileExistsError, match="no earlier export"):
        nt.export(trace, trace, format, overwrite=True)
    assert sorted(trace.iterdir()) == before


@pytest.mark.parametrize("format", ["netcdf", "parquet"])
def test_a_file_that_is_no_export_is_never_replaced(trace, format):
    (part,) = trace.glob("part-*")
    before = part.read_bytes()
    with pytest.raises(FileExistsError, match="no earlier export"):
        nt.export(trace, part, format, overwrite=True)
    assert part.read_bytes() == before


def test_netcdf_is_not_begun_on_a_disk_without_room(trace, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=2**20)  # HDF5 crashes the process where the disk is full
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="1,048,576 are free"):
        nt.export(trace, tmp_path / "out" / "x.nc")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to", ["x", "x.txt"])
def test_formats_that_are_not_known_are_named(trace, tmp_path, to):
    with pytest.raises(ValueError, match=r"netcdf, zarr, csv, parquet.*\.nc"):
        nt.export(trace, tmp_path / to)
    with pytest.raises(ValueError, match=r"expected one of the formats.*'hdf'"):
        nt.export(trace, tmp_path / to, "hdf")


def test_a_package_that_is_missing_is_named(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"parquet needs pyarrow: pip install 'nettrace\[export\]'"
    ):
        nt.export(trace, tmp_path / "x.parquet")


KILLED = """
import sys, xarray as xr, numpy as np, nettrace as nt
data = xr.Dataset({"a_b": (("step", "i"), np.random.default_rng(0).random((400, 20000)))})
print("begins", flush=True)
nt.export(data, sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["netcdf", "zarr", "csv", "parquet"])
def test_a_kill_leaves_nothing_under_the_name(tmp_path, format):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x"), format]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        while process.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    assert all(p.name.startswith(".x.") for p in tmp_path.iterdir())


LARGE = """
import resource, sys, numpy as np, xarray as xr, nettrace as nt
from xarray.backends.common import BackendArray
from xarray.core import indexing

class Kernels(BackendArray):  # 2 GB that are nowhere
    shape, dtype = (500, 1000, 1000), np.dtype("float32")
    def __getitem__(self, key):
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self.get)
    def get(self, key):
        steps = np.arange(500, dtype="float32")[key[0]]
        whole = np.broadcast_to(np.asarray(steps)[..., None, None], (*np.shape(steps), 1000, 1000))
        return whole[(..., *key[1:])].copy()

lazy = indexing.LazilyIndexedArray(Kernels())
data = xr.Dataset({"ntk_gram": (("step", "i", "j"), lazy)}, {"step": range(500)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nt.export(data, sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
print(float(nt.open(sys.argv[1]).ntk_gram[499, 3, 4]) if sys.argv[1][-1] != "t" else 499)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nc", ".zarr", ".parquet"])
def test_memory_is_that_of_a_few_blocks(tmp_path, suffix):
    command = [sys.executable, "-c", LARGE, str(tmp_path / f"x{suffix}")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    megabytes, last = map(float, done.stdout.split())
    assert megabytes < 400, megabytes
    assert last == 499
