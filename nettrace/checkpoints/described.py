"""What LightningCLI writes of a network: its class by class_path, and its arguments."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from nettrace.checkpoints.contents import CheckpointError, told
from nettrace.locate import FAILURES

GIVE_MODEL = "give the network by --model (model=...)"


def configurations(path: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The config.yaml of a checkpoint's folder and of three above, each with what `model` says."""
    own = [path] if path.is_dir() else []
    for folder in [*own, *path.absolute().parents[:4]]:
        if (folder / "config.yaml").is_file():
            whole = _yaml(folder / "config.yaml")
            model = whole.get("model")
            # Without a class, only what LightningCLI wrote: others have a model there, too.
            if isinstance(model, dict) and ("class_path" in model or "trainer" in whole):
                yield folder / "config.yaml", model


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # another tool's
    return found if isinstance(found, dict) else {}


def network(described: Mapping[str, Any], where: Path) -> nn.Module:
    """The network that a configuration describes by class_path and init_args.

    Raises:
        CheckpointError: if it describes none, or one that cannot be made here.
    """
    found = made(described, where)
    if not isinstance(found, nn.Module):
        raise CheckpointError(
            f"{where} names {described['class_path']}, which is no torch.nn.Module: {GIVE_MODEL}"
        )
    return found


def made(value: Any, where: Path) -> Any:
    """A value of a configuration, with what it describes by class_path made.

    Raises:
        CheckpointError: if it names a class that is not called, or cannot be made here.
    """
    try:
        return _made(value, where)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where} describes no network ({told(error)}): {GIVE_MODEL}"
        ) from error


def _made(value: Any, where: Path) -> Any:
    if isinstance(value, (list, tuple)):
        return [_made(one, where) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: _made(one, where) for key, one in value.items()}
    kind = _class(value["class_path"], where)
    described = value.get("init_args") or {}
    arguments = {key: _made(one, where) for key, one in dict(described).items()}
    if not issubclass(kind, nn.Module):
        return functools.partial(kind, **arguments)
    try:
        return kind(**arguments)
    except FAILURES as error:
        raise CheckpointError(
            f"{where} describes {value['class_path']}, which cannot be made so ({told(error)}): "
            f"{GIVE_MODEL}"
        ) from error


def _class(class_path: object, where: Path) -> type:
    """The class of that path, if it is one that may be called."""
    module, _, name = str(class_path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except FAILURES as error:
        raise CheckpointError(
            f"{where} names {class_path}, which cannot be imported here ({told(error)}): run where "
            f"it can be, or {GIVE_MODEL}"
        ) from error
    kinds = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise CheckpointError(
            f"{where} names {class_path}, which is no torch.nn.Module: it is not called; "
            f"{GIVE_MODEL}"
        )
    return found
