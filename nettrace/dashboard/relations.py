"""Figures of two quantities against each other, and of densities of states."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard.maps import axis_name
from nettrace.dashboard.style import (
    COLOURS,
    LOG_AXIS,
    SEQUENTIAL,
    Theme,
    doubts,
    escape,
    is_logarithmic,
    label,
    new,
    note,
    powers,
    say,
    say_doubts,
    scaled,
    seen,
    show_legend,
    slider,
    step_name,
)
from nettrace.record import ERROR

#: How many temperatures the slider of a density of states has.
_TEMPERATURES = 24
#: How many points a portrait has, at most.
_POINTS = 600


def variance_flatness(data: xr.Dataset, theme: Theme) -> go.Figure:
    """Variance of weights against flatness along the directions in which they fluctuate.

    At the last step that has both, with the exponent that was fitted: Feng and Tu 2021.
    """
    figure = new("Variance of weights against flatness", "by direction, at the last step", theme)
    flatness = data["weights_flatness"].values  # of the first directions, as it is dear
    variance = data["weights_variance"].values[:, : flatness.shape[1]]
    flatness = flatness[:, : variance.shape[1]]
    both = np.isfinite(variance) & np.isfinite(flatness) & (variance > 0) & (flatness > 0)
    rows = np.flatnonzero(both.any(1))
    if not len(rows):
        say(figure, "no step has both weights/variance and weights/flatness")
        return figure
    row = rows[-1]
    exponent = data.get("weights_flatness_exponent")
    said = {} if exponent is None else exponent.attrs
    modes = np.arange(both.shape[1])
    fitted = (modes >= said.get("first_mode", 0)) & (modes <= said.get("last_mode", len(modes)))
    for kept, name, symbol in (
        (both[row] & fitted, f"step {int(data['step'].values[row]):,}", "circle"),
        (both[row] & ~fitted, "not fitted", "circle-open"),
    ):
        if kept.any():
            figure.add_scatter(
                x=flatness[row, kept],
                y=variance[row, kept],
                mode="markers",
                name=name,
                marker={"size": 7, "color": COLOURS[0], "symbol": symbol},
                customdata=modes[kept],
                hovertemplate="mode %{customdata}: F = %{x:.3g}, variance %{y:.3g}<extra></extra>",
            )
    both[row] &= fitted
    if exponent is not None and np.isfinite(exponent.values[row]) and both[row].any():
        x, y = flatness[row, both[row]], variance[row, both[row]]
        psi, error = float(exponent.values[row]), data.get(f"{exponent.name}{ERROR}")
        ends = np.array([x.min(), x.max()])
        through = np.log(y).mean() + psi * np.log(x).mean()  # as least squares go
        name = f"fitted, psi = {psi:.2f}"
        figure.add_scatter(
            x=ends,
            y=np.exp(through) * ends**-psi,
            mode="lines",
            name=name + ("" if error is None else f" ± {float(error.values[row]):.2f}"),
            line={"color": COLOURS[1], "dash": "dash"},
        )
    if said.get("warning"):
        note(figure, said["warning"], said["warning"])
    show_legend(figure)
    figure.update_xaxes(title={"text": "flatness F"}, **LOG_AXIS)
    figure.update_yaxes(title={"text": "variance along the direction"}, **LOG_AXIS)
    return figure


def portrait(data: xr.Dataset, first: str, second: str, theme: Theme) -> go.Figure:
    """Two numbers against each other along the training, coloured by the step."""
    figure = new(f"{label(data, second)} against {label(data, first)}", "coloured by step", theme)
    x, y = (np.atleast_2d(data[name].values) for name in (first, second))
    steps = data["step"].values
    drawn = False
    for row, (a, b) in enumerate(zip(x, y, strict=True)):
        there = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
        if not len(there):
            continue
        there = there[np.unique(np.linspace(0, len(there) - 1, _POINTS).astype(int))]
        run = escape(data["run"].values[row]) if "run" in data[first].dims else ""
        figure.add_scatter(
            x=a[there],
            y=b[there],
            mode="lines+markers",
            name=run,
            line={"color": "rgba(128,128,128,0.5)", "width": 1},
            marker={
                "size": 6 if len(there) < 100 else 3,
                "color": np.log10(1 + steps[there]),
                "colorscale": SEQUENTIAL,
                "showscale": not drawn,
                "colorbar": _steps_bar(int(steps[-1])),
                "cmin": 0,
                "cmax": float(np.log10(1 + steps[-1])),
            },
            customdata=steps[there],
            hovertemplate="step %{customdata:,}: %{x:.4g}, %{y:.4g}<extra>" + run + "</extra>",
        )
        drawn = True
    if not drawn:
        say(figure, "no step has both quantities")
        return figure
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title={"text": label(data, first)}, **scaled(x))
    figure.update_yaxes(title={"text": label(data, second)}, **scaled(y))
    return figure


def density_of_states(found: xr.Dataset, theme: Theme) -> go.Figure:
    """The entropy of a density of states, and which energies count at a temperature, by a slider.

    Args:
        found: as `nettrace.landscape.density_of_states` gives it.
        theme: light or dark.
    """
    title, about = "Density of states", "S(E), nats; weights of energies at a temperature"
    return _density(found, new(title, about, theme))


def density(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """The density of states at the last step that has one, as `density_of_states` draws it."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, _, _ = found
    row = np.flatnonzero(np.isfinite(values).any(1))[-1]
    step = steps.steps[row]
    one = data.sel(step=step)
    axis = str(data[variable].dims[1])
    own = axis.removesuffix("_index") if axis not in one.coords else axis
    places = one[own if own in one.coords else axis]
    error = one[variable + ERROR].values if variable + ERROR in data else values[row] * np.nan
    result = xr.Dataset(
        {"entropy": (axis, values[row]), "entropy_standard_error": (axis, error)},
        {axis: (axis, places.values, {"name": axis_name(data, places.name)})},
    )
    said = doubts(data, variable)
    _density(result, figure, f", step {step_name(step, said)}")
    say_doubts(figure, np.array([step]), said)
    return figure


def _density(found: xr.Dataset, figure: go.Figure, at: str = "") -> go.Figure:
    (axis,) = found["entropy"].dims
    energy, entropy = found[axis].values.astype(float), found["entropy"].values
    there = np.isfinite(entropy)
    if there.sum() < 2:
        say(figure, "fewer than two energies were visited")
        return figure
    energy, entropy = energy[there], entropy[there]
    error = found["entropy_standard_error"].values[there]
    figure.add_scatter(
        x=energy,
        y=entropy,
        mode="lines+markers" if len(energy) < 60 else "lines",
        name=f"entropy S(E){at}",
        line={"color": COLOURS[0]},
        error_y={"array": np.where(np.isfinite(error), error, 0), "thickness": 1, "width": 0},
    )
    spread = float(np.ptp(energy))
    wide = is_logarithmic(energy)  # whose bins are even in its logarithm
    temperatures = np.geomspace(energy.min() if wide else spread / 200, spread, _TEMPERATURES)
    shown = _TEMPERATURES // 2
    for number, temperature in enumerate(temperatures):
        logs = entropy - energy / temperature
        weights = np.exp(logs - logs.max())
        share = {"x": energy, "y": weights / weights.sum(), "yaxis": "y2", "name": "share at T"}
        if wide:  # bars would be as wide as on an even axis
            line = {"color": COLOURS[1], "width": 1}
            figure.add_scatter(**share, fill="tozeroy", line=line, visible=number == shown)
            continue
        figure.add_bar(
            **share,
            marker={"color": COLOURS[1], "opacity": 0.55, "line": {"width": 0}},
            visible=number == shown,
        )
    figure.update_layout(
        height=440,
        sliders=[slider("temperature ", [f"{t:.3g}" for t in temperatures], shown, always=1)],
        xaxis={"title": {"text": axis_name(found, axis)}, **scaled(energy)},
        yaxis={"title": {"text": "entropy S(E) (nats)"}},
        yaxis2={
            **{"overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False},
            **{"title": {"text": "share of networks"}, "tickmode": "auto", "nticks": 6},
        },
    )
    show_legend(figure)
    return figure


def _steps_bar(last: int) -> dict[str, object]:
    ticks, texts = powers(last)
    return {
        **{"thickness": 12, "outlinewidth": 0, "tickfont": {"size": 10}},
        "tickvals": [float(np.log10(1 + tick)) for tick in ticks],
        "ticktext": texts,
        "title": {"text": "step", "font": {"size": 11}},
    }
