"""What earlier looks at a network leave for measures that compare looks.

A measure compares with the first look at which it was taken, or with the one before this. Measures
may be due at different steps. So what is kept is kept for each `Reference` apart: for all measures
that ask for the same statistics of the same look, together with the step that they are of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

#: "first" or "previous", and the names of the statistics that are wanted of that look, in order.
Reference: TypeAlias = tuple[str, ...]
#: A tensor, or one for each parameter.
Statistic: TypeAlias = Tensor | dict[str, Tensor]


class Stepped(Protocol):
    """A look at a network, with its statistics as attributes."""

    step: int

    def together(self) -> AbstractContextManager[None]:
        """What is done in this succeeds in all processes that look together, or in none."""


@dataclass(frozen=True)
class Kept:
    """Statistics of one look.

    Args:
        step: how many updates the weights had had.
        values: the statistics, by name.
    """

    step: int
    values: Mapping[str, Statistic]

    def __getitem__(self, name: str) -> Any:
        return self.step if name == "step" else self.values[name]

    def to(self, device: torch.device) -> Kept:
        """The same, with what lies on the CPU, as after loading, on the device."""
        return Kept(self.step, {name: _moved(v, device) for name, v in self.values.items()})


class Past:
    """What earlier looks of one run left: statistics of the first, and of the latest two.

    The latest but one serves a look that is taken again at the same step, as on resuming, which
    then finds the same. A step before the last begins another run, which has no past.

    Memory: for each reference one copy of its statistics, or two of previous ones; those of equal
    names and steps are shared.
    """

    def __init__(self) -> None:
        self._kept: dict[Reference, list[Kept]] = {}
        self._last = 0

    def before(self, reference: Reference, step: int) -> Kept | None:
        """What a reference is to a look at some step; None if there is no earlier look."""
        if step < self._last:
            return None
        earlier = [kept for kept in self._kept.get(reference, ()) if kept.step < step]
        return earlier[-1] if earlier else None

    def keep(self, look: Stepped, references: Iterable[Reference]) -> None:
        """Keeps copies of what references will ask for, as far as the look has it."""
        if look.step < self._last:
            self._kept.clear()
        self._last = look.step
        copies: dict[str, Statistic] = {}
        for reference in sorted(references):  # in all processes in one order
            when, *names = reference
            earlier = [kept for kept in self._kept.get(reference, ()) if kept.step < look.step]
            if when == "first" and earlier:
                continue
            try:
                with look.together():
                    for name in names:
                        if name not in copies:
                            copies[name] = _copied(getattr(look, name))
            except Exception:  # which the measure that asked for it has reported
                continue
            now = Kept(look.step, {name: copies[name] for name in names})
            self._kept[reference] = [*earlier[-1:], now]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; not copied."""
        kept = {
            " ".join(reference): [{"step": k.step, "values": dict(k.values)} for k in several]
            for reference, several in self._kept.items()
        }
        return {"last": self._last, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what another past's `state_dict` returned in place of what is here."""
        self._last = state["last"]
        self._kept = {
            tuple(reference.split(" ")): [Kept(k["step"], k["values"]) for k in several]
            for reference, several in state["kept"].items()
        }


def references(needs: Iterable[str], asked: Mapping[str, Reference]) -> set[Reference]:
    """What needs such as "gram", "first.gram" and "previous.step" ask of earlier looks.

    Args:
        needs: as given to `nettrace.measures.measure`.
        asked: by statistic, the reference that it makes use of itself.
    """
    needs = list(needs)
    found = {asked[need] for need in needs if need in asked}
    for when in ("first", "previous"):
        names = {need.partition(".")[2] for need in needs if need.startswith(when + ".")}
        if names:
            found.add((when, *sorted(names - {"step"})))
    return found


def _copied(value: Statistic) -> Statistic:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {name: tensor.detach().clone() for name, tensor in value.items()}


def _moved(value: Statistic, device: torch.device) -> Statistic:
    if isinstance(value, Tensor):
        return value.to(device) if value.device.type == "cpu" else value
    return {name: t.to(device) if t.device.type == "cpu" else t for name, t in value.items()}
