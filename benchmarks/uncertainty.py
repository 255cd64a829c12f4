"""What one forward pass costs with last-layer uncertainties, against one without.

    python benchmarks/uncertainty.py [--repeats NUMBER]

Plain forward passes, in eval mode and without gradients, take turns with calls of the uncertainties
on the same batch, and medians are compared. Networks are a ResNet-18 as torchvision builds it, on
32 images of 224 x 224 pixels, and that of `examples/digits.py`. The table goes to
`benchmarks/results/uncertainty.md`, with how far variances are from laplace-torch's, where that is
installed.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import nettrace as nt

RESULTS = Path(__file__).parent / "results" / "uncertainty.md"
HEAD = (
    "| network | batch | plain, ms | with uncertainties, ms | ratio (quartiles of pairs) |\n"
    "|---|---|---|---|---|"
)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, wide: int, wider: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, wider, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(inplace=True),
            nn.Conv2d(wider, wider, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        nn.MaxPool2d(3, 2, 1),
        *(block for a, b, s in widths for block in (Block(a, b, s), Block(b, b, 1))),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)),
    )


def demo() -> nn.Module:
    """That of examples/digits.py."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(512, 10)),
    )


def row(name: str, model: nn.Module, x: Tensor, repeats: int) -> str:
    model.eval()
    uncertainties = nt.uncertainty.fit(model, [x], alpha=1.0, ridge=1.0)
    uncertainties.likelihood = nt.Categorical(1)  # for probabilities, too
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with torch.no_grad():
        for number in range(repeats + 2):
            for which in ("plain", "ours") if number % 2 else ("ours", "plain"):
                start = time.process_time()
                model(x) if which == "plain" else uncertainties(x)
                if number > 1:
                    seconds[which].append(time.process_time() - start)
    plain, ours = (np.array(seconds[which]) * 1e3 for which in ("plain", "ours"))
    low, high = np.quantile(ours / plain, [0.25, 0.75])
    return (
        f"| {name} | {len(x)} | {np.median(plain):.2f} | {np.median(ours):.2f} | "
        f"{np.median(ours) / np.median(plain):.3f} ({low:.3f} to {high:.3f}) |"
    )


def beside_laplace() -> str:
    """How far variances are from those of laplace-torch's last-layer posterior, at its prior.

    Its posterior precision of a last layer's weights is H / sigma^2 + prior_precision, H the sum of
    J^T J over samples, so that alpha = sigma and ridge = sigma sqrt(prior_precision).
    """
    try:
        from laplace import Laplace
    except ImportError:
        return "laplace-torch was not installed, and is not compared with."
    sigma, precision = 0.25, 2.5
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # in which else a part of their Hessian is not
    net = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    x, y = torch.randn(200, 4).double(), torch.randn(200, 3).double()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50)
    theirs = Laplace(
        net,
        "regression",
        subset_of_weights="last_layer",
        hessian_structure="full",
        sigma_noise=sigma,
        prior_precision=precision,
    )
    theirs.fit(batches)
    new = torch.randn(40, 4).double()
    _, covariance = theirs(new)
    ours = nt.uncertainty.fit(net, batches, alpha=sigma, ridge=sigma * precision**0.5)(new)
    expected = covariance.diagonal(dim1=1, dim2=2)
    off = float((ours.variance / expected - 1).abs().max())
    torch.set_default_dtype(torch.float32)
    return (
        f"Variances of a two-layer network's three outputs are those of laplace-torch "
        f"{version('laplace-torch')} (regression, last_layer, full; alpha = sigma_noise, ridge = "
        f"sigma_noise sqrt(prior_precision)) but for {off:.1e} of them, in float64."
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=40)
    repeats = options.parse_args().repeats
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = [
        ("ResNet-18, 224 x 224", resnet(), torch.randn(32, 3, 224, 224), repeats),
        ("demo, 8 x 8", demo(), torch.randn(32, 1, 8, 8), 25 * repeats),
        ("demo, 8 x 8", demo(), torch.randn(360, 1, 8, 8), 25 * repeats),
    ]
    rows = [row(*case) for case in cases]
    compared = beside_laplace()
    print(HEAD, *rows, compared, sep="\n")
    told = [
        "# Cost of predictions with uncertainties",
        f"`python benchmarks/uncertainty.py`; Python {platform.python_version()}, torch "
        f"{torch.__version__}; CPU time on one thread of a shared machine, medians of {repeats} "
        f"forward passes (of the demo, {25 * repeats}), with and without in turn.",
        "\n".join([HEAD, *rows]),
        compared,
    ]
    RESULTS.write_text("\n\n".join(told) + "\n")


if __name__ == "__main__":
    main()
