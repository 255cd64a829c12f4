"""Lightning's two namespaces, `lightning.pytorch` and `pytorch_lightning`, as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nettrace.schedule import Schedule, bound

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    # Their classes are unrelated, and each trainer takes its own callbacks only: be both.
    _bases = tuple(
        import_module(name).Callback
        for name in ("pytorch_lightning", "lightning.pytorch")
        if find_spec(name.partition(".")[0]) is not None
    )
    if not _bases:
        raise ImportError(
            "nettrace.callbacks needs PyTorch Lightning: pip install 'nettrace[lightning]'"
        )
    Callback = type("Callback", _bases, {})


def loggers_step(trainer: Any) -> int:
    """The step under which Lightning's own loop logs; global_step counts every optimizer's."""
    steps = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if steps is None else steps)


def bound_to(trainer: Any, schedule: Schedule) -> Schedule:
    """A schedule, told how long a trainer's training and its epochs are."""
    total = math.inf
    with suppress(Exception):  # where accumulation changes, the trainer does not know it
        total = trainer.estimated_stepping_batches
    each = trainer.num_training_batches / trainer.accumulate_grad_batches
    each = math.inf if math.isinf(each) else math.ceil(each)
    return bound(schedule, math.inf if total < 0 else total, each)


@contextmanager
def silenced(module: Any) -> Iterator[None]:
    """Keeps a forward that logs from logging what it makes of the probe."""
    talkers = [m for m in module.modules() if hasattr(m, "log_dict") and "log" not in vars(m)]
    for m in talkers:
        vars(m)["log"] = vars(m)["log_dict"] = lambda *_, **__: None
    try:
        yield
    finally:
        for m in talkers:
            del vars(m)["log"], vars(m)["log_dict"]


__all__ = ["Callback", "bound_to", "loggers_step", "silenced"]
