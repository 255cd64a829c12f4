"""Checkpoints of every format are found, in order, and give back their weights."""

import argparse
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from saving import FORMATS, distributed, hugging_face, network, same, trained
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from nettrace.checkpoints import CheckpointError, find, load, restore


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_weights_and_step(tmp_path, name):
    model, optimizer = trained()
    path = FORMATS[name](tmp_path, model.state_dict(), optimizer.state_dict())
    for paths in (tmp_path, [path], [f"{tmp_path}/*"], [tmp_path, path]):
        (checkpoint,), broken = find(paths)
        assert (checkpoint.path, checkpoint.step, broken) == (path, 40, {})
    files = list(path.iterdir()) if path.is_dir() else [path]
    assert checkpoint.size == sum(f.stat().st_size for f in files)
    assert checkpoint.modified == max(f.stat().st_mtime for f in files)
    contents = load(checkpoint)
    assert same(contents.state, model.state_dict())
    assert contents.step == load(path).step == 40
    if "epoch" in checkpoint.coordinates:
        assert checkpoint.coordinates == contents.coordinates == {"epoch": 3}
    other = network()
    restore(other, contents.state)
    assert same(other.state_dict(), model.state_dict())
    if name in ("lightning", "nested"):
        again = torch.optim.Adam(other.parameters())
        again.load_state_dict(contents.optimizers[0])
        assert torch.equal(
            again.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"]
        )


def test_files_are_mapped_rather_than_copied(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1 << 20)}, "step": 1}, tmp_path / "a.pt")
    before = load(tmp_path / "a.pt").state["w"]
    data = (tmp_path / "a.pt").read_bytes()
    place = data.index(bytes(4096))
    with (tmp_path / "a.pt").open("r+b") as file:  # what is written shows in what is mapped
        file.seek(place + 2048)
        file.write(b"\1" * 1024)
    assert before.any()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("epoch=3-step=100.ckpt", 100),
        ("epoch=3-step=100-v1.ckpt", 100),
        ("step_100.pt", 100),
        ("step100.pth", 100),
        ("bert-base-step1000.safetensors", 1000),
        ("global_step00100.pt", 100),
        ("iter_0100.pth", 100),
        ("checkpoint-100.pt", 100),
        ("model_100.pt", 100),
        ("100.pt", 100),
        ("step_100/model.pt", 100),
        ("checkpoint-100/model.safetensors", 100),
        ("epoch=3.ckpt", 3),
        ("model_epoch_7.pt", 7),
        ("x_e5_s500.pt", 500),
        ("e5-s500.pt", 500),
        ("net_s1.pt", 0),  # perhaps a seed
        ("a_44.pt", 0),
        (f"step={10**19}.pt", 0),
        (f"epoch={10**99}.pt", 0),
        ("resnet18.pt", 0),
        ("vgg_16.pt", 0),
        ("2/last.pt", 0),
        ("version_2/last.pt", 0),
        ("step_10k.pt", 0),
    ],
)
def test_names_tell_steps_of_single_checkpoints(tmp_path, name, step):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)({"w": torch.ones(2)}, path)
    (checkpoint,), broken = find([tmp_path])
    assert (checkpoint.step, broken) == (step, {})
    assert load(path).step == step


def test_threads_may_load_at_once(tmp_path):
    about = {"hyper_parameters": argparse.Namespace(x=1)}
    torch.save({**about, "state_dict": network().state_dict()}, tmp_path / "a.ckpt")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, [tmp_path / "a.ckpt"] * 200))
    assert all(contents.hyperparameters == {"x": 1} for contents in found)


def test_a_folder_is_searched_and_put_in_order(tmp_path):
    model, optimizer = trained()
    for step in (200, 30, 1000):
        folder = tmp_path / "run" / "version_0" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"state_dict": network().state_dict(), "global_step": step}, folder / f"{step}x.pt"
        )
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.get_rng_state(), folder / "rng_state.pth")
    torch.save({"lr": 0.1}, folder / "hyper.pt")
    (folder / "tokens.bin").write_bytes(bytes(range(200)))
    (folder / "part-00000.ntl").write_bytes(b"trace")
    (folder / "events.out.tfevents").write_bytes(b"log")
    found, broken = find([tmp_path])
    assert ([c.step for c in found], broken) == ([30, 200, 1000], {})
    for pattern in (f"{tmp_path}/**/*.pt", f"{tmp_path}/run/*"):
        assert [c.step for c in find([pattern])[0]] == [30, 200, 1000]
    found, broken = find([folder / "30x.pt", folder / "optimizer.pt", folder / "tokens.bin"])
    assert [c.step for c in found] == [30]
    assert "holds no weights" in str(broken.pop(folder / "optimizer.pt"))
    assert "cannot be read" in str(broken.pop(folder / "tokens.bin"))
    assert not broken


def test_of_one_step_one_checkpoint_is_kept(tmp_path):
    state = network().state_dict()
    for name in ("last.ckpt", "epoch=0-step=7.ckpt"):
        torch.save({"state_dict": state, "global_step": 7}, tmp_path / name)
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "last.ckpt")
    found, broken = find([tmp_path])
    assert ([c.path.name for c in found], broken) == (["epoch=0-step=7.ckpt"], {})
    state["0.weight"][0, 0] += 1e-3
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "last.ckpt")
    found, broken = find([tmp_path])
    assert [c.path.name for c in found] == ["epoch=0-step=7.ckpt"]
    assert "other weights than" in str(broken[tmp_path / "last.ckpt"])


def save_networks(folder, *names, **about):
    for name in names:
        torch.save({"state_dict": network().state_dict(), **about}, folder / name)


def test_epochs_are_steps_if_none_tells_a_step(tmp_path):
    save_networks(tmp_path, "epoch_10.pt", "net-epoch2.pt", "best.pt", "a_1.pt")
    found, broken = find([tmp_path])
    assert [(c.step, c.coordinates) for c in found] == [(2, {"epoch": 2}), (10, {"epoch": 10})]
    assert {path.name for path in broken} == {"best.pt", "a_1.pt"}
    save_networks(tmp_path, "step_50.pt")
    found, broken = find([tmp_path])
    assert [c.step for c in found] == [50]
    assert "only its epoch 2" in str(broken[tmp_path / "net-epoch2.pt"])
    assert "rename it to best-step=100.pt" in str(broken[tmp_path / "best.pt"])


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["a_44.pt", "a_100.pt", "a_9.pth"], [9, 44, 100]),
        (["a_44.pt", "a_100.pt", "best.pt"], [44, 100]),
        (["run-1.5.pt", "run-1.10.pt"], [5, 10]),
        (["a_44.pt", "b_100.pt"], []),
        (["a_44.pt", "best.pt"], []),
        (["resnet18.pt", "resnet50.pt"], []),
        (["a_44.pt", "a_100.pt", "step_3.pt"], [3]),
        (["x_e1_s5.pt", "x_e2_s70.pt"], [5, 70]),
    ],
)
def test_numbers_that_end_names_count_where_names_are_alike_and_nothing_else_does(
    tmp_path, names, steps
):
    save_networks(tmp_path, *names)
    found, broken = find([tmp_path])
    assert [c.step for c in found] == steps
    assert len(broken) == len(names) - len(steps)
    assert all("does not tell its step" in str(error) for error in broken.values())


@pytest.mark.parametrize("step", [10**19, -5, 2.5, float("nan"), torch.tensor(-1)])
def test_what_is_no_step_is_told_with_its_value(tmp_path, step):
    save_networks(tmp_path, "a.pt", global_step=step, epoch=3)
    value = step.item() if isinstance(step, torch.Tensor) else step
    for other in ("", "step_4.pt"):
        if other:
            save_networks(tmp_path, other)
        found, broken = find([tmp_path])
        assert [c.step for c in found] == [4] * bool(other)
        says = f"a.pt says global_step={value}, which is no number of updates"
        assert says in str(broken[tmp_path / "a.pt"])
    save_networks(tmp_path, "a-step=9.pt", global_step=step)
    assert [c.step for c in find([tmp_path])[0]] == [4, 9]


def test_nothing_found_says_what_was_searched_for(tmp_path):
    (tmp_path / "log.txt").write_text("no weights")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .*\*.ckpt.*config.json.*.metadata"
    ):
        find([tmp_path])
    with pytest.raises(CheckpointError, match=r"there is no .*none.ckpt"):
        find([tmp_path / "none.ckpt"])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path)


WHOLE = {
    "network": lambda state: network(),
    "network, with its step": lambda state: {"model": network(), "step": 3},
    "name": lambda state: {"policy": state, "step": 3},
    "names": lambda state: {"generator": state, "discriminator": state},
    "parts": lambda state: {"model": {"encoder": state, "decoder": state}},
}
OTHER = {
    "tensor": lambda state: torch.ones(3),
    "tensors": lambda state: [torch.ones(3)],
    "nothing": lambda state: {},
    "numbers": lambda state: {"lr": 0.1, "model": {"width": 3}},
    "optimizer": lambda state: trained()[1].state_dict(),
    "optimizers": lambda state: {"optimizer": trained()[1].state_dict(), "optim": [state]},
    "random states": lambda state: {"rng": {"cpu": torch.get_rng_state()}, "optim": state},
}


@pytest.mark.parametrize("name", WHOLE)
def test_weights_that_cannot_be_used_are_broken_rather_than_none(tmp_path, name):
    torch.save(WHOLE[name](network().state_dict()), tmp_path / "step_7.pt")
    for alone in (True, False):
        found, broken = find([tmp_path])
        assert (len(found), list(broken)) == (0 if alone else 1, [tmp_path / "step_7.pt"])
        with pytest.raises(CheckpointError, match=r"--allow-pickle|'policy'|'generator'|'model'"):
            load(tmp_path / "step_7.pt")
        assert "step_7.pt holds" in str(broken[tmp_path / "step_7.pt"])
        torch.save(network().state_dict(), tmp_path / "step_5.pt")


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_checkpoint_is_named_where_nothing_is_found(tmp_path, name):
    for number in range(5):
        torch.save(OTHER[name](network().state_dict()), tmp_path / f"{number}.pt")
    says = r"searched for .*passed over: \S*0.pt holds no weights: expected .* got .*; .*; passed "
    with pytest.raises(CheckpointError, match=says + "over: 2 more files"):
        find(tmp_path)
    torch.save(network().state_dict(), tmp_path / "step_5.pt")
    found, broken = find([tmp_path])
    assert ([c.step for c in found], broken) == ([5], {})


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        ("model", "model_ema"),
        ("state_dict", "ema"),
        ("net", "ema_state_dict"),
        ("current_model_state", "state_dict"),  # as Lightning's WeightAveraging has it
        ("model_ema", "notes"),
        ("ema", "notes"),
    ],
)
def test_weights_are_preferred_to_their_average(tmp_path, kept, other):
    states = {kept: network().state_dict(), other: network().state_dict()}
    for about in (states, dict(reversed(states.items()))):
        torch.save({**about, "step": 6}, tmp_path / "a.pt")
        contents = load(tmp_path / "a.pt")
        assert same(contents.state, states[kept])
        assert contents.step == 6


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b"",
        lambda b: b[:7],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-30],
        lambda b: b"garbage" * 99,
        lambda b: b"PK\x03\x04" + b[:99],
        lambda b: b[:300] + b[900:],
        lambda b: bytes(len(b)),
    ],
    ids=["empty", "7 bytes", "half", "end", "garbage", "wrong zip", "gap", "zeros"],
)
@pytest.mark.parametrize("name", ["lightning", "legacy", "safetensors", "distributed", ".metadata"])
def test_damage_is_an_error_with_a_reason(tmp_path, name, change):
    path = FORMATS.get(name, distributed)(tmp_path, network().state_dict(), {})
    part = {"distributed": path / "__0_0.distcp", ".metadata": path / ".metadata"}.get(name, path)
    before = part.read_bytes()
    damage(part, change)
    if part.read_bytes() == before:
        pytest.skip("no change")
    torch.save(network().state_dict(), tmp_path / "step_5.pt")
    found, broken = find([tmp_path])
    assert 5 in [c.step for c in found]  # the others are found nevertheless
    with pytest.raises(CheckpointError, match=r"damaged|empty|cut off|lacks"):
        load(path)
    assert broken or name == "distributed"


@pytest.mark.parametrize("name", ["lightning", "legacy", "safetensors", "distributed", ".metadata"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_gives_an_error_or_weights(tmp_path, name, data):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    state = network().state_dict()
    path = FORMATS.get(name, distributed)(tmp_path, state, {})
    part = {"distributed": path / "__0_0.distcp", ".metadata": path / ".metadata"}.get(name, path)
    content = bytearray(part.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    part.write_bytes(bytes(content))
    try:
        found = load(path)
    except CheckpointError:
        return
    if name in ("lightning", "distributed"):  # which have checksums
        assert same(found.state, state)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    state = network().state_dict()
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    saved = hugging_face(tmp_path, state, None, shards=2)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for i, file in enumerate(saved.iterdir()):
        shutil.copy(file, blobs / str(i))
        (folder / file.name).symlink_to(f"../../blobs/{i}")
    assert same(load(folder).state, state)


def test_shards_belong_together(tmp_path):
    folder = hugging_face(tmp_path, network().state_dict(), None, shards=3)
    shard = next(folder.glob("model-00002*"))
    with pytest.raises(CheckpointError, match="one of several files"):
        load(shard)
    shard.unlink()
    assert "lacks model-00002-of-00003" in str(find([folder])[1][folder])


def test_metadata_of_older_versions(tmp_path):
    state = network().state_dict()
    path = distributed(tmp_path, state, {})
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for about in metadata.state_dict_metadata.values():
        if hasattr(about, "properties"):
            about.properties = TensorProperties(about.properties.dtype)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert b"_shard" in (path / ".metadata").read_bytes()
    assert same(load(path).state, state)


def test_a_missing_rank_is_told(tmp_path):
    path = distributed(tmp_path, network().state_dict(), {})
    (path / "__0_0.distcp").unlink()
    assert "lacks __0_0.distcp" in str(find([tmp_path])[1][path])


PARALLEL = """
import sys
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

class Net(pl.LightningModule):
    def __init__(self, width=9):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)
    def on_train_end(self):
        full = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True))
        if self.global_rank == 0:
            torch.save(full, "full.pt")

if __name__ == "__main__":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=3,
                         default_root_dir="runs", **options)
    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    trainer.fit(Net(), torch.utils.data.DataLoader(data, 2))
"""


@pytest.mark.slow
def test_two_processes_of_lightning_leave_one_checkpoint(tmp_path):
    (tmp_path / "train.py").write_text(PARALLEL)
    command = [sys.executable, "-W", "ignore", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (checkpoint,), broken = find([tmp_path / "runs"])
    assert (checkpoint.step, checkpoint.coordinates, broken) == (3, {"epoch": 0}, {})
    assert len(list(checkpoint.path.glob("*.distcp"))) == 2
    contents = load(checkpoint)
    assert same(contents.state, torch.load(tmp_path / "full.pt", weights_only=True))
    assert contents.hyperparameters == {"width": 9}
    next(checkpoint.path.glob("__1_0.distcp")).unlink()
    assert "lacks __1_0.distcp" in str(find([tmp_path / "runs"])[1][checkpoint.path])
