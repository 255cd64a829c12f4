"""The callback that probes the landscape: what it leaves, what it logs, what it never disturbs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
import xarray as xr

import nettrace as nt
from nettrace import landscape
from nettrace.callbacks import LandscapeProbe, Trace
from nettrace.landscape import barrier, learning_coefficient, probe_checkpoints, slice_1d
from nettrace.landscape.run import run

pytestmark = [
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
]

SAMPLES = training.Samples(seed=2)
PROBE = nt.Probe(SAMPLES.inputs, SAMPLES.targets)
SLICE = partial(slice_1d, points=3)
BETWEEN = partial(barrier, other=training.delicate()(), points=3)


def scalar(model: Any, probe: nt.Probe, *, deed: Any = lambda: None, **_: Any) -> xr.Dataset:
    """The sum of the weights, and what else a result may have."""
    deed()
    total = sum(float(p.detach().sum()) for p in model.parameters())
    return xr.Dataset(
        {
            "total": ((), total),
            "total_standard_error": ((), 0.5),
            "count": ((), 3),
            "unknown": ((), np.nan),
            "name": ((), "a text"),
            "several": ("x", np.ones(2)),
        }
    )


def outcome(namespace: str, callbacks: list[Any], folder: Path, **options: Any) -> dict[str, Any]:
    """Trains under all that can be disturbed, and gives all that came of it."""
    training.seed()
    model = training.delicate(namespace)()
    logger = import_module(f"{namespace}.loggers").CSVLogger(folder, version=0)
    trainer = training.fit(
        callbacks,
        model,
        training.loader(training.Augmented(), shuffle=True),
        training.loader(training.Augmented(seed=1)),
        namespace=namespace,
        logger=logger,
        **{"max_steps": 4, "accumulate_grad_batches": 2, **options},
    )
    return training.result(trainer, model)


# The training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
@pytest.mark.parametrize("probe", [None, PROBE])
def test_training_is_bitwise_the_same_with_probes(
    namespace: str, probe: nt.Probe | None, tmp_path: Path
) -> None:
    probes = [SLICE, BETWEEN, scalar]
    callbacks = [LandscapeProbe(probes, every=1, probe=probe, to=tmp_path / "found", samples=8)]
    bare = outcome(namespace, [], tmp_path / "bare")
    assert training.differences(bare, outcome(namespace, callbacks, tmp_path / "probed")) == []
    found = landscape.open(tmp_path / "found")
    assert sorted(found) == ["barrier", "scalar", "slice_1d"]
    for one in found.values():
        assert one.step.values.tolist() == [0, 1, 2, 3, 4]
        assert one.stopped.values.tolist() == ["done"] * 5
    assert np.isfinite(found["barrier"].barrier.values).all()
    assert found["slice_1d"].attrs["samples"] == (8 if probe is None else 16)


def test_whatever_a_function_does_is_undone(tmp_path: Path) -> None:
    def careless(model: Any, probe: nt.Probe, **_: Any) -> xr.Dataset:
        for name, (disturb, _) in training.CARELESS.items():
            if name != "leaves a hook":  # which is not one's own to take away
                disturb(model)
        model(probe.inputs)
        model.log("careless", 1.0)
        return xr.Dataset()

    callbacks = [LandscapeProbe(careless, every=1, probe=PROBE, to=tmp_path / "found")]
    bare = outcome(training.NAMESPACES[0], [], tmp_path / "bare")
    found = outcome(training.NAMESPACES[0], callbacks, tmp_path / "probed")
    assert training.differences(bare, found) == []
    assert landscape.open(tmp_path / "found")["careless"].stopped.values.tolist() == ["done"] * 5


def test_it_goes_with_a_trace(tmp_path: Path) -> None:
    probes = LandscapeProbe(scalar, every=2, probe=PROBE, to=tmp_path / "found")
    trace = Trace("loss", every=2, probe=PROBE, to=tmp_path / "trace")
    training.fit([trace, probes])
    assert nt.open(tmp_path / "trace").step.values.tolist() == [0, 2, 4]
    assert landscape.open(tmp_path / "found")["scalar"].step.values.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (3, {}, [0, 3]),
        ("log", {}, [0, 1, 2, 3, 4]),
        ([2], {}, [2]),
        (nt.with_last(3), {}, [0, 3, 4]),
        (nt.with_last(3), {"max_steps": 100, "max_epochs": 2}, [0, 3, 6, 8]),
        (nt.epochs(1), {"max_steps": 8}, [0, 4, 8]),
    ],
)
def test_schedules_say_when(every: Any, options: Any, steps: list[int], tmp_path: Path) -> None:
    training.fit([LandscapeProbe(scalar, every=every, probe=PROBE, to=tmp_path)], **options)
    assert landscape.open(tmp_path)["scalar"].step.values.tolist() == steps


def test_the_last_step_is_that_at_which_the_training_ends(tmp_path: Path) -> None:
    class Stops(training.network()):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.global_step == 2

    every = nt.with_last(100)
    training.fit([LandscapeProbe(scalar, every=every, probe=PROBE, to=tmp_path)], Stops())
    assert landscape.open(tmp_path)["scalar"].step.values.tolist() == [0, 2]


def test_a_run_that_is_resumed_goes_on(tmp_path: Path) -> None:
    called = []
    probe = partial(scalar, deed=lambda: called.append(1))
    options: Any = {"every": 2, "probe": PROBE, "to": tmp_path / "found"}
    first = training.fit([LandscapeProbe({"sum": probe}, **options)])
    first.save_checkpoint(tmp_path / "step=4.ckpt")
    assert len(called) == 3
    again = LandscapeProbe({"sum": probe}, **options)
    training.fit([again], max_steps=6, ckpt_path=tmp_path / "step=4.ckpt")
    assert landscape.open(tmp_path / "found")["sum"].step.values.tolist() == [0, 2, 4, 6]


# Loggers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_numbers_reach_loggers_and_can_be_monitored(namespace: str, tmp_path: Path) -> None:
    logger = import_module(f"{namespace}.loggers").CSVLogger(tmp_path, version=0)
    probes = LandscapeProbe({"mine": scalar, "slice_1d": SLICE}, every=2, probe=PROBE)
    trainer = training.fit([probes], namespace=namespace, logger=logger)
    model = training.network(namespace)()
    first = sum(float(p.detach().sum()) for p in model.parameters())
    logged = training.column(logger.log_dict if False else logger.log_dir, "landscape/mine/total")
    assert len(logged) == 3
    assert float(next(iter(logged.values()))) == pytest.approx(first)
    errors = training.column(logger.log_dir, "landscape/mine/total_standard_error")
    assert set(map(float, errors.values())) == {0.5}
    assert set(training.column(logger.log_dir, "nettrace/step").values()) >= {"0", "2", "4"}
    ours = sorted(name for name in trainer.callback_metrics if name.startswith("landscape/"))
    names = ["count", "total", "total_standard_error"]
    assert ours == [f"landscape/mine/{name}" for name in names]
    quiet = LandscapeProbe({"mine": scalar}, every=2, probe=PROBE, log=False)
    assert not [n for n in training.fit([quiet]).callback_metrics if n.startswith("landscape/")]


def test_a_logger_that_fails_is_reported_once(logged: list[str], tmp_path: Path) -> None:
    logger = import_module("pytorch_lightning.loggers").CSVLogger(tmp_path)
    send = logger.log_metrics

    def fails(metrics: Any, step: Any) -> None:
        if any(name.startswith("landscape/") for name in metrics):
            raise OSError("no space left")
        send(metrics, step)

    logger.log_metrics = fails
    callback = LandscapeProbe(scalar, every=1, probe=PROBE, to=tmp_path / "found")
    training.fit([callback], logger=logger)
    assert logged.pop() == "LandscapeProbe cannot log to CSVLogger: OSError: no space left"
    assert landscape.open(tmp_path / "found")["scalar"].sizes["step"] == 5


# Faults ------------------------------------------------------------------------------------------


def fails() -> None:
    raise ArithmeticError("deliberately")


def fire(step: int) -> bool:
    raise ZeroDivisionError("in a schedule")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"probes": {"bad": partial(scalar, deed=fails)}},
            "bad is missing at step 0: ArithmeticError: deliberately",
        ),
        ({"every": fire}, "LandscapeProbe has a schedule that fails: ZeroDivisionError: in a"),
        ({"probe": None}, "LandscapeProbe cannot take a probe: TypeError: the trainer's data"),
        ({"every": [100]}, "LandscapeProbe never measured: its schedule did not fire in the 4"),
    ],
)
def test_what_goes_wrong_is_reported_once_and_ends_nothing(
    options: Any, says: str, logged: list[str]
) -> None:
    callback = LandscapeProbe(**{"probes": scalar, "every": 1, "probe": PROBE, **options})
    trainer = training.fit([callback], data=training.loader(training.Stream()))
    assert trainer.global_step == 4
    assert logged[0].startswith(says)
    assert len(logged) == 1 + (options.get("every") is fire)  # and that it never measured
    logged.clear()
    if "every" not in options or options["every"] is fire:
        callback.on_error = "raise"
        with pytest.raises((ArithmeticError, TypeError)):
            training.fit([callback], data=training.loader(training.Stream()))


class Interrupted:
    """A sampler in which somebody loses patience."""

    title, share = "interrupted", 0.0

    def advance(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def settle(self) -> None:
        return

    def result(self) -> xr.Dataset:
        return xr.Dataset({"there": ((), 1.0)}, attrs={"doubts": ""})


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_an_interruption_keeps_the_result_and_ends_the_training(
    namespace: str, tmp_path: Path
) -> None:
    def interrupted(model: Any, probe: Any, **how: Any) -> xr.Dataset:
        return run(Interrupted(), **how)

    logger = import_module(f"{namespace}.loggers").CSVLogger(tmp_path, version=0)
    callback = LandscapeProbe(interrupted, every=[2], probe=PROBE, to=tmp_path / "found")
    # A process that was started in the background ignores it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = training.trainer([callback], namespace=namespace, logger=logger)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(training.network(namespace)(), training.loader())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.global_step == 2
    assert landscape.open(tmp_path / "found")["interrupted"].stopped.values == ["interrupted"]
    assert training.column(logger.log_dir, "landscape/interrupted/there") == {2: "1.0"}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"probes": barrier}, TypeError, "missing a required argument: 'other'"),
        ({"probe": {"train": PROBE}}, TypeError, "expected probe= to be a nettrace.Probe"),
        ({"every": 0}, ValueError, "a period of at least 1"),
        ({"seconds": -1}, ValueError, "expected seconds= to be positive"),
        ({"on_error": "ignore"}, ValueError, "'record' or 'raise'"),
    ],
)
def test_bad_arguments_are_named_at_once(options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        LandscapeProbe(**{"probes": scalar, "every": 1, "probe": PROBE, **options})


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_a_checkpoint_gives_what_the_callback_gave(namespace: str, tmp_path: Path) -> None:
    callbacks = import_module(f"{namespace}.callbacks")
    saves = callbacks.ModelCheckpoint(
        tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=2
    )
    probes = [SLICE, BETWEEN]
    live = LandscapeProbe(probes, every=2, probe=PROBE, to=tmp_path / "live")
    outcome(namespace, [saves, live], tmp_path, enable_checkpointing=True)
    options: Any = {"model": training.delicate(namespace)(), "progress": False}
    found = probe_checkpoints(tmp_path / "saved", probes, PROBE, to=tmp_path / "later", **options)
    for name, expected in landscape.open(tmp_path / "live").items():
        assert expected.step.values.tolist() == [0, 2, 4]
        xr.testing.assert_equal(
            found[name].drop_vars("seconds"), expected.sel(step=[2, 4]).drop_vars("seconds")
        )
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "live").rglob("*.nc")}
    probe_checkpoints(tmp_path / "saved", probes, PROBE, to=tmp_path / "live", **options)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "live").rglob("*.nc")}


def test_the_learning_coefficient_is_the_same_live_and_afterwards(
    tmp_path: Path, logged: list[str]
) -> None:
    """Random streams of its own are the same at each step, whatever the training draws."""
    pytest.importorskip("arviz")
    probe = nt.Probe(SAMPLES.inputs, SAMPLES.targets)
    function = partial(learning_coefficient, chains=2, draws=40, warmup=20)
    callback = LandscapeProbe(function, every=[4], probe=probe, to=tmp_path / "live", seconds=None)
    trainer = training.fit([callback], max_steps=4)
    trainer.save_checkpoint(tmp_path / "step=4.ckpt")
    options: Any = {"model": training.network(), "progress": False, "to": tmp_path / "later"}
    found = probe_checkpoints(tmp_path / "step=4.ckpt", function, probe, **options)
    live = landscape.open(tmp_path / "live")["learning_coefficient"]
    xr.testing.assert_equal(
        live.drop_vars("seconds"), found["learning_coefficient"].drop_vars("seconds")
    )
    name = "landscape/learning_coefficient/learning_coefficient"
    value = float(live.learning_coefficient[0])
    assert float(trainer.callback_metrics[name]) == pytest.approx(value)
    assert f"{name}_standard_error" in trainer.callback_metrics
    logged.clear()  # of a network as fresh as this, all is to be doubted


# Several processes -------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from functools import partial
from pathlib import Path
import torch, training, xarray as xr
import nettrace as nt
from nettrace import ranks
from nettrace.callbacks import LandscapeProbe
from nettrace.landscape import slice_1d
from pytorch_lightning import Callback

folder, how = Path(sys.argv[1]), sys.argv[2]
ranks.PATIENCE = 0.5

def slow(model, probe, **_):
    time.sleep(1.0)  # longer than others have patience for one that does not come
    return xr.Dataset({"there": ((), 1.0)})

strategy = "ddp"
model = training.delicate()()
if how == "fsdp":
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    strategy = ModelParallelStrategy(2, 1)
    class Spread(training.network()):
        def configure_model(self):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
    model = Spread()
probes = LandscapeProbe([partial(slice_1d, points=3), slow], every=2, to=folder / "found")
callbacks = [] if how == "bare" else [probes]

class Monitors(Callback):
    def on_train_batch_end(self, trainer, *_):
        if how == "probed":
            assert float(trainer.callback_metrics["landscape/slow/there"]) == 1.0

callbacks.append(Monitors())
training.seed()
trainer = training.fit(callbacks, model, strategy=strategy, devices=2)
if how != "fsdp":
    torch.save(training.result(trainer, model), folder / f"{trainer.global_rank}-{how}.pt")
"""


def launched(folder: Path, how: str) -> str:
    """What two processes said."""
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_of_several_processes_the_first_probes_and_the_others_wait(tmp_path: Path) -> None:
    said = launched(tmp_path, "probed")
    assert "did not come to work" not in said
    launched(tmp_path, "bare")
    for rank in range(2):
        bare, probed = (
            torch.load(tmp_path / f"{rank}-{how}.pt", weights_only=False)
            for how in ("bare", "probed")
        )
        assert training.differences(bare, probed) == []
    found = landscape.open(tmp_path / "found")
    assert found["slice_1d"].step.values.tolist() == [0, 2, 4]
    assert found["slow"].stopped.values.tolist() == ["done"] * 3


@pytest.mark.slow
def test_parameters_that_are_spread_are_refused(tmp_path: Path) -> None:
    assert "its parameters are spread over processes: probe its checkpoints by" in launched(
        tmp_path, "fsdp"
    )
    assert not (tmp_path / "found").exists()


# Configurations ----------------------------------------------------------------------------------

MODULE = """
from functools import partial
import nettrace as nt, training
from nettrace.landscape import slice_1d
from lightning.pytorch.cli import LightningCLI

narrow = partial(slice_1d, points=3)

class Net(training.network("lightning.pytorch")):
    def train_dataloader(self):
        return training.loader()

def probe() -> nt.Probe:
    samples = training.Samples()
    return nt.Probe(samples.inputs, samples.targets)

if __name__ == "__main__":
    LightningCLI(Net)
"""
CONFIGURATION = """
seed_everything: 0
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
  - class_path: nettrace.callbacks.LandscapeProbe
    init_args:
      probes: {probes}
      every: 2
      to: found
      probe:
        class_path: declared_landscape.probe
"""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a LightningCLI with given probes; what was found."""
    pytest.importorskip("jsonargparse")
    (tmp_path / "declared_landscape.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    declared = import_module("declared_landscape")

    def configured(probes: str) -> dict[str, xr.Dataset]:
        Path("declared.yaml").write_text(CONFIGURATION.format(probes=probes))
        monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "declared.yaml"])
        declared.LightningCLI(declared.Net, save_config_kwargs={"overwrite": True})
        return landscape.open("found")

    yield configured
    sys.modules.pop("declared_landscape", None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("probes", "names"),
    [
        ("nettrace.landscape.slice_1d", {"slice_1d": 51}),
        ("[nettrace.landscape.slice_1d]", {"slice_1d": 51}),
        ("declared_landscape.narrow", {"slice_1d": 3}),
        (
            "{narrow: declared_landscape.narrow, wide: nettrace.landscape.slice_1d}",
            {"narrow": 3, "wide": 51},
        ),
    ],
)
def test_configurations_may_name_probes(cli: Any, probes: str, names: dict[str, int]) -> None:
    found = cli(probes)
    assert {name: one.sizes["x"] for name, one in found.items()} == names
    assert all(one.step.values.tolist() == [0, 2] for one in found.values())
