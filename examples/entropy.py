"""Two mechanisms of learning, seen in the entropy of the tangent kernel.

Run `python examples/entropy.py`. A shallow, narrow network compresses: the entropy of its kernel
falls as it learns. A deep one forms structure: the entropy rises above that of the start (Tovey et
al. 2024, arXiv:2410.07451). In both the trace of the Fisher information rises, and then falls.
Everything goes to the folder `runs/entropy`.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from figure import BLUE, GREY, ORANGE, STYLE
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import nn

import nettrace as nt

SHALLOW, DEEP = "1 layer of 20", "3 layers of 50"
NETWORKS = {SHALLOW: [64, 20, 10], DEEP: [64, 50, 50, 50, 10]}
COLOURS = {SHALLOW: BLUE, DEEP: ORANGE}
MEASURES = ["ntk/entropy_normalised", "ntk/entropy_traced_normalised", "fisher/trace", "loss"]


def learn(sizes: list[int], seed: int, steps: int, folder: Path) -> xr.Dataset:
    """Full-batch gradient descent of a ReLU network on 500 digits, traced on 100 of them."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    x = (x - x.mean(0)) / x.std()
    torch.manual_seed(seed)
    chosen = torch.randperm(len(x))[:500]
    x, y = x[chosen], torch.tensor(labels)[chosen]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    tracer = nt.Tracer(nt.Probe(x[:100], y[:100]), MEASURES, every=nt.log_spaced(8), to=folder)
    for step in range(steps + 1):
        tracer(model, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return nt.open(folder).load()


def curves(axis: Axes, runs: dict[str, list[xr.Dataset]], name: str, start: bool = False) -> None:
    """The mean over seeds, and each seed faintly; `start` takes off what it was at first."""
    for network, data in runs.items():
        values = np.array([d[name].values - start * d[name].values[0] for d in data])
        axis.plot(data[0].step, values.T, color=COLOURS[network], alpha=0.3, lw=0.8)
        axis.plot(data[0].step, values.mean(0), color=COLOURS[network], lw=1.8, label=network)


def draw(runs: dict[str, list[xr.Dataset]], path: Path) -> None:
    """Draws accuracy, entropies and Fisher information of the networks to a file."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    curves(axes[0], runs, "loss_accuracy")
    axes[0].set(title="Learning", ylabel="accuracy on the probe", ylim=(0, 1.02))
    axes[0].legend(loc="upper left", fontsize=8.5)
    curves(axes[1], runs, "ntk_entropy_normalised", start=True)
    axes[1].set(title="Entropy, all outputs", ylabel=r"change of $S/\ln NC$")
    curves(axes[2], runs, "ntk_entropy_traced_normalised", start=True)
    axes[2].set(title="Entropy, outputs traced", ylabel=r"change of $S/\ln N$")
    curves(axes[3], runs, "fisher_trace")
    axes[3].set(title="Trace of the Fisher information", ylabel="mean over samples", ylim=(0, None))
    for axis in axes:
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)
        axis.set(xlabel="step", xlim=(0, max(runs[DEEP][0].step.values)))
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in axes[1:3]:
        axis.axhline(0, color=GREY, lw=0.8)
        axis.text(0.05, 0.9, "structure formation", color=ORANGE, transform=axis.transAxes)
        axis.text(0.05, 0.06, "compression", color=BLUE, transform=axis.transAxes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains the networks, prints how their entropies changed, and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/entropy"))
    args = options.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)

    runs: dict[str, list[xr.Dataset]] = {}
    for network, sizes in NETWORKS.items():
        folders = [args.out / f"{network}, seed {seed}" for seed in range(args.seeds)]
        runs[network] = [learn(sizes, s, args.steps, folder) for s, folder in enumerate(folders)]
        for name in MEASURES[:3]:
            values = np.array([d[name.replace("/", "_")].values for d in runs[network]]).mean(0)
            print(f"{network:15} {name:30} {values[0]:8.3f} -> {values[-1]:8.3f}")
    picture = args.out / "entropy.png"
    draw(runs, picture)
    print(f"Figure: {picture}")


if __name__ == "__main__":
    main()
