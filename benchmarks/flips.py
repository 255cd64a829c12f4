"""Single changes of weights per second: many walkers in tensors, plain NumPy, and Numba.

    python benchmarks/flips.py [--seconds NUMBER]

A perceptron whose N weights are signs, with N random patterns. NumPy and Numba move one network, as
programs of physicists do, by flat-histogram moves with fixed weights 1 / g, at P additions a move;
`nettrace.landscape.density_of_states` does all that it does in production; the same is
timed without its compiled loop, by operations on tensors. Each is timed in turn, again and again,
in one process on one core; the median is taken. The table goes to
`benchmarks/results/flips.md`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numba
import numpy as np
import torch

from nettrace.landscape import patterns, perceptron
from nettrace.landscape.density import DensityOfStates
from nettrace.landscape.walkers import Walkers

RESULTS = Path(__file__).parent / "results" / "flips.md"
SIZES = (15, 51, 201)
WALKERS = (64, 256, 1024)


def numpy_flips(x: np.ndarray, y: np.ndarray, log_g: np.ndarray, flips: int, seed: int) -> int:
    random = np.random.default_rng(seed)
    weights = random.choice([-1, 1], x.shape[1])
    fields = x @ weights
    energy = int(((fields >= 0) != (y > 0)).sum())
    columns, labels = np.ascontiguousarray(x.T), y > 0
    places, limits = random.integers(len(weights), size=flips), random.random(flips)
    for place, limit in zip(places, limits, strict=True):
        moved = fields - 2 * weights[place] * columns[place]
        then = int(np.count_nonzero((moved >= 0) != labels))
        if limit < np.exp(min(0.0, log_g[energy] - log_g[then])):
            fields, energy = moved, then
            weights[place] *= -1
    return energy


@numba.njit(cache=False)
def numba_flips(x: np.ndarray, y: np.ndarray, log_g: np.ndarray, flips: int, seed: int) -> int:
    np.random.seed(seed)
    patterns, size = x.shape
    weights = np.where(np.random.random(size) < 0.5, -1, 1)
    columns = np.ascontiguousarray(x.T)
    fields = np.zeros(patterns, dtype=np.int64)
    for place in range(size):
        fields += weights[place] * columns[place]
    labels = y > 0
    energy = 0
    for p in range(patterns):
        energy += (fields[p] >= 0) != labels[p]
    for _ in range(flips):
        place = np.random.randint(size)
        change = 2 * weights[place]
        then = 0
        for p in range(patterns):
            then += (fields[p] - change * columns[place, p] >= 0) != labels[p]
        if np.random.random() < np.exp(min(0.0, log_g[energy] - log_g[then])):
            for p in range(patterns):
                fields[p] -= change * columns[place, p]
            weights[place] *= -1
            energy = then
    return energy


def ways(size: int) -> dict[str, Callable[[], int]]:
    """What makes moves, and returns how many."""
    x, y = patterns(size, size, seed=0)
    # Weights of random patterns on average, so that all are in the same places.
    log_g = np.array([-((e - size / 2) ** 2) * 2 / size for e in range(size + 1)])
    whole, labels = x.numpy().astype(np.int64), y.numpy().astype(np.int64)

    def single(function: Callable[..., int], flips: int) -> Callable[[], int]:
        def move() -> int:
            function(whole, labels, log_g, flips, 0)
            return flips

        return move

    def many(walkers: int, compiled: bool = True) -> Callable[[], int]:
        sampler = DensityOfStates(perceptron(size), x, y, walkers=walkers, error=1e-6)
        for _ in range(20):
            sampler.advance()
        sampler.settle()
        if not compiled:
            sampler.walkers.walk = partial(Walkers.walk, sampler.walkers)

        def move() -> int:
            before = sampler.visits
            sampler.advance()
            return sampler.visits - before

        return move

    found = {f"nettrace, {walkers} walkers": many(walkers) for walkers in WALKERS}
    found[f"nettrace, {WALKERS[-1]} walkers, in tensors"] = many(WALKERS[-1], compiled=False)
    return {**found, "NumPy": single(numpy_flips, 3000), "Numba": single(numba_flips, 300_000)}


def rates(size: int, seconds: float) -> dict[str, float]:
    """Changes a second."""
    moves = ways(size)
    for move in moves.values():
        move()  # compiles
    times: dict[str, list[float]] = {name: [] for name in moves}
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for name, move in moves.items():
            start = time.perf_counter()
            made = move()
            times[name].append(made / (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main(seconds: float = 20.0) -> None:
    torch.set_num_threads(1)
    table = {size: rates(size, seconds) for size in SIZES}
    names = list(table[SIZES[0]])
    rows = [
        f"| {name} | " + " | ".join(f"{table[size][name] / 1e6:.3g}" for size in SIZES) + " |"
        for name in names
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "numba"))
    RESULTS.write_text(
        "# Single changes of weights, millions a second\n\n"
        f"`python benchmarks/flips.py --seconds {seconds:g}`, one core, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"{packages}.\n\n"
        "A perceptron of N signs with N random patterns. NumPy and Numba: one network, weights of "
        "the flat histogram held. nettrace: all of `density_of_states`, in "
        "production.\n\n"
        f"| | {' | '.join(f'N = P = {size}' for size in SIZES)} |\n"
        f"|---|{'---|' * len(SIZES)}\n" + "\n".join(rows) + "\n"
    )
    print(RESULTS.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size")
    main(parser.parse_args().seconds)
