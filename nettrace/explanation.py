"""What measures will cost on a network, told before they are taken, and which are too dear."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import nettrace.price_of_layers
import nettrace.price_of_windows  # noqa: F401
from nettrace.freeze import frozen
from nettrace.measures import Measure
from nettrace.pieces import Pieces, clock
from nettrace.price import Price, TooDear, Work, duration, price, size, total, works
from nettrace.statistics import Statistics
from nettrace.tape import signature


@dataclass(frozen=True)
class Explanation:
    """What measures will cost on a network and probe; printed as a table.

    Args:
        measures: the price of each measure by itself, by name.
        together: the price of all that are not refused, with what they share paid for once.
        look: that of the network's outputs and of examining them, at each record.
        check: that of the spot check, at the records number 1, 2, 4, 8, ...
        refused: by name, why a measure will be missing.
        budget: the share of wall time that may be spent on all this; None for any.
    """

    measures: Mapping[str, Price]
    together: Price
    look: Price
    check: Price
    refused: Mapping[str, TooDear]
    budget: float | None = None

    def table(self, width: int = 80) -> str:
        """The explanation as text, filled to so many characters in a line."""
        lines = [("measure", "backward passes", "time", "memory")]
        lines += [
            _row(name + " *" * (name in self.refused), p) for name, p in self.measures.items()
        ]
        lines += [
            _row("all together" if not self.refused else "all without *", self.together),
            _row("look, at each record", self.look),
            _row("spot check, at some", self.check),
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in lines
        ]
        rule = "-" * len(text[0])
        told = [text[0], rule, *text[1:-3], rule, *text[-3:], rule]
        for why in dict.fromkeys(error.why for error in self.refused.values()):
            names = [name for name, error in self.refused.items() if error.why == why]
            refusal = f"* {', '.join(names)}: {why}"
            told.append(textwrap.fill(refusal, width, subsequent_indent="  "))
        if self.budget is not None:
            apart = (self.together.seconds + self.look.seconds) / self.budget
            rate = f"within budget={self.budget:g}: a record every {duration(apart)} or more"
            told.append(textwrap.fill(rate, width))
        return "\n".join(told)

    def __str__(self) -> str:
        return self.table()


class PriceList:
    """What measures cost on a network, told anew whenever the operations on its tape change.

    Args:
        max_seconds: what one measure may take at one record; None for any time, and no prediction.

    Raises:
        ValueError: if that is not positive.
    """

    def __init__(self, max_seconds: float | None) -> None:
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"expected max_seconds above 0, or None, got {max_seconds!r}")
        self.max_seconds = max_seconds
        self._signature: str | None = None
        self._known: dict[str, TooDear | None] = {}

    def refused(self, look: Statistics, measures: Sequence[Measure]) -> dict[str, TooDear]:
        """By name, which measures are too dear on a look; the others' needs alone are expected."""
        if self.max_seconds is None:
            return {}
        if look._ranks.count > 1:
            with suppress(Exception):  # which the measures will say
                _ = look.assumed_likelihood  # found together, while prices are found by each alone
        several = look._ranks.each(self._refused(look, measures))
        refused = {name: error for own in several for name, error in own.items()}
        look.expect({need for m in measures if m.name not in refused for need in m.needs})
        return refused

    def _refused(self, look: Statistics, measures: Sequence[Measure]) -> dict[str, TooDear]:
        try:
            parameters = {n: p for n, p in look.model.named_parameters() if p.requires_grad}
            now = signature(look._outputs, parameters)
            if now != self._signature:
                self._signature, self._known = now, {}
            pieces = Pieces(look)
            for measure in measures:
                if measure.name not in self._known:
                    self._known[measure.name] = self._refusal(pieces, measure)
        except Exception:  # coupled samples, or what else there is: the measures will say it
            return {}
        found = {m.name: self._known[m.name] for m in measures}
        return {name: error for name, error in found.items() if error is not None}

    def explain(
        self, model: nn.Module, look: Callable[[], Statistics], measures: Sequence[Measure]
    ) -> Explanation:
        """The prices of measures on what `look` sees of a network."""
        with frozen(model):
            pieces = Pieces(look())
            found = {measure.name: price(pieces, measure.needs) for measure in measures}
            refusals = {measure.name: self._refusal(pieces, measure) for measure in measures}
            refused = {name: error for name, error in refusals.items() if error is not None}
            needs = {need for m in measures if m.name not in refused for need in m.needs}
            together = price(pieces, needs)
            # As `certify` says: 5 plain passes, and about 16 without gradients of weights.
            check = Price(5 * pieces.vjp + pieces.norms(16), pieces.chunk(5) + pieces.one_pass, 21)
            del pieces
        start, storages = clock(), {}

        def keep(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        copies = [*model.parameters(), *model.buffers()]
        with frozen(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            look()
        for p in copies:
            storages.pop(p.untyped_storage().data_ptr(), None)
        held = sum(storages.values()) + sum(p.nbytes for p in copies)
        return Explanation(found, together, Price(clock() - start, held, 0), check, refused)

    def _refusal(self, pieces: Pieces, measure: Measure) -> TooDear | None:
        """Why a measure is not to be taken, with what would do, if it is too dear."""
        found = works(pieces, measure.needs)
        exceeded = self._exceeded(pieces, found)
        if exceeded is None:
            return None
        dearest = sorted(found, key=lambda work: (work.seconds, work.kept), reverse=True)
        advice = [work.instead for work in dearest if work.instead][:1]
        if samples := self._samples(pieces, measure):
            advice.append(f"a probe of {samples:,} sample{'s' * (samples > 1)} fits")
        return TooDear(
            f"{measure.name} would take about {total(found)}",
            f"above {exceeded}: " + "; ".join([*advice, "or raise that limit"]),
        )

    def _exceeded(self, pieces: Pieces, found: Sequence[Work]) -> str | None:
        if self.max_seconds is not None and sum(w.seconds for w in found) > self.max_seconds:
            return f"max_seconds={self.max_seconds:g}"
        if sum(w.kept for w in found) + max((w.whole for w in found), default=0) > pieces.budget:
            return f"memory_budget={size(pieces.budget)}"
        return None

    def _samples(self, pieces: Pieces, measure: Measure) -> int:
        """How many samples could be afforded; 0 for none."""
        low, high = 0, pieces.samples
        while high - low > 1:
            middle = (low + high) // 2
            fewer = pieces.fewer(middle)
            fits = self._exceeded(fewer, works(fewer, measure.needs)) is None
            low, high = (middle, high) if fits else (low, middle)
        return low


def _row(name: str, price: Price) -> tuple[str, str, str, str]:
    return name, f"{price.passes:,.0f}", duration(price.seconds), size(price.bytes)
