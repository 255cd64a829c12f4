"""Which likelihood is meant: by its name, or else by the type and shape of the targets."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from nettrace.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson, alike

LikelihoodName: TypeAlias = Literal["categorical", "bernoulli", "poisson", "gaussian"]

#: By name, those of one number an output.
_ELEMENTWISE: dict[str, type[Bernoulli | Poisson | Gaussian]] = {
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian": Gaussian,
}


def check_likelihood(likelihood: object) -> None:
    """Checks that this is a likelihood's name, a likelihood or None.

    Raises:
        ValueError: if it is something else.
    """
    names = get_args(LikelihoodName)
    if likelihood is None or likelihood in names:
        return
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise ValueError(
            f"expected likelihood {', '.join(map(repr, names))}, an object such as "
            f"nettrace.Gaussian(covariance=4.0), or None, got {likelihood!r}"
        )


def infer(
    outputs: Tensor, targets: object, likelihood: str | Likelihood | None, class_axis: int | None
) -> Likelihood | None:
    """The likelihood that is given or named, or else that which the targets suggest.

    Integer targets mean classes, floating targets of the outputs' shape, but for axes of length
    one, a Gaussian.

    Raises:
        ValueError: if the named one does not fit the shapes, or there are two to choose from.
    """
    if likelihood is not None and not isinstance(likelihood, str):
        return likelihood
    shape = tuple(targets.shape) if isinstance(targets, Tensor) else None
    if likelihood in _ELEMENTWISE:
        if isinstance(targets, Tensor) and not alike(targets, outputs):
            raise ValueError(
                f"expected targets of the outputs' shape {tuple(outputs.shape)} for the "
                f"{likelihood} likelihood, got shape {shape}"
            )
        return _ELEMENTWISE[likelihood]()
    if isinstance(targets, Tensor) and targets.is_floating_point():
        if likelihood == "categorical":
            raise ValueError(
                f"expected integer targets for the categorical likelihood, got {targets.dtype}: "
                "for soft labels, pass Probe(..., losses=...)"
            )
        if not alike(targets, outputs):
            return None
        if _looks_like_probabilities(targets):
            raise ValueError(
                "the targets are floating, but all 0 or 1, or shares that sum to one: they could "
                "be labels; pass Probe(..., likelihood='bernoulli') if the outputs are logits of "
                "independent labels, or likelihood='gaussian' if squared errors are meant, else "
                "losses=..."
            )
        return Gaussian()
    whole = isinstance(targets, Tensor) and not (
        targets.dtype == torch.bool or targets.is_complex()
    )
    if likelihood is None and not whole:
        return None
    axis = _class_axis(outputs, shape, class_axis)
    if likelihood == "categorical":
        if axis is None:
            raise ValueError(
                f"expected logits (N, classes, ...) or (N, ..., classes) for the categorical "
                f"likelihood, got outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{shape}"
            )
        return Categorical(axis)
    return None if axis is None else Categorical(axis)


def _looks_like_probabilities(targets: Tensor) -> bool:
    binary = bool(((targets == 0) | (targets == 1)).all())
    shares = targets.dim() > 1 and targets.shape[1] > 1 and bool((targets >= 0).all())
    return binary or (shares and bool((targets.sum(1) - 1).abs().max() < 1e-4))


def _class_axis(outputs: Tensor, targets: tuple[int, ...] | None, chosen: int | None) -> int | None:
    axes = sorted({1, outputs.dim() - 1}) if chosen is None else [chosen % outputs.dim()]
    fitting = []
    for axis in axes:
        rest = tuple(n for d, n in enumerate(outputs.shape) if d != axis)
        if 0 < axis < outputs.dim() and outputs.shape[axis] > 1 and rest == (targets or rest):
            fitting.append(axis)
    if len(fitting) > 1:
        raise ValueError(
            f"the classes could run along axis {fitting[0]} or {fitting[1]} of outputs of shape "
            f"{tuple(outputs.shape)}: pass Probe(..., class_axis={fitting[1]}) or another"
        )
    return fitting[0] if fitting else None
