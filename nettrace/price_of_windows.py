"""What statistics of a window of weights cost; see `nettrace.price`."""

from __future__ import annotations

from dataclasses import replace

from nettrace.pieces import Pieces
from nettrace.price import Needs, Work, prices, rows
from nettrace.statistics import Statistics


@prices("window", "window_updating", "window_size_error")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work()  # kept while the training goes on


@prices("window_factors")
def _(pieces: Pieces, needs: Needs) -> Work:
    length, size = pieces.window
    rank = min(length, size)
    seconds = 2e-10 * length * rank * size + 2 * pieces.eigenvalues(rank)
    return Work(seconds, kept=8 * length * rank, temporary=2**26)


@prices("window_modes", "window_halves")
def _(pieces: Pieces, needs: Needs) -> Work:
    rank = min(pieces.window)
    seconds, kept = 3 * pieces.eigenvalues(rank), 8 * pieces.window[0] * rank
    return Work(seconds, kept=kept, whole=2 * kept, of=("window_factors",))


@prices("window_displacements")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("window_modes",))


@prices("window_directions")
def _(pieces: Pieces, needs: Needs) -> Work:
    length, size = pieces.window
    count = min(length, Statistics.most_directions)
    seconds, kept = 2e-10 * length * count * size, 8 * count * size
    return Work(seconds, kept=kept, temporary=2**26, of=("window_modes",))


@prices("window_widths")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Some ten evaluations of the loss in float64 for each direction."""
    count = min(pieces.window[0], Statistics.most_directions)
    return Work(10 * count * pieces.vjp, of=("window_directions",))


@prices("window_curvatures", "window_fisher")
def _(pieces: Pieces, needs: Needs) -> Work:
    """A product with a matrix for each direction."""
    count = min(pieces.window[0], Statistics.most_directions)
    seconds, fresh = 4 * count * pieces.vjp, 3 * pieces.one_pass
    return Work(seconds, 2 * count, temporary=fresh, of=("window_directions",))


@prices("window_noise")
def _(pieces: Pieces, needs: Needs) -> Work:
    count = min(pieces.window[0], Statistics.most_directions)
    found = rows(pieces, 1, ("loss_gradients", "window_directions"))
    kept = 8 * count * pieces.samples
    return replace(found, seconds=count * pieces.norms(1), passes=count, kept=kept)
