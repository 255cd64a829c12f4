"""The empirical neural tangent kernel: the Gram matrix of the Jacobian of the outputs.

Jacot, Gabriel and Hongler, Neural tangent kernel (2018), arXiv:1806.07572. Its entropy as that of a
density matrix: Tovey, Krippendorf, Nikolaou and Holm (2023), arXiv:2305.00995.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nettrace.estimators import Estimate
from nettrace.measures.registry import Value, measure

_NTK = "Jacot et al. 2018, arXiv:1806.07572"
_ALIGNMENT = "Cristianini et al. 2001, On kernel-target alignment"
_ENTROPY = "Tovey et al. 2023, arXiv:2305.00995"


@measure(
    "ntk/trace",
    needs=["trace"],
    convention="sum over samples and outputs",
    source=_NTK,
)
def trace(trace: Estimate) -> Value:
    """The sum of squares of all entries of the Jacobian."""
    error = None if trace.method == "exact" else trace.standard_error
    return Value(trace.value, error, attributes={"method": trace.method})


@measure(
    "ntk/trace_per_layer",
    needs=["layer_traces"],
    convention="sum over samples and outputs; the layers add up to ntk/trace",
    dims=["layer"],
    source=_NTK,
)
def trace_per_layer(layer_traces: dict[str, Estimate]) -> Value:
    """The trace's share of each parameter."""
    values = torch.stack([t.value for t in layer_traces.values()])
    errors = torch.stack([t.standard_error for t in layer_traces.values()])
    method = next(iter(layer_traces.values())).method
    return Value(
        values,
        None if method == "exact" else errors,
        coordinates={"layer": list(layer_traces)},
        attributes={"method": method},
    )


@measure(
    "ntk/gram",
    needs=["gram"],
    convention="not summed or divided",
    dims=["sample", "output", "sample_2", "output_2"],
    source=_NTK,
)
def gram(gram: Tensor) -> Tensor:
    """The kernel itself."""
    return gram


@measure(
    "ntk/spectrum",
    needs=["eigenvalues"],
    convention="eigenvalues of the (N C, N C) kernel, not divided, largest first",
    dims=["mode"],
    source=_NTK,
)
def spectrum(eigenvalues: Tensor) -> Tensor:
    """The kernel's eigenvalues."""
    return eigenvalues


@measure(
    "ntk/entropy",
    needs=["eigenvalues"],
    convention="nats, of eigenvalues of the (N C, N C) kernel over their sum",
    source=_ENTROPY,
)
def entropy(eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy, -sum p ln p."""
    return shannon(eigenvalues)


@measure(
    "ntk/entropy_normalised",
    needs=["eigenvalues"],
    convention="ntk/entropy over ln(N C), in [0, 1]",
    source=_ENTROPY,
)
def entropy_normalised(eigenvalues: Tensor) -> Tensor:
    """The von Neumann entropy in units of its maximum."""
    return _normalised(eigenvalues)


@measure(
    "ntk/entropy_traced",
    needs=["traced_eigenvalues"],
    convention="nats, of eigenvalues of the (N, N) kernel summed over outputs, over their sum",
    source=_ENTROPY,
)
def entropy_traced(traced_eigenvalues: Tensor) -> Tensor:
    """The entropy of the traced kernel; its change can differ in sign from the full one's."""
    return shannon(traced_eigenvalues)


@measure(
    "ntk/entropy_traced_normalised",
    needs=["traced_eigenvalues"],
    convention="ntk/entropy_traced over ln N, in [0, 1]",
    source=_ENTROPY,
)
def entropy_traced_normalised(traced_eigenvalues: Tensor) -> Tensor:
    """The entropy of the traced kernel in units of its maximum."""
    return _normalised(traced_eigenvalues)


@measure(
    "ntk/effective_rank",
    needs=["eigenvalues"],
    convention="exponential of ntk/entropy, between 1 and N C",
    source="Roy and Vetterli 2007, The effective rank",
)
def effective_rank(eigenvalues: Tensor) -> Tensor:
    """How many modes the kernel has, as the exponential of its entropy."""
    return shannon(eigenvalues).exp()


@measure(
    "ntk/cross",
    needs=["cross_kernels"],
    convention="between the samples of two probes, summed over equal outputs; not divided",
    dims=["sample", "sample_2"],
    source=_NTK,
)
def cross(cross_kernels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The kernel between two probes."""
    return cross_kernels[0]


@measure(
    "ntk/cross_alignment",
    needs=["cross_kernels"],
    convention="squared norm of ntk/cross over the norms of the two probes' own kernels, summed "
    "over equal outputs, in [0, 1]",
    source=_ALIGNMENT,
)
def cross_alignment(cross_kernels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The cosine between the second moments of the gradients on two probes."""
    between, *own = (kernel.double().square().sum() for kernel in cross_kernels)
    norms = (own[0] * own[1]).sqrt()
    if not bool(norms > 0):
        raise ValueError("the alignment is not defined: the kernel of a probe is zero")
    return between / norms


def shannon(weights: Tensor) -> Tensor:
    """-sum p ln p in nats for p = weights over their sum; negative weights, rounding, count as 0.

    Raises:
        ValueError: if the weights are zero or not finite throughout.
    """
    weights = weights.double().clamp_min(0)
    total = weights.sum()
    if not bool(total > 0) or not bool(total.isfinite()):
        raise ValueError(
            f"the entropy of weights that sum to {float(total)} is not defined: the kernel is zero "
            "or not finite"
        )
    p = weights / total
    return -torch.xlogy(p, p).sum()


def _normalised(eigenvalues: Tensor) -> Tensor:
    return shannon(eigenvalues) / math.log(max(len(eigenvalues), 2))
