"""A run resumed from a checkpoint compares with its own first look, not with that of resuming."""

from __future__ import annotations

import errno
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
import xarray as xr

import nettrace as nt
from nettrace.callbacks import NTKTrace, Trace

pytestmark = [
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
]


def adam(namespace: str = training.NAMESPACES[0]) -> Any:
    class Adam(training.network(namespace)):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.05)

    return Adam()


def run(
    folder: Path, last: int, checkpoint: Path | None = None, **options: Any
) -> tuple[xr.Dataset, torch.nn.Module]:
    """Trains with callbacks that share a tracer and are due at different steps."""
    namespace = options.pop("namespace", training.NAMESPACES[0])
    callbacks = [
        Trace(["loss", "ntk/trace"], to=folder / "trace", every=1),
        NTKTrace(["ntk/distance_first", "ntk/velocity"], to=folder / "trace", every=2),
        Trace("ntk/rotation_previous", to=folder / "trace", every=[1, 3, 5]),
        Trace("weights", to=folder / "trace", every=range(1, 20)),
        Trace("ntk/preconditioned_trace", to=folder / "trace", every=range(1, 20)),
    ]
    keep = import_module(f"{namespace}.callbacks").ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
    )
    model = adam(namespace)
    training.fit(
        [*callbacks, keep],
        model,
        namespace=namespace,
        max_steps=last,
        enable_checkpointing=True,
        ckpt_path=checkpoint,
        **options,
    )
    return nt.open(folder / "trace"), model


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_a_resumed_run_compares_as_the_whole_one(namespace: str, tmp_path: Path) -> None:
    whole, trained = run(tmp_path / "whole", 6, namespace=namespace)
    run(tmp_path / "parts", 4, namespace=namespace)  # an epoch
    checkpoint = tmp_path / "parts" / "step=4.ckpt"
    assert "nettrace" in torch.load(checkpoint, weights_only=True)
    parts, resumed = run(tmp_path / "parts", 6, checkpoint, namespace=namespace)
    ends = zip(trained.parameters(), resumed.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in ends):
        pytest.skip("this Lightning goes on with other batches")
    names = "ntk_distance_first ntk_velocity ntk_rotation_previous weights_displacement "
    names += "weights_linearised_loss weights_lazy_rich_index ntk_preconditioned_trace loss_mean"
    for name in names.split():
        values = whole[name].values
        np.testing.assert_array_equal(parts[name].values, values, err_msg=name)
        assert np.isfinite(values).any(), name
        assert parts[name].attrs == whole[name].attrs
    first = [
        parts[n].attrs["reference_step"] for n in ("ntk_distance_first", "weights_displacement")
    ]
    assert first == [0, 1]
    assert parts.ntk_rotation_previous.attrs["reference_step"] == 3


@training.recent
@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_a_trace_resumed_at_the_end_of_an_epoch_is_the_whole_one_bit_for_bit(
    namespace: str, tmp_path: Path
) -> None:
    whole, _ = run(tmp_path / "whole", 8, namespace=namespace)
    run(tmp_path / "parts", 6, namespace=namespace)  # an epoch and a half: half is superseded
    checkpoint = tmp_path / "parts" / "step=4.ckpt"
    parts, _ = run(tmp_path / "parts", 8, checkpoint, namespace=namespace)
    # How long it took is another matter, and what is new to a process is checked there anew.
    another = [n for n in {*whole.variables, *parts.variables} if n.startswith("nettrace_")]
    one, other = (t.drop_vars([*another, "wall_time"], errors="ignore") for t in (whole, parts))
    assert one.step.values.tolist() == list(range(9))
    assert one.variables.keys() == other.variables.keys()
    for name in one.variables:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].values.tobytes() == other[name].values.tobytes(), name
        assert one[name].attrs == other[name].attrs, name
    assert {"samples", "batches", "epoch", "ntk_velocity", "loss_mean"} <= one.variables.keys()


@pytest.mark.parametrize("namespace", training.NAMESPACES)
@pytest.mark.parametrize("kept", [3, 4], ids=["within an epoch", "between epochs"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that:UserWarning")
def test_what_comes_after_the_checkpoint_is_superseded_and_never_twice_there(
    namespace: str, kept: int, tmp_path: Path
) -> None:
    keep = partial(
        import_module(f"{namespace}.callbacks").ModelCheckpoint,
        *(tmp_path, "{step}"),
        save_top_k=-1,
        every_n_train_steps=1,
        enable_version_counter=False,
    )
    for last, checkpoint in ((6, None), (9, tmp_path / f"step={kept}.ckpt")):
        data = training.loader(training.Augmented(), shuffle=True)
        callbacks = [NTKTrace(["ntk/trace"], every=1, to=tmp_path / "trace"), keep()]
        options = {"namespace": namespace, "enable_checkpointing": True, "max_steps": last}
        training.seed(last)  # dropout and order are others when it goes on
        model = training.delicate(namespace)()
        training.fit(callbacks, model, data, ckpt_path=checkpoint, **options)
    first, second = (nt.open(tmp_path / "trace", attempt=n).ntk_trace for n in (0, 1))
    found = nt.open(tmp_path / "trace").ntk_trace
    assert found.step.values.tolist() == list(range(10))
    assert found.values[: kept + 1].tolist() == first.values[: kept + 1].tolist()
    assert found.values[kept + 1 :].tolist() == second.sel(step=range(kept + 1, 10)).values.tolist()
    assert found.sel(step=6) != first.sel(step=6)


def test_a_run_that_goes_on_after_its_end_compares_with_its_start(tmp_path: Path) -> None:
    callback, model = Trace("weights/displacement", every=1, to=tmp_path / "trace"), adam()
    trainer = training.fit(callback, model, max_steps=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert "nettrace" in torch.load(tmp_path / "end.ckpt", weights_only=True)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(model, training.loader())
    found = nt.open(tmp_path / "trace").weights_displacement
    assert found.step.values.tolist() == [0, 1, 2, 3, 4]
    assert (np.diff(found.values) > 0).all()
    training.fit(callback, max_steps=2)  # another run, from the start
    assert nt.open(tmp_path / "trace").weights_displacement.values[0] == 0


def test_checkpoints_hold_a_count_alone_where_no_measure_compares(tmp_path: Path) -> None:
    trainer = training.fit(Trace(["ntk/trace", "loss"], every=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["nettrace"]
    assert saved == {"samples": 16, "looks": {}}


def test_a_run_resumed_on_other_samples_says_so(tmp_path: Path) -> None:
    trainer = training.fit(Trace("weights", every=1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = training.loader(training.Samples(seed=5))
    callback, checkpoint = Trace("weights", every=1), tmp_path / "end.ckpt"
    with pytest.warns(nt.MissingMeasureWarning, match="looks on other samples cannot be compared"):
        training.fit(callback, None, other, ckpt_path=checkpoint, max_steps=6)


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=:UserWarning")
def test_a_run_that_fails_can_be_saved_with_its_past(tmp_path: Path) -> None:
    class Failing(training.network()):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 2:
                raise RuntimeError("out of luck")

    keep = import_module("pytorch_lightning.callbacks").OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="out of luck"):
        training.fit([Trace("weights", every=1), keep], Failing(), enable_checkpointing=True)
    assert "nettrace" in torch.load(tmp_path / "failed.ckpt", weights_only=True)


class Crash(Exception):
    """As of a machine that is switched off."""


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_a_run_interrupted_and_resumed_twice_reads_as_one_trace(
    namespace: str, tmp_path: Path
) -> None:
    trained: list[dict[int, float]] = []  # of each attempt: where the weights were at each step

    def attempt(crash: int | None, checkpoint: Path | None = None) -> None:
        class Fragile(training.network(namespace)):
            def on_train_batch_start(self, batch: Any, index: int) -> None:
                weights = sum(weight.double().sum().item() for weight in self.parameters())
                trained[-1][self.global_step] = weights
                if self.global_step == crash:
                    raise Crash

        keep = import_module(f"{namespace}.callbacks").ModelCheckpoint(
            tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4, enable_version_counter=False
        )
        callbacks = [
            NTKTrace(["ntk/trace", "ntk/distance_first"], every=1, to=tmp_path / "trace"),
            Trace("loss", every=nt.with_last([0, 3]), to=tmp_path / "trace"),
            keep,
        ]
        options = {"max_steps": 12, "enable_checkpointing": True, "ckpt_path": checkpoint}
        trained.append({})
        training.fit(callbacks, Fragile(), namespace=namespace, **options)

    with pytest.raises(Crash):
        attempt(crash=6)
    with pytest.raises(Crash):
        attempt(crash=11, checkpoint=tmp_path / "step=4.ckpt")
    attempt(crash=None, checkpoint=tmp_path / "step=8.ckpt")

    data = nt.open(tmp_path / "trace")
    assert data.step.values.tolist() == list(range(13))
    assert np.isfinite(data.ntk_trace).all()
    assert data.samples.values.tolist() == [4 * step for step in range(13)]
    assert data.step[data.loss_mean.notnull()].values.tolist() == [0, 3, 12]
    attempts = [nt.open(tmp_path / "trace", attempt=number) for number in range(3)]
    steps = [one.step.values.tolist() for one in attempts]
    assert steps == [list(range(7)), list(range(4, 12)), list(range(8, 13))]
    final = {**trained[0], **trained[1], **trained[2]}
    for one, own in zip(attempts, trained, strict=True):
        # What was superseded was right as well. (Lightning 2.4 goes on with other batches.)
        same = [own[step] == final[step] for step in own]
        assert same.count(True) >= 4
        kept, superseded = (each.ntk_trace.sel(step=list(own)).values for each in (data, one))
        assert (kept == superseded).tolist() == same
    assert data.ntk_distance_first.attrs["reference_step"] == 0


def test_a_trace_is_on_the_disk_with_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    whole = os.fsync
    monkeypatch.setattr("os.fsync", lambda file: synced.append(file) or whole(file))
    training.fit(NTKTrace(every=1, to=tmp_path / "trace"), max_steps=2)
    assert not synced
    keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(tmp_path)
    trace = NTKTrace(every=1, to=tmp_path / "other")
    training.fit([trace, keep], max_steps=2, enable_checkpointing=True)
    assert synced


def test_a_disk_that_fails_is_said_and_the_checkpoint_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(tmp_path, "end")
    trace = NTKTrace(every=1, to=tmp_path / "trace")
    monkeypatch.setattr("nettrace.store.writer.TraceWriter.sync", fail)
    with pytest.warns(nt.MissingMeasureWarning, match="to the disk"):
        training.fit([trace, keep], max_steps=2, enable_checkpointing=True)
    assert (tmp_path / "end.ckpt").exists()
    assert len(nt.open(tmp_path / "trace").step) == 3
