"""Checkpoints among files and folders, in the order of their steps."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nettrace.checkpoints import pickled, reading
from nettrace.checkpoints.contents import Checkpoint, CheckpointError, Contents

#: What training scripts write beside weights.
_OTHERS = re.compile(
    r"(^|[._-])(optim(izers?)?(_states?)?|(lr_)?scheduler|scaler|rng_state|random_states?"
    r"|training_args)([._-]|$)"
)


def find(
    paths: str | Path | Iterable[str | Path], allow_pickle: bool = False
) -> tuple[list[Checkpoint], dict[Path, CheckpointError]]:
    """Finds checkpoints and tells their steps.

    The step is what the content says (`global_step`, `step`, ...), else what the name of the file
    or of its folder says: "step=100", "step_100", "iter100", "e5_s100", or "checkpoint-100",
    "model_100", "weights.100" and the like, or "100" alone. An epoch ("epoch=3", "epoch_3", "ep3",
    "e3_s100") is no step. But where none tells a step, those that tell an epoch have that for a
    step; and where none tells an epoch either, and names are the same but for a number after a
    separator at their end ("run_44.pt", "run_45.pt"), that number is the step. What tells less than
    others cannot be used. A single checkpoint of which nothing is known has step 0, so that a
    published model needs no renaming. Of two with one step, that whose name tells it is kept; the
    other is left out if its weights are equal, like Lightning's last.ckpt, else it is broken.

    Args:
        paths: files, folders to search with all that lie within, and patterns such as
            "runs/*/*.ckpt"; or one of these. What is no checkpoint is passed over in folders and
            patterns.
        allow_pickle: whether to run the code that files may hold, as pickle does. Only for files
            whose author is trusted.

    Returns:
        The checkpoints in the order of their steps, and why others cannot be used.

    Raises:
        CheckpointError: if a path does not exist, or there is nothing like a checkpoint.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    places = [Path(path) for path in paths]
    seen: dict[Path, _Seen] = {}
    broken: dict[Path, CheckpointError] = {}
    passed: list[str] = []
    for path, named in _candidates(places):
        try:
            found = reading.read(path, allow_pickle, glance=True)
            seen[path] = _Seen.of(path, found)
        except pickled.NotWeights as error:
            if named:
                broken[path] = error
            else:
                passed.append(str(error))
        except CheckpointError as error:
            broken[path] = error
    if not seen and not broken:
        more = [f"{len(passed) - 3} more files"] * (len(passed) > 3)
        raise CheckpointError(
            f"there is no checkpoint in {', '.join(map(str, places)) or 'an empty list'}: searched "
            f"for files {', '.join('*' + suffix for suffix in reading.SUFFIXES)}, for Hugging Face "
            "folders with config.json, and for distributed checkpoints with .metadata"
            + "".join(f"; passed over: {one}" for one in [*passed[:3], *more])
        )
    stepped = list(_stepped(seen.values(), broken))
    by_step: dict[int, _Seen] = {}
    for one in sorted(stepped, key=lambda s: (s.step or 0, not s.step_in_name, str(s.path))):
        kept = by_step.setdefault(one.step or 0, one)
        if kept is not one:
            try:
                equal = _equal(kept.path, one.path, allow_pickle)
            except CheckpointError as error:
                broken[one.path] = error
                continue
            if not equal:
                broken[one.path] = CheckpointError(
                    f"{one.path} has other weights than {kept.path}, of the same step "
                    f"{one.step}: give one run at a time, or rename it to ...step={one.step}..."
                )
    return [one.checkpoint() for one in by_step.values()], broken


@dataclass
class _Seen:
    path: Path
    step: int | None
    epoch: float | None
    misstated: str | None
    step_in_name: bool
    size: int
    modified: float

    @classmethod
    def of(cls, path: Path, found: Contents) -> _Seen:
        step, epoch = reading.place(path, found)
        in_name = step is not None and step == reading.step_in_name(path)
        try:
            files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
            about = [file.stat() for file in files]
        except OSError as error:  # as if it is being replaced
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        size, modified = sum(one.st_size for one in about), max(one.st_mtime for one in about)
        return cls(path, step, epoch, found.misstated, in_name, size, modified)

    def checkpoint(self) -> Checkpoint:
        coordinates = {} if self.epoch is None else {"epoch": self.epoch}
        return Checkpoint(self.path, self.step or 0, coordinates, self.size, self.modified)


def _stepped(seen: Iterable[_Seen], broken: dict[Path, CheckpointError]) -> Iterator[_Seen]:
    """Those whose steps are known, or that are given steps where none are."""
    seen = list(seen)
    if all(one.step is None and one.misstated is None for one in seen):
        _number(seen)
    for one in seen:
        if one.step is not None:
            yield one
            continue
        reason = "does not tell its step"
        if one.misstated is not None:
            reason = f"says {one.misstated}, which is no number of updates (0, 1, ..., 2^63 - 1)"
        elif one.epoch is not None:
            reason += f", only its epoch {one.epoch:g}"
        broken[one.path] = CheckpointError(
            f"{one.path} {reason}: rename it to {one.path.stem}-step=100{one.path.suffix}, with "
            "its step in place of 100"
        )


def _number(seen: list[_Seen]) -> None:
    """Gives steps where nothing tells any: epochs, else numbers in names that are alike."""
    numbers = [reading.number_in_name(one.path) for one in seen]
    alike = Counter(text for text, number in numbers if number is not None)
    for one, (_, number) in zip(seen, numbers, strict=True):
        if len(seen) == 1 or one.epoch is not None:
            one.step = int(one.epoch or 0)
        elif len(alike) == 1 and alike.total() > 1 and all(s.epoch is None for s in seen):
            one.step = number


def _candidates(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """What may be a checkpoint, each once, and whether it was named rather than searched for."""
    met: set[Path] = set()
    for path in paths:
        named = path.exists()
        matches = [path] if named else sorted(glob.glob(str(path), recursive=True))
        places = [Path(match) for match in matches]
        if not places:
            raise CheckpointError(f"there is no {path}, nor anything that matches it as a pattern")
        for place in places:
            if named and not place.is_dir():
                candidates: Iterable[Path] = [place]
            else:
                candidates = _within(place)
            for candidate in candidates:
                if (real := candidate.absolute()) not in met:
                    met.add(real)
                    yield candidate, named and candidate == place


def _within(place: Path) -> Iterator[Path]:
    """What may be a checkpoint in a folder, itself included, or at a file."""
    if not place.is_dir():
        if _promising(place):
            yield place
        return
    whole = reading.is_folder(place)
    if whole:
        yield place
    try:
        paths = sorted(place.iterdir())
    except OSError as error:
        raise CheckpointError(f"{place} cannot be searched: {error}") from error
    for path in paths:
        if not path.name.startswith(".") and (path.is_dir() or not whole):
            if not (path.is_dir() and path.is_symlink()):  # which may lead round in circles
                yield from _within(path)


def _promising(file: Path) -> bool:
    """Whether a file may hold weights, by its name; and by its beginning if it is called .bin."""
    if file.suffix not in reading.SUFFIXES or _OTHERS.search(file.stem.lower()):
        return False
    if file.suffix != ".bin":
        return True
    try:
        with file.open("rb") as stream:
            return stream.read(2) in (b"PK", b"\x80\x02")
    except OSError:
        return True  # which reading it will report


def _equal(one: Path, other: Path, allow_pickle: bool) -> bool:
    """Whether two checkpoints hold the same weights."""
    if one.resolve() == other.resolve():
        return True
    first, second = (reading.read(path, allow_pickle).state for path in (one, other))
    return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        try:
            return one.dtype == other.dtype and torch.equal(one, other)
        except RuntimeError:  # which cannot be compared, such as sparse ones
            return False
    return type(one) is type(other)  # extra state of a module
