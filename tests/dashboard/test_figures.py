"""Figures at the level of their data: curves, axes, labels, and what is missing."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr

import nettrace as nt

pytest.importorskip("plotly")

from nettrace.dashboard import density_of_states, figure, figures
from nettrace.dashboard.style import MOST, envelope
from nettrace.dashboard.views import by_layer, layers


def trace(steps=12, **arrays):
    """A data set of quantities (S, ...) with axes as told: name -> (axes, values, attributes)."""
    variables = {}
    for name, (dims, values, attributes) in arrays.items():
        about = {"name": name.replace("_", "/", 1), "convention": "as they are", **attributes}
        variables[name] = (("step", *dims), np.asarray(values, float), about)
    return xr.Dataset(variables, {"step": np.arange(steps)})


def scatters(found):
    return {one.name: one for one in found.data if one.type == "scatter"}


def test_a_number_is_a_curve_with_its_error():
    value, error = np.linspace(1, 2, 12), np.full(12, 0.1)
    data = trace(ntk_trace=((), value, {"units": "1/s"}), ntk_trace_standard_error=((), error, {}))
    assert figures(data) == ["ntk/trace"]
    found = figure(data, "ntk/trace")
    curve = scatters(found)["ntk/trace (1/s)"]
    np.testing.assert_array_equal(curve.x, np.arange(12))
    np.testing.assert_array_equal(curve.y, value)
    band = scatters(found)["standard error"]
    np.testing.assert_allclose(band.y, [*(value + error), *(value - error)[::-1]])
    assert found.layout.yaxis.title.text == "ntk/trace (1/s)"
    assert found.layout.xaxis.title.text == "optimizer step"
    assert found.layout.title.subtitle.text == "as they are"


def test_steps_that_grow_are_on_a_logarithmic_axis_with_step_0():
    steps = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256])
    data = trace(10, loss=((), np.arange(10.0), {})).assign_coords(step=steps)
    found = figure(data, "loss")
    np.testing.assert_array_equal(found.data[0].x, steps + 1)
    np.testing.assert_array_equal(found.data[0].customdata, steps)
    assert found.layout.xaxis.type == "log"
    assert list(found.layout.xaxis.ticktext) == ["0", "1", "10", "100"]


def test_what_is_missing_is_shaded_and_said_why():
    value = np.where((np.arange(12) > 3) & (np.arange(12) < 6), np.nan, 1.0)
    reasons = {"missing": json.dumps({"4..5": "ValueError: <b>no</b>"})}
    found = figure(trace(ntk_trace=((), value, reasons)), "ntk/trace")
    (shape,) = found.layout.shapes
    assert (shape.x0, shape.x1) == (3.5, 5.5)
    (note,) = found.layout.annotations
    assert "2 of 12 steps" in note.text
    assert "&lt;b&gt;" in note.text
    assert np.isnan(found.data[0].y[4:6]).all()


@pytest.mark.parametrize("dims", [(), ("mode",), ("layer",), ("sample", "sample_2"), ("lag",)])
def test_a_quantity_that_was_never_there_says_why(dims):
    value = np.full((12, *(3 for _ in dims)), np.nan)
    reasons = {"missing": json.dumps({"0..11": "MemoryError: too large"})}
    data = trace(a_b=(dims, value, reasons)).assign_coords(layer=["x", "y", "z"])
    found = figure(data, "a/b")
    assert not found.data
    assert "MemoryError" in found.layout.annotations[0].text


def test_steps_at_which_nothing_was_to_be_recorded_are_left_out():
    value = np.where(np.arange(12) % 3 == 0, 1.0, np.nan)
    found = figure(trace(a_b=((), value, {})), "a/b")
    np.testing.assert_array_equal(found.data[0].x, [0, 3, 6, 9])
    assert not found.layout.shapes


def test_many_steps_are_drawn_with_their_extremes():
    value = np.random.default_rng(0).normal(size=100_000)
    value[777] = 50.0
    found = figure(trace(100_000, a_b=((), value, {})), "a/b")
    band, curve = found.data
    assert len(curve.y) == MOST
    assert max(band.y) == 50.0
    assert min(band.y) == value.min()
    np.testing.assert_allclose(np.mean(curve.y), value.mean(), rtol=1e-9)


def test_envelopes_are_least_mean_and_largest_of_ranges():
    value = np.random.default_rng(1).normal(size=999)
    value[100:400] = np.nan
    low, mean, high = envelope(value, 10)
    edges = np.linspace(0, 999, 11).astype(int)
    parts = [value[a:b] for a, b in pairwise(edges)]
    for i, part in enumerate(parts):
        known = part[np.isfinite(part)]
        if not len(known):
            assert np.isnan([low[i], mean[i], high[i]]).all()
            continue
        true = known.min(), known.mean(), known.max()
        np.testing.assert_allclose((low[i], mean[i], high[i]), true)


def test_runs_have_medians_and_quantiles_over_groups():
    value = np.random.default_rng(2).normal(size=(8, 12))
    names = [f"run{i}" for i in range(8)]
    data = xr.Dataset(
        {"ntk_trace": (("run", "step"), value, {"name": "ntk/trace"})},
        {"run": names, "step": np.arange(12)},
    )
    groups = {name: "eta=<1>" if i < 5 else "eta=2" for i, name in enumerate(names)}
    found = scatters(figure(data, "ntk/trace", groups=groups))
    np.testing.assert_allclose(
        found["eta=&lt;1&gt;: median, 10 to 90 % of 5 runs"].y, np.median(value[:5], axis=0)
    )
    band = found["eta=2: 10 to 90 %"].y
    np.testing.assert_allclose(band[:12], np.quantile(value[5:], 0.9, axis=0))
    few = scatters(figure(data.isel(run=slice(2)), "ntk/trace"))
    assert set(few) == {"run0", "run1"}
    assert set(scatters(figure(data, "ntk/trace"))) == {
        "median, 10 to 90 % of 8 runs",
        "10 to 90 %",
    }


def test_runs_without_a_quantity_do_not_count():
    value = np.full((8, 12), np.nan)
    value[3] = np.arange(12.0)
    data = xr.Dataset(
        {"a_b": (("run", "step"), value, {"name": "a/b"})},
        {"run": [f"run{i}" for i in range(8)], "step": np.arange(12)},
    )
    (found,) = figure(data, "a/b").data
    assert found.name == "run3"
    apart = np.where(np.arange(12) % 8 == np.arange(8)[:, None], 1.0, np.nan)  # other steps each
    found = figure(data.assign(a_b=(("run", "step"), apart, {"name": "a/b"})), "a/b").data
    assert [one.name for one in found] == [f"run{i}" for i in range(8)]


def test_a_spectrum_is_a_map_of_logarithms():
    value = np.exp(-np.arange(5.0) * 3)[None] * np.ones((12, 1))
    (found,) = figure(trace(ntk_spectrum=(("mode",), value, {})), "ntk/spectrum").data
    np.testing.assert_allclose(found.z, np.log10(value).T, rtol=1e-6)
    np.testing.assert_array_equal(found.y, [1, 2, 3, 4, 5])


def test_a_value_by_layer_is_a_map_with_their_names():
    value = np.arange(36.0).reshape(12, 3) - 10
    data = trace(weights_norms=(("layer",), value, {})).assign_coords(layer=["in", "<a>", "out"])
    (found,) = figure(data, "weights/norms").data
    assert list(found.y) == ["in", "&lt;a&gt;", "out"]
    np.testing.assert_allclose(found.z, value.T)
    assert found.zmin == -found.zmax  # it has both signs


def test_chosen_layers_have_a_curve_each():
    value, error = np.arange(36.0).reshape(12, 3) + 1, np.full((12, 3), 0.5)
    data = trace(
        weights_norms=(("layer",), value, {}),
        weights_norms_standard_error=(("layer",), error, {}),
        weights_sum=((), value.sum(1), {}),
    ).assign_coords(layer=["in", "<a>", "out"])
    assert layers(data) == ["in", "<a>", "out"]
    found = figure(by_layer(data, "weights/norms", ["out", "<a>", "other"]), "weights/norms")
    curves = {name: one for name, one in scatters(found).items() if not one.fill}
    assert list(curves) == ["&lt;a&gt;", "out"]
    np.testing.assert_array_equal(curves["out"].y, value[:, 2])
    band = next(one for one in found.data if one.fill)
    assert set(np.abs(band.y[:12] - value[:, 1])) == {0.5}
    assert data["weights_norms"].attrs.get("view") is None  # as it was
    for name, chosen in (("weights/norms", ["other"]), ("weights/sum", ["out"])):
        assert by_layer(data, name, chosen) is data


def test_a_kernel_is_in_the_order_of_classes_with_a_slider():
    value = np.random.default_rng(3).normal(size=(12, 4, 4))
    data = trace(ntk_cross=(("sample", "sample_2"), value, {"classes": "2 0 1 0"}))
    found = figure(data, "ntk/cross")
    order = [1, 3, 2, 0]
    np.testing.assert_allclose(found.data[-1].z, value[-1][np.ix_(order, order)], rtol=1e-6)
    assert [one.visible for one in found.data] == [False] * 11 + [True]
    assert found.layout.sliders[0].steps[0].label == "0"


def test_a_kernel_of_outputs_is_summed_over_equal_ones():
    value = np.random.default_rng(4).normal(size=(12, 3, 2, 3, 2))
    data = trace(ntk_gram=(("sample", "output", "sample_2", "output_2"), value, {}))
    found = figure(data, "ntk/gram").data[-1]
    np.testing.assert_allclose(found.z, np.einsum("ncmc->nm", value[-1]), rtol=1e-6)


def test_curves_are_over_lags():
    lags = [1, 10, 100]
    value = np.array(lags) * np.ones((12, 1))
    data = trace(weights_msd=(("lag",), value, {})).assign_coords(lag=[str(lag) for lag in lags])
    found = figure(data, "weights/msd")
    np.testing.assert_array_equal(found.data[-1].x, lags)
    assert found.data[-1].name == "step 11"
    assert found.layout.xaxis.type == "log"


def test_densities_are_where_they_are_told():
    at = np.linspace(0, 1, 5) * np.arange(1, 13)[:, None]
    data = trace(hessian_density=(("bin",), at**2, {}), hessian_density_at=(("bin",), at, {}))
    assert figures(data) == ["hessian/density"]
    np.testing.assert_array_equal(figure(data, "hessian/density").data[-1].x, at[-1])


def test_eigenvalues_have_the_edge_of_stability():
    values = np.array([[4.0, 2.0]]) * np.ones((12, 1))
    data = trace(
        hessian_eigenvalues=(("leading_mode",), values, {}),
        hessian_stability_gd=((), np.full(12, 0.5), {}),
    )
    found = scatters(figure(data, "hessian/eigenvalues"))
    np.testing.assert_allclose(found["2 / eta"].y, 8.0)
    np.testing.assert_allclose(found["number 2"].y, 2.0)


def test_many_numbers_are_seen_by_their_quantiles():
    value = np.random.default_rng(5).normal(size=(12, 1000))
    found = scatters(figure(trace(a_b=(("parameter",), value, {})), "a/b"))
    np.testing.assert_allclose(found["median"].y, np.median(value, axis=1))
    np.testing.assert_allclose(found["least to largest"].y[:12], value.max(1))


def test_variance_against_flatness_has_its_exponent():
    flatness = np.geomspace(1, 100, 20) * np.ones((12, 1))
    data = trace(
        weights_variance=(("mode",), np.pad(3 * flatness**-4.0, ((0, 0), (0, 5))), {}),
        weights_flatness=(("mode_weights_flatness",), flatness, {}),
        weights_flatness_exponent=(
            (),
            np.full(12, 4.0),
            {"first_mode": 1, "warning": "<too short>"},
        ),
    )
    name = "weights/variance against weights/flatness"
    assert name in figures(data)
    found = figure(data, name)
    points, other, line = found.data
    np.testing.assert_allclose(line.y, 3 * flatness[-1, [1, -1]] ** -4)
    np.testing.assert_allclose(points.y, 3 * flatness[-1, 1:] ** -4)
    assert (other.name, list(other.x)) == ("not fitted", [1.0])
    assert line.name == "fitted, psi = 4.00"
    for one in (found, figure(data, "weights/flatness_exponent")):
        assert [note.text for note in one.layout.annotations] == ["&lt;too short&gt;"]
    assert figure(data, "weights/flatness").layout.yaxis.title.text == "mode"


def test_a_portrait_is_coloured_by_steps():
    data = trace(ntk_trace=((), np.arange(12.0), {}), ntk_entropy=((), np.arange(12.0) ** 2, {}))
    assert "ntk/entropy against ntk/trace" in figures(data)
    other = trace(fisher_trace=((), np.ones(12), {}), loss_mean=((), np.ones(12), {}))
    assert "loss/mean against fisher/trace" in figures(other)
    (found,) = figure(data, "ntk/entropy against ntk/trace").data
    np.testing.assert_array_equal(found.y, np.arange(12.0) ** 2)
    np.testing.assert_allclose(found.marker.color, np.log10(1 + np.arange(12)))


def test_a_density_of_states_has_weights_at_temperatures():
    energy = np.arange(11.0)
    entropy = 30 - (energy - 5) ** 2 / 2
    data = xr.Dataset(
        {
            "entropy": ("energy", entropy),
            "entropy_standard_error": ("energy", np.full(11, 0.1)),
        },
        {"energy": energy},
    )
    found = density_of_states(data, "light")
    slider = found.layout.sliders[0]
    for step, bar in zip(slider.steps, found.data[1:], strict=True):
        weights = np.exp(entropy - energy / float(step.label))
        np.testing.assert_allclose(bar.y, weights / weights.sum(), atol=0.01)
        assert sum(step.args[0]["visible"]) == 2


def test_a_measure_says_how_it_is_seen(tmp_path):
    @nt.measure("seen/view", needs=["outputs"], dims=["thing"], view="distribution")
    def one(outputs):
        """Outputs."""
        return outputs.flatten()

    tracer = nt.Tracer(nt.Probe(torch.randn(5, 3)), ["seen/view"], to=tmp_path)
    for step in range(3):
        tracer(torch.nn.Linear(3, 2), step)
    assert "median" in scatters(figure(nt.open(tmp_path), "seen/view"))
    with pytest.raises(ValueError, match="expected a view of track"):
        nt.measure("seen/other", needs=["outputs"], view="cloud")


def test_kernels_of_classes_are_recorded_with_these(tmp_path):
    probe = nt.Probe(torch.randn(4, 3), torch.tensor([1, 0, 2, 0]))
    tracer = nt.Tracer(probe, ["ntk/gram"], to=tmp_path)
    tracer(torch.nn.Linear(3, 3), 0)
    assert nt.open(tmp_path)["ntk_gram"].attrs["classes"] == "1 0 2 0"


def test_arguments_that_are_wrong():
    data = trace(a_b=(("mode",), np.ones((12, 2)), {}))
    with pytest.raises(KeyError, match="the trace has no 'a/c'"):
        figure(data, "a/c")
    with pytest.raises(ValueError, match="expected a theme"):
        figure(data, "a/b", theme="blue")
    several = data.expand_dims(run=["x"])
    with pytest.raises(ValueError, match=r"data\.sel\(run='x'\)"):
        figure(several, "a/b")
    assert figures(several) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_seen_on_their_background(theme):
    """Contrasts above 3, as the guidelines for accessible content ask of graphics."""
    from nettrace.dashboard.style import COLOURS, template

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    layout = template(theme).layout
    for colour in (*COLOURS, layout.font.color):
        one, other = sorted([luminance(colour), luminance(layout.paper_bgcolor)])
        assert (other + 0.05) / (one + 0.05) > 3


def test_legends_have_room_for_their_rows():
    value = np.ones((12, 3))
    few, many = (
        figure(trace(ntk_spectrum=(("leading_mode",), value[:, :count], {})), "ntk/spectrum")
        for count in (1, 3)
    )
    long = trace(weights_norms=(("layer",), value, {"view": "lines"})).assign_coords(
        layer=[name * 30 for name in "abc"]
    )
    rows = figure(long, "weights/norms")
    heights = [one.layout.height for one in (few, many, rows)]
    assert np.diff(heights).tolist() == [20, 20]  # of one, two and three rows
    assert rows.layout.margin.t == few.layout.margin.t + 40


def test_what_stays_the_same_is_seen_at_its_value():
    found = figure(trace(weights_temperature=((), np.full(12, 0.003), {})), "weights/temperature")
    np.testing.assert_allclose(found.layout.yaxis.range, (0.0015, 0.0045))


def notes(found):
    return [one.text for one in found.layout.annotations]


def test_infinite_numbers_are_gaps_that_are_said():
    value = np.arange(12.0)
    value[4:6] = np.inf
    found = figure(trace(loss_mean=((), value, {})), "loss/mean")
    np.testing.assert_array_equal(found.data[0].y, np.where(np.isinf(value), np.nan, value))
    assert len(found.layout.shapes) == 1
    assert notes(found) == ["orange: infinite at 2 of 12 steps"]
    whole = figure(trace(loss_mean=((), np.full(12, np.inf), {})), "loss/mean")
    assert notes(whole) == ["infinite at all steps"]
    spectrum = np.ones((12, 3)) * [4, 2, 1]
    spectrum[3, 1] = np.inf
    found = figure(trace(ntk_spectrum=(("mode",), spectrum, {})), "ntk/spectrum")
    assert notes(found) == ["some are infinite at 1 of 12 steps, and left out"]


def test_medians_count_runs_that_diverge_and_say_how_many_are_left():
    value = np.arange(9.0)[:, None] * np.ones(20)
    value[0] = np.inf  # from the beginning
    value[1:5, 10:] = np.nan
    data = xr.Dataset(
        {"loss_mean": (("run", "step"), value, {"name": "loss/mean"})},
        {"run": [f"r{n}" for n in range(9)], "step": np.arange(20)},
    )
    found = figure(data, "loss/mean")
    median = scatters(found)["median, 10 to 90 % of 9 runs"].y
    np.testing.assert_array_equal(median[[0, 7, 12]], [5, 5, 7])
    assert notes(found) == [
        "at some steps up to 4 of these runs have no value",
        "infinite at some steps of 1 of 9 runs",
    ]


def test_two_runs_of_a_group_have_one_place_in_the_legend():
    data = xr.Dataset(
        {"loss_mean": (("run", "step"), np.ones((2, 4)), {"name": "loss/mean"})},
        {"run": ["a", "b"], "step": np.arange(4)},
    )
    found = figure(data, "loss/mean", groups={"a": "eta=1", "b": "eta=1"})
    assert [(one.name, one.showlegend) for one in found.data] == [("eta=1", True), ("eta=1", False)]


def test_complex_numbers_are_seen_by_their_parts():
    value = np.arange(12) * (1 - 2j)
    data = trace(a_b=((), np.ones(12), {}))
    data["a_b"] = ("step", value, data["a_b"].attrs)
    found = scatters(figure(data, "a/b"))
    np.testing.assert_array_equal(found["real part"].y, np.arange(12))
    np.testing.assert_array_equal(found["imaginary part"].y, -2 * np.arange(12))
    several = figure(data.expand_dims(run=["x"]), "a/b")
    np.testing.assert_allclose(several.data[0].y, np.abs(value))
    assert several.layout.yaxis.title.text == "modulus of a/b"
    several.to_json()


@pytest.mark.parametrize("size", [1e308, 5e-324])
@pytest.mark.parametrize("dims", [(), ("mode",)])
def test_numbers_that_no_browser_draws_are_said(size, dims):
    data = trace(a_b=(dims, np.full((12, 3)[: 1 + len(dims)], size), {}))
    (note,) = notes(figure(data, "a/b"))
    assert "cannot be drawn" in note


def test_rounding_is_not_seen():
    value = 26214.4 * (1 + 1e-13 * np.random.default_rng(0).normal(size=12))
    found = figure(trace(a_b=((), value, {})), "a/b")
    np.testing.assert_allclose(found.layout.yaxis.range, (13107.2, 39321.6))
    below = figure(trace(a_b=((), -value, {})), "a/b")
    np.testing.assert_allclose(below.layout.yaxis.range, (-39321.6, -13107.2))


def test_an_array_of_four_axes_is_a_matrix():
    value = np.random.default_rng(0).normal(size=(12, 3, 4, 5, 2))
    found = figure(trace(a_b=(("p", "q", "r", "s"), value, {})), "a/b")
    np.testing.assert_allclose(found.data[-1].z, value[-1].reshape(12, 10), rtol=1e-6)
    assert found.data[-1].y[1] == "1 2"
    assert (found.layout.yaxis.title.text, found.layout.xaxis.title.text) == ("p, q", "r, s")


def test_a_name_may_hold_against():
    data = trace(a_b=((), np.ones(12), {"name": "a/b against c/d"}))
    assert figures(data) == ["a/b against c/d"]
    assert len(figure(data, "a/b against c/d").data) == 1


def test_long_labels_are_shortened_where_they_begin():
    names = ["encoder." * 9 + str(n) for n in range(80)]
    data = trace(a_b=(("layer",), np.ones((12, 80)), {})).assign_coords(layer=names)
    axis = figure(data, "a/b").layout.yaxis
    assert len(axis.ticktext) <= 36
    assert max(map(len, axis.ticktext)) == 34
    assert all(
        full.endswith(short[3:]) for full, short in zip(axis.tickvals, axis.ticktext, strict=True)
    )


def test_text_cannot_turn_what_follows():
    found = figure(trace(a_b=((), np.ones(12), {"name": "a/\u202egpj"})), "a/\u202egpj")
    assert found.layout.title.text == "a/\\u202egpj"
