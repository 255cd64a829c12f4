"""Checkpoints of any common format: found, read without running their code, and restored."""

from nettrace.checkpoints.building import build
from nettrace.checkpoints.contents import Checkpoint, CheckpointError, Contents
from nettrace.checkpoints.finding import find
from nettrace.checkpoints.reading import load
from nettrace.checkpoints.restoring import restore

__all__ = ["Checkpoint", "CheckpointError", "Contents", "build", "find", "load", "restore"]
