"""What distributed training and accelerate wrap networks and optimizers in, taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer


def plain_model(model: nn.Module) -> nn.Module:
    """The network within data-parallel wrappers, whose own forward talks to other processes."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def plain_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """The optimizers that move weights, within those of accelerate, which decide when."""
    several = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    found = []
    one: Any
    for one in several:
        while type(one).__module__.startswith("accelerate."):
            one = one.optimizer
        found.append(one)
    return tuple(found)


def is_spread(parameter: Tensor) -> bool:
    """Whether a tensor is spread over processes, as by `torch.distributed.fsdp.fully_shard`."""
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "placements")


def is_main_process() -> bool:
    """Whether this process writes for its group: the first does, or one that has no group."""
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )
