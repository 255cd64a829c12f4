"""The Jacobian of a network's outputs with respect to its parameters, as an implicit operator.

For outputs f of shape (N, C) and P parameters the Jacobian has N C rows of length P. It is never
formed: cotangents are pulled back to the operations that use a parameter, and the per-sample
gradients stay factored (see `nettrace.kernels`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from nettrace.approximations import Approximations
from nettrace.gradients import Gradients, Layer, Pulled, reals
from nettrace.kernels import blocks, column_sqnorms, gram_, inner, mirror_, sqnorms, traced_gram_
from nettrace.kernels.launch import plainly
from nettrace.scaled import ScaledGradients

PerLayer: TypeAlias = dict[str, Tensor]
#: In place of a parameter's name, all of them together.
_ALL = ""


class OverBudgetError(MemoryError):
    """A result alone would take more than the memory budget: more memory free would not help."""


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
        shares = self._shares(shape, per_layer)
        with plainly(self._gradients.outputs.device):
            if trace_outputs:
                self._add_traced_gram(shares)
            else:
                self._add_gram(shares)
        self._gradients.complete(shares)
        return shares if per_layer else shares[_ALL]

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
        shares = self._shares(shape, per_layer)
        with plainly(self._gradients.outputs.device):
            for layers in self._parts(per_layer, self.outputs):
                for ks, pulled, js, others in self._pairs(layers):
                    self._add_blocks(shares, layers, ks, pulled, js, others)
        self._gradients.complete(shares)
        return shares if per_layer else shares[_ALL]

    def gram_and_layer_blocks(self) -> tuple[Tensor, PerLayer]:
        """`gram()` and `blocks(per_layer=True)` together, for the price of the first.

        Raises:
            CoupledSamplesError: if samples are coupled.
            MemoryError: if the results alone would exceed the memory budget.
        """
        n, c = self.samples, self.outputs
        self._afford((n, c, n, c), per_layer=False)
        self._afford((n, c, c), per_layer=True)
        gram, shares = self._shares((n, c, n, c), False), self._shares((n, c, c), True)
        with plainly(self._gradients.outputs.device):
            self._add_gram(gram, shares)
        self._gradients.complete({**gram, **shares})
        return gram[_ALL], shares

    @overload
    def norms(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def norms(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def norms(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The Euclidean norms of the rows, (N, C); the squares of the layers' shares add up.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        norms = {name: s.sqrt() for name, s in self._sqnorms(per_layer).items()}
        return norms if per_layer else norms[_ALL]

    @overload
    def trace(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def trace(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def trace(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The trace of the Gram matrix: the sum of squares of all entries of the Jacobian.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        traces = {name: s.sum() for name, s in self._sqnorms(per_layer).items()}
        return traces if per_layer else traces[_ALL]

    @overload
    def column_sqnorms(self, *, per_layer: Literal[False] = ...) -> Tensor: ...
    @overload
    def column_sqnorms(self, *, per_layer: Literal[True]) -> PerLayer: ...
    def column_sqnorms(self, *, per_layer: bool = False) -> Tensor | PerLayer:
        """The squared norms of the columns: by parameter, squares summed over all N C rows.

        They are the diagonal of J^T J, and sum to the trace of the Gram matrix.

        Returns:
            (P,), in the order of the parameters; or each parameter's share, in its shape, with a
            last axis of length two if it is complex.

        Raises:
            CoupledSamplesError: if samples are coupled.
        """
        parameters = self._gradients.parameters
        shares = {name: self._zeros((reals(p),)) for name, p in parameters.items()}
        with plainly(self._gradients.outputs.device):
            for layers in self._parts(apart=True):
                for ks, pulled in self._chunks(layers):
                    for (name,) in layers:
                        for ns in self._tiles((name,), ks):
                            x = self._gradients.factor((name,), pulled, ns, oriented=True)
                            shares[name] += column_sqnorms(x)
        self._gradients.complete(shares)
        if not per_layer:
            return torch.cat(list(shares.values()))
        real = {n: torch.view_as_real(p) if p.is_complex() else p for n, p in parameters.items()}
        return {name: share.view(real[name].shape) for name, share in shares.items()}

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
        vectors = self._split(u)
        shares = self._shares((self.samples, self.outputs), per_layer)
        with plainly(self._gradients.outputs.device):
            for layers in self._parts(apart=True):
                for ks, pulled in self._chunks(layers):
                    for (name,) in layers:
                        share = shares[name if per_layer else _ALL]
                        for ns in self._tiles((name,), ks):
                            x = self._gradients.factor((name,), pulled, ns, oriented=True)
                            share[ns, ks] += inner(x, vectors[name]).T
        self._gradients.complete(shares)
        return shares if per_layer else shares[_ALL]

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

    def scaled(self, weights: Mapping[str, Tensor]) -> Jacobian:
        """The Jacobian with its columns scaled: J diag(w).

        The square of the root of a preconditioner's inverse is that inverse, so that the Gram
        matrix of this is the kernel as a preconditioned optimizer sees it. Gradients are written
        out for it, so that it costs more than `gram` of the unscaled Jacobian.

        Args:
            weights: w, a tensor for each parameter by name, in its shape; a complex parameter's
                real and imaginary parts are scaled apart.

        Raises:
            ValueError: if names or shapes are wrong.
        """
        scales = self._split(weights)
        scaled = self._gradients.remade(lambda own: ScaledGradients(own, scales))
        return Jacobian(scaled, self._memory, self._cotangents)

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

    def _sqnorms(self, per_layer: bool) -> PerLayer:
        shares = self._shares((self.samples, self.outputs), per_layer)
        with plainly(self._gradients.outputs.device):
            for layers in self._parts(per_layer):
                for ks, pulled in self._chunks(layers):
                    for layer in layers:
                        share = shares[layer[0] if per_layer else _ALL]
                        for ns in self._tiles(layer, ks):
                            x = self._gradients.factor(layer, pulled, ns)
                            share[ns, ks] += sqnorms(x).T
        self._gradients.complete(shares)
        return shares

    def _add_blocks(
        self,
        shares: PerLayer,
        layers: Sequence[Layer],
        ks: slice,
        pulled: Pulled,
        js: slice,
        others: Pulled,
    ) -> None:
        for layer in layers:
            for ns in self._tiles(layer, ks):
                x = self._gradients.factor(layer, pulled, ns)
                y = x if ks == js else self._gradients.factor(layer, others, ns)
                share = shares[layer[0] if _ALL not in shares else _ALL]
                piece = blocks(x, y)
                share[ns, ks, js] += piece
                if ks != js:
                    share[ns, js, ks] += piece.mT

    def _add_traced_gram(self, shares: PerLayer) -> None:
        for layers in self._parts(_ALL not in shares):
            for ks, pulled in self._chunks(layers):
                for layer in layers:
                    share = shares[layer[0] if _ALL not in shares else _ALL]
                    step = self._at_a_time(layer, ks)
                    for ms, y in self._gradients.each(layer, pulled, step):
                        for ns in self._gradients.partners(layer, ms, step):
                            x = y if ns == ms else self._gradients.factor(layer, pulled, ns)
                            if ns.start > ms.start:
                                traced_gram_(share[ms, ns], y, x, self._limit)
                            else:
                                traced_gram_(share[ns, ms], x, y, self._limit)
        for share in shares.values():
            mirror_(share)

    def _add_gram(self, shares: PerLayer, diagonal: PerLayer | None = None) -> None:
        """Adds the Gram matrix, and where wanted its diagonal blocks by layer."""
        for layers in self._parts(_ALL not in shares, self.outputs):
            for ks, pulled, js, others in self._pairs(layers):
                if diagonal is not None:
                    apart = [(name,) for layer in layers for name in layer]
                    self._add_blocks(diagonal, apart, ks, pulled, js, others)
                for layer in layers:
                    share = shares[layer[0] if _ALL not in shares else _ALL]
                    step = self._at_a_time(layer, ks)
                    for ms, y in self._gradients.each(layer, others, step):
                        if ks == js:
                            for ns in self._gradients.partners(layer, ms, step):
                                x = y if ns == ms else self._gradients.factor(layer, pulled, ns)
                                if ns.start > ms.start:
                                    gram_(share[ms, js, ns, ks], y, x, self._limit)
                                else:
                                    gram_(share[ns, ks, ms, js], x, y, self._limit)
                            continue
                        for ns in self._gradients.tiles(layer, step):
                            x = self._gradients.factor(layer, pulled, ns)
                            piece = torch.zeros_like(share[ns, ks, ms, js])
                            gram_(piece, x, y, self._limit)
                            share[ns, ks, ms, js] += piece
                            share[ms, js, ns, ks] += piece.permute(2, 3, 0, 1)
        for share in shares.values():
            mirror_(share.view(self.samples * self.outputs, -1))

    def _shares(self, shape: tuple[int, ...], per_layer: bool) -> PerLayer:
        """Zeros to add to, for each parameter or for all together."""
        names = self._gradients.parameters if per_layer else [_ALL]
        return {name: self._zeros(shape) for name in names}

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        outputs = self._gradients.outputs
        return torch.zeros(shape, dtype=self._gradients.dtype, device=outputs.device)

    def _parts(self, apart: bool, together: int = 1) -> list[list[Layer]]:
        """The layers, in parts of which the budget has room for `together` pullbacks.

        Each part takes backward passes of its own.
        """
        layers = self._gradients.layers(apart)
        if self._room(layers) >= together:
            return [layers]
        parts: list[list[Layer]] = [[]]
        for layer in layers:
            if parts[-1] and self._room([*parts[-1], layer]) < together:
                parts.append([])
            parts[-1].append(layer)
        return parts

    def _chunks(self, layers: Sequence[Layer]) -> Iterator[tuple[slice, Pulled]]:
        """Ranges of outputs with their pullbacks, as many as are worked on together efficiently."""
        step = min(self._room(layers), self._gradients.at_once(layers))
        yield from self._pulled(layers, max(1, step))

    def _pairs(self, layers: Sequence[Layer]) -> Iterator[tuple[slice, Pulled, slice, Pulled]]:
        """Every two ranges of outputs once."""
        step = self._room(layers)
        if step < self.outputs:
            step = max(1, self._room(layers, held=2))
        for ks, pulled in self._pulled(layers, step):
            yield ks, pulled, ks, pulled
            for js, others in self._pulled(layers, step, start=ks.stop):
                yield ks, pulled, js, others

    def _room(self, layers: Sequence[Layer], held: int = 1) -> int:
        """How many outputs the budget has room for, where `held` such ranges are held at a time."""
        each = max(1, self._gradients.bytes_per_cotangent(layers))
        return self._memory // (3 * held * each)

    @property
    def _limit(self) -> int:
        """How many numbers a temporary result of a contraction may hold."""
        return self._memory // (8 * self._gradients.dtype.itemsize)

    def _pulled(
        self, layers: Sequence[Layer], step: int, start: int = 0
    ) -> Iterator[tuple[slice, Pulled]]:
        try:
            for first in range(start, self.outputs, step):
                ks = slice(first, min(first + step, self.outputs))
                yield ks, self._gradients.pull(self._basis(ks), layers)
        finally:
            self._gradients.forget()

    def _tiles(self, layer: Layer, ks: slice) -> list[slice]:
        """Ranges of samples whose gradients, if written out, take an eighth of the budget."""
        return self._gradients.tiles(layer, self._at_a_time(layer, ks))

    def _at_a_time(self, layer: Layer, ks: slice) -> int:
        """How many samples such a range has, at most."""
        count = sum(reals(self._gradients.parameters[name]) for name in layer)
        each = (ks.stop - ks.start) * count * self._gradients.dtype.itemsize
        step = max(1, self._memory // (8 * each))
        few = step >= self.samples or not self._gradients.is_written_out(layer)
        return self.samples if few else step

    def _basis(self, ks: slice) -> Tensor:
        """The cotangents whose pullbacks are the rows numbered `ks`, (K, *outputs.shape)."""
        outputs = self._gradients.outputs
        if self._cotangents is not None:
            return self._cotangents[ks].view(-1, *outputs.shape)
        units = outputs.new_zeros((ks.stop - ks.start, 1, self.outputs))
        units[:, 0, ks].fill_diagonal_(1)
        return units.expand(-1, self.samples, -1).reshape(-1, *outputs.shape)

    def _afford(self, shape: tuple[int, ...], per_layer: bool) -> None:
        copies = len(self._gradients.parameters) if per_layer else 1
        size = torch.Size(shape).numel() * copies * self._gradients.dtype.itemsize
        if size > self._memory:
            raise OverBudgetError(
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
