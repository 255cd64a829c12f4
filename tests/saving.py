"""Checkpoints in every format, of a small network."""

import functools
import json
import warnings

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def trained():
    """A network and its optimizer after a step."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def lightning_file(folder, state, optimizer):
    about = {"epoch": 3, "global_step": 40, "pytorch-lightning_version": "2.6.6"}
    optimizers = {"optimizer_states": [optimizer], "lr_schedulers": []}
    torch.save({**about, "state_dict": state, **optimizers}, folder / "epoch=3.ckpt")
    return folder / "epoch=3.ckpt"


def plain(folder, state, _, name="step=40.pt", **options):
    torch.save(state, folder / name, **options)
    return folder / name


def nested(folder, state, optimizer, states="model_state_dict", step="iteration"):
    found = {states: state, step: torch.tensor(40), "optimizer_state_dict": optimizer, "epoch": 3}
    torch.save(found, folder / "last.pth")
    return folder / "last.pth"


def safetensors(folder, state, _):
    save_file(state, folder / "model_40.safetensors")
    return folder / "model_40.safetensors"


def hugging_face(folder, state, _, suffix="safetensors", shards=1):
    folder = folder / "checkpoint-39"  # trainer_state.json knows better
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text('{"global_step": 40, "epoch": 3.0}')
    (folder / "training_args.bin").write_bytes(b"not weights")
    base = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    if shards == 1:
        save(state, folder / f"{base}.{suffix}")
        return folder
    files = {}
    for shard in range(shards):
        name = f"{base}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {k: v for i, (k, v) in enumerate(state.items()) if i % shards == shard}
        save(part, folder / name)
        files.update(dict.fromkeys(part, name))
    (folder / f"{base}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def distributed(folder, state, optimizer, key="model"):
    folder = folder / "step-40"
    found = {key: state, "step": 40, "epoch": 3, "optim": optimizer, "note": "text"}
    quietly(dcp.save, found if key else state, checkpoint_id=folder, no_dist=True)
    return folder


FORMATS = {
    "lightning": lightning_file,
    "plain": plain,
    "legacy": functools.partial(plain, _use_new_zipfile_serialization=False),
    "bin": functools.partial(plain, name="model-40.bin"),
    "nested": nested,
    "nested model": functools.partial(nested, states="model", step="step"),
    "nested state_dict": functools.partial(nested, states="state_dict", step="global_step"),
    "safetensors": safetensors,
    "hugging face": hugging_face,
    "hugging face, sharded": functools.partial(hugging_face, shards=3),
    "hugging face, bin": functools.partial(hugging_face, suffix="bin"),
    "hugging face, bin, sharded": functools.partial(hugging_face, suffix="bin", shards=2),
    "distributed": distributed,
    "distributed state_dict": functools.partial(distributed, key="state_dict"),
    "distributed, flat": functools.partial(distributed, key=""),
}
