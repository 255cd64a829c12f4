"""What statistics of representations, nodes and last layers cost; see `nettrace.price`."""

from __future__ import annotations

from nettrace.pieces import Pieces
from nettrace.price import Needs, Work, prices
from nettrace.statistics import Statistics


@prices("activations")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Two forward passes, each of about half of a backward pass."""
    return Work(pieces.vjp, kept=pieces.one_pass, instead="name fewer by Probe(layers=...)")


def _pairs(pieces: Pieces) -> int:
    """Pairs of samples in all minibatches."""
    return pieces.samples * min(pieces.samples, Statistics.minibatch)


@prices("representation_kernels")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Inner products of the activations, and what is made of kernels, of layers and each two."""
    layers, pairs = pieces.representations, _pairs(pieces)
    numbers = pieces.one_pass / pieces.item / pieces.samples
    seconds = pairs * (pieces.multiplication * numbers + (4e-7 + 5e-10 * layers) * layers)
    kept = 8 * layers * pairs
    return Work(
        seconds, kept=kept, whole=2 * kept, of=("activations",), instead="take fewer samples"
    )


@prices("representation_ranks")
def _(pieces: Pieces, needs: Needs) -> Work:
    layers, pairs = pieces.representations, _pairs(pieces)
    size = 8 * layers * pairs
    of = ("representation_kernels",)
    return Work(2e-7 * layers * pairs, kept=size, whole=size, of=of, instead="take fewer samples")


@prices("input_ranks", "target_ranks")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(2e-7 * _pairs(pieces), kept=8 * _pairs(pieces))


@prices("neighbour_distances", "neighbour_numbers")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Distances between all samples, of which few are held, and which points share neighbours."""
    layers, pairs = pieces.representations, pieces.samples**2
    numbers = pieces.one_pass / pieces.item / pieces.samples
    rate = pieces.multiplication
    seconds = pairs * (rate * numbers + 3e-8 * layers)
    return Work(seconds, whole=16 * pairs, of=("activations",), instead="take fewer samples")


@prices("input_kernels", "target_kernels", "classes", "last_layer")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(kept=8 * pieces.samples * min(pieces.samples, Statistics.minibatch))


@prices("cross_fitted")
def _(pieces: Pieces, needs: Needs) -> Work:
    """A forward pass; for two halves, eigenvectors, and 700 trials of alpha and the ridge."""
    width, numbers = pieces.head_width, pieces.samples * (pieces.head_width + pieces.outputs)
    seconds = pieces.vjp + 4 * pieces.eigenvalues(width) + 700 * (1e-4 + 1e-9 * numbers)
    return Work(seconds, kept=32 * numbers, whole=24 * width**2 + 16 * numbers)


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
