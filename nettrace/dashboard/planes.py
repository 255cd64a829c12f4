"""Functions on a plane, such as the loss around a network, at some steps."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard.maps import axis_name, colours
from nettrace.dashboard.style import (
    COLOURS,
    Array,
    Theme,
    compact,
    doubts,
    is_logarithmic,
    seen,
    slider,
    step_name,
)

#: How many steps the slider has, and how many contours there are, about.
_STOPS, _CONTOURS = 16, 14


def plane(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A function (S, X, Y) of two places at up to 16 steps, by contours, with a slider.

    Where it is positive and wide, by its logarithm. The origin is marked where it lies within, and
    a trajectory drawn of which there are the coordinates, "..._trajectory" (S, T, 2).
    """
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, _, _ = found
    kept = np.flatnonzero(np.isfinite(values).any((1, 2)))
    stops = kept[np.unique(np.linspace(0, len(kept) - 1, _STOPS).round().astype(int))]
    logarithmic = is_logarithmic(values[stops])
    shown = np.log10(values) if logarithmic else values
    low, high = float(np.nanmin(shown[stops])), float(np.nanmax(shown[stops]))
    scale_of_colours = colours(shown[stops], logarithmic)
    gap = _round((high - low) / _CONTOURS)
    said = doubts(data, variable)
    names, visible = [], []
    for stop in stops:
        step = steps.steps[stop]
        last = bool(stop == stops[-1])
        x, y = (_places(data, variable, axis, step) for axis in (1, 2))
        figure.add_contour(
            z=compact(shown[stop].T),
            x=x,
            y=y,
            **scale_of_colours,
            autocontour=False,
            contours={"start": np.ceil(low / gap) * gap, "end": high, "size": gap},
            line={"width": 0.5, "color": "rgba(255,255,255,0.45)"},
            visible=last,
            hovertemplate="%{x:.4g}, %{y:.4g}: "
            + ("10^%{z:.3f}" if logarithmic else "%{z:.4g}")
            + "<extra></extra>",
        )
        names.append(step_name(step, said))
        visible.append(stop)
        visible += [stop] * _mark(figure, data, variable, step, (x, y), last)
    figure.update_layout(height=470, showlegend=False)
    if len(stops) > 1 or said:  # of one step, it says that it is doubtful
        figure.update_layout(sliders=[slider("step ", names, len(names) - 1)])
        for stop, one in zip(stops, figure.layout.sliders[0].steps, strict=True):
            one.args = ({"visible": [bool(of == stop) for of in visible]},)
    for number, update in ((1, figure.update_xaxes), (2, figure.update_yaxes)):
        dim = str(data[variable].dims[number]).removesuffix("_index")
        update(title={"text": axis_name(data, dim)}, showgrid=False, zeroline=False)
    return figure


def _round(gap: float) -> float:
    """A gap between contours of one digit: 1, 2 or 5."""
    if not gap > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(gap))
    return float(power * min((1, 2, 5, 10), key=lambda digit: abs(digit - gap / power)))


def _mark(
    figure: go.Figure,
    data: xr.Dataset,
    variable: str,
    step: int,
    places: tuple[Array, Array],
    visible: bool,
) -> int:
    """Marks the origin, and the trajectory if there is one; gives how many traces that took."""
    count = 0
    one = data.sel(step=step)
    path = one.coords.get(str(data[variable].dims[1]).removesuffix("_index")[:-1] + "trajectory")
    if path is not None and np.isfinite(path.values).all(1).any():
        at = path.values[np.isfinite(path.values).all(1)]
        figure.add_scatter(
            x=at[:, 0],
            y=at[:, 1],
            mode="lines+markers",
            name="trajectory",
            line={"color": COLOURS[1], "width": 1.5},
            marker={"size": 4},
            visible=visible,
            hovertemplate="%{x:.4g}, %{y:.4g}<extra>trajectory</extra>",
        )
        count += 1
    if all(np.nanmin(at) <= 0 <= np.nanmax(at) for at in places):
        figure.add_scatter(
            x=[0.0],
            y=[0.0],
            mode="markers",
            name="the network",
            marker={"symbol": "x", "size": 9, "color": "#FFFFFF", "line": {"width": 1.5}},
            visible=visible,
            hovertemplate="the network itself<extra></extra>",
        )
        count += 1
    return count


def _places(data: xr.Dataset, variable: str, axis: int, step: int) -> Array:
    """(X,) along an axis at a step."""
    dim = str(data[variable].dims[axis])
    own = dim if dim in data.coords else dim.removesuffix("_index")
    if own not in data.coords:
        return np.arange(1.0, data.sizes[dim] + 1)
    found = data[own].sel(step=step) if "step" in data[own].dims else data[own]
    return np.asarray(found.values, float)
