"""Symmetric matrices of which half is made."""

from __future__ import annotations

from torch import Tensor


def mirror_(matrix: Tensor) -> None:
    """Copies the entries above the diagonal of a square matrix to below it."""
    step = 256  # rows: so that what is read across fits a cache
    for start in range(0, len(matrix), step):
        stop = start + step
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
