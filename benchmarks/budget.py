"""Which share of a training of two minutes is spent measuring it under `budget=0.05`.

    python benchmarks/budget.py [--minutes NUMBER] [--budget SHARE]

A LeNet-5 is trained by Lightning, and measured at scheduled steps that the budget allows.
What the callbacks say of it is held against Lightning's own profiler, which times every hook of
theirs, also at steps that are left out. The table goes to `benchmarks/results/budget.md`.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import lenet

import nettrace as nt
from nettrace.callbacks import CollectiveVariables, FisherTrace, NTKTrace

RESULTS = Path(__file__).parent / "results" / "budget.md"
OURS = (NTKTrace, FisherTrace, CollectiveVariables)
SAMPLES = 32
EVERY = 20


class Network(pl.LightningModule):
    """A classifier that has nothing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = lenet(1).model

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def noise(number: int) -> TensorDataset:
    return TensorDataset(torch.randn(number, 1, 28, 28), torch.randint(0, 10, (number,)))


def main(minutes: float, budget: float) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        profiler = SimpleProfiler()
        profiler.describe = lambda: None  # which would print it all
        options = {"every": EVERY, "samples": SAMPLES, "to": folder / "trace", "budget": budget}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_time=timedelta(minutes=minutes),
            max_epochs=-1,
            callbacks=[kind(**options) for kind in OURS],
            logger=CSVLogger(folder),
            profiler=profiler,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Network(), DataLoader(noise(8192), batch_size=128))
        trace = nt.open(folder / "trace").load()
    times = profiler.recorded_durations
    hooks = {
        name: seconds for name, seconds in times.items() if any(k.__name__ in name for k in OURS)
    }
    spent = sum(map(sum, hooks.values()))
    wall = sum(times["run_training_epoch"]) + sum(map(sum, start(hooks).values()))
    shares, taken = trace.nettrace_share.values, trace.nettrace_seconds.values
    later = shares[1:].max(initial=0)
    step, each = np.median(times["run_training_batch"]), np.median(taken[1:])
    total = trainer.global_step
    lines = [
        "# The share of a training that is spent measuring it",
        "",
        f"`python benchmarks/budget.py --minutes {minutes:g} --budget {budget:g}`; Python "
        f"{platform.python_version()}, torch {version('torch')}, pytorch-lightning "
        f"{version('pytorch-lightning')}, one thread of a shared machine. A LeNet-5 in batches "
        f"of 128; ntk, fisher, collective on {SAMPLES} samples each {EVERY} "
        "steps, where the budget allows it.",
        "",
        "| | |",
        "|---|---|",
        f"| wall time of the training | {wall:.1f} s |",
        f"| steps | {total:,}, {1000 * step:.0f} ms each without measuring (median) |",
        f"| measured | {len(trace.step)}, {each:.2f} s each (median); the first {taken[0]:.2f} s |",
        f"| left out of the schedule | {total // EVERY + 1 - len(trace.step):,} |",
        f"| **share in the end, by Lightning's profiler** | **{spent / wall:.2%}**, {spent:.2f} s "
        "in all hooks of the callbacks |",
        f"| share at the last record, by nettrace | {shares[-1]:.2%} |",
        f"| largest share at a record after the first, by nettrace | {later:.2%} |",
        f"| share without a budget, by these times | {each / (each + EVERY * step):.0%} |",
        "",
        f"Measured at the steps {', '.join(map(str, trace.step.values))}.",
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


def start(hooks: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of what callbacks took, that before the first epoch."""
    return {name: seconds for name, seconds in hooks.items() if "on_train_start" in name}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--budget", type=float, default=0.05)
    options = parser.parse_args()
    main(options.minutes, options.budget)
