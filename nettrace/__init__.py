"""Measure the physics of learning while a network trains."""

from nettrace.certificate import Certificate, SpotCheckError, certify
from nettrace.differentiate import jacobian, loss_jacobian
from nettrace.estimators import Estimate
from nettrace.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from nettrace.measures import measure
from nettrace.operator import Jacobian
from nettrace.ownership import CoupledSamplesError
from nettrace.per_sample import LossJacobian
from nettrace.probe import Probe
from nettrace.record import Record
from nettrace.schedule import at, every, log_spaced
from nettrace.store import open
from nettrace.tracer import MissingMeasureWarning, Tracer

__all__ = [
    "Bernoulli",
    "Categorical",
    "Certificate",
    "CoupledSamplesError",
    "Estimate",
    "Gaussian",
    "Jacobian",
    "Likelihood",
    "LossJacobian",
    "MissingMeasureWarning",
    "Poisson",
    "Probe",
    "Record",
    "SpotCheckError",
    "Tracer",
    "at",
    "certify",
    "every",
    "jacobian",
    "log_spaced",
    "loss_jacobian",
    "measure",
    "open",
]
__version__ = "0.1.0"
