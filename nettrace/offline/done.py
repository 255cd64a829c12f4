"""What a trace holds already of checkpoints, and what is left to be measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nettrace.checkpoints import Checkpoint
from nettrace.measures import available
from nettrace.offline.witness import LOSSES, OUTPUTS
from nettrace.store import parts

#: By these coordinates a checkpoint is known to be the one that was measured.
SIZE, MODIFIED = "checkpoint_bytes", "checkpoint_modified"
#: In the provenance, how often a network of one name had been found to give other values: what an
#: interruption left of one does not count for the next.
GENERATION = "generation"


@dataclass(frozen=True)
class _Row:
    """What one analysis wrote of a checkpoint; of no generation if it is not as it was then."""

    asked: tuple[str, ...]
    missing: Mapping[str, str]
    generation: int | None
    witness: Mapping[str, float]


class Recorded:
    """What a trace holds of checkpoints.

    A measure of a checkpoint is done if it was asked for there, of the file as it is now, with the
    same provenance, whether it has a value, is missing or has no meaning. Where that differs, all
    that was asked for before is measured anew, so that what a trace says of a step is of one file.

    Args:
        folder: of the trace.
        checkpoints: of different steps.
        provenance: of what is measured now, with the probe's fingerprint as "probe".

    Raises:
        ValueError: if the trace is of another probe.
    """

    def __init__(
        self, folder: Path, checkpoints: Sequence[Checkpoint], provenance: Mapping[str, Any]
    ) -> None:
        #: How often a network was found to give other values than one of that name before.
        self.generation = 0
        self._steps = [checkpoint.step for checkpoint in checkpoints]
        self._rows: list[list[_Row]] = [[] for _ in checkpoints]
        positions = {step: place for place, step in enumerate(self._steps)}
        for part in parts(folder) if folder.is_dir() else ():
            if part.provenance.get("probe") != provenance["probe"]:
                raise ValueError(
                    f"{folder} holds the trace of another probe, {part.provenance.get('probe')}, "
                    f"not {provenance['probe']}: give each probe a folder of its own by --to "
                    "(to=...)"
                )
            asked = tuple(part.provenance.get("measures", ()))
            same = all(
                _unplaced(part.provenance.get(key)) == _unplaced(value)
                for key, value in provenance.items()
            )
            if same:  # the last says which network it is
                self.generation = part.provenance.get(GENERATION, 0)
            sizes, times = (part.coordinates.get(name) for name in (SIZE, MODIFIED))
            for row, step in enumerate(part.steps.tolist()):
                place = positions.get(step)
                if place is None or sizes is None or times is None:
                    continue  # another checkpoint's, or of the training itself
                one = checkpoints[place]
                valid = same and (sizes[row], times[row]) == (one.size, one.modified)
                layout = part.layouts[part.layout[row]]
                on_some = {n: next(iter(why.values()), "") for n, why in layout.missing_on.items()}
                missing = {**on_some, **layout.missing}
                witness = {
                    name: float(part.coordinates[name][row])
                    for name in (OUTPUTS, LOSSES)
                    if name in part.coordinates
                }
                generation = self.generation if valid else None
                self._rows[place].append(_Row(asked, missing, generation, witness))

    def witnesses(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Positions of checkpoints of which something is done, and what witnesses the network.

        Traces of older versions have no witnesses, and are believed.
        """
        for place, rows in enumerate(self._rows):
            for row in reversed(rows):
                known = not math.isnan(row.witness.get(OUTPUTS, math.nan))
                if known and row.generation == self.generation:
                    yield place, row.witness
                    break

    def left(self, measures: Sequence[str], retry: bool) -> list[tuple[str, ...]]:
        """By checkpoint, the measures that are left to be taken, in their order.

        Args:
            measures: those asked for now.
            retry: whether what is missing is left to be taken.
        """
        known = {measure.name for measure in available()}
        todo = []
        for place, rows in enumerate(self._rows):
            done = self._done(place)
            stale = {n for r in rows if r.generation != self.generation for n in r.asked}
            wanted = [*measures, *sorted((stale & known) - set(measures))]
            todo.append(
                tuple(n for n in wanted if n not in done or (retry and done[n] is not None))
            )
        return todo

    def missing(
        self, todo: Sequence[tuple[str, ...]], measures: Sequence[str]
    ) -> list[tuple[int, str, str]]:
        """Step, name and reason of what is missing, of measures asked for that are not left."""
        return [
            (step, name, reason)
            for place, step in enumerate(self._steps)
            for name, reason in self._done(place).items()
            if reason is not None and name in measures and name not in todo[place]
        ]

    def _done(self, place: int) -> dict[str, str | None]:
        """The measures that are done of a checkpoint, and why they are missing if they are."""
        found: dict[str, str | None] = {}
        for row in self._rows[place]:
            for name in row.asked:
                found.pop(name, None)  # whatever was said before does not count any more
                if row.generation == self.generation:
                    found[name] = row.missing.get(name)
        return found


def _unplaced(value: Any) -> Any:
    """The name "path/to/file.py:name" as it is given from the file's own folder."""
    return Path(value).name if isinstance(value, str) and ".py:" in value else value
