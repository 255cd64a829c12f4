"""The local learning coefficient by nettrace and by devinterp, where the truth is known.

    python benchmarks/learning_coefficient.py [--seeds NUMBER]

Two models: linear regression with noise, of four weights, at least squares, where the coefficient
with the localisation is (1/2) sum n beta h / (n beta h + gamma) of the curvatures h; and
reduced-rank regression on the population's loss, where it is that of Aoyagi and Watanabe (2005).
Both packages get the same n beta, localisation, chains, and steps of each. The table goes to
`benchmarks/results/learning_coefficient.md`.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from devinterp.slt.llc import llc
from torch import Tensor, nn

import nettrace as nt
from nettrace.landscape import learning_coefficient

RESULTS = Path(__file__).parent / "results" / "learning_coefficient.md"
HEAD = (
    "| model | by | estimate over truth, mean (least to most) | error over the stated one | "
    "seconds |\n|---|---|---|---|---|"
)
CHAINS, DRAWS, WARMUP, GAMMA = 4, 2000, 1000, 1.0


@dataclass(frozen=True)
class Problem:
    """A network at its minimum.

    Args:
        model: the network.
        x: (M, D) inputs.
        y: (M, C) targets.
        n: how many samples the loss stands for.
        truth: the learning coefficient that is to be found.
        stiffness: the largest curvature of n beta times the loss.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    n: int
    truth: float
    stiffness: float

    @property
    def scale(self) -> float:
        return self.n / math.log(self.n)


@dataclass(frozen=True)
class Found:
    """An estimate, its stated standard error, and the processor's seconds that it took."""

    value: float
    error: float
    seconds: float


def regression(seed: int) -> Problem:
    """Linear regression of 1000 samples with noise of unit variance."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, 4, generator=random)
    y = x @ torch.randn(4, 1, generator=random) + torch.randn(1000, 1, generator=random)
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    h = torch.linalg.eigvalsh((x.T @ x / 1000).double()) * 1000 / math.log(1000)
    return Problem(model, x, y, 1000, float((h / (h + GAMMA)).sum() / 2), float(h.max()))


class ReducedRank(nn.Module):
    """x -> B A x with A (3, 5) and B (5, 3)."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        turns = [torch.linalg.qr(torch.randn(k, k, generator=random)).Q for k in (5, 3, 5)]
        middle = torch.eye(5)[:, :3]
        self.first = nn.Parameter(turns[1] @ middle.T @ turns[0])
        self.second = nn.Parameter(turns[2] @ middle @ turns[1].T)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first.T @ self.second.T


def reduced_rank(seed: int) -> Problem:
    """Reduced-rank regression of full rank: the coefficient is 10.5, of 30 weights."""
    model = ReducedRank(torch.Generator().manual_seed(seed))
    x = math.sqrt(5) * torch.eye(5)  # of which the covariance is one
    scale = 200_000 / math.log(200_000)
    return Problem(model, x, model(x).detach(), 200_000, 10.5, 2 * scale)


def ours(problem: Problem, seed: int, **options: Any) -> Found:
    begun = time.process_time()
    found = learning_coefficient(
        problem.model,
        nt.Probe(problem.x, problem.y, likelihood="gaussian"),
        n=problem.n,
        localisation=GAMMA,
        chains=CHAINS,
        draws=DRAWS,
        warmup=WARMUP,
        seed=seed,
        **options,
    )
    value, error = found.learning_coefficient, found.learning_coefficient_standard_error
    return Found(float(value), float(error), time.process_time() - begun)


def devinterp(problem: Problem, seed: int, batch_size: int) -> Found:
    """By its SGLD; samples are passed by their number, as it takes tokens."""
    rows = [[i, i] for i in range(len(problem.x))]
    data = Dataset.from_dict({"input_ids": rows}).with_format("torch")

    def loss(model: nn.Module, numbers: Tensor) -> Tensor:
        each = numbers[:, 0]
        return (model(problem.x[each]) - problem.y[each]).square().sum(1, keepdim=True) / 2

    begun = time.process_time()
    found = llc(
        problem.model,
        data,
        {},
        lr=0.04 / (problem.stiffness + GAMMA),
        n_beta=problem.scale,
        localization=GAMMA,
        num_chains=CHAINS,
        num_draws=DRAWS,
        num_burnin_steps=WARMUP,
        batch_size=batch_size,
        init_seed=seed,
        loss_fn=loss,
        device="cpu",
    )
    each = found.llc_per_chain.values
    error = float(each.std(ddof=1) / math.sqrt(len(each)))
    return Found(float(found.llc_mean), error, time.process_time() - begun)


def row(
    model: str, by: str, make: Callable[[int], Problem], find: Callable[..., Found], seeds: int
) -> str:
    ratios, off, seconds = [], [], []
    for seed in range(seeds):
        problem = make(seed)
        found = find(problem, seed)
        ratios.append(found.value / problem.truth)
        off.append((found.value - problem.truth) / found.error)
        seconds.append(found.seconds)
    line = (
        f"| {model} | {by} | {np.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) | "
        f"{np.sqrt(np.mean(np.square(off))):.1f} | {np.median(seconds):.1f} |"
    )
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    start = time.perf_counter()
    rows = []
    for name, make, batch in [("linear, 4 weights", regression, 32), ("rank 3", reduced_rank, 0)]:
        whole = len(make(0).x)
        ways: dict[str, Callable[..., Found]] = {
            "nettrace": ours,
            "nettrace, sgld": lambda p, s: ours(p, s, dynamics="sgld"),
            "devinterp": lambda p, s, n=whole: devinterp(p, s, n),
        }
        if batch:
            ways[f"nettrace, batches of {batch}"] = lambda p, s, n=batch: ours(
                p, s, batch_size=n, spacing=1
            )
            ways[f"devinterp, batches of {batch}"] = lambda p, s, n=batch: devinterp(p, s, n)
        rows += [row(name, by, make, find, seeds) for by, find in ways.items()]
    text = (
        "# Local learning coefficients beside devinterp\n\n"
        f"`python benchmarks/learning_coefficient.py`; Python {platform.python_version()}, torch "
        f"{torch.__version__}, devinterp {version('devinterp')}; seconds of one processor, medians "
        f"of {seeds} seeds.\n\n"
        "Linear regression of 1000 samples with noise, at least squares: the truth is 2, less what "
        "the localisation takes. Reduced-rank regression of 5 inputs, 3 hidden units and 5 outputs "
        "at a minimum of rank 3, on the population's loss for n = 200,000: the truth is 10.5 "
        f"(Aoyagi and Watanabe 2005). Both have n beta = n / ln n, localisation {GAMMA:g}, "
        f"{CHAINS} chains of {WARMUP} steps to begin with and {DRAWS} draws. nettrace chooses its "
        "steps itself; devinterp has e k = 0.04 with the largest curvature k at the minimum. "
        "devinterp's error is the deviation between chains over the square root of their number. "
        "The error over the stated one is the root mean square over seeds, 1 if errors are what "
        "they are said to be.\n\n" + "\n".join([HEAD, *rows]) + "\n"
    )
    RESULTS.write_text(text)
    print(text, f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
