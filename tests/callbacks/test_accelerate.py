"""A loop of one's own under accelerate: undisturbed, and measured as it would be without."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from torch import nn

import nettrace as nt

accelerate = pytest.importorskip("accelerate")

MEASURES = ["loss/mean", "ntk/trace", "fisher/trace", "ntk/preconditioned_trace", "ntk/velocity"]


def train(folder: Path | None, how: str, precision: str = "no", gather: int = 1) -> dict[str, Any]:
    """Trains for eight batches, and gives all that came of it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=gather
    )
    training.seed()
    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    data = training.loader(training.Augmented(count=32), shuffle=True)
    model, optimizer, data = accelerator.prepare(
        inner, torch.optim.Adam(inner.parameters(), 0.01), data
    )
    samples = training.Samples(seed=2)
    tracer = step = 0
    if folder is not None:
        probe = nt.Probe(samples.inputs, samples.targets)
        options = {"every": range(1, 20), "to": folder, "on_error": "raise"}
        tracer = nt.Tracer(probe, MEASURES, **options)
    attached = how == "attached" and tracer
    with attached.attached(model, optimizer) if attached else nullcontext():
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if how == "called" and tracer and accelerator.sync_gradients:
                tracer(accelerator.unwrap_model(model), step, optimizer)
    return {
        **training.state(inner),
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler,
        "forward": inner.forward.__func__,
    }


@pytest.mark.parametrize("how", ["called", "attached"])
@pytest.mark.parametrize(("precision", "gather"), [("no", 1), ("no", 2), ("bf16", 2)])
def test_training_is_bitwise_the_same_and_measured_as_without(
    how: str, precision: str, gather: int, tmp_path: Path
) -> None:
    bare = train(None, how, precision, gather)
    found = train(tmp_path, how, precision, gather)
    functions = bare.pop("forward"), found.pop("forward")
    assert len({getattr(f, "__name__", "") for f in functions}) == 1
    assert training.differences(bare, found) == []
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == list(range(1, 8 // gather + 1))
    # The weights at the end, in a network that accelerate has not seen.
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    weights = {n.removeprefix("weight "): v for n, v in found.items() if n.startswith("weight ")}
    buffers = {n.removeprefix("buffer "): v for n, v in found.items() if n.startswith("buffer ")}
    plain.load_state_dict(weights | buffers)
    optimizer = torch.optim.Adam(plain.parameters())
    optimizer.load_state_dict(found["optimizer"])
    samples = training.Samples(seed=2)
    tracer = nt.Tracer(nt.Probe(samples.inputs, samples.targets), MEASURES[:-1], on_error="raise")
    for record in tracer(plain, trace.step.values[-1], optimizer):
        if not record.name.startswith("nettrace/"):
            assert trace[record.name.replace("/", "_")].values[-1] == record.value, record.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accelerate", "transformers"])
def test_of_several_processes_one_writes(kind: str, tmp_path: Path) -> None:
    script = Path(training.__file__).with_name("process_of_several.py")

    def run(folder: Path, *options: str) -> list[Any]:
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launch, "--nproc-per-node=2", str(script), str(folder), kind, *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]

    bare, found = run(tmp_path / "bare", "bare"), run(tmp_path / "traced")
    assert training.differences(bare, found) == []
    files = list((tmp_path / "traced" / "trace").iterdir())
    assert len(files) == 1
    trace = nt.open(tmp_path / "traced" / "trace")
    assert trace.step.values.tolist() == [0, 2, 4]
    assert np.isfinite(trace.ntk_trace).all()
    assert (tmp_path / "traced" / "checkpoint-4" / "nettrace.pt").is_file() == (
        kind == "transformers"
    )
