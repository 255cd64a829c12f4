"""Trains as one process of several: python process_of_several.py FOLDER KIND [bare].

KIND is "accelerate" or "transformers". Leaves what came of the training in FOLDER/RANK.pt, and the
trace in FOLDER/trace, unless it is to train bare.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import nettrace as nt


class Named(training.Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = super().__getitem__(index)
        return {"x": x, "labels": y}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        training.seed()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        return {
            "loss": labels if labels is None else F.cross_entropy(logits, labels),
            "logits": logits,
        }


def by_accelerate(folder: Path, bare: bool) -> nn.Module:
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=True), Network()
    model, optimizer, data = accelerator.prepare(
        net,
        torch.optim.Adam(net.parameters(), 0.01),
        training.loader(Named(count=32)),
    )
    samples = training.Samples(seed=2)
    probe = nt.Probe({"x": samples.inputs}, samples.targets)
    tracer = nt.Tracer(probe, ["loss", "ntk/trace"], every=2, to=folder / "trace")
    with nullcontext() if bare else tracer.attached(model, optimizer):
        for batch in data:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
    return net


def by_transformers(folder: Path, bare: bool) -> nn.Module:
    import transformers

    from nettrace.callbacks import TransformersTrace

    trace = TransformersTrace(["loss", "ntk/trace"], every=2, to=folder / "trace", samples=8)
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "save_steps": 4,
            "learning_rate": 0.01,
        },
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True},
    )
    net = Network()
    data, callbacks = Named(count=32), [] if bare else [trace]
    transformers.Trainer(net, arguments, train_dataset=data, callbacks=callbacks).train()
    return net


if __name__ == "__main__":
    place, kind, bare = Path(sys.argv[1]), sys.argv[2], "bare" in sys.argv
    trained = (by_accelerate if kind == "accelerate" else by_transformers)(place, bare)
    torch.save(training.state(trained), place / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
