"""The network of a checkpoint that says what it is."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from nettrace.checkpoints import reading
from nettrace.checkpoints.contents import Checkpoint, CheckpointError, told
from nettrace.locate import FAILURES

_GIVE_MODEL = "give the network by --model (model=...)"


def build(checkpoint: Checkpoint | str | Path, allow_pickle: bool = False) -> nn.Module:
    """Builds the network that a checkpoint is of, with weights as at its initialisation.

    It is said by, in this order: `_class_path` among the hyper-parameters, as LightningCLI saves
    it with `subclass_mode_model=True`; a config.yaml that LightningCLI wrote, with a class_path
    under `model`, in the checkpoint's folder or up to three folders above; config.json of a
    Hugging Face folder, for the classes that are part of transformers.

    A class that a file names is imported from what is installed. It is called only if it is a
    `torch.nn.Module`, and so are classes among its arguments; optimizers and schedulers there are
    handed on without being made.

    Args:
        checkpoint: one that `find` found, a file or a folder.
        allow_pickle: as in `load`.

    Raises:
        CheckpointError: if nothing says what the network is, or it cannot be made.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    hyperparameters = dict(reading.read(path, allow_pickle, glance=True).hyperparameters)
    if class_path := hyperparameters.pop("_class_path", None):
        arguments = {k: v for k, v in hyperparameters.items() if k != "_instantiator"}
        return _module({"class_path": class_path, "init_args": arguments}, path)
    for config in _configurations(path):
        if isinstance(model := _yaml(config).get("model"), dict) and "class_path" in model:
            return _module(model, config)
    if (path / "config.json").is_file():
        return _transformer(path)
    raise CheckpointError(f"{path} does not say which network it is of: {_GIVE_MODEL}")


def _configurations(path: Path) -> Iterator[Path]:
    own = [path] if path.is_dir() else []
    for folder in [*own, *path.absolute().parents[:4]]:
        if (folder / "config.yaml").is_file():
            yield folder / "config.yaml"


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # another tool's
    return found if isinstance(found, dict) else {}


def _module(described: Mapping[str, Any], where: Path) -> nn.Module:
    try:
        made = _made(described, where)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where} describes no network ({told(error)}): {_GIVE_MODEL}"
        ) from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(
            f"{where} names {described['class_path']}, which is no torch.nn.Module: {_GIVE_MODEL}"
        )
    return made


def _made(value: Any, where: Path) -> Any:
    """A value of a configuration, with what it describes by class_path made."""
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
            f"{_GIVE_MODEL}"
        ) from error


def _class(class_path: object, where: Path) -> type:
    """The class of that path, if it is one that may be called."""
    module, _, name = str(class_path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except FAILURES as error:
        raise CheckpointError(
            f"{where} names {class_path}, which cannot be imported here ({told(error)}): run where "
            f"it can be, or {_GIVE_MODEL}"
        ) from error
    kinds = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    if not (isinstance(found, type) and issubclass(found, kinds)):
        raise CheckpointError(
            f"{where} names {class_path}, which is no torch.nn.Module: it is not called; "
            f"{_GIVE_MODEL}"
        )
    return found


def _transformer(folder: Path) -> nn.Module:
    """A network of transformers; types of weights are as its configuration says."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{folder} needs the package transformers: pip install 'nettrace[huggingface]'"
        ) from error
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (architecture, *_) = named["architectures"]
        kind = getattr(transformers, architecture)
        if not issubclass(kind, transformers.PreTrainedModel):
            raise TypeError(f"{architecture} is no model")
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        dtype = getattr(torch, str(named.get("dtype") or named.get("torch_dtype")), torch.float32)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model: nn.Module = kind(config)
        finally:
            torch.set_default_dtype(default)
        return model
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'config.json'} describes no network of transformers that can be made here "
            f"({told(error)}): {_GIVE_MODEL}"
        ) from error
