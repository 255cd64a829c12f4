"""Figures of landscape probes: what is drawn against what was found, and what is doubtful."""

import functools
import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

import nettrace as nt
from nettrace import landscape
from nettrace.cli import main
from nettrace.record import ERROR
from nettrace.store import TraceWriter
from nettrace.summary import said

pytest.importorskip("plotly")

from nettrace.dashboard import figure, figures, landscape_trace
from nettrace.dashboard.landscapes import landscape_numbers
from nettrace.dashboard.report import report
from nettrace.dashboard.tables import table

STEPS = (0, 4, 9)
HOSTILE = "<img src=x onerror=alert(1)>"


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results along a training, of functions that do well, that fail, and that fail at last."""
    to = tmp_path_factory.mktemp("run") / "landscape"
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 3, generator=generator)
    probe = nt.Probe(inputs, (inputs[:, 0] > 0).long())
    model, other = network(), network(1)
    path = [{k: v.clone() for k, v in network(seed).state_dict().items()} for seed in (2, 3, 0)]
    begun = []

    def fails(model, probe, *, seconds, progress, to):
        raise ValueError("<b>never</b> works")

    def breaks(model, probe, *, seconds, progress, to):
        begun.append(1)
        if len(begun) > 1:
            raise RuntimeError("works once")
        return landscape.slice_1d(model, probe, points=5, to=to)

    functions = {
        "line": functools.partial(landscape.slice_1d, points=9),
        "hessian": functools.partial(landscape.slice_1d, points=7, direction="hessian"),
        "plane": functools.partial(
            landscape.slice_2d, points=(7, 5), directions="trajectory", trajectory=path
        ),
        "barrier": lambda model, probe, **more: landscape.barrier(
            model, probe, other, points=9, **more
        ),
        "coefficient": functools.partial(
            landscape.learning_coefficient, chains=2, draws=10, warmup=10
        ),
        "fails": fails,
        "breaks": breaks,
    }
    prober = landscape.Prober(functions, probe, every=list(STEPS), to=to, seconds=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(10):
        with warnings.catch_warnings():  # of what fails, and of chains that are too short
            warnings.simplefilter("ignore")
            prober(model, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(probe.inputs), probe.targets).backward()
        optimizer.step()
    patterns = torch.randn(6, 9, generator=generator)
    landscape.density_of_states(
        landscape.perceptron(9),
        patterns,
        patterns[:, 0].sign(),
        walkers=32,
        error=0.2,
        to=to / "density" / "step_00000009.nc",
    )
    return to


@pytest.fixture(scope="module")
def found(folder):
    return landscape.open(folder)


@pytest.fixture(scope="module")
def data(found):
    return landscape_trace(found)


def test_a_number_is_a_track_with_its_error(data, found):
    drawn = figure(data, "landscape/barrier/barrier")
    band, curve = drawn.data
    values = found["barrier"]["barrier"].values
    error = found["barrier"]["barrier_standard_error"].values
    np.testing.assert_array_equal(curve.x, STEPS)
    np.testing.assert_array_equal(curve.y, values)
    np.testing.assert_allclose(band.y, [*(values + error), *(values - error)[::-1]])
    assert drawn.layout.title.text == "barrier/barrier"
    assert drawn.layout.yaxis.title.text == "barrier"
    assert drawn.layout.xaxis.title.text == "optimizer step"
    assert "w(t) = (1 - t) w0 + t w1" in data["landscape_barrier_barrier"].attrs["convention"]
    assert "Frankle" in data["landscape_barrier_barrier"].attrs["source"]


def test_where_a_barrier_is_taken_is_seen_too(data, found):
    drawn = figure(data, "landscape/barrier/barrier_at")
    np.testing.assert_array_equal(drawn.data[0].y, found["barrier"]["barrier_at"].values)
    assert "landscape/barrier/barrier_at" in figures(data)


def test_a_line_has_a_curve_for_each_step(data, found):
    drawn = figure(data, "landscape/line/loss")
    assert [one.name for one in drawn.data] == ["step 0", "step 4", "step 9"]
    for number, curve in enumerate(drawn.data):
        np.testing.assert_array_equal(curve.x, np.linspace(-1, 1, 9))
        np.testing.assert_array_equal(curve.y, found["line"]["loss"].values[number])
        np.testing.assert_array_equal(
            curve.error_y.array, found["line"]["loss_standard_error"].values[number]
        )
    assert drawn.layout.xaxis.title.text == "x"
    assert drawn.layout.yaxis.title.text == "loss (nats a sample)"


def test_places_that_differ_from_step_to_step_are_where_they_were(data, found):
    drawn = figure(data, "landscape/hessian/loss")
    places = found["hessian"]["x"].values
    assert places.shape == (3, 7)
    assert not np.allclose(places[0], places[1])
    for number, curve in enumerate(drawn.data):
        np.testing.assert_array_equal(curve.x, places[number])
    assert drawn.layout.xaxis.title.text == "x"


def test_of_many_errors_some_are_drawn():
    error = np.full(51, 0.1)
    one = xr.Dataset(
        {
            "loss": (("step", "x"), np.ones((1, 51))),
            "loss_standard_error": (("step", "x"), [error]),
        },
        {"step": [0], "x": np.linspace(-1, 1, 51)},
    )
    (curve,) = figure(landscape_trace({"line": one}), "landscape/line/loss").data
    assert (np.asarray(curve.error_y.array) > 0).sum() == 13


def test_a_plane_is_drawn_at_its_places_with_the_trajectory(data, found):
    drawn = figure(data, "landscape/plane/loss")
    contours = [one for one in drawn.data if one.type == "contour"]
    paths = [one for one in drawn.data if one.name == "trajectory"]
    assert len(contours) == len(paths) == 3
    for number, (contour, path) in enumerate(zip(contours, paths, strict=True)):
        one = found["plane"].isel(step=number)
        np.testing.assert_array_equal(contour.x, one["x"].values)
        np.testing.assert_array_equal(contour.y, one["y"].values)
        loss = one["loss"].values
        assert loss.shape == (7, 5)
        z = np.asarray(contour.z, float).T
        z = 10**z if contour.meta == "log10" else z
        np.testing.assert_allclose(z, loss, rtol=1e-5)
        np.testing.assert_array_equal([path.x, path.y], one["trajectory"].values.T)
    assert (drawn.layout.xaxis.title.text, drawn.layout.yaxis.title.text) == ("x", "y")
    stops = drawn.layout.sliders[0].steps
    assert [stop.label for stop in stops] == ["0", "4", "9"]
    for number, stop in enumerate(stops):
        shown = [one for one, is_ in zip(drawn.data, stop.args[0]["visible"], strict=True) if is_]
        assert {one.name for one in shown} >= {"trajectory", "the network"}
        assert [one for one in shown if one.type == "contour"] == [contours[number]]
    lines = table(drawn).splitlines()
    assert sum(line.startswith(("0,", "4,", "9,")) for line in lines) >= 35


def test_an_infinite_loss_leaves_a_gap():
    loss = np.array([[[1.0, np.inf], [2.0, 3.0], [np.nan, 4.0]]])
    places = {"step": [0], "x": [0.0, 1.0, 2.0], "y": [0.0, 1.0]}
    one = xr.Dataset(
        {"loss": (("step", "x", "y"), loss), "flat": (("step", "x", "y"), np.ones_like(loss))},
        places,
    )
    contour = figure(landscape_trace({"f": one}), "landscape/f/loss").data[0]
    np.testing.assert_array_equal(contour.z, [[1, 2, np.nan], [np.nan, 3, 4]])
    assert (contour.zmin, contour.zmax) == (1, 4)
    assert figure(landscape_trace({"f": one}), "landscape/f/flat").to_json()


def test_an_entropy_is_a_density_with_temperatures(data, found):
    drawn = figure(data, "landscape/density/entropy")
    one = found["density"].isel(step=0)
    there = np.isfinite(one["entropy"].values)
    np.testing.assert_array_equal(drawn.data[0].x, one["energy"].values[there])
    np.testing.assert_array_equal(drawn.data[0].y, one["entropy"].values[there])
    assert drawn.layout.sliders[0].currentvalue.prefix == "temperature "
    assert drawn.data[0].name == "entropy S(E), step 9"
    assert drawn.layout.xaxis.title.text == "energy"
    share = drawn.data[1 + drawn.layout.sliders[0].active]
    temperature = float(drawn.layout.sliders[0].steps[drawn.layout.sliders[0].active].label)
    weight = np.exp(one["entropy"].values - one["energy"].values / temperature)[there]
    np.testing.assert_allclose(share.y, weight / weight.sum(), rtol=2e-2)
    assert not any("without" in name for name in figures(data))


def test_wide_losses_are_on_a_logarithmic_axis():
    loss = np.geomspace(1e-3, 1, 20)
    one = xr.Dataset(
        {"entropy": (("step", "loss"), 3 * np.log(loss)[None])}, {"step": [5], "loss": loss}
    )
    drawn = figure(landscape_trace({"prior": one}), "landscape/prior/entropy")
    assert drawn.layout.xaxis.type == "log"
    assert drawn.layout.xaxis.title.text == "loss"
    assert {part.type for part in drawn.data} == {"scatter"}


def test_what_fails_always_says_why(data):
    assert [name for name in figures(data) if "/fails/" in name] == ["landscape/fails/seconds"]
    drawn = figure(data, "landscape/fails/seconds")
    assert not drawn.data
    assert "&lt;b&gt;never&lt;/b&gt;" in drawn.layout.annotations[0].text


def test_what_always_failed_is_at_its_own_steps():
    step = {"stopped": ("step", ["failed"]), "missing": ("step", ["OSError: gone"])}
    bad = xr.Dataset({}, {"step": [5], **step})
    good = xr.Dataset({"height": ("step", [1.0, 2.0])}, {"step": [0, 9]})
    data = landscape_trace({"bad": bad, "good": good})
    np.testing.assert_array_equal(data["step"], [0, 5, 9])
    assert json.loads(data["landscape_bad_seconds"].attrs["missing"]) == {"5": "OSError: gone"}
    np.testing.assert_array_equal(data["landscape_good_height"], [1.0, np.nan, 2.0])


def test_what_fails_later_is_missing_there(data):
    missing = json.loads(data["landscape_breaks_loss"].attrs["missing"])
    assert missing == {str(step): "RuntimeError: works once" for step in STEPS[1:]}
    drawn = figure(data, "landscape/breaks/loss")
    assert [one.name for one in drawn.data] == ["step 0"]
    shaded = figure(data, "landscape/breaks/seconds")
    assert "missing at 2 of 3 steps" in shaded.layout.annotations[0].text


def test_doubts_are_seen(data, found):
    said = found["coefficient"]["doubts"].values
    assert all(said)
    drawn = figure(data, "landscape/coefficient/learning_coefficient")
    ring = next(one for one in drawn.data if one.name == "doubtful")
    np.testing.assert_array_equal(ring.x, STEPS)
    assert "doubtful at 3 of 3 steps" in drawn.layout.annotations[0].text
    chains = figure(data, "landscape/coefficient/loss")
    assert [stop.label for stop in chains.layout.sliders[0].steps] == [
        f"{step} (doubtful)" for step in STEPS
    ]
    for text in said[0].splitlines():
        assert text in json.loads(data["landscape_coefficient_loss"].attrs["doubts"])["0"]


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        ("out of time", "out of time"),
        ("interrupted", "interrupted"),
        ("unfinished", "its process was killed"),
        ("failed", "failed: OSError: no disk"),
    ],
)
def test_what_was_not_finished_is_doubtful(stopped, said):
    one = xr.Dataset(
        {"barrier": ("step", [1.0, 2.0])},
        {
            "step": [0, 5],
            "stopped": ("step", ["done", stopped]),
            "missing": ("step", ["", "OSError: no disk" if stopped == "failed" else ""]),
        },
    )
    data = landscape_trace({"mine": one})
    assert list(json.loads(data["landscape_mine_barrier"].attrs["doubts"])) == ["5"]
    drawn = figure(data, "landscape/mine/barrier")
    ring = next(trace for trace in drawn.data if trace.name == "doubtful")
    assert list(ring.x) == [5]
    assert "doubtful at 1 of 2 steps" in drawn.layout.annotations[0].text
    assert said in drawn.layout.annotations[0].hovertext


def test_one_step_shows_its_error(found):
    data = landscape_trace({"barrier": found["barrier"].isel(step=[0])})
    band, curve = figure(data, "landscape/barrier/barrier").data
    assert len(curve.x) == 1
    assert "markers" in curve.mode
    assert band.line.width > 0  # of a band without a width of its own
    error = float(found["barrier"]["barrier_standard_error"][0])
    assert band.y[0] - band.y[1] == pytest.approx(2 * error)
    assert not figure(landscape_trace({"p": found["plane"].isel(step=[1])}), "landscape/p/loss")[
        "layout"
    ]["sliders"]


def test_results_are_left_as_they_are(found):
    before = {name: one.copy(deep=True) for name, one in found.items()}
    landscape_trace(found)
    for name, one in found.items():
        assert one.identical(before[name])


def test_all_figures_can_be_made_in_both_themes(data):
    for name in figures(data):
        for theme in ("light", "dark"):
            assert figure(data, name, theme=theme).to_json()


def test_names_that_meet_are_told_apart():
    one = xr.Dataset({"b_c": ("step", [1.0])}, {"step": [0]})
    other = xr.Dataset({"c": ("step", [2.0])}, {"step": [0]})
    data = landscape_trace({"a": one, "a_b": other})
    assert figure(data, "landscape/a/b_c").data[0].y == (1.0,)
    assert figure(data, "landscape/a_b/c").data[0].y == (2.0,)


def test_nothing_makes_a_page():
    data = landscape_trace({})
    assert figures(data) == []
    assert "Nothing was recorded" in report(data)


def test_notebooks_have_figures_and_a_table(data):
    assert data.nt.plot("landscape/line/loss").data
    assert "landscape/barrier/barrier" in data.nt._repr_html_()


def trace(folder, value=1.0):
    writer = TraceWriter(folder)
    for step in range(3):
        writer.write([nt.Record("loss/mean", step, np.asarray(value + step))], {})
    writer.close()
    return folder


def shown(path):
    """The names of figures, with their runs, and the whole page."""
    text = path.read_text(encoding="utf-8")
    start = text.index('<script type="application/json" id="data">')
    body = text[start:].partition(">")[2].partition("</script>")[0]
    return [(one["name"], one["run"]) for one in json.loads(body)["figures"]], text


def test_a_report_of_results_alone(folder, tmp_path):
    assert main(["report", str(folder), "-o", str(tmp_path / "x.html")]) == 0
    names, page = shown(tmp_path / "x.html")
    assert ("landscape/plane/loss", "") in names
    assert 'id="group-landscape"' in page
    assert "doubts about these results" in page
    assert "Probing the landscape took" in page
    assert "<b>never" not in page


def test_a_trace_has_the_results_in_its_folder(folder, tmp_path):
    trace(folder.parent)
    assert main(["report", str(folder.parent), "-o", str(tmp_path / "x.html")]) == 0
    names, page = shown(tmp_path / "x.html")
    assert {("loss/mean", ""), ("landscape/barrier/barrier", "")} <= set(names)
    rows = page.partition("of the landscape</h3>")[2]
    barrier = landscape.open(folder)["barrier"].isel(step=-1)
    assert f">{said(*(float(barrier[n]) for n in ('barrier', 'barrier' + ERROR)))}<" in rows
    only = ["--names", "landscape/plane,loss", "-o", str(tmp_path / "y.html")]
    assert main(["report", str(folder.parent), *only]) == 0
    names, page = shown(tmp_path / "y.html")
    assert {name.rpartition("/")[0] for name, _ in names} == {"loss", "landscape/plane"}
    assert '"name":"trajectory"' in page.replace(" ", "")


def result(folder, value, step=0):
    folder.mkdir(parents=True)
    found = xr.Dataset({"height": value, "loss": ("x", [1.0, value])}, {"x": [0.0, 1.0]})
    found.assign_attrs(stopped="done").to_netcdf(folder / f"step_{step:08d}.nc", engine="scipy")


def test_several_runs_are_compared_by_numbers_and_seen_one_by_one_by_arrays(tmp_path):
    for run in range(3):
        trace(tmp_path / f"run{run}")
        result(tmp_path / f"run{run}" / "landscape" / "mine", float(run))
    runs = [str(tmp_path / f"run{run}") for run in range(3)]
    assert main(["report", *runs, "-o", str(tmp_path / "x.html")]) == 0
    names, _ = shown(tmp_path / "x.html")
    assert ("landscape/mine/height", "") in names
    assert [run for name, run in names if name == "landscape/mine/loss"] == ["run0", "run1", "run2"]
    alone = landscape_numbers(
        {f"run{run}": landscape_trace(landscape.open(tmp_path / f"run{run}/landscape"))
         for run in range(3)}
    )  # fmt: skip
    drawn = figure(alone, "landscape/mine/height")
    assert {one.name: one.y[0] for one in drawn.data} == {"run0": 0, "run1": 1, "run2": 2}


def test_whose_results_are_is_not_guessed(tmp_path, capsys):
    result(tmp_path / "landscape" / "mine", 1.0)
    runs = [str(trace(tmp_path / name)) for name in "ab"]
    out = ["-o", str(tmp_path / "x.html")]
    assert main(["report", *runs, str(tmp_path / "landscape"), *out]) == 1
    assert "not known whose they are" in " ".join(capsys.readouterr().err.split())
    assert main(["report", runs[0], str(tmp_path / "landscape"), *out]) == 0
    assert ("landscape/mine/height", "") in shown(tmp_path / "x.html")[0]
    assert main(["report", runs[0], "--names", "landscape/mine", *out]) == 1
    assert "no results of landscape/mine" in " ".join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings("default")
def test_files_that_are_damaged_or_of_others_are_left_out(tmp_path, capsys):
    result(tmp_path / "landscape" / "mine", 1.0)
    (tmp_path / "landscape" / "mine" / "step_00000007.nc").write_bytes(b"not a result")
    other = tmp_path / "landscape" / "other"
    other.mkdir()
    of_others = xr.Dataset(
        {"text": ("word", ["a", "b"]), "deep": (tuple("abcde"), np.ones([1] * 5))}
    )
    of_others.to_netcdf(other / "step_1.nc", engine="scipy")
    out = tmp_path / "x.html"
    assert main(["report", str(tmp_path / "landscape"), "-o", str(out)]) == 0
    assert "left out" in capsys.readouterr().err
    names, _ = shown(out)
    assert ("landscape/mine/height", "") in names
    assert ("landscape/other/seconds", "") in names


def test_hostile_names_are_text(tmp_path):
    folder = tmp_path / "landscape" / HOSTILE
    folder.mkdir(parents=True)
    found = xr.Dataset(
        {"value": 1.0, "loss": (HOSTILE, [1.0, 2.0])},
        {HOSTILE: [0.0, 1.0]},
        {"stopped": "done", "doubts": HOSTILE, "convention": HOSTILE},
    )
    found.to_netcdf(folder / "step_0.nc", engine="scipy")
    out = tmp_path / "x.html"
    assert main(["report", str(tmp_path / "landscape"), "-o", str(out)]) == 0
    names, page = shown(out)
    assert (f"landscape/{HOSTILE}/value", "") in names
    assert "<img" not in page.partition("<script>")[0]
    data = landscape_trace(landscape.open(tmp_path / "landscape"))
    for name in figures(data):
        drawn = figure(data, name)
        for text in (drawn.layout.title.text, drawn.layout.xaxis.title.text):
            assert "<img" not in str(text)
        assert all("<img" not in one.text + str(one.hovertext) for one in drawn.layout.annotations)
        assert not any("<img" in str(one.name) + str(one.hovertemplate) for one in drawn.data)
    assert "&lt;img" in figure(data, f"landscape/{HOSTILE}/loss").layout.xaxis.title.text
