"""Axes that count the same units, found by following a forward pass, whoever wrote the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from nettrace.landscape.axes import (
    Axes,
    Axis,
    Factor,
    axes,
    axis,
    factors,
    fix,
    join,
    part,
    reshape,
)


@dataclass(frozen=True)
class Call:
    """One operation that was called.

    Args:
        named: its arguments by name.
        results: the tensors that it returned.
        of: the axes of a tensor.
    """

    named: Mapping[str, Any]
    results: Sequence[Tensor]
    of: Callable[[Tensor], Axes]

    def axes(self, name: str) -> Axes:
        """Of a tensor among the arguments."""
        return self.of(self.named[name])

    @property
    def shape(self) -> Sequence[int]:
        """Of the first result."""
        return self.results[0].shape

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        for value in self.named.values():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, Tensor):
                    yield one

    def dims(self, name: str, ndim: int) -> list[int]:
        """Axes among the arguments, counted from the front; all where none are told."""
        value = self.named.get(name)
        if value is None or value == []:
            return list(range(ndim))
        return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])]


#: Axes of the first result, or of each.
_Rule: TypeAlias = Callable[[Call], Axes | list[Axes]]
_RULES: dict[str, _Rule] = {}


def _rule(names: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


class Follower(TorchDispatchMode):
    """Follows axes through all operations that are called within it.

    Args:
        state: parameters and buffers, of which units may be permuted.
        keep: whether to keep activations.

    Attributes:
        axes: of parameters and buffers.
        epsilon: the precision of the coarsest numbers that were made of data.
        activations: the results of operations that data enters, but for views, with their axes.
    """

    def __init__(self, state: Mapping[str, Tensor], keep: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = WeakTensorKeyDictionary()
        self._from_data = WeakTensorKeyDictionary()
        self._keep = keep
        self.axes = {name: axes(t.shape, fixed=False) for name, t in state.items()}
        self.epsilon = 0.0
        self._stopped: dict[str, list[Factor]] = {}
        self.activations: list[tuple[Tensor, Axes]] = []
        for name, tensor in state.items():
            self._known[tensor] = self.axes[name]

    def of(self, tensor: Tensor) -> Axes:
        """The axes of a tensor; of one that no operation made, such as inputs, they are fixed."""
        if tensor not in self._known:
            self._known[tensor] = axes(tensor.shape, fixed=True)
            self._from_data[tensor] = True
        found: Axes = self._known[tensor]
        return found

    def end(self, outputs: Tensor) -> None:
        """Fixes the order of outputs."""
        fix(*self.of(outputs))

    def unknown(self) -> list[str]:
        """Operations that saw units, and of which it is not known what they do with them."""
        units = {factor for several in self.axes.values() for factor in factors(several)}
        return sorted(
            name
            for name, stopped in self._stopped.items()
            if any(leaf in units for factor in stopped for leaf in factor.leaves())
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Calls an operation, and notes which axes meet in it."""
        found = func(*args, **(kwargs or {}))
        results = [t for t in _flat(found) if isinstance(t, Tensor)]
        schema = func._schema.arguments
        named = {a.name: a.default_value for a in schema if a.has_default_value()}
        named |= dict(zip((a.name for a in schema), args, strict=False)) | (kwargs or {})
        call = Call(named, results, self.of)
        inputs = list(call.tensors())
        given = [self.of(t) for t in inputs]  # before an operation in place
        from_data = any(t in self._from_data for t in inputs)
        if results:
            self._note(func, call, given, from_data)
        return found

    def _note(self, func: Any, call: Call, given: list[Axes], from_data: bool) -> None:
        name = func.overloadpacket.__name__
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = _pointwise
        made: Axes | list[Axes] | None = None
        if rule is not None:
            made = rule(call)
        else:
            free = [f for several in given for f in factors(several) if not f.fixed]
            self._stopped.setdefault(name, []).extend(free)
            for several in given:
                fix(*several)
        several_made = made if isinstance(made, list) else [made]
        for place, result in enumerate(call.results):
            one = several_made[place] if place < len(several_made) else None
            if one is None or len(one) != result.dim():
                for old in given if one is not None else []:
                    fix(*old)
                one = axes(result.shape, fixed=True)
            self._known[result] = one
            if from_data:
                self._from_data[result] = True
        first = call.results[0]
        if from_data and (first.is_floating_point() or first.is_complex()):
            self.epsilon = max(self.epsilon, torch.finfo(first.dtype).eps)
            if self._keep and not func.is_view:
                self.activations.append((first.detach(), self.of(first)))


def _flat(found: Any) -> Iterator[Any]:
    for one in found if isinstance(found, (list, tuple)) else [found]:
        yield from _flat(one) if isinstance(one, (list, tuple)) else [one]


def _broadcast(several: Sequence[Axes], ndim: int) -> Axes:
    """Axes that meet index by index, aligned at the last."""
    found: list[Axis] = [()] * ndim
    for one in several:
        for back in range(1, len(one) + 1):
            found[-back] = join(found[-back], one[-back])
    return tuple(found)


@_rule(
    "complex polar copy masked_fill _prelu_kernel _weight_norm_interface _conj lerp addcmul addcdiv"
)
def _pointwise(call: Call) -> Axes:
    several = [call.of(t) for t in call.tensors() if t.dim() <= len(call.shape)]
    return _broadcast(several, len(call.shape))


@_rule(
    "_to_copy clone detach alias contiguous lift_fresh _softmax _log_softmax _safe_softmax "
    "native_dropout _conj_physical real imag resolve_conj resolve_neg fill zero"
)
def _same(call: Call) -> Axes:
    return call.of(next(call.tensors()))


@_rule("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor")
@_rule("empty empty_like new_empty")
def _constant(call: Call) -> Axes:
    return axes(call.shape, fixed=False)


@_rule("view _unsafe_view reshape _reshape_alias unsqueeze squeeze flatten unflatten")
def _reshape(call: Call) -> Axes:
    return reshape(call.of(next(call.tensors())), call.shape)


@_rule("view_as_real")
def _to_pairs(call: Call) -> Axes:
    return (*call.axes("self"), axis(2, fixed=True))


@_rule("view_as_complex")
def _from_pairs(call: Call) -> Axes:
    *own, pairs = call.axes("self")
    fix(pairs)
    return tuple(own)


@_rule("t transpose permute movedim")
def _permute(call: Call) -> Axes:
    own = call.axes("self")
    order = list(range(len(own)))
    if "dims" in call.named:
        order = [d % len(own) for d in call.named["dims"]]
    elif own:
        one = call.named.get("dim0", 0) % len(own)
        other = call.named.get("dim1", len(own) - 1) % len(own)
        order[one], order[other] = order[other], order[one]
    return tuple(own[d] for d in order)


@_rule("expand repeat")
def _expand(call: Call) -> Axes:
    """Copies along an axis are all the same, in whatever order."""
    own = call.axes("self")
    own = ((),) * (len(call.shape) - len(own)) + own
    lengths = [1] * (len(call.shape) - call.named["self"].dim()) + list(call.named["self"].shape)
    return tuple(
        (*axis(new // old if old else 1, fixed=False), *one)
        for one, old, new in zip(own, lengths, call.shape, strict=True)
    )


@_rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk")
def _split(call: Call) -> list[Axes]:
    own, tensor = call.axes("self"), call.named["self"]
    dim = call.named.get("dim", 0) % tensor.dim()
    found, begin = [], 0
    for result in call.results:
        length = result.shape[dim]
        piece = part(own[dim], tensor.shape[dim], begin, length)
        found.append((*own[:dim], piece, *own[dim + 1 :]))
        begin += length
    return found


@_rule("slice narrow")
def _slice(call: Call) -> Axes:
    own, tensor = call.axes("self"), call.named["self"]
    dim = call.named.get("dim", 0) % tensor.dim()
    total, length = tensor.shape[dim], call.shape[dim]
    begin = call.named.get("start") or 0
    begin += total if begin < 0 else 0
    if call.named.get("step", 1) != 1:
        begin = 1 if length > 1 else begin  # which is no part
    piece = part(own[dim], total, begin, length)
    return (*own[:dim], piece, *own[dim + 1 :])


@_rule("select unbind")
def _select(call: Call) -> list[Axes]:
    own = call.axes("self")
    dim = call.named.get("dim", 0) % len(own)
    fix(own[dim])
    return [(*own[:dim], *own[dim + 1 :])] * len(call.results)


@_rule("glu")
def _glu(call: Call) -> Axes:
    own, tensor = call.axes("self"), call.named["self"]
    dim = call.named.get("dim", -1) % tensor.dim()
    piece = part(own[dim], tensor.shape[dim], 0, call.shape[dim])
    return (*own[:dim], piece, *own[dim + 1 :])


@_rule("cat")
def _cat(call: Call) -> Axes:
    """Parts of equal length along the axis are permuted alike, others not at all."""
    tensors = [t for t in call.tensors() if t.dim() == len(call.shape)]
    dim = call.named.get("dim", 0) % len(call.shape)
    rest = [tuple(() if d == dim else a for d, a in enumerate(call.of(t))) for t in tensors]
    found = list(_broadcast(rest, len(call.shape)))
    pieces = [call.of(t)[dim] for t in tensors]
    if len({t.shape[dim] for t in tensors}) == 1 and tensors[0].shape[dim] > 1:
        for piece in pieces[1:]:
            join(pieces[0], piece)
        found[dim] = (*axis(len(pieces), fixed=True), *pieces[0])
    else:
        fix(*pieces)
        found[dim] = axis(call.shape[dim], fixed=True)
    return tuple(found)


@_rule("stack")
def _stack(call: Call) -> Axes:
    dim = call.named.get("dim", 0) % len(call.shape)
    found = _broadcast([call.of(t) for t in call.tensors()], len(call.shape) - 1)
    return (*found[:dim], axis(call.shape[dim], fixed=True), *found[dim:])


@_rule("sum mean amax amin var std prod logsumexp linalg_vector_norm norm var_mean any all")
def _reduced(call: Call) -> list[Axes]:
    """The order of what is summed over does not matter."""
    own = call.axes("self")
    dims = call.dims("dim", len(own))
    kept = len(call.shape) == len(own)
    one = tuple(() if d in dims else a for d, a in enumerate(own) if kept or d not in dims)
    return [one] * len(call.results)


@_rule("mm addmm bmm baddbmm mv addmv dot vdot")
def _contracted(call: Call) -> Axes:
    """The last axis of one factor meets the first of the other, but for a batch's."""
    *added, one, other = [call.of(t) for t in call.tensors()]
    batch = len(one) - 2 if len(one) == len(other) > 2 else 0
    join(one[-1], other[batch])
    shared = tuple(join(one[d], other[d]) for d in range(batch))
    found = (*shared, *one[batch:-1], *other[batch + 1 :])
    return _broadcast([found, *added], len(found))


@_rule("convolution")
def _convolution(call: Call) -> Axes:
    x, weight = call.axes("input"), call.axes("weight")
    groups, transposed = call.named["groups"], call.named["transposed"]
    channels, lengths = call.named["input"].shape[1], call.named["weight"].shape
    fix(*x[2:], *weight[2:])
    outer, inner = reshape([x[1]], [groups, channels // groups])
    whole, single = weight[0], weight[1]
    of_group, within = reshape([whole], [groups, lengths[0] // groups])
    join(outer, of_group)
    join(inner, within if transposed else single)
    out = (*of_group, *(single if transposed else within))
    if isinstance(call.named.get("bias"), Tensor):
        join(out, call.axes("bias")[0])
    return (x[0], out, *axes(call.shape[2:], fixed=True))


@_rule("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
@_rule("cudnn_batch_norm miopen_batch_norm _batch_norm_no_update _batch_norm_with_update")
def _batch_norm(call: Call) -> Axes:
    own = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call.named.get(name), Tensor):
            join(own[1], call.axes(name)[0])
    return own


@_rule("native_group_norm")
def _group_norm(call: Call) -> Axes:
    own = call.axes("input")
    reshape([own[1]], [call.named["group"], call.named["C"] // call.named["group"]])
    for name in ("weight", "bias"):
        if isinstance(call.named.get(name), Tensor):
            join(own[1], call.axes(name)[0])
    return own


@_rule("native_layer_norm _fused_rms_norm")
def _layer_norm(call: Call) -> Axes:
    own = call.axes("input")
    for name in ("weight", "bias"):
        if isinstance(call.named.get(name), Tensor):
            _broadcast([own, call.axes(name)], len(own))
    return own


@_rule("embedding")
def _embedding(call: Call) -> Axes:
    words, features = call.axes("weight")
    fix(words)
    return (*call.axes("indices"), features)


@_rule("gather")
def _gather(call: Call) -> Axes:
    own, chosen = call.axes("self"), call.axes("index")
    dim = call.named["dim"] % max(len(own), 1)
    lengths = zip(call.named["self"].shape, call.named["index"].shape, strict=True)
    for d, (length, taken) in enumerate(lengths):
        if d == dim or length != taken:
            fix(own[d])
        else:
            join(own[d], chosen[d])
    return chosen


@_rule("index_add scatter_add index_copy index_reduce")
def _scattered(call: Call) -> Axes:
    own, source = call.axes("self"), call.axes("source" if "source" in call.named else "src")
    dim = call.named["dim"] % len(own)
    fix(own[dim], source[dim])
    for d in range(len(own)):
        if d != dim:
            join(own[d], source[d])
    return own


@_rule("index index_select")
def _index(call: Call) -> Axes:
    own = call.axes("self")
    if "indices" in call.named:
        given = [d for d, i in enumerate(call.named["indices"]) if isinstance(i, Tensor)]
    else:
        given = [call.named["dim"] % len(own)]
    fix(*[own[d] for d in given])
    first, behind = given[0], len(own) - given[-1] - 1
    if given[-1] - first + 1 != len(given):
        fix(*own)
        return axes(call.shape, fixed=True)
    places = call.shape[first : len(call.shape) - behind]
    return (*own[:first], *axes(places, fixed=True), *own[len(own) - behind :])


@_rule("max min")
def _largest(call: Call) -> Axes | list[Axes]:
    if "other" in call.named:
        return _pointwise(call)
    return _reduced(call) if "dim" not in call.named else _chosen(call)


@_rule("argmax argmin median nanmedian mode kthvalue cummax cummin aminmax")
def _chosen(call: Call) -> list[Axes]:
    """Places along one axis are told, or along all."""
    own = call.axes("self")
    dims = call.dims("dim", len(own))
    fix(*[own[d] for d in dims])
    kept = len(call.shape) == len(own)
    same = kept and call.shape[dims[0]] == call.named["self"].shape[dims[0]]
    one = tuple(
        a if same or d not in dims else () for d, a in enumerate(own) if kept or d not in dims
    )
    return [one] * len(call.results)


@_rule("flip roll cumsum cumprod sort topk constant_pad_nd reflection_pad1d reflection_pad2d")
@_rule("reflection_pad3d replication_pad1d replication_pad2d replication_pad3d")
@_rule("max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d")
@_rule("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d")
@_rule("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d")
@_rule("upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d mkldnn_max_pool2d")
def _placed(call: Call) -> list[Axes]:
    """Places along some axes matter: those told, or all of a map."""
    tensor = next(call.tensors())
    own = call.of(tensor)
    if "dim" in call.named or "dims" in call.named:
        dims = call.dims("dims" if "dims" in call.named else "dim", len(own))
    elif "pad" in call.named:
        dims = [len(own) - 1 - d for d, p in enumerate(_pairs(call.named["pad"])) if any(p)]
    else:
        dims = list(range(min(2, len(own) - 1), len(own)))
    fix(*[own[d] for d in dims])
    made = [own[d] if d not in dims else axis(n, fixed=True) for d, n in enumerate(call.shape)]
    return [tuple(made)] * len(call.results)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
