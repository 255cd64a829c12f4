"""Small trainings under Lightning, and all of a training that a measurement could disturb."""

from __future__ import annotations

import csv
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
#: For what older Lightnings do otherwise: they resume with other batches, and average no weights.
recent = pytest.mark.skipif(
    tuple(map(int, version("lightning").split(".")[:2])) < (2, 6), reason="an older Lightning"
)

#: What Lightning says of trainings as small as these, or on account of its own code.
HARMLESS = (
    "ignore:.*does not have many workers:UserWarning",  # workers would cost more than they bring
    "ignore:You defined a `validation_step` but have no:UserWarning",  # most need none
    "ignore:Found 1 module.* in eval mode:UserWarning",  # `delicate` has one on purpose
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",  # Lightning 2.6 under torch 2.13
    "ignore:GPU available but not used:UserWarning",  # these run on the CPU wherever they run
)


class Samples(Dataset):
    """Points and their classes, random but the same each time."""

    def __init__(self, seed: int = 0, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 4, generator=generator)
        self.targets = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Augmented(Samples):
    """The same with noise from each of the streams that augmentations draw from."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.1 * (torch.randn(4) + np.random.randn() + random.gauss(0, 1)).float(), y


class Stream(IterableDataset):
    """Samples that come in their own order and without numbers."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (Samples()[i] for i in range(16))


@cache
def network(namespace: str = NAMESPACES[0]) -> type[Any]:
    """The class of a classifier of `Samples` that has nothing to it."""

    class Network(import_module(namespace).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Network


@cache
def delicate(namespace: str = NAMESPACES[0]) -> type[Any]:
    """The class of a classifier that has all that a measurement could disturb.

    It takes notes of its own state at each batch.
    """

    class Delicate(network(namespace)):
        def __init__(self, optimizer: str = "AdamW") -> None:
            super().__init__()
            self.net = nn.Sequential(
                *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3)),
                *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
            )
            self.net[5].eval()  # as users do with norms that were trained elsewhere
            self.net[4].bias.requires_grad_(False)
            self.optimizer = optimizer
            self.notes: list[dict[str, Any]] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.notes.append({"batch": batch[0].clone(), **state(self)})
            return super().training_step(batch, index)

        def configure_optimizers(self) -> Any:
            options = {"momentum": 0.9, "nesterov": True} if self.optimizer == "SGD" else {}
            return getattr(torch.optim, self.optimizer)(self.parameters(), 0.01, **options)

    return Delicate


def loader(dataset: Any = None, **options: Any) -> DataLoader:
    """A loader of the samples, four at a time and in their order."""
    return DataLoader(Samples() if dataset is None else dataset, **{"batch_size": 4, **options})


def trainer(callbacks: Any, *, namespace: str = NAMESPACES[0], **options: Any) -> Any:
    """A trainer for four steps that says and writes nothing that is not asked for."""
    quiet = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False
    )
    settings = {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1, **quiet, **options}
    return import_module(namespace).Trainer(callbacks=callbacks, **settings)


def fit(
    callbacks: Any,
    model: Any = None,
    data: Any = None,
    validation: Any = None,
    *,
    namespace: str = NAMESPACES[0],
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """Trains as `trainer` says, and returns that."""
    its = trainer(callbacks, namespace=namespace, **options)
    model = network(namespace)() if model is None else model
    data = loader() if data is None else data
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small, threads mostly wait for each other
    try:
        its.fit(model, data, validation, ckpt_path=ckpt_path)
    finally:
        torch.set_num_threads(threads)
    return its


def seed(number: int = 0) -> None:
    """Sets the three random streams."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def state(model: nn.Module) -> dict[str, Any]:
    """All of a network and of the process that a measurement could disturb, by name."""
    found: dict[str, Any] = {
        "random torch": torch.get_rng_state(),
        "random numpy": repr(np.random.get_state(legacy=False)),
        "random python": repr(random.getstate()),
        "flag default dtype": torch.get_default_dtype(),
        "flag grad": torch.is_grad_enabled(),
        "flag inference": torch.is_inference_mode_enabled(),
        "flag autocast": torch.is_autocast_enabled("cpu"),
        "flag deterministic": torch.are_deterministic_algorithms_enabled(),
        "flag anomaly": torch.is_anomaly_enabled(),
        "flag threads": torch.get_num_threads(),
    }
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = parameter.detach().clone()
        found[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"requires_grad {name}"] = parameter.requires_grad
        found[f"hooks {name}"] = _hooks(parameter)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.detach().clone()
    for name, module in model.named_modules():
        found[f"mode {name}"] = module.training
        found[f"hooks {name}"] = _hooks(module)
    return found


def result(trainer: Any, model: nn.Module) -> dict[str, Any]:
    """All that came of a training: the network, its optimizers, and what was logged of it.

    What we add to the logs has "/" in its name.
    """
    logged: dict[str, Any] = {"trainer": _own(trainer.callback_metrics)}
    for number, logger in enumerate(trainer.loggers):
        path = Path(getattr(logger, "log_dir", None) or "") / "metrics.csv"
        if path.is_file():
            with path.open() as file:
                names = sorted(_own(dict.fromkeys(next(csv.reader(file)))).keys() - {"step"})
            logged[f"logger {number}"] = {name: column(path.parent, name) for name in names}
    return {
        **state(model),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scaler": dict(trainer.precision_plugin.state_dict()),
        "progress": (trainer.global_step, trainer.current_epoch),
        "logged": logged,
        "course": getattr(model, "notes", []),
        "hooks": hooks(model),
    }


def _own(logged: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in logged.items() if "/" not in name}


def hooks(model: nn.Module) -> int:
    """How many hooks there are on a network's modules and parameters."""
    return sum(_hooks(owner) for owner in (*model.modules(), *model.parameters()))


def _hooks(owner: Any) -> int:
    names = {"_backward_hooks", "_post_accumulate_grad_hooks", *vars(owner)}
    return sum(len(getattr(owner, n, None) or ()) for n in names if n.endswith("_hooks"))


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two nests of tensors and plain values differ, be it in a bit."""
    if type(one) is not type(other):
        return [name]
    if isinstance(one, Tensor):
        return [] if _bits(one) == _bits(other) else [name]
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{name}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, Sequence) and not isinstance(one, str) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{name}/{i}")]
    return [] if one == other else [name]


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def write_grad(model: nn.Module) -> None:
    model.net[0].weight.grad = torch.ones_like(model.net[0].weight)


def write_buffer(model: nn.Module) -> None:
    model.net[1].running_mean.add_(1)


def write_weight(model: nn.Module) -> None:
    model.net[0].weight.data.add_(1e-7)


#: What a careless measurement may do to a `delicate` network, and where it shows.
CARELESS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "draws from torch": (lambda model: torch.rand(()), "random torch"),
    "draws from numpy": (lambda model: np.random.rand(), "random numpy"),
    "draws from python": (lambda model: random.random(), "random python"),
    "calls train()": (lambda model: model.train(), "mode net.5"),
    "calls eval()": (lambda model: model.eval(), "mode net.3"),
    "writes a buffer": (write_buffer, "buffer net.1.running_mean"),
    "writes .grad": (write_grad, "grad net.0.weight"),
    "writes a weight": (write_weight, "weight net.0.weight"),
    "freezes a weight": (
        lambda model: model.net[0].weight.requires_grad_(False),
        "requires_grad net.0.weight",
    ),
    "leaves a hook": (
        lambda model: model.net[0].register_forward_hook(lambda *_: None),
        "hooks net.0",
    ),
}


def column(folder: str | Path, name: str) -> dict[int, str]:
    """What a CSVLogger wrote under a name, as text by step."""
    with (Path(folder) / "metrics.csv").open() as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


def read_wandb(path: Path) -> Iterator[Any]:
    """The records of an offline run: a header of 7 bytes, then a LevelDB log of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768  # of this block
        if left < 7:  # too short for a chunk's head: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(body)
            body = b""
            yield record


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The logged rows."""
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in rows
    ]
