"""What statistics of nodes cost; see `nettrace.price`."""

from __future__ import annotations

from nettrace.pieces import Pieces
from nettrace.price import Needs, Work, prices
from nettrace.statistics import Statistics


@prices("nodes")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Forward passes on a few samples in float64; to try groups of units, two for each of them."""
    forward = 2 * pieces.vjp * min(1, 8 / pieces.samples)
    overhead = 1e-3 + 1e-4 * pieces.layers  # of calling operations one by one
    seconds = (4 + pieces.layers) * (forward + overhead)
    wide = 8 * pieces.parameter_bytes / pieces.item
    return Work(seconds, kept=wide, whole=2 * wide)


@prices("node_strengths", "node_loads")
def _(pieces: Pieces, needs: Needs) -> Work:
    numbers = pieces.parameter_bytes / pieces.item
    return Work(4e-9 * numbers, whole=16 * numbers, of=("nodes",))


@prices("shuffled_strengths")
def _(pieces: Pieces, needs: Needs) -> Work:
    numbers = pieces.parameter_bytes / pieces.item
    seconds = 4e-8 * Statistics.shuffles * numbers
    instead = "focus/alternation_p_layers shuffles layers"
    return Work(seconds, whole=40 * numbers, of=("nodes",), instead=instead)
