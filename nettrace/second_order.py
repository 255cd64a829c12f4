"""Products with second derivatives of a mean loss, for any network.

The gradient of a weighted sum of losses is recorded by autograd; a vector v pulled back through
that record becomes H v, reverse over reverse (Pearlmutter 1994, Fast exact multiplication by the
Hessian). J v is had likewise, from J^T u, which is linear in u, and J^T M J v from that
(Schraudolph 2002, Fast curvature matrix-vector products). Nothing is left out as long as every
backward pass can itself be differentiated. Derivatives of `torch.func.jacrev` are never taken: they
are wrong through layer normalisation.
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
from nettrace.eigenpairs import Eigenpairs, eigenpairs
from nettrace.estimators import TraceMethod
from nettrace.gradients import strided
from nettrace.matrix_traces import Probed, probed
from nettrace.operator import PerLayer
from nettrace.ranks import Ranks
from nettrace.reduction import Reduction, tape_of, weighted
from nettrace.spectral_density import Quadrature, quadrature
from nettrace.tape import Tape, precision

_UNDIFFERENTIABLE = re.compile("derivative|differentiate|[Dd]ouble backward")
_REMEDY = (
    "run the forward pass with another, such as that of attention under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


class NotTwiceDifferentiableError(ValueError):
    """Some operation's backward pass cannot be differentiated; the message names it."""


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
        """From the losses (N,) of samples; of several processes, each has its own."""

        def gradient(weights: Tensor) -> Sequence[Tensor]:
            return recorded([losses], parameters, [weights.to(losses)])

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
        check_functions(whole.nodes)
        reduced = Reduction.of(loss, whole)
        tape = Tape(reduced.roots, samples, parameters, constants, hold=True)
        factor = sum(ranks.each(samples)) / ranks.count

        def gradient(weights: Tensor) -> Sequence[Tensor]:
            flows, shared = reduced.flows(loss, create_graph=True)
            places, entering = weighted(reduced.roots, flows, weights * factor)
            entering += [flow * float(weights.sum()) for flow in shared]
            found = recorded([*places, *reduced.common], parameters, entering)
            return [g / scale for g in found]

        own = ranks.place(samples)
        return cls(gradient, parameters, tape.held, precision(loss), ranks, own)


class HessianProduct:
    """v -> H v by parameter, for H the Hessian of sum_n w_n l_n, over the samples of all processes.

    Args:
        twice: the gradients of the losses l_n, with their tape.
        weights: (N,) the weights w_n.

    Raises:
        NotTwiceDifferentiableError: by this and by products, if some backward pass is not
            differentiable.
    """

    def __init__(self, twice: Twice, weights: Tensor) -> None:
        self._twice = twice
        with held(twice.held), torch.enable_grad():
            self._gradient = or_refused(lambda: twice.gradient(weights[twice.own]))

    def __call__(self, vectors: PerLayer) -> PerLayer:
        """H v, a tensor for each parameter, as v."""
        pairs = [
            (real(g), real(vectors[name].to(g)))
            for name, g in zip(self._twice.parameters, self._gradient, strict=True)
            if g.requires_grad
        ]
        parameters = list(self._twice.parameters.values())
        if pairs:
            with held(self._twice.held):
                found = or_refused(
                    lambda: torch.autograd.grad(
                        [g for g, _ in pairs],
                        parameters,
                        [v for _, v in pairs],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
        else:  # a loss that is linear in the parameters
            found = tuple(torch.zeros_like(p) for p in parameters)
        images = [strided(h).detach() for h in found]
        self._twice.ranks.add_(images)
        return dict(zip(self._twice.parameters, images, strict=True))

    def gradient(self) -> PerLayer:
        """sum_n w_n g_n by parameter, over the samples of all processes."""
        found = [strided(g).detach().clone() for g in self._gradient]
        self._twice.ranks.add_(found)
        return dict(zip(self._twice.parameters, found, strict=True))


class GaussNewtonProduct:
    """v -> J^T M J v by parameter, for a matrix M that acts on each sample's outputs.

    Args:
        outputs: (N, ...) this process's, with their tape.
        parameters: by name.
        metric: w -> M w, for w in the outputs' shape.
        ranks: the processes that have a share of the samples each.

    Raises:
        NotTwiceDifferentiableError: by this and by products, if some backward pass is not
            differentiable.
    """

    def __init__(
        self,
        outputs: Tensor,
        parameters: Mapping[str, Tensor],
        metric: Callable[[Tensor], Tensor],
        ranks: Ranks,
    ) -> None:
        self._outputs, self._parameters = outputs, parameters
        self._metric, self._ranks = metric, ranks
        self._cotangent = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad():
            self._pulled = or_refused(lambda: recorded([outputs], parameters, [self._cotangent]))

    def __call__(self, vectors: PerLayer) -> PerLayer:
        """J^T M J v, a tensor for each parameter, as v."""
        pairs = [
            (real(g), real(vectors[name].to(g)))
            for name, g in zip(self._parameters, self._pulled, strict=True)
            if g.requires_grad
        ]
        (pushed,) = or_refused(
            lambda: torch.autograd.grad(
                [g for g, _ in pairs],
                self._cotangent,
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        found = torch.autograd.grad(
            self._outputs,
            list(self._parameters.values()),
            self._metric(pushed.detach()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        images = [strided(h).detach() for h in found]
        self._ranks.add_(images)
        return dict(zip(self._parameters, images, strict=True))


class Flattening:
    """How tensors of parameters make up one vector of P real numbers.

    Complex parameters count as pairs of real numbers.

    Args:
        parameters: by name.
        dtype: of vectors; by default the widest of the parameters'.

    Attributes:
        size: P.
        dtype: of vectors.
        device: where they lie.
        layers: by parameter, where it lies in a vector.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        self.size = 0
        self.layers: dict[str, slice] = {}
        self.dtype, self.device = torch.float16, torch.device("cpu")
        for name, p in self.parameters.items():
            numbers = real(p)
            self.layers[name] = slice(self.size, self.size + numbers.numel())
            self.size += numbers.numel()
            self.dtype = torch.promote_types(self.dtype, numbers.dtype)
            self.device = numbers.device
        self.dtype = dtype or self.dtype

    def flat(self, per_layer: Mapping[str, Tensor]) -> Tensor:
        """A tensor for each parameter as one vector (P,)."""
        parts = [real(per_layer[name]).reshape(-1) for name in self.parameters]
        return torch.cat([part.to(self.device, self.dtype) for part in parts])

    def split(self, vector: Tensor) -> PerLayer:
        """A vector (P,) as a tensor for each parameter, in its shape and type."""
        found = {}
        for name, place in self.layers.items():
            p = self.parameters[name]
            part = vector[place].to(real(p)).view_as(real(p))
            # A pair may begin anywhere in the vector, which a view as complex numbers may not.
            found[name] = torch.view_as_complex(part.clone()) if p.is_complex() else part
        return found


class CurvatureOperator(Flattening):
    """A symmetric P x P matrix of a network, by its products with vectors; nothing is formed.

    Args:
        product: from a tensor for each parameter to another.
        parameters: by name.
        dtype: of vectors; by default the widest of the parameters'.

    Attributes:
        product: from a tensor for each parameter to another.
        products: how many were made.
    """

    def __init__(
        self,
        product: Callable[[PerLayer], PerLayer],
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(parameters, dtype)
        self.product = product
        self.products = 0

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector (P,), of the same shape."""
        self.products += 1
        return self.flat(self.product(self.split(vector)))

    def dense(self) -> Tensor:
        """The matrix (P, P), by P products."""
        columns = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.stack([self(column) for column in columns], 1)

    def eigenpairs(
        self,
        top: int = 1,
        bottom: int = 0,
        *,
        tolerance: float | None = None,
        start: Tensor | None = None,
        hint: Tensor | None = None,
        spare: int = 0,
        seed: int = 0,
        memory: int = 2**31,
    ) -> tuple[Eigenpairs, Eigenpairs]:
        """The `top` largest and the `bottom` smallest eigenvalues, signed, with vectors (P, k).

        The arguments are those of `nettrace.eigenpairs.eigenpairs`.
        """
        *ends, _ = eigenpairs(
            *(self, self.size, top, bottom),
            dtype=self.dtype,
            device=self.device,
            tolerance=tolerance,
            start=start,
            hint=hint,
            spare=spare,
            seed=seed,
            memory=memory,
        )
        return ends[0], ends[1]

    def probe(
        self,
        *,
        method: TraceMethod = "xtrace",
        probes: int = 12,
        relative_error: float | None = None,
        most_products: int = 200,
        diagonal: bool = False,
        seed: int = 0,
    ) -> Probed:
        """The trace, that of each parameter's block, the squared norm and the diagonal, estimated.

        The arguments are those of `nettrace.matrix_traces.probed`.
        """
        return probed(
            *(self, self.size, self.layers),
            dtype=self.dtype,
            device=self.device,
            method=method,
            probes=probes,
            relative_error=relative_error,
            most_products=most_products,
            diagonal=diagonal,
            seed=seed,
        )

    def density(self, *, steps: int = 30, draws: int = 4, seed: int = 0) -> Quadrature:
        """The density of eigenvalues, by `steps` products for each of some draws.

        The arguments are those of `nettrace.spectral_density.quadrature`.
        """
        return quadrature(
            *(self, self.size),
            dtype=self.dtype,
            device=self.device,
            steps=steps,
            draws=draws,
            seed=seed,
        )

    def block(self, name: str) -> CurvatureOperator:
        """The diagonal block of one parameter."""
        zeros = {n: torch.zeros_like(p) for n, p in self.parameters.items() if n != name}

        def product(part: PerLayer) -> PerLayer:
            return {name: self.product({**zeros, **part})[name]}

        return CurvatureOperator(product, {name: self.parameters[name]}, self.dtype)

    def scaled(self, roots: Tensor, shift: Tensor) -> CurvatureOperator:
        """D (A + S) D for diagonal matrices D and S, given as vectors (P,)."""

        def product(vectors: PerLayer) -> PerLayer:
            inner = roots * self.flat(vectors)
            return self.split(roots * (self(inner) + shift * inner))

        return CurvatureOperator(product, self.parameters, self.dtype)


def recorded(
    outputs: Sequence[object], parameters: Mapping[str, Tensor], entering: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Gradients by the parameters, with their tape."""
    return torch.autograd.grad(
        outputs,  # type: ignore[arg-type]
        list(parameters.values()),
        entering,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def check_functions(nodes: Iterable[Node]) -> None:
    """Refuses what may give wrong derivatives of derivatives without a word.

    Functions of the user's own may keep what they made without its tape, as does weight
    normalisation of torch itself.
    """
    for node in nodes:
        if node.name().startswith("WeightNormInterface"):
            raise NotTwiceDifferentiableError(
                f"second derivatives through {node.name()} are wrong in torch: {_REMEDY}"
            )
        if isinstance(node, BackwardCFunction):
            raise NotTwiceDifferentiableError(
                f"{node.name()} is a backward pass of the network's own, of which it is not known "
                f"whether its derivatives are right: {_REMEDY}"
            )


def or_refused(found: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What is found, unless some operation cannot be differentiated twice."""
    try:
        return found()
    except RuntimeError as error:
        if _UNDIFFERENTIABLE.search(str(error)) is None:
            raise
        raise NotTwiceDifferentiableError(
            f"the backward pass of some operation cannot be differentiated ({error}): {_REMEDY}"
        ) from error


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, along a last axis; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
