"""No checkpoint gets to run anything, and those that hold data alone load nevertheless."""

import argparse
import collections
import contextlib
import functools
import importlib
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from saving import distributed, hugging_face, network, quietly, same
from torch import nn

from nettrace.checkpoints import CheckpointError, build, find, load, restore


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def poison_lightning(folder, payload, where="callbacks", **options):
    found = {"state_dict": network().state_dict(), "global_step": 1, where: {"x": [payload]}}
    torch.save(found, folder / "a.ckpt", **options)
    return folder / "a.ckpt"


def poison_legacy(folder, payload):
    return poison_lightning(folder, payload, _use_new_zipfile_serialization=False)


def poison_state(folder, payload):
    torch.save({"w": torch.ones(2), "b": payload}, folder / "a.pt")
    return folder / "a.pt"


def poison_raw(folder, payload):
    (folder / "a.pt").write_bytes(pickle.dumps(payload, 2))
    return folder / "a.pt"


def poison_hugging_face(folder, payload):
    path = hugging_face(folder, {"w": torch.ones(2)}, None, "bin")
    torch.save({"w": torch.ones(2), "b": payload}, path / "pytorch_model.bin")
    return path


def poison_metadata(folder, payload):
    path = distributed(folder, network().state_dict(), {})
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data["x"] = payload
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def poison_rest(folder, payload):
    path = distributed(folder, network().state_dict(), {})
    torch.save({"global_step": 1, "hyper_parameters": payload}, path / "meta.pt")
    return path


def poison_step(folder, payload):
    path = folder / "saved"
    quietly(
        dcp.save, {"model": {"w": torch.ones(2)}, "step": payload}, checkpoint_id=path, no_dist=True
    )
    return path


POISONED = {
    "callbacks": poison_lightning,
    "hyper-parameters": functools.partial(poison_lightning, where="hyper_parameters"),
    "optimizer": functools.partial(poison_lightning, where="optimizer_states"),
    "legacy": poison_legacy,
    "state": poison_state,
    "raw pickle": poison_raw,
    "pytorch_model.bin": poison_hugging_face,
    ".metadata": poison_metadata,
    "meta.pt": poison_rest,
    "step of a .distcp": poison_step,
}


@pytest.mark.parametrize("where", POISONED)
def test_code_in_a_checkpoint_is_refused_with_its_name(tmp_path, where, monkeypatch):
    mark = tmp_path / "mark"
    path = POISONED[where](tmp_path, Payload(mark))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, broken = find([tmp_path])
    says = [str(broken[path])]
    for function in (load, build):
        with pytest.raises(CheckpointError) as error:
            function(path)
        says.append(str(error.value))
    assert not mark.exists()
    for text in says:
        assert "mkdir" in text or where == "raw pickle", text
        assert "run code" in text or where == "raw pickle", text
        assert "--allow-pickle" in text or where == "raw pickle", text
    if where != "raw pickle":  # which torch never loads
        with contextlib.suppress(CheckpointError):  # of what is left without the payload
            load(path, allow_pickle=True)
        assert mark.exists()


def test_what_is_not_asked_for_is_not_unpickled(tmp_path):
    mark, state = tmp_path / "mark", network().state_dict()
    found = {"model": state, "step": 3, "optim": {"state": Payload(mark)}, "x": Payload(mark)}
    path = tmp_path / "saved"
    quietly(dcp.save, found, checkpoint_id=path, no_dist=True)
    assert [c.step for c in find([path])[0]] == [3]
    assert same(load(path).state, state)
    assert not mark.exists()


class Own:
    pass


@pytest.mark.parametrize(
    ("payload", "names"),
    [
        (Own(), "test_untrusted.Own"),
        (print, "print"),
        (eval, "eval"),
        (functools.partial(os.system, "true"), "posix.system|nt.system"),
        (nn.Linear(2, 2).register_forward_hook(print), "RemovableHandle"),
    ],
)
def test_unknown_classes_are_named(tmp_path, payload, names):
    payload = {"hyper_parameters": {"x": payload}, "state_dict": {"w": torch.ones(1)}}
    torch.save(payload, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=rf"a.ckpt is refused: it names \S*({names})"):
        load(tmp_path / "a.ckpt")


def attribute_dict():
    return importlib.import_module("lightning.fabric.utilities.data").AttributeDict(x=1)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (argparse.Namespace(a=1, b=[2]), lambda v: (v.a, v.b) == (1, [2])),
        (attribute_dict(), lambda v: v == {"x": 1}),
        (pathlib.Path("a/b"), lambda v: str(v) == "a/b"),
        (pathlib.PurePosixPath("a/b"), lambda v: str(v) == "a/b"),
        (pathlib.PureWindowsPath("a/b"), lambda v: v.parts == ("a", "b")),
        (np.float32(3.5), lambda v: v == 3.5),
        (np.float64(3.5), lambda v: v == 3.5),
        (np.int64(-3), lambda v: v == -3),
        (np.dtype(">i2").type(7), lambda v: v == 7),
        (np.bool_(True), lambda v: v is True),
        (collections.OrderedDict(a=1), lambda v: v == {"a": 1}),
        (collections.defaultdict(dict, a=1), lambda v: v == {"a": 1}),
        (functools.partial(torch.optim.Adam, lr=0.1), bool),
        (functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2), bool),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU()), bool),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), bool),
        (torch.float16, lambda v: v is torch.float16),
        (torch.device("cpu"), bool),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_hyperparameters_load(tmp_path, value, known, zipped):
    before = torch.serialization.get_safe_globals()
    found = {"hyper_parameters": {"x": value}, "state_dict": {"w": torch.ones(1)}}
    torch.save(found, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    if isinstance(value, nn.Module) and not zipped:  # which keeps the source
        with pytest.raises(CheckpointError, match=r"a module with its source.*--allow-pickle"):
            load(tmp_path / "a.ckpt")
        return
    assert known(load(tmp_path / "a.ckpt").hyperparameters["x"])
    for whole in (attribute_dict(), argparse.Namespace(x=1)):
        torch.save({**found, "hyper_parameters": whole}, tmp_path / "a.ckpt")
        assert load(tmp_path / "a.ckpt").hyperparameters == {"x": 1}
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, device="meta"),
        torch.ones(1, device="meta"),
        torch.eye(3).to_sparse(),
        quietly(torch.quantize_per_tensor, torch.ones(2), 0.1, 0, torch.qint8),
        torch.tensor(float("nan")),
        torch.tensor(1j),
        -1,
        2**70,
        1e400,
        "40",
    ],
    ids=str,
)
def test_strange_values_end_in_no_other_error(tmp_path, value):
    for name, found in {
        "a.pt": {"state_dict": {"w": torch.ones(1), "x": value}, "global_step": 2},
        "b.pt": {"state_dict": {"w": torch.ones(1)}, "global_step": value, "epoch": value},
        "c.pt": {"state_dict": {"w": torch.ones(1), "x": value}, "global_step": 2},
    }.items():
        quietly(torch.save, found, tmp_path / name)
        with contextlib.suppress(CheckpointError):
            assert isinstance(load(tmp_path / name).step, int)
            restore(nn.ParameterDict({"w": torch.zeros(1)}), load(tmp_path / name).state)
    quietly(find, tmp_path)


def test_a_whole_module_needs_the_flag(tmp_path):
    model = network()
    for whole in ({"model": model, "step": 2}, model):
        torch.save(whole, tmp_path / "a.pt")
        for function in (load, build):
            with pytest.raises(CheckpointError, match=r"a whole network.*--allow-pickle"):
                function(tmp_path / "a.pt")
        assert same(load(tmp_path / "a.pt", allow_pickle=True).state, model.state_dict())
        built = build(tmp_path / "a.pt", allow_pickle=True)
        assert same(built.state_dict(), model.state_dict())


def test_hostile_safetensors_headers(tmp_path):
    path = tmp_path / "a.safetensors"
    for header in (
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 60)
        + json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
        struct.pack("<Q", 20000) + b"[" * 20000,
    ):
        path.write_bytes(header)
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize(
    "name", ["../../secret.bin", "/etc/passwd", "link.bin", "gone.bin", "", ".."]
)
@pytest.mark.parametrize("index", ["pytorch_model.bin", "model.safetensors"])
def test_indices_do_not_lead_outside(tmp_path, name, index):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    torch.save({"w": torch.ones(1)}, tmp_path / "secret.bin")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "config.json").write_text("{}")
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    _, broken = find([folder])
    assert "lies outside of its folder" in str(broken[folder]) or name == "gone.bin"
    with pytest.raises(CheckpointError, match=r"lies outside of its folder|lacks gone.bin"):
        load(folder)


def test_metadata_does_not_lead_outside(tmp_path):
    path = distributed(tmp_path, network().state_dict(), {})
    content = (path / ".metadata").read_bytes()
    shutil.move(path / "__0_0.distcp", tmp_path / "0_0.distcp")
    assert len("__0_0.distcp") == len("../0_0.distc")
    shutil.move(tmp_path / "0_0.distcp", tmp_path / "0_0.distc")
    (path / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../0_0.distc"))
    with pytest.raises(CheckpointError, match="lies outside"):
        load(path)


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"_class_path": "os.mkdir", "path": "{mark}"}, "no torch.nn.Module: it is not called"),
        ({"_class_path": "subprocess.Popen", "args": ["touch", "{mark}"]}, "it is not called"),
        ({"_class_path": "torch.optim.Adam"}, "which is no torch.nn.Module"),
        ({"_class_path": "nowhere.Net"}, "cannot be imported here.*--model"),
        ({"_class_path": "__main__.Net"}, "cannot be imported here.*--model"),
        ({"_class_path": 3}, "cannot be imported"),
        ({"_class_path": "torch.nn.Linear", "width": 3}, "cannot be made so.*width.*--model"),
        (
            {
                "_class_path": "torch.nn.Linear",
                "in_features": [{"class_path": "os.mkdir", "init_args": {"path": "{mark}"}}],
            },
            "os.mkdir, which is no",
        ),
        (
            {
                "_class_path": "torch.nn.Linear",
                "x": {"class_path": "torch.nn.ReLU", "init_args": 3},
            },
            "no network",
        ),
    ],
)
def test_nothing_but_modules_is_called(tmp_path, described, says):
    mark = tmp_path / "mark"
    described = json.loads(json.dumps(described).replace("{mark}", str(mark)))
    found = {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": described}
    torch.save(found, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=says):
        build(tmp_path / "a.ckpt")
    assert not mark.exists()


def give(inner=None):
    """A network, and what it was made of."""
    network = nn.Linear(1, 1)
    network.inner = inner
    return network


@pytest.mark.parametrize("name", ["os.mkdir", "subprocess.Popen", "never_imported.Net"])
@pytest.mark.parametrize("where", ["config.yaml", "hyper-parameters"])
def test_arguments_of_a_network_that_is_given_are_trusted_no_more(tmp_path, name, where):
    mark = tmp_path / "mark"
    described = {"inner": [{"class_path": name, "init_args": {"path": str(mark)}}]}
    about = {**described, "_instantiator": "os.mkdir"} if where == "hyper-parameters" else {}
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": about}, tmp_path / "a.ckpt")
    if where == "config.yaml":
        (tmp_path / where).write_text(json.dumps({"model": described, "trainer": {}}))
    with pytest.raises(CheckpointError, match=r"it is not called|cannot be imported"):
        build(tmp_path / "a.ckpt", model=give)
    build(tmp_path / "a.ckpt", model=lambda other=1: nn.Linear(1, other))  # which takes none of it
    assert not mark.exists()


def test_dictionaries_among_hyperparameters_are_handed_on_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    described = {"inner": {"class_path": "never_imported.Net"}}
    found = {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": described}
    torch.save(found, tmp_path / "a.ckpt")
    assert build(tmp_path / "a.ckpt", model=give).inner == described["inner"]


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "{Net}sys.exit(0)"])
def test_classes_that_end_the_program_do_not(tmp_path, monkeypatch, text):
    net = "import sys\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self): "
    (tmp_path / "ending.py").write_text(text.replace("{Net}", net))
    monkeypatch.syspath_prepend(tmp_path)
    about = {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {"_class_path": "ending.Net"}}
    torch.save(about, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"cannot be (imported|made).*SystemExit: 0.*--model"):
        build(tmp_path / "a.ckpt")
    sys.modules.pop("ending", None)


@pytest.mark.parametrize(
    "text",
    [
        "model: &a [*a]",
        "model: {class_path: &a [*a]}",
        "model: {class_path: x, init_args: 3}",
        "{model: {inner: &a [*a]}, trainer: {}}",
        "\0",
        "- 1",
    ],
)
def test_hostile_configurations(tmp_path, text):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="--model"):
        build(tmp_path / "a.pt")
    with contextlib.suppress(CheckpointError):  # of what holds itself
        assert isinstance(build(tmp_path / "a.pt", model=give), nn.Module)
    (tmp_path / "config.yaml").write_text("model: !!python/object/apply:os.mkdir [x]")
    with pytest.raises(CheckpointError, match="--model"):
        build(tmp_path / "a.pt")
    assert not Path("x").exists()
