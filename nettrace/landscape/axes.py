"""Which axes of a network's tensors count the same units.

An axis is a product of *factors*, outer first: attention makes 2 heads of 8 of 16 features. Factors
of two axes are joined where an operation lets an index of one meet the same index of the
other, as the outputs of a layer meet the inputs of the next. A factor is *fixed* where its order
matters by itself: of inputs, outputs, places of a filter, or whatever an unknown operation sees.
The units that a free factor counts may be permuted on all axes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias


class Factor:
    """A factor of an axis.

    Args:
        size: how many units it counts.
        fixed: whether their order matters.
    """

    def __init__(self, size: int, fixed: bool) -> None:
        self.size = size
        self.fixed = fixed
        self._joined: Factor | None = None
        self._parts: tuple[Factor, Factor] | None = None

    @property
    def root(self) -> Factor:
        """The factor that stands for all that this one is joined with."""
        found = self
        while found._joined is not None:
            found = found._joined
        return found

    def join(self, other: Factor) -> None:
        """Makes one of two roots of one size without parts."""
        if self is not other:
            other._joined = self
            self.fixed |= other.fixed

    def split(self, outer: int) -> None:
        """Divides a root into an outer factor of a size and the rest."""
        self._parts = (Factor(outer, self.fixed), Factor(self.size // outer, self.fixed))

    def leaves(self) -> list[Factor]:
        """The roots without parts that it consists of."""
        root = self.root
        if root._parts is None:
            return [root]
        return [leaf for part in root._parts for leaf in part.leaves()]


#: None of an axis of length one, which may be broadcast.
Axis: TypeAlias = tuple[Factor, ...]
Axes: TypeAlias = tuple[Axis, ...]


def axis(size: int, *, fixed: bool) -> Axis:
    """A new axis."""
    return (Factor(size, fixed),) if size > 1 else ()


def axes(shape: Sequence[int], *, fixed: bool) -> Axes:
    """New axes of a tensor."""
    return tuple(axis(size, fixed=fixed) for size in shape)


def leaves(one: Axis) -> Axis:
    """The factors of an axis as they are divided by now."""
    return tuple(leaf for factor in one for leaf in factor.leaves())


def factors(several: Axes) -> list[Factor]:
    """The factors of all axes of a tensor, as they are divided by now."""
    return [leaf for one in several for leaf in leaves(one)]


def fix(*several: Axis) -> None:
    """The order of all units matters."""
    for one in several:
        for leaf in leaves(one):
            leaf.fixed = True


def join(one: Axis, other: Axis) -> Axis:
    """Lets equal indices of two axes meet, which are divided alike; one of length one is broadcast.

    Where they cannot be divided alike, both are fixed.
    """
    if not one or not other:
        return one or other
    left, right = list(one), list(other)
    while left and right:
        a, b = _first(left), _first(right)
        if a.size == b.size:
            a.join(b)
        elif a.size % b.size == 0:
            a.split(b.size)
            left.insert(0, a)
            right.insert(0, b)
        elif b.size % a.size == 0:
            b.split(a.size)
            left.insert(0, a)
            right.insert(0, b)
        else:
            fix(one, other)
            break
    return one


def _first(row: list[Factor]) -> Factor:
    """Takes the first factor without parts from a row."""
    row[:1] = row[0].leaves()
    return row.pop(0)


def reshape(several: Sequence[Axis], shape: Sequence[int]) -> Axes:
    """The axes of a tensor in another shape; where that does not divide them evenly, all fixed."""
    row = [factor for one in several for factor in one]
    found: list[Axis] = []
    for size in shape:
        taken: list[Factor] = []
        lacking = size
        while lacking > 1:
            if not row:
                return _given_up(several, shape)
            factor = _first(row)
            if lacking % factor.size == 0:
                taken.append(factor)
                lacking //= factor.size
            elif factor.size % lacking == 0:
                factor.split(lacking)
                row.insert(0, factor)
            else:
                return _given_up(several, shape)
        found.append(tuple(taken))
    return tuple(found)


def part(one: Axis, total: int, begin: int, length: int) -> Axis:
    """A range of an axis of a length: one of several equal ones, else nothing may be permuted."""
    if length == total:
        return one
    if length and total % length == 0 and begin % length == 0:
        outer, inner = reshape([one], [total // length, length])
        fix(outer)
        return inner
    fix(one)
    return axis(length, fixed=True)


def _given_up(several: Sequence[Axis], shape: Sequence[int]) -> Axes:
    fix(*several)
    return axes(shape, fixed=True)
