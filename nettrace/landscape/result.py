"""What all samplers leave: an xarray Dataset of values with standard errors and conventions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nettrace.record import ERROR

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Quantity:
    """One quantity of a result.

    Args:
        value: an array.
        dims: names of its axes.
        convention: what it is, of what and in which units.
        standard_error: of the same shape, if it is an estimate.
        source: where it is defined.
    """

    value: npt.ArrayLike
    dims: Sequence[str]
    convention: str
    standard_error: npt.ArrayLike | None = None
    source: str = ""


def check_names(observables: Iterable[str], taken: Iterable[str]) -> None:
    """Refuses observables that are called as something else in a result.

    Raises:
        ValueError: if one is.
    """
    used = set(taken)
    for name in observables:
        if name in used or name.endswith((ERROR, "_without")):
            raise ValueError(
                f"expected observables= to have names of their own, got {name!r}, which the result "
                "uses for something else"
            )


def spans(numbers: Sequence[int]) -> str:
    """Ascending whole numbers, in which neighbours are drawn together: "1, 4 to 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a} to {b}" if b > a else f"{a}" for a, b in found)


def dataset(
    quantities: Mapping[str, Quantity],
    coordinates: Mapping[str, npt.ArrayLike] | None = None,
    *,
    doubts: Iterable[str] = (),
    **attributes: str | float,
) -> xr.Dataset:
    """A result: "x" for each quantity x, with "x_standard_error" beside it if it has one.

    Args:
        quantities: by name.
        coordinates: values along named axes.
        doubts: what makes the result doubtful, a sentence each.
        attributes: of the whole: what it was taken with.
    """
    import xarray as xr

    variables: dict[str, Any] = {}
    for name, quantity in quantities.items():
        about = {"convention": quantity.convention}
        if quantity.source:
            about["source"] = quantity.source
        variables[name] = (tuple(quantity.dims), np.asarray(quantity.value), about)
        if quantity.standard_error is not None:
            said = {"convention": f"standard error of {name}"}
            variables[name + ERROR] = (
                tuple(quantity.dims),
                np.asarray(quantity.standard_error),
                said,
            )
    named = {name: np.asarray(values) for name, values in (coordinates or {}).items()}
    return xr.Dataset(variables, named, {**attributes, "doubts": "\n".join(doubts)})
