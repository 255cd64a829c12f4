"""Probes of the loss landscape: the loss is taken as an energy, and sampled."""

from nettrace.landscape.barriers import barrier
from nettrace.landscape.density import density_of_states, margin, overlap, wrong_share
from nettrace.landscape.discrete import (
    DiscreteNetwork,
    committee,
    multilayer,
    parity,
    perceptron,
)
from nettrace.landscape.local_entropy import local_entropy
from nettrace.landscape.loss_density import loss_density
from nettrace.landscape.matching import Matched, match
from nettrace.landscape.patterns import patterns
from nettrace.landscape.run import Sampler, run
from nettrace.landscape.slices import slice_1d, slice_2d
from nettrace.landscape.thermodynamics import canonical

__all__ = [
    "DiscreteNetwork",
    "Matched",
    "Sampler",
    "barrier",
    "canonical",
    "committee",
    "density_of_states",
    "local_entropy",
    "loss_density",
    "margin",
    "match",
    "multilayer",
    "overlap",
    "parity",
    "patterns",
    "perceptron",
    "run",
    "slice_1d",
    "slice_2d",
    "wrong_share",
]
