"""Weights put into a network, whatever their names were prefixed with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nettrace.checkpoints.contents import CheckpointError, told

#: What torch.compile, FSDP, DeepSpeed and activation checkpointing put into names.
_WRAPPERS = re.compile(
    r"(_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\."
)
#: How many networks an AveragedModel is the average of.
_COUNT = "n_averaged"


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts weights and buffers into a network, all of them and no others.

    Names may differ by a prefix that all share, as "model." or "module.", by one of the network's
    submodules, and by what wrappers put into them. Tied weights need to be there once. What
    `torch.optim.swa_utils.AveragedModel` counts in is left out where the network has it not.

    Weights keep the type in which they were saved, since live and offline measurements agree in
    every bit only if they are made in the same type: a network that was built in float32 and
    trained in bfloat16 or float64 is converted. If all of its weights are of one type, so are its
    buffers that are not saved, as by `model.to(dtype)`.

    Args:
        model: the network, changed in place.
        state: by name; copied.

    Raises:
        CheckpointError: if names or shapes do not fit, with those that do not and what to do; the
            network may then be changed in part.
    """
    ours = model.state_dict(keep_vars=True)
    state = _counted(state, ours)
    fitting, attempts = _fitting(state, ours)
    try:
        if fitting is not None:
            _convert(model, ours, fitting)
            model.load_state_dict(fitting)
            return
        if attempts[0].renamed:  # perhaps what the network's own hooks know
            _convert(model, ours, {n: v for n, v in state.items() if n in ours})
            model.load_state_dict(state)
            return
        reason = None
    except Exception as error:
        reason = error
    said = _misfit(state, ours, attempts) or (reason and told(reason))
    raise CheckpointError(
        f"the checkpoint does not fit {type(model).__name__}: {said}. Give the network that was "
        "trained, as --model; or rename nettrace.checkpoints.load(path).state by hand, which "
        "nettrace.checkpoints.restore(model, state) then takes"
    ) from reason


def named(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state's weights and buffers by the network's own names, which is left as it is.

    Args:
        model: the network.
        state: by name, as for `restore`.

    Raises:
        CheckpointError: if names or shapes do not fit, with those that do not.
    """
    ours = model.state_dict(keep_vars=True)
    state = _counted(state, ours)
    fitting, attempts = _fitting(state, ours)
    if fitting is None:
        raise CheckpointError(
            f"the other weights are not of {type(model).__name__}: "
            f"{_misfit(state, ours, attempts)}. Both networks must have the same architecture"
        )
    return fitting


def _counted(state: Mapping[str, Tensor], ours: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Without what an average of networks counts in, where the network does not."""
    return state if _COUNT in ours else {n: v for n, v in state.items() if n != _COUNT}


def _fitting(
    state: Mapping[str, Tensor], ours: Mapping[str, Any]
) -> tuple[dict[str, Tensor] | None, list[_Attempt]]:
    """The entries by the network's names, if they fit, and what was tried."""
    ties, attempts = _ties(ours), []
    for names in _renamings(state, ours):
        attempts.append(_Attempt(names, state, ours, ties))
        if attempts[-1].fits:  # as do no others: prefixes leave the order of names as it is
            return attempts[-1].complete(), attempts
    return None, attempts


def _misfit(state: Mapping[str, Tensor], ours: Mapping[str, Any], attempts: list[_Attempt]) -> str:
    """What does not fit, of the naming with which the least does not."""
    best = [*attempts, _Attempt(_part(state, ours), state, ours, _ties(ours))]
    return min(best, key=lambda attempt: attempt.misfits).described()


class _Attempt:
    """One way of naming the entries of a state.

    Args:
        names: by name in the state, that in the network.
        state: what to restore.
        ours: the network's own state, of uncopied tensors.
        ties: by name, all names of the same tensor.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        state: Mapping[str, Tensor],
        ours: Mapping[str, Any],
        ties: Mapping[str, list[str]],
    ) -> None:
        self._found = {new: state[old] for old, new in names.items()}
        self._tied = {
            name: next((other for other in ties[name] if other in self._found), None)
            for name in ours
            if name not in self._found
        }
        self.missing = [name for name, other in self._tied.items() if other is None]
        self.unexpected = [
            old
            for old, new in names.items()
            if new not in ours or self._found[new] is not state[old]
        ]
        self.different = [
            f"{name} of shape {_shape(value)} where the network has {_shape(ours[name])}"
            for name, value in self._found.items()
            if name in ours and not _alike(value, ours[name])
        ]
        self.untied = [
            f"{name} differs from {ties[name][0]}, which is the same in the network"
            for name, value in self._found.items()
            if name in ours
            and (first := self._found.get(ties[name][0])) is not None
            and first is not value
            and not (first.shape == value.shape and torch.equal(first, value))
        ]

    @property
    def misfits(self) -> int:
        return sum(map(len, (self.missing, self.unexpected, self.different, self.untied)))

    @property
    def fits(self) -> bool:
        return not self.misfits

    @property
    def renamed(self) -> bool:
        """Whether names alone do not fit."""
        return not self.different and not self.untied

    def complete(self) -> dict[str, Tensor]:
        """The entries by the network's names, tied ones under each."""
        tied = {name: self._found[other] for name, other in self._tied.items() if other}
        return {**self._found, **tied}

    def described(self) -> str:
        """What does not fit, a few of each kind."""
        kinds = [
            ("it lacks ", self.missing),
            ("the network lacks ", self.unexpected),
            ("", self.different),
            ("", self.untied),
        ]
        return "; ".join(label + _few(names) for label, names in kinds if names)


def _renamings(state: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Ways of naming a state's entries: as they are, then with prefixes taken off and put on.

    Only such as make one of the network's names of the first.
    """
    full = {_bare(name): name for name in ours}
    theirs = {name: _bare(name) for name in state}
    yield {old: full.get(bare, bare) for old, bare in theirs.items()}
    if len(state) < len({id(value) for value in ours.values()}):
        return  # something is missing, whatever the names
    first = next(iter(theirs.values()), "")
    for off in ["", *_common_prefixes(list(theirs.values()))]:
        end = first.removeprefix(off)
        for on in (name.removesuffix(end) for name in full if f".{name}".endswith(f".{end}")):
            renamed = {old: on + bare.removeprefix(off) for old, bare in theirs.items()}
            yield {old: full.get(new, new) for old, new in renamed.items()}


def _part(state: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """A naming that takes off the prefix of the most entries that then fit, and leaves others."""
    full = {_bare(name): name for name in ours}
    fitting: Counter[str] = Counter()
    for name in map(_bare, state):
        fitting.update(p for p in _prefixes(name) if name.removeprefix(p) in full)
    off = max(fitting, key=fitting.__getitem__, default="")
    return {old: full.get(_bare(old).removeprefix(off), old) for old in state}


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length]) + "."


def _common_prefixes(names: list[str]) -> list[str]:
    return [p for p in _prefixes(names[0]) if all(n.startswith(p) for n in names)] if names else []


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _ties(state: Mapping[str, Any]) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    return {name: names[id(value)] for name, value in state.items()}


def _alike(value: object, own: object) -> bool:
    """Whether shapes agree, and whether both are of numbers or of integers."""
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return not isinstance(value, Tensor) and not isinstance(own, Tensor)
    kinds = [(x.is_floating_point(), x.is_complex()) for x in (value, own)]
    return kinds[0] == kinds[1] and (is_lazy(own) or value.shape == own.shape)


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(tuple(value.shape)) + ("" if value.is_floating_point() else f" of {value.dtype}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _convert(model: nn.Module, ours: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Turns the network's weights and buffers to the types of a state's."""
    numbers = {n: v for n, v in state.items() if isinstance(v, Tensor) and _is_number(v)}
    if all(ours[name].dtype == value.dtype for name, value in numbers.items()):
        return
    for name, value in numbers.items():
        ours[name].data = ours[name].data.to(value.dtype)
    dtypes = {value.dtype for value in numbers.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        (dtype,) = dtypes
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():  # what is complex stays so
                tensor.data = tensor.data.to(dtype)


def _is_number(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
