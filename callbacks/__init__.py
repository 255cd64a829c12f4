"""Callbacks for PyTorch Lightning, in both of its namespaces."""

if __name__ != "nettrace.callbacks":  # the repository root is on sys.path
    raise ImportError(f"import `nettrace.callbacks`, not `{__name__}`", name=__name__)

from nettrace.callbacks.trace import CollectiveVariables, FisherTrace, NTKTrace, Trace

__all__ = ["CollectiveVariables", "FisherTrace", "NTKTrace", "Trace"]
