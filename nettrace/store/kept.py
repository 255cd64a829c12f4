"""Records of a run in memory, read as those on disk are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from time import time
from typing import TYPE_CHECKING

import numpy as np

from nettrace.record import Record
from nettrace.store.writer import TraceWriter

if TYPE_CHECKING:
    import xarray as xr

#: What a record takes beside its arrays, in bytes, about.
_EACH = 1000


class Kept:
    """The records of a run, within limits: once there are more, every second step is let go of.

    So what is kept is evenly spaced among the steps that were recorded, and the last is always
    there; of steps that are too large for two, it alone.

    Args:
        most_bytes: what the records may take, about.
        most_steps: how many steps are kept, at most.
    """

    def __init__(self, most_bytes: int = 2**26, most_steps: int = 100_000) -> None:
        self._most_bytes, self._most_steps = most_bytes, max(2, most_steps)
        #: By step, how many steps came before it, and what was recorded.
        self._steps: dict[int, tuple[int, dict[str, Record], dict[str, float]]] = {}
        self._bytes: dict[int, int] = {}
        self._stride = 1
        #: How many steps there were.
        self.count = 0

    def add(self, records: Sequence[Record], coordinates: Mapping[str, float]) -> None:
        """Keeps the records of one step, with coordinates of that step such as the epoch."""
        if not records:
            return
        step = records[0].step
        if step not in self._steps:
            self._thin()
            self._steps[step] = self.count, {}, {}
            self.count += 1
        _, of_step, at = self._steps[step]
        of_step.update((record.name, record) for record in records)
        at.update({"wall_time": time(), **coordinates})
        self._bytes[step] = sum(map(_size, of_step.values()))
        while len(self._steps) > 1 and (
            len(self._steps) > self._most_steps or sum(self._bytes.values()) > self._most_bytes
        ):
            self._stride *= 2
            self._thin(but=step)
            if len(self._steps) == 2 and sum(self._bytes.values()) > self._most_bytes:
                self._drop(min(self._steps))

    def dataset(self) -> xr.Dataset:
        """What is kept, as `nettrace.open` gives it; all of it is in memory."""
        import xarray as xr  # which takes long to import

        from nettrace.store.dataset import dataset

        if not self._steps:
            return xr.Dataset(coords={"step": np.empty(0, np.int64)})
        with TemporaryDirectory(prefix="nettrace-") as folder:
            writer = TraceWriter(folder, "kept", start=None)
            for step in sorted(self._steps):
                _, records, coordinates = self._steps[step]
                writer.write(list(records.values()), coordinates)
            writer.close()
            found = dataset(folder).load()
        for name in ("folder", "attempts"):
            found.attrs.pop(name, None)
        return found

    def _thin(self, but: int | None = None) -> None:
        for step, (number, *_) in list(self._steps.items()):
            if number % self._stride and step != but:
                self._drop(step)

    def _drop(self, step: int) -> None:
        del self._steps[step], self._bytes[step]


def _size(record: Record) -> int:
    error = 0 if record.standard_error is None else record.standard_error.nbytes
    return _EACH + record.value.nbytes + error
