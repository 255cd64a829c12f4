"""Measure the physics of learning while a network trains."""

from nettrace.operator import Jacobian, LossJacobian, jacobian, loss_jacobian
from nettrace.ownership import CoupledSamplesError

__all__ = ["CoupledSamplesError", "Jacobian", "LossJacobian", "jacobian", "loss_jacobian"]
__version__ = "0.1.0"
