"""Contractions of per-sample gradients held in factored form: tensors in, tensors out."""

if __name__ != "nettrace.kernels":  # the repository root is on sys.path
    raise ImportError(f"import `nettrace.kernels`, not `{__name__}`", name=__name__)

from nettrace.kernels.factors import (
    Dense,
    Factor,
    Outer,
    blocks,
    dense,
    fold,
    gram,
    inner,
    sqnorms,
    total,
)

__all__ = [
    "Dense",
    "Factor",
    "Outer",
    "blocks",
    "dense",
    "fold",
    "gram",
    "inner",
    "sqnorms",
    "total",
]
