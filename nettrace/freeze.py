"""Leave a network, and whatever else a measurement could touch, exactly as it was found."""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from nettrace import hooks
from nettrace.gathered import gathered

_INTERNALS = frozenset(vars(nn.Module()))


@contextmanager
def frozen(model: nn.Module, *, evaluating: bool = True) -> Iterator[None]:
    """Evaluates `model` in eval mode and with gradients, and undoes all traces of it.

    What comes back as it was: parameters' values, `.grad` and `requires_grad`; every module's mode,
    buffers and other attributes, as far as they are tensors, containers or random generators; and
    the random states of Python, NumPy and torch on all devices that the model lives on. Hooks of
    parameters are not called, and anomalies of gradients not looked for, meanwhile. Buffers and
    attributes are swapped for copies rather than written back, so that a training step's tape that
    refers to them stays valid.

    Args:
        model: the network.
        evaluating: whether modules are in eval mode; else they stay in the modes that they have.
    """
    with ExitStack() as stack:
        # First: tensors made under inference mode cannot take part in autograd.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(gathered(model))
        # Which looks for NaN in the training's backward passes, one cotangent at a time.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        devices = {p.device for p in [*model.parameters(), *model.buffers()]}
        for kind in {"cpu"} | {d.type for d in devices} - {"meta"}:
            stack.enter_context(torch.autocast(device_type=kind, enabled=False))
        stack.enter_context(random_states(devices))
        stack.enter_context(_parameters(model))
        stack.enter_context(_attributes(model))
        stack.enter_context(_modes(model, evaluating))
        stack.enter_context(_no_checkpoints())
        stack.enter_context(_cells_one_by_one(model))
        stack.enter_context(hooks.set_aside(model))
        stack.enter_context(hooks.noted())
        if "torch._dynamo" in sys.modules:  # compiled code keeps no tape that can be read
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Undoes what forward passes write to weights, buffers and attributes; random streams go on.

    Args:
        model: a network that is frozen.
    """
    with _parameters(model), _attributes(model):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` in eval mode, without gradients and eagerly, as for a prediction.

    Modes and random states come back as they were. Unlike `frozen`, nothing is copied: what a
    forward pass writes in eval mode stays.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states({p.device for p in model.parameters()}))
        stack.enter_context(_modes(model, True))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def private_copy(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a tensor, container or random generator, deep as far as it holds such.

    Anything else, parameters included, is returned as it is.

    Args:
        value: what to copy.
        memo: copies made already, by the identity of what they are copies of.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    kind, twin = type(value), value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        twin = value.detach().clone().requires_grad_(value.requires_grad)
    elif isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
    elif isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
        twin = copy.deepcopy(value)
    elif kind in (list, deque):
        twin = memo[id(value)] = copy.copy(value)
        twin.clear()
        twin.extend(private_copy(v, memo) for v in value)
    elif kind in (dict, defaultdict):
        twin = memo[id(value)] = copy.copy(value)
        twin.update({k: private_copy(v, memo) for k, v in value.items()})
    elif kind is tuple:
        twin = tuple(private_copy(v, memo) for v in value)
    elif kind is set:
        twin = set(value)
    memo[id(value)] = twin
    return twin


@contextmanager
def random_states(devices: set[torch.device]) -> Iterator[None]:
    """Puts back the random states of Python, NumPy and torch, on the CPU and some devices."""
    put_back = random_streams(devices)
    try:
        yield
    finally:
        put_back()


def random_streams(devices: set[torch.device]) -> Callable[[], None]:
    """What sets the random states of Python, NumPy and torch to what they are now."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)

    return put_back


@contextmanager
def _parameters(model: nn.Module) -> Iterator[None]:
    # Some forwards write to weights, such as that of nn.Embedding with max_norm.
    found = [(p, p.grad, p.requires_grad, p.data, p.detach().clone()) for p in model.parameters()]
    try:
        for p in model.parameters():
            p.grad = None
        yield
    finally:
        for p, grad, requires_grad, data, value in found:
            if p.data_ptr() != data.data_ptr():
                p.data = data
            if not torch.equal(data, value):
                data.copy_(value)
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Calls what is checkpointed, which would be hidden from the tape, or computed at each look."""

    def call(function: Callable[..., Any], _: bool, *inputs: Any) -> Any:
        return function(*inputs)

    def around(*_: Any, **__: Any) -> Iterator[None]:
        yield

    with (
        patch.object(CheckpointFunction, "apply", call),
        patch.object(checkpoint, "_checkpoint_without_reentrant_generator", around),
    ):
        yield


@contextmanager
def _cells_one_by_one(model: nn.Module) -> Iterator[None]:
    """Calls recurrent networks cell by cell: all at once, cuDNN has no derivative in eval mode."""
    enabled = torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        torch.backends.cudnn.enabled = enabled and not recurrent
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _modes(model: nn.Module, evaluating: bool) -> Iterator[None]:
    # Flags are set one by one: a module's own train() may do more than set them.
    found = [(module, module.training) for module in model.modules()]
    try:
        for module, training in found:
            module.training = training and not evaluating
        yield
    finally:
        for module, training in found:
            module.training = training


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    holders: list[dict[str, Any]] = []
    for module in modules:
        holders += [vars(module), module._buffers, module._parameters, module._modules]
    found = [(holder, dict(holder)) for holder in holders]
    memo: dict[int, Any] = {}
    # What is on a tape may hold the tensors themselves, and write to them in its backward pass.
    tensors = {id(v): v for _, content in found for v in content.values() if _is_own(v)}
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    try:  # memory may run out in copying
        for module in modules:
            for holder in (vars(module), module._buffers):
                for name in holder.keys() - _INTERNALS:
                    holder[name] = private_copy(holder[name], memo)
            if "_original_forward" in vars(module):  # accelerate's own enters autocast again
                vars(module)["forward"] = vars(module)["_original_forward"]
        yield
    finally:
        for holder, content in found:
            for name in holder.keys() - content.keys():
                del holder[name]
            holder.update(content)
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)  # unseen by the tape, which may have kept it


def _is_own(value: Any) -> bool:
    plain = type(value) is Tensor and value.layout is torch.strided and not value.is_nested
    return plain and value.is_leaf and not value.is_meta
