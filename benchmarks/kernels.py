"""What kernels take on a GPU, against torch and against what the GPU does at most.

    python benchmarks/kernels.py [--quick] [--tune]

All are timed by the GPU's own clock, on inputs that no cache holds, in medians and deciles, beside
the same in operations of torch, eager and compiled, and beside a plain forward and backward pass of
the layer. Ceilings are measured in the same run. Results go to `benchmarks/results/kernels.json`
and `kernels.md`. Without a GPU, every operation is checked on a small shape, and every line of
`kernels.md` is marked "unmeasured".

`--quick` takes the first shape of each operation alone, and keeps no results. `--tune` looks for
faster configurations for the GPU at hand before, and writes those to `kernels/configurations.py`;
then `tests/kernels/test_compilation.py` tells whether they spill, and `ruff format` lays them out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.kernels

import kernel_steps
import kernel_timing
import kernel_tuning
from kernel_cases import OPS, Op, Shape

import nettrace.kernels as kernels
from nettrace.kernels.launch import architecture

RESULTS = Path(__file__).parent / "results"
UNMEASURED = "unmeasured"
#: Relative Frobenius error of a small shape's results in float64, against the truth.
TOLERANCE = 1e-10
HEAD = (
    "| operation | layer | type | us (deciles) | peak, MB | of the ceiling | torch / ours | "
    "compiled / ours | of a plain step |\n|---|---|---|---|---|---|---|---|---|"
)


def results(found: object) -> tuple[Tensor, ...]:
    """What an operation returns, as a tuple."""
    return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[call-overload]


def checked(op: Op) -> str:
    """Whether an operation's path by torch gives what one einsum gives, in float64 on the CPU."""
    call = getattr(kernels, op.name)
    arguments = op.make(op.small, torch.float64, "cpu", 0)
    truth = op.truth(*arguments)
    if (error := off(results(call(*arguments)), truth)) > TOLERANCE:
        raise AssertionError(f"{op.name} is off by {error:.1e}")
    for name, form in op.forms.items():
        error = off(results(form(*op.make(op.small, torch.float64, "cpu", 0)))[:1], truth[:1])
        # Some forms add up in float32; that of welford has its columns in another order.
        if op.name != "weight_welford_" and error > 1e-6:
            raise AssertionError(f"{name}, beside {op.name}, is off by {error:.1e}")
    return "right"


def off(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest relative Frobenius error."""
    errors = [0.0]
    for x, y in zip(found, truth, strict=False):
        assert x.numel() == y.numel(), (x.shape, y.shape)
        if y.numel():
            errors.append(float((x.double().flatten() - y.flatten()).norm() / y.norm()))
    return max(errors)


def checked_steps() -> str:
    """Whether norms and gradients of whole steps are autograd's."""
    if (error := kernel_steps.check()) > TOLERANCE:
        raise AssertionError(f"norms or gradients of a whole step are off by {error:.1e}")
    return "right"


def measured(op: Op, title: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and bytes of an operation and of the same by torch."""
    call = getattr(kernels, op.name)
    sets = kernel_timing.rotated(lambda seed: op.make(shape, dtype, kernel_timing.DEVICE, seed))
    row: dict[str, Any] = {"ours": kernel_timing.timed(call, sets)._asdict()}
    row["peak"] = kernel_timing.peak(call, sets[0])
    row["bytes"] = kernel_timing.size(sets[0]) + kernel_timing.size(results(call(*sets[0])))
    if op.name == "weight_welford_":  # which are read and written
        row["bytes"] += kernel_timing.size(sets[0][1:])
    row["operations"] = op.operations(shape)
    row["torch"] = {name: attempted(form, sets) for name, form in op.forms.items()}
    row["compiled"] = {}
    if dtype == op.types[0] and (timed := {k: v for k, v in row["torch"].items() if v}):
        best = min(timed, key=lambda name: timed[name]["median"])
        torch.compiler.reset()
        form = torch.compile(op.forms[best], dynamic=False)
        row["compiled"] = {best: attempted(form, sets)}
    row["plain"] = attempted(op.plain, sets) if op.plain else None
    return row


def attempted(call: Callable[..., object], sets: list[tuple[Any, ...]]) -> dict[str, float] | None:
    """Times of a call, None if it takes more memory than there is or cannot be compiled."""
    try:
        return kernel_timing.timed(call, sets)._asdict()
    except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        torch.cuda.empty_cache()
        return None


def tune() -> None:
    """Looks for faster configurations of all operations on the GPU at hand, and writes them."""
    name = architecture(torch.device("cuda", torch.cuda.current_device()))
    tables = {}
    for op in OPS:
        for table_name, asked in op.tables.items():
            table = tables[table_name] = getattr(kernel_tuning.configurations, table_name)
            for size, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
                before, found = table[name][size], best(op, asked, table, name, size, dtype)
                table[name] = {**table[name], size: found}
                print(op.name, table_name, size, before, "->", found, flush=True)
    path = kernel_tuning.PATH
    path.write_text(kernel_tuning.written(tables, path.read_text()))


def best(
    op: Op, asked: dict[str, Any], table: Any, name: str, size: str, dtype: torch.dtype
) -> Any:
    """The configuration that is fastest over an operation's first shapes, asked so."""
    call, device = partial(getattr(kernels, op.name), **asked), kernel_timing.DEVICE
    cases = [
        kernel_timing.rotated(lambda seed, s=shape: op.make(s, dtype, device, seed))[:4]
        for shape in list(op.shapes.values())[:3]
    ]
    truth = op.truth(*kernel_timing.doubled(op.make(op.small, dtype, device, 0)))

    def cost(config: Any) -> float:
        def run() -> float:
            if not off(results(call(*op.make(op.small, dtype, device, 0))), truth) < 1e-4:
                return math.inf
            taken = [kernel_timing.timed(call, sets, 0.02).median for sets in cases]
            return math.prod(taken)

        try:
            return kernel_tuning.tried(table, name, size, config, run)
        except Exception as error:  # of what does not compile or takes too much shared memory
            print(config, type(error).__name__, file=sys.stderr)
            return math.inf

    return kernel_tuning.tuned(table[name][size], cost)


def line(op: Op, title: str, dtype: str, row: dict[str, Any], ceilings: dict[str, float]) -> str:
    """A line of the table."""
    if "ours" not in row:
        return f"| `{op.name}` | {title} | {dtype} | {UNMEASURED} | | | | | |"
    ours = row["ours"]["median"]
    deciles = (f"{1e6 * row['ours'][key]:.1f}" for key in ("low", "high"))
    most = ceilings["bf16"] if dtype == "bfloat16" else ceilings["tf32"] / 3
    share = row["operations"] / ours / most
    if not row["operations"]:
        share = row["bytes"] / ours / ceilings["copy"]
    told = [ratio(row[key].values(), ours) for key in ("torch", "compiled")]
    plain = row["plain"]
    cells = [
        f"{1e6 * ours:.1f} ({' to '.join(deciles)})",
        f"{1e-6 * row['peak']:.0f}",
        f"{100 * share:.0f} % of {'copies' if not row['operations'] else 'products'}",
        *told,
        f"{ours / plain['median']:.2f}" if plain else "",
    ]
    return f"| `{op.name}` | {title} | {dtype} | {' | '.join(cells)} |"


def ratio(forms: Any, ours: float) -> str:
    """How many times as long the fastest of some forms takes."""
    found = [form["median"] for form in forms if form]
    return f"{min(found) / ours:.2f}" if found else ""


def report(found: dict[str, Any]) -> str:
    """All results as Markdown."""
    machine, ceilings = found["machine"], found["ceilings"]
    lines = ["# Kernels", f"`{found['command']}`; " + ", ".join(map(" ".join, machine.items()))]
    if ceilings:
        lines.append(
            f"Ceilings of the same run: {1e-12 * ceilings['copy']:.2f} TB/s of a copy, "
            f"{1e-12 * ceilings['bf16']:.0f} TFLOP/s in bfloat16, {1e-12 * ceilings['tf32']:.0f} "
            "in tf32, of which float32 takes three."
        )
    else:
        lines.append(
            "There was no GPU: nothing was timed, and every line is marked unmeasured. Operations "
            "ran on small shapes by torch, and were held against one einsum in float64."
        )
    lines.append(
        "| operation | small shape by torch | to be shown |\n|---|---|---|\n"
        + "\n".join(
            f"| `{op.name}` | {found['checked'][op.name]} | "
            f"{op.goals}{'' if ceilings or op.goals == 'none' else f': {UNMEASURED}'} |"
            for op in OPS
        )
    )
    ops = {op.name: op for op in OPS}
    rows = [line(ops[r["op"]], r["layer"], r["type"], r, ceilings) for r in found["rows"]]
    lines.append("\n".join([HEAD, *rows]))
    lines.append(
        "Whole steps in bfloat16, whose weight gradients come from the kernels that make squared "
        "norms, to cost under 10 % over the plain step. The callbacks never do this, since weights "
        "would differ in rounding; what `GradientStatistics` takes at a step is beside it. Small "
        f"steps against autograd: {found['checked']['steps']}."
    )
    told = [f"| {name} | {' | '.join(steps(row))} |" for name, row in found["steps"].items()]
    head = "| | plain, ms | with norms / plain | callback / plain |\n|---|---|---|---|"
    lines.append("\n".join([head, *told]))
    return "\n\n".join(lines) + "\n"


def steps(row: dict[str, float] | None) -> list[str]:
    """The cells of a whole step."""
    if not row:
        return [UNMEASURED] * 3
    others = [f"{row[key] / row['plain']:.3f}" for key in ("with norms", "callback")]
    return [f"{1e3 * row['plain']:.2f}", *others]


def main(arguments: list[str] | None = None, folder: Path | None = None) -> None:
    """Runs what is said above, and writes the results to a folder, by default where they belong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first shape of each alone, and only print the results",
    )
    parser.add_argument("--tune", action="store_true", help="look for faster configurations first")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    has_gpu = torch.cuda.is_available()
    if options.tune and not has_gpu:
        parser.error("--tune takes a GPU, and there is none")
    checks = {op.name: checked(op) for op in OPS}
    checks["steps"] = checked_steps()
    if options.tune:
        tune()
    given = sys.argv[1:] if arguments is None else arguments
    found: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/kernels.py", *given]),
        "machine": kernel_timing.machine(),
        "ceilings": kernel_timing.ceilings() if has_gpu else {},
        "checked": checks,
        "rows": [],
        "steps": dict.fromkeys(kernel_steps.MODELS),
    }
    for op in OPS:
        for title, shape in list(op.shapes.items())[: 1 if options.quick else None]:
            for dtype in op.types[: 1 if options.quick else None]:
                row: dict[str, Any] = {"op": op.name, "layer": title, "shape": shape}
                row |= {"type": str(dtype).removeprefix("torch."), "checked": checks[op.name]}
                if has_gpu and checks[op.name] == "right":
                    row |= measured(op, title, shape, dtype)
                    print(op.name, title, row["type"], row["ours"], flush=True)
                    torch.cuda.empty_cache()
                found["rows"].append(row)
    if has_gpu and checks["steps"] == "right":
        for name in kernel_steps.MODELS:
            found["steps"][name] = kernel_steps.overhead(name)
    if options.quick and folder is None:
        print(report(found))
        return
    folder = folder or RESULTS
    if has_gpu:
        (folder / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "kernels.md").write_text(report(found))
    print(folder / "kernels.md")


if __name__ == "__main__":
    main()
