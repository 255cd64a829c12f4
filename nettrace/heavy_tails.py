"""How heavy the tails of weights' updates are: the index of a stable law."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stable_index(values: Tensor, group: int | None = None) -> tuple[float, float]:
    """The index alpha of a symmetric alpha-stable law, 2 for Gaussian values, and its error.

    Sums of k such values are distributed as k^(1 / alpha) times one of them, so that

        1 / alpha = (mean ln |sums of k| - mean ln |values|) / ln k,

    over disjoint sums: Mohammadi, Mohammadpour and Ogata (2015), Metrika 78, 549, corollary 2.4.
    The error is that of the mean over sums, each against its own values. Of values that no stable
    law describes, it tells how their sums grow.

    Args:
        values: (n,) independent, symmetric about zero; zeros are left out.
        group: k, values in a sum; the divisor nearest below the square root of n by default, of as
            many values as make whole sums.

    Raises:
        ValueError: if fewer than 64 values are not zero, or some are not finite.
    """
    values = values.double().flatten()
    if not bool(values.isfinite().all()):
        raise ValueError("the updates are not finite: the training diverges")
    values = values[values != 0]
    if len(values) < 64:
        raise ValueError(f"expected at least 64 values that are not zero, got {len(values)}")
    k = math.isqrt(len(values)) if group is None else group
    rows = values[: len(values) // k * k].view(-1, k)
    sums = rows.sum(1)
    rows, sums = rows[sums != 0], sums[sums != 0]
    each = (sums.abs().log() - rows.abs().log().mean(1)) / math.log(k)
    inverse = each.mean()
    error = each.std() / math.sqrt(len(each))
    return float(1 / inverse), float(error / inverse.square())


def update_tail_index(rows: Tensor, seed: int, most: int = 2**14) -> tuple[float, float, int]:
    """The index of the updates' entries, its standard error, and how many updates it is a mean of.

    Entries are taken less their means over the window and over their root mean squares there, so
    that parameters which move more are not taken for a tail; in random order and with random signs,
    since entries of one update belong together. The inverse index is averaged over updates; the
    error is by ten blocks of successive ones.

    Args:
        rows: (n, P) snapshots.
        seed: of the order and the signs.
        most: entries that are taken, drawn at random.

    Raises:
        ValueError: as `stable_index`.
    """
    from nettrace.estimators import generator, signs

    order = torch.randperm(rows.shape[1], generator=generator(seed, "entries"))[:most]
    updates = rows[:, order].double().diff(dim=0)
    updates = updates - updates.mean(0)
    scale = updates.square().mean(0).sqrt()
    updates = updates[:, scale > 0] / scale[scale > 0]
    updates = updates * signs((updates.shape[1],), seed, "signs of entries")
    inverses = torch.tensor([1 / stable_index(update)[0] for update in updates])
    inverse = inverses.mean()
    blocks = torch.stack([block.mean() for block in inverses.chunk(10)])
    error = blocks.std() / math.sqrt(len(blocks))
    return float(1 / inverse), float(error / inverse.square()), len(updates)
