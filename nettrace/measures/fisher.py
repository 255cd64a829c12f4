"""The Fisher information of the parameters: trace, diagonal and spectra, by independent routes.

F is the mean over samples of J^T M J, with M the information of the output distribution about the
outputs (`nettrace.likelihood`). For classes by softmax, M does not see what is added to all logits
of a sample alike: F is the same for centred logits, f -> f + c(x) 1, while the kernel is not (see
`ntk/trace_centred`).

Amari, Natural gradient works efficiently in learning (1998). True and empirical Fisher differ:
Kunstner, Balles and Hennig (2019), arXiv:1905.12558. Its spectrum is that of M^(1/2) Theta M^(1/2)
over N but for zeros: Karakida, Akaho and Amari (2019), arXiv:1806.01316, section 2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nettrace.measures.registry import Value, measure
from nettrace.statistics import Statistics

_SOURCE = "Amari 1998; Kunstner et al. 2019, arXiv:1905.12558"
_SPECTRUM = "Amari 1998; Karakida et al. 2019, arXiv:1806.01316"
_GAUGE = "the same for centred logits"


@measure(
    "fisher/trace",
    needs=["fisher_sqnorms"],
    convention=f"mean over samples, sum over outputs; expectation over targets exact; {_GAUGE}; "
    "standard error over samples",
    source=_SOURCE,
)
def trace(fisher_sqnorms: Tensor) -> Value:
    """The trace of the true Fisher, summing over all outcomes of the targets."""
    return Value.mean(fisher_sqnorms)


@measure(
    "fisher/trace_per_layer",
    needs=["fisher_layer_sqnorms"],
    convention=f"mean over samples, sum over outputs; expectation over targets exact; {_GAUGE}; "
    "standard error over samples; the layers add up to fisher/trace",
    dims=["layer"],
    source=_SOURCE,
)
def trace_per_layer(fisher_layer_sqnorms: dict[str, Tensor]) -> Value:
    """Each parameter's share of the trace of the true Fisher."""
    shares = torch.stack(list(fisher_layer_sqnorms.values()), 1)
    return replace(Value.mean(shares), coordinates={"layer": list(fisher_layer_sqnorms)})


@measure(
    "fisher/trace_ntk",
    needs=["fisher_metric", "blocks"],
    convention="mean over samples of tr(M Theta_nn), M the information about the outputs; "
    f"{_GAUGE}; standard error over samples",
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
    return Value(estimates.mean(), error, attributes={"n_probes": draws})


@measure(
    "fisher/trace_empirical",
    needs=["loss_gradient_sqnorms"],
    convention="mean over samples of squared loss gradients, at the probe's own targets; standard "
    "error over samples",
    source=_SOURCE,
)
def trace_empirical(loss_gradient_sqnorms: Tensor) -> Value:
    """The trace of the empirical Fisher."""
    return Value.mean(loss_gradient_sqnorms)


@measure(
    "fisher/diagonal",
    needs=["fisher_column_sqnorms", "samples"],
    convention="mean over samples, sum over outputs; expectation over targets exact; entries in "
    "the order of the parameters, each flattened; they sum to fisher/trace",
    dims=["parameter"],
    source=_SOURCE,
    grouped=False,
)
def diagonal(fisher_column_sqnorms: Tensor, samples: int) -> Tensor:
    """The diagonal of the true Fisher, a number for each weight."""
    return fisher_column_sqnorms / samples


@measure(
    "fisher/diagonal_empirical",
    needs=["loss_gradient_column_sqnorms", "samples"],
    convention="mean over samples of squared loss gradients, at the probe's own targets; entries "
    "in the order of the parameters, each flattened; they sum to fisher/trace_empirical",
    dims=["parameter"],
    source=_SOURCE,
    grouped=False,
)
def diagonal_empirical(loss_gradient_column_sqnorms: Tensor, samples: int) -> Tensor:
    """The diagonal of the empirical Fisher, a number for each weight."""
    return loss_gradient_column_sqnorms / samples


@measure(
    "fisher/spectrum",
    needs=["fisher_eigenvalues", "samples"],
    convention="eigenvalues of the mean over samples, largest first; N C of them, among which all "
    f"that are not zero; expectation over targets exact; {_GAUGE}",
    dims=["mode"],
    source=_SPECTRUM,
    grouped=False,
)
def spectrum(fisher_eigenvalues: Tensor, samples: int) -> Tensor:
    """The eigenvalues of the true Fisher, through the kernel."""
    return fisher_eigenvalues / samples


@measure(
    "fisher/block_spectrum",
    needs=["fisher_layer_eigenvalues", "samples"],
    convention=f"the {Statistics.modes} largest eigenvalues of each parameter's diagonal block of "
    f"the mean over samples, largest first; expectation over targets exact; {_GAUGE}",
    dims=["layer", "leading_mode"],
    source=_SPECTRUM,
    grouped=False,
)
def block_spectrum(fisher_layer_eigenvalues: dict[str, Tensor], samples: int) -> Value:
    """The largest eigenvalues of each parameter's block of the true Fisher."""
    values = torch.stack(list(fisher_layer_eigenvalues.values())) / samples
    return Value(
        values,
        coordinates={"layer": list(fisher_layer_eigenvalues)},
        attributes={"modes": values.shape[1]},
    )
