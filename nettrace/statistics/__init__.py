"""What measures share: each statistic of one look at a network is computed once, when first needed.

A statistic is a property of `Statistics`; a measure names those that it needs. All are plain sums
or raw arrays: measures divide, and say by what.
"""

from nettrace.statistics.look import Inapplicable, Unavailable
from nettrace.statistics.motion import MotionStatistics
from nettrace.statistics.nodes import NodeStatistics
from nettrace.statistics.representations import RepresentationStatistics
from nettrace.statistics.stability import StabilityStatistics
from nettrace.statistics.step import StepStatistics
from nettrace.statistics.uncertainty import UncertaintyStatistics
from nettrace.statistics.window import WindowStatistics


class Statistics(
    WindowStatistics,
    StabilityStatistics,
    MotionStatistics,
    NodeStatistics,
    RepresentationStatistics,
    UncertaintyStatistics,
):
    """All statistics of a network on a probe, at one instant; see `Look` for its arguments."""


__all__ = ["Inapplicable", "Statistics", "StepStatistics", "Unavailable"]
