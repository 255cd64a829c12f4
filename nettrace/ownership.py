"""Which sample each row of a cotangent belongs to, derived or found by asking the tape.

Where the operations on the way are all known, `nettrace.layout` derives it. Else the tape is asked.
Pull back one random cotangent of the outputs, then the same with sample `n` scaled by a weight
`w_n`. Wherever the samples do not meet, the ratio of the two pulled-back gradients is exactly the
`w_n` of one sample. Weights are powers of two, so that scaling commutes with rounding and the ratio
is exact; several rounds spell the sample's number in digits, and the powers are spread as widely as
they go, so that a weak link between samples shows. A row whose gradient is zero belongs to nobody:
as the cotangent is random, nothing flows through it on this tape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from nettrace.batch_statistics import held, is_training_norm
from nettrace.layout import Layout, Verdict, layouts
from nettrace.tape import Root, Tape, Use, metadata, shape_of

#: The weights are powers of two between these; half precision has no room for more.
_EXPONENTS = {False: (-16, 15), True: (0, 7)}
_NOBODY = -1
#: Nodes each row of whose output depends on all of one row of their input.
_BY_ROWS = frozenset(
    name + "Backward0" for name in ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Embedding")
)

Edge = tuple[Node, int]


class CoupledSamplesError(ValueError):
    """One sample's output depends on another, so that per-sample derivatives mean nothing."""


@dataclass(frozen=True)
class Axis:
    """An axis along which every slice belongs to one sample.

    Args:
        dim: the axis.
        owners: (length,) the sample of each slice, -1 where nothing flows.
        samples: how many samples there are.
    """

    dim: int
    owners: Tensor
    samples: int

    @classmethod
    def derived(cls, layout: Layout, length: int, samples: int, device: torch.device) -> Axis:
        """The axis that a layout of the samples describes."""
        slices = torch.arange(length, device=device)
        axis = cls(layout.dim, slices // layout.inner % samples, samples)
        if layout.inner * samples == length:
            axis.__dict__["_index"] = None  # in order: no need to look
        return axis

    @cached_property
    def _index(self) -> Tensor | None:
        """(N, T) the slices of each sample, padded with one past the end; None if in order."""
        length = len(self.owners)
        counts = torch.bincount(self.owners[self.owners >= 0], minlength=self.samples)
        tokens = int(counts.max()) if length else 0
        order = torch.argsort(self.owners, stable=True)[int((self.owners < 0).sum()) :]
        if tokens * self.samples == length and torch.equal(
            order, torch.arange(length, device=order.device)
        ):
            return None
        index = order.new_full((self.samples, tokens), length)
        rank = torch.arange(len(order), device=order.device)
        rank -= (counts.cumsum(0) - counts)[self.owners[order]]
        index[self.owners[order], rank] = order
        return index

    def by_sample(self, values: Tensor, dim: int, samples: slice) -> Tensor:
        """Splits axis `dim` of `values` into two, samples and their slices.

        Args:
            values: a tensor whose axis `dim` runs along this axis.
            dim: that axis's number.
            samples: the samples asked for.

        Returns:
            The values with axis `dim` moved to the front as (N, T); missing slices are zero.
        """
        values = values.movedim(dim, 0)
        if self._index is None:
            return values.reshape(self.samples, -1, *values.shape[1:])[samples]
        index = self._index[samples]
        missing = index == len(values)
        return values[index.masked_fill(missing, 0)].masked_fill(
            missing.view(*missing.shape, *(1,) * (values.dim() - 1)), 0
        )


@dataclass(frozen=True)
class Ownership:
    """Whose an intermediate result is.

    Args:
        axes: the axes along which every slice has one owner, by number.
        elements: the owner of each element, kept where no axis has such owners.
    """

    axes: dict[int, Axis]
    elements: Tensor | None

    def mask(self, sample: int, like: Tensor) -> Tensor:
        """A tensor of zeros and ones that keeps what belongs to `sample` in `like`."""
        if self.elements is not None:
            return (self.elements == sample).to(like.dtype)
        axis = next(iter(self.axes.values()))
        shape = [-1 if d == axis.dim else 1 for d in range(like.dim())]
        return (axis.owners == sample).to(like.dtype).view(shape)


def attribute(tape: Tape, memory: int) -> dict[Edge, Ownership]:
    """Finds whose every use's cotangent is, absorbing computed weights into the tape on the way.

    Args:
        tape: the tape, with its roots.
        memory: bytes that the pulled-back gradients may take at a time.

    Returns:
        The ownership of each edge into a node that uses a weight; edges without gradient are left
        out.

    Raises:
        CoupledSamplesError: if some use's cotangent mixes samples and is no computed weight.
    """
    norms = [node for node in tape.nodes if is_training_norm(node) and node not in tape.held]
    roots = [_Entry.of(root, tape.samples, seed) for seed, root in enumerate(tape.roots)]
    gates: list[_Entry] = []
    owned: dict[Edge, Ownership] = {}
    while True:
        nodes = list(dict.fromkeys([use.node for use in tape.uses()] + norms))
        derived = layouts(tape)
        shared = [n for n in nodes if derived.get((n, 0)) == "summed" and tape.may_absorb(n)]
        if shared:
            tape.absorb(shared)
            continue
        found = _placed(derived, nodes, tape.samples)
        for node in norms:
            if (node, 0) in found and 1 not in found[node, 0].axes:
                raise CoupledSamplesError(_batch_norm_message(node))
        nodes = [node for node in nodes if (node, 0) not in found]
        if not nodes:
            return found
        coupled: set[Node] = set()
        for edge, ownership in _ownerships([*roots, *gates], nodes, tape.held, memory):
            if ownership is None:
                coupled.add(edge[0])
            else:
                found[edge] = ownership
                if edge[0] in norms and 1 not in ownership.axes and tape.samples > 1:
                    raise CoupledSamplesError(_batch_norm_message(edge[0]))
        absorbable = [node for node in coupled if tape.may_absorb(node)]
        if coupled and not absorbable:
            raise CoupledSamplesError(_diagnose(tape, [*roots, *gates], memory))
        if coupled:
            tape.absorb(absorbable)
            gates = []
            continue
        if not gates:
            owned = found  # what lies behind shut gates is looked at, but carries no gradient
        behind = _behind_shut_gates(tape, found)
        if len(behind) == len(gates):
            return owned
        gates = behind


def _placed(
    derived: Mapping[Edge, Verdict], nodes: Iterable[Node], samples: int
) -> dict[Edge, Ownership]:
    """The ownership of those outputs of `nodes` for which the layout of the samples is derived."""
    axes: dict[tuple[int, int, int, torch.device], Axis] = {}
    found = {}
    for node in nodes:
        for nr, meta in enumerate(metadata(node)):
            layout = derived.get((node, nr))
            if isinstance(layout, Layout):
                key = (layout.dim, meta.shape[layout.dim], layout.inner, meta.device)
                if key not in axes:
                    axes[key] = Axis.derived(layout, key[1], samples, meta.device)
                found[node, nr] = Ownership({layout.dim: axes[key]}, None)
    return found


def check_rows(losses: Tensor, outputs: Tensor, memory: int) -> None:
    """Checks that the gradient of each loss (N,) by the outputs (N, ...) is its own row's alone.

    Raises:
        CoupledSamplesError: if a loss depends on another sample's outputs.
    """
    edge = get_gradient_edge(outputs)
    numbers = torch.arange(len(losses), device=losses.device)
    root = _Entry.of(Root(get_gradient_edge(losses)), len(losses), 0)
    for (_, nr), owned in _ownerships([root], [edge.node], [], memory):
        if nr != edge.output_nr:
            continue
        axis = None if owned is None else owned.axes.get(0)
        if axis is None or bool(((axis.owners != numbers) & (axis.owners != _NOBODY)).any()):
            raise CoupledSamplesError(
                "the samples are coupled by the loss: the loss of one depends on the outputs of "
                "another. Per-sample loss gradients are not defined for such a loss; pass "
                "Probe(..., losses=...) with a loss that separates over samples"
            )


@dataclass(frozen=True)
class _Entry:
    """A place where a random cotangent enters the tape."""

    edge: GradientEdge
    axis: Axis
    seed: int

    @classmethod
    def of(cls, root: Root, samples: int, seed: int) -> _Entry:
        """At a root of the tape."""
        meta = metadata(root.edge.node)[root.edge.output_nr]
        axis = Axis.derived(Layout(0, root.inner), meta.shape[0], samples, meta.device)
        return cls(root.edge, axis, seed)

    def cotangent(self, scale: Tensor) -> Tensor:
        """A random cotangent whose slices are scaled as their samples are; `scale` is (N,)."""
        meta = metadata(self.edge.node)[self.edge.output_nr]
        generator = torch.Generator().manual_seed(self.seed)
        shape = [-1 if d == self.axis.dim else 1 for d in range(len(meta.shape))]
        owners = self.axis.owners
        scale = scale.to(owners.device, meta.dtype)
        weights = torch.where(owners < 0, 0, scale[owners])
        noise = torch.randn(tuple(meta.shape), generator=generator, dtype=torch.float64)
        cotangent: Tensor = noise.to(weights) * weights.view(shape)
        return cotangent


def _behind_shut_gates(tape: Tape, owned: dict[Edge, Ownership]) -> list[_Entry]:
    """Where cotangents would enter if weights that are zero throughout were not.

    A branch multiplied by such a weight, as many are at initialisation, gets no cotangent, so that
    a coupling in it would go unseen, although the derivative by that weight depends on it.
    """
    entries: list[_Entry] = []
    for use in tape.uses():
        ownership = owned.get((use.node, 0))
        if ownership is None or not _multiplies(use) or not tape.is_zero(use.source):
            continue
        out = shape_of(use.node)
        for slot, (child, nr) in enumerate(use.node.next_functions):
            if slot == use.slot or child is None or not tape.carries_samples(child):
                continue
            shape = shape_of(child, nr)
            for dim, axis in ownership.axes.items():
                inner = dim - len(out) + len(shape)
                flows = bool((axis.owners != _NOBODY).any())
                if flows and inner >= 0 and shape[inner] == out[dim]:
                    entry = Axis(inner, axis.owners, axis.samples)
                    seed = len(tape.roots) + len(entries)
                    entries.append(_Entry(GradientEdge(child, nr), entry, seed))
                    break
    return entries


def _multiplies(use: Use) -> bool:
    """Whether a weight enters as a factor, rather than a summand."""
    name = use.node.name().removesuffix("Backward0")
    bias = {
        "Addmm": 0,
        "Convolution": 2,
        "NativeLayerNorm": 2,
        "NativeGroupNorm": 2,
        "NativeBatchNorm": 2,
    }
    return name not in ("Add", "Sub", "Rsub") and bias.get(name) != use.slot


def _ownerships(
    entries: Sequence[_Entry], nodes: Sequence[Node], constant: Sequence[Node], memory: int
) -> Iterator[tuple[Edge, Ownership | None]]:
    """Asks for each output of `nodes` whose it is; the statistics of `constant` are held."""
    places = [*nodes, *(entry.edge.node for entry in entries)]
    half = any(m.dtype == torch.float16 for node in places for m in metadata(node))
    axis = entries[0].axis
    code = _Code.of(axis.samples, axis.owners.device, *_EXPONENTS[half])
    scales = [torch.ones(axis.samples, dtype=torch.float64, device=axis.owners.device)]
    scales += [torch.exp2((digit * code.spacing + code.lowest).double()) for digit in code.digits]
    for edges in _groups(nodes, memory // (len(scales) + 1)):
        with held(constant):
            pulled = [
                torch.autograd.grad(
                    [entry.edge for entry in entries],
                    [GradientEdge(node, nr) for node, nr in edges],
                    [entry.cotangent(scale) for entry in entries],
                    retain_graph=True,
                    allow_unused=True,
                )
                for scale in scales
            ]
        for i, edge in enumerate(edges):
            if pulled[0][i] is not None and pulled[0][i].numel():
                reference, *scaled = (_as_reals(p[i]) for p in pulled)
                found = _ownership(code, reference, scaled)
                if found is not None and not found.axes and edge[0].name() in _BY_ROWS:
                    found = None  # one row of the input serves several samples
                yield edge, found


@dataclass(frozen=True)
class _Code:
    """The samples' numbers, spelled in digits, each digit written as a power of two.

    The samples are numbered at random, so that neighbours, whom a shift of the batch would link,
    get distant weights.
    """

    order: Tensor
    base: int
    lowest: int
    spacing: int
    digits: list[Tensor]

    @classmethod
    def of(cls, samples: int, device: torch.device, lowest: int, highest: int) -> _Code:
        places = 1
        while (highest - lowest + 1) ** places < samples:
            places += 1
        base = 2
        while base**places < samples:
            base += 1
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
        order = order.to(device)
        number = torch.argsort(order)
        digits = [number // base**place % base for place in range(places)]
        return cls(order, base, lowest, (highest - lowest) // (base - 1), digits)

    @property
    def samples(self) -> int:
        return len(self.order)

    def read(self, ratios: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The sample that ratios to the reference spell, -1 if none, and the exact ratios."""
        number = torch.zeros_like(ratios[0], dtype=torch.long)
        valid = torch.ones_like(number, dtype=torch.bool)
        exact = []
        for place, ratio in enumerate(ratios):
            exponent = torch.log2(ratio.double()).nan_to_num(-1e3, 1e3, -1e3)
            digit = ((exponent - self.lowest) / self.spacing).round().long()
            valid &= (digit >= 0) & (digit < self.base)
            number += digit * self.base**place
            power = (digit * self.spacing + self.lowest).clamp(-100, 100)
            exact.append(torch.exp2(power.double()).to(ratio.dtype))
        valid &= number < self.samples
        return torch.where(valid, self.order[number.clamp(0, self.samples - 1)], _NOBODY), exact


def _groups(nodes: Sequence[Node], memory: int) -> Iterator[list[Edge]]:
    """The output edges of `nodes`, in groups whose gradients together stay below `memory`."""
    group: list[Edge] = []
    size = 0
    for node in nodes:
        for nr, meta in enumerate(metadata(node)):
            if not hasattr(meta, "shape"):
                continue
            bytes_ = torch.Size(meta.shape).numel() * meta.dtype.itemsize
            if group and size + bytes_ > memory:
                yield group
                group, size = [], 0
            group.append((node, nr))
            size += bytes_
    if group:
        yield group


def _as_reals(gradient: Tensor) -> Tensor:
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _ownership(code: _Code, reference: Tensor, scaled: Sequence[Tensor]) -> Ownership | None:
    """Whose a gradient is, or None where samples mix in it."""
    info = torch.finfo(reference.dtype)
    least = 2.0**-18 if reference.dtype == torch.float16 else info.tiny * 2.0**40
    wide = torch.promote_types(reference.dtype, torch.float32)
    reference, scaled = reference.to(wide), [s.to(wide) for s in scaled]
    if reference.dim() == 0:
        reference, scaled = reference[None], [s[None] for s in scaled]
    axes = {}
    for dim in range(reference.dim()):
        rows = reference.movedim(dim, 0).flatten(1) if reference.dim() > 1 else reference[:, None]
        peak, place = rows.abs().max(1, keepdim=True)
        alive = peak > least
        unit = torch.where(alive, rows.gather(1, place), 1.0)
        others = [s.movedim(dim, 0).reshape(rows.shape) for s in scaled]
        owners, exact = code.read([(s.gather(1, place) / unit) for s in others])
        good = owners != _NOBODY
        for s, ratio in zip(others, exact, strict=True):
            error = ((s / ratio - rows) / unit).norm(dim=1, keepdim=True)
            good &= error <= info.eps**0.6 * (rows / unit).norm(dim=1, keepdim=True)
        if bool((good | ~alive).all()):
            axes[dim] = Axis(dim, torch.where(alive, owners, _NOBODY)[:, 0], code.samples)
    if axes:
        return Ownership(axes, None)
    alive = reference.abs() > least
    unit = torch.where(alive, reference, 1.0)
    ratios = [s / unit for s in scaled]
    owners, exact = code.read(ratios)
    good = owners != _NOBODY
    for ratio, power in zip(ratios, exact, strict=True):
        good &= (ratio / power - 1).abs() <= info.eps**0.4
    return (
        Ownership({}, torch.where(alive, owners, _NOBODY)) if bool((good | ~alive).all()) else None
    )


def _batch_norm_message(node: Node) -> str:
    return (
        f"the samples are coupled by batch normalisation in training mode ({node.name()}, input "
        f"shape {shape_of(node)}): each output depends on the mean and variance of the whole "
        "batch. Call model.eval() before the forward pass, or pass coupled='rows' to "
        "nettrace.jacobian for that of the coupled outputs, by one backward pass a row"
    )


def _diagnose(tape: Tape, entries: Sequence[_Entry], memory: int) -> str:
    """Names the operation in which samples meet, looking at every node of the tape."""
    nodes = [node for node in tape.nodes if node not in tape.weights]
    verdicts = {edge: owned for edge, owned in _ownerships(entries, nodes, tape.held, memory)}
    coupled = {node for (node, _), owned in verdicts.items() if owned is None}
    first = next(
        node
        for node in reversed(nodes)
        if node in coupled and not coupled.intersection(tape.consumers(node))
    )
    culprits: Iterable[Node] = [first, *tape.consumers(first)]
    if any(is_training_norm(node) for node in culprits):
        return _batch_norm_message(next(node for node in culprits if is_training_norm(node)))
    names = ", ".join(dict.fromkeys(node.name() for node in tape.consumers(first)))
    return (
        f"the samples are coupled: the result of {first.name()}, of shape {shape_of(first)}, is "
        f"used for more than one sample by {names}. Per-sample derivatives are not defined for "
        "such a network; evaluate it one sample at a time, take the mixing operation out, or pass "
        "coupled='rows' to nettrace.jacobian for that of the coupled outputs, by one backward pass "
        "a row"
    )
