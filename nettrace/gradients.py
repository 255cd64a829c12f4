"""Per-sample gradients of each parameter, in the factored form that the tape allows.

A parameter's gradient is a sum over its uses. Each use contributes a factor, by a tape rule or by
the node's own backward; contributions are joined in factored form where their forms agree, else
written out and added at the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nettrace import rules
from nettrace.kernels import Dense, Factor, Outer, dense
from nettrace.ownership import Edge, Ownership, attribute
from nettrace.rules import Flow
from nettrace.tape import Tape, Use, edge_key, metadata, shape_of

#: Pulled-back cotangents: (K, ...) by edge of the tape, or, where samples are coupled and rows were
#: asked for, the written-out rows (K, N, P) by parameter.
Pulled: TypeAlias = Mapping[Edge, Tensor] | Mapping[str, Tensor]
#: How a use's weight shows a parameter: as it is, transposed, as another view, or computed from it.
View: TypeAlias = Literal["same", "swapped", "view", "computed"]


@dataclass(frozen=True)
class _Term:
    use: Use
    view: View


class PerSampleGradients:
    """Per-sample gradients of the outputs of one forward pass.

    Args:
        outputs: (N, ...) the outputs.
        parameters: the parameters, by name.
        tape: the tape between them.
        memory: bytes for pulled-back gradients.
        by_rows: whether to use one backward pass a row, which is defined for coupled samples too.
    """

    def __init__(
        self,
        outputs: Tensor,
        parameters: Mapping[str, Tensor],
        tape: Tape,
        memory: int,
        by_rows: bool,
    ) -> None:
        self.outputs = outputs
        self.parameters = dict(parameters)
        self.dtype = torch.promote_types(outputs.dtype, torch.float32)
        self._tape = tape
        self._memory = memory
        self._by_rows = by_rows

    @property
    def names(self) -> list[str]:
        """The parameters that the outputs depend on."""
        return list(self.parameters if self._by_rows else self._terms)

    def coverage(self) -> dict[str, str]:
        """The route by which each parameter's gradients are found; see `Jacobian.coverage`."""
        if self._by_rows:
            return dict.fromkeys(self.parameters, "rows")
        routes = dict.fromkeys(self.parameters, "unused")
        pulled = self.pull(torch.ones_like(self.outputs).unsqueeze(0))
        for name, terms in self._terms.items():
            known = all(
                rules.gradient(self._flow(t.use, pulled, slice(0, 1))) is not None for t in terms
            )
            routes[name] = "rule" if known else "node"
        return routes

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

    def bytes_per_cotangent(self) -> int:
        """The size of what `pull` returns for one cotangent."""
        if self._by_rows:
            return (
                len(self.outputs) * self.dtype.itemsize * sum(map(reals, self.parameters.values()))
            )
        meta = [metadata(node)[nr] for node, nr in self._owned]
        return sum(math.prod(m.shape) * max(m.dtype.itemsize, self.dtype.itemsize) for m in meta)

    def bytes_per_sample(self, name: str, pulled: Pulled) -> int:
        """Rough working memory to contract one sample's gradients of one parameter."""
        count = len(next(iter(pulled.values())))
        elements = count * reals(self.parameters[name])
        for term in () if self._by_rows else self._terms[name]:
            if (term.use.node, 0) in pulled:
                g = pulled[term.use.node, 0]  # type: ignore[index]
                patch = math.prod(shape_of(*edge_key(term.use.source))[2:])
                is_convolution = term.use.node.name() == "ConvolutionBackward0"
                elements += g.numel() // len(self.outputs) * (1 + patch * is_convolution)
        return elements * self.dtype.itemsize

    def pull(self, cotangents: Tensor) -> Pulled:
        """Pulls cotangents (K, *outputs.shape) back to every use of a weight."""
        if self._by_rows:
            return self._rows(cotangents)
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

    def factor(self, name: str, pulled: Pulled, samples: slice, oriented: bool = False) -> Factor:
        """One parameter's gradients for the cotangents pulled back and a range of samples.

        Args:
            name: the parameter.
            pulled: what `pull` returned.
            samples: the samples asked for.
            oriented: whether the factor must be laid out as the parameter is. Without it, inner
                products are right, but the parameter may be seen through a view.
        """
        if self._by_rows:
            return Dense(pulled[name][:, samples])  # type: ignore[index]
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
        return _joined([f for f in found if isinstance(f, Outer)], len(found)) or Dense(
            torch.stack([dense(f) for f in found]).sum(0)
        )

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

    def _flow(self, use: Use, pulled: Pulled, samples: slice) -> Flow:
        edge = (use.node, 0)
        return Flow(
            use.node,
            use.slot,
            shape_of(*edge_key(use.source)),
            pulled[edge],  # type: ignore[index]
            self._owned[edge],
            samples,
        )

    def _at_use(self, use: Use, pulled: Pulled, samples: slice) -> Factor:
        """The gradients with respect to the weight that enters at one use."""
        factor: Factor | None = None
        if (use.node, 0) in pulled:
            factor = rules.gradient(self._flow(use, pulled, samples))
        if factor is None:
            edges = [(use.node, nr) for nr in range(len(metadata(use.node)))]
            factor = Dense(
                rules.pullback(
                    use,
                    [pulled.get(edge) for edge in edges],  # type: ignore[call-overload]
                    [self._owned.get(edge) for edge in edges],
                    range(len(self.outputs))[samples],
                ).flatten(2)
            )
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

    def _rows(self, cotangents: Tensor) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        for cotangent in cotangents:
            for n in range(len(cotangent)):
                one = torch.zeros_like(cotangent)
                one[n] = cotangent[n]
                for name, gradient in self.backward(one).items():
                    rows[name].append(_written_out(gradient.flatten(), self.dtype))
        count = len(cotangents)
        return {name: torch.stack(r).unflatten(0, (count, -1)) for name, r in rows.items()}


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
