"""Measures in one of several processes, or alone: python measured_together.py FOLDER WHAT HOW.

WHAT is one of `WHATS` below, HOW "ddp", "fsdp" or "plain". Leaves what was found in
FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import training
import zoo
from torch import Tensor, distributed, nn

import nettrace as nt
import nettrace.ranks
from nettrace.gathered import whole
from nettrace.measures import available
from nettrace.ranks import Ranks, ranks
from nettrace.shared_gradients import shared
from nettrace.statistics import Statistics
from nettrace.waiting import reads_window
from nettrace.window import WeightWindow

Found = dict[str, Any]
#: Of products with Hessians, in which processes wait for each other many times.
FEWER = {"upper": 3, "lower": 2, "test_vectors": 3, "most_products": 8}
FEWER |= {"density_steps": 5, "density_draws": 2}


class Classifier(nn.Sequential):
    """With running statistics, dropout, and a layer that is used twice."""

    def __init__(self) -> None:
        twice = nn.Linear(6, 6)
        super().__init__(
            nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
            nn.Sequential(twice, nn.Tanh(), twice, nn.Dropout(0.5)),
            nn.Linear(6, 3),
        )


class Images(nn.Sequential):
    """Of which the gradients of convolutions are written out where that is less."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(3, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(36, 2),
        )


class Texts(nn.Module):
    """With so many logits that traces are estimated, and a head of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(70, 5)
        self.mix = nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, 70)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(tokens))[0])


class Experts(nn.Module):
    """Of which some see none of the samples of a process, and one sees some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        which = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        for number, expert in enumerate(self.experts):
            rows = (which == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        rows = (which == 2).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, self.experts[0](x[rows].sin()))
        return out


def _probes(kind: str) -> nt.Probe | dict[str, nt.Probe]:
    def drawn(count: int) -> nt.Probe:
        x = torch.randn(count, 4, dtype=torch.float64)
        if kind == "experts":
            x[:, 0] = torch.linspace(-2, 2, count)
        if kind == "images":
            x = torch.randn(count, 1, 8, 8, dtype=torch.float64)
            return nt.Probe(x, torch.randn(count, 2, dtype=torch.float64))
        if kind == "texts":
            tokens = torch.randint(0, 70, (count, 5))
            return nt.Probe(tokens, torch.randint(0, 70, (count, 5)))
        return nt.Probe(x, torch.randint(0, 3, (count,)))

    return {"train": drawn(7), "val": drawn(5)} if kind == "classifier" else drawn(7)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "classifier": Classifier,
    "images": Images,
    "texts": Texts,
    "experts": Experts,
}


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The network as several processes train it."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for child in model.children():
            if isinstance(child, nn.Sequential):
                fully_shard(child)
        return fully_shard(model)
    return model


def measures(kind: str, how: str) -> Found:
    """All measures of a network at two steps, and those of a coupled and a diverged one."""
    torch.manual_seed(0)
    model, probe = NETWORKS[kind]().double(), _probes(kind)
    if distributed.is_initialized() and how == "ddp":
        for buffer in model.buffers():  # each process has statistics of its own batches
            buffer.add_(distributed.get_rank())
    model = wrapped(model, how)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    names = [m.name for m in available() if not reads_window(m)]
    if kind == "texts":  # whose kernel is large
        names = ["ntk/trace", "ntk/trace_per_layer", "fisher/trace", "loss", "gradients"]
    tracer = nt.Tracer(probe, names, max_seconds=30)
    found: Found = {}
    for step in range(2):
        with patch.multiple(Statistics, **FEWER):
            records = tracer(model, step, optimizer)
        for record in records:
            if not record.name.startswith("nettrace/seconds"):
                found[f"{record.name} {step}"] = record
        for p in model.parameters():
            p.grad = 0.1 * p.detach().sin()
        optimizer.step()
    with torch.no_grad():
        next(model.parameters()).mul_(float("nan"))
    for record in tracer(model, 2, optimizer):
        found[f"{record.name} of NaN"] = record.missing
    return found


def every_member(of: Ranks) -> Found:
    """Products of the Jacobians of the zoo's members, each process with a part of the batch."""
    found: Found = {}
    for name, kind in zoo.ZOO.items():
        one_graph = name == "sparse-graph"
        if kind.coupled or not kind.alone or kind.singles is not None or one_graph:
            continue
        member = zoo.build(name)
        whole = member.batch
        parts = whole if isinstance(whole, tuple) else (whole,)
        if any(len(part) != zoo.N for part in parts):
            continue
        own = of.share(zoo.N)
        batch = tuple(part[own] for part in parts)
        outputs = member.forward(member.model, batch if isinstance(whole, tuple) else batch[0])
        # Little memory, so that outputs and samples are taken in several parts.
        jacobian = nt.jacobian(outputs, member.target, memory_budget="64kB")
        together = shared(jacobian, of)
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(together.parameters, generator=generator, dtype=torch.float64)
        v = torch.randn(zoo.N, together.outputs, generator=generator, dtype=torch.float64)
        found[name] = {
            "norms": together.norms(per_layer=True),
            "trace": together.trace(),
            "jvp": together.jvp(u.to(together.norms())),
            "vjp": together.vjp(v),
            "columns": together.column_sqnorms(),
            "projected": together.project(v[None]).gram(per_layer=True),
        }
        size = (together.samples * together.outputs) ** 2 * together._gradients.dtype.itemsize
        if size < 64e3:
            found[name]["gram"] = together.gram()
            found[name]["traced"] = together.gram(trace_outputs=True)
            found[name]["blocks"] = together.blocks()
    return found


def trained(coupled: bool, batches: list[Tensor], penalised: bool = False) -> Any:
    """A module with a loss that tells samples apart, or one that couples them."""
    import pytorch_lightning as pl  # which takes long, and is needed here alone
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Trained(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
            self.coupled = coupled
            self.batches = batches

        def configure_model(self) -> None:
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                mesh = self.device_mesh["data_parallel"]
                fully_shard(self.net[0], mesh=mesh)
                fully_shard(self.net, mesh=mesh)

        def forward(self, batch: Tensor) -> Tensor:
            return self.net(batch)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            out = self(batch)
            if self.coupled:
                return -F.log_softmax(out @ out.mT, 1).diagonal().mean()
            loss = F.cross_entropy(out, batch[:, 0].gt(0).long())
            return loss + 0.01 * self.net[0].weight.norm() if penalised else loss

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.batches, batch_size=None)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Trained()


def lightning(folder: Path, how: str) -> Found:
    """A training whose steps are measured, each process with other batches."""
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    from nettrace.callbacks import GradientStatistics, Trace

    training.seed()
    kind, processes = how.partition("-")[0], int(os.environ.get("WORLD_SIZE", 1))
    strategy = {
        "alone": lambda: "auto",
        "unused": lambda: DDPStrategy(find_unused_parameters=True),
        "static": lambda: DDPStrategy(static_graph=True),
        "fsdp": lambda: ModelParallelStrategy(processes, 1),
    }.get(kind, lambda: "ddp")()
    rank = int(os.environ.get("RANK", 0))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 12, 4, dtype=torch.float64, generator=generator)
    size = 12 // processes
    batches = [one[rank * size : (rank + 1) * size] for one in drawn]
    names = ["gradients", "gradients/critical_batch_size"]
    names += [] if how == "coupled" else ["ntk/entropy", "fisher/trace"]
    steps = GradientStatistics(names, every=1, to=folder / "steps", log=False)
    probe = nt.Probe(drawn[0], drawn[0][:, 0].gt(0).long())
    trace = Trace(["ntk", "fisher/trace"], every=1, to=folder / "probe", probe=probe, log=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[] if how.endswith("bare") else [steps, trace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = trained(how == "coupled", batches, "fsdp" not in how)
    trainer.fit(module)
    state = training.state(module)
    return {name: whole(x) if isinstance(x, Tensor) else x for name, x in state.items()}


def windows(how: str) -> Found:
    """What a window of weights tells while several processes train, each on batches of its own."""
    torch.manual_seed(0)
    probe = nt.Probe(torch.randn(7, 4).double(), torch.randint(0, 3, (7,)))
    model = wrapped(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), how)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    names = ["weights/variance", "weights/variation", "weights/curvature", "loss/mean"]
    tracer = nt.Tracer(probe, names, every=[6], window=WeightWindow(5))
    generator = torch.Generator().manual_seed(1)
    count, rank = (1, 0)
    if distributed.is_initialized():
        count, rank = distributed.get_world_size(), distributed.get_rank()
    found: Found = {}
    for step in range(7):
        for record in tracer(model, step, optimizer):
            if not record.name.startswith("nettrace/seconds"):
                found[record.name] = record
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64).chunk(count)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, 0].gt(0).long()).backward()
        optimizer.step()
    return found


def faults(how: str) -> Found:
    """Records where not all processes measure, or one of them fails at step 1."""
    rank = distributed.get_rank()
    if how == "first-alone":
        nettrace.ranks.PATIENCE = 1.0
        if rank:
            return {}
    if how == "leaving":
        nettrace.ranks.PATIENCE = 1.0

    @nt.measure("tests/failing", needs=["outputs"], convention="1, but where it fails")
    def failing(outputs: Tensor) -> Tensor:
        if step == 1 and rank == 1:
            if how == "killed":
                os._exit(1)
            if how == "memory":
                raise torch.OutOfMemoryError("out of memory, as it is said")
            raise KeyError("of this process alone")
        return outputs.new_ones(())

    torch.manual_seed(rank if how == "probes" else 0)
    probe = nt.Probe(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))
    torch.manual_seed(0)
    model = wrapped(Experts().double(), "fsdp" if how.startswith("fsdp") else "plain")
    if how == "weights":
        with torch.no_grad():
            model.experts[0].weight.mul_(1 + rank)
    memory = "100B" if how == "fsdp-memory" else "1GB"
    tracer = nt.Tracer(probe, ["ntk/trace", "tests/failing", "loss"], memory_budget=memory)
    found: Found = {}
    for step in range(2 if how == "leaving" and rank else 3):
        for record in tracer(model, step):
            found[f"{record.name} {step}"] = record
    return found


def main(folder: Path, what: str, how: str) -> None:
    """Measures as one of several processes."""
    if what == "lightning":
        found = lightning(folder, how)
        torch.save(found, folder / f"{os.environ['RANK']}.pt")
        return
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    if what == "zoo":
        found = every_member(ranks("zoo", nn.Linear(1, 1)))
    elif what == "windows":
        found = windows(how)
    elif what == "faults":
        found = faults(how)
    else:
        found = measures(what, how)
    torch.save(found, folder / f"{rank}.pt")
    if how != "killed":
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
