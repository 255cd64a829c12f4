"""Several probes at once: their records become one, with a leading axis for the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn

from nettrace.measures import Measure
from nettrace.probe import Probe
from nettrace.record import Record
from nettrace.statistics import Statistics, Unavailable

if TYPE_CHECKING:
    from nettrace.tracer import Optimizers, Tracer

Axis: TypeAlias = Literal["probe", "pair"]


#: What is told of pairs, beside what is told of the probes.
_OF_PAIRS = {
    name: f"{name}_of_pairs" for name in ("nettrace/spot_check", "nettrace/seconds_per_measure")
}


def of_pairs(measure: Measure) -> bool:
    """Whether a measure is of two probes rather than of one."""
    return bool(Statistics.of_pairs & set(measure.needs))


class Several:
    """Tracers of several probes, and of their pairs where a measure compares two.

    Args:
        tracer: that of the first probe, of which the others are copies.
        probes: the probes by name.
    """

    def __init__(self, tracer: Tracer, probes: Mapping[str, Probe]) -> None:
        self._probes = probes
        self.tracers = {name: tracer.twin(probe, name) for name, probe in probes.items()}
        self._pairs: dict[str, Tracer | Unavailable] = {}

    def measure(
        self, model: nn.Module, step: int, measures: Sequence[Measure], optimizer: Optimizers
    ) -> list[Record]:
        """Takes measures of each probe, along "probe", and of each two, along "pair"."""
        single = [measure for measure in measures if not of_pairs(measure)]
        paired = [measure for measure in measures if of_pairs(measure)]
        each = {
            k: t.measure(model, step, single, optimizer) for k, t in self.tracers.items() if single
        }
        pairs = combinations(self._probes, 2) if paired else ()
        both = {f"{a}-{b}": self._compare(a, b, model, step, paired) for a, b in pairs}
        found = [*_by_quantity("probe", each), *_by_quantity("pair", both)]
        if paired and not both:
            alone = Unavailable("there is one probe, and this compares two: name another")
            found += self.tracers[next(iter(self.tracers))].refuse(paired, step, alone)
        order = {measure.name: place for place, measure in enumerate(measures)}
        found.sort(key=lambda record: order.get(record.name, len(order)))
        times = [r for records in (*each.values(), *both.values()) for r in records if _is_time(r)]
        total = np.asarray(sum(float(record.value) for record in times))
        return [*found, *(replace(record, value=total) for record in times[:1])]

    def _compare(
        self, one: str, other: str, model: nn.Module, step: int, measures: Sequence[Measure]
    ) -> list[Record]:
        tracer = self._pair(one, other)
        if isinstance(tracer, Unavailable):
            return self.tracers[one].refuse(measures, step, tracer)
        records = tracer.measure(model, step, measures)
        return [replace(r, name=_OF_PAIRS.get(r.name, r.name)) for r in records]

    def _pair(self, one: str, other: str) -> Tracer | Unavailable:
        name = f"{one}-{other}"
        if name not in self._pairs:
            try:
                both = self._probes[one].joined(self._probes[other])
                self._pairs[name] = self.tracers[one].twin(both, name)
            except ValueError as error:
                self._pairs[name] = Unavailable(str(error))
        return self._pairs[name]


def _is_time(record: Record) -> bool:
    return record.name == "nettrace/seconds"


def _by_quantity(axis: Axis, found: Mapping[str, Sequence[Record]]) -> list[Record]:
    """The records of several probes, quantity by quantity; their times apart."""
    by_name = {label: {r.name: r for r in records} for label, records in found.items()}
    some = {r.name: r for records in found.values() for r in records if not _is_time(r)}
    return [
        stacked(axis, {k: records.get(name) for k, records in by_name.items()}) for name in some
    ]


def stacked(axis: Axis, found: Mapping[str, Record | None]) -> Record:
    """Records of one quantity on several probes, or pairs of them, as one.

    Values are placed by their labels along axes that have labels; where probes are of different
    sizes, there is NaN behind those of the smaller, and the attribute "padded" says so. Attributes
    that differ are kept as "probe: attribute".

    Args:
        axis: the name of the leading axis.
        found: the records by probe, None where the quantity has no meaning; not all None.
    """
    records = {label: record for label, record in found.items() if record is not None}
    some = next(iter(records.values()))
    reasons = {
        label: "it was not taken here" if record is None else record.missing
        for label, record in found.items()
    }
    missing_on = {label: reason for label, reason in reasons.items() if reason is not None}
    there = {label: record for label, record in records.items() if record.missing is None}
    dims = (axis, *some.dims)
    if not there:
        return replace(
            some,
            value=np.full((len(found), *some.value.shape), np.nan),
            dims=dims,
            coordinates={axis: list(found)},
            attributes=_attributes(records),
            missing=_reason(missing_on),
        )
    sizes = [[_labels(record, d) for record in there.values()] for d in range(len(some.dims))]
    labels = [list(dict.fromkeys(label for one in several for label in one)) for several in sizes]
    value, padded = _placed(found, there, labels, "value")
    error = None
    if any(record.standard_error is not None for record in there.values()):
        error, _ = _placed(found, there, labels, "standard_error")
    attributes = _attributes(there)
    if padded:
        attributes["padded"] = "with NaN, where a probe has fewer entries than another"
    named = {dim for record in there.values() for dim in record.coordinates}
    coordinates = {dim: labels[d] for d, dim in enumerate(some.dims) if dim in named}
    return Record(
        some.name, some.step, value, error, dims, {axis: list(found), **coordinates}, attributes,
        missing_on=missing_on,
    )  # fmt: skip


def _labels(record: Record, axis: int) -> Sequence[Any]:
    """Labels along an axis, numbers where it has none."""
    return record.coordinates.get(record.dims[axis], range(record.value.shape[axis]))


def _placed(
    found: Mapping[str, Record | None],
    there: Mapping[str, Record],
    labels: Sequence[Sequence[Any]],
    what: Literal["value", "standard_error"],
) -> tuple[npt.NDArray[Any], bool]:
    """Arrays side by side, and whether some were padded."""
    arrays = {k: getattr(r, what) for k, r in there.items() if getattr(r, what) is not None}
    shape = tuple(map(len, labels))
    padded = any(array.shape != shape for array in arrays.values())
    dtype = np.result_type(*arrays.values())
    if (padded or len(arrays) < len(found)) and dtype.kind not in "fc":
        dtype = np.result_type(dtype, np.float16)
    # Everything is overwritten where nothing is padded or missing, as for integers.
    out = np.full((len(found), *shape), np.nan if dtype.kind in "fc" else 0, dtype)
    for place, label in enumerate(found):
        if label in arrays:
            where = [
                [known.index(one) for one in _labels(there[label], d)]
                for d, known in enumerate(labels)
            ]
            out[np.ix_([place], *where)] = arrays[label][np.newaxis]
    return out, padded


def _attributes(records: Mapping[str, Record]) -> dict[str, str | int | float]:
    """What all agree on by its name, and what they do not by probe."""
    kept: dict[str, str | int | float] = {}
    for key in dict.fromkeys(key for record in records.values() for key in record.attributes):
        values = {label: r.attributes[key] for label, r in records.items() if key in r.attributes}
        if len(values) == len(records) and len(set(values.values())) == 1:
            kept[key] = next(iter(values.values()))
        else:
            kept |= {f"{label}: {key}": value for label, value in values.items()}
    return kept


def _reason(missing_on: Mapping[str, str]) -> str:
    reasons = set(missing_on.values())
    if len(reasons) == 1:
        return reasons.pop()
    return "; ".join(f"{label}: {reason}" for label, reason in missing_on.items())
