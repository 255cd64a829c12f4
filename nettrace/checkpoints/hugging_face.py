"""Safetensors files, and Hugging Face folders of one file or of several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nettrace.checkpoints import pickled
from nettrace.checkpoints.contents import CheckpointError, Contents, progress, told

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDICES = tuple(f"{name}.index.json" for name in _WHOLE)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")


def is_folder(path: Path) -> bool:
    """Whether a folder is one of Hugging Face's, with weights."""
    whole = (path / "config.json").is_file() and any((path / name).is_file() for name in _WHOLE)
    return whole or any((path / name).is_file() for name in _INDICES)


def read_folder(path: Path, allow_pickle: bool = False) -> Contents:
    """The weights in a folder as `save_pretrained` and transformers' Trainer write it.

    Args:
        path: the folder.
        allow_pickle: as in `pickled.unpickled`.

    Raises:
        CheckpointError: if something is missing, damaged, refused, or lies outside of the folder.
    """
    trainer = path / "trainer_state.json"
    step, coordinates, misstated = progress(_json(trainer) if trainer.is_file() else {})
    index = next((path / name for name in _INDICES if (path / name).is_file()), None)
    if index is None:
        found = read_file(next(path / n for n in _WHOLE if (path / n).is_file()), allow_pickle)
    else:
        found = _sharded(path, index, allow_pickle)
    if step is None and misstated is None:
        return found
    return replace(found, step=step, coordinates=coordinates, misstated=misstated)


def read_file(path: Path, allow_pickle: bool = False) -> Contents:
    """A file of weights, of safetensors or by torch.save, by its suffix.

    Raises:
        CheckpointError: if it cannot be read, or is refused.
    """
    if path.suffix != ".safetensors":
        return pickled.read(path, allow_pickle)
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the package safetensors: pip install 'nettrace[huggingface]'"
        ) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            about = file.metadata() or {}
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, it is damaged, cut off or no safetensors file "
            f"({told(error)}): copy or save it again"
        ) from error
    if not state:
        raise pickled.NotWeights(f"{path} holds no tensors")
    return Contents(state, [], *progress({k: int(v) for k, v in about.items() if v.isdecimal()}))


def _sharded(path: Path, index: Path, allow_pickle: bool) -> Contents:
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index} has no weight_map: copy or save it again")
    state: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in files.values()}):
        shard = _inside(path, name, index)
        if not shard.is_file():
            raise CheckpointError(f"{path} lacks {name}, which {index.name} lists: copy it again")
        there = read_file(shard, allow_pickle).state
        listed = [weight for weight, file in files.items() if file == name]
        if lacking := [weight for weight in listed if weight not in there]:
            raise CheckpointError(f"{shard} lacks {lacking[0]}, which {index.name} lists")
        state.update((weight, there[weight]) for weight in listed)
    return Contents(state)


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file that an index names, if it lies in the index' folder, or in Hugging Face's cache.

    There, snapshots/<revision>/<name> links to blobs/<hash>.
    """
    file, roots = folder / name, [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    if (
        not name
        or Path(name).name != name
        or not any(file.resolve().is_relative_to(root) for root in roots)
    ):
        raise CheckpointError(
            f"{index} names {name!r}, which lies outside of its folder: it is refused; if the file "
            "belongs to it, copy it there"
        )
    return file


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({told(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no dictionary")
    return found
