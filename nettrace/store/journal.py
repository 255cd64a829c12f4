"""A writer that notes afterwards what it could not write."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nettrace.record import Record
from nettrace.store.writer import TraceWriter

#: What to do about it, for warnings.
UNWRITTEN = (
    "make room, or give a folder that can be written; each step is tried anew, and what was lost "
    "is noted as missing once that succeeds"
)
#: Of so many steps at most, the last ones.
_MOST = 1000


class Journal(TraceWriter):
    """Writes as `TraceWriter`; steps that could not be written are noted with the next that is.

    Their quantities are then missing, and the reason is what kept them from being written.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lost: deque[tuple[Sequence[Record], Mapping[str, float]]] = deque(maxlen=_MOST)

    def write(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """As `TraceWriter.write`."""
        try:
            while self._lost:
                super().write(*self._lost[0])
                self._lost.popleft()
            super().write(records, coordinates)
        except (OSError, TypeError, ValueError) as error:
            self._lost.append(([_lost(record, error) for record in records], dict(coordinates)))
            raise


def _lost(record: Record, error: Exception) -> Record:
    return replace(
        record,
        value=np.full((0,) * record.value.ndim, np.nan),
        standard_error=None,
        coordinates={},
        missing=record.missing or f"it was not written: {type(error).__name__}: {error}",
        missing_on={},
    )
