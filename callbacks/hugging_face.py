"""The callback for transformers' Trainer: a tracer at the trainer's steps."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nettrace import Probe, Record, Tracer
from nettrace.callbacks.loggers import numbers_of
from nettrace.callbacks.request import Request, report, warn_idle
from nettrace.callbacks.samples import batch_of
from nettrace.own_loss import LossCheck
from nettrace.schedule import Schedule, bound
from nettrace.waiting import settings
from nettrace.window import WeightWindow

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError(
        "TransformersTrace needs transformers and accelerate: pip install 'nettrace[transformers]'"
    ) from error

#: Beside the trainer's own files in a checkpoint's folder.
PAST = "nettrace.pt"


class TransformersTrace(Request, TrainerCallback):
    """Measures the network while transformers' Trainer trains it, without touching the training.

    A measurement at step k sees the weights after k optimizer steps as the trainer counts them,
    which includes those that its GradScaler skips. What measures need of earlier looks is saved
    with checkpoints, so that a resumed run compares with the first look of all.

    The arguments are those of `Request`; numbers appear in the trainer's `log_history` too.

    Example:
        `Trainer(model, arguments, callbacks=[TransformersTrace("ntk", every=100)], ...)`
    """

    _tracer: Tracer | None = None
    _due: Schedule
    _measured: int | None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the probe, and measures the network as it is."""
        self._said: set[str] = set()
        self._measured, self._tracer = None, None
        loader, begun = kwargs["train_dataloader"], state.global_step > 0
        each = math.inf
        with suppress(TypeError):  # of a stream
            each = math.ceil(len(loader) / args.gradient_accumulation_steps)
        self._due = bound(self.due, state.max_steps, each)
        try:
            tracer = Tracer(
                self.looking(self._samples_of(loader, args, kwargs["model"])),
                [measure.name for measure in self.measures],
                to=self.to,
                on_error=self.on_error,
                max_seconds=self.max_seconds,
                budget=self.budget,
                window=self.window and WeightWindow(**settings(self.window)),
            )
        except Exception as error:
            report(self, "cannot take a probe", error, self._said)
            return
        self._tracer = tracer
        if args.label_smoothing_factor:
            for one in tracer.each():
                if one.probe.losses is None and one.probe.likelihood is None:
                    one.loss_check = LossCheck(_SMOOTHED, agrees=False)
        if begun:
            tracer.take_up(state.global_step)
        if not begun or not self._remembers(tracer, args, state):
            self._measure_if_due(args, state, control, kwargs)
        else:
            self._watch(state, kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures the weights as this step left them."""
        self._measure_if_due(args, state, control, kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures last where that is asked for, if the training was stopped in this epoch."""
        if control.should_training_stop:
            self._measure_last(args, state, control, kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves what measures need of earlier looks in the checkpoint's folder."""
        if control.should_training_stop:  # by an evaluation after the epoch
            self._measure_last(args, state, control, kwargs)
        folder = _checkpoint(args, state)
        if self._tracer is None or not state.is_world_process_zero or not folder.is_dir():
            return
        try:
            torch.save(self._tracer.state_dict(), folder / f"{PAST}.part")
            os.replace(folder / f"{PAST}.part", folder / PAST)
        except Exception as error:
            report(self, f"cannot save what it needs to go on in {folder}", error, self._said)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings the trace to the disk, and says so if there is none."""
        if self._tracer is not None:
            if not args.load_best_model_at_end or state.best_model_checkpoint is None:
                self._measure_last(args, state, control, kwargs)
                self._take(self._tracer.conclude, args, state, control, kwargs)
            elif getattr(self.due, "last", False) and self._measured != state.global_step:
                lost = RuntimeError(
                    "the best weights have taken their place (load_best_model_at_end)"
                )
                report(self, "cannot measure the last weights", lost, self._said)
            self._tracer.sync()
            if self._measured is None:
                warn_idle(self, state.global_step)
            self._tracer = None

    def _measure_if_due(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
    ) -> None:
        try:
            due = self._due(state.global_step)
        except Exception as error:
            report(self, "has a schedule that fails", error, self._said)
        else:
            if due:
                self._measure(args, state, control, kwargs)
            else:
                self._watch(state, kwargs)

    def _watch(self, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        """Shows the weights to the window, if a measure needs one."""
        if self._tracer is not None:
            try:
                self._tracer.watch(kwargs["model"], state.global_step, kwargs["optimizer"])
            except Exception as error:
                report(self, "cannot watch the weights", error, self._said)

    def _measure_last(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Measures if the schedule has the last step, whichever that is, and it is not yet."""
        if getattr(self.due, "last", False) and self._measured != state.global_step:
            self._measure(args, state, control, kwargs, last=True)

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
        last: bool = False,
    ) -> None:
        if self._tracer is not None:
            record = partial(self._tracer.record, last=last)
            self._take(record, args, state, control, kwargs)

    def _take(
        self,
        record: Callable[..., list[Record]],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
    ) -> None:
        step, epoch = state.global_step, float(state.epoch or 0)
        try:
            records = record(kwargs["model"], step, kwargs["optimizer"], epoch=epoch)
        except ValueError as error:  # of a folder that holds another trace
            report(self, f"cannot write the trace to {self.to}", error, self._said)
            self._measured = step
            return
        if records:  # and nothing waits for a window of weights
            self._measured = step
        if self.logs and records:
            try:
                self._log(records, args, state, control)
            except Exception as error:
                report(self, "cannot log", error, self._said)

    def _log(
        self,
        records: Sequence[Record],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Logs as the trainer does, but leaves it to log its own numbers when it will."""
        found = [record for record in records if record.missing is None]
        logs = {**numbers_of(found, self.prefix), "epoch": state.epoch}
        state.log_history.append({**logs, "step": state.global_step})
        if handler := _handler():
            handler.call_event("on_log", args, state, control, logs=logs)

    def _samples_of(
        self, loader: Any, args: TrainingArguments, model: Any
    ) -> Probe | dict[str, Probe]:
        """The probes that are given, or one of the trainer's data, where the network is."""
        if isinstance(self.probe, Probe):
            return self.probe.to(args.device)
        if self.probe is not None:
            return {name: probe.to(args.device) for name, probe in self.probe.items()}
        with batch_of([loader], self.samples, model) as batch:
            return Probe.from_batch(batch).to(args.device)

    def _remembers(self, tracer: Tracer, args: TrainingArguments, state: TrainerState) -> bool:
        """Takes up what looks left, where the run is resumed; whether there was anything."""
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        folders = [f for f in (*folders, _checkpoint(args, state)) if _is_of(f, state)]
        past = next((f / PAST for f in folders if (f / PAST).is_file()), None)
        try:
            if past is not None:
                tracer.load_state_dict(torch.load(past, weights_only=True))
                return True
            if any(measure.reference for measure in self.measures):
                raise FileNotFoundError(
                    f"the checkpoint of step {state.global_step} is not in {args.output_dir}, or "
                    f"has no {PAST}: its folder may be given as "
                    "TrainingArguments(resume_from_checkpoint=...)"
                )
        except Exception as error:
            report(self, "cannot compare with the run before", error, self._said)
        return False


_SMOOTHED = (
    "the trainer smooths labels (label_smoothing_factor), and the loss is not declared: pass "
    "Probe(..., losses=...) with the loss that is trained"
)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Whether a checkpoint is that which the trainer's state was read from."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return False
    there = TrainerState.load_from_json(str(file)).log_history
    return json.dumps(there) == json.dumps(state.log_history)


def _handler() -> Any:
    """What calls the trainer's callbacks, which do not know each other; None if nothing does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), CallbackHandler):
            return found
        frame = frame.f_back
    return None
