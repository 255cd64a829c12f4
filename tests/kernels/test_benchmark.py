"""The benchmark of kernels: up to the launch without a GPU, and beyond with its clock replaced."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from nettrace.kernels import configurations
from nettrace.kernels.launch import INTERPRETED, Config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="it times what is compiled")


@pytest.fixture
def benchmark(monkeypatch):
    # By path: another module has the name `kernels`.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("its_main", ROOT / "benchmarks" / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_without_a_gpu_all_is_checked_and_nothing_measured(benchmark, tmp_path):
    benchmark.main([], tmp_path)
    text = (tmp_path / "kernels.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") > 6]
    expected = sum(len(op.shapes) * len(op.types) for op in benchmark.OPS)
    assert len(lines) == expected
    assert all(line.endswith("| unmeasured | | | | | |") for line in lines)
    for name in ("affine_psg", "weight_welford_"):
        assert f"| `{name}` | right |" in text
    assert not (tmp_path / "kernels.json").exists()
    with pytest.raises(SystemExit):
        benchmark.main(["--tune"], tmp_path)


def test_what_is_committed_is_marked_as_unmeasured_or_names_its_gpu():
    text = (ROOT / "benchmarks" / "results" / "kernels.md").read_text()
    assert ("GPU none" in text) == ("every line is marked unmeasured" in text)


def test_a_wrong_operation_is_found(benchmark, monkeypatch):
    (op,) = (op for op in benchmark.OPS if op.name == "affine_psg")
    assert benchmark.checked(op) == "right"
    right = benchmark.kernels.affine_psg
    monkeypatch.setattr(benchmark.kernels, "affine_psg", lambda *x: [1.001 * y for y in right(*x)])
    with pytest.raises(AssertionError, match="affine_psg is off by"):
        benchmark.checked(op)


@pytest.fixture
def rehearsed(benchmark, monkeypatch):
    """All on the CPU, on small shapes, by a clock that says that each call takes a millisecond."""
    timing = benchmark.kernel_timing
    calls = []

    def timed(call, sets, span=0.0):
        calls.append(call(*sets[0]))
        return timing.Times(1e-3, 0.9e-3, 1.2e-3)

    monkeypatch.setattr(timing, "timed", timed)
    monkeypatch.setattr(timing, "wall", lambda call, repeats: call() or 2e-3)
    monkeypatch.setattr(timing, "peak", lambda call, arguments: 5_000_000)
    monkeypatch.setattr(timing, "ROTATED", 0)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    ceilings = {"copy": 4e12, "bf16": 8e14, "tf32": 4e14}
    monkeypatch.setattr(timing, "ceilings", lambda: ceilings)
    monkeypatch.setattr(timing, "machine", lambda: {"GPU": "one of the mind"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    ops = [dataclasses.replace(op, shapes={"small": op.small}) for op in benchmark.OPS]
    monkeypatch.setattr(benchmark, "OPS", ops)
    models = {"ViT": (3, 5, 8, 2, 6, 4, False), "GPT": (3, 5, 8, 2, 11, 11, True)}
    monkeypatch.setattr(benchmark.kernel_steps, "MODELS", models)
    return calls


def test_with_a_gpu_lines_tell_times_and_ratios(benchmark, rehearsed, tmp_path):
    benchmark.main(["--quick"], tmp_path)
    found = json.loads((tmp_path / "kernels.json").read_text())
    text = (tmp_path / "kernels.md").read_text()
    assert found["command"] == "python benchmarks/kernels.py --quick"
    rows = {row["op"]: row for row in found["rows"] if "ours" in row}
    assert {"affine_psg", "weight_welford_"} <= rows.keys()
    assert rows["affine_psg"]["peak"] == 5_000_000
    x, dy, statistics, out = 3 * 5 * 7 * 2, 3 * 5 * 7 * 2, 2 * 3 * 5 * 4, 2 * 3 * 7 * 4
    assert rows["affine_psg"]["bytes"] == x + dy + statistics + out
    line = next(line for line in text.splitlines() if line.startswith("| `affine_psg` | small"))
    assert "| 1000.0 (900.0 to 1200.0) | 5 | 0 % of copies | 1.00 | 1.00 | 1.00 |" in line
    # What a measured line says is all that it says.
    for name in rows:
        assert f"| `{name}` | small | bfloat16 | unmeasured" not in text
    assert rehearsed


def test_tuning_keeps_what_nothing_is_faster_than(benchmark, rehearsed, tmp_path, monkeypatch):
    tuning = benchmark.kernel_tuning
    source = tuning.PATH.read_text()
    path = tmp_path / "configurations.py"
    path.write_text(source)
    monkeypatch.setattr(tuning, "PATH", path)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(benchmark, "architecture", lambda device: "sm90")
    kept = {name: {**getattr(configurations, name)} for name in ("AFFINE", "MOMENTS")}
    benchmark.tune()
    found: dict = {}
    exec(compile(path.read_text(), "configurations", "exec"), found)
    for name, table in kept.items():
        assert found[name] == table == getattr(configurations, name)


def test_a_callback_is_timed_at_a_step(benchmark, rehearsed):
    steps = benchmark.kernel_steps
    model, _, losses = steps.built(*steps.MODELS["ViT"], device="cpu", dtype=torch.float32)
    assert steps.callback(model, losses, 3) == 2e-3


def test_whole_steps_are_plain_ones_where_nothing_is_noted(benchmark):
    steps = benchmark.kernel_steps
    model, x, losses = steps.built(3, 5, 8, 1, 11, 11, True, device="cpu", dtype=torch.float64)
    steps.stepped(model, losses, measured=False)
    (own,) = torch.autograd.grad(losses().sum(), [model.leave.weight])
    torch.testing.assert_close(model.leave.weight.grad, own)


def test_configurations_are_written_as_they_were(benchmark):
    tuning = benchmark.kernel_tuning
    source = tuning.PATH.read_text()
    names = [name for name in vars(configurations) if name.isupper() and name[0] != "_"]
    tables = {name: getattr(configurations, name) for name in names}
    assert {"AFFINE", "MOMENTS"} <= tables.keys()
    changed = {name: {**table} for name, table in tables.items()}
    changed["AFFINE"]["sm90"] = {**changed["AFFINE"]["sm90"], "half": Config((32, 128), 8, 2)}
    for wanted in (tables, changed):
        found: dict = {}
        text = tuning.written(wanted, source)
        exec(compile(text, "configurations", "exec"), found)
        assert {name: found[name] for name in names} == wanted
        assert text.count("#: ") == source.count("#: ")


def test_the_fastest_neighbour_is_found(benchmark):
    tuning = benchmark.kernel_tuning
    best = Config((64, 128), 8, 2)

    def cost(config):
        off = [math.log2(a / b) for a, b in zip(config.blocks, best.blocks, strict=True)]
        if config.blocks[0] > 128:
            return math.inf  # which does not run
        return 1 + sum(map(abs, off)) + abs(config.stages - 2) + abs(math.log2(config.warps / 8))

    assert tuning.tuned(Config((16, 256), 4, 3), cost) == best
    table, other = {"sm90": {"half": best}}, Config((1,), 1, 1)
    tried = tuning.tried(table, "sm90", "half", other, lambda: table["sm90"]["half"])
    assert tried == other
    assert table["sm90"]["half"] == best
