"""Which figures a trace has, and how each is drawn: for reports, live pages, loggers and notebooks.

A measure is seen as the axes of its values suggest, or as it says itself, by
`@nettrace.measure(view=...)`; some quantities are also seen against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import plotly.graph_objects as go
import xarray as xr

from nettrace.dashboard import maps, planes, relations, tracks
from nettrace.dashboard.pairs import AGAINST, FLATNESS, PORTRAITS
from nettrace.dashboard.style import Theme
from nettrace.measures.registry import View
from nettrace.record import ERROR

_DRAWN: dict[str, Callable[[xr.Dataset, str, Theme], go.Figure]] = {
    "track": tracks.track,
    "eigenvalues": tracks.eigenvalues,
    "distribution": tracks.distribution,
    "lines": tracks.lines,
    "spectrum": maps.spectrum,
    "layers": maps.layers,
    "matrix": maps.matrix,
    "curves": maps.curves,
    "plane": planes.plane,
    "density": relations.density,
}
#: By a value's axes, or the last word of their names; of other single axes each has a name.
_BY_AXES: dict[tuple[str, ...], View] = {
    (): "track",
    ("leading_mode",): "eigenvalues",
    ("lowest_mode",): "eigenvalues",
    ("parameter",): "distribution",
    ("row",): "distribution",
    ("sample",): "distribution",
    ("gradient_sample",): "distribution",
    ("bin",): "curves",
    ("lag",): "curves",
}


def figures(data: xr.Dataset) -> list[str]:
    """The names of all figures of a trace, for `figure`.

    Args:
        data: as `nettrace.open` gives it, of one trace or several.

    Returns:
        Names of quantities, and of pairs of these such as "ntk/entropy against ntk/trace". Of
        several runs, numbers alone are seen together; so these are what is named.
    """
    of_one = "run" not in data.dims
    names = [
        name_of(data, name)
        for name in data.data_vars
        if _is_seen(data, str(name)) and (of_one or view(data, str(name)) == "track")
    ]
    found = {name_of(data, name) for name in data.data_vars}
    names += [f"{y}{AGAINST}{x}" for x, y in PORTRAITS if {x, y} <= found]
    return names + [FLATNESS] * (of_one and set(FLATNESS.split(AGAINST)) <= found)


def figure(
    data: xr.Dataset, name: str, *, theme: Theme = "light", groups: Mapping[str, str] | None = None
) -> go.Figure:
    """One figure of a trace.

    Args:
        data: as `nettrace.open` gives it, of one trace or several.
        name: of a quantity, such as "ntk/trace", or of two numbers, "ntk/entropy against
            ntk/trace"; `figures` lists those that are of use.
        theme: "light" or "dark".
        groups: by run, under which name it is put together with others; of three or more the
            median is drawn, with a band from the 10 % to the 90 % quantile.

    Raises:
        KeyError: if the trace has no such quantity.
        ValueError: if the theme is unknown, or several runs have arrays, which are not seen
            together: select one by data.sel(run=...).

    Example:
        >>> import tempfile, torch, nettrace as nt
        >>> from nettrace.dashboard import figure, figures
        >>> folder, names = tempfile.mkdtemp(), ["ntk/trace", "ntk/spectrum"]
        >>> tracer = nt.Tracer(nt.Probe(torch.randn(8, 3)), names, to=folder)
        >>> records = [tracer(torch.nn.Linear(3, 2), step) for step in range(3)]
        >>> data = nt.open(folder, names)
        >>> figures(data)
        ['ntk/spectrum', 'ntk/trace']
        >>> figure(data, "ntk/trace").layout.xaxis.title.text
        'optimizer step'
    """
    if theme not in get_args(Theme):
        raise ValueError(f"expected a theme of {get_args(Theme)}, got {theme!r}")
    if is_pair(data, name):
        if name == FLATNESS:
            return relations.variance_flatness(data, theme)
        second, first = (variable_of(data, part) for part in name.split(AGAINST, 1))
        return relations.portrait(data, first, second, theme)
    variable = variable_of(data, name)
    kind = view(data, variable)
    if kind == "track":
        return tracks.track(data, variable, theme, groups)
    if "run" in data[variable].dims:
        raise ValueError(
            f"{name} is an array at each step, which is seen of one run alone: select it by "
            f"data.sel(run={str(data['run'].values[0])!r})"
        )
    return _DRAWN[kind](data, variable, theme)


def is_pair(data: xr.Dataset, name: str) -> bool:
    """Whether a name is of two quantities against each other."""
    return AGAINST in name and name not in {name_of(data, one) for one in data.data_vars}


def kind_of(data: xr.Dataset, name: str) -> str:
    """How a figure is seen: its quantity's view, or "pair" of two."""
    return "pair" if is_pair(data, name) else view(data, variable_of(data, name))


def view(data: xr.Dataset, variable: str) -> View:
    """How a variable is best seen."""
    for known in get_args(View):
        if known == data[variable].attrs.get("view"):
            return known  # type: ignore[no-any-return]
    axes = tuple(str(dim) for dim in data[variable].dims if dim not in ("run", "step"))
    if axes in _BY_AXES:
        return _BY_AXES[axes]
    if len(axes) > 1:
        return "matrix"
    return "spectrum" if axes[0].endswith("mode") or axes[0] not in data.coords else "layers"


def arrays(data: xr.Dataset) -> list[str]:
    """What is seen of one of several runs alone, so that `figures` does not name it."""
    seen = [str(name) for name in data.data_vars if _is_seen(data, str(name))]
    names = [name_of(data, name) for name in seen if view(data, name) != "track"]
    return names + [FLATNESS] * (set(FLATNESS.split(AGAINST)) <= set(names))


def layers(data: xr.Dataset) -> list[str]:
    """The names of all layers, or whatever else has names, that there are maps of."""
    axes = {
        data[name].dims[-1]: None
        for name in data.data_vars
        if view(data, str(name)) == "layers" and not str(name).startswith("nettrace_")
    }
    return list(dict.fromkeys(str(name) for axis in axes for name in data[axis].values))


def by_layer(data: xr.Dataset, name: str, chosen: Collection[str]) -> xr.Dataset:
    """The same with some layers of a quantity, of each of which `figure` draws a curve.

    All are left where the quantity has none of these, or is not one of layers.
    """
    variable = variable_of(data, name)
    if view(data, variable) != "layers":
        return data
    axis = data[variable].dims[1]
    rows = [row for row, layer in enumerate(data[axis].values) if str(layer) in chosen]
    if not rows:
        return data
    found = data.isel({axis: rows})
    found[variable].attrs = {**found[variable].attrs, "view": "lines"}
    return found


def _is_seen(data: xr.Dataset, name: str) -> bool:
    """Whether it has a figure of its own, which is not that of another."""
    base = name.removesuffix(ERROR)
    if base != name and base in data:
        return False
    is_where = name.endswith("_at") and data[name].ndim > 1  # the values of an array are told
    return not (is_where and name.removesuffix("_at") in data)


def name_of(data: xr.Dataset, variable: Any) -> str:
    """The quantity of a variable."""
    return str(data[variable].attrs.get("name", variable))


def variable_of(data: xr.Dataset, name: str) -> str:
    """The variable of a quantity.

    Raises:
        KeyError: if the trace has no such quantity.
    """
    for variable in data.data_vars:
        if name in (variable, data[variable].attrs.get("name")):
            return str(variable)
    raise KeyError(f"the trace has no {name!r}: nettrace.dashboard.figures names what it has")
