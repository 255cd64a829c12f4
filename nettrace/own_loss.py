"""The loss that is assumed where none is declared, held against the one that the network returns.

Both are numbers for the same batch. What makes up a loss is the same if they differ by a factor
that is a convention: sums or means over samples or over outputs, and the half of a squared error.
Such a factor is stated; anything else means that another loss is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrace.likelihood import Likelihood
from nettrace.probe import Probe


@dataclass(frozen=True)
class LossCheck:
    """What is known of an assumed loss.

    Args:
        text: in words; kept with the values that rest on it.
        agrees: False if the network's own loss is another.
    """

    text: str
    agrees: bool = True


def compare(probe: Probe, outputs: Tensor, own: Tensor, where: str) -> LossCheck:
    """Holds the assumed loss of outputs against the network's own.

    Args:
        probe: the samples, with no loss declared.
        outputs: (N, ...) of the network on them.
        own: () the loss that the network returned for them.
        where: on what, for the text.

    Raises:
        ValueError: as `Probe.per_sample_losses`.
    """
    likelihood, losses = probe.distribution(outputs), probe.per_sample_losses(outputs)
    if likelihood is None or losses is None:
        return LossCheck("not checked: the loss is not known")
    ours, theirs = float(losses.detach().double().mean()), float(own)
    if not math.isfinite(ours) or not math.isfinite(theirs):
        return LossCheck(
            f"not checked: on {where} it is {ours:.6g}, the network's own {theirs:.6g}"
        )
    tolerance = max(1e-6, max(torch.finfo(t.dtype).eps for t in (losses, own)) ** 0.5)
    for words, factor in _conventions(likelihood, len(losses), probe.targets[0].numel()):
        if math.isclose(theirs, factor * ours, rel_tol=tolerance):
            said = "this" if factor == 1 else f"{factor:.6g} times this, {words}"
            return LossCheck(f"on {where}, the network's own loss is {said}")
    return LossCheck(
        f"the loss is not declared, and the one that the targets suggest, {likelihood.loss}, does "
        f"not give what the network returned: on {where} its mean over samples is {ours:.6g}, "
        f"while the network, with the same weights and random draws, returned {theirs:.6g}. Pass "
        "Probe(..., losses=...) with the loss that is trained, or "
        f"likelihood={likelihood.name!r} if this one is meant all the same",
        agrees=False,
    )


def _conventions(likelihood: Likelihood, samples: int, terms: int) -> list[tuple[str, float]]:
    """By which factor a loss differs from the mean over samples of sums over `terms` outputs."""
    found = [
        ("the mean over samples", 1.0),
        (f"a mean over samples and the {terms} terms of each", 1 / terms),
        ("a sum over samples", float(samples)),
    ]
    if likelihood.name == "gaussian":
        found += [(f"{words} without the half", 2 * factor) for words, factor in found]
    return found
