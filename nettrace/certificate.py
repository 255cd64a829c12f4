"""How the derivatives of a network were found, and a spot check of them by plain autograd.

A certificate says for each parameter by which route its per-sample gradients are found, what share
of the trace of the tangent kernel it has, and how far a few entries, drawn at random, are from
those of plain autograd on the same tape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nettrace.operator import Jacobian, OverBudgetError, PerLayer

ROUTES = ("rule", "node", "rows", "unused")
#: From how many random combinations of outputs shares are estimated where there are more outputs.
_DRAWS = 4


class SpotCheckError(RuntimeError):
    """Derivatives differ from those of plain autograd: no number that rests on them is right."""


@dataclass(frozen=True)
class CertificateRow:
    """What is known of one parameter.

    Args:
        name: the parameter.
        route: "rule", "node", "rows" or "unused"; see `nettrace.Jacobian.coverage`.
        share: of the trace of the kernel, between 0 and 1.
        error: the largest difference seen in the spot check, over the norms of the whole rows.
    """

    name: str
    route: str
    share: float
    error: float


@dataclass(frozen=True)
class Certificate:
    """How the derivatives of a network were found; made by `certify`, printed as a table.

    Args:
        samples: N.
        outputs: C.
        rows: one for each parameter.
        checked: how many rows of the Jacobian were compared with plain autograd.
        draws: from how many random combinations of the outputs shares are estimated; 0 where they
            are exact.
        tolerance: the relative difference that rounding may make.
        bytes_per_pass: what the gradients that one backward pass pulls back take.
        bytes_per_number: of results.
    """

    samples: int
    outputs: int
    rows: tuple[CertificateRow, ...]
    checked: int
    draws: int
    tolerance: float
    bytes_per_pass: int
    bytes_per_number: int

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that `as_json` wrote."""
        plain = json.loads(text)
        return cls(**{**plain, "rows": tuple(CertificateRow(**row) for row in plain["rows"])})

    def as_json(self) -> str:
        """The same as JSON, as it is kept with a trace."""
        return json.dumps(asdict(self))

    @property
    def error(self) -> float:
        """The largest difference seen in the spot check, over the norms of the whole rows."""
        return max(row.error for row in self.rows)

    def by_route(self) -> dict[str, float]:
        """The share of the trace by each route that some parameter goes."""
        return {
            route: sum(row.share for row in self.rows if row.route == route)
            for route in ROUTES
            if any(row.route == route for row in self.rows)
        }

    def table(self, width: int = 80) -> str:
        """The certificate as text, with names shortened in the middle where they do not fit.

        Args:
            width: characters in a line.
        """
        rest = "  {:<6}  {:>8}  {:>10}"
        room = max(12, width - len(rest.format("", "", "")))
        names = [_shortened(row.name, room) for row in self.rows]
        longest = max(len(name) for name in [*names, f"{len(names)} parameters"])
        line = f"{{:<{longest}}}{rest}"
        head = line.format("parameter", "route", "share", "spot check")
        lines = [head, "-" * len(head)]
        for name, row in zip(names, self.rows, strict=True):
            lines.append(line.format(name, row.route, _percent(row.share), f"{row.error:.0e}"))
        lines.append("-" * len(head))
        for route, share in self.by_route().items():
            rows = [row for row in self.rows if row.route == route]
            error = max(row.error for row in rows)
            count = f"{len(rows)} parameter{'s' * (len(rows) != 1)}"
            lines.append(line.format(count, route, _percent(share), f"{error:.0e}"))
        lines += [
            "share       of the trace of the kernel, "
            + (f"estimated from {self.draws} random draws" if self.draws else "exact"),
            f"spot check  largest difference from plain autograd in {self.checked} rows of "
            f"{self.samples * self.outputs}",
            f"            over their norms; rounding may make about {self.tolerance:.0e}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def certify(jacobian: Jacobian, *, samples: int = 2, seed: int = 0) -> Certificate:
    """Compares a few entries, drawn at random, with plain autograd on the same tape.

    For each sample drawn, two rows are compared, parameter by parameter: that of an output drawn at
    random, and the sum of all with random signs, in which hardly any derivative is zero by chance.
    Compared are their squared norms, their inner products with each other, with another sample's
    row and with a random vector, and last the squared norm of the sum over all samples, which no
    sample that was not drawn escapes. It costs 2 `samples` + 1 backward passes of plain autograd,
    and about 16 without weight gradients, however many outputs there are. What all parameters give
    together is compared too, for it is not summed from their shares. Where there are more than
    4, the shares of the trace are estimated from 4 combinations of them with random signs.

    What rounding may make is taken to be eps^0.6 of the parameter's share of a row's norm plus
    eps^0.75 of the row's whole norm, eps that of the coarsest dtype on the tape: 7e-5 and 6e-6 in
    float32. Both sides read one tape, so that a deep ReLU network cannot flip signs between them;
    but they sum in another order, and what errors backward passes make in upper layers is amplified
    by lower ones in proportion to the whole row. That allows for derivatives that are zero but for
    cancellation, such as that by a bias which a softmax takes out again.

    Inner products, of which the engine gives (N, 2, 2) and (N, N) for each parameter, are left out
    where these do not fit the memory budget.

    Args:
        jacobian: of the outputs of a network.
        samples: how many samples to draw.
        seed: for what is drawn; the same on every device.

    Raises:
        SpotCheckError: if entries differ by more than rounding can make.
        CoupledSamplesError: if samples are coupled.
    """
    routes = jacobian.coverage()
    n, c = jacobian.samples, jacobian.outputs
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (min(c, _DRAWS), n, c), generator=generator) * 2 - 1
    output = torch.randint(0, c, (n, 1), generator=generator)
    one = torch.zeros((n, c), dtype=signs.dtype).scatter_(1, output, 1)
    drawn = torch.randperm(n, generator=generator)[:samples].tolist()
    cotangents = torch.cat([one.unsqueeze(0), signs])
    norms = jacobian.project(cotangents).norms(per_layer=True)
    errors = _compare(jacobian, cotangents, norms, drawn, generator, routes)
    exact = c <= _DRAWS
    traces = (
        jacobian.trace(per_layer=True)
        if exact
        else {name: norm[:, 1:].square().sum() for name, norm in norms.items()}
    )
    shares = torch.stack(list(traces.values())).double()
    shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    rows = [
        CertificateRow(name, routes[name], share, errors[name])
        for name, share in zip(routes, shares.tolist(), strict=True)
    ]
    return Certificate(
        samples=n,
        outputs=c,
        rows=tuple(rows),
        checked=2 * len(drawn),
        draws=0 if exact else len(signs),
        tolerance=_tolerances(jacobian)[0],
        bytes_per_pass=jacobian._gradients.bytes_per_cotangent(
            jacobian._gradients.layers(apart=True)
        ),
        bytes_per_number=jacobian._gradients.dtype.itemsize,
    )


class SpotChecks:
    """Certifies the Jacobians of one training when that is due.

    It is at the first record; whenever the signature of the tape is not that of the last record
    that passed; and besides at the records number 2, 4, 8, 16, ..., because routers and gates
    change what an unchanged tape means.
    """

    def __init__(self) -> None:
        self._records = 0
        self._passed: str | None = None

    def __call__(self, jacobian: Jacobian, seed: int) -> Certificate | None:
        """A certificate if one is due.

        Raises:
            SpotCheckError: if it is, and cannot be given; it is then due again at the next record.
        """
        self._records += 1
        now = jacobian._gradients.signature()
        if now == self._passed and self._records & (self._records - 1):
            return None
        self._passed = None
        certificate = certify(jacobian, seed=seed)
        self._passed = now
        return certificate


@dataclass(frozen=True)
class _Vector:
    """The norm of a parameter's share of a row, how far off it may be, and that of the row."""

    norm: float
    slack: float
    whole: float


def _compare(
    jacobian: Jacobian,
    cotangents: Tensor,
    norms: PerLayer,
    drawn: list[int],
    generator: torch.Generator,
    routes: Mapping[str, str],
) -> dict[str, float]:
    """By parameter, the largest difference from plain autograd over the norms of the rows.

    Args:
        jacobian: what is checked.
        cotangents: (K, N, C) of which the first picks one output of each sample, and the second
            sums all with random signs.
        norms: by parameter, the norms (N, K) of its shares of those combinations.
        drawn: the samples whose rows are compared.
        generator: for a random vector.
        routes: by parameter.
    """
    chosen = jacobian.project(cotangents[:2])
    summed = jacobian.project(cotangents[1:2])
    unit = torch.zeros((chosen.samples, 2))
    truth = {}
    for n in drawn:
        for k in (0, 1):
            one = unit.clone()
            one[n, k] = 1
            truth[n, k] = _flat(chosen.vjp(one, per_layer=True))
    total = _flat(summed.vjp(torch.ones((chosen.samples, 1)), per_layer=True))
    blocks = _if_it_fits(chosen.blocks)
    u = torch.randn(jacobian.parameters, generator=generator).to(next(iter(norms.values())))
    products = summed.jvp(u, per_layer=True)
    directions = dict(zip(total, u.split([t.numel() for t in total.values()]), strict=True))
    gram = _if_it_fits(lambda per_layer: summed.gram(trace_outputs=True, per_layer=per_layer))
    relative, absolute = _tolerances(jacobian)
    wholes = {row: sum(_dot(g, g) for g in shares.values()) ** 0.5 for row, shares in truth.items()}
    squares = torch.stack([norm[:, 1].double().square() for norm in norms.values()])
    reach = float(squares.sum(0).sqrt().sum())

    errors = dict.fromkeys(truth[drawn[0], 0], 0.0)
    worst = (1.0, "")
    for name in errors:
        vectors = {}
        for row, shares in truth.items():
            norm = _dot(shares[name], shares[name]) ** 0.5
            slack = relative * norm + absolute * wholes[row]
            vectors[row] = _Vector(norm, slack, wholes[row])
        of_sum = _Vector(
            _dot(total[name], total[name]) ** 0.5,
            relative * float(norms[name][:, 1].double().sum()) + absolute * reach,
            reach,
        )
        direction = _Vector(10.0, 0.0, 1.0)  # of independent errors, u picks out a normal deviate
        found: list[tuple[str, Tensor, float, _Vector, _Vector]] = []
        for n, k in truth:
            here, a = truth[n, k][name], vectors[n, k]
            which = f"row of sample {n}" + (", all outputs with random signs" if k else "")
            norm2 = norms[name][n, k].double().square()
            found.append((f"the squared norm of the {which}", norm2, _dot(here, here), a, a))
            if k == 0:
                if blocks:
                    other = _dot(here, truth[n, 1][name])
                    what = f"the inner product of two rows of sample {n}"
                    found.append((what, blocks[name][n, 0, 1], other, a, vectors[n, 1]))
                continue
            other = _dot(here, directions[name])
            what = f"the product with a random vector of the {which}"
            found.append((what, products[name][n, 0], other, a, direction))
            if gram and n != drawn[0]:
                m = drawn[0]
                other = _dot(here, truth[m, 1][name])
                what = f"the inner product of rows of the samples {m} and {n}"
                found.append((what, gram[name][m, n], other, a, vectors[m, 1]))
        if gram:
            what, everything = "the squared norm of the sum over samples", gram[name].double().sum()
            found.append((what, everything, of_sum.norm**2, of_sum, of_sum))
        for what, value, true, a, b in found:
            difference = abs(float(value) - true)
            if difference == 0 or not math.isfinite(true):  # overflow is for the measures to report
                continue
            errors[name] = max(errors[name], difference / (a.whole * b.whole or 1.0))
            allowed = (a.norm + a.slack) * (b.norm + b.slack) - a.norm * b.norm
            ratio = difference / allowed if allowed and math.isfinite(difference) else math.inf
            if ratio > worst[0]:
                worst = (
                    ratio,
                    f"the spot check failed for the parameter {name!r}, found by the route "
                    f"{routes[name]!r}: {what} is {float(value):.6g}, by plain autograd "
                    f"{true:.6g}; rounding can make {allowed:.1e}. {_hooked(jacobian, name)}No "
                    "number that rests on its "
                    "derivatives is right: report the model, please, and meanwhile freeze the "
                    "parameter by requires_grad_(False), or take nettrace.jacobian(outputs, model, "
                    "coupled='rows'), which is plain autograd",
                )
    if worst[1]:
        raise SpotCheckError(worst[1])
    _compare_wholes(chosen, summed, truth, total, relative)
    return errors


def _compare_wholes(
    chosen: Jacobian,
    summed: Jacobian,
    truth: Mapping[tuple[int, int], PerLayer],
    total: PerLayer,
    relative: float,
) -> None:
    """Compares what all parameters give together, which is not summed from their shares.

    Args:
        chosen: two rows of each sample.
        summed: the second of them.
        truth: some of those rows, by sample and number.
        total: the sum of the second rows of all samples.
        relative: what rounding may make, relative to the norms of the rows.
    """
    rows = {at: torch.cat(list(shares.values())) for at, shares in truth.items()}
    norms = chosen.norms().double()
    blocks = _if_it_fits(lambda **_: {"": chosen.blocks()})
    gram = _if_it_fits(lambda **_: {"": chosen.gram()})
    traced = _if_it_fits(lambda **_: {"": summed.gram(trace_outputs=True)})
    found: list[tuple[str, float, float, float]] = []
    for (n, k), row in rows.items():
        norm = _dot(row, row) ** 0.5
        found.append((f"the norm of a row of sample {n}", float(norms[n, k]), norm, norm))
        for (m, j), other in rows.items():
            true, bound = _dot(row, other), norm * _dot(other, other) ** 0.5
            what = f"the inner product of rows of the samples {n} and {m}"
            if blocks and n == m:
                found.append((what, float(blocks[""][n, k, j]), true, bound))
            if gram:
                found.append((what, float(gram[""][n, k, m, j]), true, bound))
    if traced:
        whole = torch.cat(list(total.values()))
        reach = float(norms[:, 1].sum()) ** 2
        what = "the squared norm of the sum over samples"
        found.append((what, float(traced[""].double().sum()), _dot(whole, whole), reach))
    for what, value, true, bound in found:
        difference = abs(value - true)
        if math.isfinite(true) and not difference <= 3 * relative * bound:
            raise SpotCheckError(
                f"the spot check failed for all parameters together: {what} is {value:.6g}, by "
                f"plain autograd {true:.6g}. No number of the whole network is right: report the "
                "model, please, and meanwhile take results by layer, or nettrace.jacobian(outputs, "
                "model, coupled='rows'), which is plain autograd"
            )


def _hooked(jacobian: Jacobian, name: str) -> str:
    if not jacobian._gradients.parameters[name]._backward_hooks:
        return ""
    return "The parameter has a hook (Tensor.register_hook), which plain autograd obeys. "


def _tolerances(jacobian: Jacobian) -> tuple[float, float]:
    """What rounding may make of a parameter's share of a row, and of the whole row."""
    eps = jacobian._gradients.precision()
    return eps**0.6, eps**0.75


def _if_it_fits(compute: Callable[..., Any]) -> PerLayer:
    """Results by parameter; none where they do not fit the memory budget."""
    try:
        found: PerLayer = compute(per_layer=True)
    except OverBudgetError:
        return {}
    return found


def _flat(shares: PerLayer) -> PerLayer:
    return {
        name: (torch.view_as_real(g) if g.is_complex() else g).flatten()
        for name, g in shares.items()
    }


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 5e-4 or share == 0 else f"{100 * share:.0e} %"


def _shortened(name: str, room: int) -> str:
    if len(name) <= room:
        return name
    tail = (room - 3) * 2 // 3
    return f"{name[: room - 3 - tail]}...{name[-tail:]}"
