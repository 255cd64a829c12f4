"""A W&B workspace lists whatever the callbacks log, or says why it cannot be saved."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
import xarray as xr

import nettrace as nt
from nettrace import callbacks
from nettrace.callbacks.landscape import records
from nettrace.callbacks.loggers import STEP, numbers_of
from nettrace.cli import main

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

NAMES = [name for name in callbacks.__all__ if name != "LandscapeProbe"]


def specified(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What W&B would get."""
    assert main(["wandb-workspace", "me/digits", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def sections(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["spec"]["section"]["panelBankConfig"]["sections"]


def panels(document: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    for section in sections(document):
        for panel in section["panels"]:
            if panel["viewType"] == kind:
                yield panel["config"]


def lines(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Line plots by each of the names that they list."""
    plots = panels(document, "Run History Line Plot")
    return {name: plot for plot in plots for name in plot["metrics"]}


def is_shown(document: dict[str, Any], name: str) -> bool:
    plots = list(panels(document, "Run History Line Plot"))
    return name in lines(document) or any(
        re.search(plot["metricRegex"], name) for plot in plots if "metricRegex" in plot
    )


def logged_by(callback: Any) -> set[str]:
    """What the code that logs makes of a number by each of its measures, with errors."""
    found = [
        nt.Record(m.name, 0, np.array(1.0), np.array(0.1)) for m in callback.measures if not m.dims
    ]
    return set(numbers_of(found, callback.prefix))


@pytest.mark.parametrize("name", NAMES)
def test_it_lists_every_number_that_a_callback_logs(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = getattr(callbacks, name)()
    numbers = logged_by(callback) if hasattr(callback, "measures") else set()
    assert numbers or name == "LastLayerUncertainty"
    alone, all_ = specified(capsys, "--callbacks", name), specified(capsys)
    trainer = name == "TransformersTrace"
    for number in numbers:
        plot = lines(alone)[f"train/{number}" if trainer else number]
        assert plot["xAxis"] == ("train/global_step" if trainer else STEP)
        assert lines(all_)[number]["xAxis"] == STEP


def test_it_shows_all_that_a_training_logs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    logged: list[str],
) -> None:
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    given = [
        callbacks.Trace(every=2, budget=1.0),
        callbacks.Curvature(every=3),
        callbacks.Focusing(every=3),
        callbacks.RepresentationGeometry(every=3),
        callbacks.GradientStatistics(every=2),
        callbacks.WeightFluctuations(length=4),
    ]
    training.fit(given, logger=logger, max_steps=6)
    logger.experiment.finish()
    wandb.teardown()
    logged.clear()  # of a window this short, some measures are missing
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = training.history(list(training.read_wandb(path)))
    numbers = {
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, (int, float)) and "/" in name and not name.startswith("trainer/")
    }
    media = {k.removesuffix("._type") for row in rows for k in row if k.endswith("._type")}
    numbers = {n for n in numbers if not any(n.startswith(f"{one}.") for one in media)} - {STEP}
    assert {"nettrace/share", "nettrace/skipped", "nettrace/step_seconds", "ntk/trace"} <= numbers
    assert any(name.startswith("hessian/trace_per_layer/") for name in numbers)
    document = specified(capsys)
    assert [name for name in sorted(numbers) if not is_shown(document, name)] == []
    shown = {key for panel in panels(document, "Media Browser") for key in panel["mediaKeys"]}
    figures = {name for name in media if name.startswith("figures/")}
    assert any(" against " in name for name in figures)
    assert figures <= shown | {"figures/nettrace/seconds_per_measure"}
    assert "nettrace/final_values" in media
    assert '"nettrace/final_values"' in json.dumps(document)


@pytest.mark.parametrize("function", ["learning_coefficient", "langevin", "loss_density"])
def test_it_shows_what_probes_of_the_landscape_log(
    function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = xr.Dataset({"a": 1.0, "a_standard_error": 0.1})
    document = specified(capsys, "--prefix", "p/")
    for name in numbers_of(records(function, found, 0), ""):
        assert is_shown(document, name)


def test_names_are_as_callbacks_with_a_prefix_or_several_probes_log_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--measures", "fisher/trace", "ntk/trace_per_layer", "--prefix", "p/")
    document = specified(capsys, *options, "--probes", "train,val")
    value = nt.Record(
        "fisher/trace",
        0,
        np.ones(2),
        np.ones(2),
        dims=("probe",),
        coordinates={"probe": ["train", "val"]},
    )
    assert set(lines(document)) >= set(numbers_of([value], "p/"))
    assert is_shown(document, "p/ntk/trace_per_layer/val/net.0")
    assert not is_shown(document, "ntk/trace_per_layer/val/net.0")
    assert is_shown(document, "p/nettrace/seconds")


def test_it_shows_later_backward_passes_and_complex_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @nt.measure("own/amplitude", needs=["outputs"])
    def amplitude(outputs: torch.Tensor) -> torch.Tensor:
        """A complex number."""
        return outputs.sum() * 1j

    document = specified(capsys, "--prefix", "p/", "--measures", "own/amplitude")
    for name in ("gradients/noise_backward_2", "ntk/trace_backward_3_standard_error"):
        assert is_shown(document, f"p/{name}")
    assert not is_shown(document, "p/gradients/noise_backwards")
    tracer = nt.Tracer(nt.Probe(torch.ones(3, 2)), ["own/amplitude"])
    numbers = set(numbers_of(tracer(torch.nn.Linear(2, 1), 0), "p/"))
    assert {"p/own/amplitude.re", "p/own/amplitude.im"} <= numbers
    assert [name for name in numbers if not is_shown(document, name)] == []


def test_measures_and_groups_are_told_apart_and_say_what_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = specified(capsys, "--measures", "fisher,loss/mean", "--name", "mine")
    assert document["displayName"] == "mine"
    assert (document["entity"], document["project"]) == ("me", "digits")
    names = [section["name"] for section in sections(document)]
    assert names == ["loss", "fisher", "landscape", "nettrace"]
    assert "loss/accuracy" not in lines(document)
    plot = lines(document)["fisher/trace"]
    assert plot["chartTitle"] == "fisher/trace"
    assert plot["xAxisTitle"] == "optimizer step"
    convention = next(m for m in nt.measures.available() if m.name == "fisher/trace").convention
    assert convention.startswith(plot["yAxisTitle"].removesuffix(" ..."))
    texts = [panel["value"] for panel in panels(document, "Markdown Panel")]
    assert any(convention.rstrip(".") in text for text in texts)
    assert "(s)" in lines(document)["nettrace/seconds"]["yAxisTitle"]


def test_it_is_read_back_as_it_was_written() -> None:
    from wandb_workspaces.workspaces import internal

    from nettrace.dashboard.workspace import specification, workspace

    found = workspace("me", "digits", nt.measures.available())
    text = specification(found)
    assert internal.View.model_validate_json(text) == found._to_model()
    assert json.loads(text) == found._to_model().model_dump(by_alias=True, exclude_none=True)
    with pytest.raises(ValueError, match="entity"):
        workspace("", "digits", [])


def test_a_dry_run_lists_the_panels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wandb-workspace", "me/digits", "--dry-run", "--measures", "loss"]) == 0
    out = capsys.readouterr().out
    assert "loss: 3 panels" in out
    assert "  loss/mean" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digits"], "expected ENTITY/PROJECT"),
        (["a/b/c"], "expected ENTITY/PROJECT"),
        (["me/x", "--measures", "ntk/trac"], "did you mean 'ntk/trace'"),
        (["me/x", "--callbacks", "Tracee"], "there is no callback 'Tracee'"),
        (["me/x", "--callbacks", "Trace,TransformersTrace"], "logs under other names"),
        (["me/x", "--measures", "loss"], "wandb login"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["wandb-workspace", *arguments]) == 1
    if "wandb_workspaces" in sys.modules:
        import wandb

        wandb.teardown()  # it keeps the settings that it found in the environment
    assert says in capsys.readouterr().err


def test_without_the_package_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb_workspaces", "wandb_workspaces.reports.v2", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["wandb-workspace", "me/digits", "--dry-run"]) == 1
    assert "nettrace[workspace]" in capsys.readouterr().err
