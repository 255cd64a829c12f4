"""A user's function is a measure: live, offline, in loggers and in the list of measures."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace.measures import available, resolve, statistics
from nettrace.statistics import Inapplicable, Statistics, Unavailable
from nettrace.store import TraceWriter

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]


def taken(function, step=0, probe=None, **options):
    """The record of one measure made of a function, on a linear network of ones."""
    nt.measure("own/one", **options)(function)
    model = nn.Linear(3, 2, bias=False)
    nn.init.ones_(model.weight)
    probe = probe or nt.Probe(torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 0, 1]))
    return nt.Tracer(probe, "own", on_error="raise", max_seconds=None)(model, step)[0]


def test_what_is_doubtful_is_said_once():
    def doubtful(x):
        return nt.Value(x.max(), attributes={"warning": f"{float(x.max()):g} is large"})

    with pytest.warns(nt.DoubtfulMeasureWarning, match="own/one at step 0: 30 is large"):
        record = taken(doubtful, needs=["outputs"])
    assert record.attributes["warning"] == "30 is large"
    tracer = nt.Tracer(nt.Probe(torch.ones(4, 3)), "own/one")
    model = nn.Linear(3, 2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(3):
            tracer(model, step)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("give", "dims"),
    [
        (lambda x: 30.0, []),
        (lambda x: 30, []),
        (lambda x: np.float32(30), []),
        (lambda x: x.max() + 0.0, []),
        (lambda x: nt.Value(x.max(), 0.5, attributes={"draws": 3}), []),
        (lambda x: x[:, 0].bfloat16(), ["sample"]),
        (lambda x: x.numpy()[:, 0], ["sample"]),
        (lambda x: nt.Value(x[:2, 0], coordinates={"a": ["p", "q"]}), ["a"]),
    ],
)
def test_numbers_of_any_kind_are_taken(give, dims):
    record = taken(give, needs=["outputs"], dims=dims)
    assert record.missing is None
    assert record.dims == tuple(dims)
    assert record.value.flat[0] == (3 if dims else 30)  # of outputs 3, 12, 21, 30


@pytest.mark.parametrize(
    ("give", "error", "says"),
    [
        (lambda x: x, ValueError, r"shape \(4, 2\), but names 0 axes.*dims=\[...\]"),
        (lambda x: None, TypeError, "gave NoneType .*nettrace.Value"),
        (lambda x: "much", TypeError, "gave str"),
        (lambda x: nt.Value(1.0, torch.tensor(1j)), TypeError, "complex standard error"),
        (lambda x: x.reshape([4, 2] + [1] * 28), ValueError, "30 axes: a trace takes 29, at most"),
        (lambda x: nt.Value(1.0, torch.ones(3)), ValueError, r"standard error of shape \(3,\)"),
        (lambda x: nt.Value(1.0, coordinates={"a": ["p"]}), ValueError, "labels along 'a'"),
    ],
)
def test_what_does_not_fit_is_said(give, error, says):
    with pytest.raises(error, match=says):
        taken(give, needs=["outputs"])


def test_complex_numbers_are_taken(tmp_path):
    record = taken(lambda x: nt.Value(x[0, 0] * 1j, 0.5), needs=["outputs"])
    assert record.value == 3j
    assert "0+3j +- 0.5" in str(record)
    TraceWriter(tmp_path).write([record], {})
    assert nt.open(tmp_path).own_one.values.tolist() == [3j]


def test_names_of_errors_are_not_names_of_measures():
    with pytest.raises(ValueError, match="own/x_standard_error"):
        nt.measure("own/x_standard_error", needs=["outputs"])


def test_values_that_are_not_finite_are_kept_and_what_raises_is_missing():
    assert np.isinf(taken(lambda x: float("inf"), needs=["outputs"]).value)

    def broken(outputs):
        raise KeyError("head")

    nt.measure("own/broken", needs=["outputs"])(broken)
    tracer = nt.Tracer(nt.Probe(torch.ones(2, 3)), ["own/broken", "ntk/trace"])
    with pytest.warns(nt.MissingMeasureWarning, match="own/broken.*KeyError: 'head'"):
        records = tracer(nn.Linear(3, 2), 0)
    assert records[0].missing == "KeyError: 'head'"
    assert records[1].missing is None


def test_names_and_conventions_may_be_left_out():
    @nt.measure(needs=["samples"])
    def how_many(samples):
        """Counts the samples.

        In many words.
        """
        return samples

    (found,) = resolve("custom/how_many")
    assert (found.summary, found.convention) == ("Counts the samples.", "Counts the samples.")
    assert found in resolve("custom")
    assert how_many(3) == 3


def test_the_same_function_again_takes_its_own_place_and_another_does_not():
    def define(value):
        @nt.measure(needs=[])
        def mine():
            return value

    define(1.0)
    define(2.0)
    assert resolve("custom/mine")[0](None).value == 2.0
    with pytest.raises(ValueError, match=r"'custom/mine' exists already, in .*test_own"):
        nt.measure("custom/mine", needs=[])(lambda: 1)
    with pytest.raises(ValueError, match=r"'ntk/trace' exists already, in nettrace\.measures\.ntk"):
        nt.measure("ntk/trace", needs=["trace"])(lambda trace: 1)
    with pytest.raises(ValueError, match="does not take the 2 statistics"):
        nt.measure("own/two", needs=["trace", "gram"])(lambda trace: 1)
    with pytest.raises(ValueError, match=r"'traec'.*did you mean 'trace'"):
        nt.measure("own/three", needs=["traec"])
    with pytest.raises(TypeError, match=r"@measure\(needs="):
        nt.measure(lambda trace: 1, needs=["trace"])


def test_a_value_is_a_copy_that_training_does_not_change():
    model = nn.Linear(3, 2)
    weights = model.weight.detach().clone()
    nt.measure("own/weights", needs=["parameters"], dims=["out", "in"])(lambda p: p["weight"])
    nt.measure("own/same", needs=["model"], dims=["out", "in"])(lambda model: model.weight)
    records = nt.Tracer(nt.Probe(torch.ones(2, 3)), "own")(model, 0)
    with torch.no_grad():
        model.weight.zero_()
    for record in records[:2]:
        assert np.array_equal(record.value, weights.numpy())


def test_models_inputs_and_earlier_looks_can_be_needed():
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())

    @nt.measure(needs=["model", "inputs", "parameters", "first.parameters"])
    def moved(model, inputs, now, first):
        """Distance of the weights from the first look's."""
        assert torch.equal(inputs, x)
        assert not model.training
        assert not any(p.requires_grad for p in now.values())
        return sum((now[name] - first[name]).square().sum() for name in now).sqrt()

    tracer = nt.Tracer(nt.Probe(x), "custom/moved", on_error="raise")
    assert float(tracer(model, 0)[0].value) == 0
    with torch.no_grad():
        model[0].bias += torch.tensor([3.0, 4.0])
    assert float(tracer(model, 5)[0].value) == pytest.approx(5.0)
    assert model.training


def test_all_statistics_are_listed_with_what_they_are():
    listed = statistics()
    assert {"gram", "model", "inputs", "parameters", "outputs", "samples", "step"} <= set(listed)
    assert all(listed.values())
    probe = nt.Probe(torch.randn(3, 2), torch.tensor([0, 1, 0]))
    look = Statistics(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), probe, listed)
    for name in listed:
        with suppress(Inapplicable, Unavailable):  # without an optimizer, or another probe
            getattr(look, name)


# From outside -------------------------------------------------------------------------------------

PACKAGE = '''
"""A measure of a package of its own."""
import nettrace

@nettrace.measure("mine/confidence", needs=["outputs"], convention="mean over samples")
def confidence(outputs):
    """The largest probability."""
    return nettrace.Value.mean(outputs.softmax(1).amax(1))
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with an installed package that announces its measures, and one that is broken."""
    for name, code in (("nettrace_mine", PACKAGE), ("nettrace_broken", "import not_there")):
        (tmp_path / f"{name}.py").write_text(code)
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[nettrace.measures]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("nettrace_mine", None)


def listed(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nettrace", "measures", *options]
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def test_measures_of_installed_packages_are_listed_and_broken_ones_left_out(package):
    found = listed(package)
    assert "mine/confidence\n    The largest probability.\n    convention  mean" in found.stdout
    assert found.stderr.count("'nettrace_broken'") == 1
    assert "No module named 'not_there'" in found.stderr
    assert "ntk/trace" in found.stdout


def test_a_module_that_is_not_installed_is_imported_by_name(tmp_path):
    (tmp_path / "loose.py").write_text(PACKAGE)
    assert "mine/confidence" in listed(tmp_path, "--import", "loose").stdout
    assert "gram\n    (N, C, N, C) the Gram matrix" in listed(tmp_path, "--statistics").stdout


def test_it_is_in_the_trace_and_in_wandb(package, tmp_path, monkeypatch):
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    from nettrace.callbacks import Trace

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.warns(UserWarning, match=r"'nettrace_broken'.*not_there"):
        assert "mine/confidence" in [measure.name for measure in available()]
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    training.fit([Trace("mine", every=2, to=tmp_path / "trace")], logger=logger)
    logger.experiment.finish()
    wandb.teardown()
    trace = nt.open(tmp_path / "trace").mine_confidence
    assert trace.step.values.tolist() == [0, 2, 4]
    assert trace.attrs["convention"] == "mean over samples"
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [
        row for row in training.history(list(training.read_wandb(path))) if "mine/confidence" in row
    ]
    assert [row["mine/confidence"] for row in rows] == trace.values.tolist()


def test_what_writes_into_what_it_is_given_spoils_nothing():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    model = nn.Linear(3, 2)
    kept = x.clone(), model.weight.detach().clone()

    @nt.measure(needs=["outputs", "gram", "inputs", "model"])
    def careless(outputs, gram, inputs, model):
        """Writes into everything."""
        for tensor in (outputs, gram, inputs, model.weight.data):
            tensor.mul_(0)
        return 0.0

    names = ["loss/mean", "ntk/entropy", "ntk/trace"]
    alone = nt.Tracer(nt.Probe(x, y), names)(model, 0)
    beside = nt.Tracer(nt.Probe(x, y), ["custom/careless", *names])(model, 0)
    assert [r.name for r in beside][:4] == ["custom/careless", *names]
    assert [float(r.value) for r in beside[1:4]] == [float(r.value) for r in alone[:3]]
    assert torch.equal(x, kept[0])
    assert torch.equal(model.weight, kept[1])
