"""The Fisher information of the parameters: its trace, by routes that check each other.

Amari, Natural gradient works efficiently in learning (1998). True and empirical Fisher differ:
Kunstner, Balles and Hennig (2019), arXiv:1905.12558.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.measures.registry import Value, measure

_SOURCE = "Amari 1998; Kunstner et al. 2019, arXiv:1905.12558"


@measure(
    "fisher/trace",
    needs=["fisher_sqnorms"],
    convention="mean over samples; expectation over targets exact; logits not centred; standard "
    "error over samples",
    source=_SOURCE,
)
def trace(fisher_sqnorms: Tensor) -> Value:
    """The trace of the true Fisher, summing over all outcomes of the targets."""
    return Value.mean(fisher_sqnorms)


@measure(
    "fisher/trace_ntk",
    needs=["fisher_metric", "blocks"],
    convention="mean over samples of tr(M Theta_nn), M the information about the outputs; "
    "standard error over samples",
    source=_SOURCE,
)
def trace_ntk(fisher_metric: Tensor, blocks: Tensor) -> Value:
    """The trace of the true Fisher through the diagonal blocks of the neural tangent kernel."""
    return Value.mean((fisher_metric.double() * blocks.double()).sum((1, 2)))


@measure(
    "fisher/trace_mc",
    needs=["drawn_sqnorms"],
    convention="mean over samples and drawn targets; standard error over the draws, itself "
    "uncertain where the network is confident of rare outcomes",
    source=_SOURCE,
)
def trace_mc(drawn_sqnorms: Tensor) -> Value:
    """An unbiased estimate of the trace of the true Fisher from targets drawn from the outputs."""
    estimates = drawn_sqnorms.double()
    samples, draws = estimates.shape
    error = (estimates.var(1, correction=1).sum() / draws).sqrt() / samples
    return Value(estimates.mean(), error, attributes={"draws": draws})


@measure(
    "fisher/trace_empirical",
    needs=["loss_gradient_sqnorms"],
    convention="mean over samples of squared loss gradients, at the probe's own targets; "
    "standard error over samples",
    source=_SOURCE,
)
def trace_empirical(loss_gradient_sqnorms: Tensor) -> Value:
    """The trace of the empirical Fisher."""
    return Value.mean(loss_gradient_sqnorms)
