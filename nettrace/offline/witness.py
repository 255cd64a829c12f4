"""By what it gives on the probe, a network is known to be the one that was measured before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from nettrace.probe import Probe

#: The coordinates of a step that witness the outputs, and the losses of the samples.
OUTPUTS, LOSSES = "witness_of_outputs", "witness_of_losses"
#: By coordinate, a weighted sum of values and their norm; not a number where there are none.
Witness: TypeAlias = Mapping[str, tuple[float, float]]

#: What a sum may be off by, over the norm: another machine gives other last digits.
_TOLERANCE = 1e-3
#: How many values are weighted at once.
_PIECE = 2**20


def seen(probe: Probe, outputs: Tensor) -> Witness:
    """That of one probe.

    Args:
        probe: the samples.
        outputs: of the network on them, without a tape.
    """
    found = {OUTPUTS: _weighted(outputs)}
    try:
        losses = probe.per_sample_losses(outputs)
    except Exception:  # which the measures that need them report
        losses = None
    return found if losses is None else {**found, LOSSES: _weighted(losses)}


def together(several: Sequence[Witness]) -> Witness:
    """That of several probes."""
    found = {}
    for name in (OUTPUTS, LOSSES):
        its = [one[name] for one in several if name in one]
        sums, norms = zip(*its, strict=True) if its else ((math.nan,), (math.nan,))
        found[name] = math.fsum(sums), math.hypot(*norms)
    return found


def agree(now: Witness, before: Mapping[str, float]) -> bool:
    """Whether a network gives what gave the sums that were recorded, to rounding."""
    return all(
        (math.isnan(total) and math.isnan(before[name]))
        or abs(total - before[name]) <= _TOLERANCE * norm
        for name, (total, norm) in now.items()
    )


def _weighted(values: Tensor) -> tuple[float, float]:
    """The sum with weights that are always the same, and the norm; NaN if that is not finite."""
    flat = values.detach().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    weights = np.random.RandomState(0)  # whose numbers stay, whatever the version of NumPy
    total = square = 0.0
    for piece in flat.split(_PIECE):
        numbers = piece.to("cpu", torch.float64).numpy()
        # Not by a dot product, whose last digits depend on the number of threads.
        total += float((numbers * weights.uniform(-1, 1, len(numbers))).sum())
        square += float((numbers * numbers).sum())
    return (total, math.sqrt(square)) if math.isfinite(square) else (math.nan, math.nan)
