"""The spectrum of the neural tangent kernel: entropies, effective ranks, conditioning.

Each is taken of the (N C, N C) kernel and of that summed over outputs, (N, N), for the two can even
change in opposite directions. Entropies as that of a density matrix: Tovey, Krippendorf, Nikolaou
and Holm (2023), arXiv:2305.00995.

Entropies and ranks of few samples are too low. If the gradients fill m dimensions evenly and there
are n > m samples of one output, the entropy is about ln m - m / (2 n) rather than ln m, and ln n -
n / (2 m) if n < m (Page 1993, arXiv:gr-qc/9305007, for complex matrices; the same to this order for
real ones). So compare them at equal N and C alone, or corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nettrace.jackknife import bias_corrected, spectral_error
from nettrace.measures.registry import F, Value, measure

_NTK = "Jacot et al. 2018, arXiv:1806.07572"
_ENTROPY = "Tovey et al. 2023, arXiv:2305.00995"


def _full_and_traced(
    name: str,
    *,
    needs: Iterable[str],
    convention: str,
    dims: Iterable[str] = (),
    source: str,
    grouped: bool = True,
) -> Callable[[F], F]:
    """Registers a function of the kernel's statistics for the kernel summed over outputs too."""

    def register(function: F) -> F:
        full = ("", "", "the (N C, N C) kernel", "N C")
        traced = ("_traced", "traced_", "the (N, N) kernel summed over outputs", "N")
        for suffix, prefix, kernel, modes in (full, traced):
            measure(
                name.format(suffix),
                needs=[need if need == "samples" else prefix + need for need in needs],
                convention=convention.format(kernel=kernel, modes=modes, suffix=suffix),
                dims=[prefix + dim for dim in dims],
                source=source,
                grouped=grouped,
            )(function)
        return function

    return register


@_full_and_traced(
    "ntk/spectrum{}",
    needs=["eigenvalues"],
    convention="eigenvalues of {kernel}, not divided, largest first",
    dims=["mode"],
    source=_NTK,
)
def spectrum(eigenvalues: Tensor) -> Tensor:
    """The kernel's eigenvalues."""
    return eigenvalues


@_full_and_traced(
    "ntk/entropy{}",
    needs=["eigenvalues", "eigenvectors"],
    convention="nats, of eigenvalues of {kernel} over their sum; standard error over samples",
    source=_ENTROPY,
)
def entropy(eigenvalues: Tensor, eigenvectors: Tensor) -> Value:
    """The von Neumann entropy, -sum p ln p; traced and not, it can change in opposite directions.

    Of few samples it is too low; see `ntk/entropy_corrected`.
    """
    return _with_error(shannon, eigenvalues, eigenvectors)


@_full_and_traced(
    "ntk/entropy{}_normalised",
    needs=["eigenvalues", "eigenvectors"],
    convention="ntk/entropy{suffix} over ln({modes}), in [0, 1]; standard error over samples",
    source=_ENTROPY,
)
def entropy_normalised(eigenvalues: Tensor, eigenvectors: Tensor) -> Value:
    """The von Neumann entropy in units of its maximum."""
    largest = math.log(max(len(eigenvalues), 2))
    return _with_error(lambda values: shannon(values) / largest, eigenvalues, eigenvectors)


@_full_and_traced(
    "ntk/entropy{}_corrected",
    needs=["eigenvalues", "partial_eigenvalues", "samples"],
    convention="nats, ntk/entropy{suffix} less its bias of order 1/N by the jackknife, leaving out "
    "up to 16 groups of samples in turn; standard error over samples",
    source=f"Busing et al. 1999, Delete-m jackknife; {_ENTROPY}",
    grouped=False,
)
def entropy_corrected(eigenvalues: Tensor, partial: Sequence[Tensor], samples: int) -> Value:
    """The von Neumann entropy that more samples would tend to.

    Right where there are several times as many samples as modes that matter; nearer the limit, but
    still below it, where there are fewer. It takes up to 16 further eigendecompositions.
    """
    without = torch.stack([shannon(values) for values in partial])
    return Value(*bias_corrected(shannon(eigenvalues), without, samples))


@_full_and_traced(
    "ntk/effective_rank{}",
    needs=["eigenvalues", "eigenvectors"],
    convention="exponential of ntk/entropy{suffix}, between 1 and {modes}; standard error over "
    "samples",
    source="Roy and Vetterli 2007, The effective rank",
)
def effective_rank(eigenvalues: Tensor, eigenvectors: Tensor) -> Value:
    """How many modes the kernel has, as the exponential of its entropy."""
    return _with_error(lambda values: shannon(values).exp(), eigenvalues, eigenvectors)


@_full_and_traced(
    "ntk/participation_ratio{}",
    needs=["eigenvalues", "eigenvectors"],
    convention="(sum l)^2 / sum l^2 over eigenvalues l of {kernel}, between 1 and {modes}; "
    "standard error over samples",
    source="Bell and Dean 1970; exponential of the Renyi-2 entropy",
)
def participation_ratio(eigenvalues: Tensor, eigenvectors: Tensor) -> Value:
    """How many modes the kernel has, as their inverse mean share."""
    return _with_error(_inverse_mean_share, eigenvalues, eigenvectors)


@_full_and_traced(
    "ntk/smallest_eigenvalue{}",
    needs=["eigenvalues", "gram"],
    convention="of {kernel}, not divided, as found: up to the attribute rounding, {modes} times "
    "the kernel's precision times the largest, it is rounding",
    source=_NTK,
)
def smallest_eigenvalue(eigenvalues: Tensor, gram: Tensor) -> Value:
    """The kernel's smallest eigenvalue: how slowly its slowest mode is learnt."""
    floor, resolved = _rounding(eigenvalues, gram)
    return Value(eigenvalues[-1], attributes={"rounding": floor, "resolved_modes": resolved})


@_full_and_traced(
    "ntk/condition_number{}",
    needs=["eigenvalues", "gram"],
    convention="largest over smallest eigenvalue of {kernel}, the smallest taken to be at least "
    "{modes} times the kernel's precision times the largest: a lower bound where the attribute "
    "resolved_modes is below {modes}",
    source=_NTK,
)
def condition_number(eigenvalues: Tensor, gram: Tensor) -> Value:
    """How many times faster the fastest mode is learnt than the slowest."""
    floor, resolved = _rounding(eigenvalues, gram)
    ratio = eigenvalues[0] / eigenvalues[-1].clamp_min(floor)
    return Value(ratio, attributes={"resolved_modes": resolved})


def shannon(weights: Tensor) -> Tensor:
    """-sum p ln p in nats for p = weights over their sum; negative weights, rounding, count as 0.

    Raises:
        ValueError: if the weights are zero or not finite throughout.
    """
    p = _shares(weights)
    return -torch.xlogy(p, p).sum()


def _inverse_mean_share(weights: Tensor) -> Tensor:
    return 1 / _shares(weights).square().sum()


def _shares(weights: Tensor) -> Tensor:
    weights = weights.double().clamp_min(0)
    total = weights.sum()
    if not bool(total > 0) or not bool(total.isfinite()):
        raise ValueError(
            f"the entropy of weights that sum to {float(total)} is not defined: the kernel is zero "
            "or not finite"
        )
    return weights / total


def _with_error(
    functional: Callable[[Tensor], Tensor], eigenvalues: Tensor, eigenvectors: Tensor
) -> Value:
    error = spectral_error(functional, eigenvalues, eigenvectors)
    return Value(functional(eigenvalues), error)


def _rounding(eigenvalues: Tensor, gram: Tensor) -> tuple[float, int]:
    """Up to which an eigenvalue is rounding of the kernel's entries, and how many are above."""
    if not bool(eigenvalues[0] > 0):
        raise ValueError("the condition of a kernel that is zero is not defined")
    floor = float(len(eigenvalues) * torch.finfo(gram.dtype).eps * eigenvalues[0])
    return floor, int((eigenvalues > floor).sum())
