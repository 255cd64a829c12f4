"""Networks whose parameters are spread over processes, gathered while they are measured."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nettrace.operator import OverBudgetError
from nettrace.ranks import Ranks
from nettrace.unwrapped import is_spread


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes, which must all ask for it."""
    found: Any = tensor.detach()
    all_of_it: Tensor = found.full_tensor() if is_spread(found) else found
    return all_of_it


def check_gathering(model: nn.Module, ranks: Ranks, memory: int) -> None:
    """Checks that a network can be gathered.

    Raises:
        OverBudgetError: if a copy of all parameters that are spread takes more than `memory` bytes.
        RuntimeError: if not all processes take part, which would wait for the others.
    """
    spread = [p for p in model.parameters() if is_spread(p)]
    if not spread:
        return
    if ranks.count == 1 and any(p.device_mesh.size() > 1 for p in spread):  # type: ignore[attr-defined]
        raise RuntimeError(
            "the parameters are spread over several processes, and not all of them came to "
            "measure: call the tracer in each, at the same steps"
        )
    size = sum(math.prod(p.shape) * p.dtype.itemsize for p in spread)
    if size > memory:
        raise OverBudgetError(
            f"the parameters are spread over processes, and a whole copy of them, of {size:.3g} "
            f"bytes, is above the memory budget of {memory:.3g} bytes: raise memory_budget"
        )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gives a network whole parameters, and takes off what would gather and spread them.

    All processes must enter it. Modules hold plain parameters meanwhile, each with the attribute
    `spread`, the parameter that it stands for; where nothing is spread, nothing is done.
    """
    if not any(is_spread(p) for p in model.parameters()):
        yield
        return
    plain: dict[int, nn.Parameter] = {}
    for p in model.parameters():
        if is_spread(p):
            plain[id(p)] = nn.Parameter(whole(p), p.requires_grad)
            plain[id(p)].spread = p  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for module in model.modules():
            for name, own in list(module._parameters.items()):
                if id(own) in plain:
                    module._parameters[name] = plain[id(own)]
                    stack.callback(module._parameters.__setitem__, name, own)
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks: OrderedDict[int, Any] = getattr(module, kind)
                kept = {k: hook for k, hook in hooks.items() if not _spreads(hook)}
                setattr(module, kind, OrderedDict(kept))
                stack.callback(setattr, module, kind, hooks)
        yield


def original(parameter: Tensor) -> Tensor:
    """The parameter that the optimizer knows."""
    found: Tensor = getattr(parameter, "spread", parameter)
    return found


def _spreads(hook: Any) -> bool:
    """Whether a hook gathers parameters, or spreads them or what is computed with them."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed")
