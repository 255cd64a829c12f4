"""How the loss is curved along the gradients of its samples, by backward passes through others.

With g_n the gradient of sample n's loss and H_m the Hessian of the mean loss over a part m of the
samples, g_n^T H_m g_n is wanted for samples that are not of that part: the curvature that a sample
has along its own gradient is much larger than that along others', so that a Hessian of all of them
would be biased. The samples are dealt out into parts, and each part's Hessian is multiplied with
gradients of the rest.

The gradient of a weighted mean of losses is linear in the weights, and recorded by autograd; pulled
back through that record, a vector v becomes H v. Derivatives by the samples' outputs are recorded
with it, so that nothing is left out as long as every backward pass can itself be differentiated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from nettrace.batch_statistics import held
from nettrace.estimators import signs
from nettrace.gradients import strided
from nettrace.per_sample import LossJacobian
from nettrace.ranks import Ranks
from nettrace.reduction import Reduction, tape_of, weighted
from nettrace.tape import Tape, precision

#: Into how many parts samples are dealt out, and how many products with Hessians are made for the
#: squares in all, or a few more.
PARTS, PRODUCTS = 8, 16
_UNDIFFERENTIABLE = re.compile("derivative|differentiate|[Dd]ouble backward")
_REMEDY = (
    "run the forward pass with another, such as that of attention under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


class NotTwiceDifferentiableError(ValueError):
    """Some operation's backward pass cannot be differentiated; the message names it."""


@dataclass(frozen=True)
class Curvature:
    """The curvature that each part of the samples has along the gradients of the others.

    Args:
        parts: the numbers of the samples of each of M parts.
        squares: (M, N) d^T H_m d for d the gradients less their mean over samples not of part m,
            exact or estimates without bias; 0 for those of the part.
        overlaps: (M, N) g^T H_m mean(g), with that mean.
        products: how many products with Hessians it took.
        is_exact: whether the squares are.
    """

    parts: Sequence[Tensor]
    squares: Tensor
    overlaps: Tensor
    products: int
    is_exact: bool


@dataclass(frozen=True)
class Twice:
    """Gradients of weighted sums of the samples' losses, with their tape.

    Args:
        gradient: from weights (N,) to sum_n w_n g_n, for each of the parameters.
        parameters: by name.
        held: nodes of batch normalisation of which the statistics are held constant.
        epsilon: the precision of the arithmetic.
        ranks: the processes that have a share of the samples each.
        own: which are this process's.
    """

    gradient: Callable[[Tensor], Sequence[Tensor]]
    parameters: Mapping[str, Tensor]
    held: Sequence[Node]
    epsilon: float
    ranks: Ranks
    own: slice

    @classmethod
    def of_losses(cls, losses: Tensor, parameters: Mapping[str, Tensor], ranks: Ranks) -> Twice:
        """From the losses (N,) of samples; of several processes, each has its own.

        Raises:
            NotTwiceDifferentiableError: if some operation is seen not to be.
        """
        _check(Tape.behind(losses, parameters, ()).nodes)

        def gradient(weights: Tensor) -> Sequence[Tensor]:
            return _recorded([losses], parameters, [weights.to(losses)])

        own = ranks.place(len(losses))
        return cls(gradient, parameters, (), precision(losses), ranks, own)

    @classmethod
    def of_step(
        cls,
        loss: Tensor,
        samples: int,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
        scale: float,
        ranks: Ranks,
    ) -> Twice:
        """From the loss () of a training step, `scale` times the mean over samples.

        Of several processes, each has its own, of which the mean is meant.

        Raises:
            CoupledSamplesError: if it is no mean or sum over samples.
            NotTwiceDifferentiableError: if some operation is seen not to be.
        """
        whole = tape_of(loss, samples, parameters, constants)
        _check(whole.nodes)
        reduced = Reduction.of(loss, whole)
        tape = Tape(reduced.roots, samples, parameters, constants, hold=True)
        factor = sum(ranks.each(samples)) / ranks.count

        def gradient(weights: Tensor) -> Sequence[Tensor]:
            flows, shared = reduced.flows(loss, create_graph=True)
            places, entering = weighted(reduced.roots, flows, weights * factor)
            entering += [flow * float(weights.sum()) for flow in shared]
            found = _recorded([*places, *reduced.common], parameters, entering)
            return [g / scale for g in found]

        own = ranks.place(samples)
        return cls(gradient, parameters, tape.held, precision(loss), ranks, own)


def curvature(gradients: LossJacobian, twice: Twice, seed: int) -> Curvature:
    """The curvature that each part of the samples has along the gradients of the others.

    The squares in a part's Hessian H of n samples' centred gradients D (n, P) are the diagonal of
    D H D^T: exact by a product for each of the n, or by signs e as the mean of e * (D H D^T e).

    Args:
        gradients: of the samples' losses.
        twice: the same with their tape.
        seed: for the signs.

    Raises:
        NotTwiceDifferentiableError: if some backward pass cannot be differentiated.
        ValueError: if there are fewer than 3 samples, or gradients overflow.
    """
    samples = gradients.samples
    if samples < 3:
        raise ValueError(f"curvature and noise are told apart by at least 3 samples, got {samples}")
    parts = [torch.arange(m, samples, PARTS) for m in range(min(PARTS, samples))]
    draws = PRODUCTS // len(parts)
    squares = torch.zeros(len(parts), samples, dtype=torch.float64)
    overlaps, products = torch.zeros_like(squares), 0
    is_exact = True
    for m, part in enumerate(parts):
        rest = torch.ones(samples, dtype=torch.bool)
        rest[part] = False
        count = int(rest.sum())
        few = count <= draws
        is_exact = is_exact and few
        vectors = torch.zeros(count if few else draws, samples, dtype=torch.float64)
        for k, vector in enumerate(vectors):
            if few:
                vector[rest.nonzero()[k]] = 1
            else:
                vector[rest] = signs((count,), seed, f"curvature {m} {k}").double()
        hessian = _Hessian(gradients, twice, part)
        mean = rest.double() / count
        overlaps[m] = hessian(mean)
        for vector in vectors:
            weights = torch.where(rest, vector - vector[rest].mean(), 0)
            found = hessian(weights)
            hessian.check_symmetry(mean, overlaps[m], weights, found)
            squares[m] += vector * (found - found[rest].mean()) / (1 if few else draws)
        products += 1 + len(vectors)
    return Curvature(parts, squares, overlaps, products, is_exact)


class _Hessian:
    """w -> J H J^T w, (N,), for the Hessian of the mean loss over a part of the samples."""

    def __init__(self, gradients: LossJacobian, twice: Twice, part: Tensor) -> None:
        self._gradients = gradients
        self._twice = twice
        weights = torch.zeros(gradients.samples, dtype=torch.float64)
        weights[part] = 1 / len(part)
        with held(twice.held), torch.enable_grad():
            self._gradient = _or_refused(lambda: twice.gradient(weights[twice.own]))

    def __call__(self, weights: Tensor) -> Tensor:
        vectors = self._gradients.vjp(weights)
        pairs = [
            (_real(g), _real(vectors[name].to(g)))
            for name, g in zip(self._twice.parameters, self._gradient, strict=True)
            if g.requires_grad
        ]
        with held(self._twice.held):
            found = _or_refused(
                lambda: torch.autograd.grad(
                    [g for g, _ in pairs],
                    list(self._twice.parameters.values()),
                    [v for _, v in pairs],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        images = [strided(h).detach() for h in found]
        self._twice.ranks.add_(images)
        shares = self._gradients.jvp(dict(zip(self._twice.parameters, images, strict=True)))
        product = torch.stack([share.double().cpu() for share in shares.values()]).sum(0)
        if not bool(product.isfinite().all()):
            raise ValueError(
                "second derivatives of the loss overflow: the weights diverge, or the arithmetic "
                "is too narrow"
            )
        return product

    def check_symmetry(self, v: Tensor, of_v: Tensor, w: Tensor, of_w: Tensor) -> None:
        """Checks that v . J H J^T w is w . J H J^T v, which wrong second derivatives seldom are."""
        one, other = v @ of_w, w @ of_v
        size = v.norm() * of_w.norm() + w.norm() * of_v.norm()
        if abs(one - other) > self._twice.epsilon**0.5 * size:
            raise NotTwiceDifferentiableError(
                f"second derivatives of the loss are not symmetric, {float(one):.3g} one way and "
                f"{float(other):.3g} the other: the backward pass of some operation gives wrong "
                "derivatives when it is differentiated"
            )


def _recorded(
    outputs: Sequence[object], parameters: Mapping[str, Tensor], entering: Sequence[Tensor]
) -> Sequence[Tensor]:
    return torch.autograd.grad(
        outputs,  # type: ignore[arg-type]
        list(parameters.values()),
        entering,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _check(nodes: Iterable[Node]) -> None:
    """Refuses functions of the user's own, which may keep what they made without its tape."""
    for node in nodes:
        if isinstance(node, BackwardCFunction):
            raise NotTwiceDifferentiableError(
                f"{node.name()} is a backward pass of the network's own, of which it is not known "
                f"whether its derivatives are right: {_REMEDY}"
            )


def _or_refused(found: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    try:
        return found()
    except RuntimeError as error:
        if _UNDIFFERENTIABLE.search(str(error)) is None:
            raise
        raise NotTwiceDifferentiableError(
            f"the backward pass of some operation cannot be differentiated ({error}): {_REMEDY}"
        ) from error


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
