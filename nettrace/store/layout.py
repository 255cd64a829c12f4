"""What the bytes of a row mean: which arrays there are, and where they lie.

Rows of one layout differ in their numbers alone. Small arrays lie in the head of the row's frame,
so that opening a trace checks them; large ones in its body, which is read when somebody asks.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

#: Step and number of the layout, which every row begins with.
ROW = struct.Struct("<qI")
#: Arrays of more bytes than this lie in the body.
INLINE = 4096
#: Types of arrays, and of coordinates.
DTYPES = frozenset("|b1 |i1 |u1 <i2 <u2 <i4 <u4 <i8 <u8 <f2 <f4 <f8 <c8 <c16".split())
COORDINATES = {"<i8": "q", "<f8": "d"}


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

    @cached_property
    def row(self) -> struct.Struct:
        """Step, number of the layout and coordinates."""
        return struct.Struct(ROW.format + "".join(map(COORDINATES.__getitem__, self.types)))

    @property
    def types(self) -> list[str]:
        """Those of the coordinates."""
        return list(self.coordinates.values())

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where the arrays lie: coordinates, small arrays, checksums; then large arrays."""
        sizes = {n: math.prod(s) * np.dtype(d).itemsize for n, (d, s, _) in self.arrays.items()}
        large = [name for name, size in sizes.items() if size > INLINE]
        inside = self.row.size + sum(size for size in sizes.values() if size <= INLINE)
        inline, check, outside = self.row.size, inside, inside + 4 * len(large)
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
        return self.row.size + small + 4 * len(large), sum(large)

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

    @classmethod
    def decode(cls, text: bytes) -> Layout:
        """From JSON.

        Raises:
            ValueError: if it is not a layout's.
        """
        try:
            found = json.loads(text)
            axes = [axes_of(*its) for its in found["axes"]]
            arrays = {str(n): array_of(d, s, axes[place]) for n, d, s, place in found["arrays"]}
            coordinates = {str(n): str(d) for n, d in found["coordinates"].items()}
            missing = {str(n): str(why) for n, why in found["missing"].items()}
            missing_on = {
                str(n): {str(k): str(why) for k, why in on.items()}
                for n, on in found["missing_on"].items()
            }
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"not a layout: {type(error).__name__}: {error}") from error
        if not set(coordinates.values()) <= COORDINATES.keys():
            raise ValueError(f"not a layout: coordinates of types {coordinates}")
        return cls(coordinates, arrays, missing, missing_on)


def read_json(text: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


def axes_of(dims: list[str], labels: dict[str, list[str]]) -> Axes:
    """Axes as they are read.

    Raises:
        ValueError: if they are none.
    """
    if not all(isinstance(dim, str) for dim in dims):
        raise ValueError(f"not a layout: dims {dims}")
    return Axes(tuple(dims), {str(k): tuple(map(str, v)) for k, v in labels.items()})


def array_of(dtype: str, shape: list[int], axes: Axes) -> tuple[str, tuple[int, ...], Axes]:
    """What is said of an array as it is read.

    Raises:
        ValueError: if there can be no such array.
    """
    longest = 2**16 if 0 in shape else 2**48  # sides of nothing are only said to be there
    fits = len(shape) == len(axes.dims) <= 32
    fits = fits and all(type(n) is int and 0 <= n <= longest for n in shape)
    lengths = dict(zip(axes.dims, shape, strict=False))
    labelled = all(len(its) == lengths.get(dim) for dim, its in axes.labels.items())
    if dtype not in DTYPES or not fits or not labelled:
        raise ValueError(f"not a layout: an array of {dtype} {shape} with {axes}")
    return dtype, tuple(shape), axes
