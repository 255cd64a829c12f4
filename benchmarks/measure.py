"""Measures one method on one workload; `run.py` starts it, in a process of its own.

    python benchmarks/measure.py FOLDER WORKLOAD QUANTITY METHOD
    python benchmarks/measure.py FOLDER WORKLOAD

The second writes what is true, and the batch and weights for methods that have no torch, to
`FOLDER/WORKLOAD.npz`. The first writes what is known so far to `FOLDER/measured.json`: the process
is stopped by a signal when one call takes longer than the cap.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from memory import peak_memory

#: CPU seconds that one call may take, and bytes that the process may hold.
CAP, ROOM = 60, 12 * 2**30
#: Calls that take longer are not repeated.
LONG = 20
REPEATS = 7
#: The first call warms up where it takes less.
SLOW = 2
#: CPU seconds that one timed block takes, at least: calls are repeated within.
BLOCK = 0.1
#: Relative error against float64 above which a method counts as wrong. In float32 a ReLU of a deep
#: network may flip, and then plain autograd is off by as much: 1.2e-3 in the ResNet's kernel.
WRONG = 3e-3


def seconds(call: Callable[[], object], count: int = 1) -> float:
    """CPU seconds of a call, an average over `count`."""
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def compare(values: Mapping[str, object], true: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest error of each value, relative to the largest entry."""
    errors = {}
    for name, value in values.items():
        if name in true:
            found = np.asarray(value, dtype=np.float64)
            if found.shape != true[name].shape:
                found = found[:, :, true["few"]]
            error = np.abs(found - true[name]).max() / np.abs(true[name]).max()
            errors[name] = float(error)
    return errors


def main() -> None:
    folder, workload, *which = sys.argv[1:]
    truth = Path(folder) / f"{workload}.npz"
    jax = which and which[1].startswith("neural-tangents")
    if not jax:
        import torch
        from workloads import WORKLOADS

        torch.set_num_threads(1)
        w = WORKLOADS[workload]()
    if not which:
        from methods import oracle

        parameters = dict(w.model.named_parameters())
        data = {f"parameter {i}": p.detach() for i, p in enumerate(parameters.values())}
        values = {name: v.detach() for name, v in oracle(w).items()}
        title = np.array(w.title)
        np.savez(truth, inputs=w.inputs, names=list(parameters), title=title, **data, **values)
        return

    report: dict[str, object] = {}

    def tell(**news: object) -> None:
        report.update(news)
        (Path(folder) / "measured.json").write_text(json.dumps(report))

    true = np.load(truth)
    quantity, method = which
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))
    warnings.simplefilter("ignore")
    unit = None
    if not jax:
        # The first backward pass of a given cotangent imports parts of torch, some 35 MB, which are
        # no method's own.
        losses = w.losses()
        torch.autograd.grad(losses, list(w.model.parameters()), torch.ones_like(losses))
        w.step()
        w.model.zero_grad()
        _, unit_memory = peak_memory(w.step)
        w.model.zero_grad()
        unit = w.step
        tell(unit=seconds(unit), unit_memory=unit_memory)
    try:
        if jax:
            from tangents import prepare

            call = prepare(workload, quantity, true)
        else:
            from methods import METHODS

            call = METHODS[quantity][method](w)
        if call is None:
            tell(status="other")
            return
        signal.setitimer(signal.ITIMER_PROF, CAP)
        start = time.process_time()
        values, memory = peak_memory(call)
        took = time.process_time() - start
        signal.setitimer(signal.ITIMER_PROF, 0)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        tell(status="fails", error=f"{type(error).__name__}: {lines[0]}"[:300])
        return
    errors = compare(values, true)
    estimate = "estimate" in values
    wrong = not estimate and any(not e < WRONG for e in errors.values())
    if not errors:
        tell(status="other")
        return
    tell(status="wrong" if wrong else "right", errors=errors, estimate=estimate, memory=memory)
    del values
    repeats = 1 if took > LONG else REPEATS
    times, units = [], []
    if took > SLOW and not jax:  # what jax took includes compilation
        times, units = [took], [report["unit"]]
    elif took <= SLOW:
        took = seconds(call)  # the first call takes longer, and a block would be too short
    while len(times) < repeats:
        if unit:
            units.append(seconds(unit, max(1, math.ceil(BLOCK / report["unit"]))))
        times.append(seconds(call, max(1, math.ceil(BLOCK / took))))
    tell(times=times, units=units)


if __name__ == "__main__":
    main()
