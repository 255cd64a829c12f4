"""The measures: pure functions of statistics, one family a file."""

from nettrace.measures import collective, fisher, hessian, loss, motion, ntk, preconditioned
from nettrace.measures.registry import Measure, Value, available, measure, resolve

__all__ = [
    "Measure",
    "Value",
    "available",
    "collective",
    "fisher",
    "hessian",
    "loss",
    "measure",
    "motion",
    "ntk",
    "preconditioned",
    "resolve",
]
