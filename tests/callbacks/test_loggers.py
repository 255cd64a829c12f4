"""What reaches loggers is what stands in the trace, under the step at which it was measured."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training
import xarray as xr

import nettrace as nt
from nettrace.callbacks import NTKTrace, Trace
from nettrace.callbacks.loggers import send

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

SCALARS = ("trace", "entropy", "entropy_normalised", "effective_rank", "entropy_traced")


@dataclass
class Run:
    """What a training left in its loggers."""

    trace: xr.Dataset
    rows: list[dict[str, Any]]
    axes: dict[str, str]
    files: Path
    csv: Path
    events: Any

    def column(self, name: str) -> dict[int, Any]:
        """A W&B column, by our step."""
        return {row["nettrace/step"]: row[name] for row in self.rows if name in row}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training whose weights are no numbers while step 4 is measured."""
    import wandb
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Poison(Callback):  # comes before ours
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                module.healthy = module.net[0].weight.detach().clone()
                module.net[0].weight.data.fill_(torch.nan)

    class Sick(training.network()):
        def on_train_batch_end(self, *_: Any) -> None:  # runs after those of callbacks
            if self.global_step == 4:
                self.net[0].weight.data.copy_(self.healthy)

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            WandbLogger(save_dir=folder, offline=True),
            CSVLogger(folder, name="csv", version=0),
            TensorBoardLogger(folder, name="tensorboard", version=0),
        ]
        callbacks = [
            Poison(),
            NTKTrace(every=2, to=folder / "trace"),
            Trace(
                ["fisher", "collective/magnitude_distribution_papyrus"],
                every=3,
                to=folder / "trace",
                prefix="probe/",
            ),
        ]
        with pytest.warns(nt.MissingMeasureWarning, match="NaN"):
            training.fit(callbacks, Sick(), logger=loggers, max_steps=6, log_every_n_steps=3)
        loggers[0].experiment.finish()
        wandb.teardown()  # only then is all of it in the file
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(training.read_wandb(path))
    assert any(r.WhichOneof("record_type") == "exit" for r in records)  # the file is whole
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    return Run(
        nt.open(folder / "trace"),
        [row for row in training.history(records) if "nettrace/step" in row],
        {m.name or m.glob_name: m.step_metric for m in metrics},
        path.parent / "files",
        folder / "csv" / "version_0",
        EventAccumulator(str(folder / "tensorboard" / "version_0")).Reload(),
    )


def stored(run: Run, name: str) -> dict[int, float]:
    """A scalar of the trace, by the steps at which it was found."""
    values = run.trace[name.replace("/", "_")].dropna("step")
    return dict(zip(values.step.values.tolist(), values.values.tolist(), strict=True))


def test_the_trace_holds_what_the_others_are_compared_with(run: Run) -> None:
    assert sorted(stored(run, "ntk/trace")) == [0, 2, 6]
    assert sorted(stored(run, "fisher/trace")) == [0, 3, 6]


@pytest.mark.parametrize("name", SCALARS)
def test_wandb_has_the_values_of_the_trace_under_their_steps(run: Run, name: str) -> None:
    assert run.column(f"ntk/{name}") == stored(run, f"ntk/{name}")


def test_wandb_has_what_is_labelled_label_by_label(run: Run) -> None:
    shares = run.trace.ntk_trace_per_layer.dropna("step")
    for layer in shares.layer.values:
        expected = dict(zip(shares.step.values, shares.sel(layer=layer).values, strict=True))
        assert run.column(f"ntk/trace_per_layer/{layer}") == expected


def test_wandb_gets_its_rows_in_the_order_of_steps(run: Run) -> None:
    steps = [row["nettrace/step"] for row in run.rows if "ntk/trace" in row]
    assert steps == [0, 2, 6]
    everything = [row["nettrace/step"] for row in run.rows]
    assert everything == sorted(everything)


def test_wandb_draws_each_of_our_keys_over_our_step(run: Run) -> None:
    bound = {name for name, axis in run.axes.items() if axis == "nettrace/step"}
    ours = {key for row in run.rows for key in row if not key.startswith(("_", "trainer/"))}
    media = {key.rpartition(".")[0] for key in ours if key.endswith("._type")}
    plain = {key for key in ours if not any(key.startswith(name + ".") for name in media)}
    kernel = "gram spectrum spectrum_traced class_blocks residual_modes decay_rates".split()
    kernel += ["rotation_first", "rotation_previous"]
    beside = {name for name in media if "figures/" in name or "final_values" in name}
    # Of which tests/dashboard/test_logged.py tells; old versions of W&B would wait for its server.
    assert bool(beside) == (tuple(map(int, version("wandb").split(".")[:2])) >= (0, 31))
    assert media - beside == {
        "probe/collective/magnitude_distribution_papyrus",
        *(f"ntk/{name}" for name in kernel),
    }
    assert (plain | media) - {"nettrace/step"} == bound


def test_wandb_rows_say_nothing_wrong_of_lightnings_own_step(run: Run) -> None:
    found = {row["nettrace/step"]: row.get("trainer/global_step") for row in run.rows}
    assert all(theirs in (None, ours) for ours, theirs in found.items()), found


def test_wandb_gets_spectra_as_histograms(run: Run) -> None:
    spectrum = run.trace.ntk_spectrum.dropna("step")
    assert set(run.column("ntk/spectrum._type").values()) == {"histogram"}
    for step, counts in run.column("ntk/spectrum.values").items():
        bins = run.column("ntk/spectrum.bins")[step]
        expected, _ = np.histogram(spectrum.sel(step=step).values, bins)
        assert counts == expected.tolist()
        assert sum(counts) == spectrum.sizes["mode"]


def test_wandb_gets_kernels_as_pictures_that_are_darkest_where_they_are_largest(run: Run) -> None:
    from PIL import Image

    kernel = run.trace.ntk_gram.dropna("step")
    assert sorted(run.column("ntk/gram._type")) == [0, 2, 6]
    for step, path in run.column("ntk/gram.path").items():
        found = np.abs(kernel.sel(step=step).values)
        side = found.shape[0] * found.shape[1]
        expected = 255 * (1 - found.reshape(side, side) / found.max())
        levels = np.asarray(Image.open(run.files / path).convert("L"), dtype=float)
        assert np.abs(levels - expected).max() <= 1  # levels are whole numbers


@pytest.mark.parametrize("name", SCALARS)
def test_csv_has_the_values_of_the_trace_under_their_steps(run: Run, name: str) -> None:
    found = training.column(run.csv, f"ntk/{name}")
    assert {step: float(text) for step, text in found.items()} == stored(run, f"ntk/{name}")


def test_csv_has_our_step_beside_lightnings(run: Run) -> None:
    steps = {step: int(text) for step, text in training.column(run.csv, "nettrace/step").items()}
    assert steps == {step: step for step in (0, 2, 3, 4, 6)}


@pytest.mark.parametrize("name", SCALARS)
def test_tensorboard_has_the_values_of_the_trace_under_their_steps(run: Run, name: str) -> None:
    found = {event.step: event.value for event in run.events.Scalars(f"ntk/{name}")}
    expected = stored(run, f"ntk/{name}")
    assert found == {step: float(np.float32(value)) for step, value in expected.items()}


def test_what_is_missing_is_in_no_logger(run: Run) -> None:
    assert "4" in json.loads(run.trace.ntk_trace.attrs["missing"])
    assert {key for row in run.rows if row["nettrace/step"] == 4 for key in row} <= {
        *("nettrace/step", "nettrace/seconds", "trainer/global_step"),
        *("_step", "_runtime", "_timestamp"),
    }
    assert 4 not in training.column(run.csv, "ntk/trace")
    assert 4 not in [event.step for event in run.events.Scalars("ntk/trace")]


@pytest.mark.parametrize("name", ["trace", "trace_mc", "trace_mc_standard_error"])
def test_a_prefix_is_put_before_each_name_and_stays_out_of_the_trace(run: Run, name: str) -> None:
    expected = stored(run, f"fisher/{name}")
    assert sorted(expected) == [0, 3, 6]
    assert run.column(f"probe/fisher/{name}") == expected
    found = training.column(run.csv, f"probe/fisher/{name}")
    assert {step: float(text) for step, text in found.items()} == expected
    found = {event.step: event.value for event in run.events.Scalars(f"probe/fisher/{name}")}
    assert found == {step: float(np.float32(value)) for step, value in expected.items()}


def test_nothing_is_logged_without_its_prefix(run: Run) -> None:
    names = {*run.events.Tags()["scalars"], *(key for row in run.rows for key in row)}
    assert any(name.startswith("probe/fisher/") for name in names)
    assert any(name.startswith("probe/collective/") for name in names)
    assert not any(name.startswith(("fisher/", "collective/")) for name in names)


# Several probes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A training that is measured on probes of two sizes, and its trainer."""
    import wandb
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("several")
    samples = training.Samples()
    probes = {
        name: nt.Probe(samples.inputs[:n], samples.targets[:n])
        for name, n in (("train", 6), ("val", 4))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            WandbLogger(save_dir=folder, offline=True),
            CSVLogger(folder, name="csv", version=0),
            TensorBoardLogger(folder, name="tensorboard", version=0),
        ]
        callback = Trace(["ntk", "fisher"], probe=probes, every=2, to=folder / "trace")
        trainer = training.fit(callback, logger=loggers, max_steps=4)
        loggers[0].experiment.finish()
        wandb.teardown()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(training.read_wandb(path))
    run = Run(
        nt.open(folder / "trace"),
        [row for row in training.history(records) if "nettrace/step" in row],
        {},
        path.parent / "files",
        folder / "csv" / "version_0",
        EventAccumulator(str(folder / "tensorboard" / "version_0")).Reload(),
    )
    return run, trainer


@pytest.mark.parametrize("probe", ["train", "val"])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("ntk/trace", ""), ("fisher/trace_mc", ""), ("fisher/trace_mc", "_standard_error")],
)
def test_loggers_get_the_numbers_of_each_probe(
    probe: str, name: str, suffix: str, several: tuple[Run, Any]
) -> None:
    run, trainer = several
    stored = run.trace[name.replace("/", "_") + suffix].sel(probe=probe)
    expected = dict(zip(stored.step.values.tolist(), stored.values.tolist(), strict=True))
    assert list(expected) == [0, 2, 4]
    key = f"{name}/{probe}{suffix}"
    assert run.column(key) == expected
    found = {step: float(text) for step, text in training.column(run.csv, key).items()}
    assert found == expected
    found = {event.step: event.value for event in run.events.Scalars(key)}
    assert found == {step: float(np.float32(value)) for step, value in expected.items()}
    assert float(trainer.callback_metrics[key]) == np.float32(expected[4])


def test_wandb_gets_what_is_an_array_on_each_probe(several: tuple[Run, Any]) -> None:
    run, _ = several
    shares = run.trace.ntk_trace_per_layer
    for probe, size in (("train", 6), ("val", 4)):
        for layer in shares.layer.values:
            expected = shares.sel(layer=layer, probe=probe)
            found = run.column(f"ntk/trace_per_layer/{probe}/{layer}")
            assert list(found.values()) == expected.values.tolist()
        counts = run.column(f"ntk/spectrum/{probe}.values")
        assert {sum(one) for one in counts.values()} == {3 * size}  # without what was padded
        assert set(run.column(f"ntk/gram/{probe}._type").values()) == {"image-file"}
    assert set(run.column("ntk/cross/train-val._type").values()) == {"image-file"}


# A logger that is not as it should be ------------------------------------------------------------


class FakeRun:
    """Takes what a W&B run takes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def sent(*records: nt.Record) -> dict[str, Any]:
    """The row that W&B gets of some records."""

    class WandbLogger(SimpleNamespace):
        """What tells a W&B logger from others is its name, in either namespace."""

    run = FakeRun()
    send(WandbLogger(experiment=run), records, "", step=3)
    (row,) = run.rows
    assert row.pop("trainer/global_step") == 3
    return row


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=["a spectrum", "a kernel"])
def test_arrays_that_cannot_be_drawn_do_not_keep_the_rest_away(
    value: float, shape: tuple[int, ...]
) -> None:
    array = nt.Record("ntk/array", 3, np.full(shape, value), dims=("a", "b")[: len(shape)])
    row = sent(array, nt.Record("ntk/trace", 3, np.asarray(1.5)))
    assert row == {"ntk/trace": 1.5, "nettrace/step": 3}


def test_complex_numbers_are_two() -> None:
    sent: dict[str, Any] = {}
    logger = SimpleNamespace(log_metrics=lambda numbers, step: sent.update(numbers))
    send(logger, [nt.Record("a/z", 3, np.array(1 - 2j), np.array(0.5))], "p/", 3)
    values = {"p/a/z.re": 1.0, "p/a/z.im": -2.0, "p/a/z_standard_error": 0.5}
    assert sent == {**values, "nettrace/step": 3}


def test_a_kernel_of_zeros_is_white() -> None:
    picture = sent(nt.Record("ntk/gram", 0, np.zeros((2, 3, 2, 3)), dims=("a", "b", "c", "d")))
    levels = np.asarray(picture["ntk/gram"].image.convert("L"))
    assert levels.shape == (6, 6)
    assert (levels == 255).all()


def test_numbers_arrive_where_pictures_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image"):  # `pip install wandb` does not bring it
        monkeypatch.setitem(sys.modules, name, None)
    kernel = nt.Record("ntk/gram", 3, np.eye(4).reshape(2, 2, 2, 2), dims=("a", "b", "c", "d"))
    row = sent(kernel, nt.Record("ntk/trace", 3, np.asarray(4.0)))
    assert row["ntk/trace"] == 4.0


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_other_loggers_do_without_wandb_in_a_dry_run(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    trainer = training.fit(
        NTKTrace(every=1), namespace=namespace, fast_dev_run=True, logger=True,
        default_root_dir=tmp_path,
    )  # fmt: skip
    assert "ntk/trace" in trainer.callback_metrics


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_nothing_is_logged_where_that_is_not_asked_for(namespace: str, tmp_path: Path) -> None:
    """Lightning gives each callback a method `log`, in place of an attribute of that name."""
    callback = NTKTrace("ntk/trace", every=1, to=tmp_path, log=False)
    trainer = training.fit([callback], namespace=namespace)
    assert nt.open(tmp_path).step.size == 5
    assert not [name for name in trainer.callback_metrics if "/" in name]
