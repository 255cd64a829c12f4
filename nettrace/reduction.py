"""From the scalar loss of a training step back to where its samples are still apart.

A loss is a mean or a sum over samples, perhaps of several terms, scaled, masked or weighted. From
the loss back, all operations are linear in what samples contribute until an operation that is not:
its result is a *root* of the tape, where axis 0 counts samples. A gradient that enters at the roots
as the loss's own, but for the rows of one sample alone, is pulled back to that sample's share of
the gradient of the loss. What is computed of parameters alone, such as a penalty, has no samples:
its gradient is *common* to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from nettrace.gradients import TapeGradients
from nettrace.layout import Layout, layouts
from nettrace.ownership import CoupledSamplesError
from nettrace.tape import Root, Tape, edge_key, edges, shape_of

_Edge = tuple[Node, int]
#: Edges to end at, each with whether it is common to all samples; or why there are none.
_Ends = dict[_Edge, bool] | str


def _names(text: str) -> frozenset[str]:
    return frozenset(n if n[-1].isdigit() else n + "Backward0" for n in text.split())


#: Operations that are linear in each operand; in all of them together, but for products.
_LINEAR = _names(
    "Add Alias Cat Clone ConstantPadNd Expand Gather Index IndexSelect MaskedFill MaskedScatter "
    "MaskedSelect Mean MeanBackward1 Narrow Neg Permute Repeat ReshapeAlias Rsub Select Slice "
    "Split SplitWithSizes Squeeze SqueezeBackward1 SqueezeBackward2 Stack Sub Sum SumBackward1 T "
    "ToCopy Trace Transpose TransposeBackward1 Unbind Unflatten UnsafeSplit UnsafeView Unsqueeze "
    "View Where AddBackward1 DivBackward1 MulBackward1 RsubBackward1 SubBackward1 Nansum"
)
_PRODUCTS = _names("Mul Dot Mv Mm Div")
#: What makes one number of others that are added, scaled perhaps.
_ADDITIONS = _names(
    "Add Sub Rsub Neg Mul Div ToCopy View AddBackward1 SubBackward1 RsubBackward1 MulBackward1 "
    "DivBackward1"
)
#: Losses that are reduced by the operation itself; the first axis of their inputs counts samples.
_LOSSES = _names(
    "BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss MultiMarginLoss "
    "MultilabelMarginLoss NllLoss NllLoss2D SmoothL1Loss SoftMarginLoss"
)


@dataclass(frozen=True)
class Reduction:
    """What a loss is made of.

    Args:
        roots: where the samples are still apart.
        common: edges of the tape at which what is computed of parameters alone enters the loss.
    """

    roots: list[Root]
    common: list[GradientEdge]

    @classmethod
    def of(cls, loss: Tensor, tape: Tape) -> Reduction:
        """Finds the roots of the loss (); `tape` is that behind it.

        Raises:
            CoupledSamplesError: if the loss is no sum over samples of what each contributes.
        """
        found = _ends(edge_key(get_gradient_edge(loss)), tape, _behind(loss, tape))
        if isinstance(found, str):
            raise CoupledSamplesError(
                f"the loss is not a mean or sum over {tape.samples} samples, as far as can be "
                f"seen: {found}. Take the mean or the sum of per-sample losses of shape (N,)"
            )
        roots = [
            Root(GradientEdge(node, nr), shape_of(node, nr)[0] // tape.samples)
            for (node, nr), is_common in found.items()
            if not is_common
        ]
        if not roots:
            raise CoupledSamplesError("the loss is computed of parameters alone, of no sample")
        return cls(roots, [GradientEdge(*e) for e, is_common in found.items() if is_common])

    @staticmethod
    def check_order(tape: Tape) -> None:
        """Checks that rows belong to the samples whose place they have, as far as can be seen.

        Where there are several rows a sample, they are to follow each other.

        Args:
            tape: that behind one of the roots.

        Raises:
            CoupledSamplesError: if nothing on the tape has the samples on an axis of their own, or
                rows are picked without regard to samples.
        """
        (root,) = tape.roots
        known = layouts(tape)
        for node in tape.nodes:
            if isinstance(layout := known.get((node, 0)), Layout) and _is_mixed(node, layout, tape):
                raise CoupledSamplesError(
                    f"the loss is made of rows that {node.name()} picked, not as many of each of "
                    f"the {tape.samples} samples, one sample after the other: keep the rows, and "
                    "mask what does not count by weights, or by targets to ignore"
                )
        if root.inner == 1 or any(
            isinstance(layout, Layout)
            and layout.inner == 1
            and shape_of(node, nr)[layout.dim] == tape.samples
            for (node, nr), layout in known.items()
        ):
            return
        rows = root.inner * tape.samples
        raise CoupledSamplesError(
            f"the loss is made of {rows} rows for {tape.samples} samples, and it is not seen which "
            f"belong to which: nothing that the network computes has an axis of {tape.samples}. If "
            f"each row is a sample, as with several views in one batch, say samples={rows}; else "
            "let the network see (samples, rows, ...), or take per-sample losses of shape (N,)"
        )

    def flows(
        self, loss: Tensor, *, create_graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The loss's own gradients at the roots, and at the common edges, with a tape or not."""
        places = [*(root.edge for root in self.roots), *self.common]
        with ending_at({place.node for place in places}):
            found = torch.autograd.grad(loss, places, retain_graph=True, create_graph=create_graph)
        return list(found[: len(self.roots)]), list(found[len(self.roots) :])


@dataclass(frozen=True)
class Term:
    """A number that is added to others to make up a loss.

    Args:
        name: of the operation that it comes from; "penalty" for all that is computed of parameters
            alone.
        edges: where it enters.
        flows: the loss's derivatives by it, each one number.
    """

    name: str
    edges: list[GradientEdge]
    flows: list[Tensor]


def terms_of(loss: Tensor, tape: Tape) -> list[Term]:
    """The terms whose weighted sum a loss () is, in the order in which they are added.

    Args:
        loss: the loss.
        tape: that behind it.
    """
    found: dict[_Edge, None] = {}
    stack = [edge_key(get_gradient_edge(loss))]
    while stack:
        edge = stack.pop()
        inputs = reaching(edge[0], tape)
        adds = edge[0].name() in _ADDITIONS and is_linear(edge[0], tape)
        if adds and all(prod(shape_of(*e)) == 1 for e in inputs):
            stack += reversed(inputs)
        else:
            found[edge] = None
    places = [GradientEdge(*edge) for edge in found]
    with ending_at({node for node, _ in found}):
        flows = torch.autograd.grad(loss, places, retain_graph=True)
    terms: dict[str, Term] = {}
    for place, flow in zip(places, flows, strict=True):
        kind = place.node.name().removesuffix("Backward0")
        kind = "penalty" if tape.is_common(place.node) else kind
        name, count = kind, 1
        while name in terms and kind != "penalty":
            count += 1
            name = f"{kind} {count}"
        term = terms.setdefault(name, Term(name, [], []))
        term.edges.append(place)
        term.flows.append(flow)
    return list(terms.values())


def tape_of(
    loss: Tensor, samples: int, parameters: Mapping[str, Tensor], constants: Iterable[Tensor]
) -> Tape:
    """The tape behind a loss ()."""
    return Tape([Root(get_gradient_edge(loss))], samples, parameters, constants)


class ReducedGradients(TapeGradients):
    """Gradients of the samples' shares in a loss (), as if it had N outputs.

    Args:
        loss: the loss.
        flows: its gradients at the tape's roots.
        parameters: the parameters, by name.
        tape: from the roots on.
        memory: bytes for pulled-back gradients.
    """

    def __init__(
        self,
        loss: Tensor,
        flows: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        tape: Tape,
        memory: int,
    ) -> None:
        super().__init__(loss.expand(tape.samples), parameters, tape, memory)
        self._flows = flows

    def _entering(
        self, cotangents: Tensor
    ) -> tuple[Sequence[Tensor] | Sequence[GradientEdge], list[Tensor]]:
        return weighted(self._tape.roots, self._flows, cotangents)


def weighted(
    roots: Sequence[Root], flows: Sequence[Tensor], weights: Tensor
) -> tuple[list[GradientEdge], list[Tensor]]:
    """Where gradients enter the tape, and as what, when each sample's has a weight.

    Args:
        roots: where the samples are still apart.
        flows: the loss's gradients there.
        weights: (..., N) of the samples.
    """
    entering = []
    for root, flow in zip(roots, flows, strict=True):
        each = weights.to(flow).repeat_interleave(root.inner, -1)
        entering.append(flow * each.view(*each.shape, *(1,) * (flow.dim() - 1)))
    return [root.edge for root in roots], entering


def _behind(loss: Tensor, tape: Tape) -> dict[Node, _Ends]:
    """What lies behind each node of the linear part of a loss."""
    assert loss.grad_fn is not None
    linear: dict[Node, None] = {}
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node not in linear and is_linear(node, tape):
            linear[node] = None
            stack += [child for child, nr in edges(node) if tape.carries_samples(child)]
    known: dict[Node, _Ends] = {}
    for node in tape.nodes:  # inputs come before what is made of them
        if node not in linear:
            continue
        found: dict[_Edge, bool] = {}
        known[node] = found
        for edge in reaching(node, tape):
            if tape.leaf(GradientEdge(*edge)) is None:
                behind = _ends(edge, tape, known)
            elif shape_of(node) == ():
                behind = {edge: True}
            else:  # which need not be added to each sample alike
                behind = "it adds a parameter itself to what is made of samples"
            if isinstance(behind, str):
                known[node] = behind
                break
            found |= behind
    return known


def _ends(edge: _Edge, tape: Tape, known: Mapping[Node, _Ends]) -> _Ends:
    """The edges at which to end behind an edge, itself perhaps."""
    node, nr = edge
    name = node.name()
    if tape.is_common(node):
        return {edge: True}
    behind = known.get(node, f"it goes through {name}, which is not linear")
    if not isinstance(behind, str):
        return behind
    if _is_apart(edge, tape):
        return {edge: False}
    inputs = reaching(node, tape)
    if name not in _LOSSES:
        return behind
    if all(_is_apart(e, tape) for e in inputs):
        return dict.fromkeys(inputs, False)
    shapes = ", ".join(str(tuple(shape_of(*e))) for e in inputs)
    return (
        f"it goes through {name}, of shape {shapes}, whose rows are not seen to be those of the "
        f"batch's {tape.samples} samples, as where some were left out before"
    )


def _is_mixed(node: Any, layout: Layout, tape: Tape) -> bool:
    """Whether an operation picks rows, and not as many of each sample, one after the other."""
    if node.name() == "MaskedSelectBackward0":
        return True
    if node.name() == "IndexSelectBackward0":
        given = {node._saved_dim: node._saved_index}
    elif node.name() == "IndexBackward0":
        given = {d: index for d, index in enumerate(node._saved_indices) if index is not None}
    else:
        return False
    rows, length = given.get(layout.dim), shape_of(*edges(node)[0])[layout.dim]
    if rows is None or length % tape.samples:
        return False
    if rows.dtype in (torch.bool, torch.uint8):
        rows = rows.nonzero()[:, 0]
    if rows.dim() == 0 or len(rows) != layout.inner * tape.samples:
        return False  # as where other indices say which of these make a row
    owners = rows.reshape(-1, layout.inner, *rows.shape[1:]) % length // (length // tape.samples)
    alike = bool((owners == owners[:, :1]).all())
    return not alike or len(owners.flatten(1)[:, 0].unique()) != tape.samples


def _is_apart(edge: _Edge, tape: Tape) -> bool:
    shape = shape_of(*edge)
    return len(shape) > 0 and shape[0] > 0 and shape[0] % tape.samples == 0


def is_linear(node: Node, tape: Tape) -> bool:
    """Whether a result is linear in what depends on parameters."""
    if node.name() not in _PRODUCTS:
        return node.name() in _LINEAR
    inputs = reaching(node, tape)
    divides = node.name().startswith("Div") and node.next_functions[1] in inputs
    return len(inputs) == 1 and not divides


def reaching(node: Node, tape: Tape) -> list[_Edge]:
    """The inputs that depend on parameters."""
    return [e for e in edges(node) if tape.reaches(e)]


@contextmanager
def ending_at(nodes: Iterable[Node]) -> Iterator[None]:
    """Lets no gradient through some nodes in the backward passes within."""

    def nothing(inner: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.zeros_like(g) for g in inner)

    handles = [node.register_hook(nothing) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
