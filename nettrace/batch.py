"""Nests of tensors: what batches are made of, and which of what a network returns is looked at."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

#: What `Probe(..., select=...)` takes: "last", a name or number, or a function of what is returned.
Select: TypeAlias = str | int | Callable[[Any], Tensor]

#: Under which names a batch holds what the outputs are compared with, in order of preference.
TARGETS = ("labels", "label", "targets", "target", "y")


def named(tree: Any) -> dict[str, Any] | None:
    """The entries of a mapping, dataclass or named tuple by name; None of anything else."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        return dict(tree._asdict())
    return None


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nest, in its order."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for value in _entries(tree).values():
        yield from tensors(value)


def digest_of(several: Iterable[Tensor]) -> hashlib._Hash:
    """A SHA-256 of tensors' values, types and shapes."""
    digest = hashlib.sha256()
    for tensor in several:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        if len(flat) == 1:  # which counts as contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with a function applied to its tensors; mappings become dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_asdict"):
        return type(tree)([mapped(value, function) for value in tree])
    entries = named(tree)
    if entries is None:
        return tree
    entries = {name: mapped(value, function) for name, value in entries.items()}
    if isinstance(tree, Mapping):
        return entries
    if not is_dataclass(tree):
        return type(tree)(**entries)
    twin = copy.copy(tree)
    for name, value in entries.items():
        object.__setattr__(twin, name, value)  # which may be frozen
    return twin


def joined(one: Any, other: Any) -> Any:
    """Two nests as one, tensors of the second after those of the first.

    Raises:
        ValueError: if they are not made alike.
    """
    names = [list(_entries(tree)) for tree in (one, other)]
    if names[0] != names[1]:
        raise ValueError(f"batches of {names[0]} and of {names[1]} do not fit in one")
    shapes = [[tuple(t.shape[1:]) for t in tensors(tree)] for tree in (one, other)]
    types = [[t.dtype for t in tensors(tree)] for tree in (one, other)]
    if shapes[0] != shapes[1] or types[0] != types[1]:
        raise ValueError(
            f"samples of shapes {shapes[0]} and {shapes[1]}, of types {types[0]} and {types[1]}, "
            "do not fit in one batch: make them alike, as by padding"
        )
    rows = tensors(other)
    return mapped(one, lambda t: torch.cat([t, next(rows)]))


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch, None if there are none.

    In a mapping, dataclass or named tuple, the targets are called as in `TARGETS`, and the rest are
    inputs; else a pair is inputs and targets.
    """
    entries = named(batch)
    if entries is not None:
        name = next((name for name in TARGETS if entries.get(name) is not None), None)
        if name is not None:
            targets = entries.pop(name)
            return {k: v for k, v in entries.items() if v is not None}, targets
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    return batch, None


def selected(found: Any, select: Select | None) -> tuple[Tensor, str]:
    """The outputs among what a network returned, and what to call them if there was a choice.

    By default a tensor itself, else what is named "logits", else the only floating tensor with an
    axis for samples.

    Raises:
        ValueError: if it is not clear which are meant; names what there is.
    """
    if select is not None and not isinstance(select, (str, int)):
        outputs, name = select(found), getattr(select, "__name__", type(select).__name__)
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"expected select= to give a tensor of shape (N, ...), got {_kind(outputs)}"
            )
        return outputs, f"select={name}"
    entries = _entries(found)
    if isinstance(select, int) and not isinstance(found, Mapping):  # also of a named tuple
        entries = dict(enumerate(entries.values()))
    if select is not None and isinstance(entries.get(select), Tensor):
        return entries[select], str(select)
    if select not in (None, "last"):
        raise ValueError(f"there is no tensor {select!r} in what is returned, {_kind(found)}")
    outputs, name = _default(found, entries)
    if select != "last":
        return outputs, name
    if outputs.dim() != 3:
        raise ValueError(
            f"expected outputs (N, T, V) to take the last token of, got {tuple(outputs.shape)}"
        )
    return outputs[:, -1], f"{name}, last token".removeprefix(", ")


def _default(found: Any, entries: Mapping[Any, Any]) -> tuple[Tensor, str]:
    if isinstance(found, Tensor):
        return found, ""
    floating = [
        key
        for key, value in entries.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
    ]
    if "logits" in floating:
        return entries["logits"], "logits"
    if len(floating) == 1:
        return entries[floating[0]], str(floating[0])
    raise ValueError(f"it is not clear which outputs are meant in {_kind(found)}")


def _entries(tree: Any) -> dict[Any, Any]:
    """What a nest consists of, by name or number."""
    entries = named(tree)
    if entries is None and isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    return entries or {}


def _kind(found: Any) -> str:
    """A type, and what is in it."""
    kinds = [
        f"{key!r}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}"
        for key, v in _entries(found).items()
    ]
    return type(found).__name__ + (f" of {', '.join(kinds)}" if kinds else "")
