"""Files that anybody could have made: read as a trace or refused with a clear error, in bounds."""

import json
import os
import struct
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nettrace as nt
from nettrace.store import TraceWriter, parts, writer
from nettrace.store.frames import MAGIC, encode

#: What `nettrace.open` may raise: DamagedTraceError is a ValueError.
DOCUMENTED = (FileNotFoundError, ValueError, OSError)
EMPTY = {"coordinates": {}, "axes": [], "arrays": [], "missing": {}, "missing_on": {}}
HEADER = {
    "format": 2,
    "attempt": "a",
    "start": 0,
    "rank": 0,
    "continues": None,
    "provenance": {},
}


def part(*frames, header=HEADER):
    whole = [(b"p", [text(header)], []), *((kind, [head], [body]) for kind, head, body in frames)]
    return MAGIC + encode(whole, len(MAGIC))


def text(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def old(*frames):
    """A part in the first format, with the right checksums."""
    found = b""
    for head, body in frames:
        head = text(head)
        whole = struct.pack("<I", len(head)) + head + body
        found += struct.pack("<II", len(whole), zlib.crc32(whole)) + whole
    return found


def read(folder):
    """Opens a folder and reads what is not large; only what is documented is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)
        try:
            parts(folder)
            data = nt.open(folder)
            repr(data)
            for variable in data.values():
                if variable.nbytes < 2**22:
                    _ = variable.values
            return data
        except DOCUMENTED:
            return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(writer, "of_process", dict)  # git is slow


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["step", "run", "a", "a/b", "\0", "", "<f8", "|O8", "|V100000", "wall_time"]),
)
JSON = st.recursive(
    SCALARS,
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(st.text(max_size=4), below, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["a", "a/b", "a/b_standard_error", "_standard_error", "step", "run", "wall/time", "d", "", "\0"]
)
DTYPES = st.sampled_from(["<f8", "<f4", "|b1", "<i8", "<c16", "|u1"])
BAD_DTYPES = st.sampled_from(["|O8", "|V100000", ">f8", "<U5", "<M8[s]", "f8", "", 7, None, []])
DIMS = st.lists(st.sampled_from(["step", "run", "d", "e", "a", "\0", ""]), max_size=3)
SIDES = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**20, 2**40, 2**62, 2**70, True, 1.5]))
SHAPES = st.lists(SIDES, max_size=3)
LABELS = st.dictionaries(
    st.sampled_from(["step", "run", "d", "e"]),
    st.one_of(JSON, st.lists(st.sampled_from(["x", "y", "", "\0", "x\0"]), max_size=4)),
    max_size=2,
)


def mostly(strategy):
    """What may be right, or anything."""
    return st.integers(0, 15).flatmap(lambda n: JSON if n == 15 else strategy)


COORDINATES = st.dictionaries(
    st.one_of(NAMES, st.sampled_from(["epoch", "f0", "d"])),
    st.sampled_from(["<f8", "<i8"]),
    max_size=3,
)
REASONS = st.dictionaries(NAMES, mostly(st.text(max_size=3)), max_size=2)


@st.composite
def layouts(draw):
    axes, arrays = [], []
    for _ in range(draw(st.integers(0, 3))):
        good = draw(st.integers(0, 9)) < 9
        dims = draw(DIMS)
        dims = list(dict.fromkeys(dims)) if good else dims
        shape = draw(st.lists(st.integers(0, 4), min_size=len(dims), max_size=len(dims)))
        shape = shape if good else draw(SHAPES)
        sides = dict(zip(dims, shape, strict=False))
        labels = {
            d: draw(st.lists(st.sampled_from("xyzw"), min_size=n, max_size=n))
            for d, n in sides.items()
            if good and draw(st.booleans())
        }
        axes.append([dims, labels if good else draw(LABELS)])
        dtype = draw(DTYPES if good else st.one_of(DTYPES, BAD_DTYPES))
        place = len(arrays) if good else draw(st.integers(-4, 4))
        arrays.append([draw(NAMES), dtype, shape, place])
    found = {
        "coordinates": draw(mostly(COORDINATES)),
        "axes": axes,
        "arrays": arrays,
        "missing": draw(mostly(REASONS)),
        "missing_on": draw(mostly(st.dictionaries(NAMES, mostly(REASONS), max_size=1))),
    }
    return found


def row(layout, number, step, fill):
    """A row that fits a layout, as far as that makes sense."""
    try:
        arrays = {n: (d, s) for n, d, s, _ in layout["arrays"]}
        sizes = [int(np.prod(s, dtype=object)) * np.dtype(d).itemsize for d, s in arrays.values()]
        size = 8 * len(layout["coordinates"]) + sum(sizes)
    except (TypeError, ValueError, AttributeError, OverflowError):
        size = 8
    size = size if 0 <= size < 10_000 else 8
    return b"r", struct.pack("<qI", step, number) + bytes([fill]) * size, b""


@st.composite
def files(draw):
    header = {**HEADER, "attempt": draw(st.sampled_from("ab")), "rank": draw(st.integers(0, 1))}
    if draw(st.integers(0, 9)) == 9:
        header[draw(st.sampled_from([*HEADER]))] = draw(JSON)
    frames, known = [], []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from("rrrrllapex"))
        if kind == "l" or not known:
            known.append(draw(layouts()))
            if draw(st.integers(0, 20)) == 20:
                known[-1][draw(st.sampled_from([*EMPTY]))] = draw(JSON)
            frames.append((b"l", text(known[-1]), b""))
        elif kind == "r":
            number = draw(st.integers(0, len(known) - (draw(st.integers(0, 9)) < 9)))
            step = draw(st.sampled_from([0, 1, 2, -5, 2**63 - 1, -(2**63)]))
            of = known[min(number, len(known) - 1)]
            frames.append(row(of, number, step, draw(st.sampled_from([0, 1, 0x7F, 0xFF]))))
        elif kind == "a":
            its = st.dictionaries(NAMES, mostly(st.dictionaries(NAMES, JSON, max_size=2)))
            frames.append((b"a", text(draw(mostly(its))), b""))
        elif kind == "e":
            frames.append((b"e", text(draw(mostly(st.just({"rows": 1})))), b""))
        else:
            frames.append((kind.encode(), draw(st.one_of(JSON.map(text), st.binary())), b"12"))
    return part(*frames, header=header)


@st.composite
def old_files(draw):
    frames = [({"format": 1, "attempt": "a", "start": 0, "provenance": {}}, b"")]
    for _ in range(draw(st.integers(0, 4))):
        layout = draw(layouts())
        about = {
            n: {"dims": axes[0], "coordinates": axes[1], "attributes": draw(mostly(st.just({})))}
            for (n, *_), axes in zip(layout["arrays"], layout["axes"], strict=False)
        }
        frame = {
            "step": draw(mostly(st.integers(0, 3))),
            "coordinates": draw(mostly(st.dictionaries(NAMES, SCALARS, max_size=2))),
            "values": [its[:3] for its in layout["arrays"]],
            "missing": layout["missing"],
            "missing_on": layout["missing_on"],
            "about": about,
        }
        if draw(st.integers(0, 9)) == 9:
            frame[draw(st.sampled_from([*frame]))] = draw(JSON)
        size = len(row({**layout, "coordinates": {}}, 0, 0, 0)[1]) - 12
        frames.append((frame, bytes(size)))
    return old(*frames)


def fuzz(folder, contents):
    for number, data in enumerate(contents):
        (folder / f"part-{number}.ntl").write_bytes(data)
    found = read(folder)
    if found is not None and "step" not in found.coords:
        raise AssertionError("a data set without steps")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            TraceWriter(folder, "new", start=None).write([nt.Record("a/b", 0, np.array(1.0))], {})
    except ValueError as error:
        if "another probe" not in str(error) and "newer nettrace" not in str(error):
            raise
    for path in folder.iterdir():
        path.unlink()


SEVERAL = st.lists(st.one_of(files(), files(), old_files()), min_size=1, max_size=2)
ANYTHING = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(MAGIC.__add__),
    st.binary(max_size=100).map(lambda head: part((b"l", text(EMPTY), b""), (b"r", head, b""))),
    st.binary(max_size=100).map(lambda head: part((b"l", head, b""))),
    st.binary(max_size=100).map(lambda head: old((head, b""))),
)
FUZZ = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@given(contents=SEVERAL)
@settings(max_examples=150, **FUZZ)
def test_hostile_frames_do_no_harm(folder, contents):
    fuzz(folder, contents)


@given(data=ANYTHING)
@settings(max_examples=150, **FUZZ)
def test_arbitrary_bytes_do_no_harm(folder, data):
    fuzz(folder, [data])


@pytest.mark.slow
def test_two_minutes_of_fuzzing_find_nothing(folder):
    @given(contents=st.one_of(SEVERAL, SEVERAL, ANYTHING.map(lambda data: [data])))
    @settings(max_examples=400, database=None, **FUZZ)
    def some(contents):
        fuzz(folder, contents)

    end = time.monotonic() + 120
    while time.monotonic() < end:
        some()


def nested(depth, opening=b"[", closing=b"]"):
    return opening * depth + closing * depth


BOMBS = {
    "deep": part((b"a", b'{"a":' + nested(100_000) + b"}", b"")),
    "as deep as JSON can be": part((b"a", b'{"a":{"b":' + nested(900) + b"}}", b"")),
    "deep provenance": part(
        header=b'{"format":2,"attempt":"a","start":0,"rank":0,"continues":null,"provenance":{"a":'
        + nested(900)
        + b"}}"
    ),
    "deep attempt": part(
        header=b'{"format":2,"attempt":' + nested(900) + b',"start":0,"rank":0,"provenance":{}}'
    ),
    "a long number": part((b"a", b'{"a":' + b"9" * 100_000 + b"}", b"")),
    "a newer number": part(header={**HEADER, "format": 10**300}),
    "layouts": part(*[(b"l", text(EMPTY), b"")] * 20_000),
    "different layouts": part(
        *[(b"l", text({**EMPTY, "missing": {"a": str(n)}}), b"") for n in range(10_000)]
    ),
    "different layouts with rows": part(
        *[
            frame
            for n in range(2_000)
            for frame in (
                (b"l", text({**EMPTY, "missing": {"a": str(n)}}), b""),
                (b"r", struct.pack("<qI", n, n), b""),
            )
        ]
    ),
    "one axis with many labels, in many arrays": part(
        (
            b"l",
            text(
                {
                    **EMPTY,
                    "axes": [[["d"], {"d": [*map(str, range(2_000))]}]],
                    "arrays": [[f"a/{n}", "|b1", [2_000], 0] for n in range(300)],
                }
            ),
            b"",
        ),
        (b"r", struct.pack("<qI", 0, 0) + bytes(600_000), b""),
    ),
    "one long label among many": part(
        (
            b"l",
            text(
                {
                    **EMPTY,
                    "axes": [[["d"], {"d": ["x" * 100_000, *map(str, range(20_000))]}]],
                    "arrays": [["a", "|b1", [20_001], 0]],
                }
            ),
            b"",
        ),
        (b"r", struct.pack("<qI", 0, 0) + bytes(4), bytes(20_001)),
    ),
    "nothing, but vast": part(
        (
            b"l",
            text(
                {
                    **EMPTY,
                    "axes": [[["d", "e"], {}]],
                    "arrays": [["a", "<f8", [0, 2**47], 0], ["b", "<f8", [2**48, 0], 0]],
                }
            ),
            b"",
        ),
        (b"r", struct.pack("<qI", 0, 0), b""),
    ),
    "many headers": part(*[(b"p", text(HEADER), b"")] * 1000),
    "a million steps apart": part(
        (b"l", text(EMPTY), b""), (b"r", struct.pack("<qI", 2**62, 0), b"")
    ),
    "old and deep": old((b'{"format":1,"attempt":' + nested(900) + b"}", b"")),
    "a length of 4 GiB": struct.pack("<II", 2**32 - 1, 0) + b"\0\0\0\0" + b'{"format":1}',
    "rows before layouts": part((b"r", struct.pack("<qI", 0, 0), b"")),
}


@pytest.mark.parametrize("name", BOMBS)
def test_opening_takes_memory_in_proportion_to_the_file(tmp_path, name):
    (tmp_path / "part-00000.ntl").write_bytes(BOMBS[name])
    read(tmp_path)  # imports, and caches
    tracemalloc.start()
    try:
        read(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22 + 2**19 + 16 * len(BOMBS[name])


def test_what_is_no_file_is_no_part(tmp_path):
    TraceWriter(tmp_path).write([nt.Record("a/b", 0, np.array(1.0))], {})
    (tmp_path / "part-00001.ntl").mkdir()
    (tmp_path / "part-00002.ntl").symlink_to(tmp_path / "part-00002.ntl")
    (tmp_path / "part-00003.ntl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "part-00004.ntl")
    (tmp_path / "part-00005.ntl").symlink_to("/dev/zero")
    (tmp_path / "part-\u00b2.ntl").write_bytes(b"no number")
    assert nt.open(tmp_path).step.values.tolist() == [0]
    its = TraceWriter(tmp_path)
    its.write([nt.Record("a/b", 1, np.array(1.0))], {})
    assert nt.open(tmp_path).step.values.tolist() == [0, 1]
    with pytest.raises(FileNotFoundError, match="there is no trace"):
        nt.open(tmp_path / "part-00004.ntl")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read anything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    TraceWriter(tmp_path).write([nt.Record("a/b", 0, np.array(1.0))], {})
    (tmp_path / "part-00000.ntl").chmod(0)
    with pytest.raises(PermissionError):
        nt.open(tmp_path)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a", "b/a"), ("x/a", "x/b/a")])
def test_runs_are_told_apart_wherever_they_lie(tmp_path, paths):
    for path in paths:
        TraceWriter(tmp_path / path).write([nt.Record("a/b", 0, np.array(1.0))], {})
    found = nt.open([tmp_path / path for path in paths]).run.values.tolist()
    assert len(set(found)) == 2


def test_names_that_a_data_set_has_already_are_kept_apart(tmp_path):
    names = ["wall/time", "step", "run", "layer", "mode"]
    its = TraceWriter(tmp_path)
    rows = [nt.Record(name, 3, np.array(float(n))) for n, name in enumerate(names)]
    more = nt.Record("a/b", 3, np.ones((2, 2)), dims=("layer", "mode"), coordinates={"layer": "xy"})
    error = nt.Record("own_standard_error", 3, np.array(np.nan), missing="no")
    its.write([*rows, more, error], {"layer": 7, "step": 8, "mode": 9})
    data = nt.open(tmp_path)
    found = {v.attrs["name"]: v.values for v in data.values()}
    assert [float(found[name][0]) for name in names] == [0, 1, 2, 3, 4]
    assert data.a_b.dims == ("step", "layer", "mode")
    assert [float(data[name][0]) for name in ("layer_2", "step_2", "mode_2")] == [7, 8, 9]
    assert json.loads(data.own_standard_error.attrs["missing"]) == {"3": "no"}
