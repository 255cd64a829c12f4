"""Gradient descent sharpens the landscape until it is hardly stable, and then goes on like that.

Run `python examples/edge_of_stability.py`: a network fits a Chebyshev polynomial by full-batch
gradient descent. The largest eigenvalue of the Hessian of its loss grows until it reaches 2 / eta,
eta the learning rate, above which descent along its eigenvector is unstable. From there on it stays
at that value, while the loss goes on to fall, though no longer at every step (Cohen et al. 2021,
arXiv:2103.00065). `--digits` does the same on a thousand handwritten digits. Everything goes to the
folder `runs/edge_of_stability`.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import xarray as xr
from figure import BLUE, ORANGE, STYLE, density, tracks
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nettrace as nt

MEASURES = ["loss/mean", "hessian/lambda_max", "hessian/eigenvalues"]
MEASURES += ["hessian/stability", "hessian/stability_gd"]


@dataclass
class Problem:
    """What is learnt, by which network, at what learning rate, and for how long."""

    title: str
    x: Tensor
    y: Tensor
    model: nn.Module
    rate: float
    steps: int
    every: int


def chebyshev() -> Problem:
    """The polynomial of degree 4 on 20 points, by one hidden layer of 100."""
    x = torch.linspace(-1, 1, 20)[:, None]
    model = nn.Sequential(nn.Linear(1, 100), nn.Tanh(), nn.Linear(100, 1, bias=False))
    nn.init.xavier_normal_(model[0].weight, gain=1.9)
    nn.init.zeros_(model[0].bias)
    nn.init.xavier_normal_(model[2].weight)
    y = 8 * x**4 - 8 * x**2 + 1
    return Problem("a polynomial of degree 4", x, y, model, rate=0.4, steps=6000, every=100)


def digits() -> Problem:
    """A thousand digits, by two hidden layers of 64; half the squared error of one-hot targets."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    x = ((x - x.mean(0)) / x.std())[:1000]
    y = F.one_hot(torch.tensor(labels[:1000]), 10).float()
    parts = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model = nn.Sequential(*parts)
    return Problem("a thousand digits", x, y, model, rate=0.2, steps=2000, every=50)


def learn(problem: Problem, out: Path) -> list[float]:
    """Full-batch gradient descent, traced; returns the loss before each step."""
    model, steps = problem.model, problem.steps
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate)
    probe = nt.Probe(problem.x, problem.y, likelihood="gaussian")
    spectra = ["hessian/density", "hessian/density_at"]
    times = [0, steps // 5, steps]
    losses = []
    with (
        nt.Tracer(probe, MEASURES, every=problem.every, to=out / "trace").attached(
            model, optimizer
        ),
        nt.Tracer(probe, spectra, every=times, to=out / "spectra").attached(model, optimizer),
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(problem.x) - problem.y).square().sum(1).mean() / 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def draw(title: str, losses: list[float], data: xr.Dataset, spectra: xr.Dataset, to: Path) -> None:
    """Draws eigenvalues over time, the loss, and densities of eigenvalues to a file."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    tracks(axes[0], data)
    axes[1].semilogy(losses, color=BLUE, lw=0.7)
    axes[1].set(title=f"Loss: {title}", xlabel="optimizer step", ylabel="half the squared error")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("")
    density(axes[2], spectra)
    axes[2].axvline(2 / data.hessian_stability_gd.learning_rate, color=ORANGE, lw=1.2, ls="--")
    for axis in axes[:2]:
        axis.set_xlim(0, len(losses))
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(to, dpi=150)
    plt.close(figure)


def main() -> None:
    """Trains, prints how sharp the loss is against 2 / eta, and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--digits", action="store_true", help="digits in place of a polynomial")
    options.add_argument("--steps", type=int, help="as many as it takes, unless told")
    options.add_argument("--out", type=Path, default=Path("runs/edge_of_stability"))
    args = options.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)

    torch.manual_seed(0)
    problem = digits() if args.digits else chebyshev()
    problem.steps = args.steps or problem.steps
    losses = learn(problem, args.out)
    data, spectra = nt.open(args.out / "trace").load(), nt.open(args.out / "spectra").load()
    ratio = data.hessian_stability
    late = ratio[len(ratio) // 2 :]
    crossed = ratio.step.values[ratio.values > 1]
    print(f"2 / eta = {2 / problem.rate:g}; at step 0 the largest eigenvalue is", end=" ")
    print(f"{float(data.hessian_lambda_max[0]):.2f}, {float(ratio[0]):.3f} of that")
    print(f"It is larger for the first time at step {crossed[0] if len(crossed) else '(never)'}")
    print(f"From step {int(late.step[0])} on it is {float(late.mean()):.3f} of that on average,")
    print(f"    with a standard deviation of {float(late.std()):.3f}")
    rises = sum(b > a for a, b in itertools.pairwise(losses))
    print(f"The loss fell from {losses[0]:.3g} to {losses[-1]:.3g}, and rose at {rises} steps")
    draw(problem.title, losses, data, spectra, args.out / "edge_of_stability.png")
    print(f"Figure: {args.out / 'edge_of_stability.png'}")


if __name__ == "__main__":
    main()
