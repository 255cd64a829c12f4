"""The batch size at which gradient noise and signal matter alike, as the loss is curved.

A step eta along the mean gradient g of B samples changes the loss, to second order, by

    - eta g^T G + eta^2 / 2 g^T H g,    of which the last is G^T H G + tr(H Sigma) / B on average,

with G, Sigma and H the expected gradient, the covariance of single samples' and the Hessian of the
expected loss. So the best step lowers the loss half as much as without noise at B = B_noise =
tr(H Sigma) / (G^T H G): McCandlish et al. (2018), arXiv:1812.06162, equations 2.5 to 2.8. Where H
is a multiple of the identity, that is the simple noise scale.

Both are averages over parts m of the samples, of the Hessian H_m of the part's mean loss with the n
samples that are not of it, of which g is the mean and D the sum over samples of d^T H_m d, d the
gradients less g: tr(H Sigma) = D / (n - 1) and G^T H G = g^T H_m g - D / (n (n - 1)).

With 8 parts it takes 24 products with Hessians, whatever the number of samples: as long as some
hundred training steps, and the memory of three backward passes.
"""

from __future__ import annotations

import torch

from nettrace.gradient_curvature import GradientCurvature
from nettrace.measures.registry import Value, measure


@measure(
    "gradients/critical_batch_size",
    needs=["gradient_curvature"],
    convention="tr(H Sigma) / (G^T H G), in samples, with H the Hessian of the mean loss; both are "
    "without bias, each Hessian being that of other samples than the gradients, the ratio not; "
    "negative where the loss is not seen to be convex along the gradient; "
    "standard error over samples and random signs, by parts of the samples",
    source="McCandlish et al. 2018, arXiv:1812.06162, equation 2.8",
    grouped=False,
)
def critical_batch_size(gradient_curvature: GradientCurvature) -> Value:
    """The batch size at which noise takes half of what a step gains; by Hessian products."""
    found = gradient_curvature
    squares, overlaps = found.squares, found.overlaps
    parts, samples = squares.shape
    own = torch.zeros_like(squares, dtype=torch.bool)
    for m, part in enumerate(found.parts):
        own[m, part] = True
    counts = (~own).sum(1)
    noises = squares.masked_fill(own, 0).sum(1) / (counts - 1)
    of_means = overlaps.masked_fill(own, 0).sum(1) / counts
    signals = of_means - noises / counts
    noise, signal = noises.mean(), signals.mean()
    scale = noise / signal
    # How far each sample moves noise - scale * signal: by its gradient, and by its part's Hessian.
    shares = counts[:, None] / (counts[:, None] - 1) * squares - noises[:, None]
    moves = shares * (1 + scale / samples) - 2 * scale * (overlaps - of_means[:, None])
    moves = moves.masked_fill(own, 0).sum(0) / (~own).sum(0)
    by_gradients = torch.stack([moves[part].mean() for part in found.parts]) * samples / counts
    influences = (noises - scale * signals + by_gradients) / signal
    error = (influences.square().sum() / (parts * (parts - 1))).sqrt()
    attributes = {
        "hessian_noise": float(noise),
        "hessian_signal": float(signal),
        "hessian_products": found.products,
        "squares": "exact" if found.is_exact else "by random signs",
    }
    return Value(scale, error, attributes=attributes)
