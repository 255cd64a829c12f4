"""Leave a network, and whatever else a measurement could touch, exactly as it was found."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` in eval mode and with gradients, and undoes all traces of it.

    What comes back as it was: every module's mode, buffers and other attributes, parameters'
    `.grad` and `requires_grad`, and the random states of Python, NumPy and torch on all devices
    that the model lives on. Buffers and tensor attributes are swapped for copies rather than
    written back, so that a training step's tape that refers to them stays valid.
    """
    with ExitStack() as stack:
        # First: tensors made under inference mode cannot take part in autograd.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device_type="cpu", enabled=False))
        devices = {p.device for p in [*model.parameters(), *model.buffers()]}
        for kind in {d.type for d in devices} - {"cpu", "meta"}:
            stack.enter_context(torch.autocast(device_type=kind, enabled=False))
        stack.enter_context(_random_states(devices))
        stack.enter_context(_gradients(model))
        stack.enter_context(_attributes(model))
        stack.enter_context(_modes(model))
        if "torch._dynamo" in sys.modules:  # compiled code keeps no tape that can be read
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _random_states(devices: set[torch.device]) -> Iterator[None]:
    cuda = [d for d in devices if d.type == "cuda"]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    found = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    for p, _, _ in found:
        p.grad = None
    try:
        yield
    finally:
        for p, grad, requires_grad in found:
            p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    # Flags are set one by one: a module's own train() may do more than set them.
    found = [(module, module.training) for module in model.modules()]
    for module, _ in found:
        module.training = False
    try:
        yield
    finally:
        for module, training in found:
            module.training = training


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return copies.setdefault(id(value), value.detach().clone())
        return value.copy() if type(value) in (list, dict, set) else value

    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    holders: list[dict[str, Any]] = []
    for module in modules:
        holders += [vars(module), module._buffers, module._parameters, module._modules]
    found = [(holder, dict(holder)) for holder in holders]
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("_"):
                vars(module)[name] = copy(value)
        for name, buffer in module._buffers.items():
            module._buffers[name] = copy(buffer)
    try:
        yield
    finally:
        for holder, content in found:
            for name in holder.keys() - content.keys():
                del holder[name]
            holder.update(content)
