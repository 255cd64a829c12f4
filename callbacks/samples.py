"""Samples of the data that a trainer has, of which nothing is used up."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset, Subset

from nettrace.freeze import frozen, private_copy, random_states
from nettrace.probe import Probe, evenly_spaced
from nettrace.ranks import ALONE, Ranks
from nettrace.unwrapped import is_spread

_FEW = 1000  # longer lists are data
_BATCH = 64  # where batches have no one size


@contextmanager
def batch_of(loaders: Sequence[Any], samples: int, model: nn.Module) -> Iterator[Any]:
    """A batch of evenly spaced samples of the first loader whose data set gives them by number.

    The loaders are never iterated. Within the context the network and the random streams may be
    used, as by what moves the batch; afterwards they are as they were.

    Args:
        loaders: the candidates.
        samples: how many to take, at most.
        model: the network that is trained.

    Raises:
        TypeError: if all are streams.
    """
    loader = next((c for c in loaders if _has_samples(getattr(c, "dataset", None))), None)
    if loader is None:
        kinds = ", ".join(dict.fromkeys(type(c).__name__ for c in loaders)) or "nothing"
        raise TypeError(
            f"the trainer's data, {kinds}, are a stream from which samples cannot be taken by "
            "number: pass probe=nettrace.Probe(inputs, targets)"
        )
    devices = {p.device for p in model.parameters()}
    # Lazy ones cannot be frozen yet, and those that are spread over processes would be gathered.
    left = any(is_lazy(p) or is_spread(p) for p in model.parameters())
    with random_states(devices), nullcontext() if left else frozen(model):
        # Samples may be augmented at random: so that those of a resumed run are the same.
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        memo: dict[int, Any] = {}  # generators of the data's own, also those of what joins them
        dataset, collate = (_twin(part, memo) for part in (loader.dataset, loader.collate_fn))
        yield evenly_spaced(dataset, samples, collate)


def probe_of(
    trainer: Any,
    module: Any,
    given: Probe | Mapping[str, Probe] | None,
    samples: int,
    ranks: Ranks = ALONE,
) -> Probe | dict[str, Probe]:
    """The probes that are given, or one of a Lightning trainer's data, as the module needs it.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        given: the probes, if there are any.
        samples: how many samples of the data to take, at most.
        ranks: the processes that need it.

    Raises:
        TypeError: if samples cannot be taken from the data.
    """
    convert = trainer.precision_plugin.convert_input
    if isinstance(given, Probe):
        return given.to(module.device).map(convert)
    if given is not None:
        return {name: probe.to(module.device).map(convert) for name, probe in given.items()}
    candidates = _flat(trainer.val_dataloaders) + _flat(trainer.train_dataloader)
    with batch_of(candidates, samples, module) as batch:
        batch = trainer.strategy.batch_to_device(convert(batch), dataloader_idx=0)
    probe = Probe.from_batch(batch)  # in all processes the first's, whose data may differ
    return Probe(*ranks.pass_on(lambda: (probe.inputs, probe.targets), 0))


@contextmanager
def in_order(
    trainer: Any, module: Any, loaders: Any, what: str, ranks: tuple[int, int]
) -> Iterator[Iterator[Any]]:
    """All samples of a trainer's data set, in its order, in batches as the module takes them.

    The trainer's loaders are never iterated. Within the context the random streams may be used;
    afterwards they are as they were.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        loaders: one loader, or a nest of them, of which the first counts.
        what: what they are, in words.
        ranks: the number of this process, and of all, which each take their share.

    Raises:
        TypeError: if the samples cannot be taken by number.
    """
    loader = _flat(loaders)[0]
    if not _has_samples(getattr(loader, "dataset", None)):
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise TypeError(
            f"the {what} data, {kind}, are a stream, which cannot be read again in its order"
        )
    with random_states({p.device for p in module.parameters()}):
        # Samples may be augmented at random: so that those of a resumed run are the same.
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        memo: dict[int, Any] = {}
        dataset, collate = (_twin(part, memo) for part in (loader.dataset, loader.collate_fn))
        number, count = ranks
        own = range(len(dataset) * number // count, len(dataset) * (number + 1) // count)
        size = getattr(loader, "batch_size", None)
        if size is None and getattr(loader, "batch_sampler", None) is not None:
            size = getattr(loader.batch_sampler, "batch_size", None) or _BATCH
        convert = trainer.precision_plugin.convert_input
        batches = DataLoader(Subset(dataset, own), size, collate_fn=collate)
        move = trainer.strategy.batch_to_device
        yield (move(convert(batch), dataloader_idx=0) for batch in batches)


def _flat(loaders: Any) -> list[Any]:
    """The loaders in one, a list or a mapping of loaders."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [one for several in loaders for one in _flat(several)]
    return [] if loaders is None else [loaders]


def _has_samples(dataset: Any) -> bool:
    if dataset is None or isinstance(dataset, IterableDataset):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """The same data set with random generators of its own, but the same data.

    Looks for generators in the attributes of what it is made of, such as transforms, and in short
    lists of those.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(
        value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    ):
        return private_copy(value, memo)
    if type(value) in (list, tuple) and len(value) <= _FEW:
        return type(value)(_twin(v, memo) for v in value)
    if type(value) is dict and len(value) <= _FEW:
        return {k: _twin(v, memo) for k, v in value.items()}
    if isinstance(value, (Tensor, nn.Module, type)) or not getattr(value, "__dict__", None):
        return value
    try:
        twin = copy.copy(value)
        if twin is value:  # there is one of it alone, as of a logger
            return value
        memo[id(value)] = twin
        vars(twin).update({name: _twin(v, memo) for name, v in vars(value).items()})
    except Exception:  # what cannot be copied is used as it is
        return value
    return twin
