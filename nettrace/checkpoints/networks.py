"""Networks with the weights of the checkpoints of a run."""

from __future__ import annotations

import copy

import torch
from torch import nn

from nettrace.checkpoints.building import Model, build, is_fixed
from nettrace.checkpoints.contents import Checkpoint, Contents
from nettrace.checkpoints.reading import load
from nettrace.checkpoints.restoring import restore
from nettrace.freeze import random_states


class Networks:
    """Makes networks with the weights of checkpoints, or puts them into one where that will do.

    Args:
        first: a checkpoint of the run.
        model: the network, which is left as it is, or what makes it; see `build`.
        seed: what is random in a network and in no checkpoint is the same each time.
        allow_pickle: whether the code in checkpoints may be run.

    Raises:
        LocateError: if what is given is no network, and makes none.
    """

    def __init__(
        self, first: Checkpoint, model: Model = None, seed: int = 0, allow_pickle: bool = False
    ) -> None:
        self._given, self._seed, self._allow_pickle = model, seed, allow_pickle
        self._one = self._new(first) if is_fixed(model) else None

    def load(self, checkpoint: Checkpoint) -> tuple[nn.Module, Contents]:
        """The network with the weights of a checkpoint, and what else is in that.

        It may be the one that an earlier call returned, with other weights.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or does not fit.
        """
        return self._filled(checkpoint, self._one)

    def apart(self, checkpoint: Checkpoint) -> tuple[nn.Module, Contents]:
        """The same, of a network of its own."""
        return self._filled(checkpoint, None)

    def _filled(
        self, checkpoint: Checkpoint, model: nn.Module | None
    ) -> tuple[nn.Module, Contents]:
        contents = load(checkpoint, self._allow_pickle)
        model = self._new(checkpoint) if model is None else model
        restore(model, contents.state)
        return model, contents

    def _new(self, checkpoint: Checkpoint) -> nn.Module:
        """A network with any weights."""
        with random_states(set()):
            torch.manual_seed(self._seed)
            found = build(checkpoint, self._allow_pickle, self._given)
        return found if self._given is None else copy.deepcopy(found)  # perhaps somebody's own
