"""Fits uncertainties in one of several processes, or alone: python fitted_together.py FOLDER HOW.

HOW is "fit", "weights" or "empty", or "lightning". Leaves what was found, or the error's text, in
FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import training
from torch import Tensor, distributed, nn

import nettrace as nt
import nettrace.ranks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(classes: bool, count: int = 40, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """In batches of one, so that any share of them is made of whole batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (count,), generator=generator)
    if not classes:
        y = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return list(zip(x.split(1), y.split(1), strict=True))


def fitted(classes: bool, held_out: bool, rank: int = 0, count: int = 1) -> dict[str, Any]:
    """What is fitted to a share of the samples, one of unequal shares."""

    def share(found: list[Any]) -> list[Any]:
        cuts = [0, len(found) // 3, len(found)] if count > 1 else [0, len(found)]
        return found[cuts[rank] : cuts[rank + 1]]

    uncertainties = nt.uncertainty.fit(
        model(),
        share(batches(classes)),
        share(batches(classes, 30, 2)) if held_out else None,
        distributed=count > 1,
    )
    x = torch.cat([x for x, _ in batches(classes, 5, 3)])
    return {**uncertainties.state_dict(), "variance": uncertainties(x).variance}


def faulty(how: str, rank: int) -> str:
    """The error where processes have different weights, or one of them has no samples."""
    nettrace.ranks.PATIENCE = 5.0
    its = model()
    if how == "weights":
        with torch.no_grad():
            its[2].weight.add_(rank)
    data = [] if how == "empty" and rank else batches(False)
    try:
        nt.uncertainty.fit(its, data, distributed=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def by_lightning(folder: Path) -> dict[str, Any]:
    """What the callback leaves of a training by two processes."""
    from nettrace.callbacks import LastLayerUncertainty

    callback = LastLayerUncertainty(to=folder, on_error="raise")
    training.seed()
    net = training.delicate()()
    held_out = training.loader(training.Samples(seed=1, count=9))
    training.fit([callback], net, training.loader(), held_out, strategy="ddp", devices=2)
    assert callback.uncertainties is not None
    return {**callback.uncertainties.state_dict(), "model": training.state(net)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, kind = Path(sys.argv[1]), sys.argv[2]
    if kind == "lightning":
        made: Any = by_lightning(place)
        torch.save(made, place / f"{os.environ['RANK']}.pt")
    else:
        distributed.init_process_group("gloo")
        number = distributed.get_rank()
        if kind == "fit":
            cases = [(c, h) for c in (False, True) for h in (False, True)]
            made = [fitted(c, h, number, distributed.get_world_size()) for c, h in cases]
        else:
            made = faulty(kind, number)
        torch.save(made, place / f"{number}.pt")
        distributed.barrier()
        distributed.destroy_process_group()
