"""The Hessian of the mean loss: its trace, exactly, where that is the Gauss-Newton matrix's.

Schraudolph, Fast curvature matrix-vector products (2002); Martens, New insights and perspectives on
the natural gradient method (2020), arXiv:1412.1193, sections 8 and 9: for these losses the
generalised Gauss-Newton matrix is the Fisher information.
"""

from __future__ import annotations

from torch import Tensor

from nettrace.measures.registry import Value, measure


@measure(
    "hessian/trace",
    needs=["hessian_traces"],
    convention="of the mean loss over samples; exact, for networks that are piecewise linear in "
    "each weight; standard error over samples",
    source="Martens 2020, arXiv:1412.1193, section 8",
)
def trace(hessian_traces: Tensor) -> Value:
    """The trace of the Hessian of the mean loss by the parameters."""
    return Value.mean(hessian_traces)
