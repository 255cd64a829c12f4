"""The one path from a network to records."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nettrace.freeze import frozen
from nettrace.measures import Measure, Value, resolve
from nettrace.ownership import CoupledSamplesError
from nettrace.probe import Probe
from nettrace.record import Record
from nettrace.schedule import Every, schedule
from nettrace.statistics import Inapplicable, Statistics
from nettrace.store import TraceWriter

OnError = Literal["record", "raise"]


class MissingMeasureWarning(UserWarning):
    """A measure could not be taken; its record says why, and the training goes on."""


class Tracer:
    """Measures a network at scheduled steps, and leaves it exactly as it was.

    Args:
        probe: the samples to measure on.
        measures: names of measures or of groups of them.
        every: when to measure: a period in steps, "log", the steps themselves, or a function from a
            step to yes or no.
        to: a folder for the trace, which `nettrace.open` reads; None keeps nothing on disk.
        on_error: "record" notes why a measure is missing, warns once and goes on; "raise" raises.
        memory_budget: as in `nettrace.jacobian`.
        seed: for measures that draw random numbers; they draw the same at the same step.

    Raises:
        ValueError: if a measure is unknown, or the schedule never fires.

    Example:
        >>> import torch, nettrace as nt
        >>> model = torch.nn.Linear(3, 2)
        >>> probe = nt.Probe(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> tracer = nt.Tracer(probe, ["ntk/entropy", "fisher"], every=100)
        >>> [record.name for record in tracer(model, step=0)][:2]
        ['ntk/entropy', 'fisher/trace']
    """

    def __init__(
        self,
        probe: Probe,
        measures: str | Iterable[str],
        *,
        every: Every = 1,
        to: str | Path | None = None,
        on_error: OnError = "record",
        memory_budget: int | str = "2GiB",
        seed: int = 0,
    ) -> None:
        if on_error not in ("record", "raise"):
            raise ValueError(f"expected on_error to be 'record' or 'raise', got {on_error!r}")
        if not isinstance(probe, Probe):
            raise TypeError(
                f"expected a nettrace.Probe, got {type(probe).__name__}: wrap samples as "
                "Probe(inputs, targets)"
            )
        self.probe = probe
        self.measures = resolve(measures)
        self.due = schedule(every)
        self.on_error: OnError = on_error
        self._memory_budget = memory_budget
        self._seed = seed
        self._writer = None if to is None else TraceWriter(to, probe=probe.fingerprint())
        self._warned: set[str] = set()
        self._examined = False

    def __call__(self, model: nn.Module, step: int, **coordinates: float) -> list[Record]:
        """Measures the network if the schedule says so.

        Args:
            model: the network; it is left exactly as it is.
            step: how many updates its weights have had.
            coordinates: what else to note beside the step, such as the epoch.

        Returns:
            The records, empty between scheduled steps.

        Raises:
            Exception: whatever went wrong, if `on_error="raise"`.
        """
        if not self.due(step):
            return []
        records = self.measure(model, step, self.measures)
        if self._writer is not None:
            self._writer.write(records, coordinates)
        return records

    def measure(self, model: nn.Module, step: int, measures: Sequence[Measure]) -> list[Record]:
        """Takes some measures now, whatever the schedule says, and writes nothing."""
        start = time.perf_counter()
        records: list[Record] = []
        with frozen(model):
            statistics: Statistics | Exception
            try:
                statistics = Statistics(
                    model,
                    self.probe,
                    {need for m in measures for need in m.needs},
                    seed=self._seed * 1_000_003 + step,
                    memory_budget=self._memory_budget,
                )
                self._examine(model, statistics)
            except Exception as error:
                statistics = error
            for measure in measures:
                try:
                    if isinstance(statistics, Exception):
                        raise statistics
                    records.append(_record(measure, step, measure(statistics)))
                except Inapplicable:
                    continue
                except Exception as error:
                    if self.on_error == "raise":
                        raise
                    records.append(self._missing(measure, step, error))
            _synchronise(model)
        seconds = np.asarray(time.perf_counter() - start)
        convention = {"convention": "wall time of this measurement, in seconds", "units": "s"}
        return [*records, Record("nettrace/seconds", step, seconds, attributes=convention)]

    def _examine(self, model: nn.Module, statistics: Statistics) -> None:
        """At the first look, checks that samples are evaluated independently of each other.

        Mixing upstream of the first parameter leaves no mark on the tape. So the first half of the
        samples is evaluated alone: its outputs must be the same.
        """
        if self._examined or statistics.samples < 2:
            return
        with torch.no_grad():
            outputs = statistics.outputs
            again = self.probe.look(model)
            half = self.probe.alone(model, statistics.samples // 2)
        # There is no telling where samples cannot be told apart, or the network draws at random.
        if half is not None and torch.equal(outputs, again):
            reference = outputs[: len(half)]
            same = half.shape == reference.shape and bool(
                (half - reference).abs().max() <= 1e-3 * reference.abs().max()
            )
            if not same:
                raise CoupledSamplesError(
                    "the samples are coupled: the outputs of the first half of the probe change "
                    "when the other half is left out. Per-sample derivatives are not defined for "
                    "such a network; take the operation that mixes the batch out, or make each "
                    "group of samples that belong together one sample"
                )
        self._examined = True

    def _missing(self, measure: Measure, step: int, error: Exception) -> Record:
        reason = f"{type(error).__name__}: {error}"
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{measure.name} is missing at step {step}: {reason}",
                MissingMeasureWarning,
                stacklevel=4,
            )
        shape = (0,) * len(measure.dims)
        value = np.full(shape, np.nan)
        return Record(
            measure.name, step, value, dims=measure.dims, attributes=_about(measure), missing=reason
        )


def _record(measure: Measure, step: int, found: Value) -> Record:
    return Record(
        measure.name,
        step,
        _array(found.value),
        None if found.standard_error is None else _array(found.standard_error),
        measure.dims,
        found.coordinates,
        {**_about(measure), **found.attributes},
    )


def _about(measure: Measure) -> dict[str, str]:
    return {"convention": measure.convention, "mode": "eval", "source": measure.source}


def _array(value: Tensor | float) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _synchronise(model: nn.Module) -> None:
    """Waits for the devices, so that the time measured is the time taken."""
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
