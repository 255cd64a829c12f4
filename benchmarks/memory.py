"""Peak resident memory of a call, on Linux."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def peak_memory(call: Callable[[], T]) -> tuple[T, int]:
    """The result of `call` and how far the resident set rose, at most, above where it began.

    Memory that earlier calls freed is handed back to the system first; what they only touched, such
    as the code of libraries, is not counted again. So warm up with something of another kind, and
    use a process of its own.

    Returns:
        The result and a number of bytes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = call()
    return result, _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
