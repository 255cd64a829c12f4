"""The loss on the probe, and the accuracy where the targets are classes."""

from __future__ import annotations

from torch import Tensor

from nettrace.likelihood import Categorical, Likelihood
from nettrace.measures.registry import Value, measure
from nettrace.statistics import Inapplicable, Unavailable


@measure(
    "loss/mean",
    needs=["losses"],
    convention="mean over samples; standard error over samples",
)
def mean(losses: Tensor) -> Value:
    """The mean loss."""
    return Value.mean(losses)


@measure(
    "loss/accuracy",
    needs=["outputs", "targets", "suggested_likelihood"],
    convention="fraction of targets that the largest output names; standard error over samples",
)
def accuracy(outputs: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Value:
    """The fraction of classes told right."""
    if likelihood is None:
        raise Unavailable(
            "it is not known which outputs are the classes': pass Probe(..., "
            "likelihood='categorical')"
        )
    if not isinstance(likelihood, Categorical):
        raise Inapplicable(f"accuracy is for classes, but the likelihood is {likelihood.name}")
    count = outputs.shape[likelihood.axis]
    if bool(((targets < 0) | (targets >= count)).any()):
        raise ValueError(
            f"expected classes from 0 to {count - 1}, got {int(targets.min())} to "
            f"{int(targets.max())}: leave targets to be ignored out of the probe"
        )
    right = (outputs.argmax(likelihood.axis) == targets).double()
    return Value.mean(right.flatten(1).mean(1) if right.dim() > 1 else right)
