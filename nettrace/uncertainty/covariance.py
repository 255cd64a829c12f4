"""The second moments of a last layer's features, summed as they come."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from nettrace.ranks import ALONE, Ranks


class Covariance:
    """F^T F over all features seen, not centred, in float64.

    Args:
        sums: (D, D) the sum of f f^T; zeros where nothing was seen yet.
        count: how many features were seen.

    Example:
        >>> import torch
        >>> from nettrace.uncertainty import Covariance
        >>> F = torch.randn(8, 3, dtype=torch.float64)
        >>> one, other = Covariance.of(F[:5]), Covariance.of(F[5:])
        >>> torch.allclose((one + other).sums, F.T @ F)
        True
    """

    def __init__(self, sums: Tensor, count: int = 0) -> None:
        if sums.dim() != 2 or sums.shape[0] != sums.shape[1]:
            raise ValueError(f"expected sums of shape (D, D), got {tuple(sums.shape)}")
        self.sums = wide(sums)
        self.count = count

    def __repr__(self) -> str:
        return f"Covariance of {self.count} features of width {self.width}"

    @property
    def width(self) -> int:
        """D."""
        return len(self.sums)

    @classmethod
    def of(cls, features: Tensor) -> Covariance:
        """That of some features (..., D)."""
        rows = wide(features).reshape(-1, features.shape[-1])
        return cls(rows.T @ rows, len(rows))

    def __add__(self, other: Covariance) -> Covariance:
        """That of the features of both.

        Raises:
            ValueError: if their widths differ.
        """
        if self.width != other.width:
            raise ValueError(
                f"cannot add covariances of {self.width} and of {other.width} features"
            )
        return Covariance(self.sums + other.sums.to(self.sums.device), self.count + other.count)

    def over(self, ranks: Ranks = ALONE) -> Covariance:
        """That of the features of several processes."""
        sums = self.sums.clone()
        ranks.add_([sums])
        return Covariance(sums, sum(ranks.each(self.count)))

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(D,) its eigenvalues, ascending and none below zero, and (D, D) eigenvectors in columns.

        Raises:
            ValueError: if all features are zero.
        """
        values, vectors = torch.linalg.eigh((self.sums + self.sums.T) / 2)
        if not bool((values > 0).any()):
            raise ValueError(
                f"the {self.count} features that go into the last layer are all zero: no variance "
                "follows from them; the units before it may be dead"
            )
        return values.clamp_min(0), vectors

    @property
    def scale(self) -> float:
        """The root of the mean eigenvalue, in units of the features times sqrt(count)."""
        return float(self.spectrum[0].mean().sqrt())

    @property
    def rank(self) -> int:
        """How many eigenvalues are above rounding."""
        values = self.spectrum[0]
        least = values[-1] * self.width * torch.finfo(values.dtype).eps
        return int((values > least).sum())

    def root(self, ridge: float) -> Tensor:
        """(D, D) a matrix R with R R^T = (F^T F + ridge^2)^-1.

        Raises:
            ValueError: if the ridge is too small for a covariance that is singular.
        """
        values, vectors = self.spectrum
        least = float(values[-1]) * self.width * torch.finfo(values.dtype).eps
        if self.rank < self.width and ridge**2 <= least:
            raise ValueError(
                f"the covariance of {self.count} features of width {self.width} has rank "
                f"{self.rank}, so that it has no inverse without a ridge, got ridge={ridge:g}: "
                f"leave out ridge=, or pass one above {least**0.5:.2g}"
            )
        return vectors * (values + ridge**2).rsqrt()


def wide(values: Tensor) -> Tensor:
    """In float64, on the CPU where a device has no such numbers."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()
