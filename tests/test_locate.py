"""What texts such as module:name stand for."""

import sys

import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace import locate

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import nettrace as nt
import beside

X, Y = torch.arange(40.0).reshape(10, 4), torch.arange(10) % 3
network = nn.Linear(4, 3)
dataset = TensorDataset(X, Y)
loader = DataLoader(dataset, batch_size=2)
several = {"a": nt.Probe(X), "b": nt.Probe(X[:2])}
shuffled = DataLoader(dataset, shuffle=True)
words = "no samples"

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

def drawn():
    return torch.randn(5, 4)

class Data:
    done = ()
    def prepare_data(self):
        self.done += ("prepare",)
    def setup(self, stage):
        self.done += (stage,)
    def val_dataloader(self):
        assert self.done == ("prepare", "fit")
        return [[], loader]
    def train_dataloader(self):
        return shuffled

class Trained(Data):
    def val_dataloader(self):
        raise NotImplementedError

class Broken(Data):
    def val_dataloader(self):
        raise OSError("no such disk")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "my_data.py").write_text(MODULE)
    (tmp_path / "inner" / "beside.py").write_text("")
    (tmp_path / "my_data.py").write_text("other = 1")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("my_data", "beside"))]:
        del sys.modules[name]


FILE = "inner/my_data.py"


def test_a_file_is_imported_once_with_its_folder_whatever_has_its_name():
    assert locate.find("my_data:other") == 1
    network = locate.model(f"{FILE}:network")
    assert isinstance(network, nn.Linear)
    assert locate.model(f"./{FILE}:network") is network
    assert locate.find("my_data:other") == 1
    assert type(locate.model(f"{FILE}:Net")).__name__ == "Net"


@pytest.mark.parametrize(
    ("name", "size", "first"),
    [
        ("X", 10, 0),
        ("dataset", 10, 0),
        ("loader", 10, 0),
        ("shuffled", 10, 0),
        ("Data", 10, 0),
        ("Trained", 10, 0),
    ],
)
def test_probes_are_made_of_what_there_is(name, size, first):
    probe = locate.probe(f"{FILE}:{name}")
    assert len(probe) == size
    assert probe.inputs[0, 0] == first
    assert (probe.targets is None) == (name == "X")


def test_samples_of_a_data_set_are_evenly_spaced():
    assert locate.probe(f"{FILE}:dataset", samples=3).inputs[:, 0].tolist() == [0, 12, 24]
    several = locate.probe(f"{FILE}:several")
    assert {name: len(probe) for name, probe in several.items()} == {"a": 10, "b": 2}


def test_what_is_drawn_is_the_same_each_time_and_leaves_random_states_alone():
    before = training.state(nn.Linear(1, 1))
    found = [locate.probe(f"{FILE}:drawn").inputs for _ in range(2)]
    after = training.state(nn.Linear(1, 1))
    assert torch.equal(*found)
    assert {k: v for k, v in before.items() if k.startswith("random") and k != "random torch"} == {
        k: v for k, v in after.items() if k.startswith("random") and k != "random torch"
    }
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    locate.probe(f"{FILE}:drawn")
    assert torch.equal(torch.rand(2), expected)


def test_a_data_module_of_lightning_gives_its_training_data_where_it_has_no_other():
    from pytorch_lightning import LightningDataModule

    class Module(LightningDataModule):
        def train_dataloader(self):
            return training.loader()

    sys.modules["my_data_of_lightning"] = type(sys)("my_data_of_lightning")
    sys.modules["my_data_of_lightning"].Module = Module
    probe = locate.probe("my_data_of_lightning:Module")
    assert torch.equal(probe.inputs, training.Samples().inputs)


@pytest.mark.parametrize("use", [locate.model, locate.probe, locate.find])
@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)", "raise SystemExit"])
def test_a_file_that_ends_the_program_is_an_error(folder, use, text):
    (folder / "my_data_script.py").write_text(text)
    says = r'my_data_script.py .* it ends the program .SystemExit.*__name__ == "__main__"'
    with pytest.raises(locate.LocateError, match=says):
        use("my_data_script.py:build")


@pytest.mark.parametrize("use", [locate.model, locate.probe])
def test_a_function_that_ends_the_program_is_an_error(folder, use):
    (folder / "my_data_script.py").write_text("def build():\n    raise SystemExit(2)")
    with pytest.raises(locate.LocateError, match=r"build\(\) failed: SystemExit: 2.*line 2"):
        use("my_data_script.py:build")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("my_data", "expected module:name.*path/to/file.py:build, got 'my_data'"),
        ("my_data:othr", "my_data has no 'othr': did you mean 'other'"),
        ("nowhere.py:x", "there is no file nowhere.py"),
        ("nowhere:x", "no module 'nowhere': expected nowhere.py in"),
        (f"{FILE}:words", "expected .*my_data.py:words to be a nettrace.Probe.* got str"),
        (f"{FILE}:Broken", "makes no probe: OSError: no such disk .*my_data.py, line 4"),
        (f"{FILE}:Net", "got Net"),
    ],
)
def test_what_stands_for_nothing_is_said_with_a_way_out(where, says):
    with pytest.raises(locate.LocateError, match=says):
        locate.probe(where)


def test_a_network_has_to_be_one():
    with pytest.raises(locate.LocateError, match=r"torch.nn.Module, got Tensor"):
        locate.model(f"{FILE}:X")
    assert isinstance(locate.load(f"{FILE}:several")["a"], nt.Probe)
