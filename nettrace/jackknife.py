"""Standard errors over samples: how far a value scatters over probes of the same size.

The samples of a probe are taken as drawn independently of each other; the error says how well the
value is known for their source, at this number of samples. So the error of a mean is s / sqrt(N)
and that of a sum s sqrt(N), with s the standard deviation of the samples' shares: the same error
relative to the value.

It does not see the bias of small samples. Of entropies of few modes it is 5 % too narrow for 60
samples and 10 % for 24; where as many modes matter as there are samples, it is too wide, by a third
for entropies, two thirds for participation ratios.

Left out one by one, or weighed with weights w_n infinitesimally off 1, the samples say by
themselves how far the value depends on each: Tukey (1958), Jaeckel (1972), Efron, Estimation and
accuracy after model selection (2014).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: How many groups of samples are left out in turn, at most.
GROUPS = 16


def infinitesimal_error(slopes: Tensor) -> Tensor:
    """The standard error of a value by its derivatives (N, ...) by the weights of the samples.

    With the derivatives x_n / N of a mean, it is the standard error of the mean. NaN for a single
    sample.
    """
    count = len(slopes)
    squares = (slopes - slopes.mean(0)).double().square().sum(0)
    return (squares * count / (count - 1 or torch.nan)).sqrt()


def delete_one_error(values: Tensor) -> Tensor:
    """The standard error of a value from what it is without sample n, for each n, (N,)."""
    count = len(values)
    return ((values - values.mean(0)).double().square().sum(0) * (count - 1) / count).sqrt()


def spectral_error(
    functional: Callable[[Tensor], Tensor], eigenvalues: Tensor, eigenvectors: Tensor
) -> Tensor:
    """The standard error of a symmetric function of a kernel's eigenvalues.

    Weights w_n on samples make the kernel D^1/2 K D^1/2, D = diag(w), so that d lambda_k / d w_n =
    lambda_k sum_c v_k[n, c]^2: no further eigendecomposition is needed.

    Args:
        functional: from positive eigenvalues to a number, differentiable.
        eigenvalues: (K,), of which those that are not positive are left out.
        eigenvectors: (N, C, K) or (N, K), in the same order.
    """
    positive = eigenvalues > 0
    values = eigenvalues[positive].requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(functional(values), values)
    shares = eigenvectors.square().reshape(len(eigenvectors), -1, len(eigenvalues)).sum(1)
    return infinitesimal_error(shares[:, positive] @ (slopes * values.detach()))


def parts_of(samples: int) -> list[Tensor]:
    """The numbers of the samples that are left when each of up to 16 groups is left out.

    The groups are dealt out at random, always the same.

    Raises:
        ValueError: if there is but one sample.
    """
    if samples < 2:
        raise ValueError(f"a bias over samples needs at least 2 samples, got {samples}")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    groups = [order[g::GROUPS] for g in range(min(GROUPS, samples))]
    return [torch.cat([g for g in groups if g is not group]).sort().values for group in groups]


def bias_corrected(whole: Tensor, without: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """A value less the part of its bias that falls as 1 / N, and its standard error.

    Busing, Meijer and van der Leeden, Delete-m jackknife for unequal m (1999).

    Args:
        whole: the value with all samples.
        without: (G,) the values with each of `parts_of(samples)`.
        samples: N.
    """
    # N / m_g, for groups of m_g
    parts = samples / torch.tensor([samples - len(p) for p in parts_of(samples)]).to(without)
    corrected = len(without) * whole - ((1 - 1 / parts) * without).sum()
    pseudo = parts * whole - (parts - 1) * without
    variance = ((pseudo - corrected).square() / (parts - 1)).mean()
    return corrected, variance.sqrt()


def subsets(count: int) -> Tensor:
    """(N, 1 + G) which samples there are: all, and those left without each of up to 16 groups.

    Functions of sums over samples or pairs of them are had for all of these at once, by products
    with this matrix, and their errors by `error_of_subsets`.

    Raises:
        ValueError: if there are fewer than five samples.
    """
    if count < 5:
        raise ValueError(f"expected a probe of 5 samples or more, got {count}: take more of them")
    found = torch.zeros(1 + min(GROUPS, count), count, dtype=torch.float64)
    found[0] = 1
    for row, part in zip(found[1:], parts_of(count), strict=True):
        row[part] = 1
    return found.T.contiguous()


def error_of_subsets(values: Tensor) -> tuple[Tensor, Tensor]:
    """A value (...,) and its standard error, from its values (..., 1 + G) for `subsets`.

    The error is 0 where a value is infinite.
    """
    value, without = values[..., 0], values[..., 1:].movedim(-1, 0)
    finite = without.isfinite().all(0) & value.isfinite()
    return value, torch.where(finite, delete_one_error(without), 0.0)
