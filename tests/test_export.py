"""Exports: what other programs read from them is what the trace holds."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
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
        xr.testing.assert_identical(nt.open(tmp_path / f"x{suffix}")[name].isel(chosen), data[name].isel(chosen))
    nt.export(found, tmp_path / f"y{suffix}")  # what was read can be exported
    same(nt.open(tmp_path / f"y{suffix}"), data)
