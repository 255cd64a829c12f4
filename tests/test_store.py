"""The trace: what is written is read, labelled; damage costs what is damaged, and no more."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nettrace as nt
from nettrace.store import DamagedTraceError, TraceWriter, format_2, parts


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


@pytest.mark.parametrize("size", [1, 1000])
def test_steps_may_be_written_in_any_order(size, tmp_path):
    writer = TraceWriter(tmp_path, "one", start=None)
    for step in (5, -3, 9, 0):
        writer.write([record("a/b", step, np.full(size, float(step)))], {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [-3, 0, 5, 9]
    assert data.a_b.values.tolist() == [[step] * size for step in (-3.0, 0.0, 5.0, 9.0)]


def test_a_part_without_a_probe_goes_with_any(tmp_path):
    for probe in ({"probe": "one"}, {}):
        TraceWriter(tmp_path, "attempt", **probe).write([record(f"a/{len(probe)}", 0, 1.0)], {})
    data = nt.open(tmp_path)
    assert {"a_1", "a_0"} <= set(data)
    assert data.attrs["probe"] == "one"


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


def test_a_trace_in_the_first_format_is_read(tmp_path):
    data = nt.open(Path(__file__).parent / "data" / "format-1")
    assert data.step.values.tolist() == data.a_count.values.tolist() == [0, 1, 2, 3, 4]
    assert data.epoch.values.tolist() == [0, 0, 1, 1, 2]
    assert data.epoch.dtype == data.a_count.dtype == np.int64
    np.testing.assert_array_equal(data.a_number, np.arange(5) + 0.5)
    np.testing.assert_array_equal(data.a_number_standard_error, [0.25] * 5)
    np.testing.assert_array_equal(data.a_complex, np.arange(5) * 1j)
    assert data.a_flag.values.tolist() == [True, False, True, False, True]
    expected = np.where(np.tri(5, dtype=bool), np.arange(5), np.nan)
    np.testing.assert_array_equal(data.b_ragged, expected)
    assert data.b_ragged.dtype == np.float32
    assert data.b_layers.sel(layer="b").values.tolist() == [0, -1, -2, -3, -4]
    assert json.loads(data.b_missing.attrs["missing"]) == {"2": "ValueError: no"}
    assert data.a_number.attrs["convention"] == "mean"
    assert (data.attrs["probe"], data.attrs["python"]) == ("feed", "3.11.7")


def test_a_trace_goes_on_in_the_format_of_today(tmp_path):
    shutil.copytree(Path(__file__).parent / "data" / "format-1", tmp_path, dirs_exist_ok=True)
    writer = TraceWriter(tmp_path, "third", probe="feed")
    for step in (4, 5):
        writer.write([record("a/number", step, -1.0)], {})
    assert nt.open(tmp_path).a_number.values.tolist() == [0.5, 1.5, 2.5, 3.5, -1, -1]


def test_superseded_records_can_be_had(tmp_path):
    for attempt, steps in [("one", range(6)), ("two", range(3, 8)), ("three", range(5, 7))]:
        writer = TraceWriter(tmp_path, attempt)
        for step in steps:
            writer.write([record("a/b", step, len(attempt) + step / 10)], {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == list(range(7))
    np.testing.assert_allclose(data.a_b, [3, 3.1, 3.2, 3.3, 3.4, 5.5, 5.6])
    one = nt.open(tmp_path, attempt=0)
    np.testing.assert_allclose(one.a_b, [3, 3.1, 3.2, 3.3, 3.4, 3.5])
    assert nt.open(tmp_path, attempt=-2).step.values.tolist() == [3, 4, 5, 6, 7]
    told = json.loads(data.attrs["attempts"])
    assert [(a["start"], a["records"]) for a in told] == [(0, 6), (3, 5), (5, 2)]
    with pytest.raises(IndexError, match="no attempt 3: the trace has 3"):
        nt.open(tmp_path, attempt=3)


def test_a_tracer_that_starts_again_supersedes_what_it_wrote(tmp_path):
    model, probe = torch.nn.Linear(3, 2), nt.Probe(torch.randn(4, 3))
    for steps in ([0, 5, 10], [0, 5]):  # a loop run twice in one notebook
        tracers = [nt.Tracer(probe, name, to=tmp_path) for name in ("ntk/trace", "ntk/entropy")]
        for step in steps:
            for tracer in tracers:
                tracer(model, step)
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 5]
    assert np.isfinite(data.ntk_trace).all()
    assert np.isfinite(data.ntk_entropy).all()
    assert nt.open(tmp_path, attempt=0).step.values.tolist() == [0, 5, 10]


def test_what_complements_supersedes_nothing(tmp_path):
    TraceWriter(tmp_path, "run").write([record("a/x", 3, 1)], {"epoch": 1})
    writer = TraceWriter(tmp_path, "later", start=None)
    writer.write([record("a/y", 5, 2)], {})
    writer.write([record("a/y", 3, 4)], {})
    data = nt.open(tmp_path)
    np.testing.assert_array_equal(data.a_x, [1, np.nan])
    np.testing.assert_array_equal(data.a_y, [4, 2])
    TraceWriter(tmp_path, "again", start=None).write([record("a/y", 3, 9)], {})
    np.testing.assert_array_equal(nt.open(tmp_path).a_y, [9, 2])


def test_of_several_ranks_the_lowest_is_read(tmp_path):
    for rank in (1, 0, 2):
        writer = TraceWriter(tmp_path, "run", rank=rank)
        writer.write([record("a/x", 0, rank), record(f"a/only{rank}", 0, rank)], {})
    data = nt.open(tmp_path)
    assert data.a_x.values.tolist() == [0]
    assert data.a_only2.values.tolist() == [2]


def test_full_parts_are_sealed_and_others_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("nettrace.store.writer.FULL", 5000)
    writer = TraceWriter(tmp_path)
    arrays = np.random.default_rng(0).normal(size=(40, 100))
    for step, array in enumerate(arrays):
        writer.write([record("a/b", step, array, dims=("mode",))], {})
        writer.sync()
    found = parts(tmp_path)
    assert len(found) > 4
    assert len({part.attempt for part in found}) == 1
    assert all(part.path.read_bytes().endswith(b"}") for part in found[:-1])
    np.testing.assert_array_equal(nt.open(tmp_path).a_b, arrays)


def test_labels_place_values_where_steps_and_runs_differ_in_them(tmp_path):
    def write(folder, *rows):
        writer = TraceWriter(folder)
        for step, values in enumerate(rows):
            labels = {"layer": list(values)}
            array = np.array([*values.values()], float)
            writer.write([record("a/b", step, array, dims=("layer",), coordinates=labels)], {})

    write(tmp_path / "one" / "trace", {"w": 1, "b": 2}, {"b": 3, "head": 4})
    write(tmp_path / "two" / "trace", {"head": 5})
    data = nt.open([tmp_path / "one" / "trace", tmp_path / "two" / "trace"])
    assert data.a_b.dims == ("run", "step", "layer")
    assert data.run.values.tolist() == ["one", "two"]
    assert data.layer.values.tolist() == ["w", "b", "head"]
    nan = np.nan
    expected = [[[1, 2, nan], [nan, 3, 4]], [[nan, nan, 5], [nan] * 3]]
    np.testing.assert_array_equal(data.a_b, expected)
    np.testing.assert_array_equal(nt.open(str(tmp_path / "*" / "trace")).a_b, expected)
    alone = nt.open(tmp_path / "one" / "trace")
    np.testing.assert_array_equal(alone.a_b, expected[0])


def test_several_runs_are_aligned_along_their_steps(tmp_path):
    for seed, steps in enumerate([[0, 1, 2], [1, 3]]):
        writer = TraceWriter(tmp_path / f"seed{seed}", probe="same", seed=seed)
        for step in steps:
            missing = "ValueError: no" if step == 1 and seed == 1 else None
            rows = [record("a/count", step, 10 * seed + step, attributes={"convention": "mean"})]
            rows.append(record("a/other", step, 1.0, missing=missing))
            writer.write(rows, {"epoch": step})
    data = nt.open([tmp_path / "seed0", tmp_path / "seed1"])
    nan = np.nan
    np.testing.assert_array_equal(data.a_count, [[0, 1, 2, nan], [nan, 11, nan, 13]])
    np.testing.assert_array_equal(data.epoch, [[0, 1, 2, nan], [nan, 1, nan, 3]])
    assert data.a_count.attrs["convention"] == "mean"
    assert json.loads(data.a_other.attrs["missing"]) == {"seed1": {"1": "ValueError: no"}}
    assert data.attrs["probe"] == "same"
    assert json.loads(data.attrs["seed"]) == {"seed0": 0, "seed1": 1}
    with pytest.raises(ValueError, match="one twice"):
        nt.open([tmp_path / "seed0", tmp_path / "seed0"])
    with pytest.raises(FileNotFoundError, match=r"there are some in .*seed0"):
        nt.open(tmp_path)


def test_names_choose_quantities_and_their_steps(tmp_path):
    writer = TraceWriter(tmp_path)
    for step in range(10):
        rows = [record("a/b", step, step), record("a/c", step, step, standard_error=np.array(0.5))]
        if step % 5 == 0:
            rows.append(record("big/kernel", step, np.full((2, 2), step), dims=("x", "y")))
        writer.write(rows, {})
    data = nt.open(tmp_path, ["big"])
    assert list(data) == ["big_kernel"]
    assert data.step.values.tolist() == [0, 5]
    assert data.big_kernel.dtype == np.int64  # nothing is padded
    assert set(nt.open(tmp_path, "a/c")) == {"a_c", "a_c_standard_error"}
    with pytest.raises(KeyError, match=r"no 'a/d'.*a/b"):
        nt.open(tmp_path, "a/d")


def test_arrays_are_read_when_they_are_asked_for(tmp_path):
    writer = TraceWriter(tmp_path)
    arrays = np.random.default_rng(0).normal(size=(6, 100, 100))
    for step, array in enumerate(arrays):
        rows = [record("a/kernel", step, array, dims=("x", "y")), record("a/b", step, step)]
        writer.write(rows, {})
    data = nt.open(tmp_path)
    (part,) = tmp_path.iterdir()
    broken = bytearray(part.read_bytes())
    broken[-200] ^= 1  # in the last kernel
    part.write_bytes(bytes(broken))
    np.testing.assert_array_equal(data.a_kernel[:5], arrays[:5])
    np.testing.assert_array_equal(data.a_b, range(6))
    with pytest.raises(DamagedTraceError, match=r"part-00000.*does not match"):
        data.a_kernel.load()
    np.testing.assert_array_equal(data.a_kernel[4:0:-2, 3, ::7], arrays[4:0:-2, 3, ::7])


def test_reasons_that_go_on_are_said_once(tmp_path):
    writer = TraceWriter(tmp_path)
    for step in range(0, 100, 10):
        why = "no" if step in (0, 30, 40, 50) else "other" if step == 60 else None
        writer.write([record("a/b", step, 1.0, missing=why)], {})
    told = json.loads(nt.open(tmp_path).a_b.attrs["missing"])
    assert told == {"0": "no", "30..50": "no", "60": "other"}


def test_names_that_differ_in_slashes_alone_are_kept_apart(tmp_path):
    TraceWriter(tmp_path).write([record("a/b_c", 0, 1), record("a_b/c", 0, 2)], {})
    data = nt.open(tmp_path)
    assert {v.attrs["name"]: int(v[0]) for v in data.values()} == {"a/b_c": 1, "a_b/c": 2}


def test_types_that_no_trace_takes_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a/b is of type object"):
        TraceWriter(tmp_path).write([record("a/b", 0, np.array("x", object))], {})


def test_where_a_trace_comes_from_is_kept(tmp_path):
    model, probe = torch.nn.Linear(3, 2), nt.Probe(torch.randn(4, 3))
    nt.Tracer(probe, "ntk/trace", every=5, seed=3, to=tmp_path)(model, 0)
    found = nt.open(tmp_path).attrs
    assert found["model"] == "torch.nn.modules.linear.Linear"
    assert (found["parameters"], found["dtype"], found["device"]) == (8, "float32", "cpu")
    assert found["nettrace"] == nt.__version__
    assert found["torch_seed"] == str(torch.initial_seed())
    assert json.loads(found["configuration"])["seed"] == 3


def test_a_part_that_grew_is_read_on_from_where_it_ended(tmp_path, monkeypatch):
    kept = {}
    writer = TraceWriter(tmp_path, "one")
    read = []
    scan = format_2.scan
    monkeypatch.setattr(format_2, "scan", lambda *a: (read.append(f.at) or f for f in scan(*a)))
    for step in range(4):
        writer.write([record("a/b", step, [step] * (1 + step // 2))], {"epoch": step})
        before = len(read)
        (part,) = parts(tmp_path, kept)
        (anew,) = parts(tmp_path)
        assert part.steps.tolist() == anew.steps.tolist() == list(range(step + 1))
        assert part.at.tolist() == anew.at.tolist()
        assert part.layout.tolist() == anew.layout.tolist()
        assert part.coordinates["epoch"].tolist() == anew.coordinates["epoch"].tolist()
        assert min(read[before:]) < part.at[-1] if step == 0 else read[before] > part.at[-2]
    before = len(read)
    assert parts(tmp_path, kept)[0].steps.tolist() == [0, 1, 2, 3]
    assert len(read) == before


def test_what_was_kept_of_a_part_is_not_believed_of_another(tmp_path):
    kept = {}
    TraceWriter(tmp_path / "x", "one").write([record("a/b", 1, 1.0)], {})
    TraceWriter(tmp_path / "y", "two").write([record("a/b", 2, [2.0] * 9)], {})
    (path,) = (tmp_path / "x").iterdir()
    assert parts(tmp_path / "x", kept)[0].steps.tolist() == [1]
    shutil.copy(next((tmp_path / "y").iterdir()), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    assert parts(tmp_path / "x", kept)[0].steps.tolist() == [2]
    os.truncate(path, path.stat().st_size - 1)
    assert len(parts(tmp_path / "x", kept)[0].steps) == 0
