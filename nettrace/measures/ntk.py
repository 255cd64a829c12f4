"""The empirical neural tangent kernel: the Gram matrix of the Jacobian of the outputs.

Jacot, Gabriel and Hongler, Neural tangent kernel (2018), arXiv:1806.07572.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nettrace.estimators import Estimate
from nettrace.jackknife import infinitesimal_error
from nettrace.measures.registry import Value, measure
from nettrace.operator import Jacobian

_NTK = "Jacot et al. 2018, arXiv:1806.07572"
_ERROR = (
    "standard error over samples: its scatter over probes of this size; where the trace is "
    "estimated, that of the estimator alone; the attribute error_of says which"
)
_ALIGNMENT = "Cristianini et al. 2001, On kernel-target alignment"


@measure(
    "ntk/trace",
    needs=["trace", "sample_traces"],
    convention="sum over samples and outputs; " + _ERROR,
    source=_NTK,
)
def trace(whole: Estimate, sample_traces: Mapping[str, Tensor] | None) -> Value:
    """The sum of squares of all entries of the Jacobian."""
    shares = None if sample_traces is None else torch.stack(list(sample_traces.values())).sum(0)
    return _with_error(whole, shares)


@measure(
    "ntk/trace_per_output",
    needs=["trace", "sample_traces", "jacobian"],
    convention="ntk/trace over N C: mean over samples and outputs; " + _ERROR,
    source=_NTK,
)
def trace_per_output(
    whole: Estimate, sample_traces: Mapping[str, Tensor] | None, jacobian: Jacobian
) -> Value:
    """The mean squared norm of the gradient of an output."""
    found, count = trace(whole, sample_traces), jacobian.samples * jacobian.outputs
    error = None if found.standard_error is None else found.standard_error / count
    return Value(found.value / count, error, attributes=found.attributes)


@measure(
    "ntk/trace_per_layer",
    needs=["layer_traces", "sample_traces"],
    convention="sum over samples and outputs; the layers add up to ntk/trace; " + _ERROR,
    dims=["layer"],
    source=_NTK,
)
def trace_per_layer(
    layer_traces: dict[str, Estimate], sample_traces: Mapping[str, Tensor] | None
) -> Value:
    """The trace's share of each parameter."""
    layers = Estimate(
        torch.stack([t.value for t in layer_traces.values()]),
        torch.stack([t.standard_error for t in layer_traces.values()]),
        max(t.probes for t in layer_traces.values()),
        next(iter(layer_traces.values())).method,
    )
    shares = None
    if sample_traces is not None:
        shares = torch.stack([sample_traces[name] for name in layer_traces], 1)
    return replace(_with_error(layers, shares), coordinates={"layer": list(layer_traces)})


@measure(
    "ntk/trace_centred",
    needs=["centred_trace"],
    convention="sum over samples and outputs, of logits less their mean over classes: unlike "
    "ntk/trace, it is independent of what is added to all logits of a sample alike",
    source=_NTK,
)
def trace_centred(centred_trace: Estimate) -> Value:
    """The trace of the kernel of centred logits, tr(Pi Theta Pi) with Pi = 1 - 11^T / C."""
    return _with_error(centred_trace, None)


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


def _with_error(found: Estimate, shares: Tensor | None) -> Value:
    """Sums over samples with their error: over samples by their shares (N, ...), if known."""
    attributes: dict[str, str | int] = {"method": found.method}
    if found.method != "exact":
        attributes |= {"n_probes": found.probes, "error_of": "estimator"}
        return Value(found.value, found.standard_error, attributes=attributes)
    if shares is None:
        return Value(found.value, attributes=attributes)
    attributes["error_of"] = "samples"
    return Value(found.value, infinitesimal_error(shares), attributes=attributes)
