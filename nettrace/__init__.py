"""Measure the physics of learning while a network trains."""

from nettrace import uncertainty
from nettrace.certificate import Certificate, SpotCheckError, certify
from nettrace.differentiate import jacobian, loss_jacobian
from nettrace.estimators import Estimate
from nettrace.exports import export
from nettrace.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from nettrace.matrices import curvature
from nettrace.measures import Value, measure
from nettrace.missing import DoubtfulMeasureWarning, MissingMeasureWarning
from nettrace.offline import Analysis, analyze
from nettrace.operator import Jacobian
from nettrace.ownership import CoupledSamplesError
from nettrace.per_sample import LossJacobian
from nettrace.price import TooDear
from nettrace.probe import Probe
from nettrace.record import Record
from nettrace.representations import activations
from nettrace.schedule import at, epochs, every, log_spaced, log_windows, windows, with_last
from nettrace.store import open
from nettrace.tracer import Tracer
from nettrace.window import WeightWindow

__all__ = [
    "Analysis",
    "Bernoulli",
    "Categorical",
    "Certificate",
    "CoupledSamplesError",
    "DoubtfulMeasureWarning",
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
    "TooDear",
    "Tracer",
    "Value",
    "WeightWindow",
    "activations",
    "analyze",
    "at",
    "certify",
    "curvature",
    "epochs",
    "every",
    "export",
    "jacobian",
    "log_spaced",
    "log_windows",
    "loss_jacobian",
    "measure",
    "open",
    "uncertainty",
    "windows",
    "with_last",
]
__version__ = "0.1.0"
