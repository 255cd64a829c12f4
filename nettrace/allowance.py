"""The memory that one measurement may take: less, after it ran out."""

from __future__ import annotations

import gc
import re

import torch

from nettrace.differentiate import parse_bytes
from nettrace.operator import OverBudgetError

#: The smallest share of the budget with which it is still tried.
_LEAST = 1 / 64
_NO_MEMORY = re.compile(
    "out of memory|(can't|cannot) allocate memory|not enough memory|alloc_failed", re.IGNORECASE
)


class Allowance:
    """What is left of a memory budget: a quarter, each time that memory ran out.

    Args:
        budget: as in `nettrace.jacobian`.

    Raises:
        ValueError: if the budget cannot be read.
    """

    def __init__(self, budget: int | str) -> None:
        self._budget = self.bytes = parse_bytes(budget)

    @property
    def is_reduced(self) -> bool:
        """Whether memory ran out before."""
        return self.bytes < self._budget

    def may_help(self, error: Exception) -> bool:
        """Whether an error may not come again within less memory."""
        return is_out_of_memory(error) and self.bytes // 4 >= max(1, _LEAST * self._budget)

    def reduce(self) -> None:
        """Leaves a quarter, and frees what nobody holds any more."""
        self.bytes //= 4
        gc.collect()  # of the tape of the look that failed
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on whatever device; not that a result would exceed its budget."""
    if isinstance(error, OverBudgetError):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
