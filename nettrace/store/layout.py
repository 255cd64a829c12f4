"""What the bytes of a row mean: which arrays there are, and where they lie.

Rows of one layout differ in their numbers alone. Small arrays lie in the head of the row's frame,
so that opening a trace checks them; large ones in its body, which is read when somebody asks.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nettrace.record import MOST_AXES

#: Step and number of the layout, which every row begins with.
ROW = struct.Struct("<qI")
#: Arrays of more bytes than this lie in the body.
INLINE = 4096
#: Types of arrays, and of coordinates.
DTYPES = frozenset("|b1 |i1 |u1 <i2 <u2 <i4 <u4 <i8 <u8 <f2 <f4 <f8 <c8 <c16".split())
COORDINATES = frozenset(["<i8", "<f8"])
#: Axes of an array, of which one may be of several probes.
_RANK = MOST_AXES + 1
#: Levels of JSON.
_DEEPEST = 50


@dataclass(frozen=True)
class Axes:
    """The axes of an array.

    Args:
        dims: their names.
        labels: along those that have some.
    """

    dims: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Place:
    """One array of a row.

    Args:
        dtype: NumPy's, as text.
        shape: its shape.
        axes: their meaning.
        at: where its bytes begin, counted from the row's own beginning.
        check: where its CRC-32 lies, for a large one; a small one is checked with the head.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: Axes
    at: int
    check: int | None

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """What there is in a row.

    Args:
        coordinates: the types of coordinates beside the step, by name.
        arrays: types, shapes and axes of arrays, by name.
        missing: why there is no array, by the quantity's name.
        missing_on: why there is none on some of several probes, by the quantity's name.
    """

    coordinates: Mapping[str, str]
    arrays: Mapping[str, tuple[str, tuple[int, ...], Axes]]
    missing: Mapping[str, str]
    missing_on: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def before(self) -> int:
        """How many bytes step, number of the layout and coordinates take."""
        return ROW.size + 8 * len(self.coordinates)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where the arrays lie: coordinates, small arrays, checksums; then large arrays."""
        sizes = {n: math.prod(s) * np.dtype(d).itemsize for n, (d, s, _) in self.arrays.items()}
        large = [name for name, size in sizes.items() if size > INLINE]
        inside = self.before + sum(size for size in sizes.values() if size <= INLINE)
        inline, check, outside = self.before, inside, inside + 4 * len(large)
        found = {}
        for name, array in self.arrays.items():
            if sizes[name] > INLINE:
                found[name] = Place(*array, outside, check)
                outside, check = outside + sizes[name], check + 4
            else:
                found[name] = Place(*array, inline, None)
                inline += sizes[name]
        return found

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Of a row's head and of its body, in bytes."""
        large = [place.size for place in self.places.values() if place.check is not None]
        small = sum(place.size for place in self.places.values() if place.check is None)
        return self.before + small + 4 * len(large), sum(large)

    def encode(self) -> bytes:
        """As JSON; what `decode` takes."""
        axes: list[Axes] = []
        arrays = []
        for name, (dtype, shape, its) in self.arrays.items():
            if its not in axes:
                axes.append(its)
            arrays.append([name, dtype, shape, axes.index(its)])
        text = {
            "coordinates": dict(self.coordinates),
            "axes": [[its.dims, dict(its.labels)] for its in axes],
            "arrays": arrays,
            "missing": dict(self.missing),
            "missing_on": {name: dict(on) for name, on in self.missing_on.items()},
        }
        return json.dumps(text, separators=(",", ":")).encode()


@lru_cache(maxsize=64)  # one object for those of several parts that are the same
def decode(text: bytes) -> Layout:
    """A layout from JSON.

    Raises:
        ValueError: if it is not a layout's.
    """
    try:
        found = read_json(text)
        axes = [axes_of(*its) for its in found["axes"]]
        arrays = {str(n): array_of(d, s, axes[place]) for n, d, s, place in found["arrays"]}
        coordinates = {str(n): str(d) for n, d in found["coordinates"].items()}
        missing = {str(n): str(why) for n, why in found["missing"].items()}
        missing_on = {
            str(n): {str(k): str(why) for k, why in on.items()}
            for n, on in found["missing_on"].items()
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not a layout: {type(error).__name__}: {error}") from error
    if not set(coordinates.values()) <= COORDINATES:
        raise ValueError(f"not a layout: coordinates of types {coordinates}")
    return Layout(coordinates, arrays, missing, missing_on)


def read_json(text: bytes) -> dict[str, Any]:
    """A JSON object, nested no deeper than anything can be that is done with it.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        below = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for its in below for x in its if isinstance(x, (dict, list))]
        if not level:
            return found
    raise ValueError("JSON nested too deeply")


def whole(value: Any) -> int:
    """A whole number of 64 bits.

    Raises:
        ValueError: if it is none.
    """
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"expected a whole number of 64 bits, got {type(value).__name__}")
    return value


def fitting(dims: Sequence[str], labels: Mapping[str, Sequence[str]], shape: Sequence[int]) -> Axes:
    """The axes of an array: names as given or else numbers, and labels where they fit."""
    if len(dims) != len(shape) or len(set(dims)) < len(dims):
        dims = [f"dim_{number}" for number in range(len(shape))]
    lengths = dict(zip(dims, shape, strict=True))
    return axes_of(dims, {d: its for d, its in labels.items() if lengths.get(d) == len(its)})


def axes_of(dims: Sequence[str], labels: Mapping[str, Sequence[str]]) -> Axes:
    """Axes as they are read.

    Raises:
        ValueError: if they are none.
    """
    if not all(isinstance(dim, str) for dim in dims) or len(set(dims)) < len(dims):
        raise ValueError(f"not a layout: dims {dims}")
    return Axes(tuple(dims), {str(k): tuple(map(str, v)) for k, v in labels.items()})


def array_of(dtype: str, shape: Sequence[int], axes: Axes) -> tuple[str, tuple[int, ...], Axes]:
    """What is said of an array as it is read.

    Raises:
        ValueError: if there can be no such array.
    """
    fits = len(shape) == len(axes.dims) <= _RANK
    fits = fits and all(type(n) is int and 0 <= n <= 2**48 for n in shape)
    lengths = dict(zip(axes.dims, shape, strict=False))
    labelled = all(len(its) == lengths.get(dim) for dim, its in axes.labels.items())
    if dtype not in DTYPES or not fits or not labelled:
        raise ValueError(f"not a layout: an array of {dtype} {shape} with {axes}")
    return dtype, tuple(shape), axes
