"""Probes at chosen steps: in a loop of one's own, and on checkpoints afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
import xarray as xr
from torch import nn

import nettrace as nt
from nettrace import landscape
from nettrace.landscape import Prober, barrier, folder, probe_checkpoints, slice_1d
from nettrace.landscape import prober as module
from nettrace.landscape.run import run, write

SAMPLES = training.Samples()
PROBE = nt.Probe(SAMPLES.inputs, SAMPLES.targets)
Data = dict[str, Any]


def network() -> nn.Module:
    """One that has all that can be disturbed."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def train(
    model: nn.Module, steps: int, look: Callable[[nn.Module, int], Any] = lambda *_: None
) -> dict[str, Any]:
    """All that came of a training that is looked at after each step."""
    training.seed()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    look(model, 0)
    for step in range(1, steps + 1):
        x = SAMPLES.inputs + random.gauss(0, 0.1) + 0.1 * float(np.random.randn())
        optimizer.zero_grad()
        F.cross_entropy(model(x), SAMPLES.targets).backward()
        optimizer.step()
        look(model, step)
    return {**training.state(model), "optimizer": optimizer.state_dict()}


class Endless:
    """A sampler that counts its pieces, and does something at one of them."""

    title = "endless"
    share = 0.0

    def __init__(self, at: int = 0, deed: Callable[[], Any] = lambda: None) -> None:
        self._at, self._deed, self._pieces = at, deed, 0

    def advance(self) -> None:
        if self._pieces == self._at:
            self._deed()
        self._pieces += 1

    def settle(self) -> None:
        return

    def result(self) -> xr.Dataset:
        return xr.Dataset({"pieces": ((), self._pieces)}, attrs={"doubts": ""})


def endless(model: nn.Module, probe: nt.Probe, *, deed: Any = lambda: None, **how: Any) -> Any:
    return run(Endless(3, deed), **how)


def fails(deed: Any = "deliberately") -> None:
    raise ArithmeticError(deed)


def interrupt() -> None:
    raise KeyboardInterrupt


def value(
    model: nn.Module, probe: nt.Probe, *, number: float = 1.0, seconds: Any, progress: Any, to: Any
) -> xr.Dataset:
    """A result without a sampler, which knows nothing of files."""
    return xr.Dataset({"number": ((), number)})


# In a training -----------------------------------------------------------------------------------


def test_a_training_is_bitwise_the_same_with_probes(tmp_path: Path) -> None:
    probes = [partial(slice_1d, points=3), partial(barrier, other=network(), points=3)]
    prober = Prober(probes, PROBE, every=2, to=tmp_path)
    assert training.differences(train(network(), 4), train(network(), 4, prober)) == []
    found = landscape.open(tmp_path)
    assert sorted(found) == ["barrier", "slice_1d"]
    for one in found.values():
        assert one.step.values.tolist() == [0, 2, 4]
        assert one.stopped.values.tolist() == ["done"] * 3
        assert np.isfinite(one.loss.values).all()
    assert found["slice_1d"].loss.dims == ("step", "x")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files[3:] == [f"slice_1d/step_0000000{step}.nc" for step in (0, 2, 4)]


def test_whatever_a_function_does_to_the_network_is_undone() -> None:
    def careless(model: Any, probe: nt.Probe, **_: Any) -> xr.Dataset:
        for name, (disturb, _) in training.CARELESS.items():
            if name != "leaves a hook":  # which is not one's own to take away
                disturb(model)
        return xr.Dataset()

    model = nn.Module()
    model.net = nn.Sequential(*network(), nn.BatchNorm1d(3))
    before = training.state(model)
    Prober(careless, PROBE)(model, 0)
    assert training.differences(before, training.state(model)) == []


def test_results_are_those_of_the_functions_themselves(tmp_path: Path) -> None:
    model = network()
    found = Prober(partial(slice_1d, points=5), PROBE, to=tmp_path)(model, 7)["slice_1d"]
    expected = slice_1d(model, PROBE, points=5)
    xr.testing.assert_equal(found, expected)
    kept = folder.read(tmp_path / "slice_1d" / "step_00000007.nc")
    xr.testing.assert_equal(kept, expected)


def test_schedules_say_when() -> None:
    schedules: list[tuple[Any, list[int]]] = [
        (3, [0, 3, 6]),
        ("log", [0, 1, 2, 3, 4, 5, 6]),
        ([5], [5]),
        (nt.with_last(4, total_steps=7), [0, 4, 7]),
        (lambda step: step == 2, [2]),
    ]
    for every, steps in schedules:
        prober = Prober(value, PROBE, every=every)
        assert [step for step in range(8) if prober(network(), step)] == steps


# Time --------------------------------------------------------------------------------------------


def test_the_time_of_a_step_is_shared_out(monkeypatch: pytest.MonkeyPatch, logged: Any) -> None:
    now, given = [0.0], {}

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    def taking(takes: float, name: str) -> Any:
        def function(model: Any, probe: Any, *, seconds: Any, progress: Any, to: Any) -> Any:
            given[name] = seconds
            now[0] += takes
            return xr.Dataset()

        return function

    monkeypatch.setattr(module, "time", Clock)
    probes = {"long": taking(20, "long"), "short": taking(1, "short"), "last": taking(50, "last")}
    Prober(probes, PROBE, seconds=60)(network(), 0)
    assert given == {"long": 20, "short": 20, "last": 39}
    Prober(probes, PROBE, seconds=None)(network(), 0)
    assert given == {"long": None, "short": None, "last": None}

    def own(seconds: Any) -> Any:
        def function(model: Any, probe: Any, *, seconds: Any, progress: Any, to: Any) -> Any:
            given["own"] = seconds
            return xr.Dataset()

        return partial(function, seconds=seconds)

    for seconds, expected in [(5, 5), (100, 60), (None, 60)]:
        Prober(own(seconds), PROBE, seconds=60)(network(), 0)
        assert given["own"] == expected
    probes = {"long": taking(100, "long"), "never": taking(1, "never")}
    assert list(Prober(probes, PROBE, seconds=60)(network(), 0)) == ["long"]
    assert "never" not in given
    assert "never is missing at step 0" in logged.pop()
    assert not logged


def test_what_is_out_of_time_is_kept(tmp_path: Path) -> None:
    found = Prober(endless, PROBE, seconds=0.05, to=tmp_path)(network(), 0)["endless"]
    assert found.attrs["stopped"] == "out of time"
    kept = landscape.open(tmp_path)["endless"]
    assert kept.pieces.values.tolist() == [float(found.pieces)]
    assert kept.stopped.values.tolist() == ["out of time"]


KILLED = """
import sys
from nettrace.landscape import Prober, run
run_module = sys.modules["nettrace.landscape.run"]
run_module._BETWEEN = 0.0
import test_probes
Prober(test_probes.endless, test_probes.PROBE, to=sys.argv[1], seconds=None)(
    test_probes.network(), 20
)
"""


def test_a_probe_that_is_killed_keeps_what_it_had(tmp_path: Path) -> None:
    Prober(endless, PROBE, to=tmp_path, seconds=0.05)(network(), 10)
    root = Path(__file__).parents[2]
    paths = [root, root / "tests", root / "tests" / "landscape"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"},
    )
    file = tmp_path / "endless" / "step_00000020.nc"
    try:
        while not file.exists():
            assert process.poll() is None, "the process ended by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = landscape.open(tmp_path)["endless"]
    assert found.stopped.values.tolist() == ["out of time", "unfinished"]
    assert (found.pieces.values > 0).all()
    # It is found again where it is asked for again.
    assert Prober(endless, PROBE, to=tmp_path, seconds=0.05)(network(), 20)
    assert landscape.open(tmp_path)["endless"].stopped.values[1] == "out of time"


def test_an_interruption_keeps_the_result_and_reaches_the_training(tmp_path: Path) -> None:
    probes = {"one": partial(endless, deed=interrupt), "two": value}
    prober, model, reached = Prober(probes, PROBE, to=tmp_path), network(), []
    before = training.state(model)
    with pytest.raises(KeyboardInterrupt):
        reached += prober.each(model, 3)
    ((name, found),) = reached or [("one", landscape.open(tmp_path)["one"].isel(step=0))]
    assert (name, int(found.pieces)) == ("one", 3)
    assert landscape.open(tmp_path)["one"].stopped.values.tolist() == ["interrupted"]
    assert training.differences(before, training.state(model)) == []
    with pytest.raises(KeyboardInterrupt):
        prober(model, 4)
    assert sorted(landscape.open(tmp_path)) == ["one"]


# Faults ------------------------------------------------------------------------------------------


def test_a_function_that_fails_is_reported_once_and_keeps_what_it_had(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nettrace.landscape.run"], "_BETWEEN", 0.0)
    reasons = iter(["at 1.5", "at 2.5", "of another kind", "at 3.5"])
    probes = {"bad": partial(endless, deed=lambda: fails(next(reasons))), "good": value}
    prober = Prober(probes, PROBE, to=tmp_path)
    found = train(network(), 3, prober)
    assert training.differences(train(network(), 3), found) == []
    assert [text.split(".")[0] for text in logged] == [
        "bad is missing at step 0: ArithmeticError: at 1",
        "bad is missing at step 2: ArithmeticError: of another kind",
    ]
    logged.clear()
    results = landscape.open(tmp_path)
    assert results["good"].number.values.tolist() == [1, 1, 1, 1]
    assert results["good"].stopped.values.tolist() == ["done"] * 4
    assert results["bad"].stopped.values.tolist() == ["failed"] * 4
    assert results["bad"].missing.values[2] == "ArithmeticError: of another kind"
    assert results["bad"].pieces.values.tolist() == [1] * 4
    with pytest.raises(ArithmeticError):
        Prober(partial(endless, deed=fails), PROBE, on_error="raise")(network(), 0)


def test_losses_that_are_not_finite_are_reported(tmp_path: Path, logged: list[str]) -> None:
    model = network()
    model[4].weight.data.fill_(np.nan)
    probes = [partial(slice_1d, points=3), partial(barrier, other=network(), points=3)]
    assert Prober(probes, PROBE, to=tmp_path)(model, 5) == {}
    assert len(logged) == 2
    assert all("is nan" in text for text in logged)
    logged.clear()
    for one in landscape.open(tmp_path).values():
        assert one.stopped.values.tolist() == ["failed"]
        assert "is nan" in str(one.missing.values[0])
        assert not one.data_vars


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "file").write_text("")
    assert Prober(value, PROBE, to=tmp_path / "file")(network(), 0) == {}
    assert "value is missing at step 0: NotADirectoryError" in logged.pop()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"functions": barrier}, TypeError, "missing a required argument: 'other'; functools"),
        ({"functions": landscape.match}, TypeError, "match cannot be called as match"),
        ({"functions": [value, value]}, ValueError, "two functions are called 'value'"),
        ({"functions": {"a/b": value}}, ValueError, "names that folders can have, got 'a/b'"),
        ({"functions": {"..": value}}, ValueError, "names that folders can have"),
        ({"functions": lambda *_, **__: None}, ValueError, "got '<lambda>'"),
        ({"functions": []}, ValueError, "got none"),
        ({"functions": ["slice_1d"]}, TypeError, "to be a function such as .*slice_1d, got str"),
        ({"functions": {"a": 3}}, TypeError, "expected a to be a function"),
        ({"probe": SAMPLES.inputs}, TypeError, "expected a nettrace.Probe, got Tensor"),
        ({"seconds": 0}, ValueError, "expected seconds= to be positive"),
        ({"seconds": float("nan")}, ValueError, "expected seconds= to be positive"),
        ({"to": 3}, TypeError, "expected to= to be a folder's path, got int"),
        ({"on_error": "ignore"}, ValueError, "'record' or 'raise', got 'ignore'"),
        ({"every": []}, ValueError, "never fires"),
    ],
)
def test_bad_arguments_are_named(options: Data, error: type[Exception], says: str) -> None:
    given = {"functions": value, "probe": PROBE, **options}
    with pytest.raises(error, match=says):
        Prober(given.pop("functions"), given.pop("probe"), **given)


def test_a_function_that_returns_something_else_is_reported(logged: list[str]) -> None:
    Prober({"odd": lambda *_, **__: 3.0}, PROBE)(network(), 0)
    assert "expected odd to return an xarray.Dataset, got float" in logged.pop()


# What is there already ---------------------------------------------------------------------------


def test_what_is_there_of_the_same_is_not_found_again(tmp_path: Path) -> None:
    model, to = network(), tmp_path

    def probes(function: Any = value, probe: nt.Probe = PROBE, **options: Any) -> list[str]:
        return sorted(Prober(function, probe, to=to, **options)(model, 0))

    assert probes() == ["value"]
    assert probes() == []
    assert probes(partial(value, number=2.0)) == ["value"]
    assert probes(partial(value, number=2.0)) == []
    assert float(landscape.open(to)["value"].number[0]) == 2
    others = nt.Probe(SAMPLES.inputs, SAMPLES.targets, likelihood="categorical")
    assert probes(probe=others) == ["value"]
    assert probes(probe=PROBE.take(slice(0, 8))) == ["value"]
    model[1].running_mean.add_(1)
    assert probes(probe=PROBE.take(slice(0, 8))) == ["value"]
    model[0].weight.data[0, 0] += 1e-6
    assert probes() == ["value"]
    assert probes() == []
    file = to / "value" / "step_00000000.nc"
    file.write_bytes(file.read_bytes()[:100])
    assert probes() == ["value"]
    # What was out of time is found again where there is more.
    assert probes(endless, seconds=0.04) == ["endless"]
    assert probes(endless, seconds=0.04) == []
    assert probes(endless, seconds=0.02) == []
    assert probes(endless, seconds=0.05) == ["endless"]


# On checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of checkpoints, and of what was found while they were made."""
    probes = [partial(slice_1d, points=3, direction="hessian"), *others()]
    prober = Prober(probes, PROBE, every=2, to=tmp_path / "live")
    (tmp_path / "saved").mkdir()

    def look(model: nn.Module, step: int) -> None:
        prober(model, step)
        if step % 2 == 0:
            torch.save(model.state_dict(), tmp_path / "saved" / f"step={step}.pt")

    train(network(), 4, look)
    return tmp_path / "saved", tmp_path / "live"


def others() -> list[Any]:
    return [partial(barrier, other=network().state_dict(), points=3)]


def test_a_checkpoint_gives_what_the_training_gave(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    saved, live = trained
    model = network()
    before = training.state(model)
    probes = [partial(slice_1d, points=3, direction="hessian"), *others()]
    options: Data = {"model": model, "progress": False}
    found = probe_checkpoints(saved, probes, PROBE, to=tmp_path / "offline", **options)
    assert training.differences(before, training.state(model)) == []
    for name, expected in landscape.open(live).items():
        assert expected.step.values.tolist() == [0, 2, 4]
        xr.testing.assert_equal(found[name].drop_vars("seconds"), expected.drop_vars("seconds"))
    for file in live.rglob("*.nc"):
        assert (tmp_path / "offline" / file.relative_to(live)).is_file()


def test_what_the_training_has_found_is_not_found_again(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, live = trained
    (live / "slice_1d" / "step_00000002.nc").unlink()
    written = []

    def noted(found: xr.Dataset, path: Path) -> None:
        written.append(path.name)
        write(found, path)

    monkeypatch.setattr(module, "write", noted)
    probes = [partial(slice_1d, points=3, direction="hessian"), *others()]
    for _ in range(2):
        found = probe_checkpoints(saved, probes, PROBE, to=live, model=network, progress=False)
        assert written == ["step_00000002.nc"]
    assert found["slice_1d"].stopped.values.tolist() == ["done"] * 3


def test_checkpoints_that_cannot_be_used_are_reported(
    trained: tuple[Path, Path], tmp_path: Path, logged: list[str]
) -> None:
    saved, _ = trained
    (saved / "step=6.pt").write_bytes(b"PK nothing")
    torch.save(nn.Linear(2, 2).state_dict(), saved / "step=8.pt")
    options: Data = {"model": network, "progress": False, "to": tmp_path / "some"}
    found = probe_checkpoints(saved, value, PROBE, **options)
    assert found["value"].step.values.tolist() == [0, 2, 4]
    assert len(logged) == 2
    assert "step=8.pt cannot be probed: CheckpointError" in logged[1]
    logged.clear()
    with pytest.raises(nt.checkpoints.CheckpointError):
        probe_checkpoints(saved, value, PROBE, on_error="raise", **options)
    with pytest.raises(nt.checkpoints.CheckpointError, match="does not fit"):
        probe_checkpoints(saved / "step=8.pt", value, PROBE, **options)


# Reading -----------------------------------------------------------------------------------------


def test_results_of_any_shapes_are_joined(tmp_path: Path) -> None:
    def result(n: int, shift: float, draws: int, layers: list[str]) -> xr.Dataset:
        return xr.Dataset(
            {
                "loss": ("x", np.arange(n) + shift, {"convention": "in nats"}),
                "drawn": (("chain", "draw"), np.ones((2, draws))),
                "free": ("anything", np.ones(draws)),
                "of_layer": ("layer", np.arange(len(layers)) * 1.0),
                "count": ((), 3),
            },
            {"x": np.arange(n) + shift, "draw": np.arange(draws), "layer": layers},
            {"stopped": "done", "seconds": 1.5, "doubts": "", "seed": 0, "other": shift},
        )

    results = [result(5, 0.0, 3, ["a", "b"]), result(5, 0.5, 4, ["b", "c"])]
    results += [result(6, 0.5, 4, ["b"]).drop_vars("count"), xr.Dataset()]
    results[-1].attrs |= {"stopped": "failed", "missing": "it is said why"}
    for step, one in enumerate(results):
        write(one, folder.file_of(tmp_path, "mixed", step))
    found = landscape.open(tmp_path)["mixed"]
    assert found.loss.dims == found.x.dims == ("step", "x_index")
    np.testing.assert_array_equal(found.loss[2], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    np.testing.assert_array_equal(found.loss[:2, 5], [np.nan, np.nan])
    np.testing.assert_array_equal(found.x.values, found.loss.values)
    assert found.loss.attrs["convention"] == "in nats"
    np.testing.assert_array_equal(found.drawn.isel(chain=0)[0], [1, 1, 1, np.nan])
    np.testing.assert_array_equal(found.free[0], [1, 1, 1, np.nan])
    assert found.of_layer.sel(step=1, layer="b") == 0
    assert np.isnan(found.of_layer.sel(step=1, layer="a"))
    np.testing.assert_array_equal(found["count"], [3, 3, np.nan, np.nan])
    assert found.stopped.values.tolist() == ["done", "done", "done", "failed"]
    assert found.missing.values.tolist() == ["", "", "", "it is said why"]
    np.testing.assert_array_equal(found.seconds, [1.5, 1.5, 1.5, np.nan])
    assert found.attrs == {"seed": 0}
    assert found.sel(step=1).loss.size == 6


def test_large_integers_are_kept_as_floating_numbers(tmp_path: Path) -> None:
    given = xr.Dataset({"flips": ((), 2**40), "few": ((), 5)}, attrs={"seed": 2**40, "n": 3})
    write(given, tmp_path / "file.nc")
    found = folder.read(tmp_path / "file.nc")
    assert (found.flips, found.few, found.attrs["seed"], found.attrs["n"]) == (2**40, 5, 2**40, 3)


def test_files_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    prober = Prober(value, PROBE, to=tmp_path)
    for step in (0, 1, 100_000_000):
        prober(network(), step)
    file = tmp_path / "value" / "step_00000001.nc"
    file.write_bytes(file.read_bytes()[:50])
    (tmp_path / "value" / ".step_00000003.nc.17").write_bytes(b"what a killed process left")
    with pytest.warns(UserWarning, match=r"step_00000001.nc holds no result .*: it is left out"):
        found = landscape.open(tmp_path)
    assert found["value"].step.values.tolist() == [0, 100_000_000]
    with pytest.raises(FileNotFoundError, match="there are no results of probes in"):
        landscape.open(tmp_path / "value")


# Several processes -------------------------------------------------------------------------------

TOGETHER = """
import json, sys, time
import torch.distributed as dist
import test_probes
from nettrace import ranks
from nettrace.landscape import Prober
ranks.PATIENCE = 0.5
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/met", rank=rank, world_size=2)
prober = Prober(test_probes.value, test_probes.PROBE, to=sys.argv[1])
apart = Prober(test_probes.slow, test_probes.PROBE, to=sys.argv[1])
model = test_probes.network()
found = [sorted(prober(model, 0)), sorted(apart(model, 0))]
there = (test_probes.Path(sys.argv[1]) / "slow" / "step_00000000.nc").exists()
if rank == 0:
    found.append(sorted(prober(model, 1)))  # waits for nobody
dist.barrier()
if rank == 1:
    found.append(sorted(prober(model, 2)))  # waits for a while
dist.barrier()
print(json.dumps([found, there]))
"""


def slow(model: Any, probe: Any, **_: Any) -> xr.Dataset:
    time.sleep(1.0)  # longer than the others have patience for one that does not come
    return xr.Dataset()


def test_of_several_processes_the_first_probes_alone(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    paths = [root, root / "tests", root / "tests" / "landscape"]
    environment = {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0].strip() == '[[["value"], ["slow"], ["value"]], true]'
    assert outputs[1][0].strip() == "[[[], [], []], true]"
    assert "did not come to work for the others in 0 s" in outputs[1][1].replace("0.5", "0")
    assert "did not come" not in outputs[0][1]
