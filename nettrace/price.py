"""What measures will cost on a network and probe, told before they are taken.

The price of each statistic is put together from a few pieces that are timed on the network (see
`nettrace.pieces`), and stands in `PRICES` under its name. What several measures need is paid for
once. A statistic without an entry is taken to cost what `trace` does: a backward pass an output,
and a number kept for each.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nettrace.freeze import frozen
from nettrace.measures import Measure
from nettrace.pieces import Pieces, clock
from nettrace.statistics import Statistics
from nettrace.tape import signature


class TooDear(RuntimeError):
    """A measure is not taken, because it would take longer or more memory than it may.

    Args:
        what: the measure and its price.
        why: the limit, and what would do instead.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}, {why}")
        self.why = why


@dataclass(frozen=True)
class Price:
    """What something costs.

    Args:
        seconds: wall time.
        bytes: of results that are kept, and of the largest temporary results beside them.
        passes: backward passes through the whole network.
    """

    seconds: float
    bytes: float
    passes: float

    def __str__(self) -> str:
        return f"{duration(self.seconds)} and {size(self.bytes)}"


@dataclass(frozen=True)
class Work:
    """What a statistic costs beside the statistics that it is made of.

    Args:
        seconds: wall time.
        passes: backward passes.
        kept: bytes of what stays.
        temporary: bytes that are needed meanwhile, as the budget allows.
        whole: bytes that are needed meanwhile, whatever the budget.
        of: the statistics that it is made of, priced by themselves.
        instead: what would do where this is too dear.
    """

    seconds: float = 0
    passes: float = 0
    kept: float = 0
    temporary: float = 0
    whole: float = 0
    of: tuple[str, ...] = ()
    instead: str = ""


Needs: TypeAlias = frozenset[str]
Rule: TypeAlias = Callable[[Pieces, Needs], Work]
#: By statistic, what it costs where all of `needs` are wanted; parts that several share have names
#: with an underscore.
PRICES: dict[str, Rule] = {}
_KERNEL = frozenset({"gram", "eigenvalues", "traced_eigenvalues"})
_FISHER = frozenset({"fisher_sqnorms", "hessian_traces"})
_TRACES = frozenset({"trace", "layer_traces"})


def prices(*names: str) -> Callable[[Rule], Rule]:
    """Registers what statistics cost."""

    def register(rule: Rule) -> Rule:
        PRICES.update(dict.fromkeys(names, rule))
        return rule

    return register


def rows(pieces: Pieces, count: int, of: tuple[str, ...] = (), instead: str = "") -> Work:
    """Norms of so many combinations of each sample's outputs, by a backward pass each."""
    kept = pieces.samples * count * pieces.item
    seconds = pieces.norms(count)
    temporary = pieces.chunk(count) + pieces.norms_keep + pieces.written(1) + pieces.one_pass
    return Work(seconds, count, kept, temporary, of=("jacobian", *of), instead=instead)


@prices("model", "inputs", "parameters", "samples", "step", "targets", "outputs", "likelihood")
@prices("assumed_likelihood", "losses", "routes")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work()  # the look's own, whose price stands by itself


@prices("jacobian")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(pieces.tape)


@prices("scores")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(pieces.scores, kept=pieces.samples * pieces.outputs * pieces.item)


@prices("fisher_metric")
def _(pieces: Pieces, needs: Needs) -> Work:
    size = pieces.samples * pieces.outputs**2 * pieces.item
    return Work(kept=size, whole=2 * size, instead="fisher/trace_mc draws targets")


@prices("mean_gradient_sqnorm")
def _(pieces: Pieces, needs: Needs) -> Work:
    size = 3 * pieces.parameter_bytes + pieces.one_pass
    return Work(pieces.vjp, 1, temporary=size, of=("jacobian", "scores"))


@prices("loss_gradient_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, 1, ("scores",))


@prices("drawn_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, pieces.draws)


@prices("_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    turned = bool(needs & _FISHER) and pieces.has_likelihood
    instead = "Jacobian.estimate_trace(relative_error=...) takes few passes"
    return rows(pieces, pieces.outputs, ("fisher_metric",) if turned else (), instead)


@prices("trace", "layer_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    if pieces.exact:
        return Work(of=("_sqnorms",))
    return rows(pieces, min(8, pieces.outputs))  # the fewest; more where they differ much


@prices("fisher_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    if pieces.exact and needs & _TRACES and pieces.has_likelihood:
        return Work(of=("_sqnorms",))
    cotangents = pieces.samples * pieces.outputs**2 * pieces.item
    found = rows(pieces, pieces.outputs, (), "fisher/trace_mc draws targets, for few passes")
    return replace(found, whole=2 * cotangents)


@prices("hessian_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("fisher_sqnorms",))


@prices("_kernel")
def _(pieces: Pieces, needs: Needs) -> Work:
    """The Gram matrix, or else the blocks, of all layers."""
    order, c = pieces.samples * pieces.outputs, pieces.outputs
    passes = pieces.passes_for_pairs
    fresh = pieces.pulled(c) + pieces.blocks_keep
    temporary = fresh + pieces.written(c) + pieces.one_pass
    seconds = passes * pieces.depth * pieces.pull + pieces.blocks() + pieces.touch(fresh)
    kept = pieces.layers * order * c * pieces.item
    if not needs & _KERNEL:
        instead = "ntk/trace and fisher/trace need no blocks"
        return Work(seconds, passes, kept, temporary, of=("jacobian",), instead=instead)
    return Work(
        seconds + pieces.gram(),
        passes,
        kept + order**2 * pieces.item,
        temporary + pieces.gram_sums,
        of=("jacobian",),
        instead="Jacobian.gram(trace_outputs=True) sums it over outputs, Jacobian.sketch and "
        "Jacobian.approximate_gram estimate it",
    )


@prices("gram", "layer_blocks", "blocks")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("_kernel",))


@prices("eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    order = pieces.samples * pieces.outputs
    return _spectrum(pieces, order, "Jacobian.spectrum(k) finds the k largest without the matrix")


@prices("traced_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _spectrum(pieces, pieces.samples, "Jacobian.gram(trace_outputs=True) forms less")


def _spectrum(pieces: Pieces, order: int, instead: str) -> Work:
    matrix = 8 * order**2
    seconds = pieces.eigenvalues(order)
    return Work(seconds, kept=8 * order, whole=2 * matrix, of=("gram",), instead=instead)


def _unknown(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, pieces.outputs)


def _works(pieces: Pieces, needs: Iterable[str]) -> list[Work]:
    """All that some statistics take, each part once; "first.gram" costs what "gram" does."""
    needs = frozenset(need.rpartition(".")[2] for need in needs)
    found: dict[str, Work] = {}
    left = sorted(needs)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = PRICES.get(name, _unknown)(pieces, needs)
            left += found[name].of
    return list(found.values())


def price(pieces: Pieces, needs: Iterable[str]) -> Price:
    """What some statistics cost together, beside the look at the network."""
    return _sum(_works(pieces, needs))


def _sum(works: Iterable[Work]) -> Price:
    works = list(works)
    return Price(
        sum(work.seconds for work in works),
        sum(work.kept for work in works) + max((w.temporary + w.whole for w in works), default=0),
        sum(work.passes for work in works),
    )


# What is told of a set of measures ----------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What measures will cost on a network and probe; printed as a table.

    Args:
        measures: the price of each measure by itself, by name.
        together: the price of all that are not refused, with what they share paid for once.
        look: that of the network's outputs and of examining them, at each record.
        check: that of the spot check, at the records number 1, 2, 4, 8, ...
        refused: by name, why a measure will be missing.
    """

    measures: Mapping[str, Price]
    together: Price
    look: Price
    check: Price
    refused: Mapping[str, TooDear]

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
        refused = {name: error for name, error in found.items() if error is not None}
        look.expect({need for m in measures if m.name not in refused for need in m.needs})
        return refused

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
        works = _works(pieces, measure.needs)
        exceeded = self._exceeded(pieces, works)
        if exceeded is None:
            return None
        dearest = sorted(works, key=lambda work: (work.seconds, work.kept), reverse=True)
        advice = [work.instead for work in dearest if work.instead][:1]
        if samples := self._samples(pieces, measure):
            advice.append(f"a probe of {samples:,} sample{'s' * (samples > 1)} fits")
        return TooDear(
            f"{measure.name} would take about {_sum(works)}",
            f"above {exceeded}: " + "; ".join([*advice, "or raise that limit"]),
        )

    def _exceeded(self, pieces: Pieces, works: Sequence[Work]) -> str | None:
        if self.max_seconds is not None and sum(w.seconds for w in works) > self.max_seconds:
            return f"max_seconds={self.max_seconds:g}"
        if sum(w.kept for w in works) + max((w.whole for w in works), default=0) > pieces.budget:
            return f"memory_budget={size(pieces.budget)}"
        return None

    def _samples(self, pieces: Pieces, measure: Measure) -> int:
        """How many samples could be afforded; 0 for none."""
        low, high = 0, pieces.samples
        while high - low > 1:
            middle = (low + high) // 2
            fewer = pieces.fewer(middle)
            fits = self._exceeded(fewer, _works(fewer, measure.needs)) is None
            low, high = (middle, high) if fits else (low, middle)
        return low


def _row(name: str, price: Price) -> tuple[str, str, str, str]:
    return name, f"{price.passes:,.0f}", duration(price.seconds), size(price.bytes)


def duration(seconds: float) -> str:
    """A time to two digits, as people say it."""
    for unit, length in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length or unit == "ms":
            return f"{float(f'{seconds / length:.2g}'):,.10g} {unit}"
    raise AssertionError


def size(number: float) -> str:
    """A number of bytes to two digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
