"""The measures: pure functions of statistics, one family a file."""

from nettrace.measures import (
    alignment,
    collective,
    fisher,
    flatness,
    fluctuations,
    gradients,
    hessian,
    layers,
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
    "flatness",
    "fluctuations",
    "gradients",
    "hessian",
    "layers",
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
