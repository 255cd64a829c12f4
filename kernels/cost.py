"""What contractions take, before they are done."""

from __future__ import annotations

from nettrace.kernels.factors import _WRITE, Dense, Factor, Outer, Sum, _gram_costs, _pays
from nettrace.kernels.still import TILE


def gram_cost(x: Factor, samples: int) -> float:
    """What `gram_(out, x, x, limit)` takes in multiplications, if `x` had so many samples.

    It is the count by which that chooses its way, but that of few samples more than half of all
    pairs are met. The cotangents are those of `x`.
    """
    if isinstance(x, Sum):
        if is_written_out(x, samples):
            k, _, _, _, d, m = x.terms[0].shape
            tokens = sum(term.shape[3] for term in x.terms)
            return k * samples * d * m * (tokens + k * samples / 2)
        pairs = [(one, other) for one in x.terms for other in x.terms]
        return sum(_gram_costs(*pair, samples, samples)[0] for pair in pairs)
    if isinstance(x, Dense):
        k, _, p = x.values.shape
        return k * samples * (_WRITE + k * samples / 2) * p
    k, _, g, t, d, m = x.shape
    if t == 1:
        together = max(1, 2 * TILE // (k * k * samples))  # samples, which meet all of themselves
        met = 1 + min(1, together / samples)
        return g * samples**2 * (d + k**2 * (m + _WRITE)) * met / 2
    by_tokens, written = _gram_costs(x, x, samples, samples)
    return g * min(by_tokens * (1 + 1 / samples), written)


def is_written_out(x: Factor, samples: int) -> bool:
    """Whether `gram_(out, x, x, limit)` would write gradients out, for so many samples."""
    if isinstance(x, Sum):
        return not _pays(x, x, pairs=samples)
    if isinstance(x, Dense):
        return True
    by_tokens, written = _gram_costs(x, x, samples, samples)
    return x.shape[3] > 1 and written <= by_tokens


def repeated(x: Factor, cotangents: int) -> Factor:
    """The first of its cotangents' gradients for so many alike, which takes no memory."""
    if isinstance(x, Sum):
        return Sum(tuple(_repeated(term, cotangents) for term in x.terms))
    if isinstance(x, Dense):
        return Dense(x.values[:1].expand(cotangents, -1, -1))
    return _repeated(x, cotangents)


def _repeated(x: Outer, cotangents: int) -> Outer:
    return Outer(x.still, x.moving[:1].expand(cotangents, -1, -1, -1, -1), x.moves_left)
