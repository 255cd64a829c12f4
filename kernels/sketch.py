"""Sketches of gradients of linear maps, whose inner products are those of the gradients on average.

A gradient sum_t a_t g_t^T of I x O numbers is multiplied by random matrices from both sides, which
leaves k1 x k2 of them (Choe et al., 2024, arXiv 2405.13954, without training these matrices).
"""

from __future__ import annotations

import hashlib
import operator

import numpy as np
import torch
from torch import Tensor

from nettrace.kernels.launch import check_real, is_compiled, known, operation, summing

#: More columns do not fit what a program holds.
_MOST = 128


@operation("kron_sketch")
def kron_sketch(a: Tensor, g: Tensor, ra: Tensor, rg: Tensor, precision: str = "tf32x3") -> Tensor:
    """Samples' gradients between two matrices, ra^T (sum_t a_nt g_nt^T) rg, each laid out flat.

    On a GPU `a` and `g` are read once, for up to 128 columns. Numbers of half precision there meet
    matrices that are rounded to it, after division by their largest entry: signs stay exact.

    Args:
        a: (N, T, I) what a linear map is applied to, of any floating types and strides.
        g: (N, T, O) the gradient by what it returns.
        ra: (I, k1) such as `kron_signs` draws.
        rg: (O, k2)
        precision: of products of float32: "tf32", "tf32x3" or "ieee".

    Returns:
        (N, k1 k2) in float32 at least.

    Raises:
        ValueError: if shapes or types do not fit, or there is no such precision.
    """
    how = known(precision)
    _check(a, g, ra, rg)
    wide = summing(a, g, ra, rg)
    k1, k2 = ra.shape[1], rg.shape[1]
    if not (a.numel() and g.numel() and k1 and k2):
        return a.new_zeros((len(a), k1 * k2), dtype=wide)
    if is_compiled(a, g, ra, rg) and max(k1, k2) <= _MOST:
        from nettrace.kernels.jit.sketch import launch

        return launch(a, g, ra, rg, how)
    x, y = a.to(wide) @ ra.to(wide), g.to(wide) @ rg.to(wide)
    return (x.mT @ y).flatten(1)


@kron_sketch.register_fake
def _(a: Tensor, g: Tensor, ra: Tensor, rg: Tensor, precision: str = "tf32x3") -> Tensor:
    known(precision)
    _check(a, g, ra, rg)
    return a.new_empty((a.shape[0], ra.shape[1] * rg.shape[1]), dtype=summing(a, g, ra, rg))


def kron_signs(
    inputs: int, outputs: int, k1: int, k2: int, seed: int, name: str
) -> tuple[Tensor, Tensor]:
    """Matrices for `kron_sketch` of random signs / sqrt(k), by which sketches are unbiased.

    Over seeds, the mean of <s_n, s_m> is <P_n, P_m>. For a gradient of rank one the norm's standard
    deviation is about sqrt(2 / k1 + 2 / k2 + 4 / (k1 k2)) of it, much more than that of as many
    projections of all numbers at once; it falls with the rank.

    Args:
        inputs: I.
        outputs: O.
        k1: columns for inputs.
        k2: columns for outputs.
        seed: with the same seed and name they are the same, on all machines.
        name: of the layer, so that sketches of two layers have nothing in common.

    Returns:
        (I, k1) and (O, k2) in float32, on the CPU.

    Raises:
        ValueError: if a number of columns is not positive, or one of rows is negative.
    """
    inputs, outputs, k1, k2, seed = map(operator.index, (inputs, outputs, k1, k2, seed))
    if min(inputs, outputs) < 0 or min(k1, k2) < 1:
        raise ValueError(
            f"expected rows, and at least one column, got {inputs} x {k1} and {outputs} x {k2}"
        )
    ra = _signs(inputs, k1, f"{seed} inputs {name}")
    rg = _signs(outputs, k2, f"{seed} outputs {name}")
    return ra, rg


def _signs(rows: int, columns: int, key: str) -> Tensor:
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    # Bits of the generator itself, whose stream NumPy keeps from version to version.
    drawn = np.random.PCG64(digest).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(drawn.astype("<u8").view(np.uint8), count=rows * columns)
    signs: Tensor = torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1)
    return signs.view(rows, columns).div_(columns**0.5)


def _check(a: Tensor, g: Tensor, ra: Tensor, rg: Tensor) -> None:
    if a.dim() != 3 or g.dim() != 3 or a.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"expected a of shape (N, T, I) and g of shape (N, T, O), "
            f"got {tuple(a.shape)} and {tuple(g.shape)}"
        )
    for name, x, r in (("ra", a, ra), ("rg", g, rg)):
        if r.dim() != 2 or len(r) != x.shape[2]:
            raise ValueError(
                f"expected {name} of {x.shape[2]} rows and some columns, got {tuple(r.shape)}"
            )
    check_real(a=a, g=g, ra=ra, rg=rg)
