"""Per-sample gradients of each parameter, in the factored form that the tape allows.

A parameter's gradient is a sum over its uses. Each use contributes a factor, by a tape rule or by
the node's own backward; contributions are joined in factored form where their forms agree, else
written out and added at the parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from nettrace import rules
from nettrace.batch_statistics import held
from nettrace.hooks import is_hooked
from nettrace.kernels import Dense, Factor, Outer, Still, Sum, dense, total
from nettrace.ownership import Edge, Ownership, attribute
from nettrace.rules import Flow
from nettrace.tape import Tape, Use, edge_key, metadata, precision, shape_of, signature

#: Pulled-back cotangents (K, ...), by place; what a place is, is the gradients' own business.
Pulled: TypeAlias = Mapping[Any, Tensor]
#: A parameter, or a weight and the bias that is added to what it makes.
Layer: TypeAlias = tuple[str, ...]
#: How a use's weight shows a parameter: as it is, transposed, as another view, or computed from it.
View: TypeAlias = Literal["same", "swapped", "view", "computed"]


#: Bytes of pulled-back gradients up to which the cost of a pass is that of starting it.
_SMALL = 2**21
#: Bytes of pulled-back gradients that are worked on together, and how many cotangents' they are, at
#: most: more save little, and take memory.
_TOGETHER, _WIDEST = 2**24, 2
#: Operations whose backward is as fast for a batch of cotangents.
_BATCHED = frozenset(
    name + "Backward0"
    for name in "Add Addmm Gelu LogSoftmax Mm Mul NllLoss Relu Sigmoid Silu Sub T Tanh View".split()
)


class Gradients(ABC):
    """Per-sample gradients of the outputs of one forward pass.

    Args:
        outputs: (N, ...) the outputs.
        parameters: the parameters, by name.
    """

    def __init__(self, outputs: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self.outputs = outputs
        self.parameters = dict(parameters)
        self.dtype = torch.promote_types(outputs.dtype, torch.float32)

    def backward(self, cotangent: Tensor) -> dict[str, Tensor]:
        """The gradient of each parameter for one cotangent, summed over samples."""
        gradients = self._autograd(list(self.parameters.values()), cotangent.view_as(self.outputs))
        return {
            name: torch.zeros_like(p) if g is None else self.scaled(name, strided(g))
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True)
        }

    def _autograd(
        self,
        places: Sequence[Tensor] | Sequence[GradientEdge],
        cotangents: Tensor,
        batched: bool = False,
        create_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Pulls one cotangent, or K if `batched`, back to places on the tape."""
        roots, entering = self._entering(cotangents)
        return torch.autograd.grad(
            roots,
            places,
            entering,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
            create_graph=create_graph,
        )

    def _entering(
        self, cotangents: Tensor
    ) -> tuple[Sequence[Tensor] | Sequence[GradientEdge], list[Tensor]]:
        """Where cotangents (..., *outputs.shape) enter the tape, and as what."""
        return [self.outputs], [cotangents]

    def scaled(self, name: str, gradient: Tensor) -> Tensor:
        """What autograd's gradient of a parameter is here: that, unless columns are scaled."""
        return gradient

    @abstractmethod
    def layers(self, apart: bool) -> list[Layer]:
        """The parameters that the outputs depend on, in groups whose gradients are one factor.

        Args:
            apart: whether each is wanted for itself.
        """

    @abstractmethod
    def coverage(self) -> dict[str, str]:
        """The route by which each parameter's gradients are found; see `Jacobian.coverage`."""

    @abstractmethod
    def pull(self, cotangents: Tensor, layers: Sequence[Layer]) -> Pulled:
        """Pulls cotangents (K, *outputs.shape) back to what `factor` needs for some layers."""

    @abstractmethod
    def bytes_per_cotangent(self, layers: Sequence[Layer]) -> int:
        """The size of what `pull` returns for one cotangent."""

    def at_once(self, layers: Sequence[Layer]) -> int:
        """How many cotangents it is efficient to pull back together."""
        return 1

    def forget(self) -> None:  # noqa: B027
        """Lets go of what is kept from one pullback to the next, if anything is."""

    def signature(self) -> str:
        """A digest of the operations on the tape."""
        return signature(self.outputs, self.parameters)

    def precision(self) -> float:
        """The distance from 1 to the next number in the coarsest arithmetic on the tape."""
        return precision(self.outputs)

    def form(self, layer: Layer) -> str:
        """How a factor that is not `oriented` sees the parameter."""
        return ""

    def remade(self, make: Callable[[Gradients], Gradients]) -> Gradients:
        """What is made of these, sample by sample."""
        return make(self)

    def with_fewer_outputs(
        self, fewer: Callable[[Gradients], tuple[Gradients, dict[str, Tensor]] | None]
    ) -> tuple[Gradients, dict[str, Tensor]] | None:
        """The same of fewer outputs, and what is left out; see `nettrace.heads`."""
        return fewer(self)

    # Several processes may have a share of the samples each: see `SharedGradients`.

    def tiles(self, layer: Layer, step: int) -> list[slice]:
        """The samples that this process works on for a layer, so many at a time."""
        return cut(0, len(self.outputs), step)

    def each(self, layer: Layer, pulled: Pulled, step: int) -> Iterator[tuple[slice, Factor]]:
        """The gradients of a layer for all samples, so many at a time."""
        for samples in self.tiles(layer, step):
            yield samples, self.factor(layer, pulled, samples)

    def partners(self, layer: Layer, ms: slice, step: int) -> list[slice]:
        """Those tiles whose products with the samples ms this process makes: each is made once."""
        return [ns for ns in self.tiles(layer, step) if ns.start <= ms.start]

    def complete(self, shares: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Adds up results, to which each process has added what it made of its samples."""

    @abstractmethod
    def factor(
        self, layer: Layer, pulled: Pulled, samples: slice, oriented: bool = False
    ) -> Factor:
        """The gradients of a layer for the cotangents pulled back and a range of samples.

        Args:
            layer: one of `layers`.
            pulled: what `pull` returned.
            samples: the samples asked for.
            oriented: whether the factor must be laid out as the parameter is. Without it, inner
                products are right, but the parameter may be seen through a view.
        """

    @abstractmethod
    def is_written_out(self, layer: Layer) -> bool:
        """Whether the factor holds a number for each of the parameter's, sample by sample."""


@dataclass(frozen=True)
class _Term:
    use: Use
    view: View


class TapeGradients(Gradients):
    """Gradients read off the tape, use by use.

    Args:
        outputs: (N, ...) the outputs.
        parameters: the parameters, by name.
        tape: the tape between them.
        memory: bytes for pulled-back gradients.
    """

    def __init__(
        self, outputs: Tensor, parameters: Mapping[str, Tensor], tape: Tape, memory: int
    ) -> None:
        super().__init__(outputs, parameters)
        self._tape = tape
        self._memory = memory
        self._stills: dict[tuple[Any, ...], Still] = {}

    def _autograd(self, *arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
        with held(self._tape.held):
            return super()._autograd(*arguments, **options)

    def layers(self, apart: bool) -> list[Layer]:
        """The parameters with a use; a weight and its bias together unless wanted apart."""
        if apart:
            return [(name,) for name in self._terms]
        biases = set(self._biases.values())
        return [
            (name, self._biases[name]) if name in self._biases else (name,)
            for name in self._terms
            if name not in biases
        ]

    def coverage(self) -> dict[str, str]:
        """`rule` if each use has one, else `node`."""
        routes = dict.fromkeys(self.parameters, "unused")
        for name, terms in self._terms.items():
            known = all(self._probed(t.use) is not None for t in terms)
            routes[name] = "rule" if known else "node"
        return routes

    def pull(self, cotangents: Tensor, layers: Sequence[Layer]) -> Pulled:
        """Gradients at the outputs of the nodes that use a weight, by edge of the tape."""
        edges = self._edges(layers)
        places = [GradientEdge(*edge) for edge in edges]
        if len(cotangents) > 1 and self._batches(layers):
            flows = self._autograd(places, cotangents, batched=True)
            return {
                edge: flow.to(torch.promote_types(flow.dtype, self.dtype))
                for edge, flow in zip(edges, flows, strict=True)
                if flow is not None
            }
        found: dict[Edge, Tensor] = {}
        for k, cotangent in enumerate(cotangents):
            for edge, flow in zip(edges, self._autograd(places, cotangent), strict=True):
                if flow is None:
                    continue
                dtype = torch.promote_types(flow.dtype, self.dtype)
                if len(cotangents) == 1:
                    found[edge] = flow.to(dtype).unsqueeze(0)
                    continue
                if edge not in found:  # one beside the other, as columns of one matrix
                    shape = (*flow.shape[:1], len(cotangents), *flow.shape[1:])
                    found[edge] = flow.new_zeros(shape, dtype=dtype).movedim(min(flow.dim(), 1), 0)
                found[edge][k] = flow
        return found

    def _batches(self, layers: Sequence[Layer]) -> bool:
        """Whether one pass for many cotangents is faster than one for each, and possible."""
        if not self._takes_many:
            return False
        small = self.bytes_per_cotangent(layers) <= _SMALL
        return small and all(
            node.name() in _BATCHED for node in self._tape.nodes if node not in self._tape.weights
        )

    @property
    def _takes_many(self) -> bool:
        """Whether one pass may be for many cotangents: hooks, and what looks for NaN, take one."""
        return not (self._has_hooks or torch.is_anomaly_enabled())

    @cached_property
    def _has_hooks(self) -> bool:
        return any(is_hooked(node) for node in self._tape.nodes)

    def at_once(self, layers: Sequence[Layer]) -> int:
        """As many as keep the gradients in a cache."""
        if len(self.outputs) == self.outputs.numel():
            return 1
        return max(1, min(_WIDEST, _TOGETHER // max(1, self.bytes_per_cotangent(layers))))

    def bytes_per_cotangent(self, layers: Sequence[Layer]) -> int:
        """Those gradients."""
        return sum(self._sizes[edge] for edge in self._edges(layers))

    @cached_property
    def _sizes(self) -> dict[Edge, int]:
        meta = {(node, nr): metadata(node)[nr] for node, nr in self._owned}
        return {
            edge: math.prod(m.shape) * max(m.dtype.itemsize, self.dtype.itemsize)
            for edge, m in meta.items()
        }

    def _edges(self, layers: Sequence[Layer]) -> list[Edge]:
        """The outputs of the nodes that use the parameters of some layers."""
        nodes = {term.use.node for layer in layers for name in layer for term in self._terms[name]}
        return [edge for edge in self._owned if edge[0] in nodes]

    def forget(self) -> None:
        """Lets go of the sides of factors that cotangents share."""
        self._stills.clear()

    def is_written_out(self, layer: Layer) -> bool:
        """Whether no rule keeps the gradients factored, or they may be joined written out."""
        terms = self._terms[layer[0]]
        forms = {(term.view, term.use.node.name(), term.use.slot) for term in terms}
        return len(layer) == 1 and (
            len(forms) > 1
            or terms[0].view == "computed"
            or not isinstance(self._probed(terms[0].use), Outer)
        )

    def form(self, layer: Layer) -> str:
        """The uses of the layer's weight."""
        return str([(t.view, t.use.node.name(), t.use.slot) for t in self._terms[layer[0]]])

    def factor(
        self, layer: Layer, pulled: Pulled, samples: slice, oriented: bool = False
    ) -> Factor:
        """The contributions of all uses, joined."""
        name, fused = layer[0], len(layer) > 1
        terms = self._terms[name]
        found = [self._at_use(term.use, pulled, samples, fused) for term in terms]
        if len(terms) == 1 and terms[0].view != "computed" and not oriented:
            return found[0]
        found = [
            self._at_parameter(name, term, factor)
            for term, factor in zip(terms, found, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        outers = [f for f in found if isinstance(f, Outer)]
        if len(outers) == len(found):
            joined = self._joined(outers, (*layer, samples.start, samples.stop))
            if len(joined) == 1:
                return joined[0]
            if all(f.still.groups == 1 for f in joined):
                return Sum(tuple(joined))
        return Dense(total(found))

    @cached_property
    def _owned(self) -> dict[Edge, Ownership]:
        return attribute(self._tape, self._memory)

    @cached_property
    def _terms(self) -> dict[str, list[_Term]]:
        live = {node for node, _ in self._owned}
        terms: dict[str, list[_Term]] = {}
        for use in self._tape.uses():
            if use.node in live:
                for name, view in self._views(use.source).items():
                    terms.setdefault(name, []).append(_Term(use, view))
        return terms

    @cached_property
    def _biases(self) -> dict[str, str]:
        """By weight, the bias that is added wherever the weight is used.

        All uses must have one form, so that they make one factor.
        """
        pairs: dict[tuple[Node, ...], list[str | None]] = {}
        for name, terms in self._terms.items():
            nodes = tuple(t.use.node for t in terms)
            slots = [rules.slots_of_weight_and_bias(node, self._owned[node, 0]) for node in nodes]
            forms = {(t.view, t.use.slot, getattr(t.use.node, "_saved_groups", 1)) for t in terms}
            if len(forms) > 1 or terms[0].view not in ("same", "swapped"):
                continue
            for place in (0, 1):
                if all(
                    s is not None and s[place] == t.use.slot
                    for s, t in zip(slots, terms, strict=True)
                ):
                    pairs.setdefault(nodes, [None, None])[place] = name
        return {
            weight: bias
            for weight, bias in pairs.values()
            if weight is not None and bias is not None
        }

    def _probed(self, use: Use) -> Factor | None:
        """What the rule for a use makes of a cotangent of the right shape."""
        meta = metadata(use.node)[0]
        zero = torch.zeros((), dtype=meta.dtype, device=meta.device)
        return self._by_rule(use, {(use.node, 0): zero.expand(1, *meta.shape)}, slice(0, 1))

    def _views(self, source: GradientEdge) -> dict[str, View]:
        viewed = self._tape.view_of(source)
        dtype = metadata(source.node)[source.output_nr].dtype
        if viewed is None or dtype.is_complex != self.parameters[viewed[0]].is_complex():
            return dict.fromkeys(self._tape.parameters_of(source), "computed")
        name, path = viewed
        moves = [node for node in path if node.name() != "ToCopyBackward0"]
        if all(
            node.name() in ("TBackward0", "TransposeBackward0") and len(shape_of(node)) == 2
            for node in moves
        ):
            return {name: "swapped" if len(moves) % 2 else "same"}
        return {name: "view"}

    def _by_rule(self, use: Use, pulled: Pulled, samples: slice) -> Factor | None:
        edge = (use.node, 0)
        if edge not in pulled or edge not in self._owned:
            return None
        shape = shape_of(*edge_key(use.source))
        flow = Flow(use.node, use.slot, shape, pulled[edge], self._owned[edge], samples)
        return rules.gradient(flow)

    def _at_use(self, use: Use, pulled: Pulled, samples: slice, fused: bool = False) -> Factor:
        """The gradients with respect to the weight that enters at one use."""
        factor = self._by_rule(use, pulled, samples)
        if factor is None:
            edges = [(use.node, nr) for nr in range(len(metadata(use.node)))]
            written = rules.pullback(
                use,
                [pulled.get(edge) for edge in edges],
                [self._owned.get(edge) for edge in edges],
                range(len(self.outputs))[samples],
            )
            factor = Dense(written.flatten(2))
        if isinstance(factor, Dense):
            return Dense(written_out(factor.values, self.dtype))
        assert isinstance(factor, Outer)
        if factor.still.dtype.is_complex or factor.moving.is_complex():
            return Dense(written_out(dense(factor), self.dtype))
        key = (use.node, use.slot, samples.start, samples.stop, fused)
        if key not in self._stills:
            still = factor.still.to(self.dtype)
            self._stills[key] = still.with_ones() if fused else still
        return Outer(self._stills[key], factor.moving.to(self.dtype), factor.moves_left)

    def _joined(self, factors: Sequence[Outer], key: tuple[Any, ...]) -> list[Outer]:
        """As few factors as there are forms, each with the tokens of all of its form."""
        forms: dict[tuple[Any, ...], list[Outer]] = {}
        for f in factors:
            side = f.still
            form = (f.moves_left, side.is_lookup, side.ones, side.groups, f.shape[4:])
            forms.setdefault(form, []).append(f)
        joined = []
        for form, members in forms.items():
            still = members[0].still
            if len(members) > 1:
                if (*key, form) not in self._stills:
                    tokens = torch.cat([f.still.tokens() for f in members], 2)
                    whole = Still(tokens, still.width, still.ones, still.dtype)
                    self._stills[*key, form] = whole
                still = self._stills[*key, form]
            moving = torch.cat([f.moving for f in members], 3) if len(members) > 1 else None
            moving = members[0].moving if moving is None else moving
            joined.append(Outer(still, moving, form[0]))
        return joined

    def _at_parameter(self, name: str, term: _Term, factor: Factor) -> Factor:
        """The same gradients, laid out as the parameter is."""
        parameter = self.parameters[name]
        if term.view == "same":
            return factor
        if term.view == "swapped" and isinstance(factor, Outer):
            return Outer(factor.still, factor.moving, not factor.moves_left)
        values = dense(factor)
        meta = metadata(term.use.source.node)[term.use.source.output_nr]
        weight = values.flatten(0, 1)
        if meta.dtype.is_complex:
            weight = torch.view_as_complex(weight.unflatten(-1, (-1, 2)))
        weight = weight.view(-1, *meta.shape).to(meta.dtype)
        through = rules.through(term.use.source, parameter, weight, self._takes_many)
        through = written_out(through.reshape(len(through), -1), self.dtype)
        return Dense(through.view(*values.shape[:2], -1))


def written_out(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """Real gradients (..., P) of the given dtype; a complex number is a pair of reals."""
    if gradients.is_complex():
        gradients = torch.view_as_real(gradients).flatten(-2)
    return gradients.to(dtype)


def cut(start: int, stop: int, step: int) -> list[slice]:
    """A range of samples in pieces of at most so many."""
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def strided(gradient: Tensor) -> Tensor:
    """A gradient with a place for each number; embeddings may give sparse ones."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def reals(parameter: Tensor) -> int:
    """The number of real numbers in a parameter."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)
