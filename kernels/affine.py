"""Gradients of scales and shifts, sample by sample: of norms, and of biases.

What is normalised is x^ = (x - mean) rstd, what a layer returns scale x^ + shift, so that

    d scale[n] = sum_t dy[n, t] x^[n, t],    d shift[n] = sum_t dy[n, t].
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.kernels.launch import check_real, is_compiled, operation, summing


@operation("affine_psg")
def affine_psg(
    x: Tensor, dy: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each sample's gradients of scale and shift, in one read of `x` and `dy`.

    Args:
        x: (N, T, D) what is normalised, or what has been, if there are no `mean` and `rstd`.
        dy: (N, T, D) the gradient by what the layer returns.
        mean: (N, T) of x.
        rstd: (N, T) the inverse of its standard deviation.

    Returns:
        (N, D) and (N, D), in float32 at least: sums over tokens.

    Raises:
        ValueError: if shapes, types or devices do not fit, or one of mean and rstd is missing.
    """
    _check(x, dy, mean, rstd)
    if is_compiled(x, dy, *(t for t in (mean, rstd) if t is not None)) and x.numel():
        from nettrace.kernels.jit.affine import launch

        return launch(x, dy, mean, rstd)
    wide = summing(x, dy)
    x, dy = x.to(wide), dy.to(wide)
    if mean is not None and rstd is not None:
        x = (x - mean.to(wide).unsqueeze(-1)) * rstd.to(wide).unsqueeze(-1)
    return torch.einsum("ntd,ntd->nd", x, dy), dy.sum(1)


@affine_psg.register_fake
def _(
    x: Tensor, dy: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, dy, mean, rstd)
    wide = summing(x, dy)
    n, _, d = x.shape
    return x.new_empty((n, d), dtype=wide), x.new_empty((n, d), dtype=wide)


def _check(x: Tensor, dy: Tensor, mean: Tensor | None, rstd: Tensor | None) -> None:
    if x.dim() != 3 or x.shape != dy.shape:
        raise ValueError(
            f"expected x and dy of one shape (N, T, D), got {tuple(x.shape)} and {tuple(dy.shape)}"
        )
    if (mean is None) != (rstd is None):
        raise ValueError("expected both of mean and rstd, or neither")
    given = {"x": x, "dy": dy, "mean": mean, "rstd": rstd}
    check_real(**{name: one for name, one in given.items() if one is not None})
    for one in (mean, rstd):
        if one is not None and one.shape != x.shape[:2]:
            raise ValueError(
                f"expected mean and rstd of shape {tuple(x.shape[:2])}, got {tuple(one.shape)}"
            )
