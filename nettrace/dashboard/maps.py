"""Maps and curves of arrays: spectra and layers along steps, matrices and curves by step."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard.style import (
    DIVERGING,
    SEQUENTIAL,
    Array,
    Steps,
    Theme,
    compact,
    doubts,
    escape,
    is_logarithmic,
    label,
    mark_absent,
    parts,
    say_doubts,
    scale,
    scaled,
    seen,
    show_legend,
    slider,
    step_name,
)
from nettrace.record import ERROR

#: What maps say of themselves, whose z are logarithms to base 10.
LOGARITHMIC = "log10"
#: How many columns and rows a map has, at most.
_COLUMNS, _ROWS = 400, 300
#: How long labels are, at most, and how many there are of those that are shortened.
_LONG, _LABELS = 34, 36
#: How many steps a slider has, how large its matrices are, and how many curves are in a figure.
_STOPS, _SIDE, _CURVES = 16, 128, 7
#: How many errors a curve has, from where on it has not all of them.
_BARS = 12


def spectrum(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A spectrum along steps, by colour; by its logarithm where it is positive and wide."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, gone, why = found
    spaced = np.geomspace if _is_of_modes(data[variable].dims[1]) else np.linspace
    modes = np.unique(spaced(1, values.shape[1], _ROWS).astype(int)) - 1
    _add_map(figure, steps, values[:, modes], modes + 1, data, variable)
    figure.update_yaxes(title={"text": _axis(data, variable)}, autorange="reversed")
    if len(modes) > 20 and _is_of_modes(data[variable].dims[1]):
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    mark_absent(figure, steps, gone, why)
    return figure


def layers(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A number for each layer, or whatever has names, along steps, by colour."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, gone, why = found
    names = _names(data, variable, 0)
    _add_map(figure, steps, values, names, data, variable)
    figure.update_yaxes(
        title={"text": _axis(data, variable)}, autorange="reversed", type="category"
    )
    figure.update_layout(height=max(260, min(900, 150 + 22 * len(names))))
    if max(map(len, names)) > _LONG:  # some, shortened where they begin, which many share
        some = names[:: math.ceil(len(names) / _LABELS)]
        short = [n if len(n) <= _LONG else "..." + n[3 - _LONG :] for n in some]
        figure.update_yaxes(tickvals=some, ticktext=short)
    mark_absent(figure, steps, gone, why)
    say_doubts(figure, steps.steps[~gone], doubts(data, variable))
    return figure


def matrix(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A matrix at up to 16 steps, with a slider; samples in the order of their classes."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, _, _ = found
    dims = data[variable].dims[1:]
    shape = values.shape[1:]
    half = (len(dims) + 1) // 2
    down, across = list(range(half)), list(range(half, len(dims)))
    if len(dims) == 4 and shape[:2] == shape[2:]:
        # (sample, output) by (sample, output): summed over equal outputs
        values = np.einsum("tncmc->tnm", values)
        title = label(data, variable)
        figure.update_layout(title={"text": f"{title}, summed over equal outputs"})
        down, across = [0], [2]
    values = values.reshape(len(values), math.prod(shape[n] for n in down), -1)
    rows, columns = (
        [" ".join(one) for one in product(*(_names(data, variable, n) for n in axes))]
        for axes in (down, across)
    )
    if order := _by_class(data, variable, values.shape):
        values = values[:, order][:, :, order]
        rows = columns = [str(i) for i in range(len(order))]
    values, rows, columns = _smaller(values, rows, columns)
    there = np.isfinite(values).any((1, 2))
    values, at = values[there], steps.steps[there]
    stops = np.unique(np.linspace(0, len(at) - 1, _STOPS).round().astype(int))
    said = doubts(data, variable)
    logarithmic = is_logarithmic(values)
    shown = np.log10(values) if logarithmic else values
    scale_of_colours = colours(shown, logarithmic)
    for stop in stops:
        figure.add_heatmap(
            z=compact(shown[stop]),
            x=columns,
            y=rows,
            **scale_of_colours,
            visible=bool(stop == stops[-1]),
            hovertemplate="%{y}, %{x}: "
            + ("10^%{z:.3f}" if logarithmic else "%{z:.4g}")
            + "<extra></extra>",
        )
    figure.update_layout(
        height=470,
        sliders=[slider("step ", [step_name(at[stop], said) for stop in stops], len(stops) - 1)]
        if len(stops) > 1 or said
        else [],
        xaxis={
            "type": "category",
            "constrain": "domain",
            "title": {"text": ", ".join(axis_name(data, dims[n]) for n in across)},
        },
        yaxis={
            "type": "category",
            "autorange": "reversed",
            "title": {"text": ", ".join(axis_name(data, dims[n]) for n in down)},
        },
    )
    if values.shape[1] == values.shape[2]:
        figure.update_yaxes(scaleanchor="x", constrain="domain")
    for axis, names in (("xaxis", columns), ("yaxis", rows)):
        if len(names) > 24:
            figure.update_layout({axis: {"showticklabels": False, "ticks": ""}})
    return figure


def curves(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A curve at some steps, coloured by the step."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, _, _ = found
    kept = np.isin(data["step"].values, steps.steps)
    places, title = _places(data, variable, kept, values.shape)
    errors = data[variable + ERROR].values[kept] if variable + ERROR in data else None
    there = np.flatnonzero(np.isfinite(values).any(1))
    chosen = there[np.unique(np.linspace(0, len(there) - 1, _CURVES).round().astype(int))]
    colours = _sampled(len(chosen))
    said = doubts(data, variable)
    for colour, row in zip(colours, chosen, strict=True):
        figure.add_scatter(
            x=places[row],
            y=values[row],
            name=f"step {steps.steps[row]:,}" + " (?)" * (int(steps.steps[row]) in said),
            mode="lines+markers" if _has_single(values[row]) else "lines",
            line={"color": colour, "width": 2},
            marker={"size": 4},
            error_y=None if errors is None else _bars(errors[row]),
        )
    show_legend(figure)
    say_doubts(figure, steps.steps[chosen], said)
    figure.update_xaxes(title={"text": title}, **scaled(places))
    scale(figure, data, variable, values)
    return figure


def _add_map(
    figure: go.Figure,
    steps: Steps,
    values: Array,
    rows: Array | list[str],
    data: xr.Dataset,
    variable: str,
) -> None:
    """Adds values (S, K) as a map; columns are means over ranges of steps, if these are many."""
    ranges = parts(len(values), _COLUMNS)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(values)
        counts = np.stack([known[part].sum(0) for part in ranges])
        sums = np.stack([np.where(known[part], values[part], 0).sum(0) for part in ranges])
        values = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    places = np.array([steps.places[part].mean() for part in ranges])
    logarithmic = is_logarithmic(np.where(values > 0, values, np.nan)) and bool(
        np.nanmin(values) > -1e-6 * np.nanmax(values)
    )
    if logarithmic:
        with np.errstate(invalid="ignore", divide="ignore"):
            least = 1e-12 * np.nanmax(values)
            shown = np.log10(np.where(values > least, values, np.nan))
    else:
        shown = values
    figure.add_heatmap(
        z=compact(shown.T),
        x=places,
        y=rows,
        **colours(shown, logarithmic),
        hovertemplate=("step + 1 = " if steps.logarithmic else "step ")
        + "%{x:,.0f}, %{y}: "
        + ("10^%{z:.3f}" if logarithmic else "%{z:.4g}")
        + "<extra></extra>",
    )
    figure.update_layout(xaxis=steps.axis)


def colours(shown: Array, logarithmic: bool) -> dict[str, Any]:
    """By which colours a map shows some numbers, or their logarithms to base 10."""
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    signed = low < 0 < high and not logarithmic
    bound = max(-low, high)
    return {
        "zmin": -bound if signed else low,
        "zmax": bound if signed else high,
        "colorscale": DIVERGING if signed else SEQUENTIAL,
        "colorbar": _colorbar(low, high, logarithmic),
        "meta": LOGARITHMIC if logarithmic else None,
    }


def _colorbar(low: float, high: float, logarithmic: bool) -> dict[str, object]:
    """The scale beside a map of values from one to another, or of their logarithms to base 10."""
    found: dict[str, object] = {"thickness": 12, "outlinewidth": 0, "tickfont": {"size": 10}}
    if logarithmic:
        gap = max(1, math.ceil((high - low) / 6))
        ticks = range(math.ceil(low), math.floor(high) + 1, gap)
        found |= {"tickvals": list(ticks), "ticktext": [f"10<sup>{t}</sup>" for t in ticks]}
        if not len(ticks):
            found = {**found, "tickvals": [low, high], "ticktext": _powers(low, high)}
    return found


def _powers(*logs: float) -> list[str]:
    return [f"{10**log:.3g}" for log in logs]


def _is_of_modes(dim: object) -> bool:
    """Whether the first of an axis matter most, as modes by their size do."""
    return "mode" in str(dim)


def _names(data: xr.Dataset, variable: str, axis: int) -> list[str]:
    """The labels along an axis after that of steps, made different from each other."""
    dim = str(data[variable].dims[1 + axis])
    if dim in data.coords:
        return [escape(name) for name in data[dim].values]
    first = 0 if dim.startswith("class") else 1  # as targets number them
    return [str(i + first) for i in range(data.sizes[dim])]


def _by_class(data: xr.Dataset, variable: str, shape: tuple[int, ...]) -> list[int]:
    """The order of samples by class, if the trace knows classes and it is a matrix of samples."""
    classes = str(data[variable].attrs.get("classes", "")).split()
    if len(classes) != shape[1] or shape[1] != shape[2]:
        return []
    return sorted(range(len(classes)), key=lambda n: int(classes[n]))


def _smaller(
    values: Array, rows: list[str], columns: list[str]
) -> tuple[Array, list[str], list[str]]:
    """Means over blocks of matrices that are larger than can be seen."""
    for axis, names in ((1, rows), (2, columns)):
        if values.shape[axis] <= _SIDE:
            continue
        edges = np.linspace(0, values.shape[axis], _SIDE + 1).astype(int)[:-1]
        counts = np.diff(np.append(edges, values.shape[axis]))
        shape = [1, 1, 1]
        shape[axis] = _SIDE
        values = np.add.reduceat(values, edges, axis=axis) / counts.reshape(shape)
        names[:] = [names[edge] for edge in edges]
    return values, rows, columns


def _places(
    data: xr.Dataset, variable: str, kept: Array, shape: tuple[int, ...]
) -> tuple[Array, str]:
    """Where the points of curves lie, (S, K), and what that is."""
    if variable + "_at" in data:  # where a density is told
        return data[variable + "_at"].values[kept], label(data, variable + "_at")
    dim = str(data[variable].dims[1])
    own = dim.removesuffix("_index")
    if own != dim and own in data.coords:  # another at each step
        return data[own].values[kept], axis_name(data, own)
    if dim in data.coords:
        texts = [str(name) for name in data[dim].values]
        with np.errstate(invalid="ignore"):
            try:
                return np.broadcast_to(np.array(texts, float), shape), axis_name(data, dim)
            except ValueError:
                pass
    return np.broadcast_to(np.arange(1.0, shape[1] + 1), shape), axis_name(data, dim)


def _axis(data: xr.Dataset, variable: str) -> str:
    return axis_name(data, data[variable].dims[1])


def axis_name(data: xr.Dataset, dim: object) -> str:
    """What an axis is called: as its labels say, or else by its dimension."""
    said = str(data[dim].attrs.get("name", dim) if dim in data.coords else dim)
    for variable in data.data_vars:  # one of the same name and another length has that of its own
        said = said.removesuffix(f"_{variable}")
    return escape(said.removesuffix("_2").replace("_", " "))


def _bars(errors: Array) -> dict[str, object]:
    """Errors (K,) as bars; of many, some."""
    some = np.arange(len(errors)) % max(1, len(errors) // _BARS) == 0
    known = some & np.isfinite(errors)
    return {"array": np.where(known, errors, 0.0), "thickness": 1, "width": 0}


def _has_single(values: Array) -> bool:
    """Whether a point (K,) has no neighbour, so that no line shows it."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return bool((known[1:-1] & ~known[2:] & ~known[:-2]).any())


def _sampled(count: int) -> list[str]:
    from plotly.colors import sample_colorscale

    # Both ends of the scale are hard to see, on black or on white.
    return list(sample_colorscale("Viridis", np.linspace(0.25, 0.85, max(count, 1)).tolist()))
