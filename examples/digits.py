"""Train a small convolutional network on handwritten digits, and watch the physics of its learning.

Run `python examples/digits.py`, or `make demo`. Nothing is downloaded: the digits come with
scikit-learn, and W&B writes to disk only. Everything goes to the folder `runs/digits`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from figure import draw
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nettrace as nt
from nettrace.callbacks import CollectiveVariables, FisherTrace, NTKTrace, Trace
from nettrace.dashboard.report import report


class DigitNet(pl.LightningModule):
    """An ordinary LightningModule: nettrace asks nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        x, y = batch
        self.log("val/accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def digits() -> tuple[DataLoader, DataLoader]:
    """Loaders of 1437 training and 360 validation images."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    train = TensorDataset(x[~held_out], y[~held_out])
    return (
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(TensorDataset(x[held_out], y[held_out]), batch_size=180),
    )


def probe(loader: DataLoader, per_class: int = 6) -> nt.Probe:
    """Some validation images of each class, in order of class, so that kernels show blocks."""
    x, y = loader.dataset.tensors
    chosen = torch.cat([(y == digit).nonzero()[:per_class, 0] for digit in range(10)])
    return nt.Probe(x[chosen], y[chosen])


def held_out() -> nt.Probe:
    """The probe that the demo measures on, for `nettrace analyze` on its checkpoints."""
    return probe(digits()[1])


def main() -> None:
    """Trains, then reports what was recorded."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--out", type=Path, default=Path("runs/digits"))
    args = options.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)

    pl.seed_everything(0)
    train, validation = digits()
    trace = args.out / "trace"
    # One probe and one folder: the callbacks share a single pass, and write one trace.
    shared = {"every": "log", "probe": probe(validation), "to": trace}
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=WandbLogger(project="nettrace-demo", save_dir=args.out, offline=True),
        callbacks=[
            NTKTrace(**shared),
            FisherTrace(**shared),
            CollectiveVariables(**shared),
            Trace("loss", **shared),
            ModelCheckpoint(args.out / "checkpoints", "{step}", every_n_epochs=3, save_top_k=-1),
        ],
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    start = time.perf_counter()
    trainer.fit(DigitNet(), train, validation)
    elapsed = time.perf_counter() - start

    data = nt.open(trace)
    steps = data.sizes["step"]
    print(f"\nRecorded at {steps} steps; nettrace.open({str(trace)!r}) returns it labelled:\n")
    width = max(len(str(name)) for name in data)
    print(f"  {'quantity':{width}s} {'shape':18s} {'first':>10s} {'last':>10s}")
    for name, variable in data.data_vars.items():
        shape = " x ".join(map(str, variable.shape[1:]))
        ends = [f"{float(v):10.4g}" for v in variable[[0, -1]]] if variable.ndim == 1 else []
        print(f"  {name:{width}s} {shape:18s} {' '.join(ends)}".rstrip())
    size = sum(part.stat().st_size for part in trace.iterdir()) / 1e6
    spent = float(data.nettrace_seconds.sum())
    print(
        f"\n{size:.1f} MB in all. Measuring took {spent:.1f} s of {elapsed:.1f} s, "
        f"{100 * spent / elapsed:.0f} % of the training."
    )
    picture = args.out / "digits.png"
    draw(data, picture)
    page = args.out / "report.html"
    page.write_text(report(data, title=str(args.out)), encoding="utf-8")
    print(f"Figure: {picture}; all figures: {page}, to open in a browser.")
    print(f"W&B (offline): {args.out / 'wandb'}, to upload by `wandb sync`.")


if __name__ == "__main__":
    main()
