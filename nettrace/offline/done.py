"""What a trace holds already of checkpoints, and what is left to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nettrace.checkpoints import Checkpoint
from nettrace.measures import available
from nettrace.store import parts

#: By these coordinates a checkpoint is known to be the one that was measured.
SIZE, MODIFIED = "checkpoint_bytes", "checkpoint_modified"


def left_to_do(
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    measures: Sequence[str],
    provenance: Mapping[str, Any],
    retry: bool,
) -> list[tuple[str, ...]]:
    """The measures that are left to be taken of each checkpoint, in their order.

    A measure of a checkpoint is done if it was asked for there, of the file as it is now, with the
    same provenance, whether it has a value, is missing or has no meaning. Where that differs, all
    that was asked for before is measured anew, so that what a trace says of a step is of one file.

    Args:
        folder: of the trace.
        checkpoints: of different steps.
        measures: those asked for now.
        provenance: of what is measured now, with the probe's fingerprint as "probe".
        retry: whether what is missing is left to be taken.

    Raises:
        ValueError: if the trace is of another probe.
    """
    positions = {checkpoint.step: place for place, checkpoint in enumerate(checkpoints)}
    done: list[set[str]] = [set() for _ in checkpoints]
    stale: list[set[str]] = [set() for _ in checkpoints]
    missing: list[set[str]] = [set() for _ in checkpoints]
    for part in parts(folder) if folder.is_dir() else ():
        if part.provenance.get("probe") != provenance["probe"]:
            raise ValueError(
                f"{folder} holds the trace of another probe, {part.provenance.get('probe')}, not "
                f"{provenance['probe']}: give each probe a folder of its own by --to (to=...)"
            )
        asked = set(part.provenance.get("measures", ()))
        same = all(part.provenance.get(key) == value for key, value in provenance.items())
        sizes, times = (part.coordinates.get(name) for name in (SIZE, MODIFIED))
        for row, step in enumerate(part.steps.tolist()):
            place = positions.get(step)
            if place is None or sizes is None or times is None:
                continue  # another checkpoint's, or of the training itself
            one = checkpoints[place]
            if not same or (sizes[row], times[row]) != (one.size, one.modified):
                stale[place] |= asked
                continue
            layout = part.layouts[part.layout[row]]
            done[place] |= asked
            missing[place] -= asked
            missing[place] |= asked & {*layout.missing, *layout.missing_on}
    known = {measure.name for measure in available()}
    todo = []
    for place in range(len(checkpoints)):
        wanted = [*measures, *sorted((stale[place] & known) - set(measures))]
        done_here = done[place] - (missing[place] if retry else set())
        todo.append(tuple(name for name in wanted if name not in done_here))
    return todo
