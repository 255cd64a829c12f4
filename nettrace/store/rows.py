"""Which rows of which parts count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nettrace.store.layout import Layout
from nettrace.store.part import Part

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The rows of one trace that count; of those that say the same of a step, the last.

    Args:
        parts: what they are in.
        layouts: those of the rows.
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
        return {name for x in self.layouts for name in (*x.arrays, *x.missing)}

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
        parts: of a trace, in order, that have rows.
        attempt: the number of the attempt whose rows count, whatever came after; by default, an
            attempt supersedes all earlier ones from its start on, and gives way to them before.

    Raises:
        IndexError: if there is no such attempt.
    """
    names = {name: number for number, name in enumerate(attempts(parts))}
    if attempt is not None:
        if not -len(names) <= attempt < len(names):
            raise IndexError(f"there is no attempt {attempt}: the trace has {len(names)}")
        parts = [part for part in parts if names[part.attempt] == attempt % len(names)]
    # Of several ranks, the lowest comes last and so is read.
    parts = sorted(parts, key=lambda part: (names[part.attempt], -part.header.rank))
    first = _superseded(parts, names)
    layouts: dict[int, int] = {}
    distinct: list[Layout] = []
    empty = np.empty(0, np.int64)
    pieces: list[tuple[Integers, ...]] = [(empty, empty, empty, empty)]
    early: list[tuple[int, tuple[Integers, ...]]] = []
    for number, part in enumerate(parts):
        end = first[names[part.attempt]]
        counted = np.arange(len(part.steps)) if end is None else np.flatnonzero(part.steps < end)
        used, which = np.unique(part.layout[counted], return_inverse=True)
        own = np.empty(len(used), np.int64)
        for place, layout in enumerate(part.layouts[number] for number in used):
            if id(layout) not in layouts:
                layouts[id(layout)] = len(distinct)
                distinct.append(layout)
            own[place] = layouts[id(layout)]
        piece = (part.steps[counted], np.full(len(counted), number), own[which], counted)
        # What an attempt says of the weights that it began with counts where none before it does.
        begin = part.steps[counted] < (-1 if part.start is None else part.start)
        early.append((names[part.attempt], tuple(column[begin] for column in piece)))
        pieces.append(tuple(column[~begin] for column in piece))
    pieces[:0] = [piece for _, piece in sorted(early, key=lambda one: -one[0])]
    return Rows(parts, distinct, *(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _superseded(parts: Sequence[Part], names: Mapping[str, int]) -> list[int | None]:
    """By attempt, the step from which on later ones supersede it."""
    starts: list[int | None] = [None] * len(names)
    for part in parts:
        if part.start is not None:
            starts[names[part.attempt]] = _least(starts[names[part.attempt]], part.start)
    first: list[int | None] = [None] * len(names)
    for number in reversed(range(len(names) - 1)):
        first[number] = _least(first[number + 1], starts[number + 1])
    return first


def _least(one: int | None, other: int | None) -> int | None:
    return min((x for x in (one, other) if x is not None), default=None)
