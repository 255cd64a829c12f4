"""The measures: pure functions of statistics, one family a file."""

from nettrace.measures import (
    alignment,
    collective,
    fisher,
    gradients,
    hessian,
    loss,
    motion,
    noise,
    ntk,
    preconditioned,
    schools,
    spectrum,
)
from nettrace.measures.registry import Measure, Value, available, measure, resolve, statistics

__all__ = [
    "Measure",
    "Value",
    "alignment",
    "available",
    "collective",
    "fisher",
    "gradients",
    "hessian",
    "loss",
    "measure",
    "motion",
    "noise",
    "ntk",
    "preconditioned",
    "resolve",
    "schools",
    "spectrum",
    "statistics",
]
