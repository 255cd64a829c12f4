"""Figures of traces, and pages of them."""

from nettrace.dashboard.figures import figure, figures
from nettrace.dashboard.relations import density_of_states

__all__ = ["density_of_states", "figure", "figures"]
