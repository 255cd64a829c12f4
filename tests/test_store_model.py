"""The trace is what plain dictionaries say, whoever wrote what, and however it is read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nettrace as nt
from nettrace.store import TraceWriter, writer

DTYPES = "bool int8 uint16 int32 int64 float16 float32 float64 complex64 complex128".split()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(writer, "of_process", dict)  # git is slow


@st.composite
def records(draw, name):
    """A record of any type, shape and labels, or of what is missing."""
    if draw(st.integers(0, 5)) == 0:
        return nt.Record(
            name, 0, np.asarray(np.nan), missing=draw(st.sampled_from(["no", "never"]))
        )
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    seed = draw(st.integers(0, 2**16))
    value = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    if draw(st.integers(0, 20)) == 0:  # one that is not in the row itself
        value = np.resize(np.append(value.ravel(), 1).astype(dtype), (700, *shape[1:]))
    dims = tuple(f"{name[2:]}{axis}" for axis in range(value.ndim))
    labels = {}
    if value.ndim and len(value) < 4 and draw(st.booleans()):
        labels[dims[0]] = draw(st.permutations("wxyz"))[: len(value)]
    error = value * 0.5 if draw(st.booleans()) and dtype.kind == "f" else None
    on = {"p": "none there"} if draw(st.booleans()) else {}
    return nt.Record(
        name, 0, np.asarray(value), error, dims=dims, coordinates=labels, missing_on=on
    )


@st.composite
def rows(draw):
    names = draw(st.lists(st.sampled_from(["g/a", "g/b", "h/c"]), min_size=1, unique=True))
    return draw(st.integers(0, 4)), [draw(records(name)) for name in names]


WRITERS = st.fixed_dictionaries(
    {
        "attempt": st.sampled_from(["one", "two", "three"]),
        "start": st.one_of(st.just("first"), st.none(), st.integers(0, 5)),
        "rank": st.integers(0, 2),
    }
)
RUN = st.tuples(
    st.lists(WRITERS, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), rows()), min_size=1, max_size=8),
    st.sampled_from([1, 2**26]),
)


def write(folder, run):
    """Writes a run, and says which rows count, in the order in which they replace each other."""
    settings, events, full = run
    made, parts, began, said = {}, {}, {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "FULL", full)
        for count, (which, (step, found)) in enumerate(events):
            which %= len(settings)
            its = settings[which]
            if which not in made:
                made[which] = TraceWriter(folder, **its)
                began[which] = step if its["start"] == "first" else its["start"]
            made[which].write([nt.Record(**{**vars(r), "step": step}) for r in found], {"at": step})
            part = count if full == 1 else parts.setdefault(which, len(parts))
            said.append((its["attempt"], its["rank"], part, count, which, step, found))
    order = list(dict.fromkeys(row[0] for row in sorted(said, key=lambda row: row[2])))
    counted = []
    for row in said:
        later = [
            began[other[4]]
            for other in said
            if order.index(other[0]) > order.index(row[0]) and began[other[4]] is not None
        ]
        if row[5] < min(later, default=np.inf):
            counted.append(row)

    def place(row):
        """What an attempt says of steps before its own start gives way to what others say."""
        attempt = order.index(row[0])
        early = began[row[4]] is not None and row[5] < began[row[4]]
        return (not early, -attempt if early else attempt, -row[1], row[2], row[3])

    counted.sort(key=place)
    return [(row[5], {record.name: record for record in row[6]}) for row in counted]


def cells(model, name, step):
    """What is there of a quantity at a step: an array and its labels, or None."""
    base = name.removesuffix("_standard_error")
    found = [said[base] for at, said in model if at == step and base in said]
    if not found or found[-1].missing is not None:
        return None
    value = found[-1].value if name == base else found[-1].standard_error
    return None if value is None else (value, found[-1].dims, found[-1].coordinates)


def check(data, models, alone):
    steps = sorted({step for model in models for step, _ in model})
    assert data.step.values.tolist() == steps
    names = {name for model in models for _, said in model for name in said}
    errors = {
        record.name + "_standard_error"
        for model in models
        for _, said in model
        for record in said.values()
        if record.standard_error is not None
    }
    assert {variable.attrs["name"] for variable in data.values()} == names | errors
    for variable in data.values():
        found = variable.values if not alone else variable.values[None]
        dims = variable.dims[1:] if alone else variable.dims[2:]
        name = variable.attrs["name"]
        table = [[cells(model, name, step) for step in steps] for model in models]
        there = [cell for row in table for cell in row if cell is not None]
        rank = max((cell[0].ndim for cell in there), default=0)
        assert len(dims) == rank
        for axis, dim in enumerate(dims):
            lengths = [cell[0].shape[axis] if axis < cell[0].ndim else 1 for cell in there]
            if dim in data.coords:
                labels = {label for cell in there for label in cell[2][cell[1][axis]]}
                assert sorted(data[dim].values.tolist()) == sorted(labels)
            else:
                assert data.sizes[dim] == max(lengths)
                some = [axis < cell[0].ndim and cell[1][axis] in cell[2] for cell in there]
                assert not all(some)
        for run, row in enumerate(table):
            for at, cell in enumerate(row):
                place_check(found[run, at], cell, dims, data)
        if there:
            kinds = np.result_type(*(cell[0].dtype for cell in there))
            assert found.dtype in (kinds, np.dtype(float))


def place_check(found, cell, dims, data):
    expected = np.full(found.shape, np.nan, np.result_type(found.dtype, np.float32))
    if cell is not None:
        value, own, labels = cell
        where = []
        for axis, dim in enumerate(dims):
            if axis < value.ndim and dim in data.coords:
                known = data[dim].values.tolist()
                where.append([known.index(label) for label in labels[own[axis]]])
            else:
                where.append(range(value.shape[axis] if axis < value.ndim else 1))
        expected[np.ix_(*where) if where else ()] = value.reshape(
            value.shape + (1,) * (len(dims) - value.ndim)
        )
    np.testing.assert_array_equal(found, expected)


def verify(base, runs, keys):
    folders = [base / f"run{number}" for number in range(len(runs))]
    models = [write(folder, run) for folder, run in zip(folders, runs, strict=True)]
    alone = len(runs) == 1
    data = nt.open(folders[0] if alone else folders)
    check(data, models, alone)
    loaded = data.load().copy()
    data = nt.open(folders[0] if alone else folders)
    assert loaded.identical(data)
    for variable in data:
        chosen = {
            dim: key(data.sizes[dim]) for dim, key in zip(data[variable].dims, keys, strict=False)
        }
        lazy, there = data[variable].isel(chosen), loaded[variable].isel(chosen)
        np.testing.assert_array_equal(lazy.values, there.values)
        assert lazy.dtype == there.dtype
        steps = loaded.step.values[::-2]
        np.testing.assert_array_equal(
            data[variable].sel(step=steps), loaded[variable].sel(step=steps)
        )


@st.composite
def keys(draw):
    """What can be asked for along an axis of n: as a function of n."""
    kind = draw(st.sampled_from(["number", "slice", "numbers", "mask"]))
    a, b = draw(st.integers(-8, 8)), draw(st.integers(-8, 8))
    stride = draw(st.sampled_from([-3, -2, -1, 1, 2]))
    several = draw(st.lists(st.integers(0, 100), max_size=5))

    def key(n):
        if kind == "slice" or not n:
            asked = slice(a, b, stride)
            return asked if len(range(n)[asked]) else slice(0, 0)  # xarray mistakes some of nothing
        if kind == "number":
            return a % n - (n if b < 0 else 0)
        if kind == "numbers":
            return np.array([x % n - (n if x > 50 else 0) for x in several], int)
        return np.array([hash((a, b, x)) % 2 == 0 for x in range(n)])

    return key


@given(run=RUN, asked=st.lists(keys(), min_size=5, max_size=5))
@settings(max_examples=60)
def test_whatever_is_written_is_read(tmp_path_factory, run, asked):
    verify(tmp_path_factory.mktemp("trace"), [run], asked)


@given(runs=st.lists(RUN, min_size=2, max_size=3), asked=st.lists(keys(), min_size=6, max_size=6))
@settings(max_examples=30)
def test_several_runs_are_read_as_they_are(tmp_path_factory, runs, asked):
    verify(tmp_path_factory.mktemp("trace"), runs, asked)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # for as many processes
@given(runs=st.lists(RUN, min_size=1, max_size=3), asked=st.lists(keys(), min_size=6, max_size=6))
@settings(max_examples=750)
def test_many_runs_are_read_as_they_are(tmp_path_factory, runs, asked, part):
    verify(tmp_path_factory.mktemp("trace"), runs, asked)
