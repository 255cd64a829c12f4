"""A checkpoint that says what it is of gives its network."""

import functools
import importlib
import sys

import pytest
import torch
from saving import hugging_face, network, quietly, same

import nettrace as nt
from nettrace.checkpoints import CheckpointError, build, find, load, restore
from nettrace.checkpoints.building import is_fixed
from nettrace.locate import LocateError

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


def test_without_a_class_the_model_is_asked_for_and_gets_the_arguments(cli_run):
    checkpoint, trained_one = cli_run(subclasses=False)
    says = r"does not say which network.*config.yaml names no class, only arguments.*--model"
    with pytest.raises(CheckpointError, match=says):
        build(checkpoint)
    state = trained_one.state_dict()
    for about in ({}, {"hyper_parameters": load(checkpoint).hyperparameters}):
        torch.save({"state_dict": state, "global_step": 2, **about}, checkpoint.path)
        for given in ("its_module:Net", importlib.import_module("its_module").Net):
            model = quietly(build, checkpoint, model=given)
            restore(model, state)
            assert same(model.state_dict(), trained_one.state_dict())
    torch.save({"state_dict": state, "hyper_parameters": {"width": 9}}, checkpoint.path)
    assert quietly(build, checkpoint, model="its_module:Net").net[0].out_features == 9


@pytest.mark.parametrize("kind", ["mapping", "partial", "class"])
def test_modules_among_arguments_are_made_where_the_command_line_was_used(cli_run, kind):
    checkpoint, trained_one = cli_run(subclasses=True)
    net = importlib.import_module("its_module").Net
    if kind == "mapping":  # config.yaml alone
        torch.save({"state_dict": trained_one.state_dict()}, checkpoint.path)
    given = functools.partial(net, width=6) if kind == "partial" else net
    model = quietly(build, checkpoint, model=given)
    restore(model, load(checkpoint).state)
    assert same(model.state_dict(), trained_one.state_dict())


ANY = """
import pytorch_lightning as pl
from torch import nn

class Net(pl.LightningModule):
    def __init__(self, width, activation=None, optimizer=None):
        super().__init__()
        self.save_hyperparameters()
        self.layers, self.optimizer = nn.Linear(4, width), optimizer

class Any(Net):
    def __init__(self, **rest):
        super().__init__(**rest)

class Whole(pl.LightningModule):
    def __init__(self, options):
        super().__init__()
        self.save_hyperparameters(options)
        self.layers = nn.Linear(4, options["width"])

def function(width=2, **rest):
    assert not rest
    return nn.Linear(4, width)

def plain():
    return nn.Linear(4, 2)

def ending(width):
    raise SystemExit(width)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module, and a function that writes a checkpoint with hyper-parameters."""
    (tmp_path / "own_module.py").write_text(ANY)
    monkeypatch.syspath_prepend(tmp_path)

    def save(**hyperparameters):
        about = {"state_dict": network().state_dict(), "hyper_parameters": hyperparameters}
        torch.save({**about, "hparams_name": "kwargs"}, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    yield importlib.import_module("own_module"), save
    sys.modules.pop("own_module", None)


@pytest.mark.parametrize(("name", "width"), [("Net", 9), ("Any", 9), ("function", 9), ("plain", 2)])
def test_hyperparameters_are_what_a_class_or_function_is_called_with(own, name, width):
    module, save = own
    path = save(width=9, **({"learning_rate": 0.1} if name != "Any" else {}))
    for given in (f"own_module:{name}", getattr(module, name)):
        model = build(path, model=given)
        assert getattr(model, "layers", model).out_features == width
        assert is_fixed(given) == (name == "plain")
    assert build(path, model=functools.partial(module.Net, width=3)).layers.out_features == 3
    assert build(path, model=model) is model
    assert is_fixed(model)


def test_a_trainers_checkpoint_builds_its_network_by_its_class(own, tmp_path):
    pl = importlib.import_module("pytorch_lightning")
    for model in (own[0].Net(7, optimizer=[1]), own[0].Any(width=6), own[0].Whole({"width": 5})):
        trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
        trainer.strategy.connect(model)
        quietly(trainer.save_checkpoint, tmp_path / "b.ckpt", weights_only=True)
        again = build(tmp_path / "b.ckpt", model=f"own_module:{type(model).__name__}")
        restore(again, load(tmp_path / "b.ckpt").state)
        assert same(again.state_dict(), model.state_dict())


def test_what_stands_in_for_an_object_is_no_argument(own):
    module, save = own
    assert build(save(width=9, optimizer=torch.optim.Adam), model=module.Net).optimizer is None
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    assert build(save(width=9, optimizer=adam), model=module.Net).optimizer is None
    assert build(save(width=9, optimizer=adam), True, module.Net).optimizer.keywords == {"lr": 0.1}
    for about in ({"width": [adam]}, {"width": 9, "activation": torch.nn.Tanh()}):
        with pytest.raises(CheckpointError, match=r"'(width.*partial|activation.*Tanh).*--allow-p"):
            build(save(**about), model=module.Net)
    with pytest.raises(LocateError, match=r"Net\(\) failed: TypeError.*'width'"):
        build(save(), model="own_module:Net")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint none.ckpt"):
        build("none.ckpt", model="own_module:Net")
    with pytest.raises(LocateError, match=r"ending\(width=9\) failed: SystemExit: 9"):
        build(save(width=9), model="own_module:ending")
    with pytest.raises(LocateError, match=r"own_module:nn.__name__ to be .*Module, got str"):
        build(save(), model="own_module:nn.__name__")


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


def test_each_checkpoint_is_measured_on_the_network_of_its_own_arguments(own, tmp_path):
    for step, width in ((1, 3), (2, 5), (3, None)):
        saved = own[0].Net(width or 9)
        about = {"width": width, "activation": None} if width else {}
        torch.save(
            {"state_dict": saved.state_dict(), "global_step": step, "hyper_parameters": about},
            tmp_path / f"{step}.ckpt",
        )
    probe = nt.Probe(torch.ones(2, 4), forward=lambda model, inputs: model.layers(inputs))
    found = nt.analyze(tmp_path, probe, ["ntk/trace"], model="own_module:Net", progress=False)
    assert found.done == (1, 2)
    ((path, reason),) = found.failed.items()
    assert path.name == "3.ckpt"
    assert reason.startswith("own_module:Net() failed: TypeError")
    assert "LocateError" not in reason


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
