"""Probes of the loss landscape: the loss is taken as an energy, and sampled."""

from nettrace.landscape.barriers import barrier
from nettrace.landscape.folder import open
from nettrace.landscape.matching import Matched, match
from nettrace.landscape.offline import probe_checkpoints
from nettrace.landscape.prober import Prober
from nettrace.landscape.run import Sampler, run
from nettrace.landscape.slices import slice_1d, slice_2d

__all__ = [
    "Matched",
    "Prober",
    "Sampler",
    "barrier",
    "match",
    "open",
    "probe_checkpoints",
    "run",
    "slice_1d",
    "slice_2d",
]
