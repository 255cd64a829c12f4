"""The command line, on modules as a user would write them."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import nettrace as nt
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

class Plain(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

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


@pytest.fixture
def checkpoints(run, tmp_path):
    """Three checkpoints of `my_module:build`, at steps 0, 10 and 20."""
    sys.path.insert(0, str(tmp_path))
    model = __import__("my_module").build()
    (tmp_path / "checkpoints").mkdir()
    for step in (0, 10, 20):
        torch.save(model.state_dict(), tmp_path / "checkpoints" / f"step={step}.pt")
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    return tmp_path / "checkpoints"


ANALYZE = "analyze checkpoints --model my_module:build --data my_module:probe --to runs/x"


def test_analyze_says_what_it_did_and_how_to_repeat_it(run, checkpoints):
    status, out, err = run(ANALYZE + " --measures ntk/trace,loss/mean ntk/entropy --threads 1")
    assert (status, err) == (0, "")
    assert "3 checkpoints: 3 measured" in out
    assert "nettrace.open('runs/x')" in out
    data = nt.open("runs/x").load()  # which is removed below
    assert data.step.values.tolist() == [0, 10, 20]
    assert {"ntk_trace", "loss_mean", "ntk_entropy"} <= set(data)
    (command,) = re.findall("repeat this by nettrace (.*)", out)
    status, out, _ = run(command)
    assert status == 0
    assert "3 done before" in out
    Path("runs/x/analyze.yaml").rename("again.yaml")
    shutil.rmtree("runs/x")
    assert run("analyze --config again.yaml")[0] == 0
    again = nt.open("runs/x")
    np.testing.assert_array_equal(again.ntk_trace, data.ntk_trace)
    assert set(again) == set(data)
    settings = yaml.safe_load(Path("again.yaml").read_text())
    assert settings == yaml.safe_load(Path("runs/x/analyze.yaml").read_text())
    assert settings["measures"] == ["ntk/trace", "loss/mean", "ntk/entropy"]


def test_what_is_repeated_is_what_was_done_from_any_folder(run, checkpoints, tmp_path, monkeypatch):
    command = (
        "analyze {} --model my_module.py:build --data my_module.py:probe --measures {} --to {}"
    )
    pattern = "checkpoints/step=*.pt"
    for measures, paths in [
        ("loss,ntk/trace", pattern),
        ("loss", pattern),
        ("loss", "checkpoints/step=0.pt"),
    ]:
        status, out, _ = run(command.format(paths, measures, "it's[1]"))
        assert status == 0
    (repeated,) = re.findall("repeat this by nettrace analyze --config (.*)", out)
    assert shlex.split(repeated) == ["it's[1]/analyze-3.yaml"]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for name, skipped in [("analyze", 3), ("analyze-2", 3), ("analyze-3", 1)]:
        status, out, err = run(f"analyze --json --config ../it's[1]/{name}.yaml")
        assert (status, err) == (0, "")
        assert len(json.loads(out)["skipped"]) == skipped
    assert len(list((tmp_path / "it's[1]").glob("*.yaml"))) == 3
    settings = yaml.safe_load((tmp_path / "it's[1]" / "analyze.yaml").read_text())
    assert settings["measures"] == ["loss", "ntk/trace"]
    assert settings["model"] == str(tmp_path / "my_module.py:build")


def test_what_failed_entirely_is_not_to_be_repeated(run, checkpoints):
    assert run(ANALYZE + " --measures loss")[0] == 0
    before = sorted((file.name, file.read_bytes()) for file in Path("runs/x").iterdir())
    command = ANALYZE.replace("my_module:build", "my_module:Plain")
    status, out, err = run(command + " --measures loss")
    assert status == 1
    assert "none of the checkpoints could be measured" in err
    assert "repeat" not in out
    assert before == sorted((file.name, file.read_bytes()) for file in Path("runs/x").iterdir())


def test_what_is_missing_is_said_again_where_it_is_skipped(run, checkpoints):
    command = ANALYZE + " --measures ntk/preconditioned_trace loss --json"
    first, again = (json.loads(run(command)[1]) for _ in range(2))
    assert again["skipped"] == [0, 10, 20]
    assert list(again["missing"]) == ["ntk/preconditioned_trace"]
    assert again["missing"] == first["missing"]


@pytest.mark.parametrize("names", ["model leaving:build data my_module:probe", "import leaving.py"])
def test_code_that_ends_the_process_is_an_error(run, checkpoints, names):
    Path("leaving.py").write_text("import sys\nsys.exit(0)")
    words = names.split()
    options = " ".join(f"--{k} {v}" for k, v in zip(words[::2], words[1::2], strict=True))
    status, _, err = run(f"{ANALYZE} {options} --measures loss")
    assert status == 1
    assert err.startswith("nettrace analyze: ")
    assert "sys.exit" in err or "SystemExit" in err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_files_that_are_no_text_are_escaped(run, checkpoints, monkeypatch, encoding):
    name = os.fsdecode(b"checkpoints/\xff-step=5.pt")
    Path(name).write_bytes(b"broken")
    for option in ("", " --json"):
        data = io.BytesIO()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding))
            status, _, err = run(ANALYZE + " --measures loss" + option)
            assert status == 3, err
            sys.stdout.flush()
            out = data.getvalue().decode(encoding)
        assert r"\udcff-step=5.pt" in out
    assert list(json.loads(out)["failed"]) == [name]


def test_analyze_in_part_and_not_at_all(run, checkpoints):
    (checkpoints / "step=15.pt").write_bytes(b"broken")
    status, out, err = run(ANALYZE + " --measures ntk/trace")
    assert status == 3
    assert re.search(r"4 checkpoints: 3 measured.*1 failed", out)
    assert re.search(r"failed: checkpoints/step=15.pt: cannot be read", " ".join(out.split()))
    status, out, err = run(ANALYZE + " --measures ntk/trace --json")
    assert status == 3
    assert json.loads(out)["skipped"] == [0, 10, 20]
    assert list(json.loads(out)["failed"]) == ["checkpoints/step=15.pt"]
    assert "failed: checkpoints/step=15.pt" in err
    for step in (0, 10, 20):
        (checkpoints / f"step={step}.pt").unlink()
    status, _, err = run(ANALYZE + " --quiet")
    assert status == 1
    assert "none of the checkpoints could be measured" in err


def test_json_is_one_document(run, checkpoints):
    status, out, err = run(ANALYZE + " --measures ntk/trace loss --json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["done"], found["failed"], found["missing"]) == ([0, 10, 20], {}, {})
    status, out, err = run("measures --json")
    assert (status, err) == (0, "")
    assert [one["name"] for one in json.loads(out)] == [measure.name for measure in available()]
    command = "explain my_module:build --data my_module:probe --measures ntk/trace,hessian --json"
    status, out, err = run(command + " --max-seconds 1e-9")
    assert (status, err) == (0, "")
    found = json.loads(out)
    certificate = nt.Certificate.from_json(json.dumps(found["certificate"]))
    assert [row.name for row in certificate.rows] == list(found["parameters"])
    assert set(found["prices"]["measures"]) >= {"ntk/trace", "hessian/trace"}
    assert found["prices"]["measures"]["ntk/trace"]["backward_passes"] == 3
    assert "above max_seconds=1e-09" in found["prices"]["measures"]["ntk/trace"]["refused"]


@pytest.mark.parametrize("names", ["ntk/trace,loss/mean", "ntk/trace loss/mean"])
def test_names_are_told_apart_by_commas_and_spaces(run, names):
    _, out, _ = run(f"explain my_module:build --data my_module:probe --json --measures {names}")
    assert list(json.loads(out)["prices"]["measures"]) == ["ntk/trace", "loss/mean"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mesures: [ntk]", "'mesures', which is no option .*did you mean 'measures'"),
        ("quux: 1", "'quux', .*there are checkpoints, model"),
        ("retry: 3", "retry to be true or false, got 3"),
        ("model: [a, b]", "expected one model"),
        ("model: {a: 1}", "expected model to be text"),
        ("- model", "expected file.yaml to hold options"),
        ("model: [", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(run, checkpoints, text, says):
    Path("file.yaml").write_text(text)
    status, _, err = run(ANALYZE + " --config file.yaml")
    assert status == 1
    assert re.search(says, err), err
    assert not Path("runs").exists()


def test_the_command_line_overrides_the_configuration(run, checkpoints):
    settings = {
        "checkpoints": ["nowhere", "elsewhere"],
        "model": "my_module:broken",
        "data": "my_module:probe",
        "measures": ["ntk/trace", "loss"],
        "to": "runs/y",
        "max_seconds": None,
        "retry": False,
        "threads": 1,
    }
    Path("file.yaml").write_text(yaml.safe_dump(settings))
    command = "analyze checkpoints --config file.yaml --model my_module:build --to runs/x"
    assert run(command)[0] == 0
    assert {"ntk_trace", "loss_mean"} <= set(nt.open("runs/x"))
    Path("file.yaml").write_text("jobs: two")
    with pytest.raises(SystemExit, match="2"):
        run("analyze checkpoints --config file.yaml")
    with pytest.raises(SystemExit, match="2"):
        run("analyze checkpoints")  # without --data


def test_without_a_model_the_checkpoint_says_it(run, checkpoints):
    status, _, err = run("explain --data my_module:probe --checkpoint checkpoints/step=0.pt")
    assert status == 1
    assert "does not say which network it is of" in err
    status, _, err = run("explain --data my_module:probe")
    assert status == 1
    assert "which network?" in err
    made = {"hyper_parameters": {"_class_path": "my_module.Plain"}, "global_step": 3}
    model = sys.modules["my_module"].Plain()
    torch.save({"state_dict": model.state_dict(), **made}, "plain.ckpt")
    status, out, err = run("explain --data my_module:probe --checkpoint plain.ckpt")
    assert (status, err) == (0, "")
    assert "Plain, 15 parameters" in out


@pytest.mark.parametrize(("to", "name"), [("csv", "x-csv"), ("parquet", "x.parquet")])
def test_export_writes_beside_where_it_runs(run, checkpoints, to, name):
    if to == "parquet":
        pytest.importorskip("pyarrow")
    assert run(ANALYZE + " --measures ntk/trace loss ntk/spectrum")[0] == 0
    status, out, err = run(f"export runs/x --to {to} --names loss,ntk/trace")
    assert (status, err) == (0, "")
    assert out.startswith(name)
    assert Path(name).exists()
    status, _, err = run(f"export runs/x --to {to}")
    assert status == 1
    assert "--overwrite" in err
    status, out, _ = run(f"export runs/x --to {to} --overwrite --json")
    assert status == 0
    assert "ntk/spectrum" in json.loads(out)["quantities"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("nowhere --to csv", "there is no trace in nowhere"),
        ("runs/x", "in which format"),
        ("runs/x -o x.txt", "netcdf, zarr, csv, parquet"),
        ("runs/x --to csv --names ntk/trac", "there is no 'ntk/trac'"),
        ("runs/x -o x.csv", "cannot hold arrays"),
    ],
)
def test_an_export_that_cannot_be_is_refused(run, checkpoints, command, says):
    run(ANALYZE + " --measures ntk/trace ntk/spectrum")
    status, _, err = run(f"export {command}")
    assert status == 1
    assert says in err


@pytest.mark.parametrize(
    "command", ["measures", "explain", "analyze", "export", "dashboard", "completion", ""]
)
def test_help_has_examples_that_parse_and_fits_the_terminal(run, capsys, command):
    with pytest.raises(SystemExit, match="0"):
        run(f"{command} --help")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "exit codes: 0 done" in out
    examples = out.partition("examples:")[2].partition("exit codes")[0].replace("\\\n", " ")
    found = re.findall(r"^ *(nettrace .*?)(?:   .*| >.*)?$", examples, re.M)
    assert len(found) >= 2
    for example in found:
        arguments = example.replace("'", "").split()[1:]
        assert cli.make_parser().parse_args(arguments).command == arguments[0]


def test_an_error_of_the_users_code_is_a_line_with_its_place(run, checkpoints, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nettrace.offline.analyze", fails)
    status, out, err = run(ANALYZE)
    assert (status, out) == (1, "")
    assert re.match(r"nettrace analyze: RuntimeError: out of memory \(.*test_cli.py, line", err)


def test_an_interruption_is_a_line_and_130(run, checkpoints, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nettrace.offline.analyze", interrupted)
    assert run(ANALYZE) == (130, "", "nettrace analyze: interrupted")


def test_a_closed_pipe_is_no_error(run):
    command = f"{sys.executable} -m nettrace measures | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


COMPLETE = """
source complete.bash
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_nettrace
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nettrace ana", {"analyze"}),
        ("nettrace export --ov", {"--overwrite"}),
        ("nettrace export runs --to net", {"netcdf"}),
        ("nettrace explain model --measures ntk/sp", {"ntk/spectrum"}),
        ("nettrace analyze c --measures loss fisher/tr", {"fisher/trace", "fisher/trace_mc"}),
    ],
)
def test_bash_completes_commands_options_and_measures(run, words, expected):
    pytest.importorskip("shtab")
    status, out, err = run("completion bash")
    assert (status, err) == (0, "")
    Path("complete.bash").write_text(out)
    script = COMPLETE.format(words=words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert expected <= set(done.stdout.split())
    last = words.split()[-1]
    assert all(word.startswith(last) for word in done.stdout.split())


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(run, shell):
    pytest.importorskip("shtab")
    status, out, _ = run(f"completion {shell}")
    assert status == 0
    assert "ntk/spectrum" in out


def test_without_shtab_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, _, err = run("completion bash")
    assert status == 1
    assert "pip install 'nettrace[completion]'" in err
