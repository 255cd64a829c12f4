"""Tape rules: what an operation's saved tensors and a cotangent say about per-sample gradients.

A rule belongs to a kind of node on the autograd tape. Given K cotangents of the node's output and
whose each row is, it returns the per-sample gradients with respect to the weight that enters at an
input slot, for a range of samples, in the shape of that weight. It returns None where it does not
know the case; then the node's own backward is run one sample at a time, which is always exact.

To add a rule, write a function with the signature of `Rule` and register it under the node's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nettrace.kernels import (
    Dense,
    Factor,
    Geometry,
    Outer,
    Patches,
    Still,
    affine_psg,
    dense,
    patches,
)
from nettrace.kernels.launch import is_compiled
from nettrace.ownership import Axis, Ownership
from nettrace.tape import Use, metadata, pull, shape_of


@dataclass(frozen=True)
class Flow:
    """What flows back into one use of a weight.

    Args:
        node: the node that uses the weight.
        slot: the input at which the weight enters.
        shape: the weight's shape.
        cotangent: (K, ...) cotangents of the node's output number 0.
        ownership: whose the output's elements are.
        samples: the samples asked for.
    """

    node: Any
    slot: int
    shape: tuple[int, ...]
    cotangent: Tensor
    ownership: Ownership
    samples: slice

    def rows(self, dim: int, *tensors: tuple[Tensor, int]) -> list[Tensor] | None:
        """Tensors whose axes run along axis `dim` of the output, split into (N, T, ...).

        Args:
            dim: the axis of the output along which every slice belongs to one sample.
            tensors: tensors with the number of the axis that runs along `dim`.

        Returns:
            The tensors with (N, T) in front for the samples asked for; None if the output's
            samples are not laid out along `dim`.
        """
        axis = self.ownership.axes.get(dim)
        if axis is None:
            return None
        return [axis.by_sample(t, d, self.samples) for t, d in tensors]


Rule = Callable[[Flow], Factor | None]
RULES: dict[str, Rule] = {}
#: The modes of torch.nn.functional.embedding_bag as torch numbers them, after 0 for the sum.
_MEAN_OF_BAG, _MAX_OF_BAG = 1, 2


def rule(*names: str, slots: Collection[int] = range(9)) -> Callable[[Rule], Rule]:
    """Registers a rule for the autograd nodes `names`, given without the ending `Backward0`.

    Args:
        names: of the nodes.
        slots: the inputs at which the rule knows what to do with a weight.
    """

    def register(function: Rule) -> Rule:
        def known(flow: Flow) -> Factor | None:
            return function(flow) if flow.slot in slots else None

        RULES.update(dict.fromkeys([name + "Backward0" for name in names], known))
        return function

    return register


def gradient(flow: Flow) -> Factor | None:
    """The per-sample gradients at one use, by the rule for its node; None if no rule knows it.

    Where the weight is real and the data complex, what is asked for is the real part.
    """
    known = RULES.get(flow.node.name())
    factor = known(flow) if known is not None else None
    child, nr = flow.node.next_functions[flow.slot]
    if factor is None or metadata(child)[nr].dtype.is_complex:
        return factor
    if isinstance(factor, Outer):
        mixed = factor.still.dtype.is_complex or factor.moving.is_complex()
        return Dense(dense(factor).real) if mixed else factor
    if isinstance(factor, Dense) and factor.values.is_complex():
        return Dense(factor.values.real)
    return factor


def slots_of_weight_and_bias(node: Any, ownership: Ownership) -> tuple[int, int] | None:
    """The inputs at which a weight enters, and a bias that is added to each token it makes.

    Returns:
        None where there is no such bias, or the rule for the weight keeps no tokens.
    """
    if 0 not in ownership.axes or metadata(node)[0].dtype.is_complex:
        return None
    if node.name() == "ConvolutionBackward0":
        return None if node._saved_transposed else (1, 2)
    if node.name() == "AddmmBackward0" and node._saved_alpha == node._saved_beta == 1:
        bias, nr = node.next_functions[0]
        return (2, 0) if bias is not None and shape_of(bias, nr) == shape_of(node)[1:] else None
    return None


def through(source: GradientEdge, parameter: Tensor, weight: Tensor, at_once: bool) -> Tensor:
    """Pulls gradients (B, *weight shape) of a computed weight back to a parameter."""

    def back(gradient: Tensor, batched: bool) -> Tensor:
        (result,) = torch.autograd.grad(
            [source], [parameter], [gradient], retain_graph=True, is_grads_batched=batched
        )
        return result

    if at_once:
        with suppress(RuntimeError):  # of an operation that cannot be batched
            return back(weight, batched=True)
    return torch.stack([back(w, batched=False) for w in weight])


def pullback(
    use: Use,
    cotangents: Sequence[Tensor | None],
    ownerships: Sequence[Ownership | None],
    samples: range,
) -> Tensor:
    """The per-sample gradients at one use, by the node's own backward, one sample at a time.

    Args:
        use: the use of a weight.
        cotangents: for each output of the node, (K, ...) or None.
        ownerships: for each output, whose its elements are.
        samples: the samples asked for.

    Returns:
        (K, N, P) gradients, written out; zero where nothing flows.
    """
    live = next(g for g in cotangents if g is not None)
    meta = metadata(use.source.node)[use.source.output_nr]
    rows = live.new_zeros((len(live), len(samples), *meta.shape), dtype=meta.dtype)
    for k in range(len(live)):
        for i, n in enumerate(samples):
            masked = [
                None if g is None or o is None else (g[k] * o.mask(n, g[k])).to(m.dtype)
                for g, o, m in zip(cotangents, ownerships, metadata(use.node), strict=True)
            ]
            row = pull(use.node, masked, use.slot)
            if row is not None:  # the engine would cast it and sum it to the weight's shape too
                row = row.sum_to_size(meta.shape)
                rows[k, i] = row if meta.dtype.is_complex or not row.is_complex() else row.real
    return rows.reshape(*rows.shape[:2], -1)


def _outer(still: Tensor, moving: Tensor, moves_left: bool) -> Outer:
    """A factor from its sides as (N, T, D) and (N, T, K, M)."""
    side = Still(still.unsqueeze(1), still.shape[-1])
    return Outer(side, moving.movedim(2, 0).unsqueeze(2), moves_left)


def _scaled(operand: Tensor, scale: complex) -> Tensor:
    return operand.conj() if scale == 1 else operand.conj() * scale


@rule("Addmm", "Mm")
def _matmul(flow: Flow) -> Factor | None:
    node, g = flow.node, flow.cotangent
    bias = node.name() == "AddmmBackward0"
    if bias and flow.slot == 0:
        return _broadcast(flow, g * node._saved_beta)
    scale = node._saved_alpha if bias else 1
    if flow.slot == (2 if bias else 1):  # out[t, r] = sum_l a[t, l] W[l, r]
        a = node._saved_mat1 if bias else node._saved_self
        sides = flow.rows(0, (_scaled(a, scale), 0), (g, 1))
        return None if sides is None else _outer(sides[0], sides[1], moves_left=False)
    b = node._saved_mat2  # out[l, t] = sum_r W[l, r] b[r, t]
    sides = flow.rows(1, (_scaled(b, scale), 1), (g, 2))
    return None if sides is None else _outer(sides[0], sides[1], moves_left=True)


@rule("Mv")
def _matvec(flow: Flow) -> Factor | None:
    if flow.slot == 0:
        return None
    a = flow.node._saved_self  # out[t] = sum_l a[t, l] w[l]
    sides = flow.rows(0, (a.conj(), 0), (flow.cotangent, 1))
    return None if sides is None else _outer(sides[0], sides[1].unsqueeze(-1), moves_left=False)


@rule("Bmm", "Baddbmm")
def _batched_matmul(flow: Flow) -> Factor | None:
    # Here the batch axis is a group of the weight, such as attention heads or experts; a weight
    # that is copied for every sample has its use at the node that copies it.
    node, g = flow.node, flow.cotangent
    bias = node.name() == "BaddbmmBackward0"
    if bias and flow.slot == 0:
        return _broadcast(flow, g * node._saved_beta)
    scale = node._saved_alpha if bias else 1
    moves_left = flow.slot == int(bias)
    if moves_left:
        b = node._saved_batch2 if bias else node._saved_mat2
        sides = flow.rows(2, (_scaled(b, scale), 2), (g, 3))
    else:
        a = node._saved_batch1 if bias else node._saved_self
        sides = flow.rows(1, (_scaled(a, scale), 1), (g, 2))
    if sides is None:
        return None
    still, moving = sides[0].movedim(2, 1), sides[1].permute(2, 0, 3, 1, 4)
    return Outer(Still(still, still.shape[-1]), moving, moves_left)


@rule("Trilinear")
def _bilinear(flow: Flow) -> Factor | None:
    # torch.nn.functional.bilinear: out[t, o] = sum_ij W[o, (i, j)] a[t, i] b[t, j]
    node = flow.node
    expand = (node._saved_expand1, node._saved_expand2, node._saved_expand3)
    if flow.slot != 1 or expand != ((1, 3), (0,), (1, 2)):
        return None
    pairs = (node._saved_i1.unsqueeze(2) * node._saved_i3.unsqueeze(1)).flatten(1).conj()
    sides = flow.rows(0, (pairs, 0), (flow.cotangent, 1))
    return None if sides is None else _outer(sides[0], sides[1], moves_left=True)


@rule("Convolution")
def _convolution(flow: Flow) -> Factor | None:
    node = flow.node
    g = flow.cotangent
    if flow.slot == 2:
        return _broadcast(flow, g.flatten(3), channel=True)
    a = node._saved_input
    if flow.slot == 0 or a.is_complex():
        return None
    sides = flow.rows(0, (a, 0), (g, 1))
    if sides is None:
        return None
    a, g = sides[0], sides[1].movedim(2, 0)  # (N, S, C_in, ...), (K, N, S, C_out, ...)
    padding, groups = node._saved_padding, node._saved_groups
    rest = (flow.shape[2:], node._saved_stride, node._saved_dilation, groups)
    if node._saved_transposed:  # input and output change places
        ends = zip(padding, node._saved_output_padding, strict=True)
        g = F.pad(g, [n for p, extra in reversed(list(ends)) for n in (p, p - extra)])
        moving = patches(g.flatten(0, 1), Geometry((0,) * len(padding), *rest))
        still = a.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)
        moving = moving.unflatten(0, g.shape[:2])
        return Outer(Still(still, still.shape[-1]), moving, moves_left=False)
    geometry = Geometry(padding, *rest)
    moving = g.flatten(4).unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 5, 4)
    return Outer(Patches(a, geometry), moving.flatten(3, 4), moves_left=True)


@rule("Embedding", slots=(0,))
def _embedding(flow: Flow) -> Factor | None:
    node = flow.node
    if node._saved_scale_grad_by_freq:  # the count runs over the whole batch
        return None
    indices, g = node._saved_indices, flow.cotangent
    if node._saved_padding_idx >= 0:
        g = g * (indices != node._saved_padding_idx).unsqueeze(-1)
    return _lookup(flow, indices, g)


@rule("EmbeddingBag", slots=(0,))
def _embedding_bag(flow: Flow) -> Factor | None:
    node, axis = flow.node, flow.ownership.axes.get(0)
    if axis is None or node._saved_mode == _MAX_OF_BAG or node._saved_scale_grad_by_freq:
        return None
    indices, bags = node._saved_indices, len(axis.owners)
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(node._saved_offsets[:bags], places, right=True) - 1
    counts = (indices != node._saved_padding_idx).to(flow.cotangent.dtype)
    if node._saved_mode == _MEAN_OF_BAG:
        sizes = counts.new_zeros(bags).index_add(0, bag, counts)
        counts = counts / sizes[bag].clamp(min=1)
    if node._saved_per_sample_weights is not None:
        counts = counts * node._saved_per_sample_weights
    g = flow.cotangent[:, bag] * counts.unsqueeze(-1)
    words = Axis(0, axis.owners[bag], axis.samples)
    return _lookup(replace(flow, ownership=Ownership({0: words}, None)), indices, g)


@rule("Index", slots=(0,))
def _index(flow: Flow) -> Factor | None:
    indices = flow.node._saved_indices
    if any(i is None or i.dtype == torch.bool for i in indices):
        return None
    flat, rows = indices[0] % flow.shape[0], flow.shape[0]
    for i, length in zip(indices[1:], flow.shape[1:], strict=False):
        flat, rows = flat * length + i % length, rows * length
    return _lookup(replace(flow, shape=(rows, *flow.shape[len(indices) :])), flat, flow.cotangent)


@rule("IndexSelect", slots=(0,))
def _index_select(flow: Flow) -> Factor | None:
    if flow.node._saved_dim % len(flow.shape) != 0:
        return None
    return _lookup(flow, flow.node._saved_index, flow.cotangent)


def _lookup(flow: Flow, indices: Tensor, g: Tensor) -> Factor | None:
    g = g.reshape(*g.shape[: 1 + indices.dim()], -1)  # (K, *places, D)
    for dim in range(indices.dim()):
        sides = flow.rows(dim, (indices, dim), (g, dim + 1))
        if sides is not None:
            numbers = sides[0].flatten(1).unsqueeze(1)  # (N, G = 1, T)
            moving = sides[1].movedim(2, 0).flatten(2, -2).unsqueeze(2)  # (K, N, G = 1, T, D)
            return Outer(Still(numbers, flow.shape[0], dtype=g.dtype), moving)
    return None


@rule("NativeLayerNorm", slots=(1, 2))
def _layer_norm(flow: Flow) -> Factor | None:
    node, g = flow.node, flow.cotangent
    if flow.slot == 1:
        x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
        if is_compiled(x, g) and len(flow.shape) == 1:
            sides = flow.rows(0, (x, 0), (mean, 0), (rstd, 0), (g.movedim(0, -1), 0))
            if sides is not None:
                return _by_token(*sides)
        g = g * ((x - mean) * rstd)
    return _broadcast(flow, g)


def _by_token(x: Tensor, mean: Tensor, rstd: Tensor, g: Tensor) -> Dense:
    """Gradients of scales of x (N, ..., D), for g (N, ..., D, K), in one read of both."""
    x, mean, rstd = x.flatten(1, -2), mean.flatten(1), rstd.flatten(1)
    each = g.flatten(1, -3).unbind(-1)
    return Dense(torch.stack([affine_psg(x, one, mean, rstd)[0] for one in each]))


@rule("NativeGroupNorm", slots=(1, 2))
def _group_norm(flow: Flow) -> Factor | None:
    node, g = flow.node, flow.cotangent
    if flow.slot == 1:
        x = node._saved_input.reshape(len(node._saved_input), node._saved_group, -1)
        mean, rstd = node._saved_result1.unsqueeze(-1), node._saved_result2.unsqueeze(-1)
        g = g * ((x - mean) * rstd).reshape(node._saved_input.shape)
    return _broadcast(flow, g.flatten(3) if g.dim() > 3 else g.unsqueeze(3), channel=True)


@rule("NativeBatchNorm", slots=(1, 2))
def _batch_norm(flow: Flow) -> Factor | None:
    node, g = flow.node, flow.cotangent
    if flow.slot == 1:
        x = node._saved_input
        if node._saved_training:
            mean, rstd = node._saved_result1, node._saved_result2
        else:
            mean = node._saved_running_mean
            rstd = torch.rsqrt(node._saved_running_var + node._saved_eps)
        shape = (-1,) + (1,) * (x.dim() - 2)
        g = g * ((x - mean.view(shape)) * rstd.view(shape))
    return _broadcast(flow, g.flatten(3) if g.dim() > 3 else g.unsqueeze(3), channel=True)


@rule("Add", "Sub", "Rsub")
def _add(flow: Flow) -> Factor | None:
    name, alpha = flow.node.name(), flow.node._saved_alpha
    scale = {"AddBackward0": (1, alpha), "SubBackward0": (1, -alpha), "RsubBackward0": (-alpha, 1)}
    return _broadcast(flow, flow.cotangent * scale[name][flow.slot])


@rule("Mul")
def _multiply(flow: Flow) -> Factor | None:
    other = flow.node._saved_other if flow.slot == 0 else flow.node._saved_self
    return _broadcast(flow, flow.cotangent * other.conj())


@rule("Div")
def _divide(flow: Flow) -> Factor | None:
    other = flow.node._saved_other
    if flow.slot == 0:
        return _broadcast(flow, flow.cotangent / other.conj())
    quotient = flow.node._saved_self / (other * other)
    return _broadcast(flow, -flow.cotangent * quotient.conj())


@rule("Addcmul")
def _add_product(flow: Flow) -> Factor | None:
    if flow.slot == 0:
        return _broadcast(flow, flow.cotangent)
    other = flow.node._saved_tensor2 if flow.slot == 1 else flow.node._saved_tensor1
    return _broadcast(flow, flow.cotangent * _scaled(other, flow.node._saved_value))


@rule("Where")
def _where(flow: Flow) -> Factor | None:
    taken = flow.node._saved_condition
    return _broadcast(flow, flow.cotangent * (taken if flow.slot == 0 else ~taken))


@rule("PreluKernel", slots=(1,))
def _prelu(flow: Flow) -> Factor | None:
    return _broadcast(flow, flow.cotangent * flow.node._saved_self.clamp(max=0))


@rule("Expand")
def _expand(flow: Flow) -> Factor | None:
    return _broadcast(flow, flow.cotangent)


@rule("Repeat")
def _repeat(flow: Flow) -> Factor | None:
    repeats = flow.node._saved_repeats
    shape = (1,) * (len(repeats) - len(flow.shape)) + flow.shape
    for dim, axis in flow.ownership.axes.items():
        values = _own_slices(flow.cotangent, axis, dim, flow.samples)  # (K, N, *axes)
        for d in reversed(range(len(repeats))):
            values = values.unflatten(2 + d, (repeats[d], shape[d])).sum(2 + d)
        return Dense(values.flatten(2))
    return None


def _broadcast(flow: Flow, values: Tensor, channel: bool = False) -> Factor | None:
    """Sums elementwise contributions over all places into which the weight was broadcast.

    Args:
        flow: the use.
        values: (K, *output shape) the contribution of every element of the output.
        channel: whether the weight runs along axis 1 of the output, and axes from 2 on are one.
    """
    shape = (1, *flow.shape, 1) if channel else flow.shape
    ndim = values.dim() - 1
    shape = (1,) * (ndim - len(shape)) + tuple(shape)
    for dim, axis in flow.ownership.axes.items():
        if channel and dim >= 2:
            continue
        if shape[dim] == 1:
            split = axis.by_sample(values, dim + 1, flow.samples).movedim(2, 0)
            rest = [n for d, n in enumerate(shape) if d != dim]  # split: (K, N, T, *other axes)
            over = [2] + [3 + d for d, n in enumerate(rest) if n == 1]
            return Dense(split.sum(over).reshape(*split.shape[:2], -1))
        kept = _own_slices(values, axis, dim, flow.samples)  # (K, N, *axes): zero elsewhere
        over = [2 + d for d, n in enumerate(shape) if n == 1]
        return Dense((kept.sum(over) if over else kept).reshape(*kept.shape[:2], -1))
    return None


def _own_slices(values: Tensor, axis: Axis, dim: int, samples: slice) -> Tensor:
    """(K, N, ...) copies of `values` in which only each sample's own slices are kept."""
    numbers = torch.arange(axis.samples, device=values.device)[samples]
    mask = (axis.owners == numbers[:, None]).to(values.dtype)  # (N, length)
    shape = [1, len(numbers)] + [1] * (values.dim() - 1)
    shape[dim + 2] = -1
    return values.unsqueeze(1) * mask.view(shape)
