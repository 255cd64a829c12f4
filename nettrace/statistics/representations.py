"""Statistics of what layers make of the samples: activations, their kernels, nearest neighbours."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from nettrace.batch import tensors
from nettrace.operator import PerLayer
from nettrace.representations import captured
from nettrace.statistics.look import Inapplicable, Look, Unavailable


class RepresentationStatistics(Look):
    """The activations of `probe.layers`, flattened: an axis of samples and one of units.

    Complex units count as two real ones. Kernels are those of minibatches of at most 1,024 samples
    each, evenly dealt, so that they take memory in proportion to the samples.
    """

    #: Samples in a minibatch, at most.
    minibatch = 1024
    #: How many nearest neighbours are found.
    neighbours = 10
    #: Distances that are held at a time.
    _tile = 2**24

    @cached_property
    def activations(self) -> PerLayer:
        """(N, d) what layers make of the samples, by name."""
        # All processes look at all samples: each would find other layers for its own, such as
        # experts that none of these takes.
        found = captured(self._model, self._probe, self.samples, self._probe.layers, self._memory)
        return {name: _flat(one) for name, one in found.items()}

    @cached_property
    def representation_kernels(self) -> PerLayer:
        """(B, n, n) inner products of activations, centred, of B minibatches of n samples each."""
        return {name: self._kernels(one, name) for name, one in self.activations.items()}

    @cached_property
    def input_kernels(self) -> Tensor:
        """(B, n, n) those of the probe's floating inputs."""
        found = [t for t in tensors(self._probe.inputs) if _counts(t, self.samples)]
        if not found:
            raise Inapplicable("the probe has no inputs of numbers with one row a sample")
        return self._kernels(torch.cat([_flat(t).double() for t in found], 1), "inputs")

    @cached_property
    def target_kernels(self) -> Tensor:
        """(B, n, n) those of the targets; of classes, whether they are the same."""
        if not (self.targets.is_floating_point() or self.targets.is_complex()):
            labels = self.classes
            return self._kernels((labels[:, None] == labels.unique()).double(), "targets")
        if not _counts(self.targets, self.samples):
            raise Unavailable(
                f"expected targets with one row for each of {self.samples} samples, got shape "
                f"{tuple(self.targets.shape)}"
            )
        return self._kernels(_flat(self.targets), "targets")

    @cached_property
    def representation_ranks(self) -> PerLayer:
        """(B, n, n) ranks of the distances between activations, above the diagonal, centred."""
        return {name: _ranks(one) for name, one in self.representation_kernels.items()}

    @cached_property
    def input_ranks(self) -> Tensor:
        """(B, n, n) those of the inputs."""
        return _ranks(self.input_kernels)

    @cached_property
    def target_ranks(self) -> Tensor:
        """(B, n, n) those of the targets."""
        return _ranks(self.target_kernels)

    @cached_property
    def classes(self) -> Tensor:
        """(N,) the class of each sample, as the targets number them."""
        targets = self.targets
        if targets.is_floating_point() or targets.is_complex():
            raise Inapplicable("the targets are no classes")
        if targets.numel() != self.samples or len(targets) != self.samples:
            raise Unavailable(
                f"expected a class for each of {self.samples} samples, got targets of shape "
                f"{tuple(targets.shape)}"
            )
        return targets.flatten()

    @property
    def neighbour_distances(self) -> PerLayer:
        """(M, k) distances of each distinct sample's activations to the nearest others, by layer.

        Samples of which the activations are the same count as one.
        """
        return {name: found[0] for name, found in self._neighbours.items()}

    @property
    def neighbour_numbers(self) -> PerLayer:
        """(M, k) which these are, of the M distinct samples, by layer."""
        return {name: found[1] for name, found in self._neighbours.items()}

    @cached_property
    def _neighbours(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: self._nearest(_spread(a, name)) for name, a in self.activations.items()}

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.unique(dim=0)
        count = min(self.neighbours, len(rows) - 1)
        squares, found = rows.square().sum(1), []
        tile = max(1, self._tile // len(rows))
        for some in torch.arange(len(rows), device=rows.device).split(tile):
            apart = squares[some, None] + squares - 2 * rows[some] @ rows.T
            apart[torch.arange(len(some)), some] = torch.inf
            found.append(apart.topk(count, largest=False).indices)
        near = torch.cat(found)
        # Anew, since differences of large squares are not exact.
        distances = torch.empty(near.shape, dtype=rows.dtype, device=rows.device)
        for k, numbers in enumerate(near.T):
            distances[:, k] = torch.linalg.vector_norm(rows - rows[numbers], dim=1)
        distances, order = distances.sort(1)
        return distances, near.gather(1, order)

    def _kernels(self, rows: Tensor, name: str) -> Tensor:
        """(B, n, n) of rows (N, d); if n does not divide N, the last samples are left out."""
        count = -(-len(rows) // self.minibatch)
        size = len(rows) // count
        # Dealt out, as samples are often in order of their classes.
        dealt = _spread(rows, name)[: size * count].unflatten(0, (size, count)).transpose(0, 1)
        batches: Tensor = dealt - dealt.mean(1, keepdim=True)
        return batches @ batches.mT


def _ranks(kernels: Tensor) -> Tensor:
    """Ranks of the pairs' distances, less their mean, each pair once; equal ones share theirs."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    n, squares = kernels.shape[-1], kernels.diagonal(dim1=-2, dim2=-1)
    above = tuple(torch.triu_indices(n, n, 1))
    apart = (squares[..., None] + squares[..., None, :] - 2 * kernels).cpu()[..., *above]
    # Equal distances differ by rounding, which must not rank them.
    found = torch.zeros(kernels.shape, dtype=torch.float64)
    if n > 1:
        scale = apart.amax(-1, keepdim=True).clamp_min(torch.finfo(apart.dtype).tiny)
        ranks = torch.from_numpy(rankdata((apart / scale).numpy().round(10), axis=-1))
        found[..., *above] = ranks - ranks.mean(-1, keepdim=True)
    return found.to(kernels.device)


def _flat(rows: Tensor) -> Tensor:
    """(N, d) real numbers."""
    rows = rows.detach()
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    return rows.reshape(len(rows), -1)


def _counts(tensor: Tensor, samples: int) -> bool:
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return numbers and tensor.dim() > 0 and len(tensor) == samples


def _spread(rows: Tensor, name: str) -> Tensor:
    """(N, d) in float64, less their mean: zeros, where what is left is rounding."""
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name!r} are not finite: the training diverges, or the probe is not")
    precision = torch.finfo(rows.dtype).eps if rows.is_floating_point() else 0.0
    wide = rows.double()
    spread = wide - wide.mean(0)
    is_rounding = spread.abs().amax() <= 8 * precision * wide.abs().amax() if rows.numel() else True
    return torch.zeros_like(spread) if is_rounding else spread
