"""Callbacks for PyTorch Lightning, in both of its namespaces, and for transformers' Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nettrace.callbacks.curvature import Curvature, StabilityMonitor
    from nettrace.callbacks.fluctuations import WeightFluctuations
    from nettrace.callbacks.focusing import Focusing
    from nettrace.callbacks.hugging_face import TransformersTrace
    from nettrace.callbacks.landscape import LandscapeProbe
    from nettrace.callbacks.representations import RepresentationGeometry
    from nettrace.callbacks.trace import (
        CollectiveVariables,
        FisherTrace,
        GradientStatistics,
        NTKTrace,
        Trace,
    )
    from nettrace.callbacks.uncertainty import LastLayerUncertainty

__all__ = [
    "CollectiveVariables",
    "Curvature",
    "FisherTrace",
    "Focusing",
    "GradientStatistics",
    "LandscapeProbe",
    "LastLayerUncertainty",
    "NTKTrace",
    "RepresentationGeometry",
    "StabilityMonitor",
    "Trace",
    "TransformersTrace",
    "WeightFluctuations",
]
#: Where those are that are not in `trace`.
_ELSEWHERE = {
    "Curvature": "curvature",
    "Focusing": "focusing",
    "LandscapeProbe": "landscape",
    "LastLayerUncertainty": "uncertainty",
    "RepresentationGeometry": "representations",
    "StabilityMonitor": "curvature",
    "TransformersTrace": "hugging_face",
    "WeightFluctuations": "fluctuations",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for alone: a trainer need not be installed for the sake of another."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "trace")
    return getattr(import_module(f"nettrace.callbacks.{module}"), name)
