"""How far predictions can be trusted: variances from the last layer, on known ground and off it.

Run `python examples/uncertainty.py`: a network learns a function of ten numbers with noise
(Friedman's first), another handwritten digits. Their last-layer uncertainties (Bigi et al. 2024,
arXiv:2403.02251) take one forward pass. They are held against a variance that is the same
everywhere, or a plain softmax; against five networks; and against laplace-torch, where that is
installed: by the likelihood of new samples, by how often targets lie where they are said to, and by
what becomes of them away from the training data. Everything goes to the folder `runs/uncertainty`.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from figure import BLUE, GREEN, GREY, ORANGE, STYLE
from matplotlib.axes import Axes
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nettrace as nt
from nettrace.uncertainty import scores

#: From inputs to means and variances, or to probabilities.
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]
Classify = Callable[[Tensor], Tensor]
#: By which Friedman's numbers are shifted and scaled.
MEAN, DEVIATION = 14.4, 5.0
COLOURS = {
    "last layer": BLUE,
    "constant": GREY,
    "softmax": GREY,
    "five networks": ORANGE,
    "laplace-torch": GREEN,
}


@dataclass
class Problem:
    """Samples to train on, to calibrate on and to judge by, and networks that learnt them."""

    train: TensorDataset
    calibration: TensorDataset
    test: TensorDataset
    noise: float = 0.0
    networks: list[nn.Module] = field(default_factory=list)

    def batches(self, which: TensorDataset) -> DataLoader:
        """In their order."""
        return DataLoader(which, batch_size=100)


def network(inputs: int, outputs: int, wide: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(inputs, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU()),
        nn.Linear(wide, outputs),
    )


def friedmans(x: Tensor) -> Tensor:
    """The function itself, (N, 1) of (N, 10), in the units of `friedman`."""
    a, b, c, d, e = (x[:, :5].T + 1) / 2
    y = 10 * (math.pi * a * b).sin() + 20 * (c - 0.5).square() + 10 * d + 5 * e
    return (y[:, None] - MEAN) / DEVIATION


def friedman() -> Problem:
    """1000 samples to train on, 1000 to calibrate on, 3000 to judge by; noise of 0.2 deviations."""
    x, y = map(torch.tensor, make_friedman1(5000, 10, noise=1.0, random_state=0))
    x, y = x.float() * 2 - 1, (y.float()[:, None] - MEAN) / DEVIATION
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 2000), (2000, 5000))]
    return Problem(*parts, noise=1 / DEVIATION**2)


def digits() -> Problem:
    """Digits of the writers in scikit-learn's set, in three parts at random."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images).float()[order] / 8 - 1, torch.tensor(labels)[order]
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 600), (600, 1000), (1000, 1797))]
    return Problem(*parts)


def learn(problem: Problem, outputs: int, epochs: int, count: int) -> None:
    """Trains some networks from different beginnings."""
    x, y = problem.train.tensors
    for seed in range(count):
        torch.manual_seed(seed)
        net = network(x.shape[1], outputs, 128 if outputs == 1 else 64)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                out = net(x[rows])
                loss = F.mse_loss(out, y[rows]) if outputs == 1 else F.cross_entropy(out, y[rows])
                loss.backward()
                optimizer.step()
        problem.networks.append(net.eval())


# What gives variances ----------------------------------------------------------------------------


def regressors(problem: Problem) -> dict[str, Predict]:
    """By name, from inputs to means and variances."""
    net, (x, y) = problem.networks[0], problem.calibration.tensors
    fitted = nt.uncertainty.fit(
        net, problem.batches(problem.train), problem.batches(problem.calibration)
    )
    print(f"  {fitted}")
    with torch.no_grad():
        constant = (net(x) - y).square().mean()

    def last_layer(x: Tensor) -> tuple[Tensor, Tensor]:
        found = fitted(x)
        return found.mean, found.variance

    def same(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = net(x)
        return mean, constant.expand_as(mean)

    def members(x: Tensor) -> tuple[Tensor, Tensor]:
        each = torch.stack([net(x) for net in problem.networks])
        return each.mean(0), each.var(0)

    # To the variance between members, scaled, that of the noise is added: both by likelihood.
    with torch.no_grad():
        mean, between = members(x)
    pairs = [(a, b) for a in np.geomspace(0.1, 10, 25) for b in np.geomspace(1e-3, 3, 40)]
    likely = [
        float(scores.gaussian_losses(y - mean, a * between + b * constant).mean()) for a, b in pairs
    ]
    scale, floor = pairs[int(np.argmin(likely))]

    def ensemble(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, between = members(x)
        return mean, scale * between + floor * constant

    found = {"last layer": last_layer, "constant": same, "five networks": ensemble}
    laplace = laplace_of(problem, "regression")
    if laplace is not None:
        noise = float(laplace.sigma_noise) ** 2

        def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
            mean, variance = laplace(x)
            return mean, variance.reshape(mean.shape) + noise

        found["laplace-torch"] = posterior
    return found


def classifiers(problem: Problem) -> dict[str, Classify]:
    """By name, from inputs to probabilities of classes."""
    net = problem.networks[0]
    fitted = nt.uncertainty.fit(
        net, problem.batches(problem.train), problem.batches(problem.calibration)
    )
    print(f"  {fitted}")
    found: dict[str, Classify] = {
        "last layer": lambda x: fitted(x).probabilities,
        "softmax": lambda x: net(x).softmax(1),
        "five networks": lambda x: torch.stack([n(x).softmax(1) for n in problem.networks]).mean(0),
    }
    laplace = laplace_of(problem, "classification")
    if laplace is not None:
        found["laplace-torch"] = lambda x: laplace(x, link_approx="probit")
    return found


def laplace_of(problem: Problem, kind: str) -> Callable[..., object] | None:
    """laplace-torch's posterior of the last layer, or None where it is not installed.

    Of numbers, prior and noise by marginal likelihood; of classes, the prior by likelihood of the
    samples to calibrate on.
    """
    try:
        from laplace import Laplace
    except ImportError:
        print("  laplace-torch is not installed, and left out")
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Laplace(
            problem.networks[0], kind, subset_of_weights="last_layer", hessian_structure="full"
        )
        found.fit(problem.batches(problem.train))
        if kind == "classification":
            found.optimize_prior_precision(
                method="gridsearch",
                pred_type="glm",
                link_approx="probit",
                val_loader=problem.batches(problem.calibration),
                verbose=False,
            )
            return found
        logs = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([logs], 0.1)
        for _ in range(200):
            optimizer.zero_grad()
            (-found.log_marginal_likelihood(logs[0].exp(), logs[1].exp())).backward()
            optimizer.step()
    return found


# What becomes of it ------------------------------------------------------------------------------


def judge_numbers(
    axes: list[Axes], problem: Problem, methods: dict[str, Predict]
) -> dict[str, Tensor]:
    """Draws coverage, errors against variances, and both away from the training data.

    Returns:
        By method, (N,) how unlikely each sample is, in nats.
    """
    x, y = problem.test.tensors
    axes[0].plot([0, 1], [0, 1], color="black", lw=0.7)
    factors, found = np.linspace(1, 3, 9), {}
    for name, predict in methods.items():
        style = {"color": COLOURS[name], "label": name}
        with torch.no_grad():
            mean, variance = predict(x)
            far = np.array([float(predict(f * x)[1].mean()) for f in factors])
        found[name] = scores.gaussian_losses(y - mean, variance)[:, 0]
        nominal, observed = scores.coverage(y - mean, variance)
        off = float((nominal - observed).abs().mean())
        told = f"variance x {far[4] / far[0]:.1f} for inputs x 2"
        report(name, found[name], f"coverage off by {off:.3f}", told)
        axes[0].plot(nominal, observed, marker="o", ms=3, **style)
        if name != "constant":
            bins = variance[:, 0].argsort().split(150)
            errors = [float((y - mean)[b].square().mean()) for b in bins]
            axes[1].plot([float(variance[b].mean()) for b in bins], errors, "o", ms=4, **style)
        axes[2].plot(factors, far / far[0], **style)
    net, true = problem.networks[0], [friedmans(float(f) * x) for f in factors]
    with torch.no_grad():
        pairs = zip(factors, true, strict=True)
        errors = np.array([float((net(float(f) * x) - t).square().mean()) for f, t in pairs])
    errors += problem.noise  # of targets that nobody drew
    axes[2].plot(factors, errors / errors[0], color="black", ls="--", label="squared error")
    print(f"  squared errors x {errors[4] / errors[0]:.0f} for inputs x 2")
    ends = [min(axes[1].get_xlim()[0], axes[1].get_ylim()[0]), axes[1].get_ylim()[1]]
    axes[1].plot(ends, ends, color="black", lw=0.7)
    axes[0].set(title="Friedman: share of targets below", xlabel="predicted quantile")
    axes[0].set_ylabel("observed share")
    axes[1].set(title="Friedman: errors, 150 samples a point", xlabel="predicted variance")
    axes[1].set_ylabel("mean squared error")
    axes[2].set(title="Friedman: away from the training data", yscale="log")
    axes[2].set(xlabel="inputs times", ylabel="mean variance, relative")
    return found


def judge_classes(
    axes: list[Axes], problem: Problem, methods: dict[str, Classify]
) -> dict[str, Tensor]:
    """Draws reliability, and confidence where pixels are exchanged for those of other images.

    Returns:
        By method, (N,) how unlikely each sample is, in nats.
    """
    x, y = problem.test.tensors
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(x.shape, generator=generator)
    other = x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)
    shares, right, found = np.linspace(0, 1, 11), [], {}
    axes[0].plot([0, 1], [0, 1], color="black", lw=0.7)
    for name, classify in methods.items():
        style = {"color": COLOURS[name], "label": name}
        with torch.no_grad():
            p = classify(x)
            far = [classify(torch.where(drawn < share, other, x)) for share in shares]
        found[name] = scores.categorical_losses(p.clamp_min(1e-12).log(), y)
        ece = float(scores.expected_calibration_error(p, y))
        confident = [float(q.amax(1).mean()) for q in far]
        told = f"confidence {confident[0]:.2f}, {confident[-1]:.2f} in noise"
        report(name, found[name], f"calibration error {ece:.3f}", told)
        axes[0].plot(*scores.reliability(p, y), marker="o", ms=3, **style)
        axes[1].plot(shares, confident, **style)
        if name == "last layer":
            right = [float((q.argmax(1) == y).float().mean()) for q in far]
    print(f"  accuracy {right[0]:.2f}, {right[-1]:.2f} in noise")
    axes[1].plot(shares, right, color="black", ls="--", label="accuracy")
    axes[0].set(title="Digits: accuracy by confidence", xlabel="mean confidence")
    axes[0].set(ylabel="accuracy", xlim=(0.3, 1.02), ylim=(0.3, 1.05))
    axes[1].set(title="Digits: away from the training data", ylim=(0, 1.05))
    axes[1].set(xlabel="share of pixels drawn from others", ylabel="mean confidence")
    return found


def report(name: str, losses: Tensor, *told: str) -> None:
    """Prints how likely new samples are."""
    error = float(losses.std() / math.sqrt(len(losses)))
    print(f"  {name:14s} -log p {float(losses.mean()):7.3f} +- {error:.3f}, {', '.join(told)}")


def gains(axis: Axes, found: dict[str, dict[str, Tensor]]) -> None:
    """Draws how much likelier new samples are than where there is no gain, sample by sample."""
    rows = []
    for problem, losses in found.items():
        plain = losses["softmax" if "softmax" in losses else "constant"]
        for name in losses:
            if name not in ("constant", "softmax"):
                rows.append((f"{problem},\n{name}", COLOURS[name], plain - losses[name]))
    for row, (_, colour, gain) in enumerate(reversed(rows)):
        error = 1.96 * float(gain.std() / math.sqrt(len(gain)))
        axis.errorbar(float(gain.mean()), row, xerr=error, fmt="o", color=colour, capsize=3)
    axis.axvline(0, color=GREY, lw=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=8.5)
    axis.locator_params(axis="x", nbins=5)
    axis.set(title="Gain in likelihood, 95 %", xlabel="nats a sample, over constant or softmax")


def main() -> None:
    """Trains, judges, prints and draws."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=60)
    options.add_argument("--out", type=Path, default=Path("runs/uncertainty"))
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    print("Friedman's function, nats a sample:")
    problem = friedman()
    learn(problem, 1, args.epochs, 5)
    found = {"Friedman": judge_numbers(list(axes[0]), problem, regressors(problem))}
    print("Digits, nats a sample:")
    problem = digits()
    learn(problem, 10, args.epochs, 5)
    found["Digits"] = judge_classes(list(axes[1, :2]), problem, classifiers(problem))
    gains(axes[1, 2], found)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in (axes[0, 0], axes[0, 2], axes[1, 1]):
        axis.legend(fontsize=8.5)
    path = args.out / "uncertainty.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Figure: {path}")


if __name__ == "__main__":
    main()
