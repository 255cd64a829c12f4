"""What it costs to measure the gradients of a training step by the tape of its own loss.

    python benchmarks/steps.py [--repeats NUMBER]

U is one plain forward and backward pass of the same batch. What is timed is all that
`GradientStatistics()` does at a step, on one thread, between that step's forward and backward pass;
the spot check, which runs at few steps, is told apart. The table goes to
`benchmarks/results/steps.md`.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from workloads import WORKLOADS, Workload

from nettrace.measures import Measure, resolve
from nettrace.statistics import StepStatistics
from nettrace.training_step import StepTracer

RESULTS = Path(__file__).parent / "results" / "steps.md"
HEAD = "| | U, ms | a step | and spot check |\n|---|---|---|---|"


def measured(work: Workload, tracer: StepTracer, measures: list[Measure]) -> float:
    """CPU seconds for measuring a step, of which forward and backward pass are left out."""
    loss = work.losses().mean()
    samples = len(work.inputs)
    start = time.process_time()
    tracer.measure(
        lambda memory, ranks: StepStatistics(loss, work.model, samples, 0, memory, ranks=ranks),
        *(work.model, 0, measures),
    )
    return time.process_time() - start


def row(work: Workload, repeats: int) -> str:
    measures = resolve("gradients")
    tracer = StepTracer("raise")
    units, plain, checked = [], [], []
    work.step()
    for number in range(repeats + 1):
        start = time.process_time()
        work.step()
        unit = time.process_time() - start
        check = measured(work, StepTracer("raise"), measures)  # the first of a tracer's is checked
        for _ in range(2 if number == 0 else 0):
            measured(work, tracer, measures)
        tracer._spot_checks._records = 2  # the next is the third, which is not
        step = measured(work, tracer, measures)
        if number:
            units.append(unit)
            plain.append(step / unit)
            checked.append(check / unit)
    told = [
        "{1:.2f} ({0:.2f} to {2:.2f})".format(*np.quantile(ratios, [0.25, 0.5, 0.75]))
        for ratios in (plain, checked)
    ]
    unit_ms = 1e3 * float(np.median(units))
    return f"| {work.title} | {unit_ms:.0f} | {told[0]} | {told[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    kept = ("mlp", "lenet", "resnet", "vit", "gpt")
    rows = [row(WORKLOADS[name](), repeats) for name in kept]
    text = (
        "# Cost of measuring a training step\n\n"
        f"`python benchmarks/steps.py`; Python {platform.python_version()}, torch "
        f"{torch.__version__}; CPU time on one thread, medians and quartiles of {repeats} "
        "interleaved repeats.\n\nIn units U of one plain forward and backward pass of the same "
        "batch: all measures of the group `gradients` at one step, without the step itself, and "
        "the same with the spot check, which runs at the records number 1, 2, 4, 8, ...\n\n"
        + "\n".join([HEAD, *rows])
        + "\n"
    )
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
