"""The weights of the last few hundred updates, kept while a network trains."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nettrace.differentiate import parse_bytes
from nettrace.gathered import original
from nettrace.kernels import weight_welford_
from nettrace.missing import told
from nettrace.unwrapped import is_spread
from nettrace.weight_sketch import WeightSketch, buckets, gather, sampled

Keep: TypeAlias = Literal["snapshots", "sketch", "moments"]
_KINDS: tuple[Keep, ...] = ("snapshots", "sketch", "moments")
Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What is kept in place of snapshots: vectors of all parameters' real numbers.

    Args:
        first: (P,) the weights with which the window began.
        means: (P,) over the snapshots, less the first.
        squares: (P,) sums over the snapshots of squared deviations from the mean.
        moved: (P,) the last weights less the first.
        places: by name, which of the numbers are a parameter's.
    """

    first: Tensor
    means: Tensor
    squares: Tensor
    moved: Tensor
    places: dict[str, slice]


class WeightWindow:
    """The weights after each of the last `length` updates: as they are, sketched, or their moments.

    - "snapshots": the weights as they were, bit for bit, half precision in float32. For these there
      is all that fluctuations have: also the directions in which weights move.
    - "sketch": a few thousand numbers for each update, which know inner products of the weights'
      motion to 2.2 % (see `nettrace.weight_sketch`): variances, correlation times, displacements.
    - "moments": each weight's mean and variance since the window began, and how far it has come
      from there; they do not forget, and go on beyond `length`.

    The first of these that fits into `memory` is taken, as the parameters' shapes alone decide; the
    attribute `kind` says which. Snapshots lie on the CPU, all else where the parameters are. Of
    complex parameters, real and imaginary parts are two numbers; tied ones are there once.

    The window begins anew where updates are left out, at a step before the last, as of another run,
    and where parameters come, go, or change their shape, type or device.

    Args:
        length: T, how many snapshots make up a window; at least 4.
        stride: of how many updates one is seen, those whose step is a multiple of it.
        parameters: names of parameters, or patterns such as "layers.1.*"; of those that require a
            gradient.
        keep: what to keep; None for the first that fits.
        memory: bytes that the window may take, as in `nettrace.jacobian`.
        seed: of the signs of sketches.
        population: N, samples of which each epoch deals out batches without replacement, for the
            theory of what to expect; None for independent batches, or where that is not known.

    Raises:
        ValueError: if a number is too small, `keep` is none of these, or the memory cannot be read.

    Attributes:
        kind: what is kept, None before the first snapshot and where nothing can be.
        reason: why nothing is kept, if nothing can be.
        count: how many snapshots there are.
        names: of the parameters.
        shapes: by name, those of the parameters.

    Example:
        >>> import torch, nettrace as nt
        >>> from nettrace.window import WeightWindow
        >>> model, window = torch.nn.Linear(3, 2), WeightWindow(length=4)
        >>> for step in range(6):
        ...     window.see(model, step)
        >>> window.kind, window.count, list(window.steps)
        ('snapshots', 4, [2, 3, 4, 5])
    """

    def __init__(
        self,
        length: int = 360,
        *,
        stride: int = 1,
        parameters: str | Sequence[str] = "*",
        keep: Keep | None = None,
        memory: int | str = "256MiB",
        seed: int = 0,
        population: int | None = None,
    ) -> None:
        if length < 4:
            raise ValueError(f"expected a window of at least 4 snapshots, got length={length}")
        if stride < 1:
            raise ValueError(f"expected a stride of at least 1 update, got {stride}")
        if keep not in (*_KINDS, None):
            raise ValueError(f"expected keep to be one of {_KINDS} or None, got {keep!r}")
        self.length, self.stride = length, stride
        self.parameters = (parameters,) if isinstance(parameters, str) else tuple(parameters)
        self.keep, self.memory, self.seed = keep, parse_bytes(memory), seed
        self.population = population
        self.begin()

    def begin(self) -> None:
        """Forgets all snapshots: the next is the first."""
        self.kind: Keep | None = None
        self.reason: str | None = None
        self.count = 0
        self.gap = 0
        self._seen = 0
        self._last: int | None = None
        self._layout: tuple[Any, ...] | None = None
        self._chosen: dict[str, bool] = {}
        self.shapes: dict[str, torch.Size] = {}
        self._places: list[slice] = []
        self._sizes: list[int] = []
        self._rows = torch.empty(0)
        self._sketch: WeightSketch | None = None
        self._moments: Moments | None = None
        self._groups: list[tuple[int, int]] = []
        self._notes: deque[tuple[Any, Any, float]] = deque(maxlen=self.length)
        #: What the optimizer's rule is beside learning rate and momentum, where there is one alone.
        self.rule: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """The names of the parameters."""
        return list(self.shapes)

    @property
    def sizes(self) -> dict[str, int]:
        """By name, how many real numbers a parameter has."""
        return dict(zip(self.shapes, self._sizes, strict=True))

    @property
    def size(self) -> int:
        """P, how many real numbers a snapshot has."""
        return sum(self._sizes)

    @property
    def width(self) -> int:
        """How many numbers are kept of a snapshot: P, or fewer in a sketch; 0 before the first."""
        return self._rows.shape[-1]

    @property
    def is_full(self) -> bool:
        """Whether there are as many snapshots as make up a window."""
        return self.count >= self.length

    @property
    def steps(self) -> range:
        """How many updates the weights had had at each snapshot."""
        if self._last is None:
            return range(0)
        return range(self._last - (self.count - 1) * self.stride, self._last + 1, self.stride)

    def see(
        self,
        model: nn.Module,
        step: int,
        optimizers: Sequence[Optimizer] = (),
        samples: float = math.nan,
    ) -> None:
        """Takes a snapshot of the weights, if the step is a multiple of the stride.

        It raises nothing; what goes wrong is the `reason` why nothing is kept.

        Args:
            model: the network.
            step: how many updates its weights have had.
            optimizers: those that make them, of which learning rate and momentum are noted.
            samples: how many samples these updates have seen, if that is known.
        """
        if step % self.stride or step == self._last:
            return
        try:
            with torch.no_grad():
                self._see(model, step, optimizers, samples)
        except Exception as error:  # a training goes on whatever it does to its parameters
            self._refuse(told(error), step)

    def _see(
        self, model: nn.Module, step: int, optimizers: Sequence[Optimizer], samples: float
    ) -> None:
        found = self._found(model)
        layout = tuple([(name, p.shape, p.dtype, p.device) for name, p in found])
        gap = 0 if self._last is None else step - self._last
        if gap != self.stride or layout != self._layout:
            chosen = self._chosen
            self.begin()
            self._chosen, self._layout = chosen, layout
            self.gap = gap if gap > self.stride else 0
            self._prepare(found, optimizers)
        self._last = step
        if self.kind is None:
            return
        self._keep([_flat(p) for _, p in found])
        self._notes.append((*self._noted(optimizers), samples))

    def _found(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """The parameters that match and require a gradient."""
        found: list[tuple[str, Tensor]] = []
        for name, p in model.named_parameters():
            if name not in self._chosen:
                self._chosen[name] = any(fnmatchcase(name, one) for one in self.parameters)
            if self._chosen[name] and p.requires_grad and not is_lazy(p):
                found.append((name, p))
        return found

    # What is kept -------------------------------------------------------------------------------

    def _prepare(self, found: list[tuple[str, Tensor]], optimizers: Sequence[Optimizer]) -> None:
        self.shapes = {name: p.shape for name, p in found}
        if not found:
            self.reason = (
                f"no parameter that requires a gradient matches {list(self.parameters)}; there are "
                f"{sorted(self._chosen)}"
            )
            return
        if spread := [name for name, p in found if is_spread(p)]:
            self.reason = (
                f"the parameter {spread[0]!r} is spread over processes, of which each sees its "
                "share alone: a window of weights takes parameters that are whole"
            )
            return
        pairs = [2 if p.is_complex() else 1 for _, p in found]
        self._sizes = [p.numel() * n for (_, p), n in zip(found, pairs, strict=True)]
        rows = [n * (p.shape[-1] if p.dim() else 1) for (_, p), n in zip(found, pairs, strict=True)]
        flats = [_flat(p) for _, p in found]
        dtype = torch.float32
        for flat in flats:
            dtype = torch.promote_types(dtype, flat.dtype)
        self._dtype = dtype
        self.kind = self._choose(rows)
        if self.kind is None:
            return
        flats = [flat.to(dtype) for flat in flats]
        ends = torch.tensor(self._sizes).cumsum(0).tolist()
        self._places = [slice(e - n, e) for e, n in zip(ends, self._sizes, strict=True)]
        if self.kind == "snapshots":
            self._rows = torch.empty((self.length, ends[-1]), dtype=dtype)
        elif self.kind == "sketch":
            self._sketch = WeightSketch(flats, rows, self.seed)
            self._places = self._sketch.places
            shape = (self.length, self._sketch.length)
            self._rows = torch.empty(shape, dtype=dtype, device=flats[0].device)
        else:
            first = torch.cat([flat.to(flats[0].device) for flat in flats])
            means, squares, moved = (torch.zeros_like(first) for _ in range(3))
            self._moments = Moments(
                first, means, squares, moved, dict(zip(self.shapes, self._places, strict=True))
            )
        self._groups = _groups(found, optimizers)
        self.rule = _rule(self._groups, optimizers)

    def _choose(self, rows: list[int]) -> Keep | None:
        """What to keep, by the shapes alone; None, with the reason, if nothing fits."""
        item, numbers = self._dtype.itemsize, sum(self._sizes)
        kept = self.length * sum(buckets(self._sizes, rows))
        takes: dict[Keep, int] = {
            "snapshots": item * self.length * numbers,
            "sketch": item * (3 * sum(sampled(n, numbers) for n in self._sizes) + kept),
            "moments": item * 5 * numbers,
        }
        wanted = _KINDS if self.keep is None else (self.keep,)
        for kind in wanted:
            if takes[kind] <= self.memory:
                return kind
        least = min(takes[kind] for kind in wanted)
        what = "a window" if self.keep is None else f"a window of {self.keep}"
        self.reason = (
            f"{what} of {numbers} numbers takes {least:.3g} bytes, above memory={self.memory:.3g} "
            "bytes: name fewer parameters, or raise memory"
        )
        return None

    def _keep(self, flats: list[Tensor]) -> None:
        self._seen += 1
        if self._moments is not None:
            kept = self._moments
            gather(flats, kept.moved)
            # Of differences, so that small fluctuations of large weights keep their digits.
            torch.sub(kept.moved, kept.first, out=kept.moved)
            weight_welford_([kept.moved], [kept.means], [kept.squares], self._seen)
            self.count = self._seen
            return
        row = self._rows[(self._seen - 1) % self.length]
        if self._sketch is not None:
            self._sketch(flats, row)
        else:
            gather(flats, row)
        self.count = min(self._seen, self.length)

    def _refuse(self, reason: str, step: int) -> None:
        self.begin()
        self.reason, self._last = reason, step

    # What there is ------------------------------------------------------------------------------

    def rows(self, name: str) -> Tensor:
        """(n, k) of each snapshot, in order of time, what is kept of a parameter.

        Its weights as they were, or a sketch of how far they are from the window's first.

        Raises:
            ValueError: if only moments are kept, or nothing.
        """
        if self.kind not in ("snapshots", "sketch"):
            raise ValueError(f"expected snapshots or a sketch of {name!r}, got {self.kind}")
        own = self._rows[: self.count, self._places[self.names.index(name)]]
        return own.roll(-(self._seen % self.length), 0) if self._seen > self.length else own.clone()

    def variations(self) -> dict[str, Tensor]:
        """By parameter, the sum over its weights of their variances over the snapshots."""
        if self._moments is not None:
            squares = self._moments.squares.double()
            return {n: squares[p].sum().cpu() / self.count for n, p in self.moments.places.items()}
        found = {}
        for name in self.names:
            rows = self.rows(name)
            moved = (rows - rows[0]).double()
            found[name] = moved.var(0, correction=0).sum().cpu()
        return found

    def displacement(self) -> float:
        """The distance of the last weights from the first in the window."""
        if self._moments is not None:
            return float(self._moments.moved.double().norm())
        ends = [self.rows(name)[[0, -1]].double().diff(dim=0).norm() for name in self.names]
        return math.hypot(*map(float, ends))

    @property
    def moments(self) -> Moments:
        """The running moments; not copied.

        Raises:
            ValueError: if they are not what is kept.
        """
        if self._moments is None:
            raise ValueError(f"expected moments, got {self.kind}")
        return self._moments

    @property
    def learning_rates(self) -> Numbers:
        """(n,) at each snapshot, NaN where it is not known or not the same for all parameters."""
        return np.array([float(rate) for rate, _, _ in self._notes])

    @property
    def momenta(self) -> Numbers:
        """(n,) at each snapshot, of Adam its first beta, NaN where it is not known."""
        return np.array([float(momentum) for _, momentum, _ in self._notes])

    @property
    def samples(self) -> Numbers:
        """(n,) how many samples had been seen at each snapshot, NaN where that is not known."""
        return np.array([float(samples) for _, _, samples in self._notes])

    # What was noted -----------------------------------------------------------------------------

    def _noted(self, optimizers: Sequence[Optimizer]) -> tuple[Any, Any]:
        """Learning rate and momentum, where they are the same for all parameters."""
        groups = [optimizers[i].param_groups[g] for i, g in self._groups if i < len(optimizers)]
        rates = [_kept(group.get("lr", math.nan)) for group in groups]
        momenta = [group.get("momentum", (group.get("betas") or (0.0,))[0]) for group in groups]
        return _same(rates), _same([_kept(momentum) for momentum in momenta])


def _flat(p: Tensor) -> Tensor:
    """A parameter as a vector of real numbers."""
    p = p.detach()
    return (torch.view_as_real(p.resolve_conj()) if p.is_complex() else p).reshape(-1)


def _kept(value: Any) -> Any:
    """A number as it is now, also of one that the optimizer keeps in a tensor and changes."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(values: list[Any]) -> Any:
    """What all are, NaN if they differ or there is none."""
    if not values or any(value is not values[0] and value != values[0] for value in values[1:]):
        return math.nan
    return values[0]


def _groups(
    found: list[tuple[str, Tensor]], optimizers: Sequence[Optimizer]
) -> list[tuple[int, int]]:
    """The numbers of the optimizers and of their groups that update some of the parameters."""
    own = {id(original(p)) for _, p in found}
    return [
        (i, g)
        for i, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        if any(id(p) in own for p in group["params"])
    ]


def _rule(groups: list[tuple[int, int]], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizer's name, and those of its options by which updates are more than momentum."""
    options = ("nesterov", "dampening", "weight_decay", "maximize")
    found = [
        {"optimizer": type(optimizers[i]).__name__}
        | {
            name: group[name]
            for name in options
            if name in (group := optimizers[i].param_groups[g])
        }
        for i, g in groups
    ]
    return found[0] if found and all(rule == found[0] for rule in found) else {}
