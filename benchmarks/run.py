"""What nettrace costs: its import beside torch's, its quantities beside torch.func's.

Times are CPU times on one thread, medians with quartiles over interleaved repeats; U is one plain
forward and backward pass of the mean loss on the same batch. Run by `make bench`, which writes
`benchmarks/results/cpu.md`.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import nettrace as nt

REPEATS = 7
RESULTS = Path(__file__).parent / "results" / "cpu.md"


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    return model, torch.randn(256, 784), torch.randint(10, (256,))


def lenet() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    return model, torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


def quantities(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def output(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x[None],))[0]

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output(p, x), y)

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def losses() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    def func_norms() -> Tensor:
        gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        return sum(g.flatten(1).square().sum(1) for g in gradients.values())

    few = x[: len(x) // 8]  # all of them would take torch.func minutes

    def func_trace() -> Tensor:
        rows = vmap(jacrev(output), (None, 0), chunk_size=16)(parameters, few)
        return sum(j.square().sum() for j in rows.values())

    def func_gram() -> Tensor:
        rows = vmap(jacrev(output), (None, 0))(parameters, few)
        return sum(torch.einsum("ncp,mdp->ncmd", j.flatten(2), j.flatten(2)) for j in rows.values())

    return {
        "U": plain,
        "per-sample loss-gradient norms": lambda: nt.loss_jacobian(losses(), model).norms(),
        "the same, vmap(grad)": func_norms,
        "loss Gram matrix": lambda: nt.loss_jacobian(losses(), model).gram(),
        "NTK trace": lambda: nt.jacobian(model(x), model).trace(),
        "NTK trace of N/8 samples": lambda: nt.jacobian(model(few), model).trace(),
        "the same, vmap(jacrev)": func_trace,
        "NTK": lambda: nt.jacobian(model(x), model).gram(),
        "NTK of N/8 samples": lambda: nt.jacobian(model(few), model).gram(),
        "the same, vmap(jacrev) and einsum": func_gram,
    }


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each call, interleaved, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:
                times[name].append(time.process_time() - start)
    return times


def import_times() -> dict[str, list[float]]:
    def run(what: str) -> float:
        code = f"import time; a = time.perf_counter(); {what}; print(time.perf_counter() - a)"
        return float(subprocess.check_output([sys.executable, "-c", code]))

    times: dict[str, list[float]] = {"import torch": [], "import torch, nettrace": []}
    for _ in range(REPEATS):
        for what in times:
            times[what].append(run(what))
    return times


def rows(times: dict[str, list[float]], unit: str) -> list[str]:
    base = statistics.median(times[unit])
    lines = [f"| | ratio to {unit} | quartiles | ms |", "|---|---|---|---|"]
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        lines.append(
            f"| {name} | {middle / base:.2f} | {low / base:.2f} to {high / base:.2f} | "
            f"{1e3 * middle:.1f} |"
        )
    return lines


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    lines = ["# Cost on a CPU", "", f"`make bench`; {versions}, {REPEATS} repeats.", ""]
    lines += ["## Import", "", *rows(import_times(), "import torch")]
    for title, build in {
        "MLP 784-512-512-10, N = 256": mlp,
        "LeNet, N = 128": lenet,
    }.items():
        lines += ["", f"## {title}", "", *rows(measure(quantities(*build())), "U")]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
