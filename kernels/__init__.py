"""Contractions of per-sample gradients held in factored form: tensors in, tensors out.

They have no derivatives themselves: give operations tensors that need none.
"""

from nettrace.kernels.affine import affine_psg
from nettrace.kernels.columns import column_sqnorms
from nettrace.kernels.conv_psg import conv_psg
from nettrace.kernels.cost import gram_cost, is_written_out, repeated
from nettrace.kernels.embedding import embedding_gram, embedding_sqnorm
from nettrace.kernels.factors import (
    Dense,
    Factor,
    Outer,
    Sum,
    blocks,
    dense,
    gram_,
    inner,
    mirror_,
    sqnorms,
    total,
    traced_gram_,
)
from nettrace.kernels.ghost import ghost_gram, ghost_sqnorm
from nettrace.kernels.moments import WELFORD_SUMS, weight_welford_
from nettrace.kernels.psg import psg_moments
from nettrace.kernels.sketch import kron_signs, kron_sketch
from nettrace.kernels.still import Geometry, Patches, Still, patches

__all__ = [
    "WELFORD_SUMS",
    "Dense",
    "Factor",
    "Geometry",
    "Outer",
    "Patches",
    "Still",
    "Sum",
    "affine_psg",
    "blocks",
    "column_sqnorms",
    "conv_psg",
    "dense",
    "embedding_gram",
    "embedding_sqnorm",
    "ghost_gram",
    "ghost_sqnorm",
    "gram_",
    "gram_cost",
    "inner",
    "is_written_out",
    "kron_signs",
    "kron_sketch",
    "mirror_",
    "patches",
    "psg_moments",
    "repeated",
    "sqnorms",
    "total",
    "traced_gram_",
    "weight_welford_",
]
