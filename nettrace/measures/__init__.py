"""The measures: pure functions of statistics, one family a file."""

from nettrace.measures import alignment, collective, fisher, hessian, loss, ntk, schools, spectrum
from nettrace.measures.registry import Measure, Value, available, measure, resolve

__all__ = [
    "Measure",
    "Value",
    "alignment",
    "available",
    "collective",
    "fisher",
    "hessian",
    "loss",
    "measure",
    "ntk",
    "resolve",
    "schools",
    "spectrum",
]
