"""Curves along steps: of numbers, of several runs, of leading eigenvalues, of distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard.style import (
    COLOURS,
    DASHES,
    MOST,
    Array,
    Steps,
    Theme,
    absent,
    doubts,
    envelope,
    escape,
    label,
    mark_absent,
    mark_infinite,
    new,
    note,
    say_absent,
    say_doubts,
    scale,
    seen,
    short_label,
    show_legend,
)
from nettrace.record import ERROR

#: How many runs have a curve each; of more, quantiles are drawn.
_FEW = 6
#: How many points are marked, rather than joined alone.
_MARKED = 40


def track(
    data: xr.Dataset, variable: str, theme: Theme, groups: Mapping[str, str] | None = None
) -> go.Figure:
    """A number along steps with its standard error, or of several runs.

    Few runs have a curve each; of more, and of those that `groups` puts together, the median is
    drawn with a band from the 10 % to the 90 % quantile. More than 2,000 steps are drawn as the
    mean of ranges, with a band from the least value in them to the largest.
    """
    figure = new(label(data, variable), data[variable].attrs.get("convention", ""), theme)
    values = data[variable].values
    if "run" in data[variable].dims:
        values = np.abs(values) if np.iscomplexobj(values) else values
        _several(figure, data, variable, values, groups)
    else:
        _one(figure, data, variable, values)
        if warning := data[variable].attrs.get("warning"):
            note(figure, warning, warning)
    parts = [values.real, values.imag] if np.iscomplexobj(values) else [values]
    scale(figure, data, variable, np.concatenate(parts))
    if np.iscomplexobj(data[variable]) and "run" in data[variable].dims:
        figure.update_yaxes(title={"text": f"modulus of {short_label(data, variable)}"})
    return figure


def eigenvalues(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """Some eigenvalues along steps, and 2 / eta, above which gradient descent is unstable."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, gone, why = found
    dim = str(data[variable].dims[1])
    for mode in range(min(values.shape[1], 10)):
        name = f"{escape(data[dim].values[mode])}" if dim in data.coords else f"number {mode + 1}"
        curve(figure, steps, values[:, mode], name, mode)
    edge = _edge(data, variable)
    if edge is not None:
        at = np.isin(data["step"].values, steps.steps)
        curve(figure, steps, edge[at], "2 / eta", None)
    mark_absent(figure, steps, gone, why)
    say_doubts(figure, steps.steps[~gone], doubts(data, variable))
    return _with_axes(figure, data, variable, steps, values)


def lines(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """A number for each layer, or whatever has names, along steps: a curve each."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, gone, why = found
    kept = np.isin(data["step"].values, steps.steps)
    errors = data[variable + ERROR].values[kept] if variable + ERROR in data else None
    for number, name in enumerate(data[data[variable].dims[1]].values):
        if errors is not None and len(errors) <= MOST:
            low, high = (values[:, number] + sign * errors[:, number] for sign in (-1, 1))
            colour = COLOURS[number % len(COLOURS)]
            band(figure, steps, low, high, colour, 0.2, "standard error", of=escape(name))
        curve(figure, steps, values[:, number], escape(name), number)
    mark_absent(figure, steps, gone, why)
    say_doubts(figure, steps.steps[~gone], doubts(data, variable))
    return _with_axes(figure, data, variable, steps, values)


def distribution(data: xr.Dataset, variable: str, theme: Theme) -> go.Figure:
    """How many numbers lie along steps: their median, quartiles, and extremes."""
    found = seen(data, variable, theme)
    if isinstance(found, go.Figure):
        return found
    figure, steps, values, gone, why = found
    values = values.reshape(len(values), -1)
    there = np.isfinite(values).any(1)
    quantiles = np.full((5, len(values)), np.nan)
    quantiles[:, there] = np.nanquantile(values[there], (0, 0.25, 0.5, 0.75, 1), axis=1)
    band(figure, steps, quantiles[0], quantiles[4], COLOURS[0], 0.15, "least to largest")
    band(figure, steps, quantiles[1], quantiles[3], COLOURS[0], 0.3, "quartiles")
    curve(figure, steps, quantiles[2], "median", 0)
    mark_absent(figure, steps, gone, why)
    mark_doubtful(figure, steps, quantiles[2], doubts(data, variable))
    return _with_axes(figure, data, variable, steps, quantiles)


def _with_axes(
    figure: go.Figure, data: xr.Dataset, variable: str, steps: Steps, values: Array
) -> go.Figure:
    """The figure of several curves with its axes and legend."""
    figure.update_layout(xaxis=steps.axis)
    show_legend(figure)
    scale(figure, data, variable, values)
    return figure


def curve(
    figure: go.Figure, steps: Steps, values: Array, name: str, number: int | None, size: float = 2
) -> None:
    """Adds a curve (S,); without a number it is a grey dashed one, for reference."""
    _, mean, _ = envelope(values)
    _, places, _ = envelope(steps.places.astype(float))
    _, at, _ = envelope(steps.steps.astype(float))
    one = 6 if number is None else number
    figure.add_scatter(
        x=places,
        y=mean,
        name=name,
        legendgroup=name,
        mode="lines+markers" if len(mean) <= _MARKED and number is not None else "lines",
        line={
            "color": COLOURS[one % len(COLOURS)],
            "width": size,
            "dash": "dash" if number is None else DASHES[one // len(COLOURS) % len(DASHES)],
        },
        marker={"size": 4},
        customdata=at,
        hovertemplate="step %{customdata:,.0f}: %{y:.5g}<extra>" + name + "</extra>",
    )


def band(
    figure: go.Figure,
    steps: Steps,
    low: Array,
    high: Array,
    colour: str,
    opacity: float,
    name: str = "",
    of: str = "",
) -> None:
    """Adds a band from one curve to another, in parts where either is not known.

    That of a curve is not in the legend, which hides both together.
    """
    low, high = envelope(low)[0], envelope(high)[2]
    _, places, _ = envelope(steps.places.astype(float))
    known = np.isfinite(low) & np.isfinite(high)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    filled = f"rgba({red},{green},{blue},{opacity})"
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], known, [0]]))).reshape(-1, 2)
    for number, (first, last) in enumerate(bounds):
        x, part = places[first:last], slice(first, last)
        alone = last - first == 1  # where a band has no width of its own
        figure.add_scatter(
            x=np.concatenate([x, x[::-1]]),
            y=np.concatenate([high[part], low[part][::-1]]),
            fill="toself",
            fillcolor=filled,
            line={"width": 9 if alone else 0, "color": filled},
            mode="lines",
            hoverinfo="skip",
            name=name,
            legendgroup=of or name,
            showlegend=not of and bool(name) and number == 0,
        )


def mark_doubtful(
    figure: go.Figure, steps: Steps, values: Array, doubtful: Mapping[int, str]
) -> None:
    """Puts rings around values (S,) that are doubtful, and says why."""
    there = np.isin(steps.steps, list(doubtful)) & np.isfinite(values)
    if there.any():
        figure.add_scatter(
            x=steps.places[there],
            y=values[there],
            name="doubtful",
            mode="markers",
            marker={"symbol": "circle-open", "size": 11, "color": COLOURS[1], "line": {"width": 2}},
            hoverinfo="skip",
            showlegend=False,
        )
        say_doubts(figure, steps.steps[np.isfinite(values)], doubtful)


def _one(figure: go.Figure, data: xr.Dataset, variable: str, values: Array) -> None:
    gone, why = absent(data, variable)
    if say_absent(figure, values, why):
        return
    infinite = np.isinf(values)
    kept = np.isfinite(values) | infinite | gone
    values = np.where(infinite, np.nan, values)[kept]
    steps = Steps.of(data["step"].values[kept])
    if np.iscomplexobj(values):
        curve(figure, steps, values.real, "real part", 0)
        curve(figure, steps, values.imag, "imaginary part", 1)
    else:
        if len(values) > MOST:
            band(figure, steps, values, values, COLOURS[0], 0.25, "least to largest")
        elif variable + ERROR in data:
            error = data[variable + ERROR].values[kept]
            low, high = values - error, values + error
            band(figure, steps, low, high, COLOURS[0], 0.25, "standard error")
        curve(figure, steps, values, label(data, variable), 0)
    mark_absent(figure, steps, gone[kept], why)
    mark_infinite(figure, steps, infinite[kept])
    mark_doubtful(figure, steps, values, doubts(data, variable))
    figure.update_layout(xaxis=steps.axis)
    if np.iscomplexobj(values):
        show_legend(figure)
    else:
        figure.update_layout(showlegend=False)


def _several(
    figure: go.Figure,
    data: xr.Dataset,
    variable: str,
    values: Array,
    groups: Mapping[str, str] | None,
) -> None:
    runs = [str(run) for run in data["run"].values]
    why = [reason for run in runs for reason in absent(data, variable, run)[1]]
    if say_absent(figure, values, why):
        return
    kept = np.isfinite(values).any(0)
    steps = Steps.of(data["step"].values[kept])
    having = [(n, run) for n, run in enumerate(runs) if not np.isnan(values[n]).all()]
    if groups is None and len(having) > _FEW:
        groups = dict.fromkeys(runs, "")
    members: dict[str, list[int]] = {
        escape(name): [] for name in dict.fromkeys((groups or {}).values())
    }
    for number, run in having:
        group = run if groups is None else groups.get(run, run)
        members.setdefault(escape(group), []).append(number)
    fewer = 0  # runs that the least known step has of those whose median is drawn
    for number, (name, rows) in enumerate((n, rows) for n, rows in members.items() if rows):
        found = values[np.array(rows)][:, kept]
        known = (~np.isnan(found)).sum(0)
        there = known * 2 >= len(rows)
        if len(rows) < 3 or not there.any():  # or runs that were measured at other steps each
            for place, row in zip(rows, found, strict=True):
                its = ~np.isnan(row)
                own = Steps(steps.steps[its], steps.logarithmic)
                finite = np.where(np.isfinite(row[its]), row[its], np.nan)
                curve(figure, own, finite, name or escape(runs[place]), number)
                figure.data[-1].showlegend = not name or place == rows[0]
            continue
        fewer = max(fewer, len(rows) - int(known.min()))
        own = Steps(steps.steps[there], steps.logarithmic)
        low, median, high = _quantiles(found[:, there], (0.1, 0.5, 0.9))
        colour = COLOURS[number % len(COLOURS)]
        start = f"{name}: " if name else ""
        called = f"{start}median, 10 to 90 % of {len(rows)} runs"
        band(figure, own, low, high, colour, 0.22, f"{start}10 to 90 %", of=called)
        curve(figure, own, median, called, number)
    if fewer:
        note(figure, f"at some steps up to {fewer} of these runs have no value")
    if infinite := int(np.isinf(values).any(1).sum()):
        note(figure, f"infinite at some steps of {infinite} of {len(runs)} runs")
    gone = sum(bool(absent(data, variable, run)[1]) for run in runs)
    if gone:
        note(figure, f"missing at some steps of {gone} of {len(runs)} runs")
    doubtful = sum(bool(doubts(data, variable, run)) for run in runs)
    if doubtful:
        note(figure, f"doubtful at some steps of {doubtful} of {len(runs)} runs")
    figure.update_layout(xaxis=steps.axis)
    show_legend(figure)


def _quantiles(values: Array, at: Sequence[float]) -> Array:
    """Quantiles (Q, S) of values (R, S) along the first axis, as `np.nanquantile` finds them.

    That takes a second for 30,000 steps; this sorts, which puts infinite ones at the ends and NaN
    last. Of quantiles that are infinite there is NaN, which is not drawn.
    """
    values = np.sort(values, axis=0)
    counts = (~np.isnan(values)).sum(0)
    places = np.array(at)[:, None] * (counts - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, counts - 1)
    columns = np.arange(values.shape[1])
    first, second, share = values[low, columns], values[high, columns], places - low
    with np.errstate(invalid="ignore"):
        found: Array = np.where(share > 0, first + (second - first) * share, first)
    return np.where(np.isfinite(found), found, np.nan)


def _edge(data: xr.Dataset, variable: str) -> Array | None:
    """2 / eta along steps, if the trace knows eta."""
    if variable != "hessian_eigenvalues" or "hessian_stability_gd" not in data:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = data[variable].values[:, 0] / data["hessian_stability_gd"].values
    return found
