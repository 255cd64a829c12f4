"""The trace of a symmetric matrix that is known by its products alone, and what comes with it.

From the same products: the trace of the matrix and of its diagonal blocks, its diagonal, and its
squared Frobenius norm. An orthonormal Q, (P, k), near the range of A, is treated exactly, and the
rest by random vectors u with E[u u^T] = 1 - Q Q^T =: R, independent of Q:

    A = Q Q^T A + A Q Q^T - Q Q^T A Q Q^T + R A R,      diag(R A R) = E[u * (R A u)],
    |A|_F^2 = |A Q|_F^2 + tr(R A^2 R),                  tr(R A^2 R) = E[|A u|^2],

so that everything is without bias, also where A is indefinite, and blocks add up to the whole.

- Hutchinson (1990): no Q; signs u.
- Hutch++ (Meyer, Musco, Musco and Woodruff 2021): Q the range of products with other signs.
- XTrace (Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 2; XDiag, section 4, has the
  first term alone): Q the range of the products with all test vectors but one, which is left over
  as u, for each of them in turn; of m test vectors, 2 m products. The u are scaled to the length
  that they should have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nettrace.estimators import Estimate, TraceMethod, exact_estimate, generator, signs, upper_error
from nettrace.krylov import NotSymmetricError, Times

#: Rows of (P, m) matrices that are worked on at a time.
_ROWS = 2**16
#: XTrace's estimates share their test vectors, and their mean varies more than that of independent
#: ones: twice, where vectors matter in pairs. For Hessians of small networks and for spectra that
#: fall as 1 / k or geometrically, the error is 1.2 to 1.5 times the independent one's, and the
#: same for a flat spectrum, for which this is too wide.
_WIDER = {"xtrace": math.sqrt(2)}


@dataclass(frozen=True)
class Probed:
    """Estimates for a symmetric matrix A, all from the same products.

    Args:
        trace: tr A.
        blocks: by name, the trace of a diagonal block.
        frobenius_square: the sum of the squares of all entries, tr A^2.
        diagonal: (P,) float64 on the CPU, where asked for.
        products: how many were made.
    """

    trace: Estimate
    blocks: dict[str, Estimate]
    frobenius_square: Estimate
    diagonal: Estimate | None
    products: int


@dataclass(frozen=True)
class Draws:
    """Estimates from m random vectors each, in float64 on the CPU.

    Args:
        traces: (m,) of tr A.
        squares: (m,) of |A|_F^2.
        blocks: by name, (m,) of traces of diagonal blocks.
        diagonal: (2, P) the mean of m estimates and their variance, or None.
    """

    traces: Tensor
    squares: Tensor
    blocks: dict[str, Tensor]
    diagonal: Tensor | None


class XTrace:
    """XTrace's leave-one-out estimates, to which test vectors can be added.

    Args:
        times: multiplies with the symmetric matrix.
        size: P.
        dtype: of the vectors; what is summed is in float64.
        device: of the vectors.
        seed: for the test vectors, drawn on the CPU.
        blocks: by name, rows and columns of diagonal blocks.
        diagonal: whether the diagonal is wanted.
    """

    def __init__(
        self,
        times: Times,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        blocks: Mapping[str, slice],
        diagonal: bool,
    ) -> None:
        self._times = times
        self._random = generator(seed, "xtrace")
        self._blocks = blocks
        self._diagonal = diagonal
        self._tests = torch.empty(size, 0, dtype=dtype, device=device)
        self._basis = self._back = self._tests
        self._triangle = torch.zeros(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        """How many test vectors there are."""
        return self._tests.shape[1]

    @property
    def products(self) -> int:
        """How many were made."""
        return 2 * len(self)

    def add(self, probes: int) -> None:
        """Adds test vectors, fewer than P in all; each takes two products."""
        size, known = len(self._tests), len(self)
        drawn = torch.randn((probes, size), generator=self._random, dtype=torch.float64)
        tests = drawn.T.to(self._tests)
        rest = self._products(tests)
        above = torch.zeros(known, probes, dtype=torch.float64)
        for _ in range(2):  # twice, for what lies in the basis but for rounding
            along = self._basis.T @ rest
            rest = rest - self._basis @ along
            above += along.double().cpu()
        first = torch.linalg.qr(rest)
        along = self._basis.T @ first.Q  # for a rest that is all rounding
        second = torch.linalg.qr(first.Q - self._basis @ along)
        above += (along @ first.R).double().cpu()
        corner = (second.R @ first.R).double().cpu()
        below = torch.zeros(probes, known, dtype=torch.float64)
        left = torch.cat([self._triangle, below])
        self._triangle = torch.cat([left, torch.cat([above, corner])], 1)
        self._tests = torch.cat([self._tests, tests], 1)
        self._basis = torch.cat([self._basis, second.Q], 1)
        self._back = torch.cat([self._back, self._products(second.Q)], 1)

    def draws(self) -> Draws:
        """The estimates, each of which leaves one test vector out of the basis."""
        basis, back, tests = self._basis, self._back, self._tests
        size, probes = tests.shape
        rows = [slice(first, min(first + _ROWS, size)) for first in range(0, size, _ROWS)]
        triangle = self._triangle.to(basis.device)
        core = torch.zeros(probes, probes).to(triangle)
        for r in rows:
            core += basis[r].double().T @ back[r].double()
        _check_symmetric(core, torch.finfo(basis.dtype).eps)
        # Without image number i, the basis spans all of itself but one direction.
        tiny = (50 * torch.finfo(basis.dtype).eps * triangle.norm()).clamp_min(1e-300)
        lost = torch.linalg.inv(triangle + tiny * torch.eye(probes).to(triangle)).T
        lost = lost / lost.norm(dim=0)
        inside = sum(basis[r].double().T @ tests[r].double() for r in rows)
        inside = inside - lost * (lost * inside).sum(0)
        lengths = sum(
            (tests[r].double() - basis[r].double() @ inside).square().sum(0) for r in rows
        )
        scales = (size - probes + 1) / lengths
        along = triangle - core @ inside
        beyond = lost * (lost * along).sum(0) + core @ inside
        inner = (lost * (core @ lost)).sum(0)
        blocks = {name: torch.zeros(probes).to(triangle) for name in self._blocks}
        found = torch.zeros(2, size, dtype=torch.float64) if self._diagonal else None
        total, total_squares = torch.zeros(2, probes).to(triangle)
        for r in rows:
            q, z = basis[r].double(), back[r].double()
            q_lost, z_lost = q @ lost, z @ lost
            known = (q * (2 * z - q @ core)).sum(1, keepdim=True)
            known = known - 2 * q_lost * (z_lost - q @ (core @ lost)) - inner * q_lost.square()
            beside = tests[r].double() - q @ inside
            z_inside = z @ inside
            traces = known + scales * beside * (q @ beyond - z_inside)
            squares = z.square().sum() - z_lost.square().sum(0)
            squares = squares + scales * (q @ triangle - z_inside).square().sum(0)
            total += traces.sum(0)
            total_squares += squares
            for name, own in self._blocks.items():
                blocks[name] += traces[_within(own, r, size)].sum(0)
            if found is not None:
                found[:, r] = torch.stack([traces.mean(1), traces.var(1)]).cpu()
        shares = {name: share.cpu() for name, share in blocks.items()}
        return Draws(total.cpu(), total_squares.cpu(), shares, found)

    def _products(self, columns: Tensor) -> Tensor:
        return torch.stack([_product(self._times, v) for v in columns.T], 1)


class Hutchinson:
    """Hutchinson's independent estimates, or with a basis Hutch++'s, to which more can be added.

    Args:
        times: as for `XTrace`, and so are all others but the last.
        size: P.
        dtype: of the vectors.
        device: of the vectors.
        seed: for the random signs.
        blocks: by name, rows and columns of diagonal blocks.
        diagonal: whether the diagonal is wanted.
        rank: of the basis, fewer than P; each of its vectors takes two products.
    """

    def __init__(
        self,
        times: Times,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        blocks: Mapping[str, slice],
        diagonal: bool,
        rank: int,
    ) -> None:
        self._times = times
        self._seed = seed
        self._blocks = blocks
        self._basis = self._back = torch.empty(size, 0, dtype=dtype, device=device)
        self._traces: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._shares: dict[str, list[Tensor]] = {name: [] for name in blocks}
        self._diagonal = torch.zeros(2, size, dtype=torch.float64) if diagonal else None
        if rank:
            drawn = [signs((size,), seed, f"sketch {k}").to(self._basis) for k in range(rank)]
            sketch = torch.stack([_product(times, v) for v in drawn], 1)
            self._basis = torch.linalg.qr(sketch).Q
            self._back = torch.stack([_product(times, q) for q in self._basis.T], 1)
        q, z = self._basis, self._back
        self._known = (q * (2 * z - q @ (q.T @ z))).sum(1).double()
        self._known_squares = z.double().square().sum().cpu()

    def __len__(self) -> int:
        """How many estimates there are."""
        return len(self._traces)

    @property
    def products(self) -> int:
        """How many were made."""
        return 2 * self._basis.shape[1] + len(self)

    def add(self, probes: int) -> None:
        """Adds estimates, of one product each."""
        q = self._basis
        size = len(q)
        for _ in range(probes):
            v = signs((size,), self._seed, len(self)).to(q)
            image = _product(self._times, v - q @ (q.T @ v))
            share = (v * (image - q @ (q.T @ image))).double() + self._known
            self._traces.append(share.sum().cpu())
            self._squares.append(image.double().square().sum().cpu() + self._known_squares)
            for name, own in self._blocks.items():
                self._shares[name].append(share[own].sum().cpu())
            if self._diagonal is not None:  # Welford's mean and sum of squares
                mean, squares = self._diagonal
                off = share.cpu() - mean
                mean += off / len(self)
                squares += off * (share.cpu() - mean)

    def draws(self) -> Draws:
        """The estimates."""
        found = self._diagonal
        if found is not None:
            found = torch.stack([found[0], found[1] / (len(self) - 1)])
        shares = {name: torch.stack(share) for name, share in self._shares.items()}
        return Draws(torch.stack(self._traces), torch.stack(self._squares), shares, found)


def probed(
    times: Times,
    size: int,
    blocks: Mapping[str, slice] | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    method: TraceMethod = "xtrace",
    probes: int = 12,
    relative_error: float | None = None,
    most_products: int = 200,
    diagonal: bool = False,
    seed: int = 0,
) -> Probed:
    """Estimates of the traces, the squared norm and the diagonal of a symmetric matrix.

    Where it would take as many products as the matrix has rows, all are exact.

    Args:
        times: multiplies with the matrix, (P,) -> (P,).
        size: P.
        blocks: by name, the rows and columns of diagonal blocks.
        dtype: of the vectors that are multiplied; what is summed is in float64.
        device: of the vectors that are multiplied.
        method: "xtrace" holds three vectors (P,) for each probe, and takes two products; "hutch++"
            two for each of the first `probes`, which take two products, and then none for each
            further, that takes one; "hutchinson" none, for one product. Where few eigenvalues make
            up most of the matrix, the first two need much fewer products.
        probes: how many random vectors, at least 2: for "hutch++", twice as many.
        relative_error: go on until the standard error of the trace, and its own standard deviation
            on top, is so small a part of it, or `most_products` are made.
        most_products: see there.
        diagonal: whether to estimate the diagonal.
        seed: for the random vectors, which are drawn on the CPU.

    Raises:
        ValueError: if an argument is out of range, or a product is not finite.
    """
    if method not in ("hutchinson", "hutch++", "xtrace"):
        raise ValueError(f"expected 'hutchinson', 'hutch++' or 'xtrace', got {method!r}")
    if size < 1 or probes < 2 or (relative_error is not None and not relative_error > 0):
        raise ValueError(
            "expected a positive size, at least 2 probes, to see their spread, and a positive "
            f"relative error, got {size}, {probes} and {relative_error}"
        )
    setting = times, size, dtype, device, seed, dict(blocks or {}), diagonal
    first = {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[method] * probes
    each = 2 if method == "xtrace" else 1
    if first >= size:
        return _exact(*setting[:4], setting[5], diagonal)
    found: XTrace | Hutchinson
    if method == "xtrace":
        found = XTrace(*setting)
    else:
        found = Hutchinson(*setting, rank=probes if method == "hutch++" else 0)
    more = probes
    while True:
        found.add(more)
        draws = found.draws()
        if relative_error is None:
            break
        target = relative_error * abs(float(draws.traces.mean()))
        error = upper_error(draws.traces[:, None]) * _WIDER.get(method, 1)
        excess = error / target if target else torch.inf
        wanted = len(found) * min(excess if method == "xtrace" else excess**2, 2)
        most = (most_products - found.products) // each
        more = min(max(math.ceil(wanted) - len(found), 1), most)
        if error <= target or more < 1:
            break
        if found.products + each * more >= size:
            exact = _exact(*setting[:4], setting[5], diagonal)
            return replace(exact, products=exact.products + found.products)

    of_rows = None
    if draws.diagonal is not None:
        mean, variance = draws.diagonal
        error_of_rows = _WIDER.get(method, 1) * (variance / len(found)).sqrt()
        of_rows = Estimate(mean, error_of_rows, len(found), method)
    return Probed(
        _mean(draws.traces, method),
        {name: _mean(share, method) for name, share in draws.blocks.items()},
        _mean(draws.squares, method),
        of_rows,
        found.products,
    )


def _mean(values: Tensor, method: TraceMethod) -> Estimate:
    """The mean of estimates (m,) by one of the methods, and its standard error."""
    error = _WIDER.get(method, 1) * values.std() / len(values) ** 0.5
    return Estimate(values.mean(), error, len(values), method)


def _exact(
    times: Times,
    size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    blocks: Mapping[str, slice],
    diagonal: bool,
) -> Probed:
    """The same by the matrix's columns."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        column = torch.zeros(size, dtype=dtype, device=device)
        column[i] = 1
        matrix[i] = _product(times, column).double().cpu()
    _check_symmetric(matrix, torch.finfo(dtype).eps)
    entries, squares = matrix.diagonal().clone(), matrix.square().sum()
    return Probed(
        exact_estimate(entries.sum()),
        {name: exact_estimate(entries[own].sum()) for name, own in blocks.items()},
        exact_estimate(squares),
        exact_estimate(entries) if diagonal else None,
        size,
    )


def _product(times: Times, vector: Tensor) -> Tensor:
    """A product that is finite.

    Raises:
        ValueError: if it is not.
    """
    found = times(vector)
    if not bool(found.isfinite().all()):
        raise ValueError(
            "a product with the matrix is not finite: the network diverges, or its arithmetic is "
            "too narrow"
        )
    return found


def _check_symmetric(matrix: Tensor, epsilon: float) -> None:
    """Checks that what a matrix is within some basis is symmetric, to the square root of rounding.

    Raises:
        NotSymmetricError: if it is not.
    """
    off, size = float((matrix - matrix.T).norm()), float(matrix.norm())
    if off > epsilon**0.5 * size * 2:
        raise NotSymmetricError(
            f"the matrix is not symmetric, by {off / size:.2g} of its norm: the products are not "
            "those of second derivatives, as where a backward pass gives wrong ones when it is "
            "differentiated"
        )


def _within(own: slice, rows: slice, size: int) -> slice:
    """Where some rows of all lie among others, counted from the first of those."""
    first, last, _ = own.indices(size)
    return slice(max(first - rows.start, 0), max(last - rows.start, 0))
