"""The house style of figures: colours, axes, what is missing, and fewer points than there are."""

from __future__ import annotations

import html
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import xarray as xr

from nettrace.record import ERROR

Array: TypeAlias = npt.NDArray[Any]
Theme: TypeAlias = Literal["light", "dark"]
#: Hues of Okabe and Ito, which the colour-blind tell apart, at a lightness that is seen on white
#: and on black: contrasts with both are above 3.
COLOURS = ("#2F86C8", "#D9601A", "#0B9B70", "#B565A7", "#A88400", "#3A98A8", "#808080", "#A8506A")
#: Told apart in black and white too.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SEQUENTIAL = "Cividis"
DIVERGING = ((0.0, "#2F6FB0"), (0.5, "#F2F2F2"), (1.0, "#C8501A"))
#: The ratio of the largest to the smallest from which an axis is logarithmic.
_WIDE = 100
#: What turns text to the left.
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
#: Between which sizes numbers can be drawn.
_TINY, _HUGE = 1e-290, 1e290
#: Few ticks, of which Plotly else names nine in a decade.
LOG_AXIS = {"type": "log", "exponentformat": "power", "nticks": 6}
#: What axes of steps are called.
STEPS = "optimizer step"
#: The width of a narrow figure, and the height of a row of its legend, in pixels; and how many rows
#: there is room for.
_NARROW, _ROW, _ROWS = 290, 20, 10
#: How many places along steps a curve or a map has, at most.
MOST = 2000


def escape(text: object) -> str:
    """Text as figures show it: they take it for a kind of HTML, and for templates where they hover.

    Characters that turn the direction of what follows are spelt out.

    Quotes stay, whose entities figures do not know.
    """
    plain = _TURNS.sub(lambda turn: f"\\u{ord(turn[0]):04x}", str(text))
    return html.escape(plain, quote=False).replace("%{", "%&#123;")


def template(theme: Theme) -> go.layout.Template:
    """Backgrounds, text and grids of a theme; what lies on them is the same in both."""
    text, paper, plot, grid = {
        "light": ("#22262B", "#FFFFFF", "#FFFFFF", "#E4E7EB"),
        "dark": ("#DDE1E6", "#16191D", "#16191D", "#2C3138"),
    }[theme]
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": grid,
        "automargin": True,
        "title": {"standoff": 6, "font": {"size": 12}},
    }
    return go.layout.Template(
        layout={
            "font": {
                "family": "system-ui, Helvetica, Arial, sans-serif",
                "size": 12,
                "color": text,
            },
            "paper_bgcolor": paper,
            "plot_bgcolor": plot,
            "colorway": COLOURS,
            "xaxis": axis,
            "yaxis": axis,
            "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
            "margin": {"l": 12, "r": 12, "t": 64, "b": 12},
            "hoverlabel": {"bgcolor": paper, "font": {"color": text}},
            "legend": {
                **{"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
                "tracegroupgap": 0,
            },
            "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
        }
    )


def new(title: str, about: str, theme: Theme) -> go.Figure:
    """An empty figure with a title, and a line or two below it."""
    lines = textwrap.wrap(about, 68)
    if len(lines) > 2:
        lines = [lines[0], textwrap.shorten(" ".join(lines[1:]), 68, placeholder=" ...")]
    subtitle = "<br>".join(map(escape, lines))
    figure = go.Figure(layout={"template": template(theme), "height": 380})
    figure.update_layout(
        title={
            "text": title,
            "subtitle": {"text": subtitle, "font": {"size": 11}},
            "yref": "container",
            "y": 0.98,
            "yanchor": "top",
        },
        margin={"t": 58 + 15 * len(lines)},
    )
    return figure


@dataclass(frozen=True)
class Steps:
    """Where steps lie on a horizontal axis: evenly, or by ln(1 + step) if they lie so themselves.

    Args:
        steps: (S,) ascending.
        logarithmic: whether distances grow along the steps.
    """

    steps: Array
    logarithmic: bool

    @classmethod
    def of(cls, steps: Array) -> Steps:
        """The axis for some steps."""
        gaps = np.diff(steps)
        wide = len(gaps) > 4 and gaps[-len(gaps) // 4 :].mean() > 8 * gaps[: len(gaps) // 4].mean()
        return cls(steps, bool(wide))

    @property
    def places(self) -> Array:
        """(S,) on the axis."""
        return self.steps + 1 if self.logarithmic else self.steps

    @property
    def axis(self) -> dict[str, Any]:
        """What Plotly is told of it."""
        if len(self.steps) == 1:
            return {"title": {"text": STEPS}, "tickvals": self.steps, "tickformat": ",d"}
        if not self.logarithmic:
            return {"title": {"text": STEPS}}
        ticks, texts = powers(int(self.steps[-1]))
        return {
            "title": {"text": f"{STEPS} (logarithmic)"},
            "type": "log",
            "tickvals": [tick + 1 for tick in ticks],
            "ticktext": texts,
        }


def powers(last: int) -> tuple[list[int], list[str]]:
    """Zero and powers of ten up to a step, about seven, and how they are written."""
    most = len(str(last)) - 1
    gap = math.ceil((most + 1) / 7)
    ticks = [0, *(10**k for k in range(0, most + 1, gap))]
    return ticks, [f"10<sup>{len(str(t)) - 1}</sup>" if t >= 10**6 else f"{t:,}" for t in ticks]


def label(data: xr.Dataset, variable: str) -> str:
    """The quantity's name and units, as Plotly takes text, which it reads as HTML."""
    attributes = data[variable].attrs
    units = attributes.get("units", "")
    name = str(attributes.get("name", variable)).removeprefix("landscape/")  # long enough without
    return escape(name + (f" ({units})" if units else ""))


def short_label(data: xr.Dataset, variable: str) -> str:
    """The label without what titles say: of names of three parts and more, the last."""
    name, units = (str(data[variable].attrs.get(key, "")) for key in ("name", "units"))
    if name.count("/") < 2:
        return label(data, variable)
    return escape(name.rpartition("/")[2] + (f" ({units})" if units else ""))


def is_logarithmic(values: Array) -> bool:
    """Whether numbers are positive and so far apart that they are seen by their logarithms."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() / _WIDE >= finite.min())


def scaled(values: Array) -> dict[str, Any]:
    """What the axis of some numbers is told: to be logarithmic if they are far apart."""
    return LOG_AXIS if is_logarithmic(values) else {}


def absent(data: xr.Dataset, variable: str, run: str = "") -> tuple[Array, list[str]]:
    """At which steps (S,) a quantity was to be recorded but is missing, and why."""
    said = json.loads(data[variable].attrs.get("missing", "{}"))
    said = said.get(run, {}) if "run" in data[variable].dims else said
    steps = data["step"].values
    found = np.zeros(len(steps), bool)
    for span in said:
        first, _, last = str(span).partition("..")
        found |= (steps >= int(first)) & (steps <= int(last or first))
    return found, [f"{span}: {reason}" for span, reason in said.items()]


def mark_absent(figure: go.Figure, steps: Steps, gone: Array, why: Sequence[str]) -> None:
    """Shades the steps (S,) at which a quantity is missing, and says why."""
    if gone.any():
        _shade(figure, steps, gone, "#808080")
        text = f"grey: missing at {gone.sum():,} of {len(gone):,} steps. {why[0]}"
        note(figure, text, "; ".join(why))


def mark_infinite(figure: go.Figure, steps: Steps, infinite: Array) -> None:
    """Shades the steps (S,) at which a quantity is infinite."""
    if infinite.any():
        _shade(figure, steps, infinite, COLOURS[1])
        note(figure, f"orange: infinite at {infinite.sum():,} of {len(infinite):,} steps")


def _shade(figure: go.Figure, steps: Steps, at: Array, colour: str) -> None:
    places = steps.places.astype(float)
    edges = np.concatenate([places[:1], (places[1:] + places[:-1]) / 2, places[-1:]])
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], at, [0]]))).reshape(-1, 2)
    for first, last in bounds[:100]:
        figure.add_vrect(
            x0=edges[first], x1=edges[last], fillcolor=colour, opacity=0.22, line_width=0
        )


def doubts(data: xr.Dataset, variable: str, run: str = "") -> dict[int, str]:
    """By step, what makes a value doubtful that is there."""
    said = json.loads(data[variable].attrs.get("doubts", "{}"))
    said = said.get(run, {}) if "run" in data[variable].dims else said
    return {int(step): str(text) for step, text in said.items()}


def step_name(step: int, doubtful: Mapping[int, str]) -> str:
    """What a step is called in legends and on sliders."""
    return f"{step:,} (doubtful)" if int(step) in doubtful else f"{step:,}"


def say_doubts(figure: go.Figure, steps: Array, doubtful: Mapping[int, str]) -> None:
    """Writes which of the steps (S,) that are drawn are doubtful, and why."""
    found = {int(step): doubtful[int(step)] for step in steps if int(step) in doubtful}
    if found:
        first = next(iter(found.values()))
        text = f"doubtful at {len(found):,} of {len(steps):,} steps. {first}"
        why = "; ".join(f"{step:,}: {said}" for step, said in found.items())
        short = textwrap.shorten(text, 56, placeholder=" ...")  # what a telephone has room for
        note(figure, short, why)


def say_absent(figure: go.Figure, values: Array, why: Sequence[str]) -> bool:
    """Writes that there is nothing to show of some values, and why, if that is so."""
    finite = values[np.isfinite(values)]
    if finite.size:
        largest = float(np.abs(finite).max())
        if largest and not _TINY < largest < _HUGE:
            say(figure, f"numbers of the size of {largest:.3g} cannot be drawn")
            return True
        return False
    if np.isinf(values).any():
        say(figure, "infinite at all steps" if not why else f"infinite, or missing. {why[0]}")
    else:
        say(figure, f"missing at all steps. {why[0]}" if why else "nothing was recorded")
    return True


def say(figure: go.Figure, text: str) -> None:
    """Writes in the middle of a figure that has nothing to show why that is so."""
    figure.add_annotation(
        text="<br>".join(escape(line) for line in textwrap.wrap(text, 52)[:8]),
        showarrow=False,
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
    )
    figure.update_layout(xaxis={"visible": False}, yaxis={"visible": False})


def compact(values: Array) -> Array:
    """Numbers in single precision, if that holds them."""
    sizes = np.abs(values[np.isfinite(values)])
    return values.astype(np.float32) if not sizes.size or sizes.max() < 1e38 else values


def parts(count: int, most: int = MOST) -> list[slice]:
    """Ranges of so many points, of which a figure draws one each: at most `most`."""
    edges = np.linspace(0, count, min(count, most) + 1).astype(int)
    return [slice(a, b) for a, b in pairwise(edges)]


def envelope(values: Array, most: int = MOST) -> tuple[Array, Array, Array]:
    """Least, mean and largest (M,) of values (S,) in each of at most `most` ranges; NaN of none."""
    if len(values) <= most:
        return values, values, values
    edges = np.linspace(0, len(values), most + 1).astype(int)[:-1]
    known = np.isfinite(values)
    counts = np.add.reduceat(known, edges)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges)
    with np.errstate(invalid="ignore"):
        mean = sums / counts
    least = np.minimum.reduceat(np.where(known, values, np.inf), edges)
    most_ = np.maximum.reduceat(np.where(known, values, -np.inf), edges)
    return np.where(counts, least, np.nan), mean, np.where(counts, most_, np.nan)


def seen(
    data: xr.Dataset, variable: str, theme: Theme
) -> go.Figure | tuple[go.Figure, Steps, Array, Array, list[str]]:
    """A new figure of an array at each step, or one that says that there is nothing to see.

    Returns:
        The figure, the steps that it has, values (S, ...) and where they are missing (S,) at these,
        and why.
    """
    figure = new(label(data, variable), data[variable].attrs.get("convention", ""), theme)
    values = data[variable].values
    values = np.abs(values) if np.iscomplexobj(values) else values
    gone, why = absent(data, variable)
    if say_absent(figure, values, why):
        return figure
    infinite = np.isinf(values).reshape(len(values), -1).any(1)
    if infinite.any():
        text = f"some are infinite at {infinite.sum():,} of {len(values):,} steps, and left out"
        note(figure, text, upon=True)
    values = np.where(np.isfinite(values), values, np.nan)  # no scale has room for infinite ones
    there = np.isfinite(values).reshape(len(values), -1).any(1)
    kept = there | gone
    return figure, Steps.of(data["step"].values[kept]), values[kept], gone[kept], why


def scale(figure: go.Figure, data: xr.Dataset, variable: str, values: Array) -> None:
    """Names the vertical axis, which is logarithmic if values are far apart."""
    figure.update_yaxes(title={"text": short_label(data, variable)}, **scaled(values))
    finite = values[np.isfinite(values)]
    errors = data.get(variable + ERROR)
    middle = float(finite[0]) if finite.size and (errors is None or not (errors > 0).any()) else 0.0
    if middle and np.ptp(finite) <= 1e-8 * abs(middle):  # else rounding, or 2, is what is seen
        figure.update_yaxes(range=sorted((0.5 * middle, 1.5 * middle)))


def show_legend(figure: go.Figure) -> None:
    """Shows which curve is which, with room for as many rows as that takes in a narrow figure."""
    names = [
        html.unescape(one.name)
        for one in figure.data
        if one.name and one.showlegend is not False and one.visible is not False
    ]
    widest = 45 + 6.6 * max(map(len, names), default=0)  # as wide are all columns, if it has rows
    rows = math.ceil(len(names) / max(1, _NARROW // widest))
    more = _ROW * max(0, min(rows, _ROWS) - 1)
    figure.update_layout(
        showlegend=True,
        height=figure.layout.height + more,
        margin={"t": figure.layout.margin.t + more},
    )


def slider(prefix: str, names: Sequence[str], active: int, always: int = 0) -> dict[str, object]:
    """A slider that shows one trace at a time, after the first ones that are always shown."""
    stops = [
        {
            "label": name,
            "method": "restyle",
            "args": [{"visible": [True] * always + [i == number for i in range(len(names))]}],
        }
        for number, name in enumerate(names)
    ]
    return {
        "active": active,
        "currentvalue": {"prefix": prefix, "font": {"size": 12, "color": "#808080"}},
        "pad": {"t": 34, "b": 4},
        "ticklen": 3,
        "font": {"size": 1, "color": "rgba(0,0,0,0)"},
        "steps": stops,
    }


def note(figure: go.Figure, text: str, hover: str = "", upon: bool = False) -> None:
    """Writes a line at the bottom, above those that are there; on grey upon a map."""
    upon = upon or any(one.type == "heatmap" for one in figure.data)
    above = sum(one.name == "note" for one in figure.layout.annotations)
    look = {"bgcolor": "rgba(96,96,96,0.85)", "font": {"size": 10, "color": "#FFFFFF"}}
    figure.add_annotation(
        text=escape(textwrap.shorten(text, 76, placeholder=" ...")),
        hovertext="<br>".join(escape(line) for line in textwrap.wrap(hover, 80)[:12]) or None,
        showarrow=False,
        name="note",
        **(look if upon else {"font": {"size": 10}}),
        **{"x": 0, "y": 0.01 + 0.06 * above, "xref": "paper", "yref": "paper"},
        **{"xanchor": "left", "yanchor": "bottom"},
    )
