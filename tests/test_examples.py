"""What README and examples show, works as copied."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nettrace as nt

ROOT = Path(__file__).parents[1]
LIGHTNING = [
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:Trying to infer the `batch_size`",
    "ignore:Starting from v1.9.0, `tensorboardX`",
]
pytestmark = [pytest.mark.filterwarnings(f) for f in LIGHTNING]


def hugging_face():
    """What stands for users' own in the README's examples of Hugging Face's loops."""
    import accelerate
    import transformers

    config = transformers.BertConfig(
        **{"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_labels": 3},
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 4},
    )
    arguments = transformers.TrainingArguments(
        "runs/bert", max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    sentences = [{"input_ids": torch.arange(4) + i % 5, "labels": i % 3} for i in range(9)]
    return {
        "accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2),
        "bert": transformers.BertForSequenceClassification(config),
        "arguments": arguments,
        "sentences": sentences,
    }


def test_readme(tmp_path, monkeypatch, logged):
    import pytorch_lightning as pl

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    names = {"x": x, "y": y, "torch": torch, "F": F, "model": Model()}
    names |= {"images": x, "labels": y, "other": Model()}  # of a landscape
    names["loader"] = DataLoader(TensorDataset(x, y), batch_size=8)
    names |= {"optimizer": torch.optim.SGD(names["model"].parameters(), 0.1), **hugging_face()}
    for block in blocks:
        exec(block, names)
    assert {"ntk_entropy", "fisher_trace", "collective_chi_align"} <= set(names["data"])
    assert names["data"].sizes["step"] > 5
    assert nt.open("runs/edge").hessian_stability.notnull().all()
    assert nt.open("runs/window").weights_flatness_exponent.notnull().all()
    assert "the window is not equilibrated" in logged.pop()
    assert nt.open("runs/gradients").gradients_noise_scale.notnull().all()
    for loop in ("attached", "loop", "accelerate", "transformers"):
        assert nt.open(f"runs/{loop}").step.values.tolist() == [0]
        assert nt.open(f"runs/{loop}").ntk_trace.notnull().all()


def test_digits_example(tmp_path):
    """The main job, short: it prints what it recorded, and draws."""
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "digits.py", "--epochs", "1", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"ntk_gram +60 x 10 x 60 x 10", run.stdout)
    assert re.search(r"Measuring took [\d.]+ s of [\d.]+ s, \d+ % of the training", run.stdout)
    assert (tmp_path / "out" / "digits.png").stat().st_size > 50_000
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    data = nt.open(tmp_path / "out" / "trace")
    assert data.loss_accuracy[-1] > data.loss_accuracy[0]


@pytest.mark.slow
def test_checkpoints_of_the_demo_are_analysed_as_the_readme_shows(tmp_path):
    """The commands as copied, in a folder that has examples/."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def command(text):
        return subprocess.run(
            text, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    trained = command("WANDB_SILENT=true python examples/digits.py --epochs 6")
    assert trained.returncode == 0, trained.stderr
    readme = (ROOT / "README.md").read_text()
    for start in ("nettrace analyze runs/digits", "nettrace export runs/digits"):
        (text,) = re.findall(rf"^({start}(?:.*\\\n)*.*)$", readme, re.M)
        found = command(text)
        assert found.returncode == 0, found.stderr
    data = nt.open(tmp_path / "runs" / "digits" / "analysis")
    assert data.step.values.tolist() == [135, 270]
    assert data.ntk_trace.notnull().all()
    assert nt.open(tmp_path / "analysis.nc").ntk_trace.equals(data.ntk_trace)


@pytest.mark.slow
def test_entropy_example(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "entropy.py", "--steps", "30", "--seeds", "1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    changes = re.findall(r"(\d) layers? of \d+ +(\S+) +([\d.]+) -> +([\d.]+)", run.stdout)
    change = {(layers, name): float(b) - float(a) for layers, name, a, b in changes}
    assert change["3", "ntk/entropy_normalised"] > 0.02
    assert change["1", "ntk/entropy_traced_normalised"] < -0.02
    assert (tmp_path / "runs" / "entropy" / "entropy.png").stat().st_size > 50_000
    assert nt.open(tmp_path / "runs" / "entropy" / "3 layers of 50, seed 0").step[-1] == 24


def example(name, tmp_path, *arguments):
    """What an example prints."""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", ROOT / "examples" / name, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_edge_of_stability_example(tmp_path):
    printed = example("edge_of_stability.py", tmp_path, "--steps", "600", "--out", "out")
    assert "2 / eta = 5" in printed
    assert "for the first time at step 400" in printed
    assert (tmp_path / "out" / "edge_of_stability.png").stat().st_size > 30_000
    assert nt.open(tmp_path / "out" / "trace").hessian_stability.max() > 1
    assert nt.open(tmp_path / "out" / "spectra").step.values.tolist() == [0, 120, 600]


@pytest.mark.slow
def test_edge_of_stability_example_of_digits(tmp_path):
    printed = example("edge_of_stability.py", tmp_path, "--digits", "--out", "out")
    (ratio,) = re.findall(r"on it is ([\d.]+) of that on average", printed)
    assert float(ratio) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_variance_flatness_example(tmp_path):
    arguments = ("--epochs", "9", "--windows", "1", "2", "--out", "out")
    printed = example("variance_flatness.py", tmp_path, *arguments)
    rows = re.findall(r"^ +(\d+) +([-\d.]+) +([-\d.]+) to ([-\d.]+)", printed, re.M)
    assert [int(row[0]) for row in rows] == [1, 2]
    for _, psi, low, high in rows:
        assert float(low) < float(psi) < float(high)
    assert "the window is not equilibrated" in printed
    assert (tmp_path / "out" / "variance_flatness.png").stat().st_size > 30_000


@pytest.mark.slow
def test_representations_example(tmp_path):
    printed = example("representations.py", tmp_path, "--steps", "60", "--out", "out")
    changes = re.findall(r"separation of .*: ([.\d]+) \+- [.\d]+ -> ([.\d]+)", printed)
    assert len(changes) == 2
    assert all(float(last) > float(first) + 0.1 for first, last in changes)
    assert (tmp_path / "out" / "representations.png").stat().st_size > 50_000


@pytest.mark.slow
def test_landscape_example(tmp_path):
    printed = example("landscape.py", tmp_path, "--weights", "9", "--seconds", "1", "--out", "out")
    assert re.search(r"entropies of two runs differ by [\d.]+ nats", printed)
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 30_000


@pytest.mark.slow
def test_focusing_example(tmp_path):
    arguments = ("--depths", "4", "--seeds", "2", "--steps", "60", "--out", "out")
    printed = example("focusing.py", tmp_path, *arguments)
    assert len(re.findall(r"^ +4  (?:He|half|equal) +(?:SGD|Adam)", printed, re.M)) == 6
    assert re.search(r"alternate more than chance \(lowest p of 12: .*\), in 12 networks", printed)
    assert (tmp_path / "out" / "focusing.png").stat().st_size > 30_000


@pytest.mark.slow
def test_uncertainty_example(tmp_path):
    printed = example("uncertainty.py", tmp_path, "--epochs", "4", "--out", "out")
    assert "laplace-torch is not installed" in printed or "  laplace-torch  -log p" in printed
    found = re.findall(r"^  (last layer|constant|softmax|five networks) +-log p", printed, re.M)
    assert len(found) == 6
    rise = re.findall(r"^  last layer .* variance x ([\d.]+) for inputs x 2", printed, re.M)
    assert float(rise[0]) > 1
    assert (tmp_path / "out" / "uncertainty.png").stat().st_size > 50_000


@pytest.mark.slow
def test_variance_flatness_example_in_full(tmp_path):
    """The longer the window, the smaller the exponent."""
    printed = example("variance_flatness.py", tmp_path, "--windows", "5", "10", "50")
    rows = re.findall(r"^ +(\d+) +([\d.]+) +[\d.]+ to", printed, re.M)
    psi = {int(window): float(value) for window, value in rows}
    assert 3.3 < psi[10] < 4.5
    assert psi[5] > psi[10] > psi[50]


@pytest.mark.parametrize("quantity", ["norms", "loss_gram", "traces", "mc_fisher", "ntk"])
@pytest.mark.parametrize("network", ["mlp", "gpt"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap over attention
def test_benchmarks_compare_like_with_like(monkeypatch, quantity, network):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods, workloads = (importlib.import_module(name) for name in ("methods", "workloads"))
    small = {
        "mlp": lambda: workloads.mlp(samples=4, width=8),
        "gpt": lambda: workloads.gpt(samples=2, context=4, width=8, depth=1, heads=2),
    }[network]
    ours = methods.METHODS[quantity]["nettrace"](small())()
    compared = 0
    for name, prepare in methods.METHODS[quantity].items():
        if name.startswith("torch.func") and (call := prepare(small())) is not None:
            for key, value in call().items():
                torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
                compared += 1
    assert compared
