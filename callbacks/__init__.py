"""Callbacks for PyTorch Lightning, in both of its namespaces."""

from nettrace.callbacks.trace import CollectiveVariables, FisherTrace, NTKTrace, Trace

__all__ = ["CollectiveVariables", "FisherTrace", "NTKTrace", "Trace"]
