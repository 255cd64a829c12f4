"""Callbacks for PyTorch Lightning, in both of its namespaces."""

from nettrace.callbacks.trace import (
    CollectiveVariables,
    FisherTrace,
    GradientStatistics,
    NTKTrace,
    Trace,
)

__all__ = ["CollectiveVariables", "FisherTrace", "GradientStatistics", "NTKTrace", "Trace"]
