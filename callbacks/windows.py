"""Windows of weights that the callbacks of one trainer ask for, fed after each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import RandomSampler
from torch.utils.data.distributed import DistributedSampler

from nettrace.unwrapped import plain_model, plain_optimizers
from nettrace.waiting import settings
from nettrace.window import WeightWindow

if TYPE_CHECKING:
    from nettrace.callbacks.trace import Trace


class Windows:
    """The windows of one fit: callbacks that ask for the same share one.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        callbacks: its callbacks, of which some have windows.

    Attributes:
        of: by callback, its window.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: Sequence[Trace]) -> None:
        self._trainer = trainer
        self._module = plain_model(module)
        self.of: dict[Trace, WeightWindow] = {}
        #: By what was asked for, the window, and how many updates it does not see.
        self._known: dict[str, tuple[WeightWindow, int]] = {}
        for callback in callbacks:
            if callback.window is not None:
                asked = settings(callback.window)
                key = str((asked, callback.burn_in))
                if asked["population"] is None:
                    asked["population"] = _population(trainer)
                window, _ = self._known.setdefault(key, (WeightWindow(**asked), callback.burn_in))
                self.of[callback] = window

    def see(self, step: int, samples: float) -> None:
        """Shows the weights to all of them.

        Args:
            step: how many updates the weights have had.
            samples: how many samples were seen so far.
        """
        optimizers = plain_optimizers(self._trainer.optimizers)
        for window, burn_in in self._known.values():
            if step >= burn_in:
                window.see(self._module, step, optimizers, samples)

    def about(self, callback: Trace) -> dict[str, Any]:
        """What to note of a callback's window, if it has one."""
        if callback not in self.of:
            return {}
        return {"window": {**settings(self.of[callback]), "burn_in": callback.burn_in}}


def _population(trainer: Any) -> int | None:
    """How many samples an epoch deals out, each once in an order of its own; None if unknown."""
    loader = trainer.train_dataloader
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler):
        dealt = not sampler.replacement and sampler.num_samples == len(loader.dataset)
    else:
        dealt = isinstance(sampler, DistributedSampler) and sampler.shuffle
    return len(loader.dataset) if dealt and trainer.num_training_batches == len(loader) else None
