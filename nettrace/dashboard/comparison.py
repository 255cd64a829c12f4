"""Two steps of an array: spectra over each other, matrices side by side."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard import maps
from nettrace.dashboard.style import (
    COLOURS,
    DASHES,
    Theme,
    escape,
    label,
    new,
    scaled,
    show_legend,
)
from nettrace.dashboard.views import figure, variable_of, view

#: How arrays are seen that can be compared.
COMPARED = ("spectrum", "layers", "eigenvalues", "curves", "matrix")


def compare(
    data: xr.Dataset, name: str, first: int, second: int, *, theme: Theme = "light", rows: int = 1
) -> go.Figure:
    """An array at two steps.

    Args:
        data: as `nettrace.open` gives it, of one trace.
        name: of the quantity.
        first: a step; that next to it at which the quantity was recorded is shown.
        second: another.
        theme: "light" or "dark".
        rows: 1 to put matrices beside each other, 2 for one below the other.

    Raises:
        KeyError: if the trace has no such quantity.
        ValueError: if it is no array that can be compared, or was never recorded.
    """
    variable = variable_of(data, name)
    kind = view(data, variable)
    if kind not in COMPARED or "run" in data[variable].dims:
        raise ValueError(f"{name} cannot be compared at two steps: expected an array of one run")
    recorded = recorded_steps(data, variable)
    if not len(recorded):
        raise ValueError(f"{name} was recorded at no step")
    chosen = [int(recorded[abs(recorded - step).argmin()]) for step in (first, second)]
    pair = [data.sel(step=[step]) for step in chosen]
    if kind == "matrix":
        both = data.sel(step=sorted(set(chosen)))  # by the same colours
        return _matrices(figure(both, name, theme=theme), chosen, theme, rows)
    if kind == "curves":
        return maps.curves(data.sel(step=sorted(set(chosen))), variable, theme)
    return _lines(data, variable, pair, chosen, theme)


def recorded_steps(data: xr.Dataset, variable: str) -> np.ndarray:
    """The steps (S,) at which a quantity of one run was recorded."""
    values = data[variable].values
    found: np.ndarray = data["step"].values[np.isfinite(values).reshape(len(values), -1).any(1)]
    return found


def _lines(
    data: xr.Dataset, variable: str, pair: list[xr.Dataset], chosen: list[int], theme: Theme
) -> go.Figure:
    found = new(f"{label(data, variable)} at two steps", "", theme)
    dim = str(data[variable].dims[1])
    named = dim in data.coords
    values = [np.abs(one[variable].values[0]) for one in pair]
    if not np.iscomplexobj(data[variable]):
        values = [one[variable].values[0] for one in pair]
    places = [escape(text) for text in data[dim].values] if named else np.arange(len(values[0])) + 1
    for number, (row, step) in enumerate(zip(values, chosen, strict=True)):
        found.add_scatter(
            x=places,
            y=row,
            name=f"step {step:,}",
            mode="lines+markers" if len(row) <= 40 else "lines",
            line={"color": COLOURS[number], "dash": DASHES[number], "width": 2},
            hovertemplate="%{x}: %{y:.5g}<extra>step " + f"{step:,}</extra>",
        )
    show_legend(found)
    found.update_xaxes(title={"text": escape(dim.replace("_", " "))})
    found.update_yaxes(title={"text": label(data, variable)}, **scaled(np.concatenate(values)))
    if not named and len(values[0]) > 20:
        found.update_xaxes(type="log")
    return found


def _matrices(both: go.Figure, chosen: list[int], theme: Theme, rows: int) -> go.Figure:
    """Takes the stops of a slider apart: beside each other, or one below the other."""
    found = new("", "", theme)
    found.update_layout(title={"text": f"{both.layout.title.text}, two steps"})
    at = sorted(set(chosen))
    gap = 0.06 if rows == 1 else 0.1
    for number, step in enumerate(chosen):
        end = "2" if number else ""
        half = [0.5 + gap / 2, 1.0] if number else [0.0, 0.5 - gap / 2]
        one = go.Heatmap(both.data[at.index(step)])
        one.update(visible=True, showscale=not number, xaxis=f"x{end}", yaxis=f"y{end}")
        found.add_trace(one)
        x = {**both.layout.xaxis.to_plotly_json(), "anchor": f"y{end}"}
        y = {**both.layout.yaxis.to_plotly_json(), "anchor": f"x{end}"}
        x["title"] = {"text": f"step {step:,}"}
        if rows == 1:
            x["domain"] = half
            y["title"] = {"text": ""} if number else y["title"]
        else:
            y["domain"] = [1 - half[1], 1 - half[0]]
        if "scaleanchor" in y:
            y["scaleanchor"] = f"x{end}"
        found.update_layout({f"xaxis{end}": x, f"yaxis{end}": y})
    found.update_layout(height=470 if rows == 1 else 760)
    return found
