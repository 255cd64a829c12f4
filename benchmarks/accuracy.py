"""What float32 costs in accuracy on full-size networks; `make bench` runs it.

The reference is plain autograd in float64, one sample and one output at a time. Beside nettrace
stands the same with the network in float32, summed in float64: what differs there is the rounding
of the network itself.
Writes `benchmarks/results/accuracy.md`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from measure import compare
from methods import METHODS, oracle
from workloads import Workload, gpt, resnet, vit

RESULTS = Path(__file__).parent / "results" / "accuracy.md"
SAMPLES = 4
VALUES = ["norms", "loss_gram", "ntk_trace", "ntk"]


def nettrace(w: Workload) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for methods in METHODS.values():
        values |= methods["nettrace"](w)()
    return values


def double(w: Workload) -> Workload:
    x = w.inputs.double() if w.inputs.is_floating_point() else w.inputs
    return replace(w, model=copy.deepcopy(w.model).double(), inputs=x)


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "# Accuracy on full-size networks",
        "",
        "Largest error, over the largest entry, against plain autograd in float64, one sample and "
        "one output at a time.",
        "",
        "| | | " + " | ".join(VALUES) + " |",
        "|---" * (2 + len(VALUES)) + "|",
    ]
    for w in (resnet(SAMPLES, width=64), vit(SAMPLES), gpt(SAMPLES)):
        true = {name: v.detach().numpy() for name, v in oracle(w).items()}
        for what, values in {
            "nettrace, float32": nettrace(w),
            "plain autograd, float32": oracle(w, torch.float32),
            "nettrace, float64": nettrace(double(w)),
        }.items():
            errors = compare({name: values[name].detach() for name in VALUES}, true)
            cells = " | ".join(f"{errors[name]:.1e}" for name in VALUES)
            lines.append(f"| {w.title} | {what} | {cells} |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
