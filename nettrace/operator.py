"""The Jacobian of a network's outputs with respect to its parameters, as an implicit operator.

For outputs f of shape (N, C) and P parameters the Jacobian has N C rows of length P. It is never
formed: cotangents are pulled back to the operations that use a parameter, and the per-sample
gradients stay factored (see `nettrace.kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from nettrace.approximations import Approximations
from nettrace.gradients import Gradients, Pulled, reals
from nettrace.kernels import blocks, fold, gram, inner, sqnorms

PerLayer: TypeAlias = dict[str, Tensor]
#: A piece of a result: for one parameter, at some indices, a sum to add.
_Piece: TypeAlias = tuple[str, tuple[slice, ...], Tensor]


class Jacobian(Approximations):
    """An implicit (N, C) x P matrix of derivatives; made by `jacobian`.

    All results are plain sums, without any mean. Where `per_layer=True`, a mapping from parameter
    name to that parameter's share is returned. Results have the outputs' dtype, at least float32.
    A complex parameter counts as pairs of reals.

    Attributes:
        samples: N.
        outputs: C.
        parameters: P.
    """

    def __init__(self, gradients: Gradients, memory: int, cotangents: Tensor | None = None) -> None:
        shape = gradients.outputs.shape
        self.samples = shape[0]
        self.outputs = shape[1:].numel() if cotangents is None else len(cotangents)
        self.parameters = sum(map(reals, gradients.parameters.values()))
        self._gradients = gradients
        self._memory = memory
        self._cotangents = cotangents

    def __repr__(self) -> str:
        return (
            f"Jacobian of {self.samples} x {self.outputs} outputs by {self.parameters} parameters"
        )

    # What is asked for ----------------------------------------------------------------------------

    @overload
    def gram(self, *, trace_outputs: bool = ..., per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def gram(self, *, trace_outputs: bool = ..., per_layer: Literal[True]) -> PerLayer: ...
    def gram(self, *, trace_outputs: bool = False, per_layer: bool = False) -> Tensor | PerLayer:
        """The Gram matrix J J^T, the empirical neural tangent kernel.

        Returns:
            (N, C, N, C), or, summed over equal outputs with `trace_outputs`, (N, N).

        Raises:
            CoupledSamplesError: if samples are coupled.
            MemoryError: if the result alone would exceed the memory budget.
        """
        n, c = self.samples, self.outputs
        shape = (n, n) if trace_outputs else (n, c, n, c)
        self._afford(shape, per_layer)
        pieces = self._traced_gram() if trace_outputs else self._full_gram()
        return self._collect(shape, pieces, per_layer)

    @overload
    def blocks(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def blocks(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def blocks(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The per-sample diagonal blocks of the Gram matrix, (N, C, C).

        Raises:
            CoupledSamplesError: if samples are coupled.
            MemoryError: if the result alone would exceed the memory budget.
        """
        shape = (self.samples, self.outputs, self.outputs)
        self._afford(shape, per_layer)
        return self._collect(shape, self._blocks(), per_layer)

    def gram_and_layer_blocks(self) -> tuple[Tensor, PerLayer]:
        """`gram()` and `blocks(per_layer=True)` together, for the price of the first.

        Raises:
            CoupledSamplesError: if samples are coupled.
            MemoryError: if the results alone would exceed the memory budget.
        """
        n, c = self.samples, self.outputs
        self._afford((n, c, n, c), per_layer=False)
        self._afford((n, c, c), per_layer=True)
        blocks = {name: self._zeros((n, c, c)) for name in self._gradients.parameters}

        def diagonals() -> Iterator[_Piece]:
            for name, (ns, ks, ms, js), piece in self._full_gram():
                if ns == ms:
                    blocks[name][ns, ks, js] += piece.diagonal(dim1=0, dim2=2).movedim(-1, 0)
                yield name, (ns, ks, ms, js), piece

        gram = self._collect((n, c, n, c), diagonals(), per_layer=False)
        assert isinstance(gram, Tensor)
        return gram, blocks

    @overload
    def norms(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def norms(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def norms(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The Euclidean norms of the rows, (N, C); the squares of the layers' shares add up.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        squares = self._collect((self.samples, self.outputs), self._sqnorms(), per_layer)
        if isinstance(squares, dict):
            return {name: s.sqrt() for name, s in squares.items()}
        return squares.sqrt()

    @overload
    def trace(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def trace(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def trace(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The trace of the Gram matrix: the sum of squares of all entries of the Jacobian.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        squares = self._collect((self.samples, self.outputs), self._sqnorms(), per_layer)
        if isinstance(squares, dict):
            return {name: s.sum() for name, s in squares.items()}
        return squares.sum()

    @overload
    def jvp(
        self, u: Tensor | Mapping[str, Tensor], *, per_layer: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def jvp(self, u: Tensor | Mapping[str, Tensor], *, per_layer: Literal[True]) -> PerLayer: ...
    def jvp(
        self, u: Tensor | Mapping[str, Tensor], *, per_layer: bool = False
    ) -> Tensor | PerLayer:
        """The product J u, (N, C); costs one backward pass an output.

        Args:
            u: a vector of length P, in the order of the parameters, or a tensor for each of them by
                name.
            per_layer: whether to keep the parameters' shares apart.

        Raises:
            CoupledSamplesError: if samples are coupled.
            ValueError: if `u` has the wrong shape.
        """
        shape = (self.samples, self.outputs)
        return self._collect(shape, self._inner(self._split(u)), per_layer)

    @overload
    def vjp(self, v: Tensor, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def vjp(self, v: Tensor, *, per_layer: Literal[True]) -> PerLayer: ...
    def vjp(self, v: Tensor, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The product J^T v; costs one backward pass.

        Args:
            v: (N, C), or of the outputs' shape.
            per_layer: whether to return each parameter's share, in that parameter's shape.

        Returns:
            A vector of length P, in the order of the parameters.

        Raises:
            ValueError: if `v` has the wrong shape.
        """
        if v.dim() == 0 or len(v) != self.samples or v.numel() != self.samples * self.outputs:
            raise ValueError(
                f"expected v of shape {(self.samples, self.outputs)}, got {tuple(v.shape)}"
            )
        v = v.detach().reshape(self.samples, self.outputs).to(self._gradients.outputs)
        if self._cotangents is not None:
            v = torch.einsum("nk,knc->nc", v, self._cotangents)
        shares = self._gradients.backward(v)
        return shares if per_layer else self._flat(shares)

    def rows(self, n: int) -> Tensor:
        """The rows of sample `n`, (C, P), by plain autograd: for checking.

        Raises:
            IndexError: if there is no such sample.
        """
        if not -self.samples <= n < self.samples:
            raise IndexError(f"expected a sample below {self.samples}, got {n}")
        rows = []
        for k in range(self.outputs):
            cotangent = self._basis(slice(k, k + 1))[0]
            only = torch.zeros_like(cotangent)
            only[n] = cotangent[n]
            rows.append(self._flat(self._gradients.backward(only)))
        return torch.stack(rows)

    def project(self, cotangents: Tensor) -> Jacobian:
        """The Jacobian of linear combinations of the outputs, sample by sample.

        Args:
            cotangents: (K, N, C) coefficients.

        Returns:
            The implicit (N, K) x P operator with rows sum_c cotangents[k, n, c] J[n, c].

        Raises:
            ValueError: if the coefficients have the wrong shape.
        """
        if cotangents.dim() != 3 or cotangents.shape[1:] != (self.samples, self.outputs):
            raise ValueError(
                f"expected cotangents of shape (K, {self.samples}, {self.outputs}), got "
                f"{tuple(cotangents.shape)}"
            )
        cotangents = cotangents.detach().to(self._gradients.outputs)
        if self._cotangents is not None:
            cotangents = torch.einsum("jnk,knc->jnc", cotangents, self._cotangents)
        return Jacobian(self._gradients, self._memory, cotangents)

    def coverage(self) -> dict[str, str]:
        """How each parameter's per-sample gradients are found; every route is exact.

        Returns:
            By parameter name: "rule", by tape rules; "node", by the backward of the operations that
            use it, run one sample at a time; "rows", by one backward pass a row; "unused", if the
            outputs do not depend on it.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        return self._gradients.coverage()

    # How it is summed: a chunk of cotangents is pulled back, a tile of samples contracted.

    def _sqnorms(self) -> Iterator[_Piece]:
        for ks, pulled in self._chunks():
            for name in self._gradients.names:
                for ns in self._tiles(name, pulled):
                    x = self._gradients.factor(name, pulled, ns)
                    yield name, (ns, ks), sqnorms(x).T

    def _inner(self, vectors: PerLayer) -> Iterator[_Piece]:
        for ks, pulled in self._chunks():
            for name in self._gradients.names:
                for ns in self._tiles(name, pulled):
                    x = self._gradients.factor(name, pulled, ns, oriented=True)
                    yield name, (ns, ks), inner(x, vectors[name]).T

    def _blocks(self) -> Iterator[_Piece]:
        for ks, pulled, js, others in self._pairs():
            for name in self._gradients.names:
                for ns in self._tiles(name, pulled):
                    x = self._gradients.factor(name, pulled, ns)
                    y = x if ks == js else self._gradients.factor(name, others, ns)
                    piece = blocks(x, y)
                    yield name, (ns, ks, js), piece
                    if ks != js:
                        yield name, (ns, js, ks), piece.mT

    def _traced_gram(self) -> Iterator[_Piece]:
        for _, pulled in self._chunks():
            for name in self._gradients.names:
                tiles = self._tiles(name, pulled)
                for i, ns in enumerate(tiles):
                    x = fold(self._gradients.factor(name, pulled, ns))
                    for ms in tiles[: i + 1]:
                        y = x if ns == ms else fold(self._gradients.factor(name, pulled, ms))
                        piece = gram(x, y)[:, 0, :, 0]
                        yield name, (ns, ms), piece
                        if ns != ms:
                            yield name, (ms, ns), piece.T

    def _full_gram(self) -> Iterator[_Piece]:
        for ks, pulled, js, others in self._pairs():
            for name in self._gradients.names:
                tiles = self._tiles(name, pulled)
                for i, ns in enumerate(tiles):
                    x = self._gradients.factor(name, pulled, ns)
                    for ms in tiles[: i + 1] if ks == js else tiles:
                        same = (ns, ks) == (ms, js)
                        y = x if same else self._gradients.factor(name, others, ms)
                        piece = gram(x, y)
                        yield name, (ns, ks, ms, js), piece
                        if not same:
                            yield name, (ms, js, ns, ks), piece.permute(2, 3, 0, 1)

    def _collect(
        self, shape: tuple[int, ...], pieces: Iterator[_Piece], per_layer: bool
    ) -> Tensor | PerLayer:
        with torch.no_grad():
            if per_layer:
                shares = {name: self._zeros(shape) for name in self._gradients.parameters}
                for name, where, piece in pieces:
                    shares[name][where] += piece
                return shares
            total = self._zeros(shape)
            for _, where, piece in pieces:
                total[where] += piece
            return total

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        outputs = self._gradients.outputs
        return torch.zeros(shape, dtype=self._gradients.dtype, device=outputs.device)

    def _chunks(self, held: int = 1) -> Iterator[tuple[slice, Pulled]]:
        """Ranges of outputs with their pullbacks, of which the budget has room for `held`."""
        room = self._memory // (2 * held)
        step = max(1, room // max(1, self._gradients.bytes_per_cotangent()))
        for start in range(0, self.outputs, step):
            ks = slice(start, min(start + step, self.outputs))
            yield ks, self._gradients.pull(self._basis(ks))

    def _pairs(self) -> Iterator[tuple[slice, Pulled, slice, Pulled]]:
        """Every two ranges of outputs once."""
        for ks, pulled in self._chunks(held=2):
            yield ks, pulled, ks, pulled
            if ks.stop < self.outputs:
                for js, others in self._chunks(held=2):
                    if js.start > ks.start:
                        yield ks, pulled, js, others

    def _tiles(self, name: str, pulled: Pulled) -> list[slice]:
        """Ranges of samples that the budget has room to contract, two at a time."""
        each = self._gradients.bytes_per_sample(name, pulled)
        step = max(1, self._memory // max(1, 6 * each))
        return [slice(i, min(i + step, self.samples)) for i in range(0, self.samples, step)]

    def _basis(self, ks: slice) -> Tensor:
        """The cotangents whose pullbacks are the rows numbered `ks`, (K, *outputs.shape)."""
        outputs = self._gradients.outputs
        if self._cotangents is not None:
            return self._cotangents[ks].view(-1, *outputs.shape)
        numbers = torch.arange(ks.start, ks.stop, device=outputs.device)
        basis = torch.zeros(
            (len(numbers), self.samples, self.outputs), dtype=outputs.dtype, device=outputs.device
        )
        basis.scatter_(2, numbers.view(-1, 1, 1).expand(-1, self.samples, 1), 1)
        return basis.view(-1, *outputs.shape)

    def _afford(self, shape: tuple[int, ...], per_layer: bool) -> None:
        copies = len(self._gradients.parameters) if per_layer else 1
        size = torch.Size(shape).numel() * copies * self._gradients.dtype.itemsize
        if size > self._memory:
            raise MemoryError(
                f"the result, of shape {shape}{' for each layer' if per_layer else ''}, takes "
                f"{size:.3g} bytes, above the memory budget of {self._memory:.3g} bytes: take "
                "fewer samples, raise memory_budget, or sum over outputs with "
                "gram(trace_outputs=True)"
            )

    def _flat(self, shares: PerLayer) -> Tensor:
        parts = [torch.view_as_real(s) if s.is_complex() else s for s in shares.values()]
        return torch.cat([part.flatten().to(self._gradients.dtype) for part in parts])

    def _split(self, u: Tensor | Mapping[str, Tensor]) -> PerLayer:
        parameters = self._gradients.parameters
        if isinstance(u, Mapping):
            if extra := set(u) - set(parameters):
                raise ValueError(f"u has entries for {sorted(extra)}, which are no parameters here")
            for name, p in parameters.items():
                if name not in u or u[name].shape != p.shape:
                    got = tuple(u[name].shape) if name in u else "nothing"
                    raise ValueError(f"expected u[{name!r}] of shape {tuple(p.shape)}, got {got}")
            parts = [u[name].detach() for name in parameters]
            parts = [torch.view_as_real(v) if v.is_complex() else v for v in parts]
            return dict(zip(parameters, parts, strict=True))
        if u.shape != (self.parameters,):
            raise ValueError(f"expected u of shape ({self.parameters},), got {tuple(u.shape)}")
        split = u.detach().split([reals(p) for p in parameters.values()])
        return dict(zip(parameters, split, strict=True))
