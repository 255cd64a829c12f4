"""Checkpoints of torch.distributed.checkpoint: a folder of .metadata and files of chunks.

Each chunk of a tensor, and each other object, is a record of torch.save somewhere in a file; the
metadata, a pickle, says where. torch unpickles the metadata and other objects without restriction.
Here classes of the metadata are replaced by inert ones, only tensors and the step are read, and
these as weights alone. Neither processes nor devices of the training are needed.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from nettrace.checkpoints import pickled
from nettrace.checkpoints.contents import (
    STEPS,
    CheckpointError,
    Contents,
    progress,
    told,
)

METADATA = ".metadata"
#: What Lightning's strategies write beside it: all that is not sharded.
_REST = "meta.pt"
_ASIDE = re.compile(
    r"(optim(izers?)?(_?\d+|_states?(_dict)?)?|(lr_)?schedulers?|dataloader|rng_state)(\.|$)"
)


def is_folder(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (path / METADATA).is_file()


def read(path: Path, allow_pickle: bool = False, glance: bool = False) -> Contents:
    """The weights in a distributed checkpoint, each put together from its chunks.

    Entries under "state_dict", "model" and the like are the weights, "model.net.0.weight" being
    `net.0.weight`; without these, all that is not an optimizer's or another component's.

    Args:
        path: the folder.
        allow_pickle: whether to unpickle metadata of any class.
        glance: whether to look at the step and the files' lengths alone.

    Raises:
        CheckpointError: if something is missing, damaged or refused.
    """
    try:
        entries = _entries(_unpickled(path / METADATA, allow_pickle), path)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path / METADATA} is not made as torch makes it ({told(error)}): save it again"
        ) from error
    weights = _weights(entries)
    if not weights:
        raise pickled.NotWeights(f"{path} holds no weights, only {', '.join(entries)[:200]}")
    marks = {
        entry.path[-1]: _object(entry, allow_pickle)
        for entry in entries.values()
        if entry.path[-1] in (*STEPS, "epoch") and not _aside(entry.path[:-1]) and entry.is_scalar
    }
    state = {} if glance else {name: _tensor(entry) for name, entry in weights.items()}
    found = Contents(state, [], *progress(marks))
    if not (path / _REST).is_file():
        return found
    rest = pickled.unpickled(path / _REST, allow_pickle)
    rest = rest if isinstance(rest, dict) else {}
    step, coordinates, misstated = progress(rest)
    hyperparameters, name = pickled.hyperparameters(rest)
    return replace(
        found,
        step=found.step if step is None else step,
        coordinates=coordinates or found.coordinates,
        misstated=misstated or found.misstated,
        hyperparameters=hyperparameters,
        hyperparameters_name=name,
    )


@dataclass(frozen=True)
class _Chunk:
    file: Path
    start: int
    length: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A tensor, or an object if it has no type, with where it stood in the nested state."""

    name: str
    path: tuple[str, ...]
    dtype: torch.dtype | None
    size: tuple[int, ...]
    chunks: list[_Chunk]

    @property
    def is_scalar(self) -> bool:
        return math.prod(self.size) == 1


def _entries(metadata: Any, folder: Path) -> dict[str, _Entry]:
    """The metadata, with all that it claims held against the files."""
    stored: dict[str, list[_Chunk]] = {}
    for index, info in metadata.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{folder} is compressed ({info.transform_descriptors}), which is not read: "
                "convert it by torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        offsets = tuple(getattr(index, "offset", None) or ())
        chunk = _Chunk(_file(folder, info.relative_path), info.offset, info.length, offsets)
        if chunk.start < 0 or chunk.length < 0:
            raise ValueError(f"{index.fqn} at {chunk.start}")
        if chunk.start + chunk.length > chunk.file.stat().st_size:
            raise CheckpointError(f"{chunk.file} is cut off: copy or save the checkpoint again")
        stored.setdefault(index.fqn, []).append(chunk)
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    entries = {}
    for name, about in metadata.state_dict_metadata.items():
        path = tuple(str(part) for part in paths.get(name) or (name,))
        if not hasattr(about, "chunks"):
            entries[name] = _Entry(name, path, None, (), stored.get(name, []))
            continue
        size, sizes = tuple(about.size), {tuple(c.offsets): tuple(c.sizes) for c in about.chunks}
        chunks = [replace(c, sizes=sizes[c.offsets]) for c in stored.get(name, [])]
        inside = all(
            0 <= start and 0 <= length and start + length <= whole
            for chunk in chunks
            for start, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        covered = sum(math.prod(chunk.sizes) for chunk in chunks)
        if not inside or covered != math.prod(size):
            raise CheckpointError(
                f"{folder} lacks parts of {name}: {covered} of {math.prod(size)} elements are "
                "there; were the files of all ranks copied?"
            )
        dtype = about.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} of type {dtype}")
        entries[name] = _Entry(name, path, dtype, size, chunks)
    return entries


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if PurePath(name).name != name or not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder / METADATA} names {name!r}, which lies outside of its folder: it is refused"
        )
    if not file.is_file():
        raise CheckpointError(f"{folder} lacks {name}, which its metadata lists: copy it again")
    return file


def _weights(entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """The entries of the model, by their names in it."""
    tensors = [e for e in entries.values() if e.dtype is not None and not _aside(e.path)]
    for key in pickled.STATES:
        found = {}
        for entry in tensors:
            if key in entry.path[:-1]:
                found[".".join(entry.path[entry.path.index(key) + 1 :])] = entry
        if found:
            return found
    return {e.name: e for e in tensors if e.path[-1] not in (*STEPS, "epoch")}


def _aside(path: tuple[str, ...]) -> bool:
    """Whether an entry is an optimizer's, a schedule's or a data loader's."""
    return any(_ASIDE.match(part) for part in path)


def _object(entry: _Entry, allow_pickle: bool) -> Any:
    if len(entry.chunks) != 1:
        return None
    return _record(entry.chunks[0], entry.name, allow_pickle)


def _tensor(entry: _Entry) -> Tensor:
    try:
        whole = torch.empty(entry.size, dtype=entry.dtype)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{entry.name} of shape {entry.size}: {told(error)}") from error
    for chunk in entry.chunks:
        part = _record(chunk, entry.name, False)
        if not isinstance(part, Tensor) or tuple(part.shape) != chunk.sizes:
            raise CheckpointError(
                f"{chunk.file} holds no tensor of shape {chunk.sizes} for {entry.name}: save it "
                "again"
            )
        here = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[here] = part
    return whole


def _record(chunk: _Chunk, name: str, allow_pickle: bool) -> Any:
    with chunk.file.open("rb") as file:
        file.seek(chunk.start)
        data = io.BytesIO(file.read(chunk.length))
    where = f"{name} in {chunk.file}"
    pickled.check(data, where)
    data.seek(0)
    return pickled.unpickled(data, allow_pickle, where)


class _Inert:
    """In place of DCP's data classes: holds what they held, and does nothing."""

    planner_data = offset = None

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):  # of TensorProperties, which begins with its type
            state = {"dtype": state[0]}
        self.__dict__.update(state)


_DCP = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
#: All that torch writes into .metadata, beside types of tensors; of old, at another place.
_METADATA_NAMES: dict[tuple[str, str], Any] = {
    **{
        (f"{_DCP}.metadata", name): _Inert
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): _Inert,
    (_OLD, "TensorProperties"): _Inert,
    (_OLD, "MEM_FORMAT_ENCODING"): _Inert,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): PurePath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_NAMES:
            return _METADATA_NAMES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    pass


def _unpickled(path: Path, allow_pickle: bool) -> Any:
    try:
        with path.open("rb") as file:
            return pickle.load(file) if allow_pickle else _Unpickler(file).load()
    except _Refused as error:
        raise CheckpointError(
            f"{path} is refused: it names {error}, which torch does not write there, so that "
            "loading it would run code from the file. Only if you trust its author, load it with "
            "--allow-pickle (allow_pickle=True)"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or cut off ({told(error)}): copy or save it "
            "again"
        ) from error
