"""The neural tangent kernel as the optimizer sees it: J P^-1 J^T, where it divides gradients by P.

The outputs then move by -eta J P^-1 J^T dL/df a step. To be asked for by name, since they need an
optimizer: `tracer(model, step, optimizer)`; callbacks pass the trainer's.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.estimators import Estimate
from nettrace.measures import ntk
from nettrace.measures.registry import Value, measure

_ADAM = "Kingma and Ba 2015, arXiv:1412.6980, algorithm 1"
_P = (
    "of J P^-1 J^T with P = sqrt(v) + eps for Adam and AdamW, second moments corrected for bias, "
    "P = 1 for SGD; without learning rates; weights that are not moved do not count"
)


@measure(
    "ntk/preconditioned_trace",
    needs=["preconditioned_trace"],
    convention="sum over samples and outputs, " + _P,
    source=_ADAM,
    grouped=False,
)
def trace(preconditioned_trace: Estimate) -> Value:
    """The trace of the kernel that the optimizer sees."""
    return ntk.trace(preconditioned_trace, None)


@measure(
    "ntk/preconditioned_spectrum",
    needs=["preconditioned_eigenvalues"],
    convention="eigenvalues, not divided, largest first, " + _P,
    dims=["mode"],
    source=_ADAM,
    grouped=False,
)
def spectrum(preconditioned_eigenvalues: Tensor) -> Tensor:
    """The eigenvalues of the kernel that the optimizer sees."""
    return preconditioned_eigenvalues
