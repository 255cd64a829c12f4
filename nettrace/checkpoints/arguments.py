"""What a class or function that makes a network takes of what a checkpoint was trained with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nettrace.checkpoints import pickled, reading
from nettrace.checkpoints.contents import CheckpointError
from nettrace.checkpoints.described import configurations, made

#: What LightningCLI adds to hyper-parameters.
_CLI_KEYS = {"_class_path", "_instantiator"}


def parameters(function: object) -> Mapping[str, inspect.Parameter]:
    """The arguments that something may be called with by name; none of what is not called.

    Not those that a `functools.partial` has set.
    """
    if not callable(function) or isinstance(function, nn.Module):
        return {}
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):  # as of what is written in C
        return {}
    kinds: list[object] = [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY]
    if hasattr(function, "load_from_checkpoint"):  # a LightningModule's class
        kinds.append(inspect.Parameter.VAR_KEYWORD)
    given = function.keywords if isinstance(function, functools.partial) else {}
    return {name: one for name, one in found.items() if one.kind in kinds and name not in given}


def taken_by(function: object, path: Path, allow_pickle: bool) -> dict[str, Any]:
    """The arguments to call it with.

    Args:
        function: what makes the network.
        path: the checkpoint.
        allow_pickle: as in `load`.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or an argument that matters.
    """
    contents = reading.read(path, allow_pickle, glance=True)
    named = parameters(function)
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values())

    def taken(found: object) -> dict[str, Any]:
        items = found.items() if isinstance(found, Mapping) else ()
        return {name: value for name, value in items if takes_any or name in named}

    own = {k: v for k, v in contents.hyperparameters.items() if k not in _CLI_KEYS}
    if (whole := contents.hyperparameters_name) is not None and whole in named:
        own = {whole: own}
    own = taken(own)
    if contents.hyperparameters.keys() & _CLI_KEYS:
        own = made(own, path)  # what has a class_path, which others than LightningCLI hand on
    config, described = next(configurations(path), (path, {}))
    rest = taken(described.get("init_args") if "class_path" in described else described)
    rest = made({name: value for name, value in rest.items() if name not in own}, config)
    return {**rest, **{k: v for k, v in own.items() if _is_read(k, v, named.get(k), path)}}


def _is_read(name: str, value: object, parameter: inspect.Parameter | None, path: Path) -> bool:
    """Whether a value is what was saved, and no stand-in, without which the default is used.

    Raises:
        CheckpointError: if there is no default, or the network would be another with it.
    """
    kinds = list(pickled.stand_ins(value))
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    if kinds and (required or any(pickled.is_module(kind) for kind in kinds)):
        raise CheckpointError(
            f"{path} has a hyper-parameter {name!r} that is not read, since that could run code "
            f"from the file: it holds a {kinds[0].__name__}. Load it with --allow-pickle "
            "(allow_pickle=True) if you trust its author, or give as --model a function that "
            f"makes the network and has no argument {name!r}"
        )
    return not kinds
