"""Per-sample gradients of each parameter, in the factored form that the tape allows.

A parameter's gradient is a sum over its uses. Each use contributes a factor, by a tape rule or by
the node's own backward; contributions are joined in factored form where their forms agree, else
written out and added at the parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nettrace import rules
from nettrace.kernels import Dense, Factor, Outer, dense, total
from nettrace.ownership import Edge, Ownership, attribute
from nettrace.rules import Flow
from nettrace.tape import Tape, Use, edge_key, metadata, shape_of

#: Pulled-back cotangents (K, ...), by place; what a place is, is the gradients' own business.
Pulled: TypeAlias = Mapping[Any, Tensor]
#: How a use's weight shows a parameter: as it is, transposed, as another view, or computed from it.
View: TypeAlias = Literal["same", "swapped", "view", "computed"]


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
        gradients = torch.autograd.grad(
            self.outputs,
            list(self.parameters.values()),
            cotangent.view_as(self.outputs),
            retain_graph=True,
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True)
        }

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that the outputs depend on."""

    @abstractmethod
    def coverage(self) -> dict[str, str]:
        """The route by which each parameter's gradients are found; see `Jacobian.coverage`."""

    @abstractmethod
    def pull(self, cotangents: Tensor) -> Pulled:
        """Pulls cotangents (K, *outputs.shape) back."""

    @abstractmethod
    def bytes_per_cotangent(self) -> int:
        """The size of what `pull` returns for one cotangent."""

    @abstractmethod
    def factor(self, name: str, pulled: Pulled, samples: slice, oriented: bool = False) -> Factor:
        """One parameter's gradients for the cotangents pulled back and a range of samples.

        Args:
            name: the parameter.
            pulled: what `pull` returned.
            samples: the samples asked for.
            oriented: whether the factor must be laid out as the parameter is. Without it, inner
                products are right, but the parameter may be seen through a view.
        """

    @abstractmethod
    def bytes_per_sample(self, name: str, pulled: Pulled) -> int:
        """Rough working memory to contract one sample's gradients of one parameter."""


class RowGradients(Gradients):
    """Gradients by one backward pass a row, which is defined for coupled samples too."""

    @property
    def names(self) -> list[str]:
        """All parameters."""
        return list(self.parameters)

    def coverage(self) -> dict[str, str]:
        """All "rows"."""
        return dict.fromkeys(self.parameters, "rows")

    def pull(self, cotangents: Tensor) -> Pulled:
        """The rows (K, N, P) of each parameter."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        for cotangent in cotangents:
            for n in range(len(cotangent)):
                one = torch.zeros_like(cotangent)
                one[n] = cotangent[n]
                for name, gradient in self.backward(one).items():
                    rows[name].append(_written_out(gradient.flatten(), self.dtype))
        count = len(cotangents)
        return {name: torch.stack(r).unflatten(0, (count, -1)) for name, r in rows.items()}

    def bytes_per_cotangent(self) -> int:
        """N rows of P."""
        entries = len(self.outputs) * sum(map(reals, self.parameters.values()))
        return entries * self.dtype.itemsize

    def factor(self, name: str, pulled: Pulled, samples: slice, oriented: bool = False) -> Factor:
        """The rows."""
        return Dense(pulled[name][:, samples])

    def bytes_per_sample(self, name: str, pulled: Pulled) -> int:
        """The rows of one sample."""
        return len(pulled[name]) * reals(self.parameters[name]) * self.dtype.itemsize


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

    @property
    def names(self) -> list[str]:
        """The parameters with a use."""
        return list(self._terms)

    def coverage(self) -> dict[str, str]:
        """`rule` if each use has one, else `node`."""
        routes = dict.fromkeys(self.parameters, "unused")
        pulled = self.pull(torch.ones_like(self.outputs).unsqueeze(0))
        for name, terms in self._terms.items():
            known = all(self._by_rule(t.use, pulled, slice(0, 1)) is not None for t in terms)
            routes[name] = "rule" if known else "node"
        return routes

    def pull(self, cotangents: Tensor) -> Pulled:
        """Gradients at the outputs of the nodes that use a weight, by edge of the tape."""
        edges = list(self._owned)
        pulled = [
            torch.autograd.grad(
                self.outputs,
                [GradientEdge(*edge) for edge in edges],
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
            for cotangent in cotangents
        ]
        flows = {}
        for i, edge in enumerate(edges):
            like = next((p[i] for p in pulled if p[i] is not None), None)
            if like is not None:
                stacked = torch.stack(
                    [torch.zeros_like(like) if p[i] is None else p[i] for p in pulled]
                )
                flows[edge] = stacked.to(torch.promote_types(stacked.dtype, self.dtype))
        return flows

    def bytes_per_cotangent(self) -> int:
        """Those gradients."""
        meta = [metadata(node)[nr] for node, nr in self._owned]
        return sum(math.prod(m.shape) * max(m.dtype.itemsize, self.dtype.itemsize) for m in meta)

    def bytes_per_sample(self, name: str, pulled: Pulled) -> int:
        """Factors, unfolded if need be, and gradients written out."""
        count = len(next(iter(pulled.values())))
        elements = count * reals(self.parameters[name])
        for use in (term.use for term in self._terms[name]):
            if (use.node, 0) in pulled:
                patch = math.prod(shape_of(*edge_key(use.source))[2:])
                is_convolution = use.node.name() == "ConvolutionBackward0"
                each = pulled[use.node, 0].numel() // len(self.outputs)
                elements += each * (1 + patch * is_convolution)
        return elements * self.dtype.itemsize

    def factor(self, name: str, pulled: Pulled, samples: slice, oriented: bool = False) -> Factor:
        """The contributions of all uses, joined."""
        terms = self._terms[name]
        found = [self._at_use(term.use, pulled, samples) for term in terms]
        if len(terms) == 1 and terms[0].view != "computed" and not oriented:
            return found[0]
        found = [
            self._at_parameter(name, term, factor)
            for term, factor in zip(terms, found, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        outer = [f for f in found if isinstance(f, Outer)]
        return _joined(outer, len(found)) or Dense(total(found))

    @cached_property
    def _owned(self) -> dict[Edge, Ownership]:
        return attribute(self._tape, self.outputs, self._memory)

    @cached_property
    def _terms(self) -> dict[str, list[_Term]]:
        live = {node for node, _ in self._owned}
        terms: dict[str, list[_Term]] = {}
        for use in self._tape.uses():
            if use.node in live:
                for name, view in self._views(use.source).items():
                    terms.setdefault(name, []).append(_Term(use, view))
        return terms

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
        if edge not in pulled:
            return None
        shape = shape_of(*edge_key(use.source))
        flow = Flow(use.node, use.slot, shape, pulled[edge], self._owned[edge], samples)
        return rules.gradient(flow)

    def _at_use(self, use: Use, pulled: Pulled, samples: slice) -> Factor:
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
            return Dense(_written_out(factor.values, self.dtype))
        if factor.left.is_complex() or factor.right.is_complex():
            return Dense(_written_out(dense(factor), self.dtype))
        left = factor.left if factor.is_lookup else factor.left.to(self.dtype)
        return Outer(left, factor.right.to(self.dtype), factor.rows, factor.moves_left)

    def _at_parameter(self, name: str, term: _Term, factor: Factor) -> Factor:
        """The same gradients, laid out as the parameter is."""
        parameter = self.parameters[name]
        if term.view == "same":
            return factor
        if term.view == "swapped" and isinstance(factor, Outer) and not factor.is_lookup:
            rows = factor.right.shape[-1]
            return Outer(factor.right, factor.left, rows, not factor.moves_left)
        values = dense(factor)
        meta = metadata(term.use.source.node)[term.use.source.output_nr]
        weight = values.flatten(0, 1)
        if meta.dtype.is_complex:
            weight = torch.view_as_complex(weight.unflatten(-1, (-1, 2)))
        weight = weight.view(-1, *meta.shape).to(meta.dtype)
        through = _through(term.use.source, parameter, weight)
        through = _written_out(through.reshape(len(through), -1), self.dtype)
        return Dense(through.view(*values.shape[:2], -1))


def _joined(factors: Sequence[Outer], wanted: int) -> Outer | None:
    """One factor with the tokens of all, where their forms agree."""
    if len(factors) < wanted:
        return None
    first, *others = factors
    form = (first.moves_left, first.is_lookup, first.rows, first.shape[2], first.shape[5])
    for other in others:
        if form != (other.moves_left, other.is_lookup, other.rows, other.shape[2], other.shape[5]):
            return None
    left = torch.cat([f.left for f in factors], 3)
    return Outer(left, torch.cat([f.right for f in factors], 3), first.rows, first.moves_left)


def _through(source: GradientEdge, parameter: Tensor, weight: Tensor) -> Tensor:
    """Pulls gradients (B, *weight shape) of a computed weight back to a parameter."""

    def back(gradient: Tensor, batched: bool) -> Tensor:
        (result,) = torch.autograd.grad(
            [source], [parameter], [gradient], retain_graph=True, is_grads_batched=batched
        )
        return result

    try:
        return back(weight, batched=True)
    except RuntimeError:  # an operation that cannot be batched
        return torch.stack([back(w, batched=False) for w in weight])


def _written_out(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """Real gradients (..., P) of the given dtype; a complex number is a pair of reals."""
    if gradients.is_complex():
        gradients = torch.view_as_real(gradients).flatten(-2)
    return gradients.to(dtype)


def reals(parameter: Tensor) -> int:
    """The number of real numbers in a parameter."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)
