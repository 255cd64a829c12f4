"""The network of a checkpoint: what the checkpoint says it is, or what the caller gives for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from nettrace import locate
from nettrace.checkpoints import reading
from nettrace.checkpoints.arguments import parameters, taken_by
from nettrace.checkpoints.contents import Checkpoint, CheckpointError, told
from nettrace.checkpoints.described import GIVE_MODEL, configurations, network

#: A network, a class or function that makes one, or the name of either, as for `nettrace.locate`;
#: None to ask the checkpoint.
Model: TypeAlias = nn.Module | Callable[..., nn.Module] | str | None


def build(
    checkpoint: Checkpoint | str | Path, allow_pickle: bool = False, model: Model = None
) -> nn.Module:
    """Builds the network that a checkpoint is of, with weights as at its initialisation.

    Unless it is given, it is, in this order: what the file itself holds, if that is a whole network
    and may be unpickled; what `_class_path` among the hyper-parameters says, as LightningCLI saves
    it with `subclass_mode_model=True`; a config.yaml that LightningCLI wrote, with a class_path
    under `model`, in the checkpoint's folder or up to three folders above; config.json of a
    Hugging Face folder, for the classes that are part of transformers.

    A class that a file names is imported from what is installed. It is called only if it is a
    `torch.nn.Module`, and so are classes among its arguments; optimizers and schedulers there are
    handed on without being made.

    Args:
        checkpoint: one that `find` found, a file or a folder.
        allow_pickle: as in `load`.
        model: the network, used as it is; or what makes it. That is called with those of the
            checkpoint's hyper-parameters that it has arguments for, as `load_from_checkpoint` of
            Lightning does, and with what they lack from the config.yaml of a LightningCLI. A
            LightningModule that takes any (`**arguments`) gets all of them.

    Raises:
        CheckpointError: if nothing says what the network is, or it cannot be made.
        LocateError: if what is given is no network, and makes none.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    if model is not None:
        return _given(model, path, allow_pickle)
    contents = reading.read(path, allow_pickle, glance=True)
    if contents.network is not None:
        return copy.deepcopy(contents.network)  # rather than mapped from the file
    hyperparameters = dict(contents.hyperparameters)
    if class_path := hyperparameters.pop("_class_path", None):
        hyperparameters.pop("_instantiator", None)
        return network({"class_path": class_path, "init_args": hyperparameters}, path)
    found = list(configurations(path))
    for config, described in found:
        if "class_path" in described:
            return network(described, config)
    if (path / "config.json").is_file():
        return _transformer(path)
    unnamed = f", and {found[0][0]} names no class, only arguments" if found else ""
    raise CheckpointError(f"{path} does not say which network it is of{unnamed}: {GIVE_MODEL}")


def is_fixed(model: Model) -> bool:
    """Whether what is given is, or makes, the same network for every checkpoint.

    Raises:
        LocateError: if there is nothing of that name.
    """
    return model is not None and not parameters(_found(model))


def _found(model: nn.Module | Callable[..., nn.Module] | str) -> object:
    return locate.find(model) if isinstance(model, str) else model


def _given(
    model: nn.Module | Callable[..., nn.Module] | str, path: Path, allow_pickle: bool
) -> nn.Module:
    found = _found(model)
    name = model if isinstance(model, str) else getattr(model, "__qualname__", repr(model))
    if callable(found) and not isinstance(found, nn.Module):
        taken = taken_by(found, path, allow_pickle) if parameters(found) else {}
        found = locate.called(found, name, taken)
    return locate.as_network(found, name)


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
            f"({told(error)}): {GIVE_MODEL}"
        ) from error
