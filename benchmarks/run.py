"""What nettrace costs beside its peers: `make bench`.

    python benchmarks/run.py [--only WORKLOAD or PACKAGE ...] [--jax PYTHON]

Measures every quantity on every workload by every method, each in a process of its own
(`measure.py`), and writes tables, a plot and the figures to `benchmarks/results/`. With `--only`,
the workloads and packages named are measured anew and the other figures are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from measure import CAP, LONG, REPEATS, ROOM, WRONG
from methods import METHODS, QUANTITIES
from workloads import WORKLOADS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIGURES = RESULTS / "cpu.json"
PACKAGES = {  # as methods begin: the distribution, a colour (Okabe and Ito) and a marker
    "nettrace": ("torch", "#000000", "D"),
    "torch.func": ("torch", "#E69F00", "o"),
    "Opacus": ("opacus", "#56B4E9", "s"),
    "BackPACK": ("backpack-for-pytorch", "#009E73", "^"),
    "nngeometry": ("nngeometry", "#CC79A7", "v"),
    "curvlinops": ("curvlinops-for-pytorch", "#0072B2", "<"),
    "PyHessian": ("pyhessian", "#D55E00", ">"),
    "neural-tangents": ("", "#999999", "P"),
}
TANGENTS = {"traces": ["neural-tangents"], "ntk": ["neural-tangents"]}
#: What is measured on workloads that have less to show: here that the trace of the Hessian of a
#: piecewise-linear network is that of its Fisher information.
FEWER = {"resnet-bn": ["traces"]}
#: Ratios to U that nettrace is to keep.
GOALS = {
    "norms": {"mlp": 0.7, "lenet": 2, "resnet": 1.4, "vit": 1.1, "gpt": 1.1},
    "loss_gram": {"mlp": 1.2, "lenet": 2, "resnet": 2, "vit": 1.15, "gpt": 1.15},
    "traces": {"mlp": 2.4, "lenet": 9, "resnet": 9, "resnet-bn": 9, "vit": 6, "gpt": 6},
    "ntk": {"mlp": 15, "resnet": 17, "vit": 20, "gpt": 12.5},
}
GOALS["mc_fisher"] = GOALS["norms"]
#: Peak memory over that of a training step that nettrace is to keep.
MEMORY_GOALS = {"norms": 2, "traces": 3.5}
LABELS = {
    "mlp": "MLP",
    "lenet": "LeNet",
    "resnet": "ResNet-18",
    "resnet-bn": "ResNet-18, BN",
    "vit": "ViT",
    "gpt": "GPT",
}

Figures = dict[str, Any]


def methods(quantity: str) -> list[str]:
    return [*METHODS[quantity], *TANGENTS.get(quantity, [])]


# Measuring ----------------------------------------------------------------------------------------


def child(python: str, *arguments: str, folder: str) -> subprocess.CompletedProcess[str]:
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # glibc keeps freed memory, as in a training that has run for a while; else each call pays
        # anew for touching what it allocates, the more the smaller the network.
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "MALLOC_MMAP_THRESHOLD_": str(2**25),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    }
    return subprocess.run(
        [python, str(HERE / "measure.py"), folder, *arguments],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
    )


def measure(workload: str, packages: list[str], jax: str, known: Figures) -> Figures:
    """The figures of one workload, by quantity and method; those not asked for stay as known."""
    with tempfile.TemporaryDirectory() as folder:
        made = child(sys.executable, workload, folder=folder)
        if made.returncode:
            raise RuntimeError(f"the oracle of {workload} failed:\n{made.stderr}")
        title = str(np.load(Path(folder) / f"{workload}.npz")["title"])
        found: Figures = {q: dict(known.get("quantities", {}).get(q, {})) for q in QUANTITIES}
        for quantity in FEWER.get(workload, QUANTITIES):
            for method in methods(quantity):
                if not method.startswith(tuple(packages)):
                    continue
                python = jax if method.startswith("neural-tangents") else sys.executable
                file = Path(folder) / "measured.json"
                file.unlink(missing_ok=True)
                run = child(python, workload, quantity, method, folder=folder)
                report = json.loads(file.read_text()) if file.exists() else {}
                if run.returncode == -signal.SIGPROF:
                    report["status"] = "capped"
                elif run.returncode:
                    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                    report.update(status="fails", error=f"exit {run.returncode}: {last}"[:300])
                found[quantity][method] = report
                print(f"{workload:10} {quantity:10} {method:32} {cell(report, None)}", flush=True)
    for reports in found.values():  # jax has no U of its own
        units = [u for r in reports.values() for u in r.get("units", [])]
        for name, report in reports.items():
            if name.startswith("neural-tangents") and units:
                report["units"] = [statistics.median(units)] * len(report.get("times", []))
    return {"title": title, "quantities": found}


def import_times() -> Figures:
    """Wall seconds that importing torch takes, and torch with nettrace."""

    def run(what: str) -> float:
        code = f"import time; a = time.perf_counter(); {what}; print(time.perf_counter() - a)"
        return float(subprocess.check_output([sys.executable, "-c", code]))

    whats = ["import torch", "import torch, nettrace"]
    times = [[run(what) for what in whats] for _ in range(REPEATS)]
    return dict(zip(whats, map(list, zip(*times, strict=True)), strict=True))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def versions(jax: str) -> dict[str, str]:
    found = {name: version(name) for name, _, _ in PACKAGES.values() if name}
    code = "from importlib.metadata import version as v; print(v('neural-tangents'), v('jax'))"
    asked = subprocess.run([jax, "-c", code], capture_output=True, text=True)
    if asked.returncode == 0:
        found["neural-tangents"], found["jax"] = asked.stdout.split()
    return {"Python": platform.python_version(), **found}


# Writing ------------------------------------------------------------------------------------------


def ratios(report: Figures) -> list[float]:
    """Each repeat's time over that of the plain step before it."""
    times, units = report.get("times", []), report.get("units", [])
    return [t / u for t, u in zip(times, units, strict=True)] if units else []


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def median(report: Figures) -> float | None:
    """The ratio to U of a method that is right; None of any other."""
    values = ratios(report)
    return quartiles(values)[1] if values and report["status"] == "right" else None


def short(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def cell(report: Figures | None, notes: list[str] | None) -> str:
    """A method's ratio to U with quartiles, or why there is none."""
    if report is None or report["status"] == "other":
        return "-"
    if report["status"] == "capped":
        unit = report.get("unit")
        return f"> {CAP / unit:.0f}" if unit else f"> {CAP} s"
    if report["status"] == "fails":
        if notes is None:
            return report["error"]
        if report["error"] not in notes:
            notes.append(report["error"])
        return f"fails [{notes.index(report['error']) + 1}]"
    values = ratios(report)
    if not values:
        return f"{report['times'][0]:.3g} s"
    low, middle, high = quartiles(values)
    text = f"{short(middle)} ({short(low)} to {short(high)})" if len(values) > 1 else short(middle)
    if len(values) < REPEATS:
        text += f", {len(values)}x"
    if report["status"] == "wrong":
        return f"{text}, **off by {max(report['errors'].values()):.0e}**"
    if report["estimate"]:
        return f"{text}, off by {100 * report['errors']['estimate']:.1g} %"
    return text


def table(names: list[str], header: str, rows: list[tuple[str, list[str]]]) -> list[str]:
    lines = [f"| {header} | " + " | ".join(LABELS[n] for n in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    return [*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)]


def lead(reports: Figures) -> str:
    """How many times as long as nettrace the fastest peer takes."""
    found = {m: median(r) for m, r in reports.items() if not r.get("estimate") or "MC" in m}
    ratio = {name: r for name, r in found.items() if r is not None}
    peers = [r for name, r in ratio.items() if name != "nettrace"]
    if "nettrace" not in ratio or not peers:
        return "-"
    return f"{short(min(peers) / ratio['nettrace'])}x"


def times_section(found: Figures, names: list[str], quantity: str, notes: list[str]) -> list[str]:
    by_name = {n: found[n]["quantities"][quantity] for n in names}
    rows: dict[str, list[str]] = {}
    for method in methods(quantity):
        rows[method] = [cell(by_name[n].get(method), notes) for n in names]
    rows["*goal*"] = [f"{GOALS[quantity].get(n, '-')}" for n in names]
    rows["*fastest exact peer / nettrace*"] = [lead(by_name[n]) for n in names]
    return ["", f"## {QUANTITIES[quantity]}", "", *table(names, "ratio to U", [*rows.items()])]


def memory_section(found: Figures, names: list[str]) -> list[str]:
    def step(n: str) -> float:
        reports = [r for q in found[n]["quantities"].values() for r in q.values()]
        return float(np.median([r["unit_memory"] for r in reports if "unit_memory" in r]))

    def extra(n: str, report: Figures) -> str:
        if "memory" not in report or report["status"] == "other":
            return "-"
        return f"{report['memory'] / 1e6:.0f} ({report['memory'] / step(n):.1f})"

    rows = [("a training step", [f"{step(n) / 1e6:.0f}" for n in names])]
    for quantity, title in QUANTITIES.items():
        goal = f", goal {MEMORY_GOALS[quantity]}" if quantity in MEMORY_GOALS else ""
        rows.append((f"**{title}**{goal}", [""] * len(names)))
        for method in methods(quantity):
            reports = [found[n]["quantities"][quantity].get(method, {}) for n in names]
            cells = [extra(n, report) for n, report in zip(names, reports, strict=True)]
            rows.append((method, cells))
    head = "MB above libraries and model, and over a training step's"
    return ["", "## Peak memory", "", *table(names, head, rows)]


def errors_section(found: Figures, names: list[str]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for quantity in QUANTITIES:
        for n in names:
            for method, report in found[n]["quantities"][quantity].items():
                for value, error in report.get("errors", {}).items():
                    cells = rows.setdefault(f"{value}, {method}", ["-"] * len(names))
                    cells[names.index(n)] = f"{error:.0e}"
    return ["", "## Largest error, over the largest entry", "", *table(names, "", [*rows.items()])]


def write(figures: Figures) -> None:
    """The tables, in Markdown."""
    found = figures["workloads"]
    names = [n for n in WORKLOADS if n in found]
    notes: list[str] = []
    packages = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    lines = [
        "# Cost on a CPU",
        "",
        f"`make bench`; {packages}; {figures['machine']}.",
        "",
        "U is one plain forward and backward pass of the mean loss on the same batch. Times are "
        "CPU times on one thread: the median of the ratio to U, with quartiles, of "
        f"{REPEATS} repeats, each right after U in the same process; calls above {LONG} s are not "
        f"repeated, and at {CAP} s of CPU time or {ROOM / 2**30:.0f} GiB a process is stopped. "
        "Ratios of neural-tangents, without compilation, are to the U of torch. What is off by "
        f"more than {WRONG:.0e} from float64 is not counted as exact (in float32 a ReLU of a deep "
        "network may flip: plain autograd is then off by 1e-03); estimates carry their error. "
        "A dash means that the method computes something else there, or was not measured.",
        "",
        *(f"- {LABELS[n]}: {found[n]['title']}." for n in names),
    ]
    for quantity in QUANTITIES:
        lines += times_section(found, names, quantity, notes)
    lines += ["", *(f"[{i}] `{note}`  " for i, note in enumerate(notes, 1))]
    lines += memory_section(found, names) + errors_section(found, names)
    base = statistics.median(figures["import"]["import torch"])
    lines += ["", "## Import", "", "| | ms | over torch's |", "|---|---|---|"]
    for what, times in figures["import"].items():
        low, middle, high = quartiles(times)
        lines.append(
            f"| {what} | {1e3 * middle:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f}) | "
            f"{middle / base:.2f} |"
        )
    (RESULTS / "cpu.md").write_text("\n".join(lines) + "\n")


def plot(figures: Figures) -> None:
    """Ratios to U on a log axis, a panel for each quantity."""
    matplotlib.rcParams["svg.hashsalt"] = "nettrace"
    found = figures["workloads"]
    names = [n for n in WORKLOADS if n in found]
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), sharey=True, layout="constrained")
    *panels, legend = axes.flat
    top = 2e4  # failures are drawn above
    for panel, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        for i, n in enumerate(names):
            if goal := GOALS[quantity].get(n):
                panel.plot([i - 0.42, i + 0.42], [goal, goal], color="#bbbbbb", lw=3, zorder=1)
            reports = found[n]["quantities"][quantity]
            best: dict[str, float | None] = {}
            for method, report in reports.items():
                package = next(p for p in PACKAGES if method.startswith(p))
                if report["status"] == "other":
                    continue
                ratio = median(report)
                known = best.get(package)
                best[package] = min((r for r in (ratio, known) if r is not None), default=None)
            order = [p for p in PACKAGES if p in best]
            for j, package in enumerate(order):
                _, colour, marker = PACKAGES[package]
                x = i + 0.7 * ((j + 0.5) / len(order) - 0.5)
                ratio = best[package]
                failed = ratio is None
                panel.plot(
                    x,
                    top * 3 if failed else ratio,
                    marker="x" if failed else marker,
                    color=colour,
                    ms=5 if failed else 7,
                    mew=1.8 if failed else 0.5,
                    mec=colour if failed else "white",
                    zorder=3,
                )
        panel.axhspan(top, top * 9, color="#f2f2f2", zorder=0)
        panel.set(title=title, yscale="log", ylim=(0.4, top * 9), xlim=(-0.6, len(names) - 0.4))
        panel.set_xticks(range(len(names)), [LABELS[n] for n in names], rotation=25, ha="right")
        panel.axhline(1, color="#888888", lw=0.8, ls=":", zorder=1)
        panel.grid(axis="y", which="major", color="#e6e6e6", lw=0.6)
        panel.tick_params(axis="x", length=0)
        panel.spines[["top", "right"]].set_visible(False)
    for row in axes[:, 0]:
        row.set_ylabel("CPU time / U")
        row.set_yticks([1, 10, 100, 1e3, 1e4], ["1", "10", "100", "1 000", "10 000"])
    panels[0].text(-0.5, top * 5.2, "wrong, fails or above the cap", va="center", fontsize=8)
    legend.axis("off")
    handles = [
        plt.Line2D([], [], color=c, marker=m, ls="", ms=8, mec="white", label=name)
        for name, (_, c, m) in PACKAGES.items()
    ]
    handles.append(plt.Line2D([], [], color="#bbbbbb", lw=3, label="nettrace's goal"))
    legend.legend(handles=handles, loc="center", frameon=False, ncols=1)
    legend.text(
        0.5, 0.02, "U: one plain forward and backward pass", ha="center", transform=legend.transAxes
    )
    figure.savefig(RESULTS / "cpu.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="what to measure")
    parser.add_argument("--jax", default=".venv/jax/bin/python", help="the Python with jax")
    options = parser.parse_args()
    unknown = [n for n in options.only if n not in WORKLOADS and n not in PACKAGES]
    if unknown:
        parser.error(f"expected some of {', '.join([*WORKLOADS, *PACKAGES])}, got {unknown[0]!r}")
    if not Path(options.jax).exists():
        parser.error(f"there is no {options.jax}: `make bench` installs it, or pass --jax")
    workloads = [n for n in options.only if n in WORKLOADS] or list(WORKLOADS)
    packages = [n for n in options.only if n in PACKAGES] or list(PACKAGES)
    figures: Figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"workloads": {}}
    figures["versions"] = versions(options.jax)
    figures["machine"] = processor()
    figures["import"] = import_times()
    for name in workloads:
        known = figures["workloads"].get(name, {})
        figures["workloads"][name] = measure(name, packages, options.jax, known)
        RESULTS.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        write(figures)
        plot(figures)


if __name__ == "__main__":
    main()
