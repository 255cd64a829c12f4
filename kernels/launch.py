"""Where the compiled kernels run, and by which configuration.

Triton compiles for CUDA and HIP devices, and on a CPU it interprets, if TRITON_INTERPRET=1 was set
when it was imported. Everywhere else operations of torch do the same. NETTRACE_KERNELS=torch asks
for these on all devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, reduce, update_wrapper, wraps
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

#: How products of float32 are made: "tf32" of 10 bits, "tf32x3" of three of these, nearly as exact
#: as "ieee".
Precision: TypeAlias = Literal["tf32", "tf32x3", "ieee"]
#: Whether kernels are interpreted, which is decided before they are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """How a kernel is launched.

    Args:
        blocks: sizes of the blocks that a program holds, in the kernel's own order.
        warps: threads of a program, by 32.
        stages: how many blocks are loaded ahead.
    """

    blocks: tuple[int, ...]
    warps: int
    stages: int


#: By architecture, and by whether numbers are of "half" or "single" precision.
Table: TypeAlias = dict[str, dict[str, Config]]


def is_compiled(*tensors: Tensor) -> bool:
    """Whether compiled kernels take these tensors; integers are of any type."""
    if os.environ.get("NETTRACE_KERNELS") == "torch" or not _has_triton():
        return False
    numbers = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return all(t.is_cuda or (INTERPRETED and t.device.type == "cpu") for t in tensors) and all(
        t.dtype in _TYPES for t in numbers
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def architecture(device: torch.device) -> str:
    """Under which name a device's configurations stand."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100", 12: "sm120"}.get(major, "sm80")


def configured(table: Table, x: Tensor) -> Config:
    """The configuration for what is like `x`."""
    return table[architecture(x.device)]["single" if x.dtype == torch.float32 else "half"]


def products(x: Tensor, precision: Precision) -> str:
    """Triton's word for how products are made."""
    if x.dtype != torch.float32:
        return "tf32"  # which half precision takes no notice of
    if x.device.type != "cuda":
        return "ieee"
    return "bf16x3" if torch.version.hip and precision == "tf32x3" else precision


def operation(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Makes a function of tensors an operation of torch, "nettrace::name", without a derivative.

    It has the function's signature and documentation, and is computed outside autocast.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*arguments, **options)

        schema = torch.library.infer_schema(function, mutates_args=())
        whole = f"nettrace::{name}"
        made = torch.library.custom_op(whole, called, mutates_args=(), schema=schema)

        def derived(*_: Any) -> None:
            raise RuntimeError(f"{whole} has no derivative: detach what it is given")

        made.register_autograd(derived)
        update_wrapper(made, function)
        return made

    return register


def known(precision: str) -> Precision:
    """The same, if it is one of the precisions; ValueError else."""
    for one in get_args(Precision):
        if precision == one:
            return one  # type: ignore[no-any-return]
    words = ", ".join(get_args(Precision))
    raise ValueError(f"expected a precision of {words}, got {precision!r}")


def check_real(**tensors: Tensor) -> None:
    """Raises ValueError if tensors are not of real numbers, or on several devices."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"expected {name} of a real floating type, got {x.dtype}")
    check_device(**tensors)


def check_device(**tensors: Tensor) -> None:
    """Raises ValueError if tensors are on several devices."""
    if len({x.device for x in tensors.values()}) > 1:
        told = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"expected all tensors on one device, got {told}")


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Computes without derivatives, and in the types that numbers have, whatever is around."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def summing(*tensors: Tensor) -> torch.dtype:
    """The type in which products of numbers of these types are added up: float32 at least."""
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def summed(parts: Tensor) -> Tensor:
    """The sum over the first axis, which costs nothing if there is nothing to add."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def widened(x: Tensor) -> Tensor:
    """The same, in float32 where the interpreter has no arithmetic of the type."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type != "cuda" else x


def divided(count: int, by: int) -> int:
    """How many blocks there are."""
    return -(-count // by)


def split(programs: int, most: int) -> int:
    """Among how many programs to share the work of one, so that a device has enough of them.

    By shapes alone, so that sums are of the same parts on all devices.
    """
    return max(1, min(most, 512 // max(1, programs)))
