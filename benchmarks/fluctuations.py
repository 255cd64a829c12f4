"""What it costs a training to have its weights seen after every update.

    python benchmarks/fluctuations.py [--steps NUMBER]

Lightning's profiler times every hook of `WeightFluctuations`, at steps without a record: all
that the callback does, and a window that sees the weights, for each of the three things that it may
keep. Beside that stands the time that one record takes. The table goes to
`benchmarks/results/fluctuations.md`.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nettrace as nt
from nettrace.callbacks import WeightFluctuations

RESULTS = Path(__file__).parent / "results" / "fluctuations.md"
HEAD = (
    "| network | parameters | kept | a step, ms | an update, ms | share |\n"
    "|---|---|---|---|---|---|"
)
#: Of those that are trained: their layers, and samples in a batch.
NETWORKS = {"64-64-10": ((64, 64, 10), 32), "784-850-400-10": ((784, 850, 400, 10), 128)}


class Network(pl.LightningModule):
    """A perceptron that is trained on noise."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(SimpleProfiler):
    """Times by the processor's own clock, as the machine is shared."""

    def start(self, action_name: str) -> None:
        self.current_actions[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        seconds = time.process_time() - self.current_actions.pop(action_name)
        self.recorded_durations[action_name].append(seconds)


def noise(width: int, number: int) -> TensorDataset:
    return TensorDataset(torch.randn(number, width), torch.randint(0, 10, (number,)))


def trained(title: str, steps: int, *callbacks: WeightFluctuations) -> dict[str, list[float]]:
    """The durations of everything that Lightning does, by its name."""
    widths, batch = NETWORKS[title]
    torch.manual_seed(0)
    profiler = Clock()
    profiler.describe = lambda: None  # which would print it all
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        profiler=profiler,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Network(widths), DataLoader(noise(widths[0], 32 * batch), batch, shuffle=True))
    return profiler.recorded_durations


def row(title: str, keep: Any, steps: int) -> str:
    """What is spent on each update once the window is full, apart from records."""
    length = min(100, steps // 3)
    never = WeightFluctuations(
        "weights/variation", every=[10 * steps], length=length, keep=keep, memory="2GB"
    )
    times = trained(title, steps, never)
    hooks = {name: t for name, t in times.items() if "WeightFluctuations" in name}
    each = sum(np.asarray(t)[length:] for t in hooks.values() if len(t) == steps)
    whole = np.asarray(times["run_training_batch"])[length:]
    low, middle, high = np.quantile(1e3 * each, [0.25, 0.5, 0.75])
    step = float(np.median(1e3 * whole))
    size = sum(p.numel() for p in Network(NETWORKS[title][0]).parameters())
    return (
        f"| {title} | {size:,} | {keep} | {step:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
        f"{middle / step:.1%} |"
    )


def record(length: int) -> str:
    """What a record takes of the demo network, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        probe = nt.Probe(*noise(64, 64).tensors)
        names = "weights/variance weights/correlation_time weights/variation weights/tail_index"
        trace = WeightFluctuations(names.split(), length=length, probe=probe, to=folder)
        trained("64-64-10", 3 * length + 1, trace)
        seconds = nt.open(folder).nettrace_seconds.values
    return f"{np.median(seconds):.2g} s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    kinds = ("snapshots", "sketch", "moments")
    rows = [row(title, keep, steps) for title in NETWORKS for keep in kinds]
    text = (
        "# Cost of windows of weights\n\n"
        f"`python benchmarks/fluctuations.py`; Python {platform.python_version()}, torch "
        f"{torch.__version__}, pytorch-lightning {version('pytorch-lightning')}; CPU time on one "
        f"thread of a shared machine, medians and quartiles over the updates after the first "
        f"window, {steps} in all.\n\nA step is what Lightning calls the training batch; an update "
        "is all that the callback's hooks do at one. Perceptrons, by SGD with momentum, in batches "
        f"of {NETWORKS['64-64-10'][1]} and {NETWORKS['784-850-400-10'][1]}.\n\n"
        + "\n".join([HEAD, *rows])
        + f"\n\nOne record of a window of 360 snapshots of the first network: {record(360)} for "
        "variances, correlation times, the total variation and the tail index.\n"
    )
    RESULTS.write_text(text)
    print(text, f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
