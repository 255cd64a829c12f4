"""Any checkpoint, by its format."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nettrace.checkpoints import distributed, hugging_face, pickled
from nettrace.checkpoints.contents import Checkpoint, CheckpointError, Contents, is_step, told

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def load(checkpoint: Checkpoint | str | Path, allow_pickle: bool = False) -> Contents:
    """Loads a checkpoint onto the CPU.

    Files are mapped into memory rather than copied, where their format allows. Checksums are
    compared where there are any: in files that torch.save wrote.

    Of several states in one file, the weights that were trained are taken: what is under
    "state_dict", "model_state_dict", "model", "module", "net", "network" or "weights", in this
    order. An average of them ("model_ema", "ema", "ema_state_dict", ...) is taken if there is
    nothing else.

    Args:
        checkpoint: one that `find` found, a file, or the folder of a Hugging Face model or of a
            distributed checkpoint.
        allow_pickle: whether to run the code that a file may hold, as pickle does. Only for files
            whose author is trusted.

    Returns:
        What is in it; its step is that of a `Checkpoint`, else what the content says, else
        its name, else its epoch, else 0.

    Raises:
        CheckpointError: if it cannot be read or is refused.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    found = read(path, allow_pickle)
    if not path.is_dir():
        pickled.check(path)
    if isinstance(checkpoint, Checkpoint):
        return replace(found, step=checkpoint.step, coordinates=checkpoint.coordinates)
    step, epoch = place(path, found)
    step = int(epoch or 0) if step is None else step
    return replace(found, step=step, coordinates={} if epoch is None else {"epoch": epoch})


def place(path: Path, found: Contents) -> tuple[int | None, float | None]:
    """The step and the epoch of a checkpoint, from its content or else from its name."""
    step = step_in_name(path) if found.step is None else found.step
    return step, found.coordinates.get("epoch", epoch_in_name(path))


def read(path: Path, allow_pickle: bool = False, glance: bool = False) -> Contents:
    """What a checkpoint holds, by the words of its content alone.

    Args:
        path: a file or folder.
        allow_pickle: as in `load`.
        glance: whether weights may be left out where they are not mapped into memory.

    Raises:
        CheckpointError: if it cannot be read or is refused.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint {path}")
        if path.is_dir():
            if distributed.is_folder(path):
                return distributed.read(path, allow_pickle, glance)
            if hugging_face.is_folder(path):
                return hugging_face.read_folder(path, allow_pickle)
            raise CheckpointError(f"{path} is a folder, but no checkpoint")
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty: was it being written?")
        if hugging_face.SHARD.search(path.name):
            raise CheckpointError(
                f"{path} is one of several files of a checkpoint: give its folder, with an index "
                "*.index.json in it"
            )
        return hugging_face.read_file(path, allow_pickle)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a hostile file may lead to
        raise CheckpointError(f"{path} cannot be read: {told(error)}") from error


def is_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint by itself."""
    return distributed.is_folder(path) or hugging_face.is_folder(path)


_END = r"[=_\-. ]?(\d+)(?![0-9a-z])"
#: The letter s alone may be a seed, unless an epoch is before it: "e5_s500".
_STEP = re.compile(
    r"(?<![a-z])(?:global[_-]?)?(?:steps?|iter(?:ation)?s?|it)" + _END + r"|(?<![a-z0-9])"
    r"e\d+[_\-.]s(\d+)(?![0-9a-z])"
)
_EPOCH = re.compile(
    r"(?<![a-z])(?:epochs?|ep)" + _END + r"|(?<![a-z0-9])e(\d+)[_\-.]s\d+(?![0-9a-z])"
)
_ANY = re.compile(r"(?:checkpoint|ckpt|model|weights|state|params|snapshot|save|net)?" + _END)
_LAST = re.compile(r"(.*[=_\-. ])(\d+)")


def step_in_name(path: Path) -> int | None:
    """The step that the name of a checkpoint, or of the folder that it is in, tells."""
    for name in (path.name, path.parent.name):
        if found := _STEP.search(name.lower()):
            return _step(found[1] or found[2])
    for name in (_stem(path), path.parent.name):
        # Folders of runs may be called 1 and 2; an epoch is no step.
        found = _ANY.fullmatch(name)
        if found and not (name.isdecimal() and name != _stem(path)):
            return _step(found[1])
    return None


def epoch_in_name(path: Path) -> float | None:
    """The epoch that the name of a checkpoint, or of the folder that it is in, tells."""
    for name in (path.name, path.parent.name):
        if found := _EPOCH.search(name.lower()):
            epoch = _step(found[1] or found[2])
            return None if epoch is None else float(epoch)
    return None


def number_in_name(path: Path) -> tuple[str, int | None]:
    """The number that a name ends in, which may be anything, and what stands before it."""
    found = _LAST.fullmatch(_stem(path))
    return (found[1], _step(found[2])) if found else ("", None)


def _step(digits: str) -> int | None:
    return int(digits) if len(digits) < 20 and is_step(int(digits)) else None


def _stem(path: Path) -> str:
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in SUFFIXES else name
