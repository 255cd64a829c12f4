"""The training's own steps, measured by the tapes of their losses."""

from __future__ import annotations

import inspect
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel.distributed import _DDPSink

from nettrace import CoupledSamplesError, Record
from nettrace.batch import tensors
from nettrace.callbacks.accumulated import Accumulated, scale_of
from nettrace.callbacks.lightning import silenced
from nettrace.freeze import random_streams
from nettrace.hooks import noted
from nettrace.ranks import Ranks
from nettrace.statistics import StepStatistics
from nettrace.statistics.micro_batches import MEASURES
from nettrace.tape import has_fused_attention, opaque
from nettrace.training_step import Look, StepTracer
from nettrace.unwrapped import is_spread

if TYPE_CHECKING:
    from nettrace.callbacks.trace import Trace


class Steps:
    """What some callbacks measure of the training's own steps.

    Args:
        trainer: the trainer.
        module: the network that it trains.
        callbacks: those callbacks.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: Sequence[Trace]) -> None:
        self._trainer = trainer
        self._module = module
        #: Without any, there is nothing to be called for.
        self.callbacks = list(callbacks)
        #: Those that are to measure this batch.
        self.due: list[Trace] = []
        self._tracers = {c.on_error: StepTracer(c.on_error) for c in callbacks}
        self._arguments: tuple[Any, ...] | None = None
        self._samples = 0
        #: How many updates the weights had had before this batch, and how many backward passes it
        #: has had since.
        self._step, self._passes = -1, 0
        self._put_back: Callable[[], None] | None = None
        self._watch: _Watch | None = None
        self._records: list[Record] = []
        #: Micro-batches, where some measures wait for all those of an update.
        self.accumulated: Accumulated | None = None

    def new(self, step: int) -> list[Trace]:
        """The callbacks, unless a batch has been seen since the weights were updated so often.

        Of gradients that are accumulated over several batches, those of the first are measured.
        """
        return self.callbacks if step != self._step else []

    def begin_batch(self, batch: Any, index: int, step: int, due: Sequence[Trace]) -> None:
        """Sees a batch before its training step, which some callbacks are due to measure."""
        if self.accumulated is not None and not self.accumulated.is_over:
            self.accumulated.begin_batch(_samples_in(batch))
            self._passes = 0
            return
        self.due = list(due)
        self._step = step
        self.forget()
        if not due:
            return
        self._passes = 0
        self._samples = _samples_in(batch)
        self._watch = _Watch()
        takes_index = len(inspect.signature(self._module.training_step).parameters) > 1
        self._arguments = (batch, index) if takes_index else (batch,)
        self._put_back = random_streams({p.device for p in self._module.parameters()})

    def measure(self, loss: Tensor) -> None:
        """Measures the loss of a step before its backward pass.

        Of an optimizer that evaluates a batch several times, the first evaluation.
        """
        automatic = self._module.automatic_optimization
        self._passes += 1
        if self.accumulated is not None:
            if self._passes == 1 and not self.accumulated.is_over:
                self.accumulated.before_backward()
                return
            self.conclude(whole=self._passes == 1)
            if self._arguments is None:  # of a batch that is not the first
                return
        if automatic and self._passes > 1:
            return
        scale, hooks = scale_of(self._trainer, automatic), ""
        if self._watch is not None:
            hooks = self._watch.seen()
            inner = self._watch.within(loss)
            if inner is not None:
                loss, scale = inner, 1.0
        hooks = "" if self._is_spread else hooks or _hooks_of(self._module)
        if hooks:
            self._take(partial(_refuse, hooks))
        else:
            self._measure(loss, scale, automatic)
        waiting = [tracer for tracer in self._tracers.values() if tracer.reason]
        if waiting and self._trainer.world_size > 1:
            given = (loss.view(()), self._module, self._samples, self._step, scale)
            self._records += [r for tracer in waiting for r in tracer.conclude_together(*given)]
        elif waiting:
            self.accumulated = Accumulated(self._trainer, self._module, self._samples)
            self.accumulated.before_backward()

    def _measure(self, loss: Tensor, scale: float, automatic: bool) -> None:
        if loss.numel() == 1:
            loss = loss.view(())
        model, samples, step = self._module, self._samples, self._step
        hidden = "fully_shard" if self._is_spread else opaque(loss)
        why = hidden and f"{hidden} hides a part of the network from the tape"
        if not why and self._is_twice and has_fused_attention(loss):
            why = "fused attention cannot be differentiated twice"
        if not why or not automatic:
            optimizers = self._trainer.optimizers
            self._take(
                lambda memory, ranks: StepStatistics(
                    *(loss, model, samples, step, memory, scale, None), optimizers, ranks
                )
            )
            return
        with silenced(model):
            own = float(loss.detach()) / scale
            self._take(partial(self._again, own, why))

    @property
    def _is_spread(self) -> bool:
        """Whether parameters are spread over processes, which put hooks of theirs on the tape."""
        return any(is_spread(p) for p in self._module.parameters())

    @property
    def _is_twice(self) -> bool:
        """Whether the loss is to be differentiated twice."""
        return any("gradient_curvature" in m.needs for c in self.due for m in c.measures)

    def _again(self, loss: float, why: str, memory: int, ranks: Ranks) -> StepStatistics:
        """The step evaluated anew with a tape that hides nothing, from the same random states."""
        assert self._put_back is not None
        assert self._arguments is not None
        start = time.perf_counter()
        self._put_back()
        # Attention that is not fused leaves a tape to be differentiated twice, for more memory.
        attention = sdpa_kernel(SDPBackend.MATH) if self._is_twice else nullcontext()
        with self._trainer.precision_plugin.train_step_context(), attention, noted() as hooks:
            returned = self._module.training_step(*self._arguments)
        if hooked := hooks[0] if hooks else _hooks_of(self._module):
            _refuse(hooked)
        again = returned["loss"] if isinstance(returned, Mapping) else returned
        seconds = time.perf_counter() - start
        evaluated = (
            f"again, as {why}, in {seconds:.2g} s more; its loss is {float(again.detach()):.6g}, "
            f"that of the training {loss:.6g}"
        )
        notes = {"evaluated": evaluated}
        return StepStatistics(
            *(again, self._module, self._samples, self._step, memory, 1.0, notes),
            *(self._trainer.optimizers, ranks),
        )

    def _take(self, look: Look) -> None:
        for on_error, tracer in self._tracers.items():
            measures = {m.name: m for c in self.due if c.on_error == on_error for m in c.measures}
            if measures:
                records = tracer.measure(
                    look, self._module, self._step, list(measures.values()), self._deferrable
                )
                self._records += [_numbered(record, self._passes) for record in records]

    @property
    def _deferrable(self) -> frozenset[str]:
        """What micro-batches would tell, of which there may be several, or other processes'."""
        trainer = self._trainer
        one = self._module.automatic_optimization and trainer.accumulate_grad_batches == 1
        alone = one and trainer.world_size == 1
        return frozenset() if alone or self._passes > 1 or self._is_spread else MEASURES

    def conclude(self, whole: bool) -> None:
        """Takes what micro-batches tell, if each backward pass so far was of a whole one."""
        accumulated, self.accumulated = self.accumulated, None
        for tracer in self._tracers.values():
            if accumulated is not None and tracer.reason:
                found = accumulated.statistics(tracer.reason) if whole else None
                self._records += tracer.conclude(found, accumulated.step)

    def forget(self) -> None:
        """Lets go of the batch, which may be large, and of what is watched meanwhile."""
        self._arguments = self._put_back = None
        if self._watch is not None:
            self._watch.seen()
            self._watch = None

    def taken(self, last: bool = False) -> tuple[list[Trace], list[Record]]:
        """The callbacks that were due in the batch that has ended, and the records.

        None as long as some wait for further micro-batches, unless there will be none.
        """
        if self.accumulated is not None and not last:
            if not self.accumulated.is_over:
                self.forget()
                return self.due, []
            self.conclude(whole=True)
        records, self._records = self._records, []
        self.forget()
        return self.due, records


class _Watch:
    """Notes what the training step does that its tape does not tell, from now until it is asked.

    That tensors are given hooks, and what DistributedDataParallel passes through an operation of
    its own, of which the backward pass is not to be called by others.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._found = self._stack.enter_context(noted())
        self._sunk: dict[Any, tuple[Any, ...]] = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._stack.enter_context(patch.object(_DDPSink, "apply", self._noting(_DDPSink.apply)))

    def _noting(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def noting(ddp: Any, *inputs: Any) -> Any:
            outputs = apply(ddp, *inputs)
            for one in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(one, Tensor) and one.grad_fn is not None:
                    self._sunk[one.grad_fn] = inputs
            return outputs

        return noting

    def within(self, loss: Tensor) -> Tensor | None:
        """The training step's own loss, if DistributedDataParallel has passed it through."""
        node, number = loss.grad_fn, loss.output_nr
        while node is not None and node not in self._sunk:
            behind = [edge for edge in node.next_functions if edge[0] is not None]
            node, number = behind[0] if len(behind) == 1 else (None, 0)
        return None if node is None else self._sunk[node][number]

    def seen(self) -> str:
        """What was called last, if anything was; nothing more is noted."""
        self._stack.close()
        return self._found[-1] if self._found else ""


def _hooks_of(module: Any) -> str:
    """The kind of hooks that modules have on their backward passes, if any."""
    for one in module.modules():
        if one._backward_hooks or one._backward_pre_hooks:
            return f"{type(one).__name__}.register_full_backward_hook"
    return ""


def _refuse(hooks: str, *_: object) -> StepStatistics:
    raise CoupledSamplesError(
        f"the training step has hooks on its gradients ({hooks}), which reading the tape of its "
        "loss would call: leave them out at the steps that are measured, or measure on a probe, "
        "as by Trace('gradients')"
    )


def _samples_in(batch: Any) -> int:
    """How many samples a batch has: the length that most of its tensors have, of several the first.

    0 if no tensor has a length.
    """
    if isinstance(graphs := getattr(batch, "num_graphs", None), int):
        return graphs  # whose tensors are of nodes
    lengths = Counter(len(tensor) for tensor in tensors(batch) if tensor.dim() > 0)
    return lengths.most_common(1)[0][0] if lengths else 0


def asked(name: str) -> str:
    """The name by which a record was asked for."""
    return re.sub(r"_backward_\d+$", "", name)


def _numbered(record: Record, passes: int) -> Record:
    """Under a name of its own, from the second backward pass of a batch on."""
    if passes == 1:
        return record
    return replace(record, name=f"{record.name}_backward_{passes}")
