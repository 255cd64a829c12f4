"""The pieces of which prices are made, each timed once on the network itself.

Backward passes with their contraction to norms, one plain backward pass, contractions to Gram
matrices on as few samples as take two milliseconds, eigenvalues of a small matrix. What is scaled
from these is scaled by counts: of passes, of the multiplications by which the kernels choose their
way, and by the cube of the order for eigenvalues.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import getattr_static

import torch
from torch import Tensor

from nettrace.differentiate import jacobian, parse_bytes
from nettrace.gradients import Layer, Pulled, TapeGradients, reals
from nettrace.kernels import (
    Factor,
    Outer,
    Sum,
    blocks,
    gram_,
    gram_cost,
    is_written_out,
    repeated,
    sqnorms,
)
from nettrace.operator import Jacobian
from nettrace.representations import count
from nettrace.statistics import Statistics
from nettrace.tape import metadata

#: Seconds that a contraction is timed for at least, unless all of it takes less.
_TIMED = 2e-3
#: Seconds above which nothing is timed twice; the first call of all may take this long.
_SHORT = 1
#: Seconds above which nothing is timed twice.
_LONG = 5.0
#: Cotangents for which contractions are timed, at most.
_FEW = 8
#: What seconds are counted by.
clock = time.perf_counter


@dataclass(frozen=True)
class _Blocks:
    """What diagonal blocks take for a sample.

    Args:
        seconds: for all layers.
        held: bytes of inner products of tokens.
        written: bytes of each layer's gradients written out, and how much there can be at a time.
    """

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
        exact: whether there are few enough outputs for an exact trace.
        draws: how many targets Monte Carlo estimates draw.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._look = statistics
        self._timed_on, self.samples = len(statistics._outputs), statistics.samples
        self.outputs = statistics._outputs[0].numel()
        self.exact = self.outputs <= statistics.exact_outputs
        self.draws = statistics.draws

    @cached_property
    def _jacobian(self) -> Jacobian:
        return self._look._of_own

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return self._dtype.itemsize

    @property
    def budget(self) -> int:
        """Bytes that results may take."""
        return parse_bytes(self._look._memory)

    @property
    def has_likelihood(self) -> bool:
        """Whether the distribution of the outputs is known."""
        try:
            return self._look.assumed_likelihood is not None
        except ValueError:
            return False

    @cached_property
    def representations(self) -> int:
        """Of how many layers activations are looked at, or a few more."""
        return count(self._look.model, self._look._own)

    @cached_property
    def head_width(self) -> int:
        """D, how many features go into the last linear layer; 0 where there is none."""
        try:
            return self._look.last_layer.features.shape[-1]
        except Exception:  # which the measure itself will say
            return 0

    @property
    def window(self) -> tuple[int, int]:
        """Snapshots in the window of weights, and numbers in each; none where there is no window.

        Before the first snapshot, all parameters are taken to be in it.
        """
        window = self._look._window
        if window is None:
            return 0, 0
        return window.length, window.width or sum(w.numel() for w in self._look.weights.values())

    @property
    def has_exact_curvature(self) -> tuple[bool, bool]:
        """Whether the traces of the Hessian and of the Gauss-Newton matrix are exact."""
        look = self._look
        return look._is_piecewise_linear, look._is_canonical

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
        def read() -> None:
            again = jacobian(self._look._outputs, self._look.model, memory_budget=self.budget)
            again._gradients.layers(apart=True)

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
        return self._time(self._pull_few) / self._few

    @property
    def scores(self) -> float:
        """Seconds for the gradient of the losses by the outputs, and a check of what it mixes."""
        return self._share * self._scores

    @cached_property
    def _scores(self) -> float:
        found = getattr_static(Statistics, "_scores_of_own")
        try:
            return self._time(partial(found.func, self._look))
        except Exception:  # of losses that are not known, which measures will report
            return 0.0

    def gram(self) -> float:
        """Seconds for contracting pulled-back gradients to the Gram matrix."""
        total = 0.0
        for made, seconds, n, x, columns in self._grams:
            total += self._share * made
            few, whole = repeated(x, self._few), repeated(x, self.outputs)
            if not (is_written_out(few, n) and is_written_out(whole, self.samples)):
                total += seconds * gram_cost(whole, self.samples) / gram_cost(few, n)
                continue
            # Gradients are written out one by one, and their products run at another rate.
            share = self.samples * self.outputs / (n * self._few)
            products = self.multiplication * columns * (n * self._few) ** 2
            total += share * max(0, seconds - products) + share**2 * products
        return total

    @cached_property
    def multiplication(self) -> float:
        """Seconds for a multiplication in products of long rows, where a half of all is left out.

        In steps, so that five eighths of all are made.
        """
        rows = torch.ones((256, 8192), dtype=self._dtype, device=self._device)
        return 5 / 8 * self._time(lambda: rows @ rows.T) / (len(rows) * rows.numel())

    @property
    def gram_sums(self) -> float:
        """Bytes of the sum in float64 and its triangles, where gradients are written out."""
        forms = [repeated(x, self.outputs) for _, _, _, x, _ in self._grams]
        written = any(is_written_out(x, self.samples) for x in forms)
        return 3 * 8 * (self.samples * self.outputs) ** 2 if written else 0

    @cached_property
    def _grams(self) -> list[tuple[float, float, int, Factor, int]]:
        """By layer, what `_contraction` gives, for one gradient, and how many numbers it has."""
        limit = self._jacobian._limit
        parameters = self._jacobian._gradients.parameters

        def contract(x: Factor, n: int, k: int) -> None:
            gram_(torch.zeros((n, k, n, k), dtype=self._dtype, device=self._device), x, x, limit)

        found = []
        for layer in self._layers:
            made, seconds, n, x = self._contraction(layer, contract)
            columns = sum(reals(parameters[name]) for name in layer)
            found.append((made, seconds, n, repeated(x, 1), columns))
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
        held = [0]
        for layer in self._layers:
            pulled = {place: pulled[:step] for place, pulled in self._pulled_few.items()}
            with torch.no_grad():
                x = self._jacobian._gradients.factor(layer, pulled, slice(0, 1))
                sqnorms(x)
                held.append(_held(x))
                self._jacobian._gradients.forget()
        return sum(held) + max(held)  # each is joined from pieces

    @cached_property
    def _blocks(self) -> _Blocks:
        seconds, held, written = 0.0, [0.0], []
        for layer in self._jacobian._gradients.layers(apart=True):
            made, took, n, x = self._contraction(layer, lambda x, n, k: blocks(x, x))
            # K cotangents take K (T + K): once through the tokens, and with each other.
            k, c, t = self._few, self.outputs, x.shape[3] if isinstance(x, Outer) else 0
            seconds += made / self._timed_on + c * (t + c) / (k * (t + k)) * took / n
            most = float(self._memory / 8)
            held.append(_held(x) / n)
            if _held(x):
                most = 0.0
            elif isinstance(x, Outer):
                most = min(most, x.still.at_once * self.item)
            numbers = self.outputs * reals(self._jacobian._gradients.parameters[layer[0]])
            written.append((float(numbers * self.item), most))
        return _Blocks(seconds, sum(held) + max(held), tuple(written))

    @property
    def written_out(self) -> float:
        """Seconds for writing all gradients out, scaling them and taking their squares."""
        return 4 * self.touch(self.samples * self.outputs * self.parameter_bytes)

    @property
    def dense_gram(self) -> float:
        """Seconds for the products of all gradients that are written out."""
        numbers = self.parameter_bytes / self.item
        return self.multiplication * (self.samples * self.outputs) ** 2 * numbers

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
            numbers = torch.arange(order, dtype=torch.float64, device=self._device)
            matrix = (numbers[:, None] * numbers).cos()
            seconds = self._time(partial(torch.linalg.eigvalsh, matrix))
            if seconds > 2 * _TIMED or order == top:
                return seconds / order**3
            order = min(top, 2 * order)

    # What is counted -----------------------------------------------------------------------------

    @property
    def passes_for_pairs(self) -> int:
        """Backward passes for what needs all outputs of a layer at once, within the budget."""
        total = 0
        for part in self._parts:
            step = max(1, int(self._jacobian._room(part) / self._share))
            if step < self.outputs:
                step = max(1, int(self._jacobian._room(part, held=2) / self._share))
            ranges = math.ceil(self.outputs / step)
            total += self.outputs * (ranges + 1) // 2
        return total

    @property
    def depth(self) -> float:
        """How deep these passes go on average, as a share: each ends at its part of the layers."""
        parts = len(self._parts)
        return (parts + 1) / (2 * parts)

    @property
    def _parts(self) -> list[list[Layer]]:
        return self._jacobian._parts(False, self.outputs)

    def pulled(self, rows: int) -> float:
        """Bytes of the gradients that so many cotangents pull back at a time."""
        each = self._share * self._jacobian._gradients.bytes_per_cotangent(self._layers)
        return min(rows * each, max(each, self._memory / 3))

    def chunk(self, rows: int) -> float:
        """Bytes of those that norms work on together, and of their copy beside a token's."""
        return 2 * self.pulled(min(rows, self._at_once))

    @property
    def one_pass(self) -> float:
        """Bytes that a backward pass itself takes: a few of the largest gradient on its way."""
        return self._share * 3 * self._largest

    @cached_property
    def _largest(self) -> int:
        gradients = self._jacobian._gradients
        assert isinstance(gradients, TapeGradients)
        metas = [m for node in gradients._tape.nodes for m in metadata(node) if hasattr(m, "shape")]
        return max((m.dtype.itemsize * math.prod(m.shape) for m in metas), default=0)

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

    @cached_property
    def _pulled_few(self) -> Pulled:
        _ = self._pull  # which leaves what it pulled
        return self._last

    def _pull_few(self) -> None:
        gradients = self._jacobian._gradients
        cotangents = self._rows(self._few).view(self._few, *gradients.outputs.shape)
        self._last = gradients.pull(cotangents, self._layers)

    def _contraction(
        self, layer: Layer, contract: Callable[[Factor, int, int], object]
    ) -> tuple[float, float, int, Factor]:
        """Seconds for making the gradients, for contracting those of how many samples, and these.

        They are made for all samples: some rules look at all of them for any.
        """
        gradients, k = self._jacobian._gradients, self._few

        @torch.no_grad()
        def make(n: int) -> Factor:
            made = gradients.factor(layer, self._pulled_few, slice(0, n))
            gradients.forget()
            return made

        @torch.no_grad()
        def once(n: int) -> tuple[float, Factor]:
            x = make(n)
            return self._time(partial(contract, x, n, k), times=1), x

        making = self._time(partial(make, self._timed_on), times=1) * self.outputs / k
        n = 1
        while (seconds := once(n)[0]) < _TIMED and n < self._timed_on:
            n = min(self._timed_on, 2 * n if seconds > _TIMED / 8 else 8 * n)
        again, x = once(n)
        return making, min(seconds, again), n, x

    def _time(self, call: Callable[[], object], times: int = 3) -> float:
        """Wall time; the best of three where it is short, for the first warms up, or imports."""
        best = math.inf
        for number in range(times):
            self._synchronise()
            start = clock()
            call()
            self._synchronise()
            best = min(best, clock() - start)
            if best > (_SHORT if number else _LONG):
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
