"""What a checkpoint is, what is in one, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that is broken or refused; the message says why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of one step are.

    Args:
        path: a file, or the folder that holds its parts.
        step: how many updates the weights had had.
        coordinates: what else is known of that step: "epoch".
        size: bytes of all its files.
        modified: when the latest of them was written, in seconds since 1970.
    """

    path: Path
    step: int
    coordinates: Mapping[str, float]
    size: int
    modified: float


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Args:
        state: weights and buffers by name, on the CPU; they may be mapped from the file, which
            must then stay as it is for as long as they are used.
        optimizers: states of the optimizers; none of a safetensors file, a Hugging Face folder or
            a distributed checkpoint.
        step: how many updates the weights had had; None if this is not told.
        coordinates: what else is known of that step: "epoch".
        misstated: what stands in the place of a step but is no number of updates, if that does.
        hyperparameters: what Lightning keeps for building the module anew.
        hyperparameters_name: the argument of the module that takes all of them as one, if one does.
        network: the network itself, where a file that may be unpickled holds it whole.
    """

    state: dict[str, Tensor]
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None
    coordinates: Mapping[str, float] = field(default_factory=dict)
    misstated: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters_name: str | None = None
    network: nn.Module | None = None


#: Under which names training scripts save the number of updates, in order of preference.
STEPS = ("global_step", "step", "iteration", "iter", "iter_num", "steps", "num_steps")
_MOST = 2**63


def progress(found: Mapping[str, Any]) -> tuple[int | None, dict[str, float], str | None]:
    """The step and the epoch that stand among other things, if they do; and what is no step."""
    numbers = {name: number for name in STEPS if (number := _number(found.get(name))) is not None}
    step = next((int(number) for number in numbers.values() if is_step(number)), None)
    misstated = next((f"{name}={number}" for name, number in numbers.items()), None)
    epoch = _number(found.get("epoch"))
    coordinates = {"epoch": float(epoch)} if epoch is not None and 0 <= epoch < _MOST else {}
    return step, coordinates, misstated if step is None else None


def is_step(number: float) -> bool:
    """Whether a number may be one of updates, and fits into a trace."""
    return 0 <= number < _MOST and number == int(number)


def _number(value: object) -> float | None:
    """A number, also in a tensor; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def told(error: BaseException) -> str:
    """The first sentence of an error of somebody else's code, or of its first line."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
