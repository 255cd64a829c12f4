"""The Lightning callbacks of the loss's curvature, and of what it says of stability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nettrace.callbacks.trace import Trace

#: What tells whether a training is stable at its learning rate.
_OF_STABILITY = (
    "hessian/lambda_max",
    "hessian/stability",
    "hessian/stability_sgd",
    "hessian/trace",
    "hessian/gradient_sharpness",
    "loss/mean",
)


class Curvature(Trace):
    """`Trace` of the Hessian of the mean loss: eigenvalues at both ends, trace and stability.

    "ggn", "fisher" and single measures can be asked for instead, or beside. All are of the loss on
    the probe: what is to be held against the training's own stability takes its samples.
    """

    def __init__(
        self, measures: str | Iterable[str] = ("hessian", "hessian/stability"), **options: Any
    ) -> None:
        super().__init__(measures, **options)


class StabilityMonitor(Trace):
    """`Trace` of how near a training is to instability at its learning rate.

    "hessian/stability" is 1 at the edge of stability, the optimizer's momentum and preconditioner
    taken account of; "hessian/stability_sgd" is the bound of the trace for the noise of SGD. Beside
    these there are what they are made of, the sharpness along the gradient, and the loss.
    """

    def __init__(self, measures: str | Iterable[str] = _OF_STABILITY, **options: Any) -> None:
        super().__init__(measures, **options)
