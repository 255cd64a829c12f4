"""What a second process, a Dask cluster, a killed worker and a rerun do to an offline analysis.

    python benchmarks/analysis.py [--checkpoints NUMBER] [--samples NUMBER]

A ResNet-18 of width 16 is trained for a few steps and saved at each; the checkpoints are analysed
in one process and in two, each with one thread, and on a local Dask cluster of two workers. All
values have to be the same to the bit. The table goes to `benchmarks/results/analysis.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import tempfile
import threading
import time
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from workloads import resnet

import nettrace as nt
from nettrace.store import parts

RESULTS = Path(__file__).parent / "results" / "analysis.md"
MEASURES = ["ntk", "fisher", "collective", "loss"]
NETWORK = f"{__file__}:network"
#: The least that two jobs are to gain over one on two idle cores.
GOAL = 1.6
#: Below this many seconds a task says little.
LEAST = 2.0


def network() -> nn.Module:
    return resnet(1, 16).model


def save(folder: Path, number: int) -> None:
    """Trains the network on noise, and saves it before each step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(number):
        torch.save(model.state_dict(), folder / f"step={step}.pt")
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(0, 10, (8,))).backward()
        optimizer.step()


def analyze(checkpoints: Any, probe: nt.Probe, to: Path, **options: Any) -> nt.Analysis:
    settings = {"measures": MEASURES, "model": NETWORK, "threads": 1, "progress": True}
    found = nt.analyze(checkpoints, probe, to=to, **{**settings, **options})
    print(found, flush=True)
    assert not found.failed, found
    assert not found.missing, found
    return found


def startup(checkpoints: Path, to: Path, **options: Any) -> float:
    """Seconds of an analysis in which next to nothing is measured, of one checkpoint a job."""
    jobs = options.get("jobs", 1)
    few = [checkpoints / f"step={step}.pt" for step in range(jobs)]
    one = nt.Probe(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    return analyze(few, one, to, measures=["loss/mean"], **options).seconds


def same(one: nt.Analysis, other: nt.Analysis) -> int:
    """How many values of the other agree to the bit, which has to be all of them."""
    a, b = one.trace, other.trace
    a = a.sel(step=b.step)
    assert set(a.data_vars) == set(b.data_vars)
    names = [name for name in a.data_vars if not name.startswith("nettrace_seconds")]
    for name in names:
        assert a[name].values.tobytes() == b[name].values.tobytes(), f"{name} differs"
    return sum(a[name].size for name in names)


def kill_one(trace: Path, after: int) -> None:
    """Kills a worker once so many checkpoints are written."""
    while not trace.exists() or sum(len(part.steps) for part in parts(trace)) < after:
        time.sleep(0.05)
    os.kill(active_children()[0].pid or 0, signal.SIGKILL)


def main(number: int, samples: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir()
        save(checkpoints, number)
        probe = nt.Probe(torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10)

        seconds, started = {}, {}
        started[1] = startup(checkpoints, folder / "start-1")
        one = analyze(checkpoints, probe, folder / "one")
        started[2] = startup(checkpoints, folder / "start-2", jobs=2)
        two = analyze(checkpoints, probe, folder / "two", jobs=2)
        for jobs, found in ((1, one), (2, two)):
            seconds[jobs] = found.seconds - started[jobs]
        values = same(one, two)
        task = float(one.trace.nettrace_seconds.median())

        some = [checkpoints / f"step={step}.pt" for step in range(max(2, number // 4))]
        killer = threading.Thread(target=kill_one, args=(folder / "killed", len(some) // 3 or 1))
        killer.start()
        killed = analyze(some, probe, folder / "killed", jobs=2)
        killer.join()
        same(one, killed)
        again = analyze(checkpoints, probe, folder / "two", jobs=2)
        assert not again.done

        import dask
        from distributed import LocalCluster

        # Without MALLOC_TRIM_THRESHOLD_, which costs torch more than all else.
        dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1}})
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
            on_dask = analyze(checkpoints, probe, folder / "dask", dask=cluster.scheduler_address)
        same(one, on_dask)

    ratio = seconds[1] / seconds[2]
    kept = "kept" if ratio >= GOAL and task >= LEAST else "missed"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "distributed"))
    rows = [
        ("one job", one, seconds[1], started[1]),
        ("two jobs", two, seconds[2], started[2]),
        ("two jobs, one killed in the middle", killed, None, None),
        ("Dask, two workers of one thread", on_dask, None, None),
        ("rerun of two jobs", again, None, None),
    ]
    lines = [
        "# A folder of checkpoints analysed offline",
        "",
        f"`python benchmarks/analysis.py --checkpoints {number} --samples {samples}`; Python "
        f"{platform.python_version()}, {packages}, {os.cpu_count()} cores, one thread a job. "
        f"{number} checkpoints of a ResNet-18 of width 16 with GroupNorm; {', '.join(MEASURES)} on "
        f"{samples} samples, {task:.2f} s a checkpoint (median, one job).",
        "",
        "| | measured | seconds in all | start-up | without start-up |",
        "|---|---|---|---|---|",
    ]
    for name, found, without, start in rows:
        cells = ["" if value is None else f"{value:.1f}" for value in (start, without)]
        lines.append(f"| {name} | {len(found.done)} | {found.seconds:.1f} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Two jobs are {ratio:.2f} times as fast as one, without start-up (goal on two idle cores: "
        f"{GOAL}, tasks of {LEAST:g} s; {kept}). Start-up is what an analysis of one checkpoint a "
        "job takes that measures next to nothing: processes that import torch, the plan sent, the "
        f"network built. All {values:,} values are the same to the bit in one job, in two, with a "
        "worker killed in the middle, and on Dask, whose nannies were kept from setting "
        "MALLOC_TRIM_THRESHOLD_.",
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=64)
    parser.add_argument("--samples", type=int, default=12)
    options = parser.parse_args()
    main(options.checkpoints, options.samples)
