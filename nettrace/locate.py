"""What a text such as `module:name` or `path/to/file.py:name` stands for: networks and probes."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import random
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from nettrace.freeze import random_states
from nettrace.missing import place_of
from nettrace.probe import Probe, check_probes

#: How code of somebody else's fails. One that ends the process must not end it without a word.
FAILURES = (Exception, SystemExit)


class LocateError(ValueError):
    """A text stands for nothing that can be used; the message says what to write instead."""


def model(where: str) -> nn.Module:
    """The network that is called so, or that a function or class of that name builds.

    Raises:
        LocateError: if there is none.
    """
    return as_network(load(where), where)


def as_network(found: object, where: str) -> nn.Module:
    """The same, if it is a network.

    Raises:
        LocateError: if it is something else.
    """
    if not isinstance(found, nn.Module):
        raise LocateError(f"expected {where} to be a torch.nn.Module, got {_kind(found)}")
    return found


def probe(where: str, samples: int = 64) -> Probe | Mapping[str, Probe]:
    """The probe that is called so, or that a function or class of that name gives.

    Random numbers that are drawn on the way are the same each time.

    Args:
        where: the name of a `Probe`, or a mapping of them; of a batch, which is a tensor of inputs
            or an (inputs, targets) pair; or of a data set that gives samples by number, a loader of
            one or a Lightning data module, of whose first validation data set, or else training
            data set, evenly spaced samples are taken.
        samples: how many of a data set, at most.

    Raises:
        LocateError: if there is none.
    """
    with same_draws():  # also where the module draws some
        find(where)
    with same_draws():
        found = load(where)
        try:
            return _probe(found, samples)
        except LocateError as error:
            raise LocateError(f"expected {where} to be {error}") from error
        except FAILURES as error:
            raise LocateError(f"{where} makes no probe: {told(error)}") from error


def load(where: str) -> Any:
    """What is called so; what it gives, if it is a function or a class.

    Raises:
        LocateError: if there is nothing of that name, or it fails.
    """
    found = find(where)
    if not callable(found) or isinstance(found, (nn.Module, Dataset)):
        return found
    return called(found, where, {})


def called(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """What a function or class gives.

    Raises:
        LocateError: if it fails.
    """
    try:
        return function(**arguments)
    except FAILURES as error:
        given = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in arguments.items())
        raise LocateError(f"{name}({given}) failed: {told(error)}") from error


def find(where: str) -> Any:
    """What is called so, as it is.

    Raises:
        LocateError: if there is nothing of that name.
    """
    module_name, _, name = where.rpartition(":")
    if not module_name or not name:
        raise LocateError(
            f"expected module:name, such as my_module:build or path/to/file.py:build, got {where!r}"
        )
    found: Any = import_module(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), cutoff=0.4)
            hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise LocateError(f"{module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def import_module(name: str) -> ModuleType:
    """A module, which may lie in the current folder; or the file at a path that ends in .py.

    What it imports may lie in the current folder, or in that of the file.

    Raises:
        LocateError: if there is none, or it cannot be imported.
    """
    file = Path(name).absolute() if name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise LocateError(f"there is no file {name}")
    here = str(Path.cwd() if file is None else file.parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name) if file is None else _executed(file)
    except ModuleNotFoundError as error:
        if file is not None or error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise LocateError(f"{name} needs {error.name}, which is not installed") from error
        raise LocateError(
            f"there is no module {name!r}: expected {name.replace('.', '/')}.py in {here} or an "
            "installed module"
        ) from error
    except SystemExit as error:
        raise LocateError(
            f"{name} cannot be imported, it ends the program ({told(error)}): put what it does as "
            'a script under if __name__ == "__main__"'
        ) from error
    except Exception as error:
        raise LocateError(f"{name} cannot be imported: {told(error)}") from error


def _executed(file: Path) -> ModuleType:
    """The module of a file, under its own name unless another has that."""
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    for name in (file.stem, f"{file.stem}_{digest}"):
        known = sys.modules.get(name)
        if known is not None and _is_of(known, file):
            return known
        if known is None:
            break
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_of(module: ModuleType, file: Path) -> bool:
    own = getattr(module, "__file__", None)
    return own is not None and Path(own).resolve() == file.resolve()


def _probe(found: Any, samples: int) -> Probe | Mapping[str, Probe]:
    if isinstance(found, Mapping) and any(isinstance(one, Probe) for one in found.values()):
        check_probes(found)
        return found
    if isinstance(found, Probe):
        return found
    if isinstance(found, (Tensor, tuple, list, Mapping)):
        return Probe.from_batch(found)
    for one in () if isinstance(found, nn.Module) else _sources(found):
        dataset = getattr(one, "dataset", one)
        if _has_samples(dataset):
            collate = getattr(one, "collate_fn", None)
            return Probe.from_dataset(dataset, samples, collate=collate)
    raise LocateError(
        "a nettrace.Probe, a mapping of them, a tensor of inputs, an (inputs, targets) pair, or a "
        "data set, loader or data module that gives samples by number and has some, got "
        f"{_kind(found)}"
    )


def _sources(found: Any) -> Iterator[Any]:
    """Data sets or loaders, the first choice first."""
    if not hasattr(found, "val_dataloader"):
        yield found
        return
    getattr(found, "prepare_data", lambda: None)()
    getattr(found, "setup", lambda stage: None)("fit")
    for name in ("val_dataloader", "train_dataloader"):
        yield from _flat(_given(getattr(found, name, None)))


def _given(loaders: Callable[[], Any] | None) -> Any:
    """What a data module gives; nothing where it has no loaders of that kind."""
    try:
        return None if loaders is None else loaders()
    except Exception as error:
        if type(error).__name__ in ("MisconfigurationException", "NotImplementedError"):
            return None
        raise


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for several in loaders:
            yield from _flat(several)
    elif loaders is not None:
        yield loaders


def _has_samples(dataset: Any) -> bool:
    if isinstance(dataset, (IterableDataset, nn.Module, str, bytes)):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers are those of one seed meanwhile, and go on afterwards as before."""
    with random_states(set()):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield


def told(error: BaseException) -> str:
    """An error of somebody else's code, with the place where it was raised."""
    return f"{type(error).__name__}: {error}{place_of(error)}"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
