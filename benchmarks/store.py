"""What writing a trace costs, and opening a long one; `make bench` runs it.

A trace of 100,000 steps with 50 scalars each and 2,000 spectra of 256 numbers is written, one step
at a time, then opened in processes of their own. Beside it, the same steps in other stores, each
made readable after every step, as a trace is. Run by `python benchmarks/store.py`, which writes
`results/store.md`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

import nettrace as nt
from nettrace.store import TraceWriter

STEPS, SCALARS, SPECTRA, MODES = 100_000, 50, 2_000, 256
FEW, REPEATS = 1_000, 5
GOALS = {"seconds": 2.0, "megabytes": 500.0, "microseconds": 50.0}
RESULTS = Path(__file__).parent / "results" / "store.md"
NAMES = [f"group/scalar_{number}" for number in range(SCALARS)]
#: What is done with a trace that was opened.
READS = {
    "open": lambda data: None,
    "open, one column": lambda data: data.group_scalar_7.values,
    "open, all spectra": lambda data: data.ntk_spectrum.values,
    "open, one spectrum": lambda data: data.ntk_spectrum[STEPS // 2].values,
}


def step(number: int, numbers: np.ndarray) -> list[nt.Record]:
    about = {"convention": "of the benchmark", "source": "nettrace"}
    found = [
        nt.Record(name, number, np.asarray(x), attributes=about)
        for name, x in zip(NAMES, numbers[:SCALARS], strict=True)
    ]
    if number % (STEPS // SPECTRA) == 0:
        spectrum = np.sort(numbers)
        found.append(nt.Record("ntk/spectrum", number, spectrum, dims=("mode",), attributes=about))
    return found


def samples(steps: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(min(steps, 1000), MODES))


def write(folder: Path, steps: int) -> list[float]:
    """Seconds of each write; making the records is left out."""
    numbers, writer, seconds = samples(steps), TraceWriter(folder), []
    for number in range(steps):
        records = step(number, numbers[number % len(numbers)])
        begin = time.perf_counter()
        writer.write(records, {"epoch": number // 1000})
        seconds.append(time.perf_counter() - begin)
    writer.close()
    return seconds


def write_sqlite(folder: Path, steps: int) -> list[float]:
    """A row for each scalar, a transaction for each step, in WAL mode."""
    base = sqlite3.connect(folder / "trace.sqlite")
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=NORMAL")
    base.execute("CREATE TABLE records (step INTEGER, name TEXT, value BLOB)")
    numbers, seconds = samples(steps), []
    for number in range(steps):
        rows = [
            (number, r.name, r.value.tobytes())
            for r in step(number, numbers[number % len(numbers)])
        ]
        begin = time.perf_counter()
        base.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
        base.commit()
        seconds.append(time.perf_counter() - begin)
    base.close()
    return seconds


def write_zarr(folder: Path, steps: int) -> list[float]:
    """An array for all scalars together, resized at each step, in chunks of 1,000 steps."""
    import zarr

    array = zarr.open_array(
        folder / "trace.zarr", mode="w", shape=(0, SCALARS), chunks=(1000, SCALARS), dtype="f8"
    )
    numbers, seconds = samples(steps), []
    for number in range(steps):
        row = numbers[number % len(numbers)][None, :SCALARS]
        begin = time.perf_counter()
        array.append(row)
        seconds.append(time.perf_counter() - begin)
    return seconds


def write_netcdf(folder: Path, steps: int) -> list[float]:
    """One variable for all scalars together, resized and flushed at each step."""
    import h5netcdf

    numbers, seconds = samples(steps), []
    with h5netcdf.File(folder / "trace.nc", "w") as file:
        file.dimensions = {"step": None, "scalar": SCALARS}
        variable = file.create_variable("scalars", ("step", "scalar"), "f8", chunks=(1000, SCALARS))
        for number in range(steps):
            begin = time.perf_counter()
            file.resize_dimension("step", number + 1)
            variable[number] = numbers[number % len(numbers)][:SCALARS]
            file.flush()
            seconds.append(time.perf_counter() - begin)
    return seconds


OTHERS: dict[str, tuple[str, int, Callable[[Path, int], list[float]]]] = {
    "SQLite, write-ahead log": ("sqlite3", 10 * FEW, write_sqlite),
    "zarr, scalars alone": ("zarr", FEW, write_zarr),
    "netCDF-4 by h5netcdf, scalars alone": ("h5py", FEW, write_netcdf),
}


def high_water() -> float:
    """The most memory that this process has had, in MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


def opened(folder: str, what: str) -> None:
    """In a process of its own: prints seconds and megabytes over those of the imports."""
    import xarray  # noqa: F401

    importlib.import_module("nettrace.store.dataset")
    before = high_water()
    begin = time.perf_counter()
    data = nt.open(folder)
    READS[what](data)
    print(json.dumps([time.perf_counter() - begin, high_water() - before]))


def open_apart(folder: Path, what: str) -> tuple[float, float]:
    """Median seconds, and the most megabytes."""
    command = [sys.executable, __file__, str(folder), what]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        for _ in range(REPEATS)
    ]
    return statistics.median(s for s, _ in runs), max(m for _, m in runs)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    known = [n for n in ("numpy", "xarray", "zarr", "h5netcdf") if importlib.util.find_spec(n)]
    packages = ", ".join(f"{name} {version(name)}" for name in known)
    lines = [
        "# The trace on disk",
        "",
        f"`python benchmarks/store.py`; Python {platform.python_version()}, {packages}, SQLite "
        f"{sqlite3.sqlite_version}; one thread. {STEPS:,} steps of {SCALARS} scalars and "
        f"{SPECTRA:,} spectra of {MODES} numbers, in float64: "
        f"{8 * (STEPS * SCALARS + SPECTRA * MODES) / 1e6:.1f} MB of numbers.",
        "",
        f"Reading, median of {REPEATS} processes; memory is the most of all, over that after the "
        f"import of xarray. Goals: at most {GOALS['seconds']:g} s and {GOALS['megabytes']:g} MB.",
        "",
        "| | seconds | MB |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "trace"
        ours = write(folder, STEPS)
        for what in READS:
            seconds, megabytes = open_apart(folder, what)
            lines.append(f"| {what} | {seconds:.2f} | {megabytes:.0f} |")
            print(lines[-1], flush=True)
        lines += [
            "",
            "Writing, one step at a time, readable by others after each; the records are made "
            "before. Goal: at most 50 microseconds a record.",
            "",
            "| | steps | microseconds a step, median (90 %) | mean, a record | bytes a step |",
            "|---|---|---|---|---|",
        ]

        def add(name: str, found: list[float], bytes_: int) -> None:
            ordered = sorted(1e6 * s for s in found)
            middle, high = statistics.median(ordered), ordered[int(0.9 * len(ordered))]
            records = statistics.mean(ordered) / SCALARS
            lines.append(
                f"| {name} | {len(found):,} | {middle:.0f} ({high:.0f}) | {records:.2f} | "
                f"{bytes_ / len(found):.0f} |"
            )
            print(lines[-1], flush=True)

        add("nettrace", ours, size(folder))
        for name, (package, steps, other) in OTHERS.items():
            try:
                importlib.import_module(package)
            except ImportError:
                lines.append(f"| {name} | {package} is not installed | | | |")
                continue
            place = Path(temporary) / package
            place.mkdir()
            add(name, other(place, steps), size(place))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    opened(*sys.argv[1:]) if len(sys.argv) > 1 else main()
