"""How wide the landscape is: how far along a line the loss grows to e times its value.

Feng and Tu (2021), PNAS 118, e2015617118: along the principal direction p of the weights'
fluctuations, F = right + left, with L(w + right p) = L(w - left p) = e L(w). A quadratic loss of
curvature h has F = 2 sqrt(2 (e - 1) L(w) / h).
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: The widths are found to this share of themselves.
TOLERANCE = 1e-3
#: By what factor the first bracket grows.
_GROWTH = 2.0
#: Evaluations after which a width is as it is.
_MOST = 80


def width(loss: Callable[[float], float], least: float, guess: float, limit: float) -> float:
    """The distance along a line at which the loss reaches e times its least, to 0.1 %.

    It is bracketed from the guess, by doubling or halving at most, then closed in on by what a
    power of the distance would give, and by bisection where that takes off less than half. Where
    the loss crosses several times within the first bracket, it is one of the crossings.

    Args:
        loss: at a distance.
        least: the loss at distance 0, positive.
        guess: where to look first.
        limit: beyond which it is not followed.

    Returns:
        The distance; infinite where the loss is below up to the limit, NaN where the loss is not
        positive and finite to begin with.
    """
    if not 0 < least < math.inf:
        return math.nan
    target = math.e * least

    def excess(distance: float) -> float:
        """The share of the way from least to target; infinite where the loss is not finite."""
        value = loss(distance)
        return (value - least) / (target - least) if math.isfinite(value) else math.inf

    low, high, made = 0.0, min(guess, limit), 0
    at_low, at_high = 0.0, excess(high)
    while at_high < 1 and made < _MOST:
        if high >= limit:
            return math.inf
        low, at_low = high, at_high
        # Where a parabola would be there, or twice as far at most.
        ahead = 1.05 * math.sqrt(1 / at_high) if at_high > 0 else math.inf
        high = min(limit, high * min(max(ahead, 1.05), _GROWTH))
        at_high, made = excess(high), made + 1
    if low == 0:
        while made < _MOST:  # below the guess
            ahead = math.sqrt(1 / at_high) / 1.05 if math.isfinite(at_high) else 0.0
            middle = high * max(ahead, 1 / _GROWTH)
            at_middle, made = excess(middle), made + 1
            if at_middle < 1:
                low, at_low = middle, at_middle
                break
            high, at_high = middle, at_middle
    bisect = False
    while high - low > TOLERANCE * high and made < _MOST:
        middle = _between(low, at_low, high, at_high)
        if bisect or not low < middle < high:
            middle = (low + high) / 2
        at_middle, made = excess(middle), made + 1
        before = high - low
        if at_middle < 1:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        bisect = high - low > before / 2
        if abs(at_middle - 1) < TOLERANCE:  # the width goes as its root, at worst
            return middle
    return (low + high) / 2


def _between(low: float, at_low: float, high: float, at_high: float) -> float:
    """Where the excess would be 1 if it grew as a power of the distance."""
    if not (at_low > 0 and low > 0 and math.isfinite(at_high)):
        return high / math.sqrt(at_high) if low == 0 else (low + high) / 2
    share = -math.log(at_low) / math.log(at_high / at_low)
    return float(low * (high / low) ** share)
