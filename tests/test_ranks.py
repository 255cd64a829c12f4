"""Several processes measure what one alone measures on the same probe."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured_together
import numpy as np
import pytest
import torch
import training
import zoo

import nettrace as nt
from nettrace.ranks import ALONE

pytestmark = [pytest.mark.filterwarnings(text) for text in training.HARMLESS]
SCRIPT = Path(measured_together.__file__)


def run(folder: Path, processes: int, *arguments: str) -> list[Any]:
    """What each of some processes found."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, f"--nproc-per-node={processes}", str(SCRIPT), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "how", "processes"),
    [
        ("classifier", "ddp", 2),
        ("classifier", "fsdp", 3),
        ("classifier", "ddp", 3),
        ("classifier", "fsdp", 2),
        ("images", "ddp", 3),
        ("images", "fsdp", 2),
        ("texts", "fsdp", 2),
        ("experts", "ddp", 3),
    ],
)
def test_every_measure_is_that_of_one_process(
    network: str, how: str, processes: int, tmp_path: Path, logged: list[str]
) -> None:
    alone = measured_together.measures(network, "plain")
    found = run(tmp_path, processes, network, how)
    measured = 0
    for name, record in alone.items():
        for several in found:
            if isinstance(record, str | None):  # of its own samples each
                assert _without_numbers(several[name]) == _without_numbers(record), name
                continue
            value, error = several[name].value, several[name].standard_error
            first = found[0][name]
            assert (several[name].missing is None) == (record.missing is None), name
            assert np.array_equal(value, first.value, equal_nan=True), name
            if name.startswith("nettrace/"):
                continue
            measured += record.missing is None
            scale = np.abs(np.nan_to_num(record.value)).max(initial=1e-2)
            np.testing.assert_allclose(value, record.value, 1e-10, 1e-10 * scale, err_msg=name)
            if record.standard_error is not None:  # of a number known exactly, it is rounding
                true, rounding = record.standard_error, 1e-12 * max(scale, 1)
                np.testing.assert_allclose(error, true, 1e-8, rounding, err_msg=name)
    assert measured > (5 if network == "texts" else 40)
    logged.clear()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_member_of_the_zoo(processes: int, tmp_path: Path) -> None:
    alone = measured_together.every_member(ALONE)
    found = run(tmp_path, processes, "zoo", "plain")
    assert len(alone) > 60
    for name, products in alone.items():
        for what, true in products.items():
            for several in found:
                value = several[name][what]
                values = value if isinstance(value, dict) else {"": value}
                trues = true if isinstance(true, dict) else {"": true}
                largest = max(float(t.abs().max()) for t in trues.values())
                for key, one in values.items():
                    wrong = float((one - trues[key]).abs().max())
                    assert wrong <= 10 * zoo.ZOO[name].tolerance * largest, (name, what, key)


def test_each_process_s_window_is_that_of_one_process(tmp_path: Path) -> None:
    alone = measured_together.windows("plain")
    for found in run(tmp_path, 2, "windows", "ddp"):
        assert found.keys() == alone.keys() >= {"weights/variance", "weights/curvature"}
        for name in alone.keys() - {"nettrace/spot_check"}:
            assert found[name].missing is alone[name].missing is None, found[name]
            largest = np.abs(alone[name].value).max()
            np.testing.assert_allclose(found[name].value, alone[name].value, 1e-9, 1e-9 * largest)


@pytest.mark.slow
def test_of_parameters_that_are_spread_there_is_no_window(
    tmp_path: Path, logged: list[str]
) -> None:
    for found in run(tmp_path, 2, "windows", "fsdp"):
        assert "is spread over processes" in found["weights/variance"].missing
        assert np.isfinite(found["loss/mean"].value)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "unused", "static", "fsdp"])
def test_the_training_s_own_steps_are_those_of_all_processes(
    how: str, tmp_path: Path, logged: list[str]
) -> None:
    """Of batches that lie one after the other in a larger one."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    together.mkdir()
    one = measured_together.lightning(alone, f"alone-{how}")
    logged.clear()
    states = run(together, 2, "lightning", how)
    bare = run(together, 2, "lightning", f"{how}-bare")
    assert [training.differences(a, b) for a, b in zip(states, bare, strict=True)] == [[], []]
    for key, weight in one.items():
        if key.startswith("weight"):
            assert torch.allclose(states[0][key], weight, rtol=1e-12)
    for kind in ("steps", "probe"):
        assert len(list((together / kind).iterdir())) == 1
        expected, found = nt.open(alone / kind), nt.open(together / kind)
        assert found.step.values.tolist() == expected.step.values.tolist()
        assert len(found.step) == (3 if kind == "steps" else 4)
        names = [n for n in expected.data_vars if not n.startswith("nettrace_")]
        assert len(names) > (30 if kind == "probe" else 15)
        for name in names:
            value, true = found[name].values, expected[name].values
            assert np.isfinite(true).any(), name
            atol = 1e-10 * np.abs(np.nan_to_num(true)).max(initial=1e-2)
            np.testing.assert_allclose(value, true, 1e-10, atol, err_msg=name)


@pytest.mark.slow
def test_where_samples_are_coupled_the_processes_batches_tell_the_noise(tmp_path: Path) -> None:
    run(tmp_path, 3, "lightning", "coupled")
    trace = nt.open(tmp_path / "steps")
    torch.manual_seed(1)
    module = measured_together.trained(True, [])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 12, 4, dtype=torch.float64, generator=generator)[0]
    rows = []
    for batch in drawn.split(4):
        loss = module.training_step(batch, 0)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    gradients = torch.stack(rows)
    noise = gradients.var(0).sum()  # of batches of 4 samples
    signal = gradients.mean(0).square().sum() - noise / 3
    first = trace.isel(step=0)
    assert float(first.gradients_signal) == pytest.approx(float(signal), rel=1e-10)
    assert float(first.gradients_noise) == pytest.approx(4 * float(noise), rel=1e-10)
    assert "3 processes' batches of 4 samples" in trace.gradients_noise.attrs["batch"]


#: By fault, what is missing at step 1, and why, in one or all processes.
FAULTS = {
    "raising": ("tests/failing", "KeyError: 'of this process alone'"),
    "memory": ("tests/failing", "out of memory, as it is said"),
    "killed": ("loss/mean", "LostProcessError: the other processes cannot be reached any more"),
    "probes": ("ntk/trace", "2 processes measure together, on 2 probes"),
    "fsdp-memory": ("ntk/trace", "a whole copy of them, of 360 bytes, is above the memory budget"),
}


@pytest.mark.parametrize(
    "fault",
    [
        name if name in ("raising", "killed") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAULTS
    ],
)
def test_what_fails_in_one_process_is_missing_in_all(fault: str, tmp_path: Path) -> None:
    survivors = 1 if fault == "killed" else 2
    found = started(tmp_path, 2, "faults", fault)[:survivors]
    name, reason = FAULTS[fault]
    for records in found:
        assert reason in records[f"{name} 1"].missing
        if fault in ("raising", "memory"):
            assert records["loss/mean 1"].missing is None
            assert records["tests/failing 2"].missing is None


def test_a_tracer_that_one_process_calls_measures_there_alone(tmp_path: Path) -> None:
    first, other = started(tmp_path, 2, "faults", "first-alone")
    assert other == {}
    assert first["ntk/trace 2"].missing is None


def test_one_that_stops_coming_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    first, other = started(tmp_path, 2, "faults", "leaving")
    assert first["ntk/trace 1"].value == other["ntk/trace 1"].value
    assert first["ntk/trace 2"].missing is None


@pytest.mark.slow
def test_processes_with_other_weights_measure_their_own(tmp_path: Path) -> None:
    found = started(tmp_path, 2, "faults", "weights")
    assert found[0]["loss/mean 0"].value != found[1]["loss/mean 0"].value
    torch.manual_seed(0)
    probe = nt.Probe(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))
    torch.manual_seed(0)
    model = measured_together.Experts().double()
    loss = torch.nn.functional.cross_entropy(model(probe.inputs), probe.targets).detach()
    assert float(found[0]["loss/mean 0"].value) == pytest.approx(float(loss), rel=1e-12)


def started(folder: Path, processes: int, *arguments: str) -> list[Any]:
    """What each of some processes found, of which some may die."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    several = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *arguments],
            env={**os.environ, **group, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [one.communicate(timeout=300)[1] for one in several]
    found = [folder / f"{rank}.pt" for rank in range(processes)]
    assert found[0].exists(), told[0][-5000:]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in found]


def _without_numbers(text: str | None) -> str:
    return re.sub(r"\d+", "N", str(text))
