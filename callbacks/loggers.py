"""Records to whatever loggers a trainer has, and to its callback metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nettrace import Record
from nettrace.callbacks.lightning import loggers_step

#: The axis of our curves in W&B: the number of updates that the weights have had.
STEP = "nettrace/step"


def log(trainer: Any, records: Sequence[Record], prefix: str) -> None:
    """Sends records to the trainer's loggers, and numbers to `trainer.callback_metrics`.

    Args:
        trainer: a Lightning trainer.
        records: of one step; missing ones are left out.
        prefix: put before every name.
    """
    found = [record for record in records if record.missing is None]
    if not found:
        return
    scalars: dict[str, float] = {}
    for record in found:
        if record.is_scalar:
            scalars[prefix + record.name] = float(record.value)
            if record.standard_error is not None:
                scalars[f"{prefix}{record.name}_standard_error"] = float(record.standard_error)
    # A metric that is monitored must be a tensor.
    trainer.callback_metrics.update(
        {k: torch.tensor(v, dtype=torch.float32) for k, v in scalars.items()}
    )
    for logger in trainer.loggers:
        run = logger.experiment
        if hasattr(run, "define_metric"):
            _log_to_wandb(run, found, scalars, prefix)
        else:
            logger.log_metrics({**scalars, STEP: found[0].step}, step=loggers_step(trainer))


def _log_to_wandb(
    run: Any, records: Sequence[Record], scalars: dict[str, float], prefix: str
) -> None:
    """One row, placed by our own step: W&B drops rows whose `step=` runs behind."""
    import wandb

    row: dict[str, Any] = dict(scalars)
    for record in records:
        name = prefix + record.name
        values = np.asarray(record.value, dtype=float)
        if values.ndim == 1 and record.coordinates:
            (labels,) = record.coordinates.values()
            row |= {f"{name}/{k}": float(v) for k, v in zip(labels, values, strict=True)}
        elif values.ndim == 1 and np.isfinite(values).all():
            row[name] = wandb.Histogram(values.tolist(), num_bins=min(64, max(8, values.size)))
        elif values.ndim > 1 and np.isfinite(values).all():
            row[name] = wandb.Image(_picture(values), caption=record.name)
    run.define_metric(STEP, hidden=True)
    for name in row:
        run.define_metric(name, step_metric=STEP)
    run.log({**row, STEP: records[0].step})


def _picture(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """A kernel as grey levels, (rows, columns) of bytes; the darkest is the largest magnitude."""
    side = math.prod(values.shape[: values.ndim // 2])
    magnitude = np.abs(values.reshape(side, -1))
    top = magnitude.max()
    levels = 255 * (1 - magnitude / top) if top > 0 else np.full_like(magnitude, 255)
    picture: npt.NDArray[np.uint8] = levels.astype(np.uint8)
    return picture
