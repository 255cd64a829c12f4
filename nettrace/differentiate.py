"""From the outputs of a forward pass to the implicit Jacobian, with a check of what is given."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from nettrace.gradients import TapeGradients
from nettrace.operator import Jacobian
from nettrace.per_sample import LossJacobian
from nettrace.reduction import ReducedGradients, Reduction, tape_of
from nettrace.row_gradients import RowGradients
from nettrace.tape import Tape

Parameters: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Tensor
Coupled: TypeAlias = Literal["refuse", "rows"]
Reduced: TypeAlias = Literal["mean", "sum"]


def jacobian(
    outputs: Tensor,
    model_or_params: Parameters,
    *,
    memory_budget: int | str = "2GiB",
    coupled: Coupled = "refuse",
) -> Jacobian:
    """The Jacobian of `outputs` with respect to parameters, read off the autograd tape.

    Nothing is computed yet, and nothing is written to the network: no hooks, no `.grad`.

    Args:
        outputs: (N, ...) real outputs of a forward pass that recorded gradients. Axis 0 counts the
            samples, the other axes, flattened, the C outputs.
        model_or_params: a module, whose parameters that require a gradient are taken, or tensors,
            by name or in order.
        memory_budget: bytes, or a text such as "500MB" or "2GiB", that pulled-back gradients and
            the temporary results of contractions may take beside the forward pass, the result and
            what a single backward pass takes. Norms and traces are bitwise the same for every
            budget; Gram matrices are but for the order of sums.
        coupled: what to do where one sample's output depends on another sample. "refuse" raises
            `CoupledSamplesError` when a per-sample quantity is asked for; "rows" computes the
            Jacobian of the coupled outputs by one backward pass a row.

    Returns:
        The implicit operator.

    Raises:
        ValueError: if the outputs need no gradient, hold NaN or infinity, or have no samples; if
            there are no parameters, or none that the outputs depend on; or if the budget cannot be
            read.
        TypeError: if the outputs are no tensor, or are complex.

    Example:
        >>> import torch, nettrace as nt
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> x = torch.randn(5, 3)
        >>> J = nt.jacobian(model(x), model)
        >>> kernel = J.gram(trace_outputs=True)  # for a linear model, C X X^T
        >>> torch.allclose(kernel, 2 * x @ x.T, atol=1e-5)
        True
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(f"expected outputs to be a tensor of shape (N, ...), got {type(outputs)}")
    if outputs.is_complex():
        raise TypeError("expected real outputs, got complex ones: take torch.view_as_real first")
    if outputs.dim() == 0 or outputs.numel() == 0:
        raise ValueError(
            f"expected outputs of shape (N, ...) with N >= 1, got shape {tuple(outputs.shape)}"
        )
    if coupled not in ("refuse", "rows"):
        raise ValueError(f"expected coupled to be 'refuse' or 'rows', got {coupled!r}")
    parameters, constants = _checked(outputs, model_or_params)
    tape = Tape.behind(outputs, parameters, constants)
    _refuse_if_independent(tape, parameters)
    memory = parse_bytes(memory_budget)
    if coupled == "rows":
        return Jacobian(RowGradients(outputs, parameters), memory)
    return Jacobian(TapeGradients(outputs, parameters, tape, memory), memory)


def _checked(
    outputs: Tensor, model_or_params: Parameters
) -> tuple[dict[str, Tensor], Iterable[Tensor]]:
    """The parameters by name, and the constants beside them, if the outputs have a tape."""
    parameters = _named(model_or_params)
    if outputs.grad_fn is None:
        raise ValueError(
            "the outputs need no gradient, so there is no tape to read: run the forward pass "
            "outside torch.no_grad() and torch.inference_mode(), and do not detach its result"
        )
    if not bool(outputs.detach().isfinite().all()):
        _refuse_if_not_finite(outputs.detach())
    constants: Iterable[Tensor] = ()
    if isinstance(model_or_params, nn.Module):
        constants = chain(model_or_params.buffers(), model_or_params.parameters())
    _refuse_if_nested(parameters)
    return parameters, constants


def _refuse_if_independent(tape: Tape, parameters: Mapping[str, Tensor]) -> None:
    if not tape.nodes:
        raise ValueError(
            f"the outputs do not depend on any of the {len(parameters)} parameters given "
            f"({_some(parameters)}): pass the module whose forward pass made them"
        )


def loss_jacobian(
    losses: Tensor,
    model_or_params: Parameters,
    *,
    samples: int | None = None,
    reduction: Reduced = "mean",
    memory_budget: int | str = "2GiB",
    coupled: Coupled = "refuse",
) -> LossJacobian:
    """The Jacobian of per-sample losses: one gradient a sample.

    The loss of a training step may be given as it is, a mean or sum over samples: the tape tells
    what each of them contributes. The result is then such that the mean of its rows, or their sum,
    is the gradient of that loss. What is computed of parameters alone, such as a penalty, counts as
    part of each sample's loss. Batch normalisation in training mode, which makes samples depend on
    each other, is taken with the statistics of the batch held constant. Tensors on the tape must
    have no hooks, which would be called.

    Args:
        losses: (N,) the loss of each sample, not reduced (`reduction="none"`); or one number that
            is reduced of them.
        model_or_params: as in `jacobian`.
        samples: N, which a loss that is reduced does not tell. Sample n is what has the n-th place
            where the loss is made up; of several rows a sample, as those of the tokens of texts,
            those of a sample follow each other.
        reduction: whether one number is the "mean" or the "sum" of the losses that are meant.
        memory_budget: as in `jacobian`.
        coupled: as in `jacobian`; "rows" takes losses that are not reduced.

    Raises:
        CoupledSamplesError: if the loss is no mean or sum over samples, as far as the tape tells.
        ValueError: if the losses are not of shape (N,) or (), or the number of samples is missing
            or another, and as in `jacobian`.
        TypeError: as in `jacobian`.

    Example:
        >>> import torch, nettrace as nt
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.randint(0, 2, (5,))
        >>> loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> nt.loss_jacobian(loss, model, samples=5).norms().shape
        torch.Size([5])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction to be 'mean' or 'sum', got {reduction!r}")
    if isinstance(losses, Tensor) and losses.dim() == 0 and samples is not None:
        if coupled == "rows":
            raise ValueError("coupled='rows' takes losses of shape (N,), got one number")
        return reduced_jacobian(
            losses, model_or_params, operator.index(samples), reduction, memory_budget
        )
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise ValueError(
            f"expected one loss a sample, of shape (N,), got shape {tuple(losses.shape)}: use "
            "reduction='none' and average over any other axes, or say of how many samples one "
            "number is the mean or the sum, samples=N"
        )
    if samples is not None and isinstance(losses, Tensor) and len(losses) != samples:
        raise ValueError(f"expected {samples} losses, got {len(losses)}")
    return LossJacobian(
        jacobian(losses, model_or_params, memory_budget=memory_budget, coupled=coupled)
    )


def reduced_jacobian(
    loss: Tensor,
    model_or_params: Parameters,
    samples: int,
    reduction: Reduced,
    memory_budget: int | str,
    scale: float = 1.0,
) -> LossJacobian:
    """The Jacobian of what samples contribute to one number; see `loss_jacobian`.

    Args:
        loss: () `scale` times the loss that is meant.
        model_or_params: as in `jacobian`.
        samples: how many.
        reduction: as in `loss_jacobian`.
        memory_budget: as in `jacobian`.
        scale: gradients are pulled back so scaled, and divided by it in the end.
    """
    if samples < 1:
        raise ValueError(
            f"expected at least one sample, got samples={samples}, as of a batch in which no "
            "tensor has a length"
        )
    parameters, given = _checked(loss, model_or_params)
    constants = list(given)
    whole = tape_of(loss, samples, parameters, constants)
    _refuse_if_independent(whole, parameters)
    reduced = Reduction.of(loss, whole)
    for root in reduced.roots:
        reduced.check_order(Tape([root], samples, parameters, constants, hold=True))
    flows, shared = reduced.flows(loss)
    tape = Tape(reduced.roots, samples, parameters, constants, hold=True)
    memory = parse_bytes(memory_budget)
    gradients = ReducedGradients(loss, flows, parameters, tape, memory)
    factor = (samples if reduction == "mean" else 1) / scale
    common: dict[str, Tensor] | None = None
    if shared:
        found = torch.autograd.grad(
            reduced.common,
            list(parameters.values()),
            shared,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        each = factor / samples
        common = {name: each * g for name, g in zip(parameters, found, strict=True)}
    return LossJacobian(Jacobian(gradients, memory), factor, common, bool(tape.held))


def parse_bytes(size: int | str) -> int:
    """A number of bytes from a number or a text such as "500MB" or "2GiB".

    Raises:
        ValueError: if the text cannot be read or the number is not positive.

    Example:
        >>> parse_bytes("2GiB")
        2147483648
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B?\s*", str(size))
    try:
        assert match is not None
        number, prefix, binary = match.groups()
        result = int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " ", 0))
        assert result > 0
    except (AssertionError, ValueError):
        raise ValueError(
            f"expected a positive number of bytes, such as 10**9, '500MB' or '2GiB', got {size!r}"
        ) from None
    return result


def _refuse_if_nested(parameters: Mapping[str, Tensor]) -> None:
    """Raises if one parameter is computed from another, whose path through it would be cut."""
    for name, p in parameters.items():
        if p.grad_fn is None or len(parameters) == 1:
            continue
        others = {other: q for other, q in parameters.items() if q is not p}
        edges = [get_gradient_edge(q) for q in others.values()]
        found = torch.autograd.grad(
            p, edges, torch.zeros_like(p), retain_graph=True, allow_unused=True
        )
        for other, gradient in zip(others, found, strict=True):
            if gradient is not None:
                raise ValueError(
                    f"the parameter {name!r} is computed from {other!r}: the derivative by one "
                    "would leave out or count twice what goes through the other; give one of them"
                )


def _refuse_if_not_finite(outputs: Tensor) -> None:
    """Raises for NaN and plus infinity; minus infinity masks outputs."""
    if bool((outputs == torch.inf).any()):
        raise ValueError("the outputs hold infinity: check the input and the weights for overflow")
    if outputs.dim() == 0:
        raise ValueError("the loss is NaN: check the input and the weights for NaN")
    bad = outputs.isnan().reshape(len(outputs), -1).any(1)
    if bool(bad.any()):
        raise ValueError(
            f"the outputs hold NaN in {int(bad.sum())} of {len(outputs)} samples, first in sample "
            f"{int(bad.nonzero()[0])}: check the input and the weights for NaN"
        )


def _named(model_or_params: Parameters) -> dict[str, Tensor]:
    """The parameters that need a gradient, by name."""
    given: dict[str, Tensor]
    if isinstance(model_or_params, nn.Module):
        given = dict(model_or_params.named_parameters())
        what = f"the model, {type(model_or_params).__name__},"
    elif isinstance(model_or_params, Mapping):
        given = dict(model_or_params)
        what = "the mapping of parameters"
    elif isinstance(model_or_params, Iterable):
        several: list[Any] = (
            [model_or_params] if isinstance(model_or_params, Tensor) else list(model_or_params)
        )
        pairs = all(isinstance(p, tuple) for p in several)  # as of named_parameters()
        given = dict(several) if pairs else {str(i): p for i, p in enumerate(several)}
        what = "the list of parameters"
    else:
        raise TypeError(
            "expected a module, a mapping from name to tensor, or tensors, got "
            f"{type(model_or_params).__name__}"
        )
    wrong = [name for name, p in given.items() if not isinstance(p, Tensor)]
    if wrong:
        raise TypeError(
            "expected a module, a mapping from name to tensor, or tensors, got "
            f"{type(given[wrong[0]]).__name__} for {wrong[0]!r}"
        )
    if not given:
        raise ValueError(f"{what} has no parameters: there is nothing to differentiate by")
    needed = {name: p for name, p in given.items() if p.requires_grad}
    if not needed:
        raise ValueError(
            f"{what} has {len(given)} parameters ({_some(given)}), but none requires a gradient: "
            "call requires_grad_() on those to differentiate by"
        )
    names: dict[int, str] = {}
    for name, p in needed.items():
        if id(p) in names:
            raise ValueError(
                f"the parameters {names[id(p)]!r} and {name!r} are the same tensor: give it once"
            )
        names[id(p)] = name
    return needed


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
