"""The command line, on modules as a user would write them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from nettrace import cli
from nettrace.measures import available

MODULE = """
import torch
import nettrace as nt
from torch import nn

torch.manual_seed(0)
data = torch.randn(6, 4)

def build():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

def probe():
    return nt.Probe(data, torch.arange(6) % 3)

def pair():
    return data, torch.arange(6) % 3

def broken():
    raise KeyError("depth")

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        h = self.layer(x)
        return torch.tanh(self.layer(x)) @ torch.ones(3, 3) - h.mean(0) * h
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command where `my_module` lies; gives the status and what was printed."""
    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "needy.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")

    def command(text):
        status = cli.main(text.split())
        printed = capsys.readouterr()
        return status, printed.out, " ".join(printed.err.split())

    yield command
    for name in ("my_module", "needy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("data", ["probe", "pair", "data"])
@pytest.mark.parametrize("columns", ["80", "120"])
def test_explain_prints_the_certificate_and_the_cost(run, data, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, err = run(f"explain my_module:build --data my_module:{data}")
    assert (status, err) == (0, "")
    for text in ["43 parameters in 4 tensors", "6 samples", "0.weight", "2.bias", "rule", "100.0"]:
        assert text in out
    assert "backward passes" in out
    assert all(len(line) <= int(columns) for line in out.splitlines())


def test_explain_prices_the_measures_asked_for_and_says_which_are_refused(run):
    command = "explain my_module:build --data my_module:probe --measures ntk/trace loss"
    _, out, _ = run(command)
    assert re.search(r"^ntk/trace +3 +[0-9.]+ ms", out, re.M), out
    assert "ntk/gram" not in out
    _, out, _ = run(command + " --max-seconds 1e-9")
    assert re.search(r"^ntk/trace \* +3", out, re.M), out
    assert "above max_seconds=1e-09" in out


def test_a_checkpoint_is_what_is_explained(run, tmp_path):
    _, before, _ = run("explain my_module:build --data my_module:data")
    model = sys.modules["my_module"].build()
    with torch.no_grad():
        model[2].weight.mul_(100)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    status, after, _ = run("explain my_module:build --data my_module:data --checkpoint weights.pt")
    assert status == 0
    assert after != before
    model[2] = torch.nn.Linear(5, 2)
    torch.save(model.state_dict(), "small.pt")
    Path("code.pt").write_text("not weights")
    for file, says in [
        ("small.pt", "does not fit Sequential"),
        ("code.pt", "cannot be read"),
        ("none.pt", "there is no checkpoint"),
    ]:
        status, _, err = run(f"explain my_module:build --data my_module:data --checkpoint {file}")
        assert status == 1
        assert says in err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("my_module:Centred --data my_module:data", "CoupledSamplesError.*MeanBackward"),
        ("my_module:biuld --data my_module:data", "did you mean 'build'"),
        ("my_module --data my_module:data", "expected module:name"),
        ("nowhere:build --data my_module:data", "no module 'nowhere'.*nowhere.py"),
        ("needy:build --data my_module:data", "needs not_there_at_all"),
        ("my_module:broken --data my_module:data", "KeyError: 'depth' .*my_module.py, line 19"),
        ("my_module:data --data my_module:data", "expected .* torch.nn.Module, got Tensor"),
        ("my_module:build --data my_module:build", "got Sequential"),
        ("my_module:build --data my_module:data --memory much", "2GiB"),
        ("my_module:build --data my_module:data --measures ntk/trac", "did you mean 'ntk/trace'"),
        ("my_module:build --data my_module:data --max-seconds 0", "max_seconds above 0"),
        ("my_module:build --data my_module:data --import nowhere", "no module 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(run, command, says):
    status, _, err = run("explain " + command)
    assert status == 1
    assert err.startswith("nettrace explain: ")
    assert re.search(says, err), err


@pytest.mark.parametrize("columns", ["80", "120"])
def test_measures_are_listed_with_needs_convention_and_source(run, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, _ = run("measures")
    assert status == 0
    joined = " ".join(out.split())
    for measure in available():
        for text in (measure.name, measure.convention, ", ".join(measure.needs), measure.source):
            assert " ".join(text.split()) in joined
    assert all(len(line) <= int(columns) for line in out.splitlines())


def test_it_is_installed_as_a_command_and_runs_by_itself():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert settings["project"]["scripts"] == {"nettrace": "nettrace.cli:main"}
    command = [sys.executable, "-m", "nettrace.cli"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    listed = subprocess.run(
        [*command, "measures"], capture_output=True, text=True, check=True, env=environment
    )
    assert "ntk/trace" in listed.stdout
    wrong = subprocess.run([*command, "explain"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2
