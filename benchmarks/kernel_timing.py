"""Times of calls on a GPU by its own clock, and what that GPU does at most."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda"
#: Bytes of inputs that calls take in turn, so that no cache holds them.
ROTATED = 5e8
#: Seconds that calls are repeated for.
SPAN = 0.2


class Times(NamedTuple):
    """Seconds of a call: the median, and the first and last decile."""

    median: float
    low: float
    high: float


def timed(
    call: Callable[..., object], sets: Sequence[tuple[Any, ...]], span: float = SPAN
) -> Times:
    """How long a call takes on the GPU, with each set of arguments in turn."""
    for _ in range(3):
        call(*sets[0])
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(*sets[0])
    asked = time.perf_counter() - start
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    repeats = int(min(200, max(10, span / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    # While the GPU sleeps, calls are asked for, so that it then waits for none.
    torch.cuda._sleep(int(2e9 * min(0.5, 1.5 * repeats * asked)))
    for i, (before, after) in enumerate(events):
        before.record()
        call(*sets[i % len(sets)])
        after.record()
    torch.cuda.synchronize()
    seconds = [1e-3 * before.elapsed_time(after) for before, after in events]
    low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    return Times(float(middle), float(low), float(high))


def rotated(make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many sets of arguments, of different seeds, as no cache holds; at most 50."""
    first = make(0)
    count = int(min(50, 1 + ROTATED // max(1, size(first))))
    return [first, *(make(seed) for seed in range(1, count))]


def size(values: object) -> int:
    """Bytes of the tensors among some values."""
    if isinstance(values, Tensor):
        return values.numel() * values.itemsize
    return sum(map(size, values)) if isinstance(values, list | tuple) else 0


def doubled(values: Any) -> Any:
    """The same with numbers in float64."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    return type(values)(map(doubled, values)) if isinstance(values, list | tuple) else values


def peak(call: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    """Bytes that a call takes beside its arguments, what it returns included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call(*arguments)
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of matrix products."""
    x = torch.randn(2**28, device=DEVICE)
    y = torch.empty_like(x)
    found = {"copy": 2 * size(x) / timed(y.copy_, [(x,)]).median}
    n = 8192
    a = torch.randn(n, n, device=DEVICE)
    b = a.bfloat16()
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = 2 * n**3 / timed(torch.matmul, [(a, a)]).median
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    found["bf16"] = 2 * n**3 / timed(torch.matmul, [(b, b)]).median
    return found


def machine() -> dict[str, str]:
    """What results depend on: the GPU, its driver, and versions."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["Triton"] = triton.__version__
    except ImportError:
        found["Triton"] = "not installed"
    if not torch.cuda.is_available():
        return {"GPU": "none", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": properties.name,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": driver(),
        "CUDA": str(torch.version.cuda or torch.version.hip),
        **found,
    }


def driver() -> str:
    """The version of the GPU's driver, if nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return told.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def wall(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a call until the GPU has done it, the host's work included; the median."""
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken)
