"""From the geometry of images to that of classes: what the layers of a network make of digits.

Run `python examples/representations.py`: two networks of four hidden layers, one with batch
normalisation, learn handwritten digits, and are trained on long after they know all of them. What
layers make of 500 of the training's samples is followed: how similar it is to the images, to the
classes and between layers, of how many dimensions it is, and how near the last layer comes to
neural collapse, where the samples of a class are one point and the classes a simplex (Papyan, Han
and Donoho 2020, arXiv:2008.08186). Everything goes to the folder `runs/representations`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import xarray as xr
from figure import BLUE, GREEN, ORANGE, STYLE, by_layer, collapse, similarity
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import nn

import nettrace as nt

NETWORKS = {"without batch normalisation": False, "with batch normalisation": True}
RATE = 0.05


def network(normalised: bool) -> nn.Sequential:
    """Four hidden layers of 64, and a last one."""
    layers = nn.Sequential()
    for i in range(1, 5):
        layers.add_module(f"linear {i}", nn.Linear(64, 64))
        if normalised:
            layers.add_module(f"norm {i}", nn.BatchNorm1d(64))
        layers.add_module(f"ReLU {i}", nn.ReLU())
    layers.add_module("outputs", nn.Linear(64, 10))
    return layers


def learn(model: nn.Module, steps: int, to: Path) -> None:
    """Trains on digits, and follows what layers make of 500 of them."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)[:1000]
    y = torch.tensor(labels)[:1000]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=2e-3)
    probe = nt.Probe(x[:500], y[:500], layers=["ReLU ?", "outputs"])
    measures = ["geometry", "loss/accuracy"]
    with nt.Tracer(probe, measures, every="log", to=to).attached(model, optimizer):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            chosen = torch.randint(len(x), (100,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()


def draw(axes: list[Axes], data: xr.Dataset, name: str) -> None:
    """Draws similarities, dimensions and collapse of one network in a row."""
    by_layer(axes[0], data, "geometry_cka_inputs", BLUE, "images")
    by_layer(axes[0], data, "geometry_cka_targets", ORANGE, "classes")
    axes[0].set(title="Similarity to images and classes", ylim=(0, 1.35))
    axes[0].set_ylabel(f"{name}\n\nunbiased CKA $\\pm$ s.e.")
    by_layer(axes[1], data, "geometry_participation_ratio_corrected", BLUE, "participation")
    by_layer(axes[1], data, "geometry_dimension_two_nn", GREEN, "neighbours")
    axes[1].set(title="Dimension", ylabel="dimension $\\pm$ s.e.", ylim=(0, 17))
    similarity(axes[2], data)
    collapse(axes[3], data)
    axes[3].set_xscale("symlog", linthresh=1, linscale=0.4)
    axes[3].set_xlim(0, data.step[-1])
    for axis in axes[:2]:
        axis.legend(ncols=2, fontsize=7.5, loc="upper center", columnspacing=1, handlelength=1.5)
    for axis in (axes[0], axes[1], axes[3]):
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in axes[:3]:
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("")


def main() -> None:
    """Trains, prints what became of the representations, and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=4000)
    options.add_argument("--out", type=Path, default=Path("runs/representations"))
    args = options.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    plt.rcParams.update(STYLE)
    figure, rows = plt.subplots(2, 4, figsize=(17.5, 7.4), layout="constrained")
    for (name, normalised), axes in zip(NETWORKS.items(), rows, strict=True):
        torch.manual_seed(0)
        learn(network(normalised), args.steps, args.out / name)
        data = nt.open(args.out / name).load()
        last = data.isel(step=-1)
        print(f"{name}: accuracy {float(last.loss_accuracy):.3f} at step {int(last.step)}")
        for measure in ("participation_ratio_corrected", "dimension_two_nn", "separation"):
            one = data[f"geometry_{measure}"].sel(representation="ReLU 4")
            error = data[f"geometry_{measure}_standard_error"].sel(representation="ReLU 4")
            ends = [f"{float(one[i]):.3g} +- {float(error[i]):.2g}" for i in (0, -1)]
            print(f"    {measure} of the last hidden layer: {' -> '.join(ends)}")
        for measure in ("nc1_variability", "nc2_maximal_angle", "nc3_self_duality"):
            one = data[f"geometry_{measure}"]
            print(f"    {measure}: {float(one[0]):.3g} -> {float(one[-1]):.3g}")
        draw(list(axes), data, name)
    figure.savefig(args.out / "representations.png", dpi=120)
    print(f"Figure: {args.out / 'representations.png'}")


if __name__ == "__main__":
    main()
