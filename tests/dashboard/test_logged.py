"""Figures and final values that loggers get beside numbers, and what happens where they cannot."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import training
import xarray as xr

import nettrace as nt
from nettrace.callbacks import GradientStatistics, LandscapeProbe, NTKTrace, Trace
from nettrace.callbacks import figures as module
from nettrace.callbacks.figures import Figures
from nettrace.landscape import slice_1d
from nettrace.store.kept import Kept

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]


class FakeRun:
    """Takes what a W&B run takes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str = "", **_: Any) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def wandb_logger() -> Any:
    class WandbLogger(SimpleNamespace):
        """What tells a W&B logger from others is its name, in either namespace."""

    return WandbLogger(experiment=FakeRun())


def spectrum(step: int, size: int = 6) -> list[nt.Record]:
    values = np.geomspace(1 + step, 1, size)
    return [
        nt.Record("ntk/spectrum", step, values, dims=("mode",)),
        nt.Record("ntk/trace", step, values.sum(), np.array(0.5), attributes={"convention": "sum"}),
    ]


def content(plot: Any) -> dict[str, Any]:
    """The figure that W&B gets."""
    return json.loads(Path(plot._path).read_text())


def of_figures(rows: list[dict[str, Any]]) -> list[int]:
    return [row["nettrace/step"] for row in rows if any(n.startswith("figures/") for n in row)]


def test_figures_are_made_at_records_4_8_16_and_at_the_end() -> None:
    logger = wandb_logger()
    one = Figures([logger], "")
    for step in range(0, 400, 10):
        one.add(spectrum(step), {}, 7)
        if one.due:
            one.send()
    one.conclude()
    assert of_figures(logger.experiment.rows) == [30, 70, 150, 310, 390]
    assert set(logger.experiment.axes.values()) == {"nettrace/step"}
    assert {row["trainer/global_step"] for row in logger.experiment.rows} == {7}
    last = content(logger.experiment.rows[-1]["figures/ntk/spectrum"])
    (heat,) = last["data"]
    assert None not in heat["x"]
    shown = 10 ** np.array(heat["z"])  # (modes, steps)
    assert shown.shape[0] == 6
    assert shown[:, -1] == pytest.approx(np.geomspace(391, 1, 6), rel=1e-5)


def test_the_table_has_the_last_values_with_their_errors() -> None:
    logger = wandb_logger()
    one = Figures([logger], "probe/")
    for step in (0, 10):
        gone = nt.Record("ntk/entropy", step, np.array(np.nan), missing="ValueError: no <reason>")
        one.add([*spectrum(step), gone, nt.Record("a/z", step, np.array(1 - 2j))], {}, 7)
        one.add([nt.Record("a/none", step, np.array(0.0))], {}, 7)
    one.conclude()
    (row,) = logger.experiment.rows
    table = row["probe/nettrace/final_values"]
    found = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.data}
    assert found["ntk/trace"]["value"] == pytest.approx(np.geomspace(11, 1, 6).sum())
    assert found["ntk/trace"] == {
        **{"quantity": "ntk/trace", "value": found["ntk/trace"]["value"], "standard error": 0.5},
        **{"step": 10, "units": "", "convention": "sum", "missing": ""},
    }
    assert found["ntk/entropy"]["value"] is None
    assert "no <reason>" in found["ntk/entropy"]["missing"]
    assert (found["a/z.re"]["value"], found["a/z.im"]["value"]) == (1, -2)
    assert found["a/none"]["value"] == 0
    assert "ntk/spectrum" not in found


def test_there_are_not_more_figures_nor_more_numbers_than_is_said() -> None:
    logger = wandb_logger()
    one = Figures([logger], "")
    for step in range(100):
        arrays = [
            nt.Record(f"a/spectrum_{n}", step, np.geomspace(9, 1, 3000), dims=("mode",))
            for n in range(20)
        ]
        kernel = nt.Record("ntk/gram", step, np.eye(300), dims=("sample", "sample_2"))
        one.add([*arrays, kernel], {}, 7)
    assert one._kept.dataset().sizes["step"] <= 64
    one.conclude()
    (row,) = logger.experiment.rows
    plots = {name: content(plot) for name, plot in row.items() if name.startswith("figures/")}
    assert 2 <= len(plots) <= 12
    assert "figures/ntk/gram" in plots  # one of each kind comes first
    assert len(plots["figures/ntk/gram"]["data"]) == 4
    assert sum(len(json.dumps(plot)) for plot in plots.values()) < 2.5e6
    assert '"bdata"' not in json.dumps(list(plots.values()))  # W&B draws nothing of these
    assert "NaN" not in json.dumps(list(plots.values()))


def test_none_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", -1.0)
    logger = wandb_logger()
    one = Figures([logger], "")
    one.add(spectrum(0), {}, 7)
    one.conclude()
    (row,) = logger.experiment.rows
    assert not any(name.startswith("figures/") for name in row)
    assert "nettrace/final_values" in row


def test_one_that_fails_does_not_keep_others_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from nettrace import dashboard

    def fails(data: Any, name: str) -> Any:
        if name == "a/odd":
            raise ZeroDivisionError("odd")
        return draw(data, name)

    draw = dashboard.figure
    monkeypatch.setattr(dashboard, "figure", fails)
    logger = wandb_logger()
    one = Figures([logger], "")
    one.add([*spectrum(0), nt.Record("a/odd", 0, np.ones(3), dims=("mode",))], {}, 7)
    ((what, error),) = one.conclude()
    assert what == "cannot make a figure"
    assert isinstance(error, ZeroDivisionError)
    assert "figures/ntk/spectrum" in logger.experiment.rows[0]


def test_nothing_is_kept_where_no_logger_takes_figures() -> None:
    one = Figures([SimpleNamespace()], "")
    one.add(spectrum(0), {}, 7)
    one.conclude()
    assert not one._kept.count
    assert not one.due


def test_without_plotly_the_table_is_sent_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, logged: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr(module, "_said", set())
    logger = wandb_logger()
    with caplog.at_level(logging.INFO, "nettrace"):
        for _ in range(2):
            one = Figures([logger], "")
            one.add(spectrum(0), {}, 7)
            one.conclude()
    assert [next(iter(row)) for row in logger.experiment.rows] == ["nettrace/final_values"] * 2
    assert len(logged) == 1
    assert "nettrace[dashboard]" in logged.pop()


def test_kept_steps_are_evenly_spaced_and_have_the_last() -> None:
    kept = Kept(most_steps=10)
    for step in range(0, 2010, 10):
        kept.add(spectrum(step), {"epoch": step / 100})
        assert len(kept._steps) <= 10
        assert max(kept._steps) == step
    data = kept.dataset()
    gaps = np.diff(data.step.values)
    assert len(set(gaps[:-1])) == 1
    assert data.step.values[0] == 0
    assert data.ntk_trace.values[-1] == pytest.approx(spectrum(2000)[1].value)
    assert data.epoch.values[-1] == 20
    large = Kept(most_bytes=100_000)
    for step in range(50):
        large.add([nt.Record("a/b", step, np.zeros(1000), dims=("mode",))], {})
    assert 2 < large.dataset().sizes["step"] <= 12
    huge = Kept(most_bytes=100)
    for step in range(3):
        huge.add([nt.Record("a/b", step, np.zeros(1000), dims=("mode",))], {})
    assert huge.dataset().step.values.tolist() == [2]


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "MLFlowLogger"])
def test_other_loggers_get_images_at_the_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import BytesIO

    from PIL import Image

    def images(figures: Any, seconds: float) -> tuple[list[bytes | None], str]:
        file = BytesIO()
        Image.new("RGB", (9, 5), (255, 0, 0)).save(file, "PNG")
        return [file.getvalue(), *[None] * (len(figures) - 1)], "it took too long"

    sent: list[Any] = []
    experiment = SimpleNamespace(
        add_image=lambda tag, pixels, step, dataformats: sent.append((tag, pixels.shape, step)),
        log_artifact=lambda run, path, folder: sent.append(
            (run, Path(path).name, folder, Path(path).read_bytes()[1:4])
        ),
    )
    monkeypatch.setattr("nettrace.dashboard.images.images", images)
    logger = type(kind, (SimpleNamespace,), {})(experiment=experiment, run_id="r")
    one = Figures([logger], "")
    for step in range(6):
        one.add(spectrum(step), {}, 7)
        assert not one.due
    one.conclude()
    expected: dict[str, Any] = {
        "TensorBoardLogger": ("figures/ntk/spectrum", (5, 9, 3), 7),
        "MLFlowLogger": ("r", "ntk_spectrum.png", "figures", b"PNG"),
    }
    assert sent == [expected[kind]]


def test_images_are_as_large_as_their_figures() -> None:
    from io import BytesIO

    if find_spec("kaleido") is None or not (shutil.which("chromium") or shutil.which("chrome")):
        pytest.skip("no image is drawn: kaleido is not installed, or no Chromium is on PATH")
    import plotly.graph_objects as go
    from PIL import Image

    from nettrace.dashboard.images import images

    made = [go.Figure(go.Bar(y=[1, 2]), layout={"height": height}) for height in (300, 400)]
    drawn, why = images(made)
    assert why == ""
    assert [Image.open(BytesIO(png)).size for png in drawn if png] == [(900, 300), (900, 400)]


def test_without_kaleido_there_are_no_images_but_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from nettrace.dashboard import images

    monkeypatch.setattr(images, "find_spec", lambda name: None)
    drawn, why = images.images([SimpleNamespace()] * 2)
    assert drawn == [None, None]
    assert "pip install kaleido" in why


def test_drawing_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from nettrace.dashboard import images

    monkeypatch.setattr(images, "find_spec", lambda name: True)
    monkeypatch.setattr(images, "_CODE", "import time; time.sleep(100)")
    figure = SimpleNamespace(to_json=lambda: "{}")
    assert images.images([figure], 0.5) == ([None], "drawing took longer than 0.5 seconds")
    monkeypatch.setattr(images, "_CODE", "raise SystemExit('no browser')")
    assert images.images([figure], 20) == ([None], "no browser")


# In trainings -------------------------------------------------------------------------------------


def outcome(callbacks: Callable[[], list[Any]], logger: Any) -> dict[str, Any]:
    training.seed(1)
    model = training.delicate()()
    trainer = training.fit(callbacks(), model, logger=logger, max_steps=10)
    return training.result(trainer, model)


def lightning_wandb() -> Any:
    from pytorch_lightning.loggers import Logger

    class WandbLogger(Logger):
        name, version = "fake", 0

        def __init__(self) -> None:
            super().__init__()
            self.experiment = FakeRun()

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            pass

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    return WandbLogger()


@pytest.mark.parametrize(
    ("version", "takes"), [("0.31", True), ("1.0.dev1", True), ("0.30.9", False), ("odd", False)]
)
def test_only_recent_versions_of_wandb_get_figures(
    version: str, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "version", lambda name: version)
    assert Figures([wandb_logger()], "").wanted == takes


def test_training_is_bitwise_the_same_with_figures() -> None:
    plain, measured = lightning_wandb(), lightning_wandb()
    without = outcome(lambda: [], plain)
    with_ = outcome(
        lambda: [Trace(["ntk", "loss"], every=1), GradientStatistics(every=2)], measured
    )
    assert len(of_figures(measured.experiment.rows)) >= 3
    for one in (without, with_):
        one["logged"] = None  # of fakes
    assert training.differences(without, with_) == []


def test_results_of_landscape_probes_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []

    def images(figures: Any, seconds: float) -> tuple[list[bytes | None], str]:
        drawn.append([one.layout.title.text for one in figures])
        return [None] * len(figures), "it took too long"

    monkeypatch.setattr("nettrace.dashboard.images.images", images)
    logger, plain = lightning_wandb(), lightning_wandb()
    board = type("TensorBoardLogger", (type(logger),), {})()
    callback = LandscapeProbe({"odd": odd, "line": slice_1d, "broken": broken}, every=3)
    without = outcome(lambda: [], plain)
    with (
        pytest.warns(nt.MissingMeasureWarning, match="broken is missing"),
        pytest.warns(nt.MissingMeasureWarning, match="cannot make figures"),
    ):
        with_ = outcome(lambda: [callback], [logger, board])
    for one in (without, with_):
        one["logged"] = None  # of fakes
    assert training.differences(without, with_) == []
    assert of_figures(logger.experiment.rows) == [0, 3, 6, 9]
    row = next(row for row in logger.experiment.rows if "figures/landscape/line/loss" in row)
    (curve,) = content(row["figures/landscape/line/loss"])["data"]
    assert len(curve["x"]) == 51
    assert curve["name"] == "step 0"
    (titles,) = drawn  # at the end, of the last
    assert any("line/loss" in title for title in titles)


def odd(model: Any, probe: Any, *, seconds: Any, progress: Any, to: Any) -> xr.Dataset:
    """A result that has a dimension of the name under which steps are joined."""
    return xr.Dataset({"a": ("step", np.ones(3))})


def broken(model: Any, probe: Any, *, seconds: Any, progress: Any, to: Any) -> Any:
    raise ValueError("it cannot be done")


def test_what_fails_is_said_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fails(figure: Any) -> Any:
        raise OSError("no room")

    monkeypatch.setattr(wandb, "Plotly", fails)
    logger = lightning_wandb()
    with pytest.warns(nt.MissingMeasureWarning) as warned:
        trainer = training.fit([NTKTrace(every=1)], logger=logger, max_steps=9)
    assert trainer.global_step == 9
    assert len([w for w in warned if "cannot log to WandbLogger" in str(w.message)]) == 1
    assert len([row for row in logger.experiment.rows if "ntk/trace" in row]) == 10


def test_figures_of_several_probes_are_apart() -> None:
    samples = training.Samples()
    probes = {n: nt.Probe(samples.inputs[:k], samples.targets[:k]) for n, k in (("a", 4), ("b", 6))}
    logger = lightning_wandb()
    training.fit([Trace("ntk/spectrum", probe=probes, every=1)], logger=logger, max_steps=3)
    last = logger.experiment.rows[-1]
    assert {"figures/ntk/spectrum/a", "figures/ntk/spectrum/b"} <= set(last)
