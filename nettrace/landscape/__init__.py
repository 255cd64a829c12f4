"""Probes of the loss landscape: the loss is taken as an energy, and sampled."""

from nettrace.landscape.barriers import barrier
from nettrace.landscape.continuous_density import loss_density
from nettrace.landscape.density import density_of_states, margin, overlap, wrong_share
from nettrace.landscape.discrete import (
    DiscreteNetwork,
    committee,
    multilayer,
    parity,
    perceptron,
)
from nettrace.landscape.folder import open
from nettrace.landscape.in_silico import patterns
from nettrace.landscape.langevin_chains import langevin
from nettrace.landscape.llc import learning_coefficient
from nettrace.landscape.matching import Matched, match
from nettrace.landscape.nearby import local_entropy
from nettrace.landscape.offline import probe_checkpoints
from nettrace.landscape.prober import Prober
from nettrace.landscape.run import Sampler, run
from nettrace.landscape.slices import slice_1d, slice_2d
from nettrace.landscape.thermodynamics import canonical

__all__ = [
    "DiscreteNetwork",
    "Matched",
    "Prober",
    "Sampler",
    "barrier",
    "canonical",
    "committee",
    "density_of_states",
    "langevin",
    "learning_coefficient",
    "local_entropy",
    "loss_density",
    "margin",
    "match",
    "multilayer",
    "open",
    "overlap",
    "parity",
    "patterns",
    "perceptron",
    "probe_checkpoints",
    "run",
    "slice_1d",
    "slice_2d",
    "wrong_share",
]
