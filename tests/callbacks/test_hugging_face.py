"""transformers' Trainer with the callback, on networks made from configurations."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import nettrace as nt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
safetensors = pytest.importorskip("safetensors.torch")

from nettrace.callbacks import TransformersTrace  # noqa: E402
from nettrace.window import WeightWindow  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(transformers|accelerate|torch).*"),
]

LENGTH, WORDS = 6, 30


class Sentences(torch.utils.data.Dataset):
    """Words at random, and their classes."""

    def __init__(self, seed: int = 0, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
        self.classes = torch.randint(0, 3, (count,), generator=generator)
        self.logger = logging.getLogger("sentences")  # as many have

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.ones(LENGTH, dtype=torch.long)
        label = int(self.classes[index])
        return {"input_ids": self.words[index], "attention_mask": mask, "label": label, "id": index}


class Noisy:
    """A collator with a generator of its own, as those that mask words have."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = transformers.default_data_collator(samples)
        noise = torch.randint(0, WORDS, batch["input_ids"].shape, generator=self.generator)
        use = torch.rand(noise.shape, generator=self.generator) < 0.2
        batch["input_ids"] = torch.where(use, noise, batch["input_ids"])
        return batch


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 8, "num_labels": 3},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LENGTH},
    )
    return transformers.BertForSequenceClassification(config)


def checkpointed() -> Any:
    model = bert()
    # Renamed in transformers 5.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))()
    return model


def double() -> Any:
    return bert().double()


class Plain(nn.Module):
    """No network of transformers', but one that its trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(WORDS, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.drop(self.norm(self.embed(input_ids).mean(1))))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def fit(
    callbacks: list[Any],
    folder: Path,
    model: Any = None,
    *,
    data: Any = None,
    collator: Any = None,
    metrics: Any = None,
    resume: Any = None,
    **options: Any,
) -> Any:
    """Trains for six steps and returns the trainer."""
    settings = {
        **{"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        **{"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "no", "dataloader_pin_memory": False},
        **options,
    }
    trainer = transformers.Trainer(
        bert() if model is None else model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=Sentences() if data is None else data,
        eval_dataset=Sentences(seed=1),
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


#: What changes from run to run, whatever is trained.
CLOCK = ("runtime", "per_second", "jit")


def outcome(trainer: Any, collator: Any = None) -> dict[str, Any]:
    """All that came of a training, but for numbers of the callback's and of the clock."""
    history = [
        {name: value for name, value in row.items() if not any(c in name for c in CLOCK)}
        for row in trainer.state.log_history
        if not any(name.startswith("loss/") for name in row)
    ]
    return {
        **training.state(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": history,
        "own generator": None if collator is None else collator.generator.get_state(),
        "hooks": training.hooks(trainer.model),
        "forward": getattr(trainer.model.forward, "__wrapped__", None) is None,
        "logger": {k: id(v) for k, v in vars(logging.getLogger("sentences")).items()},
    }


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "best": {
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        "load_best_model_at_end": True,
    },
    "logged seldom": {"logging_steps": 3, "logging_first_step": True},
    "SGD": {"optim": "sgd", "lr_scheduler_type": "cosine", "neftune_noise_alpha": 5.0},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True},
}


@pytest.mark.filterwarnings("ignore:.*smooths labels:nettrace.MissingMeasureWarning")
@pytest.mark.parametrize(
    ("model", "feature"),
    [
        *((bert, feature) for feature in ("accumulated", "smoothed", "best")),
        *((Plain, feature) for feature in ("plain", "bf16")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((bert, f) for f in FEATURES if f not in ("accumulated", "smoothed", "best")),
                *((kind, "accumulated") for kind in (checkpointed, double)),
                (Plain, "best"),
            ]
        ),
    ],
)
def test_training_is_bitwise_the_same_with_the_callback(
    model: Callable[[], Any], feature: str, tmp_path: Path
) -> None:
    def trained(*callbacks: Any) -> dict[str, Any]:
        training.seed()
        collator = Noisy()
        options = {"remove_unused_columns": True, **FEATURES[feature]}
        trainer = fit(list(callbacks), tmp_path / "run", model(), collator=collator, **options)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return outcome(trainer, collator)

    measures = ["loss", "ntk/trace", "fisher/trace", "weights/displacement"]
    callback = TransformersTrace(measures, every=1, samples=8, to=tmp_path / "trace")
    assert training.differences(trained(), trained(callback)) == []
    found = nt.open(tmp_path / "trace")
    assert found.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    missing = {name for name, value in found.items() if "missing" in value.attrs}
    if feature == "smoothed":
        assert missing == {"loss_mean", "fisher_trace"}
    else:
        assert not missing
        assert found.loss_mean.attrs["loss_checked"].endswith("own loss is this")
    assert found.ntk_trace.attrs["outputs"] == "logits"
    assert found.epoch.values[0] == 0
    assert (np.diff(found.epoch.values) > 0).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_values_are_those_of_the_network_in_its_own_precision(bf16: bool, tmp_path: Path) -> None:
    names = ["ntk/trace", "fisher/trace", "ntk/preconditioned_trace"]
    options = {"samples": 8, "to": tmp_path / "trace", "on_error": "raise"}
    callback = TransformersTrace(names, every=[6], **options)
    trainer = fit([callback], tmp_path, bf16=bf16)
    data, model = Sentences(), bert()  # which no trainer has prepared
    model.load_state_dict(trainer.model.state_dict())
    batch = transformers.default_data_collator([data[i * 24 // 8] for i in range(8)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tracer = nt.Tracer(nt.Probe(inputs, batch["labels"]), names, on_error="raise")
    found = nt.open(tmp_path / "trace")
    for record in tracer.measure(model, 6, tracer.measures[:2]):
        if not record.name.startswith("nettrace/"):
            assert found[record.name.replace("/", "_")].values.tolist() == [record.value]
    for optimizer in (trainer.optimizer, trainer.optimizer.optimizer):  # accelerate's, torch's
        (record, *_) = tracer.measure(trainer.model, 6, tracer.measures[2:], optimizer)
        assert found.ntk_preconditioned_trace.values.tolist() == [record.value]


def test_numbers_go_where_the_trainers_own_go(tmp_path: Path) -> None:
    class Reporter(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.seen.append((state.global_step, dict(logs)))

    before, after = Reporter(), Reporter()
    options = {"every": 4, "samples": 8, "prefix": "mine/"}
    trace = TransformersTrace(["ntk/trace", "ntk/spectrum"], **options)
    trainer = fit([before, trace, TransformersTrace("loss", every=3, log=False), after], tmp_path)
    assert before.seen == after.seen
    numbers = [(step, logs) for step, logs in before.seen if "mine/ntk/trace" in logs]
    assert [step for step, _ in numbers] == [0, 4]
    assert numbers[1][1].keys() == {
        *("mine/ntk/trace", "mine/ntk/trace_standard_error", "epoch"),
        *("mine/nettrace/seconds",),
    } | {name for name in numbers[1][1] if "spot_check" in name}
    kept = [row for row in trainer.state.log_history if "mine/ntk/trace" in row]
    assert [row["step"] for row in kept] == [0, 4]
    assert [logs for _, logs in numbers] == [
        {name: value for name, value in row.items() if name != "step"} for row in kept
    ]
    assert not any("loss/mean" in logs for _, logs in before.seen)
    assert [step for step, logs in before.seen if "grad_norm" in logs] == [1, 2, 3, 4, 5, 6]
    json.dumps(trainer.state.log_history)


def test_tensorboard_gets_them(tmp_path: Path, monkeypatch: Any) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = TransformersTrace("ntk/trace", every=3, samples=8)
    options = {"report_to": "tensorboard", "logging_dir": str(tmp_path / "board")}
    try:
        trainer = fit([callback], tmp_path, **options)
    except TypeError:  # which has become the environment's matter
        trainer = fit([callback], tmp_path, report_to="tensorboard")
    board = accumulators.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    found = {event.step: event.value for event in board.Scalars("train/ntk/trace")}
    kept = {r["step"]: r["ntk/trace"] for r in trainer.state.log_history if "ntk/trace" in r}
    assert found == pytest.approx(kept)
    assert found.keys() == {0, 3, 6}


COMPARED = ["weights/displacement", "ntk/velocity", "ntk/distance_first", "loss/mean"]


SAVED = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}


def compared(folder: Path, **options: Any) -> TransformersTrace:
    return TransformersTrace(COMPARED, every=2, samples=8, to=folder / "trace", **options)


@pytest.mark.parametrize("how", [True, "folder", "moved"])
def test_a_resumed_run_compares_as_the_whole_one(how: Any, tmp_path: Path) -> None:
    fit([compared(tmp_path / "whole")], tmp_path / "whole", Plain(), max_steps=9, **SAVED)
    whole = nt.open(tmp_path / "whole" / "trace")
    runs = tmp_path / "parts"
    fit([compared(runs)], runs, Plain(), max_steps=9, **SAVED)
    checkpoint = runs / "checkpoint-3"
    shutil.rmtree(runs / "checkpoint-6")
    shutil.rmtree(runs / "checkpoint-9")
    options, resume = {**SAVED, "max_steps": 9}, {True: True, "folder": str(checkpoint)}.get(how)
    if how == "moved":
        resume = str(shutil.move(checkpoint, tmp_path / "elsewhere"))
        options["resume_from_checkpoint"] = resume
    trainer = fit([compared(runs)], runs, Plain(), resume=resume, **options)
    parts = nt.open(runs / "trace")
    assert parts.step.values.tolist() == whole.step.values.tolist() == [0, 2, 4, 6, 8]
    for name in (measure.replace("/", "_") for measure in COMPARED):
        np.testing.assert_array_equal(parts[name].values, whole[name].values, err_msg=name)
    assert parts.ntk_distance_first.attrs["reference_step"] == 0
    logged = [row["step"] for row in trainer.state.log_history if "loss/mean" in row]
    assert logged == [0, 2, 4, 6, 8]
    assert len(nt.open(runs / "trace", attempt=0).step) == 5


def test_a_checkpoint_that_is_not_found_is_asked_for(tmp_path: Path) -> None:
    fit([compared(tmp_path)], tmp_path / "one", Plain(), max_steps=3, **SAVED)
    # Another run, whose checkpoint of the same step lies where this one's would.
    fit([compared(tmp_path / "b")], tmp_path / "two", bert(), max_steps=3, **SAVED)
    callback, resume = compared(tmp_path), str(tmp_path / "one" / "checkpoint-3")
    with pytest.warns(nt.MissingMeasureWarning, match="resume_from_checkpoint="):
        fit([callback], tmp_path / "two", Plain(), resume=resume, max_steps=6, **SAVED)
    assert nt.open(tmp_path / "trace").weights_displacement.attrs["reference_step"] == 4


class Stopped(transformers.EarlyStoppingCallback):
    """At once."""

    def on_evaluate(self, args: Any, state: Any, control: Any, *_: Any, **__: Any) -> None:
        control.should_training_stop = state.global_step >= 4


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("best", [False, True])
def test_the_last_step_is_measured_with_its_own_weights(
    best: bool, strategy: str, tmp_path: Path
) -> None:
    rising = iter(range(100))
    options = {
        **{"eval_strategy": strategy, "eval_steps": 2, "save_strategy": strategy, "save_steps": 2},
        **{"metric_for_best_model": "rising", "greater_is_better": False},
        **{"per_device_train_batch_size": 12, "max_steps": 9},  # epochs of 2 steps
    }
    callback = TransformersTrace(
        "weights/displacement", every=nt.with_last(3), samples=8, to=tmp_path / "trace"
    )
    trainer = fit(
        [callback, Stopped(early_stopping_patience=1)],
        tmp_path,
        Plain(),
        metrics=lambda _: {"rising": next(rising)},
        load_best_model_at_end=best,
        **options,
    )
    assert trainer.state.global_step == 4
    found = nt.open(tmp_path / "trace").weights_displacement
    assert found.step.values.tolist() == [0, 3, 4]
    start = Plain().state_dict()
    end = safetensors.load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    names = [name for name, _ in Plain().named_parameters()]
    moved = sum((end[n] - start[n]).double().square().sum() for n in names)
    norm = sum(start[n].double().square().sum() for n in names)
    assert found.values[-1] == pytest.approx(float((moved / norm).sqrt()), rel=1e-5)
    assert torch.equal(trainer.model.head.weight, end["head.weight"]) != best


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from (Sentences()[i] for i in range(24))


def fails(step: int) -> bool:
    if step:
        raise RuntimeError("out of luck")
    return True


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        ({}, Stream(), "TransformersTrace cannot take a probe.*are a stream"),
        ({"every": fails}, None, "has a schedule that fails.*out of luck"),
        ({"every": [50]}, None, "never measured.*6 steps"),
        ({"probe": nt.Probe(torch.ones(3, 4))}, None, "missing at step 0.*Expected tensor for arg"),
    ],
)
@pytest.mark.parametrize("on_error", ["record", "raise"])
def test_what_fails_is_said_and_the_training_goes_on(
    options: dict[str, Any], data: Any, says: str, on_error: Any, tmp_path: Path
) -> None:
    training.seed()
    bare = outcome(fit([], tmp_path, data=data))
    callback = TransformersTrace("ntk/trace", **{"every": 2, **options}, on_error=on_error)
    training.seed()
    if on_error == "raise" and "never" not in says:
        with pytest.raises(Exception, match=says.partition(".*")[2] or says):
            fit([callback], tmp_path, data=data)
    else:
        with pytest.warns(nt.MissingMeasureWarning, match=says) as caught:
            trainer = fit([callback], tmp_path, data=data)
        assert len(caught) == 1
        found = outcome(trainer)
        found["history"] = [r for r in found["history"] if "nettrace/seconds" not in r]
        assert training.differences(bare, found) == []


def test_a_checkpoint_that_cannot_be_saved_beside_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nettrace.callbacks.hugging_face.os.replace", full)
    with pytest.warns(nt.MissingMeasureWarning, match="cannot save what it needs.*No space left"):
        fit([compared(tmp_path)], tmp_path, Plain(), max_steps=3, **SAVED)


def test_several_probes_and_a_second_training_with_one_callback(tmp_path: Path) -> None:
    batches = [
        transformers.default_data_collator([Sentences(s)[i] for i in range(5)]) for s in (1, 2)
    ]
    for batch in batches:
        del batch["id"]
    probes = dict(zip("ab", map(nt.Probe.from_batch, batches), strict=True))
    callback = TransformersTrace(["loss/mean"], every=3, probe=probes, to=tmp_path / "trace")
    trainer = fit([callback], tmp_path)
    assert any("loss/mean/a" in row for row in trainer.state.log_history)
    first = nt.open(tmp_path / "trace")
    assert first.loss_mean.dims == ("step", "probe")
    trainer.train()  # goes on with the weights, but counts from 0
    second = nt.open(tmp_path / "trace")
    assert second.step.values.tolist() == [0, 3, 6]
    np.testing.assert_array_equal(second.loss_mean.values[0], first.loss_mean.values[-1])


@pytest.mark.slow
def test_it_needs_no_lightning() -> None:
    code = """import sys
    sys.modules["pytorch_lightning"] = sys.modules["lightning"] = None
    from nettrace.callbacks import TransformersTrace
    try:
        from nettrace.callbacks import NTKTrace
    except ImportError as error:
        print(error)"""
    code = code.replace("\n    ", "\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nettrace" in run.stdout


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_window_sees_the_weights_after_every_update(accumulated: int, tmp_path: Path) -> None:
    class Kept(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def keep(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

        on_train_begin = on_step_end = keep

    def trained(*callbacks: Any) -> dict[str, Any]:
        training.seed()
        options: dict[str, Any] = {"gradient_accumulation_steps": accumulated}
        options |= {"save_strategy": "steps", "save_steps": 4}
        return outcome(fit(list(callbacks), tmp_path / "run", **options))

    names, kept = ["seen/weights", "seen/steps", "loss/mean"], Kept()
    callback = TransformersTrace(
        names, every=2, samples=8, to=tmp_path / "trace", window=WeightWindow(4)
    )
    assert training.differences(trained(), trained(callback, kept)) == []
    trace = nt.open(tmp_path / "trace")
    assert trace.step.values.tolist() == [0, 2, 4, 6]
    assert trace.seen_steps.values[2:].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]
    assert "missing" not in trace.seen_steps.attrs
    for step in (4, 6):
        weights = torch.stack(kept.weights[step - 3 : step + 1]).numpy()
        assert trace.seen_weights.sel(step=step).values.tobytes() == weights.tobytes()
    assert callback.window.count == 0  # each training has one of its own
    resumed = TransformersTrace(
        names[:2], every=2, samples=8, to=tmp_path / "trace", window=WeightWindow(4)
    )
    with pytest.warns(nt.MissingMeasureWarning, match="3 of 4 snapshots"):
        fit([resumed], tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-4"))
    assert list(json.loads(nt.open(tmp_path / "trace").seen_steps.attrs["missing"])) == ["6"]
