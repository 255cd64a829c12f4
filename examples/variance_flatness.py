"""The flatter the loss along a direction, the less the weights fluctuate there.

Run `python examples/variance_flatness.py`: a small network learns digits by stochastic gradient
descent, and goes on for 50 epochs after it has learnt them. The weights of its middle layer
fluctuate with a variance that falls with the flatness of the loss, as sigma^2 ~ F^-psi with psi
near 4, where a system in equilibrium would fluctuate the more, the flatter (Feng and Tu 2021, PNAS
118, e2015617118). But that depends on how long one looks: noise that follows curvature, epochs
dealt out without replacement, and windows too short to be equilibrated each have a part in it,
and nettrace says what theory expects. Everything goes to the folder `runs/variance_flatness`.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from figure import BLUE, GREEN, GREY, ORANGE, STYLE, variance_flatness, variance_predicted
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import nn

import nettrace as nt
from nettrace.window import WeightWindow

BATCH, RATE = 50, 0.1
MEASURES = ["variance", "flatness", "flatness_exponent", "equilibration"]
MEASURES += ["variance_predicted", "flatness_exponent_predicted"]


def learn(epochs: int, windows: list[int], seed: int, out: Path) -> dict[int, xr.Dataset]:
    """Traces windows of so many epochs, all from the end of `epochs` on; one record of each."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    sizes = (64, 50, 50, 10)
    a, b, c = (nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(sizes))
    model = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batches = len(x) // BATCH
    measures = [f"weights/{name}" for name in MEASURES]
    tracers = []
    for window in windows:
        kept = WeightWindow(window * batches, parameters="2.weight", population=batches * BATCH)
        end = [(epochs + window) * batches]
        to = out / f"{window} epochs"
        tracers.append(nt.Tracer(nt.Probe(x, y), measures, every=end, to=to, window=kept))
    step = 0
    for _ in range(epochs + max(windows)):
        for some in torch.randperm(len(x))[: batches * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            step += 1
            for tracer in tracers:
                tracer(model, step, optimizer, samples=step * BATCH)
    return {w: nt.open(out / f"{w} epochs").load().isel(step=0) for w in windows}


def lengths(axis: Axes, data: dict[int, xr.Dataset]) -> None:
    """The exponent against the length of the window: as measured, and as expected."""
    epochs = list(data)
    found = [d.weights_flatness_exponent for d in data.values()]
    psi = np.array([float(one) for one in found])
    low, high = (np.array([p.attrs[f"interval_{e}"] for p in found]) for e in ("low", "high"))
    expected = [d.weights_flatness_exponent_predicted for d in data.values()]
    axis.errorbar(epochs, psi, (psi - low, high - psi), fmt="o-", color=ORANGE, label="measured")
    axis.plot(epochs, expected, "s--", ms=4, color=BLUE, label="theory: window and epochs")
    for name, colour, label in (
        ("psi_short_window", GREEN, "theory: window, independent batches"),
        ("psi_stationary", GREY, "theory: long window, independent batches"),
    ):
        axis.plot(epochs, [e.attrs[name] for e in expected], ":", color=colour, label=label)
    checks = [float(d.weights_equilibration) for d in data.values()]
    axis.set_title("The exponent depends on the window")
    axis.set_xlabel("epochs in the window; below, its equilibration")
    axis.set(ylabel=r"$\psi$, 95 % intervals", xscale="log", ylim=(0, 1.6 * high.max()))
    ticks = [f"{n}\n{c:.2f}" for n, c in zip(epochs, checks, strict=True)]
    axis.set_xticks(epochs, ticks, minor=False)
    axis.set_xticks([], minor=True)
    axis.legend(fontsize=8.5, loc="upper right")


def draw(data: dict[int, xr.Dataset], shown: int, path: Path) -> None:
    """Draws one window in detail, and the exponents of all, to a file."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    one = data[shown]
    variance_flatness(axes[0], one)
    variance_predicted(axes[1], one)
    lengths(axes[2], data)
    told = one.weights_equilibration
    verdict = "WARNING: not equilibrated" if "warning" in told.attrs else "equilibrated"
    bends = "the points bend\n" * ("fit_warning" in one.weights_flatness_exponent.attrs)
    axes[0].text(
        *(0.03, 0.04),
        f"window of {shown} epochs\n{bends}{verdict} ({float(told):.2f})",
        **{"transform": axes[0].transAxes, "fontsize": 8.5},
    )
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, prints exponents with their intervals for windows of several lengths, and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=200, help="before the windows begin")
    options.add_argument("--windows", type=int, nargs="+", default=[5, 10, 20, 50], help="epochs")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs/variance_flatness"))
    args = options.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)

    warnings.simplefilter("ignore", nt.DoubtfulMeasureWarning)  # what they say is printed below
    data = learn(args.epochs, args.windows, args.seed, args.out)
    print("epochs       psi   95 % interval   expected   equilibration")
    for window, one in data.items():
        psi, expected = one.weights_flatness_exponent, one.weights_flatness_exponent_predicted
        low, high = psi.attrs["interval_low"], psi.attrs["interval_high"]
        print(f"{window:6} {float(psi):9.2f} {low:8.2f} to {high:.2f}", end="")
        print(f" {float(expected):10.2f} {float(one.weights_equilibration):15.2f}")
    shown = min(data, key=lambda window: abs(window - 10))
    if "warning" in data[shown].weights_equilibration.attrs:
        print(f"Of {shown} epochs: {data[shown].weights_equilibration.warning}")
    draw(data, shown, args.out / "variance_flatness.png")
    print(f"Figure: {args.out / 'variance_flatness.png'}")


if __name__ == "__main__":
    main()
