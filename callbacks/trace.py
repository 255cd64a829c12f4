"""The Lightning callbacks: a tracer at the trainer's steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from nettrace.callbacks.lightning import Callback
from nettrace.callbacks.request import Request
from nettrace.callbacks.session import Session


class Trace(Request, Callback):
    """Measures the network while Lightning trains it, without touching the training.

    A measurement at step k sees the weights after k optimizer steps: before the training at step 0,
    else right after the k-th step, so that a checkpoint of that step is judged by its own weights.
    Several of these callbacks on one trainer share one pass where they share a probe. What measures
    need of earlier looks is saved with checkpoints, so that a resumed run compares with the first
    look of all. A loss that is not declared is held against the one that the first training step
    returns; if that is another, what rests on it is missing from then on, with the reason.

    The arguments are those of `Request`.
    """

    #: Of several callbacks of a trainer, the first measures for all.
    _session: Session | None = None
    #: What the sessions before this left, where this callback measures for all.
    _past: Mapping[str, Any] = MappingProxyType({})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the probe, together with the trainer's other callbacks of this kind."""
        peers = _peers(trainer)
        # The first of them measures for all, so that they share one pass.
        if peers[0] is self:
            past = self._past if trainer.global_step else {}  # a run of its own has none
            self._session = Session(trainer, pl_module, peers, past)
            self._session.measure(trainer.global_step, batches=0)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates the first batch, where the loss is not declared."""
        if self._session is not None:
            self._session.begin_batch(batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures the weights as this batch left them."""
        if self._session is not None:
            self._session.end_batch(outputs)
            self._session.measure(trainer.global_step, batches=batch_idx + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures last where that is asked for, and says which callbacks never measured."""
        if self._session is not None:
            self._session.measure_last(trainer.global_step)
            self._session.close()
            self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the run; what was measured is on disk."""
        self._leave()

    # Not in `state_dict`, which is one callback's own: what peers share is saved once.

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Saves what measures need of earlier looks as "nettrace", and the trace's files."""
        if _peers(trainer)[0] is not self:
            return
        if self._session is not None:
            self._session.sync()
            self._past = self._session.state_dict()
        if self._past:
            checkpoint["nettrace"] = self._past

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Goes on from there."""
        self._past = checkpoint.get("nettrace", {})

    def _leave(self) -> None:
        if self._session is not None:
            self._past = self._session.state_dict()
            self._session = None


def _peers(trainer: Any) -> list[Trace]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Trace)]


class NTKTrace(Trace):
    """`Trace` of the neural tangent kernel: its trace, spectrum, entropies and the whole of it."""

    def __init__(self, measures: str | Iterable[str] = "ntk", **options: Any) -> None:
        super().__init__(measures, **options)


class FisherTrace(Trace):
    """`Trace` of the trace of the Fisher information, exact, estimated and empirical."""

    def __init__(self, measures: str | Iterable[str] = "fisher", **options: Any) -> None:
        super().__init__(measures, **options)


class CollectiveVariables(Trace):
    """`Trace` of collective variables: entropies of the kernel, and what makes up the gradient."""

    def __init__(self, measures: str | Iterable[str] = "collective", **options: Any) -> None:
        super().__init__(measures, **options)
