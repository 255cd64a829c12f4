"""The trace: what is written is read, labelled; damage costs what is damaged, and no more."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nettrace as nt
from nettrace.store import TraceWriter


def record(name, step, value, **options):
    return nt.Record(name, step, np.asarray(value), **options)


def test_a_tracer_fills_it_with_labels_and_conventions(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    probe = nt.Probe(torch.randn(5, 3), torch.arange(5) % 2)
    tracer = nt.Tracer(probe, ["ntk", "fisher/trace_mc"], every=2, to=tmp_path)
    records = {}
    for step in range(5):
        for r in tracer(model, step, epoch=step // 2):
            records[r.name, step] = r
        data = nt.open(tmp_path)  # readable while it is written
        assert data.step.values.tolist() == list(range(0, step + 1, 2))
    assert data.sizes["step"] == 3
    assert data.epoch.values.tolist() == [0, 1, 2]
    assert (np.diff(data.wall_time) > 0).all()
    assert data.ntk_gram.dims == ("step", "sample", "output", "sample_2", "output_2")
    assert data.ntk_gram.dtype == np.float32
    assert data.layer.values.tolist() == [n for n, _ in model.named_parameters()]
    np.testing.assert_array_equal(data.ntk_spectrum[1], records["ntk/spectrum", 2].value)
    estimate = records["fisher/trace_mc", 4]
    assert data.fisher_trace_mc[2] == estimate.value
    assert data.fisher_trace_mc_standard_error[2] == estimate.standard_error > 0
    about = data.fisher_trace_mc.attrs
    assert about["name"] == "fisher/trace_mc"
    assert about["n_probes"] == 8
    assert "mean over samples" in about["convention"]
    assert about["mode"] == "eval"
    assert data.attrs["probe"] == probe.fingerprint()
    assert data.attrs["torch"] == torch.__version__


def test_a_resumed_attempt_supersedes_from_its_first_step(tmp_path):
    for attempt, steps in [("first", range(6)), ("second", range(3, 5))]:
        writer = TraceWriter(tmp_path, attempt)
        for step in steps:
            writer.write([record("a/b", step, len(attempt))], {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 1, 2, 3, 4]
    assert data.a_b.values.tolist() == [5, 5, 5, 6, 6]
    assert len(list(tmp_path.iterdir())) == 2  # nothing was rewritten


def test_writers_of_one_attempt_complement_each_other(tmp_path):
    for name in ("a/x", "a/y"):
        writer = TraceWriter(tmp_path, "same")
        for step in range(3):
            writer.write([record(name, step, step)], {})
    data = nt.open(tmp_path)
    assert data.a_x.values.tolist() == data.a_y.values.tolist() == [0, 1, 2]


def test_what_is_missing_is_nan_with_its_reason(tmp_path):
    writer = TraceWriter(tmp_path)
    writer.write([record("a/b", 0, [1.0, 2.0], dims=("mode",))], {})
    writer.write([record("a/b", 1, [], dims=("mode",), missing="ValueError: no")], {})
    writer.write([record("c/d", 2, 3)], {})
    data = nt.open(tmp_path)
    np.testing.assert_array_equal(data.a_b, [[1, 2], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(data.c_d, [np.nan, np.nan, 3])
    assert json.loads(data.a_b.attrs["missing"]) == {"1": "ValueError: no"}


def test_only_ever_missing_is_still_there(tmp_path):
    TraceWriter(tmp_path).write([record("a/b", 0, np.nan, missing="no")], {})
    assert np.isnan(nt.open(tmp_path).a_b.values).all()


def test_axes_of_one_name_and_different_length_are_kept_apart(tmp_path):
    rows = [record(n, 0, np.arange(k), dims=("mode",)) for n, k in [("a/x", 3), ("a/y", 4)]]
    TraceWriter(tmp_path).write(rows, {})
    data = nt.open(tmp_path)
    assert data.a_x.dims == ("step", "mode")
    assert data.a_y.dims == ("step", "mode_a_y")


VALUES = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.float64, np.int64, np.bool_, np.complex64]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
)


@given(values=st.lists(VALUES, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_array_comes_back(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("trace")
    records = [
        record(f"a/q{i}", 7, v, dims=tuple(f"d{i}{d}" for d in range(v.ndim)))
        for i, v in enumerate(values)
    ]
    TraceWriter(folder).write(records, {})
    data = nt.open(folder)
    for i, value in enumerate(values):
        found = data[f"a_q{i}"].values
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found[0], value)


def test_ragged_arrays_are_padded(tmp_path):
    writer = TraceWriter(tmp_path)
    for step in range(3):
        writer.write([record("a/b", step, np.arange(step + 1), dims=("mode",))], {})
    expected = [[0, np.nan, np.nan], [0, 1, np.nan], [0, 1, 2]]
    np.testing.assert_array_equal(nt.open(tmp_path).a_b, expected)


@pytest.mark.filterwarnings("ignore:.*damaged:UserWarning")
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damage_leaves_a_correct_prefix(tmp_path, damage):
    writer = TraceWriter(tmp_path)
    for step in range(5):
        writer.write([record("a/b", step, np.full(20, step), dims=("mode",))], {})
    (part,) = tmp_path.iterdir()
    whole = part.read_bytes()
    random = np.random.default_rng(0)
    seen = set()
    for place in random.integers(400, len(whole), 60):
        broken = bytearray(whole)
        if damage == "cut":
            del broken[place:]
        else:
            broken[place] ^= 1 << random.integers(8)
        part.write_bytes(bytes(broken))
        steps = nt.open(tmp_path).step.values.tolist() if len(broken) > 500 else []
        assert steps == list(range(len(steps)))
        seen.add(len(steps))
        for step in steps:
            assert (nt.open(tmp_path).a_b[step] == step).all()
    assert len(seen) > 2


def test_damage_in_the_middle_is_reported(tmp_path):
    writer = TraceWriter(tmp_path)
    for step in range(5):
        writer.write([record("a/b", step, step)], {})
    (part,) = tmp_path.iterdir()
    broken = bytearray(part.read_bytes())
    broken[-300] ^= 1
    part.write_bytes(bytes(broken))
    with pytest.warns(UserWarning, match="is damaged .* left out"):
        assert len(nt.open(tmp_path).step) < 5


def test_a_folder_takes_the_trace_of_one_probe(tmp_path):
    model, x = torch.nn.Linear(3, 2), torch.randn(6, 3)
    nt.Tracer(nt.Probe(x), "ntk/trace", to=tmp_path)(model, 0)
    nt.Tracer(nt.Probe(x), "ntk/entropy", to=tmp_path)(model, 0)  # of the same probe: added
    assert {"ntk_trace", "ntk_entropy"} <= set(nt.open(tmp_path))
    with pytest.raises(ValueError, match=r"another probe.*folder of its own"):
        nt.Tracer(nt.Probe(x[:3]), "ntk/trace", to=tmp_path)(model, 0)


def test_a_write_that_is_cut_short_costs_one_record(tmp_path, monkeypatch):
    writer = TraceWriter(tmp_path)
    writer.write([record("a/b", 0, 0)], {})
    whole = os.write

    def full(file, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "no space left on device")
        return whole(file, data[:30])

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="no space"):
        writer.write([record("a/b", 1, 1)], {})
    monkeypatch.undo()
    writer.write([record("a/b", 2, 2)], {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 2]
    assert data.a_b.values.tolist() == [0, 2]


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nettrace.store.writer.FORMAT", 99)
    TraceWriter(tmp_path).write([record("a/b", 0, 1)], {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format 99.*install a newer nettrace"):
        nt.open(tmp_path)
