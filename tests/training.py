"""Small trainings under Lightning, and all of a training that a measurement could disturb."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")

#: What Lightning itself says about trainings as small as these, or on behalf of its own code.
HARMLESS = (
    "ignore:.*does not have many workers:UserWarning",  # two workers cost more than these tests
    "ignore:The number of training batches:UserWarning",  # fewer than its logging interval
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",  # Lightning 2.6 under torch 2.13
    "ignore:.*GPU available but not used:UserWarning",  # the tests run on the CPU anywhere
)


class Samples(Dataset):
    """Points and their classes, all random but the same each time."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 4, generator=generator)
        self.targets = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Augmented(Samples):
    """The same with noise from each of the random streams that augmentations draw from."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        noise = torch.randn(4) + float(np.random.randn()) + random.gauss(0, 1)
        return x + 0.1 * noise, y


class Stream(IterableDataset):
    """Samples that come in their own order and without numbers."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (Samples()[i] for i in range(16))


@cache
def _classes(namespace: str) -> tuple[type[Any], type[Any]]:
    module = import_module(namespace).LightningModule

    class Plain(module):
        """A classifier that has nothing to it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Delicate(Plain):
        """Has all that a careless measurement could disturb, and takes notes at each batch."""

        def __init__(self, optimizer: str = "adamw") -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3),
                nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
            )  # fmt: skip
            self.optimizer = optimizer
            self.net[5].eval()  # as users do with norms that were trained elsewhere
            self.net[4].bias.requires_grad_(False)
            self.notes: list[dict[str, Any]] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.notes.append({"batch": batch[0].clone(), **state(self)})
            return super().training_step(batch, index)

        def configure_optimizers(self) -> Any:
            if self.optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), 1e-2)
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, nesterov=True)

    return Plain, Delicate


def plain(namespace: str = NAMESPACES[0]) -> Any:
    """A classifier of `Samples`, the same each time."""
    torch.manual_seed(0)
    return _classes(namespace)[0]()


def delicate(namespace: str = NAMESPACES[0], optimizer: str = "adamw") -> Any:
    """A classifier with Dropout, a norm in eval mode, a frozen bias and an optimizer with state."""
    torch.manual_seed(0)
    return _classes(namespace)[1](optimizer)


def loader(dataset: Any = None, *, batch_size: int = 4, **options: Any) -> DataLoader:
    """A loader of the samples in their order."""
    return DataLoader(Samples() if dataset is None else dataset, batch_size, **options)


def trainer(callbacks: Any, namespace: str = NAMESPACES[0], **options: Any) -> Any:
    """A trainer for the CPU that keeps quiet and writes nothing that it is not asked to write."""
    quiet = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False
    )
    settings = {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1, **quiet, **options}
    return import_module(namespace).Trainer(callbacks=callbacks, **settings)


def fit(callbacks: Any, model: Any = None, namespace: str = NAMESPACES[0], **options: Any) -> Any:
    """Trains on the samples, and gives the trainer."""
    made = trainer(callbacks, namespace, **options)
    made.fit(plain(namespace) if model is None else model, loader())
    return made


def seed(number: int) -> None:
    """Sets the three random streams."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def state(model: nn.Module) -> dict[str, Any]:
    """All of a network and of the process that a measurement could disturb, by name."""
    found: dict[str, Any] = {
        "random torch": torch.get_rng_state(),
        "random numpy": repr(np.random.get_state()),
        "random python": random.getstate(),
        "flag default dtype": torch.get_default_dtype(),
        "flag grad": torch.is_grad_enabled(),
        "flag inference": torch.is_inference_mode_enabled(),
        "flag autocast": torch.is_autocast_enabled("cpu"),
        "flag deterministic": torch.are_deterministic_algorithms_enabled(),
        "flag threads": torch.get_num_threads(),
        "flag anomaly": torch.is_anomaly_enabled(),
    }
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = parameter.detach().clone()
        found[f"grad {name}"] = None if parameter.grad is None else parameter.grad.clone()
        found[f"requires_grad {name}"] = parameter.requires_grad
        found[f"hooks {name}"] = _hooks(parameter)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    for name, module in model.named_modules():
        found[f"mode {name}"] = module.training
        found[f"hooks {name}"] = _hooks(module)
    return found


def _hooks(owner: Any) -> int:
    kinds = [getattr(owner, name, None) for name in ("_backward_hooks", *vars(owner))
             if name.endswith("_hooks")]  # fmt: skip
    return sum(len(kind) for kind in kinds if kind)


def hooks(model: nn.Module) -> int:
    """How many hooks there are on a network's modules and parameters."""
    return sum(value for name, value in state(model).items() if name.startswith("hooks"))


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two nests of tensors and plain values differ, in so much as a bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if _bits(one) == _bits(other) else [name]
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{name}/{key}")]
    if _is_sequence(one) and _is_sequence(other) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{name}/{i}")]
    return [] if type(one) is type(other) and one == other else [name]


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def column(folder: str | Path, name: str) -> dict[int, str]:
    """What a CSVLogger wrote under a name, as text by step."""
    with (Path(folder) / "metrics.csv").open() as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}
