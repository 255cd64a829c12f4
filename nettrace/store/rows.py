"""Which rows of which parts count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nettrace.store.layout import Layout
from nettrace.store.part import Part

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The rows of one trace that count; of those that say the same of a step, the later.

    Args:
        parts: what they are in.
        layouts: theirs, without repetition.
        step: (n,).
        part: (n,) numbers of their parts.
        layout: (n,) numbers of their layouts.
        row: (n,) their numbers within their parts.
    """

    parts: Sequence[Part]
    layouts: Sequence[Layout]
    step: Integers
    part: Integers
    layout: Integers
    row: Integers

    def names(self) -> set[str]:
        """The arrays that there are, and the quantities that are missing."""
        counted = [self.layouts[number] for number in np.unique(self.layout)]
        return {name for layout in counted for name in (*layout.arrays, *layout.missing)}

    def where(self, layouts: npt.NDArray[np.bool_], steps: Integers) -> Integers:
        """The row (s,) of each step, -1 for none, of those with some layouts (m,)."""
        chosen = np.flatnonzero(layouts[self.layout])
        found = np.full(len(steps), -1)
        found[np.searchsorted(steps, self.step[chosen])] = chosen  # of several, the last stays
        return found


def attempts(parts: Sequence[Part]) -> list[str]:
    """The attempts at a run, in the order in which they were begun."""
    return list(dict.fromkeys(part.attempt for part in parts))


def rows(parts: Sequence[Part], attempt: int | None = None) -> Rows:
    """The rows that count.

    Args:
        parts: of a trace, in order.
        attempt: the number of the attempt whose rows count, whatever came after; by default, an
            attempt supersedes all earlier ones from its start on.

    Raises:
        IndexError: if there is no such attempt.
    """
    names = attempts(parts)
    if attempt is not None:
        if not -len(names) <= attempt < len(names):
            raise IndexError(f"there is no attempt {attempt}: the trace has {len(names)}")
        parts = [part for part in parts if part.attempt == names[attempt]]
    # Of several ranks, the lowest comes last and so is read.
    parts = sorted(parts, key=lambda part: (names.index(part.attempt), -part.header.rank))
    layouts: dict[str, int] = {}
    pieces: list[tuple[Integers, ...]] = []
    distinct: list[Layout] = []
    for number, part in enumerate(parts):
        own = np.empty(len(part.layouts), np.int64)
        for place, layout in enumerate(part.layouts):
            key = repr(layout)
            if key not in layouts:
                layouts[key] = len(distinct)
                distinct.append(layout)
            own[place] = layouts[key]
        later = [
            other.start
            for other in parts
            if names.index(other.attempt) > names.index(part.attempt) and other.start is not None
        ]
        counted = np.flatnonzero(part.steps < min(later, default=np.inf))
        layout_of = own[part.layout[counted]] if len(own) else counted
        pieces.append((part.steps[counted], np.full(len(counted), number), layout_of, counted))
    empty = np.empty(0, np.int64)
    columns = [np.concatenate([empty, *column]) for column in zip(*pieces, strict=True)]
    return Rows(parts, distinct, *(columns or [empty] * 4))
