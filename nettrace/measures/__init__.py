"""The measures: pure functions of statistics, one family a file."""

from nettrace.measures import collective, fisher, hessian, loss, ntk
from nettrace.measures.registry import Measure, Value, available, measure, resolve, statistics

__all__ = [
    "Measure",
    "Value",
    "available",
    "collective",
    "fisher",
    "hessian",
    "loss",
    "measure",
    "ntk",
    "resolve",
    "statistics",
]
