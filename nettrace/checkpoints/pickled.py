"""Files written by torch.save, read without running anything that is in them.

torch's restricted unpickler calls what rebuilds tensors and nothing else. Lightning keeps
hyper-parameters beside the weights, with classes of its own and of others; where these only hold
data, an inert stand-in takes what they held. So no class that a file names is ever imported or
called: `torch.load(weights_only=True)` with a few more words that it understands.
"""

from __future__ import annotations

import argparse
import functools
import io
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nettrace.checkpoints.contents import CheckpointError, Contents, progress, told

_TRAINED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
#: Under which names training scripts save weights, in order of preference: those that are trained
#: (the first with Lightning's WeightAveraging alone, whose state_dict is the average), then
#: averages of them.
STATES = (
    "current_model_state",
    *_TRAINED,
    *("model_ema", "ema", "ema_state_dict", "state_dict_ema", "ema_model", "ema_model_state_dict"),
)
_OPTIMIZERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optimizers", "optim")
_LOCK = threading.Lock()


def read(path: Path, allow_pickle: bool = False) -> Contents:
    """What a file that torch.save wrote holds; mapped into memory where the format allows.

    Raises:
        CheckpointError: if it cannot be read, holds code, or holds no weights.
    """
    return contents(unpickled(path, allow_pickle), path)


def contents(found: Any, path: Path) -> Contents:
    """What was unpickled, sorted into weights, optimizers and the rest.

    Raises:
        CheckpointError: if it holds no weights.
    """
    about = found if isinstance(found, Mapping) else {}
    named = [about[name] for name in STATES if name in about]
    saved = next((v for v in [*named, found] if is_state(v) or isinstance(v, nn.Module)), None)
    network = saved if isinstance(saved, nn.Module) else None
    state = saved if network is None else network.state_dict()
    if state is None:
        raise _without_weights(found, path)
    if state is found:
        about = {}
    optimizers: Any = next((about[name] for name in _OPTIMIZERS if name in about), [])
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    return Contents(
        state,
        [dict(one) for one in optimizers if isinstance(one, Mapping)],
        *progress(about),
        *hyperparameters(about),
        network,
    )


def _without_weights(found: object, path: Path) -> CheckpointError:
    """Why there are no weights to be had."""
    entries = found if isinstance(found, Mapping) else {"": found}
    entries = {k: v for k, v in entries.items() if k not in _OPTIMIZERS}
    if any(isinstance(entry, _InertModule) for entry in entries.values()):
        return CheckpointError(
            f"{path} holds a whole network, pickled: load it with --allow-pickle "
            "(allow_pickle=True) if you trust its author, or save its weights alone, by "
            "torch.save(model.state_dict(), file)"
        )
    expected = (
        "expected a state dict, as model.state_dict() gives it, or one under "
        f"{', '.join(map(repr, _TRAINED[:-1]))} or {_TRAINED[-1]!r}"
    )
    like = [str(name) for name, entry in entries.items() if _like_weights(entry)]
    if like and "param_groups" not in entries:  # an optimizer's state
        return CheckpointError(
            f"{path} holds what may be weights under {' and '.join(map(repr, like[:3]))}, where "
            f"they are not looked for: {expected}. Save them so, those of each network by itself"
        )
    return NotWeights(f"{path} holds no weights: {expected}; got {_described(found)}")


def _like_weights(value: object, depth: int = 2) -> bool:
    """Whether something may be a network or weights, though none that can be used."""
    if isinstance(value, nn.Module) or not isinstance(value, Mapping):
        return isinstance(value, nn.Module)
    if "param_groups" in value:  # an optimizer's
        return False
    if is_state(value):
        return any(isinstance(one, Tensor) and one.is_floating_point() for one in value.values())
    return depth > 1 and any(_like_weights(one, depth - 1) for one in value.values())


def hyperparameters(about: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """What Lightning keeps for building the module anew, and which argument it is of."""
    found, name = about.get("hyper_parameters"), about.get("hparams_name")
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, Mapping):
        return {}, None
    return found, name if isinstance(name, str) and name != "kwargs" else None


class NotWeights(CheckpointError):
    """A sound file of something else."""


def is_state(value: object) -> bool:
    """Whether something is a state dict: tensors by name, and extra state of modules."""
    return (
        isinstance(value, dict)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(
            isinstance(k, str) and (isinstance(v, Tensor) or k.endswith("_extra_state"))
            for k, v in value.items()
        )
    )


def unpickled(file: Path | io.BytesIO, allow_pickle: bool, name: str = "") -> Any:
    """An object saved by torch.save, on the CPU.

    Args:
        file: a file, which is mapped into memory if its format allows, or its bytes.
        allow_pickle: whether to run the code that a file may hold, as pickle does.
        name: what to call it in errors.

    Raises:
        CheckpointError: if it cannot be read, or would run code and this is not allowed.
    """
    name = name or str(file)
    try:
        mapped = isinstance(file, Path) and _is_zip(file)
        # Both hold for the whole process.
        with _LOCK, warnings.catch_warnings(), torch.serialization.safe_globals(_stand_ins()):
            warnings.simplefilter("ignore")  # of protocols and deprecated storages
            return torch.load(
                file, map_location="cpu", weights_only=not allow_pickle, mmap=mapped or None
            )
    except Exception as error:
        if (offender := _offender(str(error))) is not None:
            raise CheckpointError(
                f"{name} is refused: it names {offender}, so that loading it would run code from "
                "the file. Only if you trust its author, load it with --allow-pickle "
                "(allow_pickle=True); weights alone, as torch.save(model.state_dict(), file) "
                "writes them, need no trust"
            ) from error
        raise CheckpointError(
            f"{name} cannot be read, it is damaged, cut off or no checkpoint ({_plain(error)}): "
            "copy or save it again"
        ) from error


def check(file: Path | io.BytesIO, name: str = "") -> None:
    """Compares checksums, which torch does not; older formats have none.

    Raises:
        CheckpointError: if they differ.
    """
    if isinstance(file, Path) and not _is_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC:  # 0 if torch was told to leave it out
                    with archive.open(record) as stream:
                        while stream.read(1 << 20):
                            pass
    except Exception as error:
        raise CheckpointError(
            f"{name or file} is damaged ({told(error)}): copy or save it again"
        ) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _offender(message: str) -> str | None:
    """The global that torch's restricted unpickler would not call."""
    if "TorchScript archive" in message:
        return "a TorchScript program"
    if "Only persistent_load of storage" in message:
        return "a module with its source"  # as the format before torch 1.6 keeps it
    found = re.search(r"GLOBAL (\S+)", message) or re.search(
        r"unrecognized function (.+)|allowlisted via `add_safe_globals`,? but got (.+)"
        r"|Can only \w+ for dict.*but got (.+)|(\S+)`` must be imported",
        message,
    )
    if found is None:
        return None
    return next(group for group in found.groups() if group).strip()


def _plain(error: Exception) -> str:
    """An error of torch, without its advice to unpickle everything."""
    message = str(error)
    if "Weights only load failed" in message:
        last = [line for line in message.splitlines() if line and "torch.load" not in line][-1]
        return f"{type(error).__name__}: {last.strip()[:300]}"
    return told(error)


def _described(found: object) -> str:
    if isinstance(found, Mapping):
        names = [str(name) for name in found]
        return f"a dictionary of {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}"
    return type(found).__name__


def stand_ins(value: object) -> Iterator[type]:
    """The kinds of the objects and classes within a value that stand in for what was saved."""
    seen, left = set(), [value]  # a value may hold itself
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kind = one if isinstance(one, type) else type(one)
        if issubclass(kind, _Inert):
            yield kind
        elif isinstance(one, argparse.Namespace):
            left.append(vars(one))
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, (list, tuple, set, frozenset)):
            left.extend(one)


def is_module(kind: type) -> bool:
    """Whether what stands in is there for a `torch.nn.Module`."""
    return issubclass(kind, _InertModule)


class _Inert:
    """In place of an object of a known class: keeps what it was made of, and does nothing."""

    def __init__(self, *made_of: Any, **named: Any) -> None:
        self.made_of = made_of

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertModule(_Inert):
    """In place of a network, or of a part of one."""


class _Dtype(_Inert):
    """In place of numpy.dtype, for numbers alone."""

    def __init__(self, code: str = "f8", align: bool = False, copy: bool = True) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """In place of numpy's scalars: a number of Python's."""
    kind = np.dtype(dtype.order + dtype.code)
    if kind.kind not in "biufc":
        raise ValueError(f"a numpy scalar of type {kind}")
    return np.frombuffer(data, kind, 1)[0].item()


def _default_dict(factory: object = None, *_: Any) -> dict[Any, Any]:
    return {}


@functools.cache
def _stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """By name of a class that holds data and nothing else, what takes its place.

    Each is here because it stands in many Lightning checkpoints. Optimizers, schedulers and
    modules of torch are there as arguments of `save_hyperparameters`; partial because Hydra's
    configurations give them unfinished. None of them is imported, called or built.
    """
    names: dict[str, Callable[..., Any]] = {
        "argparse.Namespace": argparse.Namespace,
        "jsonargparse._namespace.Namespace": argparse.Namespace,
        "jsonargparse.namespace.Namespace": argparse.Namespace,
        "functools.partial": type("partial", (_Inert,), {}),
        "datetime.timedelta": type("timedelta", (_Inert,), {}),
        "collections.defaultdict": _default_dict,
        "builtins.dict": dict,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
    }
    for module in ("pathlib", "pathlib._local"):
        for kind in ("Path", "PosixPath", "PurePosixPath", "PurePath"):
            names[f"{module}.{kind}"] = PurePosixPath
        for kind in ("WindowsPath", "PureWindowsPath"):
            names[f"{module}.{kind}"] = PureWindowsPath
    for package in ("lightning.fabric", "lightning_fabric"):
        names[f"{package}.utilities.data.AttributeDict"] = dict
    for package in ("lightning.pytorch", "pytorch_lightning"):
        names[f"{package}.utilities.parsing.AttributeDict"] = dict
    for kind in vars(np.dtypes).values():
        if isinstance(kind, type):
            names[f"numpy.dtypes.{kind.__name__}"] = _Dtype
    for namespace in (torch.optim, torch.optim.lr_scheduler, nn):
        for kind in vars(namespace).values():
            if isinstance(kind, type) and not issubclass(kind, Tensor):
                inert = _InertModule if issubclass(kind, nn.Module) else _Inert
                stand_in = type(kind.__name__, (inert,), {})
                names[f"{kind.__module__}.{kind.__qualname__}"] = stand_in
    return [(stand_in, name) for name, stand_in in names.items()]
