"""Measure the physics of learning while a network trains."""

from nettrace.certificate import Certificate, SpotCheckError, certify
from nettrace.differentiate import jacobian, loss_jacobian
from nettrace.estimators import Estimate
from nettrace.measures import Value, measure
from nettrace.operator import Jacobian
from nettrace.ownership import CoupledSamplesError
from nettrace.per_sample import LossJacobian
from nettrace.price import TooDear
from nettrace.probe import Probe
from nettrace.record import Record
from nettrace.schedule import at, every, log_spaced
from nettrace.store import open
from nettrace.tracer import MissingMeasureWarning, Tracer

__all__ = [
    "Certificate",
    "CoupledSamplesError",
    "Estimate",
    "Jacobian",
    "LossJacobian",
    "MissingMeasureWarning",
    "Probe",
    "Record",
    "SpotCheckError",
    "TooDear",
    "Tracer",
    "Value",
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
