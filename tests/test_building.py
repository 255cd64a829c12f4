"""A checkpoint that says what it is of gives its network."""

import importlib
import sys

import pytest
import torch
from saving import hugging_face, network, quietly, same

from nettrace.checkpoints import CheckpointError, build, find, load, restore

MODULE = """
import importlib
import sys
import torch
from torch import nn

pl = importlib.import_module({namespace!r})

class Net(pl.LightningModule):
    def __init__(self, width: int = 4, inner: nn.Module = None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(inner or nn.Linear(4, width), nn.Linear(width, 2))

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), 4)
"""


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def cli_run(request, tmp_path, monkeypatch):
    """What a run of LightningCLI leaves; the function runs it."""
    (tmp_path / "its_module.py").write_text(MODULE.format(namespace=request.param))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])

    def run(subclasses):
        cli = importlib.import_module(request.param + ".cli").LightningCLI
        net = importlib.import_module("its_module").Net
        args = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
        args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        args += [f"--trainer.default_root_dir={tmp_path / 'runs'}", "--model.width=6"]
        args += [f"--trainer.logger={request.param}.loggers.CSVLogger"]
        args += [f"--trainer.logger.save_dir={tmp_path / 'runs'}"]
        if subclasses:
            inner = ["--model.inner=torch.nn.Linear", "--model.inner.in_features=4"]
            args = [*args[:1], "--model=its_module.Net", *args[1:], *inner]
            args += ["--model.inner.out_features=6", "--model.inner.bias=false"]
        made = quietly(cli, net, subclass_mode_model=subclasses, args=args)
        (checkpoint,), broken = find([tmp_path / "runs"])
        assert (checkpoint.step, checkpoint.coordinates, broken) == (2, {"epoch": 0}, {})
        return checkpoint, made.model

    yield run
    sys.modules.pop("its_module", None)


def test_a_lightning_cli_checkpoint_builds_its_network(cli_run):
    checkpoint, trained_one = cli_run(subclasses=True)
    assert load(checkpoint).hyperparameters["_class_path"] == "its_module.Net"
    model = quietly(build, checkpoint)
    restore(model, load(checkpoint).state)
    assert type(model) is type(trained_one)
    assert same(model.state_dict(), trained_one.state_dict())
    assert model.net[0].bias is None


def test_config_yaml_builds_the_network(cli_run):
    checkpoint, trained_one = cli_run(subclasses=True)
    torch.save({"state_dict": trained_one.state_dict(), "global_step": 2}, checkpoint.path)
    model = quietly(build, checkpoint)
    restore(model, load(checkpoint).state)
    assert same(model.state_dict(), trained_one.state_dict())


def test_without_a_class_the_model_is_asked_for(cli_run):
    checkpoint, _ = cli_run(subclasses=False)
    with pytest.raises(CheckpointError, match=r"does not say which network.*--model"):
        build(checkpoint)


def test_optimizers_among_arguments_are_not_made(tmp_path, monkeypatch):
    text = "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, optimizer):\n"
    text += "        super().__init__(2, 2)\n        self.optimizer = optimizer\n"
    (tmp_path / "with_optimizer.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}}
    found = {"_class_path": "with_optimizer.Net", "optimizer": adam}
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": found}, tmp_path / "a.ckpt")
    model = build(tmp_path / "a.ckpt")
    assert model.optimizer(model.parameters()).defaults["lr"] == 0.5


@pytest.fixture
def transformers():
    return quietly(importlib.import_module, "transformers")


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_hugging_face_models_are_built(tmp_path, transformers, kind, dtype, shards):
    kind = quietly(getattr, transformers, kind)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = quietly(kind.config_class, **sizes, **tokens, intermediate_size=64)
    original = kind(config).to(dtype)
    quietly(original.save_pretrained, tmp_path / "checkpoint-8", max_shard_size=shards)
    theirs = quietly(kind.from_pretrained, tmp_path / "checkpoint-8", dtype="auto").eval()
    ((checkpoint,), _) = find([tmp_path])
    assert checkpoint.step == 8
    model = quietly(build, checkpoint).eval()
    restore(model, load(checkpoint).state)
    inputs = torch.arange(9)[None]
    assert next(model.parameters()).dtype == dtype
    assert torch.equal(model(inputs).logits, theirs(inputs).logits)


@pytest.mark.parametrize(
    "config",
    ['{"architectures": ["Trainer"]}', '{"architectures": ["Nothing"]}', "{}", "[", "[" * 99999,
     '{"architectures": ["GPT2Model"], "model_type": "own", "auto_map": {"AutoConfig": "x.X"}}'],
)  # fmt: skip
def test_other_hugging_face_configurations_ask_for_the_model(tmp_path, transformers, config):
    path = hugging_face(tmp_path, network().state_dict(), None)
    (path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="--model"):
        quietly(build, path)
