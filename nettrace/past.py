"""What a network's first look and its latest leave for measures that compare looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


class Kept:
    """Statistics as attributes.

    Args:
        values: an object that has them.
        names: those to keep, copied; by default whichever are asked for.
    """

    def __init__(self, values: object, names: Iterable[str] | None = None) -> None:
        self._values = values
        if names is not None:
            self._values = None
            vars(self).update({name: _copied(getattr(values, name)) for name in names})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._values is None:
            raise AttributeError(f"an earlier look kept no {name!r}")
        return getattr(self._values, name)


class Past:
    """What earlier looks left."""

    def __init__(self) -> None:
        self.first: Kept | None = None
        self.previous: Kept | None = None

    def keep(self, look: object, needs: Iterable[str]) -> None:
        """Keeps of a look what `needs` such as "first.gram" or "previous.step" will ask for."""
        names: dict[str, set[str]] = {"first": set(), "previous": set()}
        for need in needs:
            when, _, name = need.rpartition(".")
            if when:
                names[when].add(name)
        if names["first"] and self.first is None:
            self.first = Kept(look, names["first"])
        if names["previous"]:
            self.previous = Kept(look, names["previous"])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    return value
