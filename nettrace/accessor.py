"""What a data set that `nettrace.open` gives can do in a notebook, as `data.nt`.

Importing this module imports xarray, and registers the accessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from nettrace.summary import Quantity, said, summary

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: How many quantities a table shows, and how long its texts are, at most.
_ROWS, _TEXT = 200, 120
#: The size of a curve in a table, in pixels, and how many points it has, at most.
_WIDTH, _HEIGHT, _POINTS = 96, 18, 48


@xr.register_dataset_accessor("nt")  # type: ignore[no-untyped-call]
class Accessor:
    """`data.nt`: figures of a trace, and in a notebook a table of its quantities.

    Args:
        data: as `nettrace.open` gives it, of one trace or several.
    """

    def __init__(self, data: xr.Dataset) -> None:
        self._data = data

    def figures(self) -> list[str]:
        """The names of all figures, as `nettrace.dashboard.figures`.

        Raises:
            ImportError: if Plotly is missing.
        """
        from nettrace.dashboard import figures

        return figures(self._data)

    def plot(
        self,
        name: str | None = None,
        *,
        theme: Literal["light", "dark"] = "light",
        groups: Mapping[str, str] | None = None,
    ) -> go.Figure:
        """One figure, as `nettrace.dashboard.figure`.

        Args:
            name: of a quantity, such as "ntk/trace", or of two numbers, "ntk/entropy against
                ntk/trace"; by default the first of `figures` that is not of nettrace's own.
            theme: "light" or "dark".
            groups: by run, under which name it is put together with others.

        Raises:
            ImportError: if Plotly is missing.
            KeyError: if the trace has no such quantity.
            ValueError: as `nettrace.dashboard.figure`; or if nothing was recorded at all.
        """
        from nettrace.dashboard import figure

        if name is None:
            names = self.figures()
            if not names:
                raise ValueError("there is nothing to plot: the trace has no quantities")
            name = next((n for n in names if not n.startswith("nettrace/")), names[0])
        return figure(self._data, name, theme=theme, groups=groups)

    def __repr__(self) -> str:
        quantities = summary(self._data)
        sizes = ", ".join(f"{self._data.sizes.get(d, 0):,} {d}s" for d in self._counted())
        return f"<nettrace: {len(quantities)} quantities at {sizes}>"

    def _repr_html_(self) -> str:
        sizes = ", ".join(f"{self._data.sizes.get(d, 0):,} {d}s" for d in self._counted())
        quantities = summary(self._data)
        return f"<div>{len(quantities)} quantities at {sizes}</div>{table(quantities)}"

    def _counted(self) -> list[str]:
        return ["run", "step"] if "run" in self._data.dims else ["step"]


def table(quantities: Sequence[Quantity]) -> str:
    """An HTML table of quantities: what was last, and how it went; all texts are escaped.

    Args:
        quantities: as `summary` gives them; at most 200 are shown.
    """
    if not quantities:
        return "<div>nothing was recorded</div>"
    heads = ("quantity", "last value", "standard error", "units", "at step", "along steps", "")
    rows = [
        "<tr>" + "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in _cells(one)) + "</tr>"
        for one in quantities[:_ROWS]
    ]
    left = len(quantities) - _ROWS
    more = f"<div>and {left:,} more</div>" if left > 0 else ""
    head = "".join(f"<th style='{_CELL}'>{text}</th>" for text in heads)
    return (
        "<div style='overflow-x:auto'><table style='border-collapse:collapse'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}"
    )


_CELL = "text-align:left;padding:1px 10px 1px 0;vertical-align:middle;white-space:nowrap"


def _cells(one: Quantity) -> list[str]:
    value = "" if one.value is None else said(one.value)
    axes = ", ".join(f"{axis} {length}" for axis, length in one.axes.items())
    shape = " x ".join(map(str, one.axes.values()))
    error = "" if one.standard_error is None else f"± {one.standard_error:.2g}"
    missing = f"missing at {one.missing}" if one.missing else ""
    short = missing if len(missing) <= _TEXT else missing[: _TEXT - 4] + " ..."
    return [
        f"<span title='{escape(one.convention)}'>{escape(one.name)}</span>",
        f"<span title='{escape(axes)}' style='opacity:.7'>{shape}</span>" if axes else value,
        error,
        escape(one.units),
        "" if one.step is None else f"{one.step:,}",
        sparkline(one.track),
        f"<span title='{escape(missing)}' style='opacity:.7'>{escape(short)}</span>",
    ]


def sparkline(values: npt.NDArray[Any]) -> str:
    """A small curve (S,) as inline SVG, with gaps where values are not finite."""
    values = np.abs(values) if np.iscomplexobj(values) else np.asarray(values, float)
    if not np.isfinite(values).any():
        return ""
    # Of many steps, those between the ends are means over ranges of them.
    edges = np.linspace(0, len(values), min(len(values), _POINTS) + 1).astype(int)
    known = np.isfinite(values)
    counts = np.add.reduceat(known, edges[:-1])
    with np.errstate(invalid="ignore", over="ignore"):
        means = np.add.reduceat(np.where(known, values, 0), edges[:-1]) / counts
    finite = means[np.isfinite(means)]
    if not len(finite):  # of sums that overflow
        return ""
    low, high = float(finite.min()), float(finite.max())
    span = high - low
    x = np.linspace(2, _WIDTH - 2, len(means)) if len(means) > 1 else np.array([_WIDTH / 2])
    with np.errstate(invalid="ignore", over="ignore"):
        shares = (
            (means - low) / span if 0 < span < np.inf else np.where(means == means, 0.5, np.nan)
        )
    y = _HEIGHT - 2 - (_HEIGHT - 4) * shares
    there = np.isfinite(y)
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], there, [0]]))).reshape(-1, 2)
    drawn = []
    for first, last in bounds:
        points = " ".join(
            f"{a:.1f},{b:.1f}" for a, b in zip(x[first:last], y[first:last], strict=True)
        )
        if last - first == 1:
            drawn.append(f"<circle cx='{x[first]:.1f}' cy='{y[first]:.1f}' r='1.2'/>")
        else:
            drawn.append(f"<polyline points='{points}' fill='none' stroke='currentColor'/>")
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
        f"fill='currentColor' role='img' aria-label='{low:.3g} to {high:.3g}'>"
        f"{''.join(drawn)}</svg>"
    )
