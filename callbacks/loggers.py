"""Records to whatever loggers a trainer has, and to its callback metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nettrace.record import ERROR, Record

#: The axis of our curves in W&B: the number of updates that the weights have had.
STEP = "nettrace/step"


def monitor(trainer: Any, records: Sequence[Record], prefix: str) -> None:
    """Puts numbers among the trainer's `callback_metrics`, for callbacks that monitor one.

    Those of several probes are named "group/quantity/probe".

    Args:
        trainer: a Lightning trainer.
        records: of one step, none missing.
        prefix: put before every name.
    """
    for name, value in numbers_of(records, prefix).items():
        trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float32)


def send(logger: Any, records: Sequence[Record], prefix: str, step: int) -> None:
    """Sends records to a Lightning logger: numbers to any, spectra and kernels to W&B's.

    Those of several probes are named "group/quantity/probe". Complex numbers are two, `name.re` and
    `name.im`; of complex arrays, magnitudes are shown.

    Args:
        logger: the logger.
        records: of one step, none missing.
        prefix: put before every name.
        step: the step under which Lightning itself logs at this moment.
    """
    numbers = numbers_of(records, prefix) | {STEP: records[0].step}
    if any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__):
        _send_to_wandb(logger.experiment, records, numbers, prefix, step)
    else:
        logger.log_metrics(numbers, step=step)


def numbers_of(records: Sequence[Record], prefix: str) -> dict[str, float]:
    """What is a number among records, none missing, by the names that loggers get."""
    numbers: dict[str, float] = {}
    for record in _apart(records):
        if record.is_scalar:
            name, value = prefix + record.name, record.value.item()
            if np.iscomplexobj(value):
                numbers |= {f"{name}.re": value.real, f"{name}.im": value.imag}
            else:
                numbers[name] = float(value)
            if record.standard_error is not None:
                numbers[name + ERROR] = float(record.standard_error)
    return numbers


def _apart(records: Sequence[Record]) -> list[Record]:
    return [part for record in records for part in record.apart()]


def _send_to_wandb(
    run: Any, records: Sequence[Record], numbers: dict[str, float], prefix: str, step: int
) -> None:
    """One row, placed by our own step: W&B drops rows whose `step=` runs behind."""
    import wandb

    row: dict[str, Any] = {}
    for record in _apart(records):
        name = prefix + record.name
        shown = np.abs(record.value) if np.iscomplexobj(record.value) else record.value
        values: npt.NDArray[np.float64] = np.asarray(shown, dtype=np.float64)
        if values.ndim == 1 and record.coordinates:
            (labels,) = record.coordinates.values()
            row |= {f"{name}/{k}": float(v) for k, v in zip(labels, values, strict=True)}
        elif values.ndim == 1 and np.isfinite(values).all():
            row[name] = wandb.Histogram(values.tolist(), num_bins=min(64, max(8, values.size)))
        elif values.ndim > 1 and np.isfinite(values).all() and find_spec("PIL") is not None:
            row[name] = wandb.Image(_picture(values), caption=record.name)
    run.define_metric(STEP, hidden=True)
    for name in [*row, *numbers]:
        if name != STEP:
            run.define_metric(name, step_metric=STEP)
    # Without Lightning's own step in the row, W&B would fill in the last one that it saw.
    run.log({**numbers, **row, "trainer/global_step": step})


def _picture(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """A kernel as grey levels, (rows, columns) of bytes; the darkest is the largest magnitude."""
    side = math.prod(values.shape[: values.ndim // 2])
    magnitude = np.abs(values.reshape(side, -1))
    top = magnitude.max()
    levels = 255 * (1 - magnitude / top) if top > 0 else np.full_like(magnitude, 255)
    picture: npt.NDArray[np.uint8] = levels.astype(np.uint8)
    return picture
