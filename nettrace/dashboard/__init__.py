"""Figures of traces, and pages of them."""

from typing import Any

try:
    from nettrace.dashboard.landscapes import landscape_trace
    from nettrace.dashboard.relations import density_of_states
    from nettrace.dashboard.views import figure, figures
except ModuleNotFoundError as error:  # workspaces do without Plotly
    if (error.name or "").partition(".")[0] != "plotly":
        raise

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError("figures need Plotly: pip install 'nettrace[dashboard]'")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["density_of_states", "figure", "figures", "landscape_trace"]
