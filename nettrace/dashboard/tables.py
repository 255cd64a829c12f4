"""What a figure shows, as a table of text."""

from __future__ import annotations

import csv
import html
import io
from itertools import zip_longest
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nettrace.dashboard.maps import LOGARITHMIC
from nettrace.dashboard.style import STEPS


def table(figure: go.Figure) -> str:
    """The points of a figure as CSV, a line each: those that are drawn, which may be fewer.

    Columns are the trace's name, the step where hovering tells it, x, y, and the values z of maps,
    as float32. What is missing is empty.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trace", "step", "x", "y", "z"])
    slider = figure.layout.sliders[0].steps if figure.layout.sliders else ()
    is_along = (figure.layout.xaxis.title.text or "").startswith(STEPS)
    first = int(figure.layout.xaxis.type == "log")  # where step 0 lies
    for number, one in enumerate(figure.data):
        name = _text(one.name or (slider[number].label if number < len(slider) else ""))
        if one.type in ("heatmap", "contour"):
            values = np.asarray(one.z, float)
            values = 10**values if one.meta == LOGARITHMIC else values
            for y, line in zip(one.y, values, strict=True):
                for x, z in zip(one.x, line, strict=True):
                    step = _text(x - first) if is_along else ""
                    writer.writerow([name, step, _text(x), _text(y), _text(z)])
            continue
        if one.fill == "toself":  # a band, there and back
            half = len(one.x) // 2
            edges = {"upper": one.y[:half], "lower": one.y[half:][::-1]}
            for edge, values in edges.items():
                for x, y in zip(one.x[:half], values, strict=True):
                    step = _text(x - first) if is_along else ""
                    writer.writerow([_text(f"{name} ({edge})"), step, _text(x), _text(y), ""])
            continue
        known = () if one.customdata is None else one.customdata
        for x, y, step in zip_longest(one.x, one.y, known, fillvalue=""):
            writer.writerow([name, _text(step), _text(x), _text(y), ""])
    return out.getvalue()


def _text(value: Any) -> str:
    """As spreadsheets take it: for what it is, not for a formula."""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else repr(float(value))
    text = html.unescape(str(value))
    if isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + text
    return text
