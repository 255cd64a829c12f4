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
        hyperparameters: what Lightning keeps for building the module anew.
        hyperparameters_name: the argument of the module that takes all of them as one, if one does.
        network: the network itself, where a file that may be unpickled holds it whole.
    """

    state: dict[str, Tensor]
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None
    coordinates: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters_name: str | None = None
    network: nn.Module | None = None


#: Under which names training scripts save the number of updates, in order of preference.
STEPS = ("global_step", "step", "iteration", "iter", "iter_num", "steps", "num_steps")


def progress(found: Mapping[str, Any]) -> tuple[int | None, dict[str, float]]:
    """The step and the epoch that stand among other things, if they do."""
    steps = (_number(found.get(name)) for name in STEPS)
    step = next((int(s) for s in steps if s is not None and s >= 0 and s == int(s)), None)
    epoch = _number(found.get("epoch"))
    return step, {} if epoch is None else {"epoch": epoch}


def _number(value: object) -> float | None:
    """A finite number, also in a tensor; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < float(2**63) else None  # neither infinite nor NaN


def told(error: BaseException) -> str:
    """The first sentence of an error of somebody else's code, or of its first line."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
