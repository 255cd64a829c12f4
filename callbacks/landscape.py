"""The Lightning callback that probes the loss landscape around the network that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.distributed.fsdp import FullyShardedDataParallel

from nettrace import Probe, Record
from nettrace.callbacks.figures import Figures
from nettrace.callbacks.lightning import Callback, bound_to, loggers_step, silenced
from nettrace.callbacks.loggers import monitor, send
from nettrace.callbacks.progress import announced
from nettrace.callbacks.request import report, warn_idle
from nettrace.callbacks.samples import probe_of
from nettrace.landscape.folder import joined
from nettrace.landscape.prober import Function, Prober, by_name, check
from nettrace.ranks import by_first, purpose
from nettrace.record import ERROR
from nettrace.recording import OnError
from nettrace.schedule import Every, Schedule, schedule
from nettrace.unwrapped import is_spread

if TYPE_CHECKING:
    import xarray as xr


class LandscapeProbe(Callback):
    """Probes the loss landscape around the network at chosen steps, without touching the training.

    A result at step k is of the weights after k optimizer steps: before the training at step 0,
    else right after the k-th. The network is left bitwise as it is, and so are random streams; what
    fails is warned of, and never ends the training. An interruption (Ctrl-C) ends the probe, whose
    result is kept, and then the training.

    Of several processes the first probes alone, on its own samples, while the others wait for it
    without a collective that could time out. Where parameters are spread over them (FSDP, DeepSpeed
    stage 3), there are no results: `nettrace.landscape.probe_checkpoints` gives them afterwards.

    Args:
        probes: what to call, such as `nettrace.landscape.slice_1d`; several, or a mapping of names
            to them. Each is any `f(model, probe, *, seconds, progress, to) -> xarray.Dataset`;
            `functools.partial` gives it other arguments.
        every: a period in steps, "log" for steps evenly spaced in the logarithm, the steps
            themselves, or a function from a step to yes or no, such as `nettrace.epochs(1)`.
        probe: the samples. By default, evenly spaced samples of the first validation data set, or
            else of the training data set; the trainer's loaders are never iterated.
        to: a folder for results, as in `nettrace.landscape.Prober`, which `nettrace.landscape.open`
            reads; None keeps nothing on disk.
        seconds: how long all probes together may take at a step, as far as they keep to it; None
            for as long as it takes.
        progress: whether to show a progress bar, where the trainer shows one.
        log: whether to send numbers, with their standard errors, to the trainer's loggers and to
            `callback_metrics`, as "landscape/<function>/<variable>", and figures of the results to
            W&B, and images of the last ones to TensorBoard and MLflow, as
            `nettrace.callbacks.figures.Figures` says.
        samples: how many samples a default probe takes.
        on_error: "record" notes why a result is missing, warns once and lets the training go on;
            "raise" raises.

    Raises:
        ValueError: if a name cannot be that of a folder or is there twice, the schedule never
            fires, or there is no time.
        TypeError: if a function cannot be called so.

    Example:
        `Trainer(callbacks=[LandscapeProbe(learning_coefficient, every=1000, to="landscape")])`
    """

    _prober: Prober | None = None
    _figures: Figures | None = None
    _due: Schedule | None = None
    #: At which steps it looked last whether it is due, and probed.
    _seen: int | None = None
    _probed: int | None = None

    def __init__(
        self,
        probes: Function | list[Function] | Mapping[str, Function],
        *,
        every: Every,
        probe: Probe | None = None,
        to: str | Path | None = None,
        seconds: float | None = 60.0,
        progress: bool = True,
        log: bool = True,
        samples: int = 64,
        on_error: OnError = "record",
    ) -> None:
        super().__init__()
        if probe is not None and not isinstance(probe, Probe):
            raise TypeError(
                f"expected probe= to be a nettrace.Probe, got {type(probe).__name__}: wrap samples "
                "as Probe(inputs, targets)"
            )
        check(seconds, to, on_error)
        self.probes = by_name(probes)
        self.every = every
        self.due = schedule(every)
        self.probe = probe
        self.to = to
        self.seconds = seconds
        self.progress = progress
        self.logs = log  # Lightning gives callbacks a method `log`
        self.samples = samples
        self.on_error: OnError = on_error
        self._said: set[str] = set()
        #: What was found last, by function.
        self._last: dict[str, xr.Dataset] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the samples, and probes the network as it is."""
        self._said = set()
        self._due = self._prober = self._seen = self._probed = self._figures = None
        self._last = {}
        self._purpose = purpose(f"LandscapeProbe {' '.join(self.probes)}")
        with self._spared("cannot probe this training"):
            check_whole(
                trainer,
                "probe its checkpoints by nettrace.landscape.probe_checkpoints",
            )
            self._due = bound_to(trainer, self.due)
        if self._due is not None:
            with self._spared("cannot take a probe"):
                self._prober = self._new(trainer, pl_module)
            self._probe_if_due(trainer, pl_module, begun=False)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probes the weights as this batch left them."""
        self._probe_if_due(trainer, pl_module, begun=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Probes last where that is asked for, and says if it never did."""
        if self._due is not None:
            if getattr(self._due, "last", False) and self._probed != trainer.global_step:
                self._probe(trainer, pl_module, begun=True)
            if self._probed is None:
                warn_idle(self, trainer.global_step)
            self._draw(trainer)
        self._due = self._prober = self._figures = None

    def _probe_if_due(self, trainer: Any, module: Any, begun: bool) -> None:
        step = trainer.global_step
        if self._due is None or step == self._seen:  # of accumulated batches several make one step
            return
        self._seen, due = step, False
        with self._spared("has a schedule that fails"):
            due = self._due(step)
        if due:
            self._probe(trainer, module, begun)

    def _probe(self, trainer: Any, module: Any, begun: bool) -> None:
        step = self._probed = trainer.global_step
        found: list[Record] = []

        def work() -> list[Record]:
            if self._prober is not None:
                with (
                    self._spared(f"cannot probe step {step}"),
                    announced(trainer, f"nettrace probes step {step}"),
                    silenced(module),
                ):
                    for name, result in self._prober.each(module, step):
                        found.extend(new := records(name, result, step))
                        if self.logs:
                            self._log(trainer, new, begun)
                            self._show(trainer, name, result, step, begun)
            return found

        told = by_first(f"{self._purpose}/{step}", work)
        if self.logs:  # others monitor them, in all processes alike
            monitor(trainer, told or [], "")

    def _log(self, trainer: Any, found: list[Record], begun: bool) -> None:
        for logger in trainer.loggers if found else ():
            with self._spared(f"cannot log to {type(logger).__name__}"):
                send(logger, found, "", loggers_step(trainer) + begun)

    def _show(self, trainer: Any, name: str, found: xr.Dataset, step: int, begun: bool) -> None:
        """Sends figures of a result to loggers that take them."""
        if self._figures is None:
            self._figures = Figures(trainer.loggers, "")
        if self._figures.wanted:
            with self._spared("cannot make figures"):
                self._last[name] = joined({step: found})
                data = _as_trace({name: self._last[name]})
                self._note(self._figures.show(data, step, loggers_step(trainer) + begun))

    def _draw(self, trainer: Any) -> None:
        """Sends images of what was found last, which take seconds, to loggers that take these."""
        if self._figures is not None and self._last:
            with self._spared("cannot make figures"):
                self._note(self._figures.draw(_as_trace(self._last), loggers_step(trainer)))

    def _note(self, failed: list[tuple[str, Exception]]) -> None:
        for what, error in failed:
            report(self, what, error, self._said)

    def _new(self, trainer: Any, module: Any) -> Prober | None:
        if not trainer.is_global_zero:
            return None
        probe = probe_of(trainer, module, self.probe, self.samples)
        assert isinstance(probe, Probe)
        bar = trainer.progress_bar_callback
        return Prober(
            self.probes,
            probe,
            to=self.to,
            seconds=self.seconds,
            progress=self.progress and bar is not None and bar.is_enabled,
            on_error=self.on_error,
        )

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            report(self, what, error, self._said)


def _as_trace(found: Mapping[str, xr.Dataset]) -> xr.Dataset:
    from nettrace.dashboard.landscapes import landscape_trace  # takes long to import

    return landscape_trace(found)


def records(function: str, found: xr.Dataset, step: int) -> list[Record]:
    """The numbers in a result, each with its standard error; what is NaN is not known.

    Args:
        function: its name.
        found: the result.
        step: how many updates the weights have had.
    """
    numbers = {
        str(name): one.values
        for name, one in found.data_vars.items()
        if one.ndim == 0 and one.dtype.kind in "biuf" and not np.isnan(one.values)
    }
    return [
        Record(f"landscape/{function}/{name}", step, value, numbers.get(name + ERROR))
        for name, value in numbers.items()
        if not name.endswith(ERROR)
    ]


def check_whole(trainer: Any, remedy: str) -> None:
    """Checks that each process has the whole network.

    Args:
        trainer: the trainer.
        remedy: what to do where it has not.

    Raises:
        RuntimeError: if it is spread over processes, which would wait for each other.
    """
    model = trainer.strategy.model
    spread = [p for p in model.parameters() if is_spread(p) or hasattr(p, "ds_id")]
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if trainer.world_size > 1 and (spread or sharded):
        raise RuntimeError(f"its parameters are spread over processes: {remedy}")
