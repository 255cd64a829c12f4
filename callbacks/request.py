"""What callbacks of all trainers have in common: what is asked of them, and how they complain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nettrace import Probe, Tracer
from nettrace.budget import check_budget
from nettrace.explanation import Explanation, PriceList
from nettrace.missing import told, warn_missing
from nettrace.probe import check_probes
from nettrace.recording import OnError
from nettrace.schedule import Every, schedule
from nettrace.tracer import chosen
from nettrace.waiting import reads_window
from nettrace.window import WeightWindow


class Request:
    """What to measure, when, on what, and where it goes.

    Args:
        measures: names of measures or groups, such as ["ntk", "fisher/trace"].
        every: a period in steps, "log" for steps evenly spaced in the logarithm, the steps
            themselves, or a function from a step to yes or no, such as `nettrace.epochs(1)`.
        probe: the samples to measure on, or several by name, as {"train": p, "val": q}. By default,
            evenly spaced samples of Lightning's first validation data set, or else of the training
            data set; the trainer's loaders are never iterated.
        to: a folder for the trace, which `nettrace.open` reads; None keeps nothing on disk.
        log: whether to send numbers to the trainer's loggers, or to all that transformers reports
            to, and to Lightning's `callback_metrics`, so that they can be monitored. Where a
            Lightning logger is W&B's, kernels and spectra too, and at records 4, 8, 16, ... and
            at the end figures, as `nettrace.callbacks.figures.Figures` says; TensorBoard's and
            MLflow's get images of these at the end, if they can be drawn.
        prefix: put before every name in loggers.
        samples: how many samples a default probe takes.
        layers: of which layers measures of representations look at the activations, as in
            `nettrace.activations`; by default those of the probe.
        on_error: "record" notes why a measure is missing, warns once and lets the training go on;
            "raise" raises.
        max_seconds: how long one measure may take at one record, as predicted at the first; one
            that would take longer is missing, with the reason. None for any time.
        budget: the share of wall time that may be spent measuring, as in `nettrace.Tracer`.
        window: which weights of the last updates are kept, for measures that need them; each
            training has a window of its own with these settings, by default those of
            `nettrace.window.WeightWindow`. It sees the weights after every update. Measures of it
            are taken at the steps of the schedule at which it is full; if there are none, at the
            last step of all, where they are missing if it is not full then either. It is not saved
            with checkpoints: a run that is resumed fills it anew.

    Raises:
        ValueError: if a measure is unknown, or the schedule never fires.
    """

    def __init__(
        self,
        measures: str | Iterable[str] = ("ntk", "fisher", "collective", "loss"),
        *,
        every: Every = 100,
        probe: Probe | Mapping[str, Probe] | None = None,
        to: str | Path | None = None,
        log: bool = True,
        prefix: str = "",
        samples: int = 64,
        layers: str | Sequence[str] | None = None,
        on_error: OnError = "record",
        max_seconds: float | None = 60.0,
        budget: float | None = None,
        window: WeightWindow | None = None,
    ) -> None:
        super().__init__()
        if to is not None and not isinstance(to, (str, Path)):
            raise TypeError(f"expected to= to be a folder's path, got {type(to).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"expected prefix= to be a text, got {type(prefix).__name__}")
        if probe is not None:
            check_probes(probe)
        if on_error not in ("record", "raise"):
            raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")
        self.measures = chosen(measures, probe)
        self.every = every
        self.due = schedule(every)
        self.probe = probe
        self.to = to
        self.logs = log  # Lightning gives callbacks a method `log`
        self.prefix = prefix
        self.samples = samples
        self.layers = layers
        self.on_error = on_error
        self.max_seconds = PriceList(max_seconds).max_seconds
        self.budget = None if budget is None else check_budget(budget)
        #: As it is to be, and never shown anything: a callback may be of several trainings.
        self.window: WeightWindow | None = None
        if any(map(reads_window, self.measures)):
            self.window = WeightWindow() if window is None else window

    def looking(self, probe: Probe | Mapping[str, Probe]) -> Probe | Mapping[str, Probe]:
        """The probes, with the layers that are asked for."""
        if self.layers is None:
            return probe
        if isinstance(probe, Probe):
            return probe.at(self.layers)
        return {name: one.at(self.layers) for name, one in probe.items()}

    def explain(self, model: nn.Module) -> Explanation:
        """Predicts what the measures will cost on a network, and leaves it exactly as it was.

        With a budget, also how often at most they will be taken.

        Raises:
            ValueError: if there is no probe yet, which is to be taken from the trainer's data.
            CoupledSamplesError: if samples are coupled.
        """
        if self.probe is None:
            raise ValueError("the price depends on the samples: pass probe=nettrace.Probe(x, y)")
        names = [measure.name for measure in self.measures]
        options: dict[str, Any] = {"max_seconds": self.max_seconds, "budget": self.budget}
        return Tracer(self.looking(self.probe), names, **options).explain(model)


class Reporting(Protocol):
    """What is told how to complain."""

    on_error: OnError


def report(
    callback: Reporting, what: str, error: Exception, said: set[str], remedy: str = ""
) -> None:
    """Raises if the callback is to, else warns unless the same has been said."""
    if callback.on_error == "raise":
        raise error
    if what not in said:
        said.add(what)
        text = f"{type(callback).__name__} {what}: {told(error)}"
        warn_missing("; ".join([text, *([remedy] if remedy else [])]), stacklevel=3)


def warn_idle(callback: object, steps: int, reason: str = "") -> None:
    """Says that a callback never measured in so many steps."""
    schedule = (
        f"its schedule did not fire in the {steps} steps of this training; choose a smaller every="
    )
    text = f"{type(callback).__name__} never measured: {reason or schedule}"
    warn_missing(text, stacklevel=3)
