"""Probes and measures that are declared in the configuration of a LightningCLI."""

import importlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import training
import yaml

import nettrace as nt

pytest.importorskip("jsonargparse")

MODULE = """
import nettrace
import torch
from torch.utils.data import DataLoader, Dataset
from {namespace} import LightningModule

class Numbers(Dataset):
    def __init__(self, size: int = 40):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.targets = torch.arange(size) % 3
    def __len__(self):
        return len(self.inputs)
    def __getitem__(self, i):
        return self.inputs[i], self.targets[i]

def probe() -> nettrace.Probe:
    numbers = Numbers(6)
    return nettrace.Probe(numbers.inputs, numbers.targets)

class Net(LightningModule):
    def __init__(self, width: int = 5):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
        )
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return DataLoader(Numbers(), batch_size=10)
"""
CONFIGURATION = """
seed_everything: 0
trainer:
  max_steps: 4
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: run
  callbacks:
  - class_path: nettrace.callbacks.Trace
    init_args:
      measures: [ntk/trace, fisher/trace]
      every: 2
      to: traces/period
      probe:
        class_path: declared_{name}.probe
  - class_path: nettrace.callbacks.NTKTrace
    init_args:
      measures: ntk/trace
      every: log
      to: traces/log
      max_seconds: null
      probe:
        class_path: nettrace.Probe.from_dataset
        init_args:
          samples: 8
          likelihood: categorical
          dataset:
            class_path: declared_{name}.Numbers
            init_args:
              size: 16
  - class_path: nettrace.callbacks.FisherTrace
    init_args:
      every: [0, 3]
      to: traces/steps
      on_error: raise
      probe:
        train:
          class_path: nettrace.Probe.from_dataset
          init_args:
            dataset: declared_{name}.Numbers
            samples: 5
        other:
          class_path: nettrace.Probe.from_dataset
          init_args:
            dataset: {{class_path: declared_{name}.Numbers, init_args: {{size: 9}}}}
            samples: 4
  - class_path: nettrace.callbacks.CollectiveVariables
    init_args:
      every: {{class_path: nettrace.epochs, init_args: {{period: 1}}}}
      to: traces/epochs
      log: false
"""


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def cli(request, tmp_path, monkeypatch):
    """Runs a LightningCLI on arguments, where the configuration lies in `declared.yaml`."""
    name = request.param.partition(".")[0]
    (tmp_path / f"declared_{name}.py").write_text(MODULE.format(namespace=request.param))
    (tmp_path / "declared.yaml").write_text(CONFIGURATION.format(name=name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"declared_{name}")
    make = importlib.import_module(f"{request.param}.cli").LightningCLI

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        return make(module.Net, save_config_kwargs={"overwrite": True})

    yield run
    sys.modules.pop(f"declared_{name}", None)


pytestmark = [
    pytest.mark.filterwarnings(warning)
    for warning in [*training.HARMLESS, "ignore::DeprecationWarning"]
]


def traces():
    return {name: nt.open(f"traces/{name}") for name in ("period", "log", "steps", "epochs")}


def test_a_run_measures_what_its_configuration_declares(cli):
    callbacks = cli("fit", "--config", "declared.yaml").trainer.callbacks
    found = traces()
    steps = {name: data.step.values.tolist() for name, data in found.items()}
    assert steps == {"period": [0, 2, 4], "log": [0, 1, 2, 3, 4], "steps": [0, 3], "epochs": [0, 4]}
    assert {"ntk_trace", "fisher_trace"} <= set(found["period"])
    assert found["steps"].probe.values.tolist() == ["train", "other"]
    probe = next(c.probe for c in callbacks if c.__class__.__name__ == "NTKTrace")
    assert len(probe) == 8
    assert len(callbacks[0].probe) == 6
    assert probe.likelihood == "categorical"
    # The samples are those that were declared: every second of 16.
    numbers = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probe.inputs, numbers[::2])


def test_the_configuration_that_is_saved_repeats_the_run(cli):
    cli("fit", "--config", "declared.yaml")
    times = {"nettrace_seconds", "nettrace_seconds_per_measure"}
    first = {name: data.drop_vars(times).load() for name, data in traces().items()}
    saved = next(Path("run").rglob("config.yaml"), None) or Path("config.yaml")
    text = saved.read_text()
    Path("traces").rename("before")
    Path("again.yaml").write_text(text)
    cli("fit", "--config", "again.yaml")
    for name, data in traces().items():
        assert set(first[name]) == set(data) - times
        for quantity in first[name]:
            np.testing.assert_array_equal(first[name][quantity], data[quantity])


def test_options_are_printed_with_their_types(cli, capsys):
    for arguments, says in [
        (["fit", "--trainer.callbacks.help=nettrace.callbacks.NTKTrace"], "how many samples"),
        (["fit", "--help"], "--trainer.callbacks"),
    ]:
        with pytest.raises(SystemExit) as status:
            cli(*arguments)
        assert not status.value.code
        assert says in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli("fit", "--config", "declared.yaml", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert printed[0]["init_args"]["every"] == 2
    assert printed[1]["init_args"]["probe"]["init_args"]["dataset"]["init_args"] == {"size": 16}
    assert printed[1]["init_args"]["max_seconds"] is None
    assert printed[2]["init_args"]["samples"] == 64  # of subclasses too, all options


@pytest.mark.parametrize(
    ("option", "says"),
    [("evry: 2", "evry"), ("samples: many", "samples"), ("on_error: ignore", "on_error")],
)
def test_options_that_are_wrong_are_refused_by_name(cli, capsys, option, says):
    text = f"""
    trainer:
      callbacks:
      - class_path: nettrace.callbacks.FisherTrace
        init_args: {{{option}}}
    """
    Path("wrong.yaml").write_text(textwrap.dedent(text))
    with pytest.raises(SystemExit) as status:
        cli("fit", "--config", "wrong.yaml")
    assert status.value.code
    assert says in capsys.readouterr().err
