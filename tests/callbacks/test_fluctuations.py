"""Windows of weights that trainers' callbacks feed: what they hold is what the weights were."""

from __future__ import annotations

import copy
import json
import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import Tensor

import nettrace as nt
from nettrace.callbacks import Trace, WeightFluctuations, session
from nettrace.waiting import settings
from nettrace.window import WeightWindow

pytestmark = [
    pytest.mark.usefixtures("seen"),
    *[pytest.mark.filterwarnings(warning) for warning in training.HARMLESS],
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning"),  # on purpose
]
NAMES = ["seen/weights", "seen/steps"]


def flat(model: Any) -> Tensor:
    found = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(found).clone()


class Course:
    """The weights after each update, kept by a callback that shares nothing with ours."""

    def __new__(cls, namespace: str = training.NAMESPACES[0]) -> Any:
        class Kept(import_module(f"{namespace}.callbacks").Callback):
            def __init__(self) -> None:
                self.weights: dict[int, Tensor] = {}

            def on_train_start(self, trainer: Any, module: Any) -> None:
                self.weights[trainer.global_step] = flat(module)

            def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
                self.weights.setdefault(trainer.global_step, flat(module))

        return Kept()


def complaints(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, nt.MissingMeasureWarning)]


def check(folder: Path, course: Any, length: int, steps: list[int], stride: int = 1) -> Any:
    """What was recorded is bit for bit what the weights were."""
    trace = nt.open(folder)
    assert trace.step.values.tolist() == steps
    for step in steps:
        found = trace.sel(step=step)
        expected = list(range(step - (length - 1) * stride, step + 1, stride))
        expected = [k - step % stride for k in expected]
        assert found.seen_steps.values.tolist() == expected
        weights = torch.stack([course.weights[k] for k in expected]).numpy()
        assert found.seen_weights.values.tobytes() == weights.tobytes()
    return trace


class Manual(training.delicate()):
    """Two optimizers in turn, the second at every other batch."""

    automatic_optimization = False
    both = False

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        several = self.optimizers()
        for optimizer in several if self.both else [several[index % 2]]:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in several if self.both else [several[index % 2]]:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[:4], self.net[4:])]


class Both(Manual):
    both = True


# When it is fed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", training.NAMESPACES)
def test_a_record_is_taken_whenever_the_window_is_full_of_what_is_new(
    namespace: str, tmp_path: Path
) -> None:
    course = Course(namespace)
    names = ["seen/samples", "seen/rates", "seen/population", *NAMES]
    callback = WeightFluctuations(names, length=4, to=tmp_path)
    model = training.network(namespace)()
    training.fit([callback, course], model, namespace=namespace, max_steps=13)
    trace = check(tmp_path, course, 4, [4, 8, 12])
    assert trace.seen_samples.sel(step=8).values.tolist() == [20, 24, 28, 32]
    assert trace.seen_rates.sel(step=8).values.tolist() == 4 * [0.1]
    assert trace.seen_population.values[:, 0].tolist() == [0, 0, 0]  # in order, not shuffled


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"burn_in": 3}, [7, 11]),
        ({"stride": 2}, [8]),
        ({"every": 5}, [5, 10]),
        ({"every": nt.with_last(6)}, [6, 12, 13]),
        ({"every": [2, 9]}, [9]),
    ],
    ids=["burn-in", "stride", "a period", "the last", "chosen"],
)
def test_the_window_is_of_the_last_updates_and_there_is_no_record_until_it_is_full(
    options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    course = Course()
    callback = WeightFluctuations(NAMES, length=4, to=tmp_path, **options)
    training.fit([callback, course], max_steps=13)
    check(tmp_path, course, 4, expected, options.get("stride", 1))


@pytest.mark.parametrize(
    ("network", "accumulated"),
    [(None, 1), (None, 3), (Manual, 1)],
    ids=["automatic", "accumulated", "manual"],
)
def test_every_update_is_seen_once(network: Any, accumulated: int, tmp_path: Path) -> None:
    course, sees = Course(), []
    see = WeightWindow.see

    def counted(self: WeightWindow, model: Any, step: int, *rest: Any) -> None:
        sees.append(step)
        see(self, model, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightWindow, "see", counted)
        callback = WeightFluctuations(NAMES, length=4, to=tmp_path)
        model = (network or training.delicate())()
        options = {"max_steps": 8, "accumulate_grad_batches": accumulated}
        training.fit([callback, course], model, **options)
    assert sees == list(range(9))
    check(tmp_path, course, 4, [4, 8])


def test_of_several_optimizers_that_step_at_a_batch_the_stride_is_to_be_told(
    tmp_path: Path,
) -> None:
    course = Course()
    callbacks = [
        WeightFluctuations(NAMES, length=4, to=tmp_path / "unaware"),
        WeightFluctuations(NAMES, length=4, stride=2, to=tmp_path / "aware"),
    ]
    with pytest.warns(nt.MissingMeasureWarning, match=r"gap of 2 updates.*stride=2") as caught:
        training.fit([*callbacks, course], Both(), max_steps=16)
    assert len(complaints(caught)) == 1
    check(tmp_path / "aware", course, 4, [8, 16], stride=2)


def test_a_window_that_was_never_full_is_missing_at_the_end(tmp_path: Path) -> None:
    callbacks = [
        WeightFluctuations(NAMES, length=50, to=tmp_path / "default"),
        Trace([*NAMES, "loss/mean"], every=3, to=tmp_path / "beside", window=WeightWindow(50)),
    ]
    with pytest.warns(nt.MissingMeasureWarning, match="8 of 50 snapshots") as caught:
        training.fit(callbacks, max_steps=7)
    assert len(complaints(caught)) == 1
    default, beside = (nt.open(tmp_path / name) for name in ("default", "beside"))
    assert default.step.values.tolist() == [7]
    assert beside.step.values.tolist() == [0, 3, 6, 7]
    for trace in (default, beside):
        assert list(json.loads(trace.seen_steps.attrs["missing"])) == ["7"]
    assert np.isfinite(beside.loss_mean.values).tolist() == [True, True, True, False]


def test_one_that_is_full_at_no_step_of_the_schedule_is_recorded_last(tmp_path: Path) -> None:
    course = Course()
    callback = WeightFluctuations(NAMES, length=4, every=[1, 2], to=tmp_path)
    training.fit([callback, course], max_steps=6)
    check(tmp_path, course, 4, [6])


def test_a_budget_is_not_misled_by_steps_at_which_a_window_was_not_full(tmp_path: Path) -> None:
    callback = WeightFluctuations(NAMES, length=4, every=1, budget=1.0, to=tmp_path)
    training.fit(callback, max_steps=6)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [3, 4, 5, 6]
    assert trace.nettrace_skipped.values.tolist() == [0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that:UserWarning")
def test_a_resumed_run_fills_it_anew_and_says_nothing(tmp_path: Path) -> None:
    def run(last: int, checkpoint: Path | None = None) -> Any:
        keep = import_module("pytorch_lightning.callbacks").ModelCheckpoint(
            tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False
        )
        course = Course()
        callback = WeightFluctuations(NAMES, length=4, to=tmp_path / "trace")
        options = {"enable_checkpointing": True, "ckpt_path": checkpoint}
        training.fit([callback, keep, course], max_steps=last, **options)
        return course

    first = run(9)
    size = (tmp_path / "step=9.ckpt").stat().st_size
    assert abs(size - (tmp_path / "step=1.ckpt").stat().st_size) < 1000  # without the window
    second = run(16, tmp_path / "step=6.ckpt")
    second.weights = {**first.weights, **second.weights}
    check(tmp_path / "trace", second, 4, [4, 12, 16])  # at 8, it had 3


# What is shared ----------------------------------------------------------------------------------


def test_callbacks_share_windows_that_are_the_same_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    windows = session.Windows

    def noted(*arguments: Any) -> Any:
        made.append(windows(*arguments))
        return made[-1]

    monkeypatch.setattr(session, "Windows", noted)
    course = Course()
    probe = nt.Probe(*training.Samples(seed=3)[range(9)])
    options: dict[str, Any] = {"length": 4, "probe": probe}
    callbacks = [
        Trace("loss", every=4, probe=probe, to=tmp_path / "loss"),
        WeightFluctuations(NAMES, to=tmp_path / "one", **options),
        WeightFluctuations("seen/steps", every=6, to=tmp_path / "same", **options),
        WeightFluctuations(NAMES, length=4, to=tmp_path / "elsewhere"),
        WeightFluctuations(NAMES, to=tmp_path / "later", burn_in=2, **options),
        WeightFluctuations(NAMES, length=5, probe=probe, to=tmp_path / "longer"),
        WeightFluctuations(NAMES, parameters="net.0.*", to=tmp_path / "part", **options),
    ]
    training.fit([*callbacks, course], max_steps=12)
    of = [made[0].of.get(callback) for callback in callbacks]
    assert of[0] is None
    assert of[1] is of[2] is of[3]
    assert len({id(window) for window in of[1:]}) == 4
    assert all(callback.window is not window for callback, window in made[0].of.items())
    check(tmp_path / "one", course, 4, [4, 8, 12])
    check(tmp_path / "elsewhere", course, 4, [4, 8, 12])
    check(tmp_path / "later", course, 4, [6, 10])
    check(tmp_path / "longer", course, 5, [5, 10])
    assert nt.open(tmp_path / "same").seen_steps.values.tolist() == [[3, 4, 5, 6], [9, 10, 11, 12]]
    part = nt.open(tmp_path / "part")
    assert part.seen_weights.shape == (3, 4, 4 * 5 + 5)
    told = [
        json.loads(nt.open(tmp_path / name).attrs["configuration"]) for name in ("later", "loss")
    ]
    assert told[0]["callbacks"][0]["window"]["burn_in"] == 2
    assert told[0]["callbacks"][0]["window"]["length"] == 4
    assert "window" not in told[1]["callbacks"][0]


def test_one_pass_is_shared_with_callbacks_that_need_no_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    observe = nt.Tracer.observe

    def counted(self: Any, model: Any, step: int, *rest: Any) -> Any:
        looks.append(step)
        return observe(self, model, step, *rest)

    monkeypatch.setattr(nt.Tracer, "observe", counted)
    trace, fluctuations = Trace("loss", every=4), WeightFluctuations(NAMES, length=4, to=tmp_path)
    training.fit([trace, fluctuations], max_steps=9)
    assert looks == [0, 4, 8]
    assert nt.open(tmp_path).step.values.tolist() == [4, 8]


@pytest.mark.parametrize(
    ("options", "population"),
    [
        ({"shuffle": True}, 16),
        ({}, 0),
        ({"sampler": torch.utils.data.RandomSampler(range(16), replacement=True)}, 0),
    ],
    ids=["shuffled", "in order", "with replacement"],
)
def test_a_data_set_that_is_dealt_out_is_known(
    options: dict[str, Any], population: int, tmp_path: Path
) -> None:
    callback = WeightFluctuations("seen/population", length=4, to=tmp_path)
    training.fit(callback, data=training.loader(**options))
    assert nt.open(tmp_path).seen_population.values.tolist() == [[population]]


def test_a_callback_is_of_several_trainings(tmp_path: Path) -> None:
    callback = WeightFluctuations(NAMES, length=4, to=tmp_path / "one")
    other = copy.deepcopy(callback)
    assert settings(pickle.loads(pickle.dumps(callback.window))) == settings(callback.window)
    other.to = tmp_path / "other"
    for one in (callback, other):
        course = Course()
        training.fit([one, course], max_steps=5)
        assert one.window.count == 0
        assert one._session is None
        check(one.to, course, 4, [4])


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("within", ["see", "_see"])
def test_a_window_that_fails_costs_nothing_of_the_training_and_one_warning(
    within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(*callbacks: Any) -> dict[str, Any]:
        training.seed()
        model = training.delicate()()
        data = training.loader(training.Augmented(), shuffle=True)
        return training.result(training.fit(list(callbacks), model, data, max_steps=6), model)

    def fails(self: WeightWindow, model: Any, step: int, *_: Any) -> None:
        if step > 1:
            raise ArithmeticError("nobody foresaw it")

    bare = outcome()
    monkeypatch.setattr(WeightWindow, within, fails)
    callbacks = [
        WeightFluctuations(NAMES, length=4, to=tmp_path / "window"),
        Trace("loss/mean", every=1, to=tmp_path / "loss"),
    ]
    with pytest.warns(nt.MissingMeasureWarning, match="ArithmeticError: nobody foresaw") as caught:
        found = outcome(*callbacks)
    assert len(complaints(caught)) == 1
    assert training.differences(bare, found) == []
    steps = nt.open(tmp_path / "loss").step.values.tolist()
    assert steps == ([0, 1] if within == "see" else list(range(7)))
    if within == "_see":
        reasons = json.loads(nt.open(tmp_path / "window").seen_steps.attrs["missing"])
        assert list(reasons) == ["4"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"length": 3}, "at least 4 snapshots"),
        ({"stride": 0}, "stride of at least 1"),
        ({"burn_in": -1}, "burn-in of at least 0 updates, got -1"),
        ({"keep": "all"}, "expected keep to be one of"),
        ({"measures": "loss"}, "none of .'loss'. is of a window"),
        ({"measures": "weights/walk"}, "unknown measure 'weights/walk'"),
        ({"memory": "much"}, "much"),
    ],
)
def test_what_cannot_be_asked_for_is_said_at_once(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WeightFluctuations(**{"measures": NAMES, **given})
