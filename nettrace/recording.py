"""From what a measure found to its record."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nettrace.certificate import Certificate, SpotCheckError
from nettrace.measures import Measure, Value
from nettrace.measures.registry import Numbers
from nettrace.record import Record
from nettrace.statistics import Statistics


def recorded(measure: Measure, step: int, found: Value, statistics: Statistics) -> Record:
    """The record of a value, and of what it rests on."""
    return Record(
        measure.name,
        step,
        _array(found.value),
        None if found.standard_error is None else _array(found.standard_error),
        measure.dims,
        found.coordinates,
        {
            **_about(measure),
            **({"outputs": statistics.selected} if statistics.selected else {}),
            **_loss(measure, statistics),
            **found.attributes,
        },
    )


def missing(measure: Measure, step: int, reason: str) -> Record:
    """The record of a measure that could not be taken."""
    value = np.full((0,) * len(measure.dims), np.nan)
    return Record(
        measure.name, step, value, dims=measure.dims, attributes=_about(measure), missing=reason
    )


def spot_check(step: int, found: Certificate | SpotCheckError) -> Record:
    """The record of a spot check, passed or not."""
    name = "nettrace/spot_check"
    if isinstance(found, SpotCheckError):
        return Record(name, step, np.asarray(np.nan), missing=f"SpotCheckError: {found}")
    attributes = {
        "convention": "largest difference from plain autograd in a few entries of the Jacobian, "
        "over the norms of its rows",
        "certificate": found.as_json(),
    }
    return Record(name, step, np.asarray(found.error), attributes=attributes)


def _loss(measure: Measure, statistics: Statistics) -> dict[str, str]:
    """What the loss and the distribution of the outputs were taken to be, if it matters."""
    if not statistics.of_likelihood & set(measure.needs):
        return {}
    likelihood = statistics.assumed_likelihood
    loss = "losses of the probe's own" if likelihood is None else likelihood.loss
    known = {"likelihood": "unknown" if likelihood is None else likelihood.name, "loss": loss}
    check = statistics.loss_check
    return known if check is None else {**known, "loss_checked": check.text}


def _about(measure: Measure) -> dict[str, str]:
    return {"convention": measure.convention, "mode": "eval", "source": measure.source}


def _array(value: Numbers) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
