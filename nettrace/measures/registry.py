"""What a measure is, and which there are."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nettrace.batch import mapped
from nettrace.past import Reference, references
from nettrace.record import ERROR, MOST_AXES
from nettrace.statistics import Statistics

#: A number or an array, as a measure gives it.
Numbers: TypeAlias = Tensor | npt.NDArray[Any] | float

#: How a measure can be seen along the steps: see `nettrace.dashboard`.
View: TypeAlias = Literal[
    "track",
    "eigenvalues",
    "distribution",
    "lines",
    "spectrum",
    "layers",
    "matrix",
    "curves",
    "plane",
    "density",
]


@dataclass(frozen=True)
class Value:
    """What a measure found.

    Args:
        value: a number or an array, of torch or NumPy.
        standard_error: of an estimate, of the same shape.
        coordinates: labels along named axes.
        attributes: what else to keep with the value, such as the number of draws.
    """

    value: Numbers
    standard_error: Numbers | None = None
    coordinates: Mapping[str, list[str]] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)

    @classmethod
    def mean(cls, values: Tensor) -> Value:
        """The mean of independent values (N, ...), with the standard error of the mean."""
        values = values.double()
        mean = values.mean(0)
        error = values.std(0, correction=1) if len(values) > 1 else mean.new_full((), torch.nan)
        return cls(mean, error.expand_as(mean) / len(values) ** 0.5)


Function: TypeAlias = Callable[..., Value | Numbers]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True)
class Measure:
    """A named, pure function of statistics.

    Args:
        name: "group/quantity".
        needs: the properties of `Statistics` that the function takes, in order; "first.gram" is
            that of the first look, "previous.gram" that of the one before.
        function: from those to a value.
        convention: what is summed or averaged over what, in words; kept with every value.
        dims: names of the value's axes.
        source: the paper and equation that define it.
        grouped: whether the group's name stands for it too.
        view: how it is best seen, if its axes do not tell.
    """

    name: str
    needs: tuple[str, ...]
    function: Function
    convention: str
    dims: tuple[str, ...]
    source: str
    grouped: bool
    view: View | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is nettrace's own."""
        return str(self.function.__module__).startswith("nettrace.measures.")

    @property
    def reference(self) -> Reference | None:
        """The earlier look that it compares with, if any, and what it wants of that."""
        return next(iter(references(self.needs, Statistics.references)), None)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return _first_line(self.function)

    def __call__(self, statistics: Statistics) -> Value:
        """The measure of a network, from its statistics.

        Raises:
            TypeError: if the function gives no numbers, or an error that is not real.
            ValueError: if what it gives does not fit the names of the axes.
        """
        earlier = None if self.reference is None else statistics.earlier(self.reference)
        arguments = []
        for need in self.needs:
            when, _, name = need.rpartition(".")
            arguments.append(earlier[name] if when and earlier else getattr(statistics, name))
        if not self.is_own:  # which may write into what it is given
            arguments = [mapped(argument, Tensor.clone) for argument in arguments]
        found = self.function(*arguments)
        found = found if isinstance(found, Value) else Value(found)
        if earlier is not None:
            attributes = {**found.attributes, "reference_step": earlier.step}
            found = replace(found, attributes=attributes)
        value = self._numbers("value", found.value)
        if value.dim() > MOST_AXES:
            raise ValueError(
                f"{self.name} gave a value with {value.dim()} axes: a trace takes {MOST_AXES}, "
                "at most"
            )
        if value.dim() != len(self.dims):
            raise ValueError(
                f"{self.name} gave a value of shape {tuple(value.shape)}, but names "
                f"{len(self.dims)} axes, dims={list(self.dims)}: name each axis by "
                "@measure(..., dims=[...]), and none for a number"
            )
        for axis, labels in found.coordinates.items():
            if axis not in self.dims or len(labels) != value.shape[self.dims.index(axis)]:
                raise ValueError(
                    f"{self.name} gave {len(labels)} labels along {axis!r} for a value of shape "
                    f"{tuple(value.shape)} with dims={list(self.dims)}"
                )
        error = found.standard_error
        if error is not None:
            error = self._numbers("standard error", error)
            if error.is_complex():
                raise TypeError(f"{self.name} gave a complex standard error: it must be real")
            if error.shape != value.shape:
                raise ValueError(
                    f"{self.name} gave a standard error of shape {tuple(error.shape)} for a value "
                    f"of shape {tuple(value.shape)}: it must have one for each number"
                )
        return replace(found, value=value, standard_error=error)

    def _numbers(self, what: str, found: Any) -> Tensor:
        """A copy on the CPU, which does not change when the weights do."""
        if not isinstance(found, (Tensor, np.ndarray, np.generic, int, float)):
            raise TypeError(
                f"{self.name} gave {type(found).__name__} for its {what}: return a number, a "
                "tensor, a NumPy array or a nettrace.Value of one"
            )
        # A tensor of its own type: Python's and NumPy's numbers are float64.
        tensor = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 4  # unknown to NumPy
        return tensor.detach().to("cpu", torch.float32 if narrow else tensor.dtype, copy=True)


_MEASURES: dict[str, Measure] = {}
#: Where installed packages announce modules that define measures.
ENTRY_POINTS = "nettrace.measures"
_loaded: set[tuple[str, str]] = set()


def measure(
    name: str = "",
    *,
    needs: Iterable[str],
    convention: str = "",
    dims: Iterable[str] = (),
    source: str = "",
    grouped: bool = True,
    view: View | None = None,
) -> Callable[[F], F]:
    """Registers a function of statistics as a measure, to be asked for by name.

    It gives a number, a tensor or a NumPy array, or a `Value` with a standard error. Where it
    raises, its record is missing, with the reason; numbers that are not finite are kept.

    Args:
        name: "group/quantity"; "custom/" and the function's name if left out.
        needs: the statistics that the function takes, in order; `statistics` lists them.
            "first.gram" is that of the first look, "previous.gram" that of the one before.
        convention: what is summed or averaged over what, in words, which is kept with every value;
            the first line of the function's docstring if left out.
        dims: names of the value's axes.
        source: the paper and equation that define it.
        grouped: whether the group's name stands for it too; not for what is dear, or needs more
            than a network and a probe.
        view: how it is best seen along the steps; as its axes suggest if left out. A number is a
            "track"; values along one axis are a "spectrum" or "layers", each step a column of a
            map, "curves", a "distribution", of which quantiles are drawn, few "eigenvalues",
            "lines", one for each of few names, a function on a "plane", by contours, or the entropy
            of a "density" of states; more axes are a "matrix" with a slider.

    Raises:
        ValueError: if the name is not of that form, or taken by another function; if a need is no
            statistic, or none that can be kept; if several earlier looks are asked for; or if the
            function does not take as many arguments. The same function defined again, as in a
            notebook, takes its own place.

    Example:
        >>> import torch, nettrace as nt
        >>> @nt.measure(needs=["outputs"])
        ... def confidence(outputs):
        ...     "Mean of the largest probability over samples."
        ...     return nt.Value.mean(outputs.softmax(1).amax(1))
        >>> tracer = nt.Tracer(nt.Probe(torch.randn(8, 3)), ["custom/confidence", "ntk/trace"])
        >>> [record.name for record in tracer(torch.nn.Linear(3, 2), step=0)][:2]
        ['custom/confidence', 'ntk/trace']
    """
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    dims = (dims,) if isinstance(dims, str) else tuple(dims)
    if callable(name) or not isinstance(name, str):
        raise TypeError(
            "expected @measure(needs=[...]) with the statistics that the function takes"
        )
    group, _, quantity = name.partition("/")
    if name and (not group or not quantity or "/" in quantity):
        raise ValueError(f"expected a measure's name of the form 'group/quantity', got {name!r}")
    if name.endswith(ERROR):
        raise ValueError(f"expected a name that does not end in {ERROR}, of errors, got {name!r}")
    if view is not None and view not in get_args(View):
        raise ValueError(f"expected a view of {', '.join(get_args(View))}, got {view!r}")
    known = statistics()
    for need in needs:
        when, _, statistic = need.rpartition(".")
        if when not in ("", "first", "previous") or statistic not in known:
            raise ValueError(f"unknown statistic {need!r}{_nearest(statistic, known)}")
        if when and statistic != "step" and _type(statistic) not in ("Tensor", "PerLayer"):
            raise ValueError(
                f"cannot keep {statistic!r} for {need!r}: expected a statistic that is a tensor or "
                "one for each parameter"
            )
    if len(several := references(needs, Statistics.references)) > 1:
        raise ValueError(
            f"expected the measure {name!r} to compare with one earlier look, got {sorted(several)}"
        )

    def register(function: F) -> F:
        called = name or f"custom/{_identity(function)[1].rpartition('.')[2]}"
        try:
            inspect.signature(function).bind(*needs)
        except TypeError as error:
            raise ValueError(
                f"the function of {called!r} does not take the {len(needs)} statistics that it "
                f"needs, {', '.join(needs) or 'none'}: {error}"
            ) from None
        taken = _MEASURES.get(called)
        if taken is not None and _identity(taken.function) != _identity(function):
            raise ValueError(
                f"a measure named {called!r} exists already, in {_identity(taken.function)[0]}: "
                "pass another name, @measure('group/quantity', ...)"
            )
        words = convention or _first_line(function)
        _MEASURES[called] = Measure(called, needs, function, words, dims, source, grouped, view)
        return function

    return register


def statistics() -> dict[str, str]:
    """The statistics that a measure can need, by name, each with what it is, in a line."""
    found = {"samples": "N, how many samples there are.", "step": "How many updates there were."}
    for name in dir(Statistics):
        one = inspect.getattr_static(Statistics, name)
        if isinstance(one, (property, cached_property)) and not name.startswith("_"):
            found[name] = (one.__doc__ or "").partition("\n")[0]
    return {name: found[name] for name in sorted(found) if name not in ("first", "previous")}


def available() -> list[Measure]:
    """All measures, by name, with those of installed packages."""
    _load_entry_points()
    return [_MEASURES[name] for name in sorted(_MEASURES)]


def resolve(names: str | Iterable[str]) -> list[Measure]:
    """Measures by name; a group's name stands for all of it that a network and a probe define.

    Raises:
        ValueError: if there is no such measure, naming the nearest, or none is asked for.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"expected names of measures, got {wrong[0]!r}")
    if not names:
        raise ValueError("expected at least one measure, got none")
    _load_entry_points()
    found: dict[str, Measure] = {}
    for name in names:
        group = {
            n: m
            for n, m in _MEASURES.items()
            if n == name or (m.grouped and n.startswith(name + "/"))
        }
        if not group:
            groups = {n.partition("/")[0] for n in _MEASURES}
            raise ValueError(f"unknown measure {name!r}{_nearest(name, [*_MEASURES, *groups])}")
        found |= group
    return list(found.values())


def _type(statistic: str) -> str:
    found = inspect.getattr_static(Statistics, statistic)
    function = getattr(found, "func", None) or getattr(found, "fget", None)
    return str(getattr(function, "__annotations__", {}).get("return", ""))


def _load_entry_points() -> None:
    """Imports what installed packages announce, each once; what fails is said once and left out."""
    for point in entry_points(group=ENTRY_POINTS):
        if (point.name, point.value) in _loaded:
            continue
        _loaded.add((point.name, point.value))
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.name
            warnings.warn(
                f"the measures of the package {package!r}, in {point.value}, cannot be loaded and "
                f"are left out: {type(error).__name__}: {error}",
                stacklevel=4,
            )


def _identity(function: Function) -> tuple[str, str]:
    """Where a function is defined, which stays the same when it is defined again."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return kind.__module__, kind.__qualname__


def _first_line(function: Function) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, cutoff=0.4)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else f": {sorted(known)}"
