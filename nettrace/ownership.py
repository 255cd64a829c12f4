"""Which sample each row of a cotangent belongs to, found by asking the tape.

Pull back one random cotangent of the outputs, then the same with sample `n` scaled by a weight
`w_n`. Wherever the samples do not meet, the ratio of the two pulled-back gradients is exactly the
`w_n` of one sample. Weights are powers of two, so that scaling commutes with rounding and the ratio
is exact; several rounds spell the sample's number in digits. A row whose gradient is zero belongs to
nobody: as the cotangent is random, nothing flows through it on this tape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from nettrace.tape import Tape, metadata, shape_of

_DIGIT_BITS = 5
_BASE = 2**_DIGIT_BITS
_NOBODY = -1

Edge = tuple[Node, int]


class CoupledSamplesError(ValueError):
    """One sample's output depends on another sample, so that per-sample derivatives mean nothing."""


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
            return values.unflatten(0, (self.samples, -1))[samples]
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


def attribute(tape: Tape, outputs: Tensor, memory: int) -> dict[Edge, Ownership]:
    """Finds whose every use's cotangent is, absorbing computed weights into the tape on the way.

    Args:
        tape: the tape of `outputs`.
        outputs: (N, ...) the outputs.
        memory: bytes that the pulled-back gradients may take at a time.

    Returns:
        The ownership of each edge into a node that uses a weight; edges without gradient are left
        out.

    Raises:
        CoupledSamplesError: if some use's cotangent mixes samples and is no computed weight.
    """
    norms = [node for node in tape.nodes if _is_training_norm(node)]
    while True:
        nodes = dict.fromkeys([use.node for use in tape.uses()] + norms)
        coupled: set[Node] = set()
        owned: dict[Edge, Ownership] = {}
        for edge, ownership in _ownerships(outputs, list(nodes), memory):
            if ownership is None:
                coupled.add(edge[0])
            else:
                owned[edge] = ownership
                if edge[0] in norms and 1 not in ownership.axes and tape.samples > 1:
                    raise CoupledSamplesError(_batch_norm_message(edge[0]))
        if not coupled:
            return owned
        absorbable = [node for node in coupled if tape.may_absorb(node)]
        if not absorbable:
            raise CoupledSamplesError(_diagnose(tape, outputs, memory))
        tape.absorb(absorbable)


def _ownerships(
    outputs: Tensor, nodes: Sequence[Node], memory: int
) -> Iterator[tuple[Edge, Ownership | None]]:
    samples = outputs.shape[0]
    digits = 0
    while _BASE**digits < samples:
        digits += 1
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(outputs)
    number = torch.arange(samples, device=outputs.device)
    for edges in _groups(nodes, memory // (digits + 2)):
        inputs = [GradientEdge(node, nr) for node, nr in edges]
        pulled = []
        for place in range(-1, digits):
            scale = torch.ones_like(number, dtype=outputs.dtype)
            if place >= 0:
                scale = torch.exp2((number // _BASE**place % _BASE - _BASE // 2).to(outputs.dtype))
            shape = (-1,) + (1,) * (outputs.dim() - 1)
            pulled.append(
                torch.autograd.grad(
                    outputs,
                    inputs,
                    cotangent * scale.view(shape),
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        for i, edge in enumerate(edges):
            reference = pulled[0][i]
            if reference is not None:
                yield edge, _ownership(reference, [p[i] for p in pulled[1:]], samples)


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


def _ownership(reference: Tensor, scaled: Sequence[Tensor], samples: int) -> Ownership | None:
    """The owner of each element of a gradient, or None where samples mix."""
    is_complex = reference.is_complex()
    if is_complex:
        reference = torch.view_as_real(reference)
        scaled = [torch.view_as_real(s) for s in scaled]
    alive = reference.abs() > torch.finfo(reference.dtype).tiny * 2.0**40
    owner = torch.zeros_like(reference, dtype=torch.int32)
    for place, values in enumerate(scaled):
        ratio = torch.where(alive, values / reference, 1.0)
        power = torch.log2(ratio.abs()).round()
        # A loose bound is enough: where samples meet, their weights differ by factors of two or more.
        mixed = (ratio * torch.exp2(-power) - 1).abs() > 1e-3
        digit = power.nan_to_num(_BASE).clamp(-_BASE, _BASE).to(torch.int32) + _BASE // 2
        if bool((alive & (mixed | ~ratio.isfinite() | (digit < 0) | (digit >= _BASE))).any()):
            return None
        owner += digit * _BASE**place
    owner = torch.where(alive, owner, _NOBODY)
    if bool((owner >= samples).any()):
        return None
    lowest = torch.where(alive, owner, samples)
    if is_complex:
        owner, lowest = owner.amax(-1), lowest.amin(-1)
    axes = {}
    for dim in range(owner.dim()):
        others = [d for d in range(owner.dim()) if d != dim]
        top = owner.amax(others) if others else owner
        bottom = lowest.amin(others) if others else lowest
        if bool(((top == bottom) | (top == _NOBODY)).all()):
            axes[dim] = Axis(dim, top.long(), samples)
    return Ownership(axes, None if axes else owner)


def _is_training_norm(node: Node) -> bool:
    name = node.name()
    return "SyncBatchNorm" in name or (
        "BatchNormBackward" in name and bool(getattr(node, "_saved_training", False))
    )


def _batch_norm_message(node: Node) -> str:
    return (
        f"the samples are coupled by batch normalisation in training mode ({node.name()}, input "
        f"shape {shape_of(node)}): each output depends on the mean and variance of the whole "
        "batch. Call model.eval() before the forward pass, or pass coupled='rows' to get the "
        "Jacobian of the coupled outputs by one backward pass a row"
    )


def _diagnose(tape: Tape, outputs: Tensor, memory: int) -> str:
    """Names the operation in which samples meet, looking at every node of the tape."""
    nodes = [node for node in tape.nodes if node not in tape.weights]
    verdicts = {edge: owned for edge, owned in _ownerships(outputs, nodes, memory)}
    coupled = {node for (node, _), owned in verdicts.items() if owned is None}
    first = next(
        node
        for node in reversed(nodes)
        if node in coupled and not coupled.intersection(tape.consumers(node))
    )
    culprits: Iterable[Node] = [first, *tape.consumers(first)]
    if any(_is_training_norm(node) for node in culprits):
        return _batch_norm_message(next(node for node in culprits if _is_training_norm(node)))
    names = ", ".join(dict.fromkeys(node.name() for node in tape.consumers(first)))
    return (
        f"the samples are coupled: the result of {first.name()}, of shape {shape_of(first)}, is "
        f"used for more than one sample by {names}. Per-sample derivatives are not defined for "
        "such a network; evaluate it one sample at a time, take the mixing operation out, or pass "
        "coupled='rows' to get the Jacobian of the coupled outputs by one backward pass a row"
    )
