"""The callback that fits last-layer uncertainties: what it leaves, and that it disturbs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import fitted_together
import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace.callbacks import LastLayerUncertainty

pytestmark = [
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def held_out() -> training.Samples:
    return training.Samples(seed=1, count=9)


def outcome(namespace: str, callbacks: list[Any], folder: Path, **options: Any) -> dict[str, Any]:
    """Trains under all that can be disturbed, and gives all that came of it."""
    training.seed()
    model = training.delicate(namespace)()
    data = training.loader(training.Augmented(), shuffle=True, generator=torch.Generator())
    trainer = training.fit(
        callbacks,
        model,
        data,
        training.loader(held_out()),
        namespace=namespace,
        default_root_dir=folder,
        **options,
    )
    return {**training.result(trainer, model), "loader": data.generator.get_state()}


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_it_fits_without_touching_the_training(namespace: str, tmp_path: Path) -> None:
    bare = outcome(namespace, [], tmp_path)
    callback = LastLayerUncertainty(to=tmp_path, on_error="raise")
    assert callback.uncertainties is None
    assert not training.differences(bare, outcome(namespace, [callback], tmp_path))
    found = callback.uncertainties
    assert found is not None
    assert (found.covariance.count, found.calibrated_on) == (16, 9)
    x = held_out().inputs
    assert found(x).probabilities is not None
    again = nt.uncertainty.load(tmp_path / "uncertainties.pt", found.model)
    assert torch.equal(again(x).variance, found(x).variance)


def test_it_is_what_fit_gives_on_the_same_data() -> None:
    callback = LastLayerUncertainty(on_error="raise")
    model = training.network()()
    training.fit([callback], model, validation=training.loader(held_out()))
    expected = nt.uncertainty.fit(model, training.loader(), training.loader(held_out()))
    assert callback.uncertainties is not None
    assert callback.uncertainties.ridge == expected.ridge
    assert torch.equal(callback.uncertainties.alpha, expected.alpha)


def test_without_validation_data_there_is_a_doubt() -> None:
    callback = LastLayerUncertainty(on_error="raise")
    training.fit([callback], validation=None)
    assert callback.uncertainties is not None
    assert "residuals of new samples" in callback.uncertainties.doubts[0]


@training.recent  # before, a validation restored no callbacks
@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_checkpoints_hold_it(namespace: str, tmp_path: Path) -> None:
    kinds = import_module(f"{namespace}.callbacks")
    keep = kinds.ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1)
    callback = LastLayerUncertainty(on_error="raise")
    options: Any = {"namespace": namespace, "enable_checkpointing": True}
    trainer = training.fit([callback, keep], **options)
    found = callback.uncertainties
    assert found is not None
    assert (tmp_path / "kept" / "uncertainties.pt").is_file()  # beside the run's own
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    again = LastLayerUncertainty(on_error="raise")
    model = training.network(namespace)()
    trainer = training.trainer([again], namespace=namespace)
    trainer.validate(model, training.loader(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert again.uncertainties is not None
    x = held_out().inputs
    assert torch.equal(again.uncertainties(x).variance, found(x).variance)

    # A training that goes on has none until it ends.
    later = LastLayerUncertainty(on_error="raise")
    options = {"namespace": namespace, "max_steps": 6}
    training.fit([later], model, ckpt_path=tmp_path / "after.ckpt", **options)
    assert later.uncertainties is not None
    assert later.uncertainties.head.digest != found.head.digest


def test_averaged_weights_are_in_place() -> None:
    kinds = import_module("pytorch_lightning.callbacks")
    swa = kinds.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    callback = LastLayerUncertainty(on_error="raise")
    model = training.network()()
    training.fit([callback, swa], model, max_steps=-1, max_epochs=3)
    assert callback.uncertainties is not None
    callback.uncertainties(held_out().inputs)  # which would say if they were others


def test_what_fails_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    def warned(text: str, data: Any = None, model: Any = None, **options: Any) -> None:
        callback = LastLayerUncertainty(**options)
        with pytest.warns(nt.MissingMeasureWarning, match=text):
            trainer = training.fit([callback], model, data)
        assert trainer.global_step == 4
        assert callback.uncertainties is None
        assert callback.state_dict() == {"uncertainties": None}

    class Unlike(training.network()):
        def forward(self, x: Any) -> Any:
            return super().forward(x).log_softmax(1)

    warned("behind it stands log_softmax", model=Unlike())
    warned("Stream, are a stream", training.loader(training.Stream()))
    warned("no module 'nothing'", head="nothing")

    class Several(training.network()):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step(batch["a"], index)

    both = {"a": training.loader(), "b": training.loader()}
    warned("there are 2 training loaders", both, Several())
    file = tmp_path / "file"
    file.touch()
    callback = LastLayerUncertainty(to=file / "folder")
    with pytest.warns(nt.MissingMeasureWarning, match="cannot save uncertainties"):
        training.fit([callback])
    assert callback.uncertainties is not None
    with pytest.raises(ValueError, match="log_softmax"):
        training.fit([LastLayerUncertainty(on_error="raise")], Unlike())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="a folder's path, got int"):
        LastLayerUncertainty(to=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'record' or 'raise', got 'warn'"):
        LastLayerUncertainty(on_error="warn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected likelihood"):
        LastLayerUncertainty(likelihood="normal")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["batch sampler", "collate", "one batch"])
def test_loaders_of_other_kinds(kind: str) -> None:
    samples = training.Samples()
    options: dict[str, Any] = {
        "batch sampler": {"batch_sampler": [[0, 1, 2], [3, 4, 5, 6]] * 3},
        "collate": {"batch_size": 3, "collate_fn": torch.utils.data.default_collate},
        "one batch": {"batch_size": None},
    }[kind]
    if kind == "one batch":
        samples = torch.utils.data.TensorDataset(
            samples.inputs.view(4, 4, 4), samples.targets.view(4, 4)
        )
    callback = LastLayerUncertainty(on_error="raise")
    training.fit([callback], data=torch.utils.data.DataLoader(samples, **options))
    assert callback.uncertainties is not None
    assert callback.uncertainties.covariance.count == 16


def test_a_regression_in_half_precision() -> None:
    class Numbers(training.network()):
        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

    x = torch.randn(40, 4)
    data = torch.utils.data.TensorDataset(x, x[:, :3] + 0.1 * torch.randn(40, 3))
    callback = LastLayerUncertainty(on_error="raise")
    training.fit([callback], Numbers(), training.loader(data), precision="bf16-true")
    assert callback.uncertainties is not None
    assert bool(callback.uncertainties(x.bfloat16()).variance.isfinite().all())


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(fitted_together.__file__)
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), "lightning"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    one, other = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    assert not training.differences(one["model"], other["model"])
    assert one["count"] == other["count"] == 16
    model = training.delicate()()
    state = {n.removeprefix("weight "): v for n, v in one["model"].items() if "weight " in n[:7]}
    state |= {n.removeprefix("buffer "): v for n, v in one["model"].items() if "buffer " in n[:7]}
    model.load_state_dict(state)
    alone = nt.uncertainty.fit(model, training.loader(), training.loader(held_out()))
    for found in (one, other):
        assert found["ridge"] == pytest.approx(alone.ridge, rel=1e-6)
        torch.testing.assert_close(found["covariance"], alone.covariance.sums)
    assert (tmp_path / "uncertainties.pt").is_file()
