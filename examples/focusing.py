"""Do weights focus on a few nodes, and does that oscillate from layer to layer?

Run `python examples/focusing.py`: deep ReLU networks learn digits, of two depths, from three kinds
of initial weights (those of He et al., those with half the variance, and homogeneous ones, positive
and equal but for a tenth), by SGD and by Adam, each from several seeds. De Jong, Meigel and
Rulands (2025, arXiv:2501.05550) report that weights focus on a subset of nodes, to a degree that
oscillates across layers, and that the dimension of hidden representations does too. Here the
focusing of each layer is measured after training, with the participation ratio of its activations;
whether either alternates is told by the lag-1 autocorrelation over layers, against what layers in
random order give. Everything goes to the folder `runs/focusing`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from figure import BLUE, GREY, ORANGE, STYLE
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nettrace as nt

WIDTH, BATCH = 40, 100
STARTS = {"He": "He", "half": "half the variance of He", "equal": "nearly equal"}
RATES = {"SGD": 0.1, "Adam": 3e-3}
COLOURS = {"SGD": BLUE, "Adam": ORANGE}
MEASURES = ["focus/focusing", "focus/alternation_p_weights"]


@dataclass
class Runs:
    """What several seeds of one kind of training gave: (seeds, layers) each, and p-values.

    Attributes:
        before: focusing before training.
        focus: focusing after training.
        ratio: participation ratio of hidden representations after training.
        p: of the alternation of focusing, against shuffled weights.
        accuracy: on the samples that were learnt.
    """

    before: list[np.ndarray] = field(default_factory=list)
    focus: list[np.ndarray] = field(default_factory=list)
    ratio: list[np.ndarray] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def network(depth: int, start: str) -> nn.Sequential:
    """Hidden layers of equal width, without biases."""
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise([64, *[WIDTH] * depth, 10]):
        layer = nn.Linear(n, m, bias=False)
        if start == "equal":
            nn.init.normal_(layer.weight, 1 / n, 0.1 / n)
        else:
            nn.init.normal_(layer.weight, 0, math.sqrt((2 if start == "He" else 1) / n))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def participation(model: nn.Sequential, x: Tensor) -> np.ndarray:
    """(tr S)^2 / tr S^2 of the covariance S of each hidden layer's activations; 0 if they are."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                h = (x - x.mean(0)).double()
                s = h.T @ h
                found.append(float(s.trace() ** 2 / s.square().sum().clamp_min(1e-300)))
    return np.array(found)


def learn(depth: int, start: str, by: str, seed: int, steps: int, into: Runs) -> None:
    """Trains one network, and adds what it gives."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model = network(depth, start)
    kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[by]
    optimizer = kind(model.parameters(), lr=RATES[by])
    probe = nt.Probe(x[:8], y[:8])
    into.before.append(nt.Tracer(probe, "focus/focusing")(model, 0)[0].value)
    for _ in range(steps):
        some = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    focus, p, *_ = nt.Tracer(probe, MEASURES)(model, steps)
    into.focus.append(focus.value)
    into.p.append(float(p.value))
    into.ratio.append(participation(model, x))
    with torch.no_grad():
        into.accuracy.append(float((model(x).argmax(1) == y).float().mean()))


def alternation(rows: np.ndarray) -> np.ndarray:
    """The lag-1 autocorrelation of rows (..., layers) about a straight line, as nettrace has it."""
    at = np.linspace(-1, 1, rows.shape[-1])
    d = rows - rows.mean(-1, keepdims=True)
    d = d - (d @ at)[..., None] / (at @ at) * at
    size = (d**2).sum(-1)
    return (d[..., 1:] * d[..., :-1]).sum(-1) / np.where(size > 1e-18, size, np.inf)


@dataclass
class Chance:
    """How far layers alternate, against layers in random order.

    Attributes:
        mean: of the alternation over seeds.
        error: its standard error over seeds.
        null: mean and standard deviation of that mean, if the layers of each seed are in an order
            of their own.
        p: how often it is as low then.
    """

    mean: float
    error: float
    null: tuple[float, float]
    p: float


def against_chance(rows: np.ndarray, draws: int = 4000) -> Chance:
    """Of rows (seeds, layers)."""
    found = alternation(rows)
    orders = np.random.default_rng(0).random((draws, *rows.shape)).argsort(-1)
    null = alternation(np.take_along_axis(rows[None], orders, -1)).mean(1)
    error = float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    p = (1 + int((null <= found.mean() + 1e-9).sum())) / (1 + draws)
    return Chance(float(found.mean()), error, (float(null.mean()), float(null.std())), p)


def profile(axis: Axes, rows: np.ndarray, colour: str, label: str) -> None:
    """Means over seeds (seeds, layers) with their standard errors, by layer."""
    error = rows.std(0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None
    at = np.arange(1, rows.shape[1] + 1)
    style = {"fmt": "o-", "ms": 3.5, "lw": 1.3, "capsize": 2}
    axis.errorbar(at, rows.mean(0), error, color=colour, label=label, **style)


def indices(axis: Axes, found: dict[tuple[int, str, str], Chance], what: str) -> None:
    """The alternation of each kind of training, with the band that random orders give."""
    depths = sorted({depth for depth, _, _ in found})
    kinds = [(depth, start) for start in STARTS for depth in depths]
    for number, (depth, start) in enumerate(kinds):
        for by, shift in (("SGD", -0.18), ("Adam", 0.18)):
            one = found[depth, start, by]
            middle, spread = one.null
            axis.bar(number + shift, 4 * spread, 0.3, middle - 2 * spread, color=GREY, alpha=0.25)
            place, style = number + shift, {"fmt": "o", "ms": 4.5, "capsize": 2.5}
            axis.errorbar(place, one.mean, one.error, color=COLOURS[by], **style)
    axis.set_xticks(range(len(kinds)), [f"{s}\n{d}" for d, s in kinds])
    axis.set(ylim=(-1, 1), ylabel="autocorrelation of lag 1")
    axis.set_title(f"Alternation of {what}")
    axis.axhline(0, color="black", lw=0.6)
    axis.text(0.02, 0.03, "-1: alternates.  Grey: random order, two s.d.", transform=axis.transAxes)


def draw(runs: dict[tuple[int, str, str], Runs], told: str, path: Path) -> None:
    """Draws the profiles of the deepest networks, and the alternation of all, to a file."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(
        2, 4, figsize=(15.5, 7), layout="constrained", width_ratios=[1, 1, 1, 1.35]
    )
    deepest = max(depth for depth, _, _ in runs)
    for column, (start, said) in enumerate(STARTS.items()):
        above, below = axes[:, column]
        for by, colour in COLOURS.items():
            one = runs[deepest, start, by]
            label = f"{by}, {100 * np.mean(one.accuracy):.0f} % of digits right"
            profile(above, np.array(one.focus), colour, label)
            profile(below, np.array(one.ratio), colour, by)
        profile(above, np.array(runs[deepest, start, "SGD"].before), GREY, "before training")
        above.set(title=f"Focusing: {said}", ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6))
        below.set(title="Dimension of representations", ylim=(0, None), xlabel="hidden layer")
        above.legend(loc="upper center", fontsize=8.5, ncols=1)
    axes[0, 0].set_ylabel(r"focusing $\phi = 1 - PR(\pi) / n$")
    axes[1, 0].set_ylabel("participation ratio")
    for row, what in enumerate(("focus", "ratio")):
        chances = {kind: against_chance(np.array(getattr(one, what))) for kind, one in runs.items()}
        indices(axes[row, 3], chances, ("focusing", "dimensions")[row])
    axes[1, 3].set_xlabel("initial weights, hidden layers")
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.suptitle(told, fontsize=11.5, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Trains, prints how far layers alternate against chance, says what is seen, and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--depths", type=int, nargs="+", default=[4, 8], help="hidden layers")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--out", type=Path, default=Path("runs/focusing"))
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    runs: dict[tuple[int, str, str], Runs] = {}
    lowest = []
    print(
        "layers  start  by     right   focusing before, after   alternation (random order)      p"
    )
    for kind in itertools.product(args.depths, STARTS, RATES):
        runs[kind] = one = Runs()
        for seed in range(args.seeds):
            learn(*kind, seed, args.steps, one)
        depth, start, by = kind
        print(f"{depth:6}  {start:5}  {by:5} {np.mean(one.accuracy):6.0%}", end="")
        print(f" {np.mean(one.before):16.2f} {np.mean(one.focus):7.2f}", end="")
        for rows in (one.focus, one.ratio):
            found = against_chance(np.array(rows))
            lowest.append(found.p)
            print(f"   {found.mean:5.2f} +- {found.error:.2f} ({found.null[0]:.2f})", end="")
            print(f" {found.p:.4f}", end="")
        print(f"   shuffled weights: {', '.join(f'{p:.2f}' for p in one.p)}")
    level = 0.05 / len(lowest)
    seen = sum(p < level for p in lowest)
    told = "No oscillation is seen: neither focusing nor dimensions alternate more than chance"
    if seen:
        told = f"Of {len(lowest)} kinds of profiles over layers, {seen} alternate more than chance"
    told += f" (lowest p of {len(lowest)}: {min(lowest):.2g}), in {len(runs) * args.seeds} networks"
    print(told)
    draw(runs, told, args.out / "focusing.png")
    print(f"Figure: {args.out / 'focusing.png'}")


if __name__ == "__main__":
    main()
