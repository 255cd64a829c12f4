"""Patterns in two classes, with what makes data easy or hard as knobs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nettrace.estimators import generator


def patterns(
    count: int,
    inputs: int,
    *,
    share: float = 0.5,
    separation: float = 0.0,
    correlation: float = 0.0,
    mislabelled: float = 0.0,
    offset: float = 0.0,
    dimension: float | None = None,
    binary: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Patterns (P, N) and labels (P,), -1 or 1, drawn in these steps.

    1. Labels: the wanted share of them is 1.
    2. Inputs are normal, of mean square 1 on average, along directions drawn at random, or the
       signs of such; those are taken for which r t . x / |t| + (1 - r^2)^1/2 z has the sign of
       the label, with t of random signs and z normal.
    3. The centres of the classes are moved apart, along another random direction, and all inputs by
       an offset, before signs are taken.
    4. Some labels are turned.

    Args:
        count: P.
        inputs: N.
        share: of patterns in class 1, before labels are turned: 0.5 is balanced. It makes no
            difference to networks without a threshold unless there is an offset, since a pattern
            and its opposite in the other class ask the same of them.
        separation: the distance between the centres of the classes, in units of the deviation of
            inputs along any direction, as they are at full dimension.
        correlation: r, of labels with inputs: at 0 labels are random, at 1 those of a perceptron
            whose weights are signs.
        mislabelled: the share of labels that are turned.
        offset: the mean of each input, in units of the same.
        dimension: of the inputs, as the participation ratio of the eigenvalues of their covariance,
            (sum of l)^2 / (sum of l^2), with l falling exponentially, before signs are taken of
            them; None for N.
        binary: whether inputs are signs.
        seed: of all that is drawn.

    Raises:
        ValueError: if an argument is out of its range.
    """
    for name, value in (("share", share), ("correlation", correlation)):
        if not 0 <= value <= 1:
            raise ValueError(f"expected {name}= to be from 0 to 1, got {value}")
    if not 0 <= mislabelled <= 1:
        raise ValueError(f"expected mislabelled= to be from 0 to 1, got {mislabelled}")
    if count < 1 or inputs < 1:
        raise ValueError(f"expected a pattern and an input at least, got {count} and {inputs}")
    if separation < 0 or not math.isfinite(separation):
        raise ValueError(f"expected separation= to be 0 or more, got {separation}")
    if not math.isfinite(offset):
        raise ValueError(f"expected offset= to be finite, got {offset}")
    if dimension is not None and not 1 <= dimension <= inputs:
        raise ValueError(f"expected dimension= to be from 1 to {inputs}, got {dimension}")
    random = generator(seed, "patterns")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    labels = -torch.ones(count, dtype=torch.float64)
    labels[torch.randperm(count, generator=random)[: round(share * count)]] = 1
    x = normal(count, inputs)
    directions = torch.linalg.qr(normal(inputs, inputs)).Q
    if dimension is not None:
        x = x * _spectrum(inputs, dimension).sqrt() @ directions.T
    teacher = torch.randint(2, (inputs,), generator=random).double() * 2 - 1
    field = (_signs(x) if binary else x) @ teacher / inputs**0.5
    field = correlation * field + (1 - correlation**2) ** 0.5 * normal(count)
    # A pattern and its opposite are as likely, and of opposite classes.
    x = x * (labels * _signs(field))[:, None]
    apart = normal(inputs)
    x = x + labels[:, None] * separation / 2 * apart / apart.norm() + offset
    turned = torch.randperm(count, generator=random)[: round(mislabelled * count)]
    labels[turned] *= -1
    return (_signs(x) if binary else x), labels


def _signs(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0).double()


def _spectrum(inputs: int, dimension: float) -> Tensor:
    """Eigenvalues (N,) of mean 1 that fall exponentially, with a participation ratio."""
    places = torch.arange(inputs, dtype=torch.float64)

    def falling(rate: float) -> Tensor:
        return torch.softmax(-rate * places, 0) * inputs

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        found = float(inputs**2 / falling(middle).square().sum())
        low, high = (middle, high) if found > dimension else (low, middle)
    return falling((low + high) / 2)
