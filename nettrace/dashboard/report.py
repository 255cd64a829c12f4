"""A report: one page with all figures of a trace, or of several, which opens without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import plotly.offline
import xarray as xr

from nettrace.certificate import Certificate
from nettrace.dashboard.landscapes import landscape_numbers
from nettrace.dashboard.runs import grouped, of_one, parsed
from nettrace.dashboard.style import doubts, template
from nettrace.dashboard.views import figure, figures, variable_of
from nettrace.summary import Quantity, said, summary

#: Bytes of figures that a report takes, beside 5 MB for Plotly itself.
LARGEST = 25_000_000
#: Runs that have a column each in the table of final values; of more, quantiles are told.
_COLUMNS = 4
#: Groups of runs that have a column each.
_GROUPS = 8
_MISSING = "missing"
#: Groups of measures in the order in which they are looked at; others are in the middle.
_ORDER = (
    *("loss", "ntk", "fisher", "hessian", "ggn", "gradients", "weights", "geometry", "focus"),
    *("uncertainty", "custom", "collective", "nettrace"),
)
#: What is said of a run at the top; the rest is folded away.
_FIRST = ("created", "model", "parameters", "dtype", "device", "probe", "nettrace", "torch")


def report(
    data: xr.Dataset,
    *,
    title: str = "",
    group: str = "",
    landscapes: Mapping[str, xr.Dataset] | None = None,
) -> str:
    """A page of HTML with provenance, costs, what was checked, final values, and all figures.

    Plotly is in the page, and nothing is loaded from elsewhere: its policy forbids it. Curves of
    more than 2,000 steps are means of ranges, with the least and largest values in these. Where
    figures together take more than 25 MB, the page names those that it leaves out.

    Args:
        data: as `nettrace.open` gives it, of one trace or several.
        title: of the page; by default the folders of the traces.
        group: of several runs, what in their provenance, configuration or hyperparameters puts them
            together, such as "learning_rate": of runs with the same value medians and quantiles are
            drawn.
        landscapes: what `nettrace.dashboard.landscape_trace` gives of the run, under "", or by run
            of several, whose numbers are then compared, and whose arrays are seen run by run.

    Raises:
        KeyError: if no run knows what `group` names.
    """
    groups = grouped(data, group) if group else None
    title = title or _title(data)
    wanted = [*_wanted(data), *_of_landscapes(landscapes or {})]
    made = _made(wanted, groups)
    shown = json.dumps(
        {
            "templates": {theme: template(theme).to_plotly_json() for theme in ("light", "dark")},
            "figures": [one for one in made if "data" in one],
        },
        default=_plain,
    ).replace("<", "\\u003c")
    assets = files("nettrace.dashboard") / "assets"
    script = (assets / "report.js").read_text()
    plotly_js = plotly.offline.get_plotlyjs()
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly_js, script))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )
    body = "".join([_header(data, title), *_sections(data, made, landscapes or {}, groups)])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{(assets / 'report.css').read_text()}</style></head>"
        f'<body>{body}<script type="application/json" id="data">{shown}</script>'
        f"<script>{plotly_js}</script><script>{script}</script></body></html>"
    )


def _made(
    wanted: Iterable[tuple[str, str, xr.Dataset]], groups: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    """All figures without their templates, or why there is none."""
    found: list[dict[str, Any]] = []
    size = 0
    for name, run, select in wanted:
        entry: dict[str, Any] = {"name": name, "run": run, "about": _convention(select, name)}
        try:
            one = figure(select, name, groups=groups)
        except Exception as error:  # of one figure: the others are shown
            found.append({**entry, "why": f"{type(error).__name__}: {error}"})
            continue
        one.layout.template = None
        text = one.to_json()
        size += len(text)
        if size > LARGEST:
            found.append({**entry, "why": "left out, since the page would be too large"})
            size -= len(text)
            continue
        found.append({**entry, **json.loads(text)})
    return found


def _wanted(data: xr.Dataset) -> Iterator[tuple[str, str, xr.Dataset]]:
    """Names of figures, with the run if it is of one among several, and its data."""
    if "run" not in data.dims:
        for name in figures(data):
            yield name, "", data
        return
    for name in figures(data):
        yield name, "", data
    runs = [str(run) for run in data["run"].values]
    together = set(figures(data))
    for run in runs[:_COLUMNS]:
        one = of_one(data, run)
        for name in figures(one):
            if name not in together:
                yield name, run, one


def _of_landscapes(by_run: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, str, xr.Dataset]]:
    """The same of landscapes."""
    if set(by_run) == {""}:
        yield from _wanted(by_run[""])
        return
    if not by_run:
        return
    numbers = landscape_numbers(by_run)
    together = figures(numbers)
    for name in together:
        yield name, "", numbers
    for run, one in list(by_run.items())[:_COLUMNS]:
        for name in figures(one):
            if name not in together:
                yield name, run, one


def _header(data: xr.Dataset, title: str) -> str:
    steps = data["step"].values
    runs = [str(run) for run in data["run"].values] if "run" in data.dims else []
    about = f"{len(steps):,} steps" + (
        f" from {int(steps[0]):,} to {int(steps[-1]):,}" if len(steps) else ""
    )
    about += f", {len(data.data_vars):,} variables" + (f", {len(runs)} runs" if runs else "")
    return (
        f"<header><h1>{escape(title)}</h1><button id=theme type=button>dark</button>"
        f'<p class="about">{escape(about)}</p>{_provenance(data, runs)}</header>'
    )


def _provenance(data: xr.Dataset, runs: Sequence[str]) -> str:
    def told(value: Any) -> str:
        by_run = parsed(value)
        if not isinstance(by_run, dict) or not runs or set(by_run) != set(runs):
            return _short(value)
        kinds = list(dict.fromkeys(str(one) for one in by_run.values()))
        if len(kinds) > 6:
            return f"{len(kinds)} different: {_short(kinds[0], 200)}, {_short(kinds[1], 200)}, ..."
        return "; ".join(_short(kind, 200) for kind in kinds)

    first = [(k, told(data.attrs[k])) for k in _FIRST if k in data.attrs]
    rest = [(k, told(v)) for k, v in data.attrs.items() if k not in _FIRST]
    found = _pairs(first)
    if rest:
        found += f"<details><summary>all provenance</summary>{_pairs(rest)}</details>"
    return found


def _pairs(items: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th>{escape(str(key))}</th><td class="text">{escape(value)}</td></tr>'
        for key, value in items
    )
    return f'<div class="scrolls"><table>{rows}</table></div>'


def _sections(
    data: xr.Dataset,
    made: Sequence[Mapping[str, Any]],
    landscapes: Mapping[str, xr.Dataset],
    together: Mapping[str, str] | None,
) -> Iterator[str]:
    numbers = {id(one): i for i, one in enumerate(one for one in made if "data" in one)}
    groups = [(name, list(several)) for name, several in groupby(sorted(made, key=_place), _group)]
    links = [
        *((group, group) for group, _ in groups),
        ("values", "final values"),
        ("costs", "cost"),
    ]
    yield "<main><nav>" + "".join(
        f'<a href="#{escape(_anchor(at))}">{escape(text)}</a>' for at, text in links
    )
    yield "</nav>"
    if not made:
        yield '<p class="notice">Nothing was recorded yet: no step has a value.</p>'
    for group, several in groups:
        yield f'<h2 id="{escape(_anchor(group))}">{escape(group)}</h2>'
        if several[0]["run"] and data.sizes.get("run", 0) > _COLUMNS:
            text = f"The first {_COLUMNS} of {data.sizes['run']} runs: name others to see theirs."
            yield f'<p class="about">{text}</p>'
        if group == "landscape":
            yield _doubts({"": data, **landscapes})
        yield '<div class="figures">'
        for one in several:
            caption = one["name"] + (f", run {one['run']}" if one["run"] else "")
            if "data" in one:
                height = int(one["layout"]["height"])
                style = f"min-height:{height}px"
                inside = f'<div data-figure="{numbers[id(one)]}" style="{style}"></div>'
                caption += f": {one['about']}" if one["about"] else ""
            else:
                inside = f'<p class="notice">{escape(one["why"])}</p>'
            yield f"<figure>{inside}<figcaption>{escape(caption)}</figcaption></figure>"
        yield "</div>"
    yield f'<h2 id="values">Final values</h2>{_finals(data, together)}'
    if landscapes:
        own = landscapes[""] if set(landscapes) == {""} else landscape_numbers(landscapes)
        yield f"<h3>of the landscape</h3>{_finals(own, together)}"
    yield f'<h2 id="costs">Cost and checks</h2>{_costs(data)}'
    yield f"{_costs_of_probes([data, *landscapes.values()])}{_certificate(data)}</main>"


def _doubts(by_run: Mapping[str, xr.Dataset]) -> str:
    """What makes results of landscape probes doubtful, and at which steps."""
    found: dict[str, list[str]] = {}
    for run, data in by_run.items():
        for name, variable in data.data_vars.items():
            if "doubts" in variable.attrs and "run" not in variable.dims:
                function = str(variable.attrs["name"]).rpartition("/")[0]
                for step, why in doubts(data, str(name)).items():
                    where = f"{step:,}" + (f" of {run}" if run else "")
                    at = found.setdefault(f"{function}: {why}", [])
                    at += [where] * (where not in at)
    if not found:
        return ""
    rows = [(", ".join(at), text) for text, at in found.items()]
    about = f"<summary>{len(rows)} doubts about these results</summary>"
    rows = [(_short(f"at step {at}", 60), text) for at, text in rows]
    return f'<details class="notice"{" open" * (len(rows) < 5)}>{about}{_pairs(rows)}</details>'


def _costs(data: xr.Dataset) -> str:
    if "nettrace_seconds" not in data:
        if any(str(name).startswith("landscape_") for name in data.data_vars):
            return ""
        return '<p class="about">The trace does not say what measuring cost.</p>'
    seconds = float(np.nansum(data["nettrace_seconds"].values))
    text = f"Measuring took {seconds:.3g} s in all"
    if "wall_time" in data.coords and "run" not in data.dims:
        wall = data["wall_time"].values
        wall = wall[np.isfinite(wall)]
        if len(wall) > 1 and wall[-1] > wall[0]:
            whole = float(wall[-1] - wall[0])
            text += f", of {whole:.3g} s from the first record to the last"
    return f'<p class="about">{escape(text)}.</p>'


def _costs_of_probes(several: Sequence[xr.Dataset]) -> str:
    """What landscape probes took."""
    found = [
        float(np.nansum(one.values))
        for data in several
        for one in data.data_vars.values()
        if re.fullmatch("landscape/.+/seconds", str(one.attrs.get("name")))
    ]
    if not found:
        return ""
    return f'<p class="about">Probing the landscape took {sum(found):.3g} s in all.</p>'


def _certificate(data: xr.Dataset) -> str:
    spot = data.get("nettrace_spot_check")
    text = "" if spot is None else spot.attrs.get("certificate", "")
    if not text:
        return ""
    try:
        known = Certificate.from_json(str(text))
    except (ValueError, TypeError, KeyError):  # of another version
        return ""
    routes = ", ".join(f"{100 * share:.3g} % {route}" for route, share in known.by_route().items())
    line = (
        f"Derivatives by parameter, as shares of the kernel's trace: {routes}. Largest difference "
        f"from plain autograd in a few entries: {known.error:.1e}."
    )
    table = (
        f"<details><summary>certificate</summary><pre>{escape(known.table(100))}</pre></details>"
    )
    return f'<p class="about">{escape(line)}</p>{table}'


def _finals(data: xr.Dataset, groups: Mapping[str, str] | None) -> str:
    """The last value of each number, or its median over groups of runs."""
    runs = [str(run) for run in data["run"].values] if "run" in data.dims else ["last value"]
    few = len(runs) <= _COLUMNS
    columns = runs if few else [f"median of {len(runs)} runs", "10 to 90 %"]
    members: dict[str, list[int]] = {name: [] for name in (groups or {}).values()}
    if 0 < len(members) <= _GROUPS:
        for number, run in enumerate(runs):
            members[(groups or {})[run]].append(number)
        columns = [f"{name}: median of {len(rows)}" for name, rows in members.items()]
    head = "".join(f'<th class="number">{escape(column)}</th>' for column in columns)
    rows = []
    for one in summary(data):
        if one.axes:
            continue
        if 0 < len(members) <= _GROUPS:
            cells = [_median(one.values[rows]) for rows in members.values()]
        elif few:
            cells = [_cell(*both) for both in zip(one.values, one.standard_errors, strict=True)]
        else:
            cells = _quantiles(one)
        rows.append(
            f"<tr><th>{escape(one.name)}</th>"
            + "".join(
                f'<td class="number{" missing" if cell == _MISSING else ""}">{escape(cell)}</td>'
                for cell in cells
            )
            + f'<td class="wide">{escape(one.units)}</td>'
            f'<td class="number wide">{"" if one.step is None else f"{one.step:,}"}</td>'
            f'<td class="text wide">{escape(_short(one.convention, 160))}'
            + "".join(f'<div class="missing">{escape(note)}</div>' for note in _notes(data, one))
            + "</td></tr>"
        )
    if not rows:
        return '<p class="about">No quantity is a number.</p>'
    return (
        f'<div class="scrolls finals"><table><tr><th>quantity</th>{head}<th class="wide">units</th>'
        '<th class="number wide">at step</th><th class="wide">convention</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _notes(data: xr.Dataset, one: Quantity) -> list[str]:
    """Where a number is missing or doubtful."""
    found = [f"missing at {_short(one.missing, 160)}"] if one.missing else []
    variable = variable_of(data, one.name)
    if "doubts" in data[variable].attrs:
        at = [] if "run" in data.dims else [f"{step:,}" for step in doubts(data, variable)]
        found.append("doubtful" + (f" at step {', '.join(at)}" if at else ""))
    return found


def _cell(value: complex, error: float) -> str:
    if np.isnan(value):
        return _MISSING
    return said(value, error)


def _median(values: np.ndarray) -> str:
    """That of those that are known."""
    known = values[~np.isnan(values)]
    if not len(known):
        return _MISSING
    if np.iscomplexobj(known):
        return said(complex(np.median(known.real), np.median(known.imag)))
    return said(float(np.median(known)))


def _quantiles(one: Quantity) -> list[str]:
    """The median of all runs, and between which quantiles most are."""
    if one.value is None:
        return [_MISSING, _MISSING]
    known = one.values[np.isfinite(one.values)]
    if np.iscomplexobj(known) or not len(known):
        return [said(one.value), ""]
    low, high = np.quantile(known, (0.1, 0.9))
    return [said(one.value), f"{low:.4g} to {high:.4g}"]


def _title(data: xr.Dataset) -> str:
    if "run" in data.dims:
        more = ", ..." if data.sizes["run"] > _COLUMNS else ""
        first = ", ".join(map(str, data["run"].values[:_COLUMNS]))
        return f"{data.sizes['run']} runs: {first}{more}"
    return "/".join(Path(str(data.attrs.get("folder", "trace"))).parts[-2:])


def _group(one: Mapping[str, Any]) -> str:
    name = str(one["name"]).partition("/")[0].partition(" against")[0]
    return f"{name}, run by run" if one["run"] else name


def _place(one: Mapping[str, Any]) -> tuple[bool, int, str, str]:
    """What is looked at first: numbers of all runs before what is of one."""
    name, is_of_one = str(one["name"]), bool(one["run"])
    group = name.partition("/")[0].partition(" ")[0]
    place = _ORDER.index(group) if group in _ORDER else len(_ORDER) // 2
    return is_of_one, place, group, name if is_of_one else ""


def _anchor(text: str) -> str:
    return text if text in ("costs", "values") else "group-" + text


def _convention(data: xr.Dataset, name: str) -> str:
    for variable in data.data_vars.values():
        if variable.attrs.get("name") == name:
            source = variable.attrs.get("source", "")
            return str(variable.attrs.get("convention", "")) + (f" [{source}]" if source else "")
    return ""


def _short(value: Any, most: int = 700) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 4] + " ..."


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> Any:
    return value.to_plotly_json() if hasattr(value, "to_plotly_json") else list(value)
