"""How far a trained network's predictions can be trusted, from its last layer and in one forward.

`uncertainties = nettrace.uncertainty.fit(model, loader, calibration)`, and then `uncertainties(x)`
has values and variances.
"""

from nettrace.uncertainty.covariance import Covariance
from nettrace.uncertainty.fitted import Derived, Prediction, Uncertainties, load
from nettrace.uncertainty.fitting import fit

__all__ = ["Covariance", "Derived", "Prediction", "Uncertainties", "fit", "load"]
