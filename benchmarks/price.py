"""Compares predicted prices of measures with what they take.

    python benchmarks/price.py [WORKLOAD ...]

Times are CPU seconds of one thread, memory is the peak above what the process held before, each
beside the look at the network; medians of 3. Each workload runs in a process of its own, and each
measurement of memory.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import torch
from memory import peak_memory
from workloads import CLASSES, WORKLOADS, Workload, select

import nettrace as nt
from nettrace import pieces
from nettrace.freeze import frozen
from nettrace.measures import resolve
from nettrace.price import price
from nettrace.statistics import Statistics

MEASURES = (
    "ntk/trace fisher/trace fisher/trace_mc fisher/trace_empirical collective/gradient_sqnorm "
    "collective/chi_net ntk/gram ntk/entropy"
).split()
#: Bytes below which what an allocator keeps matters more than what is asked of it.
LITTLE = 30e6


def probe(w: Workload) -> nt.Probe:
    """The workload's samples and the ten outputs that it differentiates."""
    targets = w.targets if w.targets.dim() == 1 else w.targets[:, -1] % CLASSES
    return nt.Probe(w.inputs, targets, forward=lambda model, x: select(model(x)))


def taken(w: Workload, name: str) -> float:
    """CPU seconds of one measure, beside the look."""
    (measure,) = resolve(name)
    seconds = []
    for _ in range(3):
        statistics = Statistics(w.model, probe(w), measure.needs)
        start = time.process_time()
        measure(statistics)
        seconds.append(time.process_time() - start)
    return median(seconds)


def memory(workload: str, name: str) -> int:
    """Peak bytes of one measure, beside the look, in a process of its own."""
    command = [sys.executable, __file__, workload, "--memory", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(workload: str) -> None:
    w = WORKLOADS[workload]()
    print(f"\n{w.title}", flush=True)
    with frozen(w.model):
        start = time.process_time()
        prices = pieces.Pieces(Statistics(w.model, probe(w)))
        found = {name: price(prices, resolve(name)[0].needs) for name in MEASURES}
        took = time.process_time() - start
        print(f"  predicted within {took:.2f} s; a plain pass forward and back takes ", end="")
        start = time.process_time()
        w.step()
        print(f"{time.process_time() - start:.2f} s")
        for name, predicted in found.items():
            seconds, size = taken(w, name), memory(workload, name)
            print(
                f"  {name:26}  {predicted.seconds:7.3f} s of {seconds:7.3f} s: "
                f"{predicted.seconds / seconds:4.2f}   {predicted.bytes / 1e6:7.1f} MB of "
                f"{size / 1e6:7.1f} MB"
                + (f": {predicted.bytes / size:4.2f}" if size > LITTLE else ""),
                flush=True,
            )


def main() -> None:
    torch.set_num_threads(1)
    pieces.clock = time.process_time
    if "--memory" in sys.argv:
        workload, _, name = sys.argv[1:]
        w = WORKLOADS[workload]()
        (measure,) = resolve(name)
        losses = w.losses()
        torch.autograd.grad(losses, list(w.model.parameters()), torch.ones_like(losses))
        small = nt.Probe(torch.randn(2, 3), torch.tensor([0, 1]))
        measure(Statistics(torch.nn.Linear(3, 2), small, measure.needs))  # imports what it needs
        with frozen(w.model):
            statistics = Statistics(w.model, probe(w), measure.needs)
            print(peak_memory(lambda: measure(statistics))[1])
        return
    for workload in sys.argv[1:] or ["mlp", "resnet", "vit", "gpt"]:
        compare(workload)


if __name__ == "__main__":
    main()
