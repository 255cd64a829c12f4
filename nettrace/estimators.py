"""Estimated quantities, and the random numbers that they are drawn with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

TraceMethod: TypeAlias = Literal["hutchinson", "hutch++", "xtrace"]


@dataclass(frozen=True)
class Estimate:
    """An estimated quantity.

    Args:
        value: the estimate.
        standard_error: the standard deviation of `value` about the truth, itself estimated, or
            where a method has one a bound; 0 where the value is exact.
        probes: how many random vectors it took.
        method: how it was found, in a word.
    """

    value: Tensor
    standard_error: Tensor
    probes: int
    method: str

    def __str__(self) -> str:
        found = _short(self.value)
        error = f" +- {_short(self.standard_error)}" if self.method != "exact" else ""
        return f"{found}{error} ({self.method}, {self.probes} probes)"


def _short(value: Tensor) -> str:
    return f"{float(value):.5g}" if value.dim() == 0 else f"tensor{tuple(value.shape)}"


def exact_estimate(value: Tensor) -> Estimate:
    """An exact value as an estimate."""
    return Estimate(value, torch.zeros_like(value), 0, "exact")


def signs(shape: tuple[int, ...], seed: int, key: int | str) -> Tensor:
    """Independent signs, drawn on the CPU; those of another key are independent of them."""
    return torch.randint(2, shape, generator=generator(seed, key), dtype=torch.int8) * 2 - 1


def generator(seed: int, key: int | str) -> torch.Generator:
    """A generator of random numbers on the CPU for one purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))


def upper_error(values: Tensor) -> float:
    """The standard error of the sum of the means of values (K, N), and its deviation on top.

    To stop where the estimated error happens to be low would make it too low on average.
    """
    variances = values.var(0)
    uncertain = (variances.square().sum() / (2 * (len(values) - 1))).sqrt() / variances.sum()
    error = (variances.sum() / len(values)).sqrt() * (1 + uncertain)
    return float(error.nan_to_num())
