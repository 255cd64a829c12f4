"""What statistics of representations and last layers cost; see `nettrace.price`."""

from __future__ import annotations

from nettrace.pieces import Pieces
from nettrace.price import Needs, Work, prices
from nettrace.representations import MOST
from nettrace.statistics import Statistics


@prices("activations")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Two forward passes, each of about half of a backward pass."""
    return Work(pieces.vjp, kept=pieces.one_pass, instead="name fewer by Probe(layers=...)")


@prices("representation_kernels", "neighbour_distances", "neighbour_numbers")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Inner products of all layers' activations, of which there are as many as bytes of a pass."""
    size = Statistics.minibatch
    seconds = pieces.multiplication * min(pieces.samples, size) * pieces.one_pass / pieces.item
    kept = 8 * MOST * pieces.samples * min(pieces.samples, size)
    return Work(seconds, kept=kept, of=("activations",), instead="take fewer samples")


@prices("input_kernels", "target_kernels", "classes", "last_layer")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(kept=8 * pieces.samples * min(pieces.samples, Statistics.minibatch))


@prices("cross_fitted")
def _(pieces: Pieces, needs: Needs) -> Work:
    """A forward pass; for two halves, eigenvectors, and 700 trials of alpha and the ridge."""
    width, numbers = pieces.head_width, pieces.samples * (pieces.head_width + pieces.outputs)
    seconds = pieces.vjp + 4 * pieces.eigenvalues(width) + 700 * (1e-4 + 1e-9 * numbers)
    return Work(seconds, kept=32 * numbers, whole=24 * width**2 + 16 * numbers)
