"""What ends a run, a disk or a file badly costs no more than itself, and never goes unnoticed."""

import copy
import errno
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from store_writer import names, records, value

import nettrace as nt
from nettrace.store import DamagedTraceError, TraceWriter, parts, writer
from nettrace.store.frames import MAGIC, encode, scan

FORMAT_1 = Path(__file__).parent / "data" / "format-1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(writer, "of_process", dict)  # git is slow


@pytest.fixture(scope="module")
def runs():
    script = Path(__file__).parent / "store_writer.py"
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(nt.__file__).parents[1])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


def look(data, steps, run_of):
    """Checks the values at some steps, of which runs are known."""
    found = data.isel(step=np.flatnonzero(np.isin(data.step, list(steps)))).load()
    for step in found.step.values.tolist():
        here = found.sel(step=step)
        run = run_of(step, here)
        for name in names(step):
            expected = value(name, run, step)
            there = here[name.replace("/", "_")].values
            there = there[: len(expected)] if name == "b/ragged" else there
            np.testing.assert_array_equal(there, expected, f"{name} at step {step}")


def kill(runs, folder, kills, seed, full):
    """Kills runs at random instants while they are read, each begun from a random earlier step."""
    chance = random.Random(seed)
    known: dict[int, int] = {}  # what a trace should hold: the run that recorded each step
    attempts: list[list[int]] = []
    for run in range(kills):
        start = chance.choice([0, *known, *known]) if known else 0
        ack = folder.parent / f"ack-{folder.name}-{run}"
        runs.stdin.write(f"{folder} {ack} {start} {run} {full}\n")
        runs.stdin.flush()
        pid = int(runs.stdout.readline())
        end = threading.Timer(chance.uniform(0.003, 0.15), os.kill, (pid, signal.SIGKILL))
        end.start()
        while end.is_alive():
            told = ack.read_text().split() if ack.exists() else []
            if list(folder.glob("part*")):
                data = nt.open(folder)
                assert {int(s) for s in told} <= set(data.step.values.tolist())
                if "a_scalar" in data:  # else nothing is written yet
                    some = chance.sample(data.step.values.tolist(), min(4, data.sizes["step"]))
                    last = data.step.values[-1:].tolist()
                    look(data, [*some, *last], lambda step, here: int(here.a_scalar - step / 1024))
        assert runs.stdout.readline() == "ended\n"
        told = [int(s) for s in ack.read_text().split()] if ack.exists() else []
        mine = [part for part in parts(folder) if part.attempt == f"attempt {run}"]
        there = [step for part in mine for step in part.steps.tolist()]
        assert there == list(range(start, start + len(there)))
        assert there[: len(told)] == told  # all that was committed
        assert len(there) <= len(told) + 1  # and what was written at that instant
        if there:
            known = {s: r for s, r in known.items() if s < start} | dict.fromkeys(there, run)
            attempts.append(there)
    data = nt.open(folder)
    assert data.step.values.tolist() == sorted(known)
    look(data, known, lambda step, here: known[step])
    for number, steps in enumerate(attempts):
        assert nt.open(folder, attempt=number).step.values.tolist() == steps
    return len(attempts)


@pytest.mark.parametrize("full", [2**26, 300_000])
def test_kills_lose_nothing_that_was_committed(runs, tmp_path, full):
    assert kill(runs, tmp_path / "trace", 8, full, full) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_two_hundred_kills_lose_nothing_that_was_committed(runs, tmp_path, seed):
    assert kill(runs, tmp_path / "trace", 20, seed, [2**26, 300_000][seed % 2]) >= 10


def damage(data, chance):
    """A damaged copy, and whether it is a tail that is cut off, which need not be told."""
    data = bytearray(data)
    place = chance.randrange(len(data))
    size = chance.choice([1, 4, 64, 512, 4096])
    kind = chance.choice(["cut", "flip", "flip", "bytes", "zeros", "twice", "less", "append"])
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "bytes":
        data[place : place + size] = chance.randbytes(len(data[place : place + size]))
    elif kind == "zeros":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "twice":
        data[place:place] = data[max(0, place - size) : place]
    elif kind == "less":
        del data[place : place + size]
    else:
        data += chance.choice([bytes(size), chance.randbytes(size), data[:size], data[-size:]])
    return bytes(data), kind


def examine(folder, expected, silent):
    """Checks that what is left is a prefix of the right values, or that the damage is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = nt.open(folder)
    for warning in told:
        assert "part-" in str(warning.message)
    steps = data.step.values.tolist()
    assert steps == expected.step.values.tolist()[: len(steps)]
    failed = 0
    for name in data:
        for place in range(len(steps)):
            try:
                found = data[name][place].values
            except DamagedTraceError as error:
                failed += "part-" in str(error)
                continue
            right = expected[name][place].values
            for axis, length in enumerate(found.shape):  # shorter where longer ones are not there
                assert np.isnan(np.take(right, range(length, right.shape[axis]), axis)).all()
                right = np.take(right, range(length), axis)
            np.testing.assert_array_equal(found, right)
    assert told or failed or silent or len(steps) == expected.sizes["step"]
    return len(steps), failed


def batter(folder, source, number, seed, tail=0):
    chance = random.Random(seed)
    shutil.copytree(source, folder)
    last = sorted(folder.glob("part-*"))[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = nt.open(source).load()
    whole = last.read_bytes()
    seen = set()
    for _ in range(number):
        broken, kind = damage(whole, chance)
        last.write_bytes(broken)
        try:
            cut = kind == "cut" or (kind == "less" and len(broken) < len(whole))
            there = len(nt_steps(folder))
            seen.add(examine(folder, expected, cut or there >= expected.sizes["step"] - tail))
        except Exception as error:
            error.add_note(f"after damage of kind {kind}")
            raise
    return seen


def nt_steps(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nt.open(folder).step


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    its = TraceWriter(folder, probe="same")
    for step in range(6):
        its.write([r for r in records(1, step) if r.name != "b/large"], {"epoch": step})
    return folder


def test_damage_leaves_a_prefix_or_is_told(tmp_path, source):
    seen = batter(tmp_path / "trace", source, 60, 0)
    assert len({steps for steps, _ in seen}) > 4
    assert any(failed for _, failed in seen)


def test_damage_to_the_first_format_leaves_a_prefix_or_is_told(tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(FORMAT_1 / "part-00000.ntl", single)
    # Its lengths have no checks of their own: a last row cannot be told from one that is cut off.
    assert len(batter(tmp_path / "trace", single, 60, 0, tail=1)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_five_hundred_damages_leave_a_prefix_or_are_told(tmp_path, source, seed):
    batter(tmp_path / "trace", source, 100, seed)
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(FORMAT_1 / "part-00000.ntl", single)
    batter(tmp_path / "old", single, 100, seed, tail=1)


@pytest.mark.parametrize("fault", ["cut", "gone", "appended"])
def test_a_loss_from_a_part_that_was_complete_is_told(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(writer, "FULL", 20_000)
    its = TraceWriter(tmp_path)
    for step in range(9):
        its.write(records(1, step)[:3], {})
    first, *_ = found = sorted(tmp_path.iterdir())
    assert len(found) > 2
    if fault == "cut":
        os.truncate(first, parts(tmp_path)[0].at[1])
    elif fault == "gone":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes() + found[1].read_bytes())
    with pytest.warns(UserWarning, match="part-00000"):
        nt.open(tmp_path)


def test_layouts_that_were_copied_are_not_believed(tmp_path):
    its = TraceWriter(tmp_path)
    for step, order in enumerate(["xy", "yx", "xy", "yx"]):
        its.write([nt.Record(f"a/{n}", step, np.array("xy".index(n))) for n in order], {})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    # A head comes after its kind and 20 bytes; here, nothing else comes between frames.
    cuts = [frame.at - 21 for frame in scan(path)] + [len(whole)]
    for begin, end in combinations(cuts, 2):
        for place in cuts:
            path.write_bytes(whole[:place] + whole[begin:end] + whole[place:])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = nt.open(tmp_path)
            if data.sizes["step"]:
                assert (data.a_x == 0).all()
                assert (data.a_y == 1).all()
                assert data.step.values.tolist() == list(range(data.sizes["step"]))


class Disk:
    """Fails at a chosen call, once or from then on."""

    def __init__(self, monkeypatch, call, code, at, partly=None, times=1):
        self.calls, self.at, self.times = 0, at, times
        real = getattr(os, call)

        def failing(file, *arguments):
            self.calls += 1
            if self.at <= self.calls < self.at + self.times:
                if partly is not None:
                    real(file, arguments[0][:partly])
                raise OSError(code, os.strerror(code))
            return real(file, *arguments)

        monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("partly", [None, 3, 50, 600])
@pytest.mark.parametrize("times", [1, 3])
def test_a_full_disk_costs_the_steps_that_it_refused(tmp_path, monkeypatch, at, partly, times):
    its = TraceWriter(tmp_path)
    Disk(monkeypatch, "write", errno.ENOSPC, at, partly, times)
    kept, refused = [], []
    for step in range(8):
        try:
            its.write(records(2, step), {})
            kept.append(step)
        except OSError as error:
            refused.append(error.errno)
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == kept
    assert refused == [errno.ENOSPC] * times
    assert len(kept) == 8 - times
    look(data, kept, lambda step, here: 2)
    assert len(list(tmp_path.iterdir())) <= 2  # nothing is left of what came to nothing


def test_fsync_that_fails_is_told_and_tried_again(tmp_path, monkeypatch):
    its = TraceWriter(tmp_path)
    its.write(records(0, 0), {})
    disk = Disk(monkeypatch, "fsync", errno.EIO, 1)
    with pytest.raises(OSError, match="Input/output"):
        its.sync()
    its.write(records(0, 1), {})
    its.close()
    its.sync()  # what is closed, too
    assert disk.calls == 3
    its.sync()  # nothing is left to do
    assert disk.calls == 3
    assert nt.open(tmp_path).step.values.tolist() == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        [nt.Record("a/x", 1, np.array("text"))],
        [nt.Record("a/x", 1, np.array(1), attributes={("a", "key"): 1})],
        [nt.Record("a/new", 1, np.zeros((1,) * 31), dims=tuple(f"d{i}" for i in range(31)))],
        [nt.Record("a/new", "one", np.array(1))],
    ],
)
def test_a_record_that_cannot_be_written_costs_itself(tmp_path, wrong):
    its = TraceWriter(tmp_path)
    its.write([nt.Record("a/x", 0, np.array(0.0))], {})
    with pytest.raises((TypeError, ValueError)):
        its.write(wrong, {})
    with pytest.raises(ValueError):
        its.write([nt.Record("a/new", 1, np.array(0.0))], {"epoch": "first"})
    its.write([nt.Record("a/new", 2, np.array(2.0))], {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 2]
    assert data.a_new[1] == 2


@pytest.mark.parametrize(
    ("dims", "labels"), [((), {}), (("a", "a"), {"a": "xy"}), (("a", "b"), {"a": "x", "c": "y"})]
)
def test_axes_that_do_not_fit_lose_their_names_and_no_values(tmp_path, dims, labels):
    its = TraceWriter(tmp_path)
    its.write([nt.Record("a/x", 0, np.arange(6).reshape(2, 3), dims=dims, coordinates=labels)], {})
    its.write([nt.Record("a/y", 1, np.zeros((0, 2**17)), dims=("none", "long"))], {})
    data = nt.open(tmp_path)
    np.testing.assert_array_equal(data.a_x[0], np.arange(6).reshape(2, 3))
    assert data.a_y.shape == (2, 0, 2**17)


def test_an_interrupt_amid_a_write_costs_that_step(tmp_path, monkeypatch):
    its = TraceWriter(tmp_path)
    its.write(records(0, 0), {})
    real = os.write

    def interrupted(file, data):
        real(file, data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        its.write(records(0, 1), {})
    monkeypatch.setattr(os, "write", real)
    its.write(records(0, 2), {})
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 2]
    look(data, [0, 2], lambda step, here: 0)


def test_an_attempt_that_wrote_nothing_supersedes_nothing(tmp_path):
    its = TraceWriter(tmp_path, "one")
    for step in range(5):
        its.write(records(0, step), {})
    TraceWriter(tmp_path, "two").write(records(1, 2), {})
    second = tmp_path / "part-00001.ntl"
    os.truncate(second, second.stat().st_size - 1)
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == [0, 1, 2, 3, 4]
    look(data, range(5), lambda step, here: 0)


def test_a_folder_that_is_removed_comes_back_unless_all_above_it_is_gone(tmp_path):
    folder = tmp_path / "disk" / "trace"
    its = TraceWriter(folder)
    its.write(records(0, 0), {})
    shutil.rmtree(folder)
    its.write(records(0, 1), {})
    assert nt.open(folder).step.values.tolist() == [1]
    shutil.rmtree(folder.parent)
    with pytest.raises(FileNotFoundError):
        its.write(records(0, 2), {})
    folder.parent.mkdir()
    its.write(records(0, 3), {})
    assert nt.open(folder).step.values.tolist() == [3]


def test_an_attempt_that_was_killed_at_once_is_none(tmp_path):
    for attempt in "abc":
        with closing(TraceWriter(tmp_path, attempt)) as its:
            its.write(records(0, 5), {})
    killed = sorted(tmp_path.iterdir())[1]
    killed.write_bytes(killed.read_bytes()[:400])  # in its first write, after the header
    assert [len(part.steps) for part in parts(tmp_path)] == [1, 0, 1]
    assert len(json.loads(nt.open(tmp_path).attrs["attempts"])) == 2
    assert nt.open(tmp_path, attempt=1).step.values.tolist() == [5]
    with pytest.raises(IndexError, match="the trace has 2"):
        nt.open(tmp_path, attempt=2)


def test_threads_may_share_a_writer(tmp_path):
    its = TraceWriter(tmp_path, "one")

    def write(name):
        for step in range(200):
            its.write([nt.Record(name, step, np.full(3, step))], {})

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a/x", "a/y", "a/z")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = nt.open(tmp_path)
    for name in ("a_x", "a_y", "a_z"):
        np.testing.assert_array_equal(data[name][:, 0], np.arange(200))


def test_a_run_may_go_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "FULL", 1)
    its = TraceWriter("trace")
    its.write(records(0, 0), {})
    monkeypatch.chdir(tmp_path / "out")
    its.write(records(0, 1), {})
    assert nt.open(tmp_path / "trace").step.values.tolist() == [0, 1]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_writer_write_parts_of_their_own(tmp_path, how):
    its = TraceWriter(tmp_path, "run")
    its.write(records(0, 0), {})
    other = how(its)
    other.write(records(0, 1), {})
    del other  # which must not close the file of the first
    its.write(records(0, 2), {})
    assert len(parts(tmp_path)) == 2
    look(nt.open(tmp_path), [0, 1, 2], lambda step, here: 0)
    assert nt.open(tmp_path).sizes["step"] == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_write_at_once_though_one_was_forked_from_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "FULL", 50_000)
    its = TraceWriter(tmp_path, "run")
    its.write(records(0, 0), {})
    child = os.fork()
    mine = range(1 + (child == 0), 60, 2)
    try:
        for step in mine:
            its.write(records(0, step), {})
    finally:
        if child == 0:
            os._exit(0)
    os.waitpid(child, 0)
    data = nt.open(tmp_path)
    assert data.step.values.tolist() == list(range(60))
    look(data, range(60), lambda step, here: 0)


def test_parts_that_are_just_begun_are_no_harm(tmp_path):
    TraceWriter(tmp_path).write(records(0, 0), {})
    whole = (tmp_path / "part-00000.ntl").read_bytes()
    for size in (0, 1, 8, 20, 27, 28, 60):
        (tmp_path / "part-00001.ntl").write_bytes(whole[:size])
        assert nt.open(tmp_path).step.values.tolist() == [0]
        TraceWriter(tmp_path, "next").write(records(0, 1), {})
        assert nt.open(tmp_path).step.values.tolist() == [0, 1]
        (tmp_path / "part-00002.ntl").unlink()


def test_a_part_that_goes_while_it_is_read_is_no_harm(tmp_path, monkeypatch):
    TraceWriter(tmp_path).write(records(0, 0), {})
    module = importlib.import_module("nettrace.store.parts")
    monkeypatch.setattr(module, "part_files", lambda folder: [*folder.iterdir(), folder / "gone"])
    assert len(parts(tmp_path)) == 1


def test_no_file_stays_open(tmp_path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc here")
    before = count()
    for number in range(30):
        its = TraceWriter(tmp_path / "trace")
        its.write(records(0, number), {})
        its.sync()
        data = nt.open(tmp_path / "trace")
        data.b_medium.load()
        (tmp_path / "trace" / "part-99999.ntl").write_bytes(b"none")
        with pytest.warns(UserWarning, match="no part of a trace"):
            nt.open(tmp_path / "trace")
        (tmp_path / "trace" / "part-99999.ntl").unlink()
    del its
    assert count() == before


def test_what_is_read_lazily_goes_where_data_sets_go(tmp_path):
    its = TraceWriter(tmp_path / "trace")
    for step in range(7):
        its.write(records(0, step), {"epoch": step})
    data = nt.open(tmp_path / "trace")
    loaded = data.load().copy()
    data = nt.open(tmp_path / "trace")
    assert pickle.loads(pickle.dumps(data)).identical(loaded)
    assert pickle.loads(pickle.dumps(data.isel(step=[4, 2]))).identical(loaded.isel(step=[4, 2]))
    assert copy.deepcopy(data).identical(loaded)
    assert data.copy(deep=True).identical(loaded)
    chunked = data.chunk({"step": 2})
    assert chunked.compute(scheduler="threads").identical(loaded)
    assert float(chunked.b_medium.mean().compute(scheduler="single-threaded")) == pytest.approx(
        float(loaded.b_medium.mean())
    )
    data.to_netcdf(tmp_path / "trace.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "trace.nc", engine="scipy") as back:
        np.testing.assert_array_equal(back.b_large, loaded.b_large)
    data.a_scalar[0] = 5  # which is the user's own
    assert data.a_scalar[0] == 5
    assert nt.open(tmp_path / "trace").a_scalar[0] == loaded.a_scalar[0]


def test_many_attempts_are_opened_in_no_time(tmp_path):
    TraceWriter(tmp_path, "0").write(records(0, 0)[:1], {})
    frames = [(f.kind, f.head) for f in scan(tmp_path / "part-00000.ntl")]
    for number in range(1, 600):
        head = frames[0][1].replace(b'"attempt":"0"', b'"attempt":"%d"' % number)
        whole = [(b"p", [head], []), *((kind, [head], []) for kind, head in frames[1:])]
        path = tmp_path / f"part-{number:05d}.ntl"
        path.write_bytes(MAGIC + encode(whole, len(MAGIC)))
    begin = time.process_time()
    assert nt.open(tmp_path).sizes["step"] == 1
    assert time.process_time() - begin < 3
