"""Probes of the loss landscape: the loss is taken as an energy, and sampled."""

from nettrace.landscape.langevin import langevin
from nettrace.landscape.learning_coefficient import learning_coefficient
from nettrace.landscape.run import Sampler, run

__all__ = ["Sampler", "langevin", "learning_coefficient", "run"]
