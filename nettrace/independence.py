"""Whether samples are evaluated independently of each other, seen by evaluating them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nettrace.ownership import CoupledSamplesError
from nettrace.statistics import Statistics
from nettrace.tape import precision


def check_independence(statistics: Statistics) -> None:
    """Checks that samples are evaluated independently of each other.

    Mixing upstream of the first parameter, or by values without a gradient, leaves no mark on the
    tape. So the samples are evaluated once more in two parts and another order: outputs and losses
    must be the same.

    Args:
        statistics: of a network that is frozen.

    Raises:
        CoupledSamplesError: if they are not.
    """
    probe, outputs = statistics._own, statistics._outputs.detach()
    if len(outputs) < 2 or len(outputs) != len(probe):
        return
    with torch.no_grad():
        noise = probe.look(statistics.model) - outputs  # not zero if the network draws at random
        try:
            losses = probe.per_sample_losses(outputs)
        except Exception:  # which the measures that need losses will report
            losses = None
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
        cut = (len(outputs) - 1) // 2 or 1
        try:
            again = _evaluated(statistics, [order[:cut], order[cut:]], losses is not None)
        except Exception:  # a network for batches of one size
            again = _evaluated(statistics, [order], losses is not None)
    if again is None:
        return  # samples cannot be told apart in the probe
    order = order.to(outputs.device)
    eps = precision(statistics._outputs)
    same = _same(again[0], outputs[order], noise, eps)
    if not same:
        statistics._of_own.coverage()  # raises, naming the operation, if that is on the tape
    if not same or (losses is not None and not _same(again[1], losses[order], noise, eps)):
        raise CoupledSamplesError(
            f"the samples are coupled: the {'losses' if same else 'outputs'} change when the "
            "probe is evaluated in two parts or another order. Per-sample derivatives are not "
            "defined; take out what mixes the batch, or make each group of samples that belong "
            "together one"
        )


def _evaluated(
    statistics: Statistics, parts: Sequence[Tensor], with_losses: bool
) -> tuple[Tensor, Tensor] | None:
    """Outputs and losses of the probe's samples, part by part; None if it has no parts."""
    outputs, losses = [], []
    for part in parts:
        probe = statistics._own.take(part)
        if probe is None:
            return None
        outputs.append(probe.look(statistics.model))
        found = probe.per_sample_losses(outputs[-1]) if with_losses else None
        losses.append(torch.zeros(len(part)) if found is None else found)
    return torch.cat(outputs), torch.cat(losses)


def _same(found: Tensor, expected: Tensor, noise: Tensor, eps: float) -> bool:
    """Whether values agree but for rounding, and the noise of networks that draw at random."""
    if found.shape != expected.shape:
        return False
    rounding = min(1e3 * eps, 0.03)
    bound = rounding * expected.abs().max() + 10 * noise.abs().max()
    return bool(((found - expected).abs() <= bound).all() | ~expected.isfinite().all())
