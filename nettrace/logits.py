"""From the loss of a training step back to the outputs that a standard loss is made of.

From the loss back, what is linear is followed until a term of a standard loss: a softmax's
logarithm, binary cross-entropy, a squared difference, a rate less a count times its logarithm. What
enters there are the outputs, parameters of a distribution. The loss's own derivative there tells
what weight each term has, zero where a target is ignored, and with that the derivative by the
outputs which each would have by itself. Any other term is no part of the likelihood; where standard
losses have different outputs, or where weights are negative, there is no likelihood of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from nettrace.gradients import TapeGradients
from nettrace.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from nettrace.reduction import Reduction, ending_at, is_linear, reaching, tape_of
from nettrace.tape import Root, Tape, edge_key, edges, metadata, shape_of

_Edge: TypeAlias = tuple[Node, int]
#: From the loss's derivative by a term to its weight, and its derivative by the outputs.
_Weighing: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class NoLikelihoodError(ValueError):
    """The loss of a training step is not seen to be that of a likelihood."""


@dataclass(frozen=True)
class _Term:
    """A standard loss, not reduced.

    Args:
        edge: where its terms leave the operation.
        outputs: where the outputs enter.
        kind: of the likelihood.
        weighing: what its terms weigh, in the outputs' shape, and their derivative by the outputs.
        values: the outputs as far as the tape keeps them: of classes, logarithms of probabilities.
        axis: that of the classes, if there are any.
    """

    edge: _Edge
    outputs: _Edge
    kind: str
    weighing: _Weighing
    values: Tensor | None
    axis: int | None = None


_Rule: TypeAlias = Callable[[Any, Tape], "_Term | None"]
_RULES: dict[str, _Rule] = {}


def _recognises(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@dataclass(frozen=True)
class Logits:
    """The outputs behind a standard loss.

    Args:
        tape: behind them.
        likelihood: the distribution that they parametrise.
        shape: (N, ...) theirs.
        values: (N, ...) themselves, but logarithms of probabilities in place of logits of classes;
            None where the tape does not keep them.
        scores: (N, ...) the derivative of the likelihood's losses by them, at the step's targets.
        counted: (N, ...) whether the loss gives weight to each.
        notes: what to say of them.
    """

    tape: Tape
    likelihood: Likelihood
    shape: tuple[int, ...]
    values: Tensor | None
    scores: Tensor
    counted: Tensor
    notes: Mapping[str, str]

    @classmethod
    def behind(
        cls,
        loss: Tensor,
        samples: int,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
    ) -> Logits:
        """Finds the outputs behind a loss ().

        Raises:
            NoLikelihoodError: if there is no standard loss, or there are several.
            CoupledSamplesError: if it is not seen which outputs belong to which sample.
        """
        constants = list(constants)
        terms, others = _terms(tape_of(loss, samples, parameters, constants))
        weight, scores = _weighed(loss, terms, others)
        term = terms[0]
        shape = shape_of(*term.outputs)
        if not shape or shape[0] == 0 or shape[0] % samples or term.axis == 0:
            raise NoLikelihoodError(
                f"the outputs that enter {_name(term)} have the shape {shape}, of which axis 0 "
                f"does not count {samples} samples: {_REMEDY}"
            )
        inner = shape[0] // samples
        tape = Tape(
            [Root(GradientEdge(*term.outputs), inner)], samples, parameters, constants, hold=True
        )
        Reduction.check_order(tape)
        if inner > 1:
            shape = (samples, inner, *shape[1:])
        counted = weight > 0
        notes = {
            "recognised": f"by {_name(term)}, on the tape of the loss of the training",
            "outputs": f"what enters there, of shape {shape}",
        }
        if others:
            names = ", ".join(dict.fromkeys(others.values()))
            notes["beside"] = f"the loss has other terms, no part of the likelihood: {names}"
        least, most = float(weight[counted].min()), float(weight.max())
        if least < most * (1 - 1e-3):
            notes["weights"] = (
                f"the loss weighs its terms by 1 down to {least / most:.3g}; all weigh 1 here"
            )
        if not bool(counted.all()):
            notes["left_out"] = (
                f"{int((~counted).sum())} of {counted.numel()} terms, to which the loss gives no "
                "weight: the derivatives of their outputs count as zero"
            )
        return cls(
            tape,
            _likelihood(term.kind, len(shape), term.axis, inner),
            shape,
            None if term.values is None else term.values.detach().reshape(shape),
            scores.reshape(shape),
            counted.expand_as(scores).reshape(shape),
            notes,
        )


class LogitGradients(TapeGradients):
    """Gradients of the outputs behind a loss; of those without weight, zero.

    Args:
        loss: () the loss.
        logits: the outputs.
        parameters: the parameters, by name.
        memory: bytes for pulled-back gradients.
        centred: an axis over which the mean is taken off the outputs, if any.
    """

    def __init__(
        self,
        loss: Tensor,
        logits: Logits,
        parameters: Mapping[str, Tensor],
        memory: int,
        centred: int | None = None,
    ) -> None:
        self._edge = logits.tape.roots[0].edge
        dtype = metadata(self._edge.node)[self._edge.output_nr].dtype
        with torch.enable_grad():  # of these outputs, shape and tape matter alone
            like = loss.to(dtype).expand(logits.shape)
        super().__init__(like, parameters, logits.tape, memory)
        self._counted = logits.counted
        self._centred = centred

    def _entering(
        self, cotangents: Tensor
    ) -> tuple[Sequence[Tensor] | Sequence[GradientEdge], list[Tensor]]:
        entering = cotangents * self._counted
        if self._centred is not None:
            axis = self._centred - self.outputs.dim()
            entering = entering - entering.mean(axis, keepdim=True)
        several = cotangents.shape[: cotangents.dim() - self.outputs.dim()]
        shape = shape_of(*edge_key(self._edge))
        return [self._edge], [entering.reshape(*several, *shape)]


def _terms(tape: Tape) -> tuple[list[_Term], dict[Node, str]]:
    """The terms of a standard loss, and the names of what else the loss is made of."""
    terms: list[_Term] = []
    others: dict[Node, str] = {}
    seen: set[_Edge] = set()
    stack = [edge_key(tape.roots[0].edge)]
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        name = node.name()
        if tape.leaf(GradientEdge(*edge)) is not None or tape.is_common(node):
            others[node] = "a penalty on parameters"
        elif (term := _RULES.get(name, _no_term)(node, tape)) is not None:
            terms.append(term)
        elif is_linear(node, tape) or name in ("NllLossBackward0", "NllLoss2DBackward0"):
            stack += reaching(node, tape)
        else:
            others[node] = name
    kinds = {(term.outputs, term.kind, term.axis): _described(term) for term in terms}
    if not kinds:
        names = ", ".join(dict.fromkeys(others.values()))
        raise NoLikelihoodError(
            "no outputs are found behind the loss, which is not seen to be cross-entropy, binary "
            f"cross-entropy, a squared error or that of counts by their logarithmic rates: what is "
            f"found is {names}. {_REMEDY}"
        )
    if len(kinds) > 1:
        which = "different" if len({term.outputs for term in terms}) > 1 else "the same"
        raise NoLikelihoodError(
            f"the loss is made of {len(kinds)} standard losses with {which} outputs: "
            f"{'; '.join(kinds.values())}. {_REMEDY}"
        )
    return terms, others


_REMEDY = "Say what the outputs are by a probe, as in NTKTrace(probe=Probe(...))"


def _no_term(node: Any, tape: Tape) -> _Term | None:
    return None


def _weighed(
    loss: Tensor, terms: Sequence[_Term], others: Mapping[Node, str]
) -> tuple[Tensor, Tensor]:
    """The weights of a loss's terms, and their derivatives by the outputs, were they all one."""
    ends = {term.edge[0] for term in terms} | {n for n, name in others.items() if edges(n)}
    with ending_at(ends):
        flows = torch.autograd.grad(
            loss, [GradientEdge(*term.edge) for term in terms], retain_graph=True
        )
    weight: Tensor | float = 0.0
    scores: Tensor | float = 0.0
    for term, flow in zip(terms, flows, strict=True):
        each, gradient = term.weighing(flow)
        if not bool(each.isfinite().all()) or not bool(each.min() >= 0):
            raise NoLikelihoodError(
                f"{_described(term)} has terms with weights from {float(each.min()):.3g} to "
                f"{float(each.max()):.3g} in the loss: those of a likelihood are finite, and not "
                f"negative. {_REMEDY}"
            )
        weight, scores = weight + each, scores + gradient
    assert isinstance(weight, Tensor)
    if not bool((weight > 0).any()):
        raise NoLikelihoodError("the loss gives no weight to any output of this batch")
    return weight, torch.where(weight > 0, scores / weight, 0.0)


def _name(term: _Term) -> str:
    return term.edge[0].name()


def _described(term: _Term) -> str:
    return f"{term.kind} by {_name(term)}, of shape {shape_of(*term.outputs)}"


def _likelihood(kind: str, dims: int, axis: int | None, inner: int) -> Likelihood:
    if axis is not None:
        return Categorical(axis + (inner > 1))
    kinds: dict[str, type[Bernoulli | Gaussian | Poisson]] = {
        "bernoulli": Bernoulli,
        "gaussian": Gaussian,
        "poisson": Poisson,
    }
    return kinds[kind]()


# What is a term of a standard loss ----------------------------------------------------------------


def _into(node: Node, slot: int, tape: Tape) -> _Edge | None:
    """The edge that enters a node, before it is cast, if it alone depends on parameters."""
    if reaching(node, tape) != [node.next_functions[slot]]:
        return None
    return _before_casts(node.next_functions[slot], tape)  # type: ignore[arg-type]


def _before_casts(edge: _Edge, tape: Tape) -> _Edge:
    while edge[0].name() == "ToCopyBackward0" and tape.leaf(GradientEdge(*edge)) is None:
        (edge,) = edges(edge[0])
    return edge


def _classes(edge: _Edge, outputs: _Edge, logs: Tensor, axis: int) -> _Term:
    """Terms that are linear in the logarithms of probabilities: - sum of q ln p."""
    axis = (axis - 2**64 if axis >= 2**63 else axis) % logs.dim()
    logs = _numbers(logs)

    def weighing(flow: Tensor) -> tuple[Tensor, Tensor]:
        shares = -flow.to(logs.dtype)
        weight = shares.sum(axis, keepdim=True)
        # A negative share of one class is as little a probability as a negative sum.
        weight = torch.where((shares >= 0).all(axis, keepdim=True), weight, shares.amin(axis, True))
        return weight, weight * logs.exp() - shares

    return _Term(edge, outputs, "categorical", weighing, logs, axis)


@_recognises("LogSoftmaxBackward0")
def _log_softmax(node: Any, tape: Tape) -> _Term | None:
    outputs = _into(node, 0, tape)
    if outputs is None:
        return None
    return _classes((node, 0), outputs, node._saved_result, node._saved_dim)


@_recognises("LogBackward0")
def _log_of_softmax(node: Any, tape: Tape) -> _Term | None:
    softmax: Any = node.next_functions[0][0]
    if softmax.name() != "SoftmaxBackward0":
        return None
    outputs = _into(softmax, 0, tape)
    if outputs is None:
        return None
    return _classes((node, 0), outputs, softmax._saved_result.detach().log(), softmax._saved_dim)


@_recognises("SubBackward0")
def _difference(node: Any, tape: Tape) -> _Term | None:
    """Logits less the logarithm of their summed exponentials, or rates less counts times logs."""
    first, second = reaching(node, tape) if len(reaching(node, tape)) == 2 else (None, None)
    if first is None or second is None or node._saved_alpha != 1:
        return None
    other: Any = second[0]
    if other.name() == "LogsumexpBackward0" and other.next_functions[0] == first:
        if not other._saved_keepdim or len(other._saved_dim) != 1:
            return None
        logs = other._saved_self.detach() - other._saved_result.detach()
        return _classes((node, 0), first, logs, other._saved_dim[0])
    rate: Any = first[0]
    if rate.name() != "ExpBackward0" or other.name() != "MulBackward0":
        return None
    entering = rate.next_functions[0]
    slot = next((k for k in (0, 1) if other.next_functions[k] == entering), None)
    if slot is None or other.next_functions[1 - slot][0] is not None:
        return None
    counts = other._saved_self if slot else other._saved_other
    rates = _numbers(rate._saved_result)
    if counts is None or shape_of(node) != tuple(rates.shape) or bool((counts < 0).any()):
        return None

    def weighing(flow: Tensor) -> tuple[Tensor, Tensor]:
        weight = flow.to(rates)
        return weight, weight * (rates - counts)

    return _Term((node, 0), _before_casts(entering, tape), "poisson", weighing, rates.log())


@_recognises("BinaryCrossEntropyWithLogitsBackward0", "BinaryCrossEntropyBackward0")
def _binary(node: Any, tape: Tape) -> _Term | None:
    source, given = node, _numbers(node._saved_self)
    if node.name() == "BinaryCrossEntropyBackward0":
        source = node.next_functions[0][0]
        if reaching(node, tape) != [node.next_functions[0]] or source.name() != "SigmoidBackward0":
            return None
        given = given.logit()
    outputs, targets = _into(source, 0, tape), node._saved_target
    if outputs is None or bool(((targets < 0) | (targets > 1)).any()):
        return None
    positive = getattr(node, "_saved_pos_weight", None)

    def weighing(flow: Tensor) -> tuple[Tensor, Tensor]:
        each = _spread(flow, node, given)
        each = each if node._saved_weight is None else each * node._saved_weight
        of_yes = each * targets if positive is None else each * targets * positive
        weight = of_yes + each * (1 - targets)
        return weight, weight * given.sigmoid() - of_yes

    return _Term((node, 0), outputs, "bernoulli", weighing, given)


@_recognises("MseLossBackward0")
def _squared_error(node: Any, tape: Tape) -> _Term | None:
    slot = int(node.next_functions[0] not in reaching(node, tape))
    outputs = _into(node, slot, tape)
    if outputs is None or outputs[0].name() == "ExpandBackward0":
        return None
    values, targets = _numbers(node._saved_self), _numbers(node._saved_target)
    if slot:
        values, targets = targets, values

    def weighing(flow: Tensor) -> tuple[Tensor, Tensor]:
        weight = 2 * _spread(flow, node, values)
        return weight, weight * (values - targets)

    return _Term((node, 0), outputs, "gaussian", weighing, values)


@_recognises("PowBackward0", "MulBackward0")
def _squared_difference(node: Any, tape: Tape) -> _Term | None:
    """The square, written out, of outputs less what depends on no parameter."""
    inputs = node.next_functions
    squares = node._saved_exponent == 2 if len(inputs) == 1 else inputs[0] == inputs[1]
    difference: Any = inputs[0][0]
    if not squares or difference is None or node._saved_self is None:
        return None
    if difference.name() not in ("SubBackward0", "RsubBackward1") or difference._saved_alpha != 1:
        return None
    slot = int(difference.next_functions[0] not in reaching(difference, tape))
    outputs = _into(difference, slot, tape)
    if outputs is None or shape_of(*outputs) != shape_of(difference):
        return None
    turned = slot == 1 or difference.name() == "RsubBackward1"
    residual = _numbers(node._saved_self) * (-1 if turned else 1)

    def weighing(flow: Tensor) -> tuple[Tensor, Tensor]:
        weight = 2 * flow.to(residual)
        return weight, weight * residual

    return _Term((node, 0), outputs, "gaussian", weighing, None)


def _numbers(saved: Tensor) -> Tensor:
    return saved.detach().to(torch.promote_types(saved.dtype, torch.float32))


def _spread(flow: Tensor, node: Any, like: Tensor) -> Tensor:
    """The loss's derivative by each term, from that by what an operation reduced them to."""
    means = node._saved_reduction == 1
    return (flow.to(like) / (like.numel() if means else 1)).expand_as(like)
