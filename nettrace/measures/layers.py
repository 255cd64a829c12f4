"""The weights of each layer as they are: norms, and the spectra of weight matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.measures.registry import Value, measure
from nettrace.measures.spectrum import shannon
from nettrace.operator import PerLayer
from nettrace.statistics import Inapplicable

_MATRICES = "of weights with two axes or more, as matrices of the first by all others"
#: Singular values of a matrix that are given, at most.
MOST = 64


@measure(
    "weights/norms",
    needs=["weights"],
    convention="|theta_l| of each parameter that needs a gradient",
    dims=["layer"],
    source="Yang et al. 2022, arXiv:2203.03466",
)
def norms(weights: PerLayer) -> Value:
    """The norm of each parameter."""
    found = [torch.linalg.vector_norm(_wide(w)).cpu() for w in weights.values()]
    return Value(torch.stack(found), coordinates={"layer": list(weights)})


@measure(
    "weights/effective_rank",
    needs=["weights"],
    convention=f"exponential of the entropy of singular values over their sum, {_MATRICES}",
    dims=["layer"],
    source="Roy and Vetterli 2007, The effective rank",
    grouped=False,
)
def effective_rank(weights: PerLayer) -> Value:
    """How many directions each weight matrix maps to."""
    found = _singular_values(weights)
    ranks = [shannon(values).exp() if bool(values.any()) else 0.0 for values in found.values()]
    return Value(torch.tensor(ranks).double(), coordinates={"layer": list(found)})


@measure(
    "weights/singular_values",
    needs=["weights"],
    convention=f"the largest, up to {MOST}, largest first, {_MATRICES}; NaN beyond a matrix's own",
    dims=["layer", "singular_value"],
    source="Saxe, McClelland and Ganguli 2014, arXiv:1312.6120",
    grouped=False,
)
def singular_values(weights: PerLayer) -> Value:
    """The singular values of weight matrices, which are learnt one after the other."""
    found = _singular_values(weights)
    longest = min(MOST, max(len(values) for values in found.values()))
    rows = torch.full((len(found), longest), torch.nan, dtype=torch.float64)
    for row, values in zip(rows, found.values(), strict=True):
        row[: len(values)] = values[:longest]
    return Value(rows, coordinates={"layer": list(found)})


def _singular_values(weights: PerLayer) -> dict[str, Tensor]:
    matrices = {name: _wide(w).flatten(1) for name, w in weights.items() if w.dim() > 1}
    if not matrices:
        raise Inapplicable("no parameter is a matrix")
    for name, matrix in matrices.items():
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"the weights of {name!r} are not finite: the training diverges")
    return {n: torch.linalg.svdvals(matrix).cpu() for n, matrix in matrices.items()}


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float64))
