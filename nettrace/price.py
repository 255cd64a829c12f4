"""What measures will cost on a network and probe, told before they are taken.

A few pieces are timed on the network itself: backward passes with their contraction to norms, one
plain backward pass, contractions to Gram matrices on as few samples as take a few milliseconds,
eigenvalues of a small matrix. From these the price of each statistic is put together: passes are
counted, contractions scaled by the counts by which the kernels choose their way, eigenvalues by the
cube of the order. A statistic that several measures need is paid for once.

The price of a statistic stands in `PRICES` under its name. One that has no entry is taken to cost
what `trace` does, a backward pass an output, and to leave a number an output.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from nettrace.gradients import Layer, Pulled, reals
from nettrace.kernels import Dense, Factor, Outer, Sum, blocks, gram_, gram_cost, repeated, sqnorms
from nettrace.measures import Measure
from nettrace.operator import Jacobian
from nettrace.statistics import Statistics
from nettrace.tape import Tape

#: Seconds that a contraction is timed for at least, unless all of it takes less.
_LONG = 1e-3
#: Cotangents for which contractions are timed, at most.
_FEW = 16
_clock = time.perf_counter


class TooDear(RuntimeError):
    """A measure is not taken, because it would take longer or more memory than it may."""


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
        return f"{_duration(self.seconds)} and {size(self.bytes)}"


@dataclass(frozen=True)
class Work:
    """What a statistic costs beside the statistics that it is made of.

    Args:
        seconds: wall time.
        passes: backward passes.
        kept: bytes of what stays.
        temporary: bytes that are needed meanwhile.
        of: the statistics that it is made of, priced by themselves.
        instead: what would do where this is too dear.
    """

    seconds: float = 0
    passes: float = 0
    kept: float = 0
    temporary: float = 0
    of: tuple[str, ...] = ()
    instead: str = ""


@dataclass(frozen=True)
class _Blocks:
    """What diagonal blocks take for a sample: seconds, bytes of inner products of tokens, and of
    gradients of each layer written out, with how much of these there can be at a time."""

    seconds: float
    held: float
    written: tuple[tuple[float, float], ...]


class Pieces:
    """The pieces of which prices are made, each timed when first needed, on one look.

    Args:
        statistics: of a network that is frozen meanwhile.

    Attributes:
        samples: N for which prices are told; `fewer` tells those of a smaller probe.
        outputs: C.
        item: bytes of a number.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._jacobian = jacobian = statistics._unchecked
        self._look = statistics
        self._timed_on = self.samples = jacobian.samples
        self.outputs = jacobian.outputs
        self.item = jacobian._gradients.dtype.itemsize
        self.exact = self.outputs <= statistics.exact_outputs
        self.draws = statistics.draws
        try:
            self.has_likelihood = statistics.assumed_likelihood is not None
        except ValueError:
            self.has_likelihood = False

    def fewer(self, samples: int) -> Pieces:
        """The same for fewer samples of the same kind."""
        twin = copy.copy(self)
        twin.samples = samples
        return twin

    @property
    def _share(self) -> float:
        return self.samples / self._timed_on

    # What is timed -------------------------------------------------------------------------------

    @property
    def tape(self) -> float:
        """Seconds for reading the tape."""
        return self._tape

    @cached_property
    def _tape(self) -> float:
        gradients = self._jacobian._gradients

        def read() -> None:
            tape = Tape(gradients.outputs, gradients.parameters, self._look._model.buffers())
            made = type(gradients)(gradients.outputs, gradients.parameters, tape, self._memory)
            made.layers(apart=True)

        return self._time(read)

    @property
    def vjp(self) -> float:
        """Seconds for a plain backward pass, with the gradients of all parameters."""
        return self._share * self._vjp

    @cached_property
    def _vjp(self) -> float:
        ones = torch.ones((self._timed_on, self.outputs))
        return self._time(lambda: self._jacobian.vjp(ones))

    def norms(self, rows: int) -> float:
        """Seconds for norms of so many combinations of each sample's outputs."""
        once, each = self._norms
        return self._share * (once + rows * each)

    @cached_property
    def _norms(self) -> tuple[float, float]:
        """Seconds for what all cotangents share, and for each of them."""
        step = min(self._at_once, self.outputs)
        few = self._time(lambda: self._jacobian.project(self._rows(step)).norms())
        if step == self.outputs:
            return 0.0, few / step
        more = self._time(lambda: self._jacobian.project(self._rows(2 * step)).norms())
        each = min(max((more - few) / step, more / (4 * step)), more / (2 * step))
        return max(0.0, more - 2 * step * each), each

    @property
    def pull(self) -> float:
        """Seconds for a backward pass to the operations that use a parameter, one of several."""
        return self._share * self._pull

    @cached_property
    def _pull(self) -> float:
        count = min(max(2, self._at_once), self.outputs)
        return self._time(lambda: self._pulled(count)) / count

    @property
    def scores(self) -> float:
        """Seconds for the gradient of the losses by the outputs, and a check of what it mixes."""
        return self._share * self._scores

    @cached_property
    def _scores(self) -> float:
        try:
            return self._time(lambda: Statistics.scores.func(self._look))
        except Exception:  # of losses that are not known, which measures will report
            return 0.0

    def gram(self) -> float:
        """Seconds for contracting pulled-back gradients to the Gram matrix."""
        found = 0.0
        for per_count, count in self._grams:
            found += per_count * count(self.samples)
        return found

    @cached_property
    def _grams(self) -> list[tuple[float, Callable[[int], float]]]:
        """By layer, seconds for a multiplication, and the number of these for N samples."""
        limit = self._jacobian._limit

        def contract(x: Factor, n: int, k: int) -> None:
            gram_(torch.zeros((n, k, n, k), dtype=self._dtype, device=self._device), x, x, limit)

        found = []
        for layer in self._layers:
            seconds, n, x = self._contraction(layer, contract)
            whole = repeated(x, self.outputs)
            found.append((seconds / gram_cost(x, n), partial(gram_cost, whole)))
        return found

    def blocks(self) -> float:
        """Seconds for contracting pulled-back gradients to each parameter's diagonal blocks."""
        return self.samples * self._blocks.seconds

    @property
    def blocks_keep(self) -> float:
        """Bytes of inner products of tokens that blocks keep meanwhile."""
        return self.samples * self._blocks.held

    @property
    def norms_keep(self) -> float:
        """The same for norms."""
        return self.samples * self._norms_keep

    @cached_property
    def _norms_keep(self) -> float:
        step = min(self._at_once, self._few)
        held = 0.0
        for layer in self._layers:
            pulled = {place: pulled[:step] for place, pulled in self._pulled_few.items()}
            with torch.no_grad():
                x = self._jacobian._gradients.factor(layer, pulled, slice(0, 1))
                sqnorms(x)
                held += _held(x)
                self._jacobian._gradients.forget()
        return held

    @cached_property
    def _blocks(self) -> _Blocks:
        seconds = held = 0.0
        written = []
        for layer in self._jacobian._gradients.layers(apart=True):
            took, n, x = self._contraction(layer, lambda x, n, k: blocks(x, x))
            seconds += (self.outputs / self._few) ** 2 * took / n
            most = float(self._memory / 8)
            held += _held(x) / n
            if _held(x):
                most = 0.0
            elif isinstance(x, Outer):
                most = min(most, x.still.at_once * self.item)
            numbers = self.outputs * reals(self._jacobian._gradients.parameters[layer[0]])
            written.append((float(numbers * self.item), most))
        return _Blocks(seconds, held, tuple(written))

    def touch(self, size: float) -> float:
        """Seconds for writing to memory that is new to the process."""
        return self._touch * size

    @cached_property
    def _touch(self) -> float:
        size = 2**26  # above what an allocator keeps for itself
        return self._time(lambda: torch.ones(size, dtype=torch.uint8, device=self._device)) / size

    def eigenvalues(self, order: int) -> float:
        """Seconds for all eigenvalues of a symmetric matrix in float64."""
        return self._eigenvalues * order**3

    @cached_property
    def _eigenvalues(self) -> float:
        top = self._timed_on * self.outputs
        order = min(top, 128)
        while True:
            matrix = torch.eye(order, dtype=torch.float64, device=self._device)
            matrix += 1 / order
            seconds = self._time(lambda m=matrix: torch.linalg.eigvalsh(m))
            if seconds > 2 * _LONG or order == top:
                return seconds / order**3
            order = min(top, 2 * order)

    # What is counted -----------------------------------------------------------------------------

    @property
    def passes_for_pairs(self) -> int:
        """Backward passes for what needs all outputs of a layer at once, within the budget."""
        total = 0
        for part in self._jacobian._parts(False, self.outputs):
            step = max(1, int(self._jacobian._room(part) / self._share))
            if step < self.outputs:
                step = max(1, int(self._jacobian._room(part, held=2) / self._share))
            ranges = math.ceil(self.outputs / step)
            total += self.outputs * (ranges + 1) // 2
        return total

    def pulled(self, rows: int) -> float:
        """Bytes of the gradients that so many cotangents pull back at a time."""
        each = self._share * self._jacobian._gradients.bytes_per_cotangent(self._layers)
        return min(rows * each, max(each, self._memory / 3))

    @property
    def layers(self) -> int:
        """How many parameters there are."""
        return len(self._jacobian._gradients.parameters)

    @property
    def parameter_bytes(self) -> int:
        """What a gradient of all parameters takes."""
        return self._jacobian.parameters * self.item

    def written(self, rows: int) -> float:
        """Bytes of gradients written out at a time, of the largest layer."""
        share = self.samples * rows / self.outputs
        return max((min(share * each, most) for each, most in self._blocks.written), default=0)

    # How it is timed -----------------------------------------------------------------------------

    @property
    def _memory(self) -> int:
        return self._jacobian._memory

    @property
    def _layers(self) -> list[Layer]:
        return self._jacobian._gradients.layers(apart=False)

    @property
    def _at_once(self) -> int:
        return self._jacobian._gradients.at_once(self._layers)

    @property
    def _dtype(self) -> torch.dtype:
        return self._jacobian._gradients.dtype

    @property
    def _device(self) -> torch.device:
        return self._jacobian._gradients.outputs.device

    def _rows(self, count: int) -> Tensor:
        """(K, N, C) the first outputs, over again if there are not as many."""
        numbers = torch.arange(count, device=self._device) % self.outputs
        rows = torch.nn.functional.one_hot(numbers, self.outputs).to(self._dtype)
        return rows[:, None].expand(-1, self._timed_on, -1).contiguous()

    @property
    def _few(self) -> int:
        """How many cotangents contractions are timed for."""
        room = self._jacobian._room(self._layers)
        return max(1, min(_FEW, self.outputs, room))

    def _pulled(self, count: int) -> Pulled:
        gradients = self._jacobian._gradients
        cotangents = self._rows(count).view(count, *gradients.outputs.shape)
        return gradients.pull(cotangents, self._layers)

    @cached_property
    def _pulled_few(self) -> Pulled:
        return self._pulled(self._few)

    def _contraction(
        self, layer: Layer, contract: Callable[[Factor, int, int], object]
    ) -> tuple[float, int, Factor]:
        """Seconds for how many samples, and the factor of these with few cotangents."""
        gradients, k = self._jacobian._gradients, self._few
        made: list[Factor] = []

        def work(n: int) -> None:
            with torch.no_grad():
                made[:] = [gradients.factor(layer, self._pulled_few, slice(0, n))]
                contract(made[0], n, k)
                gradients.forget()

        n = 1
        while (seconds := self._time(lambda: work(n), times=1)) < _LONG and n < self._timed_on:
            n = min(self._timed_on, 2 * n if seconds > _LONG / 8 else 8 * n)
        return min(seconds, self._time(lambda: work(n), times=1)), n, made[0]

    def _time(self, call: Callable[[], object], times: int = 2) -> float:
        """Wall time; the better of two where it is short, for the first warms up."""
        best = math.inf
        for _ in range(times):
            self._synchronise()
            start = _clock()
            call()
            self._synchronise()
            best = min(best, _clock() - start)
            if best > 1:
                break
        return best

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _held(x: Factor) -> int:
    """Bytes of inner products of tokens that were made for a factor and are kept with it."""
    terms = x.terms if isinstance(x, Sum) else [x]
    stills = [term.still for term in terms if isinstance(term, Outer)]
    return sum(still.gram.nbytes for still in stills if "gram" in vars(still))


# The prices of statistics -------------------------------------------------------------------------

Needs: TypeAlias = frozenset[str]
#: By statistic, what it costs where all of `needs` are wanted; parts that several share have names
#: with an underscore.
PRICES: dict[str, Callable[[Pieces, Needs], Work]] = {}
_KERNEL = frozenset({"gram", "eigenvalues", "traced_eigenvalues"})
_FISHER = frozenset({"fisher_sqnorms", "hessian_traces"})
_TRACES = frozenset({"trace", "layer_traces"})


def prices(*names: str) -> Callable[[Callable[[Pieces, Needs], Work]], object]:
    """Registers what statistics cost."""

    def register(function: Callable[[Pieces, Needs], Work]) -> object:
        PRICES.update(dict.fromkeys(names, function))
        return function

    return register


def rows(pieces: Pieces, count: int, of: tuple[str, ...] = (), instead: str = "") -> Work:
    """Norms of so many combinations of each sample's outputs, by a backward pass each."""
    kept = pieces.samples * count * pieces.item
    seconds = pieces.norms(count)
    temporary = pieces.pulled(1) + pieces.norms_keep + pieces.written(1)
    return Work(seconds, count, kept, temporary, ("jacobian", *of), instead)


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
    return Work(kept=size, temporary=2 * size, instead="fisher/trace_mc draws targets")


@prices("mean_gradient_sqnorm")
def _(pieces: Pieces, needs: Needs) -> Work:
    size = 3 * pieces.parameter_bytes
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
    return replace(found, temporary=found.temporary + 2 * cotangents)


@prices("hessian_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("fisher_sqnorms",))


@prices("_kernel")
def _(pieces: Pieces, needs: Needs) -> Work:
    """The Gram matrix, or else the blocks, of all layers."""
    order, c = pieces.samples * pieces.outputs, pieces.outputs
    passes = pieces.passes_for_pairs
    fresh = pieces.pulled(c) + pieces.blocks_keep
    temporary = fresh + pieces.written(c)
    seconds = passes * pieces.pull + pieces.blocks() + pieces.touch(fresh)
    kept = pieces.layers * order * c * pieces.item
    if not needs & _KERNEL:
        return Work(seconds, passes, kept, temporary, ("jacobian",), "ntk/trace takes less memory")
    # Beside the matrix lies its sum in float64, with a copy of either triangle.
    return Work(
        seconds + pieces.gram(),
        passes,
        kept + order**2 * pieces.item,
        temporary + 3 * order**2 * 8,
        ("jacobian",),
        "Jacobian.gram(trace_outputs=True) sums it over outputs, Jacobian.sketch and "
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
    return Work(
        pieces.eigenvalues(order), 0, 8 * order, 3 * 8 * order**2, ("gram",), instead
    )


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
    works = _works(pieces, needs)
    return Price(
        sum(work.seconds for work in works),
        sum(work.kept for work in works) + max((work.temporary for work in works), default=0),
        sum(work.passes for work in works),
    )
