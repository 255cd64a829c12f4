"""Other weights of a network: of another network, a checkpoint or a state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from nettrace.checkpoints import Checkpoint, CheckpointError, load
from nettrace.checkpoints.restoring import named

#: Where weights come from: a network, its state, or a checkpoint that `nettrace.checkpoints` reads.
Source: TypeAlias = nn.Module | Mapping[str, Tensor] | Checkpoint | str | Path


def state_of(model: nn.Module, source: Source) -> dict[str, Tensor]:
    """Parameters and buffers of a network as a source has them, by the network's own names.

    What is not in states, such as buffers that are not saved, is the network's own.

    Args:
        model: the network, which is left as it is.
        source: of the same architecture; names may differ by prefixes.

    Raises:
        CheckpointError: if it cannot be read, or has other names or shapes.
        TypeError: if it is something else.
    """
    if isinstance(source, nn.Module):
        state: Mapping[str, Tensor] = source.state_dict()
    elif isinstance(source, (Checkpoint, str, Path)):
        state = load(source).state
    elif isinstance(source, Mapping):
        state = source
    else:
        raise TypeError(
            "expected weights from a network, a state dict or the path of a checkpoint, got "
            f"{type(source).__name__}"
        )
    found = named(model, state)
    if lost := [name for name, _ in model.named_parameters() if name not in found]:
        raise CheckpointError(
            f"the state of {type(model).__name__} has other names than its parameters, such as "
            f"{lost[0]!r}: pass a mapping by the names of named_parameters()"
        )
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: found.get(name, tensor).detach().to(tensor.device) for name, tensor in own.items()
    }
