"""How data shape the landscape: the density of states of perceptrons whose weights are signs.

    python examples/landscape.py [--weights 51] [--seconds 12] [--out runs/landscape]

S(E) is the logarithm of the number of perceptrons that put E patterns in the wrong class. Four
figures turn one property of the patterns each: how many are in one class, how far the classes are
apart, how many labels are wrong, how much inputs say of labels. The last two are of the digits of
scikit-learn, 0 to 4 against 5 to 9, seen by 201 weights, from two runs that share nothing; and
their energy and heat capacity at any temperature. After Mele, Menichetti, Ingrosso and Potestio,
DPG 2026, DY 19.10, and arXiv:2409.18683. Takes up to 24 times as long as `--seconds` says, and
draws `landscape.png`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from figure import BLUE, GREY, ORANGE, STYLE
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor

from nettrace.landscape import canonical, density_of_states, patterns, perceptron

KNOBS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "Imbalance": ("share of class 1", [{"offset": 0.5, "share": s} for s in (0.5, 0.7, 0.9)]),
    "Separation": ("distance of the classes", [{"separation": s} for s in (0.0, 2.0, 4.0)]),
    "Mislabelling": (
        "wrong labels, of separable data",
        [{"correlation": 1.0, "mislabelled": s} for s in (0.0, 0.1, 0.3)],
    ),
    "Correlation": (
        "correlation of inputs with labels",
        [{"correlation": s} for s in (0.0, 0.7, 1.0)],
    ),
}


def main(weights: int, seconds: float, out: Path) -> None:
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    network = perceptron(weights)
    for axis, (title, (what, settings)) in zip(axes.flat, KNOBS.items(), strict=False):
        colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(settings)))
        for options, colour in zip(settings, colours, strict=True):
            x, y = patterns(weights, weights, seed=1, **options)
            found = density_of_states(network, x, y, error=0.1, seconds=seconds, progress=True)
            value = list(options.values())[-1]
            show(axis, found, colour, f"{value:g}")
        axis.set_title(title)
        axis.legend(title=what, title_fontsize=8.5)
    x, y = digits(min(201, 4 * weights - 3))
    runs = [
        density_of_states(perceptron(x.shape[1]), x, y, seconds=6 * seconds, seed=s, progress=True)
        for s in (0, 1)
    ]
    show(axes[1, 1], runs[0], BLUE, "one run")
    show(axes[1, 1], runs[1], ORANGE, "another", "--")
    axes[1, 1].set_title(f"Digits, {x.shape[1]} weights")
    axes[1, 1].legend()
    heat(axes[1, 2], runs[0])
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "landscape.png", dpi=130)
    plt.close(figure)
    seen = runs[0].energy[runs[0].entropy.notnull()]
    apart = np.abs(runs[0].entropy - runs[1].entropy)
    flips = np.mean([found.flips_per_second for found in runs])
    print(
        f"Digits: energies {int(seen.min())} to {int(seen.max())} were seen, {flips:.2g} flips a "
        f"second; entropies of two runs differ by {float(apart.median()):.2g} nats in half of them"
    )
    print(f"Figure: {out / 'landscape.png'}")


def digits(features: int) -> tuple[Tensor, Tensor]:
    """As many patterns as features: whether pixels are brighter than each of four levels."""
    data = load_digits()
    bright = np.concatenate([data.data > level for level in (1, 5, 9, 13)], axis=1)
    chosen = np.sort(bright.std(0).argsort()[::-1][:features])
    x = torch.from_numpy(bright[:features][:, chosen].astype(np.float64)) * 2 - 1
    return x, torch.from_numpy(np.where(data.target[:features] < 5, 1.0, -1.0))


def show(axis: Axes, found: xr.Dataset, colour: Any, label: str, style: str = "-") -> None:
    """S(E) with its standard error."""
    entropy, error = found.entropy.values, found.entropy_standard_error.values
    error = np.where(np.isfinite(error), error, np.nan)
    axis.plot(found.energy, entropy, style, color=colour, label=label)
    axis.fill_between(found.energy, entropy - error, entropy + error, color=colour, alpha=0.3, lw=0)
    axis.set_xlabel("E, patterns in the wrong class")
    axis.set_ylabel("S(E), nats")
    axis.set_ylim(0)
    axis.grid(alpha=0.25, linewidth=0.6)


def heat(axis: Axes, found: xr.Dataset) -> None:
    """Energy and heat capacity by temperature."""
    warm = canonical(found, np.geomspace(0.2, 20, 60))
    axis.plot(warm.temperature, warm.energy, color=BLUE)
    axis.set_title("Digits at temperature T")
    axis.set_xscale("log")
    axis.set_xlabel("T, patterns")
    axis.set_ylabel("mean energy, patterns", color=BLUE)
    axis.set_ylim(0)
    axis.grid(alpha=0.25, linewidth=0.6)
    other = axis.twinx()
    other.plot(warm.temperature, warm.heat_capacity, color=GREY)
    other.set_ylabel("heat capacity", color=GREY)
    other.set_ylim(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=51)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=Path("runs/landscape"))
    main(**vars(parser.parse_args()))
