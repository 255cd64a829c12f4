"""The Lightning callbacks: a tracer at the trainer's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from nettrace.callbacks.lightning import Callback
from nettrace.callbacks.request import Request
from nettrace.callbacks.session import Session
from nettrace.explanation import Explanation
from nettrace.measures import resolve
from nettrace.missing import told, warn_missing
from nettrace.recording import OnError
from nettrace.schedule import Every
from nettrace.statistics import StepStatistics


def _spared(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of which an error that nobody foresaw ends the measuring, but not the training."""

    @wraps(hook)
    def spared(self: Trace, trainer: Any, *arguments: Any) -> None:
        try:
            hook(self, trainer, *arguments)
        except Exception as error:
            if any(peer.on_error == "raise" for peer in _peers(trainer)):
                raise
            if self._session is not None:
                self._session.forget()
            self._session = None
            warn_missing(
                f"{type(self).__name__} measures no more in this training: {hook.__name__} failed "
                f"by {told(error)}. Report it, please, with the traceback that "
                "on_error='raise' gives",
                stacklevel=2,
            )

    return spared


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

    #: Whether the training's own steps are measured, rather than a probe.
    of_steps = False
    #: How many updates a window of weights does not see.
    burn_in = 0
    #: Of several callbacks of a trainer, the first measures for all.
    _session: Session | None = None
    #: What the sessions before this left, where this callback measures for all.
    _past: Mapping[str, Any] = MappingProxyType({})

    @_spared
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the probe, together with the trainer's other callbacks of this kind."""
        peers = _peers(trainer)
        # The first of them measures for all, so that they share one pass.
        if peers[0] is self:
            past = self._past if trainer.global_step else {}  # a run of its own has none
            self._session = Session(trainer, pl_module, peers, past)
            self._session.measure(trainer.global_step, batches=0)

    @_spared
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates the first batch, where the loss is not declared."""
        if self._session is not None:
            self._session.begin_batch(batch, batch_idx)

    @_spared
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Measures the training step, where that is asked for."""
        if self._session is not None:
            self._session.before_backward(loss)

    @_spared
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Sees the gradients of a micro-batch, where samples could not be told apart."""
        if self._session is not None:
            self._session.after_backward()

    @_spared
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures the weights as this batch left them."""
        if self._session is not None:
            self._session.end_batch(outputs)
            self._session.measure(trainer.global_step, batches=batch_idx + 1)

    @_spared
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

    @_spared
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
            self._session.flush(last=True)
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


class GradientStatistics(Trace):
    """The gradients of single samples in the training's own steps, read off the tapes of its loss.

    Needs no probe, no configuration and no forward pass: before the backward pass of a step that is
    due, the tape of its loss tells what each sample of the batch contributes. Works for any loss
    that is a mean or sum over the samples of the batch, whose number is the length that most of
    its tensors have. Steps whose tensors or modules have hooks on gradients are not measured, since
    these would be called. In batch normalisation, the statistics of the batch are held constant.
    Values at step k are those of the batch of the update after the k-th. Of several backward passes
    of a batch, as in manual optimisation, the second and later have names of their own, such as
    "gradients/noise_backward_2". Of several processes, the batches of all count as one. Where
    samples are coupled, as by a contrastive loss, signal, noise and noise scale are those of the
    micro-batches over which gradients are accumulated, whose gradients are kept until the update,
    or of the batches of several processes, if there are several of either.

    Also the kernel and the Fisher information, where the tape tells what the outputs are: "ntk" and
    "fisher", or their measures by name, for a loss that is cross-entropy (of classes or
    probabilities, smoothed, weighted or with targets to ignore), binary cross-entropy, a squared
    error or that of counts by their logarithmic rates. The batch of the step is then the probe, in
    the network's own mode; what was found is noted beside each value, and another loss is the
    reason for what is missing. Weights in the loss make no difference, but for zeros.

    Args:
        measures: names of measures or groups; of a group, those that a training step has: none that
            compare with an earlier look, as batches differ. "gradients/critical_batch_size" is one
            for which no group stands, since it takes as long as a hundred training steps.
        every: as in `Trace`.
        to: as in `Trace`.
        log: as in `Trace`.
        prefix: as in `Trace`.
        on_error: as in `Trace`.
        budget: as in `Trace`.

    Raises:
        ValueError: if a measure is unknown or none of a training step, the schedule never fires, or
            the budget is no share.
    """

    of_steps = True

    def __init__(
        self,
        measures: str | Iterable[str] = "gradients",
        *,
        every: Every = 100,
        to: str | Path | None = None,
        log: bool = True,
        prefix: str = "",
        on_error: OnError = "record",
        budget: float | None = None,
    ) -> None:
        names = [measures] if isinstance(measures, str) else list(measures or ())
        known = StepStatistics.known()
        groups = [[m.name for m in resolve([n]) if known.issuperset(m.needs)] or [n] for n in names]
        super().__init__(
            [name for group in groups for name in group],
            every=every,
            to=to,
            log=log,
            prefix=prefix,
            on_error=on_error,
            budget=budget,
        )
        others = [m.name for m in self.measures if not known.issuperset(m.needs)]
        if others:
            raise ValueError(
                f"{others[0]!r} is not measured in training steps, but on a probe: pass it to Trace"
            )

    def explain(self, model: nn.Module) -> Explanation:
        """Nothing: what a step costs depends on the batches of the training.

        Raises:
            ValueError: always, with what tells it instead.
        """
        raise ValueError(
            "what measuring a training step costs depends on its batch: nettrace/step_seconds in "
            "the trace has it, and budget= limits it"
        )
