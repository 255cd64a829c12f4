"""What a measure is, and which there are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from nettrace.past import Reference, references
from nettrace.statistics import Statistics


@dataclass(frozen=True)
class Value:
    """What a measure found.

    Args:
        value: a number or an array.
        standard_error: of an estimate, of the same shape.
        coordinates: labels along named axes.
        attributes: what else to keep with the value, such as the number of draws.
    """

    value: Tensor | float
    standard_error: Tensor | float | None = None
    coordinates: Mapping[str, list[str]] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)

    @classmethod
    def mean(cls, values: Tensor) -> Value:
        """The mean of independent values (N, ...), with the standard error of the mean."""
        values = values.double()
        mean = values.mean(0)
        error = values.std(0, correction=1) if len(values) > 1 else mean.new_full((), torch.nan)
        return cls(mean, error.expand_as(mean) / len(values) ** 0.5)


Function: TypeAlias = Callable[..., Value | Tensor | float]
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
    """

    name: str
    needs: tuple[str, ...]
    function: Function
    convention: str
    dims: tuple[str, ...]
    source: str

    @property
    def reference(self) -> Reference | None:
        """The earlier look that it compares with, if any, and what it wants of that."""
        return next(iter(references(self.needs, Statistics.references)), None)

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        return (self.function.__doc__ or "").partition("\n")[0]

    def __call__(self, statistics: Statistics) -> Value:
        """The measure of a network, from its statistics."""
        earlier = None if self.reference is None else statistics.earlier(self.reference)
        arguments = []
        for need in self.needs:
            when, _, name = need.rpartition(".")
            arguments.append(earlier[name] if when and earlier else getattr(statistics, name))
        found = self.function(*arguments)
        found = found if isinstance(found, Value) else Value(found)
        if earlier is None:
            return found
        return replace(found, attributes={**found.attributes, "reference_step": earlier.step})


_MEASURES: dict[str, Measure] = {}


def measure(
    name: str,
    *,
    needs: Iterable[str],
    convention: str,
    dims: Iterable[str] = (),
    source: str = "",
) -> Callable[[F], F]:
    """Registers a function of statistics as a measure.

    Args:
        name: "group/quantity".
        needs: the properties of `nettrace.statistics.Statistics` that the function takes, in order;
            "first.gram" is that of the first look, "previous.gram" that of the one before.
        convention: what is summed or averaged over what, in words.
        dims: names of the value's axes.
        source: the paper and equation that define it.

    Raises:
        ValueError: if the name is not of that form or taken, or a need is no statistic, or none
            that can be kept, or several earlier looks are asked for.
    """
    needs = tuple(needs)
    group, _, quantity = name.partition("/")
    if not group or not quantity or "/" in quantity:
        raise ValueError(f"expected a measure's name of the form 'group/quantity', got {name!r}")
    if name in _MEASURES:
        raise ValueError(f"a measure named {name!r} exists already")
    known = [n for n in [*dir(Statistics), "samples", "step"] if not n.startswith("_")]
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
        _MEASURES[name] = Measure(name, needs, function, convention, tuple(dims), source)
        return function

    return register


def available() -> list[Measure]:
    """All measures, by name."""
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
    found: dict[str, Measure] = {}
    for name in names:
        group = {
            n: m
            for n, m in _MEASURES.items()
            if n == name or (n.startswith(name + "/") and not Statistics.of_optimizer & {*m.needs})
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


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, cutoff=0.4)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else f": {sorted(known)}"
