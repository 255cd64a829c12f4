"""Parameter uses on the autograd tape.

The autograd graph of a forward pass records every operation that touched a parameter, whoever
wrote the model. This module walks it from the outputs to the parameters and lists the *uses*: edges
through which a weight enters an operation that also sees samples.

A weight may be computed from parameters first (transposed, cast, normalised, a product of two
factors). The nodes of such a computation are *absorbed*: they belong to the weight. A use is then
an edge from a node that is not absorbed into the weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from nettrace.batch_statistics import may_be_held

#: Nodes through which each element of a weight passes at most once and unscaled, so that inner
#: products of gradients are the same on both sides.
VIEWS = frozenset(
    name + "Backward0"
    for name in (
        "Alias Clone Narrow Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T "
        "ToCopy Transpose Unbind Unflatten Unsqueeze UnsafeSplit UnsafeView View"
    ).split()
) | {"SqueezeBackward1", "SqueezeBackward2"}

#: Nodes that copy a weight's elements; a copy may belong to a sample.
BROADCASTS = frozenset({"ExpandBackward0", "RepeatBackward0"})


#: Nodes that combine their operands element by element.
ELEMENTWISE = frozenset(
    name + "Backward0" for name in ("Add", "Div", "Mul", "Rsub", "Sub", "Where")
)

#: Nodes that save integers of their own making, such as pivots, places and masks, and take none.
_KEEP_OWN_INTEGERS = frozenset(
    name + "Backward0"
    for name in (
        "Cummax Cummin FakeQuantizePerChannelAffineCachemask FakeQuantizePerTensorAffineCachemask "
        "Kthvalue LinalgDet LinalgLuFactorEx LinalgSlogdet LinalgSolveEx Max Median Min Mode Sort "
        "Topk"
    ).split()
)


@dataclass(frozen=True)
class Root:
    """An edge at which cotangents enter the tape; axis 0 counts samples.

    Args:
        edge: of the tape.
        inner: how many slices along axis 0 belong to each sample, one after the other.
    """

    edge: GradientEdge
    inner: int = 1


@dataclass(frozen=True)
class Use:
    """An edge from `node`, input number `slot`, into the weight that leaves `source`."""

    node: Node
    slot: int
    source: GradientEdge


class Tape:
    """The part of an autograd graph that lies between its roots and `parameters`.

    Args:
        roots: where cotangents enter.
        samples: how many samples there are.
        parameters: tensors that require a gradient, by name.
        constants: tensors known to hold no samples, such as a module's buffers.
        hold: whether the statistics of batch normalisation in training mode count as constants.

    Attributes:
        held: the nodes of batch normalisation for which they do.
    """

    def __init__(
        self,
        roots: Iterable[Root],
        samples: int,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
        *,
        hold: bool = False,
    ) -> None:
        self.roots = list(roots)
        self._root_nodes = {root.edge.node for root in self.roots}
        self.samples = samples
        self._parameters = dict(parameters)
        self._edges = {edge_key(get_gradient_edge(p)): name for name, p in parameters.items()}
        self._given = constants
        self.nodes = self._walk()
        self.held = [node for node in self.nodes if hold and may_be_held(node)]
        self._reaching = set(self.nodes)
        self.weights: set[Node] = set()
        self.absorb(())

    @classmethod
    def behind(
        cls, outputs: Tensor, parameters: Mapping[str, Tensor], constants: Iterable[Tensor]
    ) -> Tape:
        """The tape of outputs (N, ...)."""
        return cls([Root(get_gradient_edge(outputs))], len(outputs), parameters, constants)

    @cached_property
    def _constants(self) -> list[Tensor]:
        """The tensors known to hold no samples; most tapes never ask."""
        return [*self._given, *self._parameters.values()]

    @cached_property
    def _storages(self) -> set[int]:
        return {storage_of(c) for c in self._constants} - {0}

    def _walk(self) -> list[Node]:
        """The nodes from which a parameter can be reached, inputs before their consumers."""
        order: list[Node] = []
        leaves = self._edges
        reaches: dict[Node | None, bool] = {}
        stack: list[tuple[Node, bool]] = [(root.edge.node, False) for root in self.roots]
        while stack:
            node, done = stack.pop()
            if done:
                for edge in node.next_functions:
                    if edge in leaves or reaches.get(edge[0], False):
                        reaches[node] = True
                        order.append(node)
                        break
            elif node not in reaches:
                reaches[node] = False
                stack.append((node, True))
                stack += [
                    (edge[0], False)
                    for edge in node.next_functions
                    if edge[0] is not None and edge not in leaves
                ]
        return order

    def _is_leaf(self, node: Node, nr: int) -> bool:
        return (node, nr) in self._edges

    def leaf(self, edge: GradientEdge) -> str | None:
        """The parameter that `edge` flows into, if it does so directly."""
        return self._edges.get(edge_key(edge))

    def absorb(self, nodes: Iterable[Node]) -> None:
        """Count `nodes`, and whatever is then computed from weights alone, among the weights."""
        self.weights.update(nodes)
        for node in self.nodes:
            if node in self.weights or node in self._root_nodes:
                continue
            if self._is_derived(node):
                self.weights.add(node)

    def _is_derived(self, node: Node) -> bool:
        if not all(self._is_weight(child, nr) for child, nr in edges(node)):
            return False
        if any(0 in m.shape for m in metadata(node) if hasattr(m, "shape")):
            return False  # such as the rows of an expert that no sample chose
        spreads = node.name() in BROADCASTS or self._has_fixed_operand(node)
        if spreads and self._grows(node) and self._per_sample(shape_of(node)):
            return False
        return all(self._known(c) for c in self._fixed_operands(node))

    def may_absorb(self, node: Node) -> bool:
        """Whether a node whose rows are not the samples' own can be part of a weight.

        It can where nothing differentiable but weights flows in, and no fixed operand looks like
        data. A fixed operand does not if it is combined element by element with a weight whose
        shape the result keeps; or is a parameter, a buffer or a copy of one, a number, a count
        0, 1, 2, ..., or a table of relative positions; or has no axis whose length is a multiple of
        the number of samples. One that the tape does not keep looks like data if it gives the
        result such an axis.
        """
        if node in self._root_nodes:
            return False
        if not all(self._is_weight(child, nr) for child, nr in edges(node)):
            return False
        if node.name() in ELEMENTWISE and not self._grows(node):
            return True
        if self._has_fixed_operand(node) and not saved_tensors(node):
            return not self._per_sample(shape_of(node))
        return not any(
            self._per_sample(c.shape) and not self._known(c) and not self._copied(c)
            for c in self._fixed_operands(node)
        )

    def _grows(self, node: Node) -> bool:
        """Whether the result has another shape than each weight it is made of."""
        return all(
            shape_of(child, nr) != shape_of(node)
            for child, nr in edges(node)
            if self._is_leaf(child, nr) or child in self._reaching
        )

    def _is_weight(self, child: Node, nr: int) -> bool:
        return self._is_leaf(child, nr) or child in self.weights or child not in self._reaching

    def _per_sample(self, shape: Iterable[int]) -> bool:
        return self.samples > 1 and any(n and n % self.samples == 0 for n in shape)

    def _has_fixed_operand(self, node: Node) -> bool:
        """Whether something enters that no parameter does, be it differentiable or not."""
        return any(
            child is None or not (self._is_leaf(child, nr) or child in self._reaching)
            for child, nr in node.next_functions
        )

    def _fixed_operands(self, node: Node) -> list[Tensor]:
        """Saved tensors that can be constants: integers, and anything beside a fixed operand."""
        if self._has_fixed_operand(node):
            return saved_tensors(node)
        if node.name() in _KEEP_OWN_INTEGERS:
            return []
        return [t for t in saved_tensors(node) if not (t.is_floating_point() or t.is_complex())]

    def _known(self, constant: Tensor) -> bool:
        return constant.numel() <= 1 or storage_of(constant) in self._storages

    def _copied(self, constant: Tensor) -> bool:
        if not constant.is_floating_point() and constant.numel() == max(constant.shape):
            flat = constant.flatten()
            if torch.equal(flat, torch.arange(len(flat), device=flat.device, dtype=flat.dtype)):
                return True
        if _is_of_relative_positions(constant):
            return True
        return any(
            c.shape == constant.shape and c.device == constant.device and torch.equal(c, constant)
            for c in self._constants
        )

    def uses(self) -> list[Use]:
        """Every edge through which a weight enters a node that is not absorbed."""
        return [
            Use(node, slot, GradientEdge(child, nr))
            for node in self.nodes
            if node not in self.weights
            for slot, (child, nr) in enumerate(node.next_functions)
            if child is not None and (self._is_leaf(child, nr) or child in self.weights)
        ]

    def view_of(self, source: GradientEdge) -> tuple[str, tuple[Node, ...]] | None:
        """The parameter that a weight is a view of, and the view nodes, nearest the use first.

        Returns:
            None where the weight is computed, rather than viewed.
        """
        path: list[Node] = []
        edge = source
        while (name := self.leaf(edge)) is None:
            if edge.node.name() not in VIEWS:
                return None
            path.append(edge.node)
            ((child, nr),) = edges(edge.node)
            edge = GradientEdge(child, nr)
        return name, tuple(path)

    def parameters_of(self, source: GradientEdge) -> list[str]:
        """The names of the parameters that a weight is computed from."""
        names: dict[str, None] = {}
        seen: set[tuple[Node, int]] = set()
        stack = [edge_key(source)]
        while stack:
            key = stack.pop()
            if key in seen:
                continue
            seen.add(key)
            if key in self._edges:
                names[self._edges[key]] = None
            else:
                stack += edges(key[0])
        return list(names)

    def carries_samples(self, node: Node) -> bool:
        """Whether a parameter can be reached from `node` and it is not itself part of a weight."""
        return node in self._reaching and node not in self.weights

    def reaches(self, edge: tuple[Node, int]) -> bool:
        """Whether an edge flows into a parameter, or is one."""
        return edge in self._edges or edge[0] in self._reaching

    def is_common(self, node: Node) -> bool:
        """Whether a node is, or may be taken for, computed of parameters alone."""
        return node in self.weights or self.may_absorb(node)

    def is_zero(self, source: GradientEdge) -> bool:
        """Whether a weight views a parameter that is zero throughout."""
        viewed = self.view_of(source)
        return viewed is not None and not bool(self._parameters[viewed[0]].any())

    def consumers(self, node: Node) -> list[Node]:
        """The nodes on the tape that `node` flows into."""
        return [n for n in self.nodes if any(child is node for child, _ in n.next_functions)]


def _is_of_relative_positions(constant: Tensor) -> bool:
    """Whether whole numbers (queries, keys) go by the difference of their places alone.

    As in T5. That samples' data do so by chance is unlikely but in small or constant tables.
    """
    if constant.is_floating_point() or constant.dim() != 2 or min(constant.shape) < 3:
        return False
    varies = bool((constant != constant[0, 0]).any())
    return varies and torch.equal(constant[1:, 1:], constant[:-1, :-1])


def signature(outputs: Tensor, parameters: Mapping[str, Tensor]) -> str:
    """A digest of the tape of `outputs`: kinds and shapes of operations, and what flows into which.

    Of no values: an index tensor may change without notice.
    """
    names = {edge_key(get_gradient_edge(p)): name for name, p in parameters.items()}
    numbers = {node: number for number, node in enumerate(_reachable(outputs))}
    digest = hashlib.sha256()
    for node in numbers:
        shapes = [(tuple(m.shape), m.dtype) for m in metadata(node) if hasattr(m, "shape")]
        inputs = [
            None if child is None else (numbers[child], nr, names.get((child, nr)))
            for child, nr in node.next_functions
        ]
        digest.update(repr((node.name(), shapes, inputs)).encode())
    return digest.hexdigest()


def opaque(outputs: Tensor) -> str | None:
    """What hides a part of a network from the tape of `outputs`, if anything does.

    Reentrant checkpoints keep no tape of what they call, others compute it anew whenever it is
    read, and compiled code has one operation for all.
    """
    for node in _reachable(outputs):
        if node.name().startswith("CompiledFunction"):
            return "compiled code"
        saved = [getattr(node, name) for name in _raw_names(type(node))]
        several = [s for one in saved for s in (one if isinstance(one, tuple) else (one,))]
        hooks = (getattr(s, "unpack_hook", None) for s in several)
        if node.name().startswith("CheckpointFunction") or any(
            getattr(hook, "__module__", "") == "torch.utils.checkpoint" for hook in hooks
        ):
            return "a checkpoint"
    return None


def has_fused_attention(outputs: Tensor) -> bool:
    """Whether there is attention on the tape whose backward pass cannot be differentiated."""
    return any(node.name().startswith("ScaledDotProduct") for node in _reachable(outputs))


def precision(outputs: Tensor) -> float:
    """The distance from 1 to the next number in the coarsest arithmetic on the tape of `outputs`.

    Where a device may round operands to TF32, that of TF32.
    """
    eps = [torch.finfo(outputs.dtype).eps] + [
        torch.finfo(m.dtype).eps
        for node in _reachable(outputs)
        for m in metadata(node)
        if hasattr(m, "dtype") and (m.dtype.is_floating_point or m.dtype.is_complex)
    ]
    narrows = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    if outputs.is_cuda and narrows and max(eps) >= torch.finfo(torch.float32).eps:
        eps.append(2.0**-10)
    return max(eps)


def _reachable(outputs: Tensor) -> list[Node]:
    """All nodes behind `outputs`, in an order that their connections fix."""
    seen: dict[Node, None] = {}
    stack = [] if outputs.grad_fn is None else [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack += [child for child, _ in edges(node)]
    return list(seen)


def edge_key(edge: GradientEdge) -> tuple[Node, int]:
    """An edge as a dictionary key (its ownership token has no part in its identity)."""
    return edge.node, edge.output_nr


def storage_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for layouts without one block of memory."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def edges(node: Node) -> list[tuple[Node, int]]:
    """The edges of `node` that carry a gradient."""
    return [(child, nr) for child, nr in node.next_functions if child is not None]


def metadata(node: Node) -> Any:
    """Shapes, dtypes and devices of the outputs of the operation that `node` differentiates."""
    return node._input_metadata


def shape_of(node: Node, nr: int = 0) -> tuple[int, ...]:
    """The shape of output number `nr` of the operation that `node` differentiates."""
    return tuple(metadata(node)[nr].shape)


@cache
def _raw_names(kind: type) -> tuple[str, ...]:
    return tuple(a for a in dir(kind) if a.startswith("_raw_saved_"))


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(a for a in dir(kind) if a.startswith("_saved_") and "_sym_" not in a)


def saved_tensors(node: Node) -> list[Tensor]:
    """The tensors that `node` keeps for its backward pass."""
    values = [getattr(node, name) for name in _saved_names(type(node))]
    values += getattr(node, "saved_tensors", ())
    found: list[Tensor] = []
    for value in values:
        found += [
            t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)
        ]
    return found


def pull(node: Any, gradients: list[Tensor | None], slot: int) -> Tensor | None:
    """One node's own backward: the gradient for its input `slot`, without the rest of the graph."""
    if hasattr(node, "apply"):  # a custom autograd.Function, which lists non-tensor inputs too
        wanted = [i for i, needed in enumerate(node.needs_input_grad) if needed]
        live = [i for i, (child, _) in enumerate(node.next_functions) if child is not None]
        slot, result = wanted[live.index(slot)], node.apply(*gradients)
    else:
        result = node(*gradients)
    found: Tensor | None = result[slot] if isinstance(result, tuple) else result
    return found
