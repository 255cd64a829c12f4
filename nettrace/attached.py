"""A tracer that follows a training by itself, by the steps of its optimizer."""

from __future__ import annotations

import math
import operator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from nettrace.missing import warn_missing
from nettrace.schedule import bound
from nettrace.unwrapped import plain_optimizers

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from nettrace.tracer import Optimizers, Tracer


class Attached:
    """The context of `Tracer.attached`, and how far the training in it has come.

    On entering, the weights are measured as they are, if that step is due; then after each step
    that is. On leaving, also by an exception, the trace is on disk and nothing is left behind.
    A schedule that has the last step measures it on leaving, unless by an exception. A window of
    weights sees them after each step; measures of it are taken at steps that are due once it is
    full, and are missing at the last if it never was. One that the tracer made is then let go of.

    Attributes:
        step: how many updates the weights have had; to be saved with checkpoints.
    """

    def __init__(self, tracer: Tracer, model: nn.Module, optimizer: Optimizers, step: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        self.step = operator.index(step)
        if self.step < 0:
            raise ValueError(f"expected a step of at least 0, got {step}")
        self._optimizers = plain_optimizers(optimizer)
        if not self._optimizers or not isinstance(self._optimizers[-1], Optimizer):
            kind = type(self._optimizers[-1] if self._optimizers else optimizer).__name__
            raise TypeError(
                f"expected a torch.optim.Optimizer, whose steps are counted, got {kind}: with "
                "another, call the tracer after each step"
            )
        self._tracer = tracer
        self._model = model
        self._due = bound(tracer.due, math.inf, math.inf)
        self._measured: int | None = None
        self._handle: RemovableHandle | None = None
        self._warned = False

    def __enter__(self) -> Attached:
        if self._handle is not None:
            raise RuntimeError("this context has been entered already: call attached() for another")
        if self.step:
            self._tracer.take_up(self.step)
        self._measure()
        self._handle = self._optimizers[-1].register_step_post_hook(self._stepped)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        try:
            if error is None and getattr(self._due, "last", False) and self._measured != self.step:
                self._record(last=True)
            if error is None:
                self._tracer.conclude(self._model, self.step, self._optimizers)
        finally:
            self._tracer.forget()
            self._tracer.sync()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """After each step of the optimizer; GradScaler does not call those that it skips."""
        # But fused optimizers, which it tells of infinities so that they skip by themselves.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return
        self.step += 1
        try:
            self._measure()
        except Exception as failure:
            if self._tracer.on_error == "raise":
                raise
            if not self._warned:
                self._warned = True
                text = f"cannot measure at step {self.step}: {type(failure).__name__}: {failure}"
                warn_missing(text, stacklevel=2)

    def _measure(self) -> None:
        if self._due(self.step):
            self._record()
        else:
            self._tracer.watch(self._model, self.step, self._optimizers)

    def _record(self, last: bool = False) -> None:
        self._tracer.record(self._model, self.step, self._optimizers, last=last)
        self._measured = self.step
