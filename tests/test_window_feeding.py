"""Windows of weights, fed by tracers: what they hold is what the weights were."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import nettrace as nt
from nettrace import window as windows
from nettrace.measures import resolve
from nettrace.window import WeightWindow

pytestmark = pytest.mark.usefixtures("seen")
NAMES = ["seen/weights", "seen/steps"]


def probe(seed: int = 2) -> nt.Probe:
    samples = training.Samples(seed=seed)
    return nt.Probe(samples.inputs, samples.targets)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def updated(model: nn.Module, optimizer: Any, number: int = 0) -> None:
    x, y = training.Samples(seed=number, count=8)[range(8)]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def by_name(records: list[nt.Record]) -> dict[str, nt.Record]:
    return {record.name: record for record in records}


# Loops of one's own ------------------------------------------------------------------------------


def test_calling_the_tracer_feeds_the_window_whether_or_not_it_is_due() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracer = nt.Tracer(
        probe(), [*NAMES, "seen/samples", "seen/rates"], every=[7, 9], window=WeightWindow(5)
    )
    course = []
    for step in range(10):
        course.append(flat(model))
        found = by_name(tracer(model, step, optimizer, samples=8 * step))
        if step in (7, 9):
            assert found["seen/steps"].value.tolist() == list(range(step - 4, step + 1))
            assert found["seen/weights"].value.tobytes() == (
                torch.stack(course[-5:]).numpy().tobytes()
            )
            assert found["seen/samples"].value.tolist() == [
                8 * k for k in range(step - 4, step + 1)
            ]
            assert found["seen/rates"].value.tolist() == 5 * [0.1]
        else:
            assert found == {}
        updated(model, optimizer, step)


def test_where_the_end_is_not_known_a_window_that_is_not_full_is_the_reason() -> None:
    tracer = nt.Tracer(probe(), [*NAMES, "loss/mean"], window=WeightWindow(4))
    with pytest.warns(nt.MissingMeasureWarning, match="1 of 4 snapshots"):
        found = by_name(tracer(network(), 0))
    tracer(network(), 1)  # is said once
    assert "1 of 4 snapshots" in (found["seen/steps"].missing or "")
    assert found["loss/mean"].missing is None
    strict = nt.Tracer(probe(), NAMES, window=WeightWindow(4), on_error="raise")
    with pytest.raises(Exception, match="1 of 4 snapshots"):
        strict(network(), 0)


def test_recording_feeds_it_and_a_step_that_comes_twice_is_seen_once() -> None:
    model, window = network(), WeightWindow(4)
    tracer = nt.Tracer(probe(), NAMES, window=window)
    for step in range(4):
        tracer.watch(model, step)
    for _ in range(2):
        found = by_name(tracer.record(model, 4))
        assert found["seen/steps"].value.tolist() == [1, 2, 3, 4]
    other = nt.Tracer(probe(), NAMES, window=window)  # of the same window
    found = by_name(other(model, 4))
    assert found["seen/steps"].value.tolist() == [1, 2, 3, 4]


def test_the_network_within_a_wrapper_is_seen() -> None:
    wrapped, window = nn.DataParallel(network()), WeightWindow(4)
    tracer = nt.Tracer(probe(), NAMES, every=[3], window=window)
    for step in range(4):
        tracer(wrapped, step)
    assert window.names == [name for name, _ in wrapped.module.named_parameters()]


def test_a_window_is_made_where_a_measure_needs_one_and_no_other(tmp_path: Path) -> None:
    assert nt.Tracer(probe(), "loss").window is None
    made = nt.Tracer(probe(), ["loss", *NAMES], to=tmp_path)
    assert made.window is not None
    with pytest.warns(nt.MissingMeasureWarning, match="1 of 360"):
        made(network(), 0)
    told = json.loads(nt.open(tmp_path).attrs["configuration"])["window"]
    assert told == {
        **{"length": 360, "stride": 1, "parameters": ["*"], "keep": None},
        **{"memory": 2**28, "seed": 0, "population": None},
    }


@pytest.mark.parametrize("sizes", [(16, 16), (16, 9)])
def test_several_probes_share_one_window(sizes: tuple[int, int]) -> None:
    model = network()
    probes = {name: probe().take(slice(0, n)) for name, n in zip("ab", sizes, strict=True)}
    tracer = nt.Tracer(probes, [*NAMES, "loss/mean"], every=[5], window=WeightWindow(4))
    sees: list[int] = []
    see = tracer.window.see
    tracer.window.see = lambda m, s, *rest: (sees.append(s), see(m, s, *rest))
    for step in range(6):
        found = by_name(tracer(model, step))
    assert sees == list(range(6))
    assert all(one.window is tracer.window for one in tracer.each())
    assert found["seen/steps"].value.tolist() == 2 * [[2, 3, 4, 5]]
    assert found["seen/steps"].dims == ("probe", "snapshot")


def test_watching_counts_as_measuring() -> None:
    tracer = nt.Tracer(probe(), NAMES, every=[99], window=WeightWindow(4), budget=0.5)
    for step in range(9):
        tracer(network(), step)
    assert tracer._ledger._spent > 0


# The optimizer's steps ---------------------------------------------------------------------------


def attached(steps: int, tracer: Any, step: int = 0) -> tuple[list[Tensor], nn.Module]:
    training.seed()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    course = [flat(model)]
    with nullcontext() if tracer is None else tracer.attached(model, optimizer, step=step):
        for number in range(steps):
            updated(model, optimizer, number)
            course.append(flat(model))
    return course, model


@pytest.mark.parametrize("stride", [1, 2])
def test_an_optimizer_s_steps_feed_it(stride: int, tmp_path: Path) -> None:
    window = WeightWindow(4, stride=stride)
    tracer = nt.Tracer(probe(), [*NAMES, "loss/mean"], every=4, to=tmp_path, window=window)
    course, model = attached(11, tracer)
    bare, plain = attached(11, None)
    assert training.differences(bare, course) == []
    assert training.differences(training.state(plain), training.state(model)) == []
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 4, 8]
    assert np.isfinite(trace.loss_mean.values).all()
    for step in (4, 8):
        found = trace.sel(step=step)
        if step == 4 and stride == 2:  # of 0, 2, 4
            assert np.isnan(found.seen_steps.values).all()
            continue
        steps = list(range(step - 3 * stride, step + 1, stride))
        assert found.seen_steps.values.tolist() == steps
        expected = torch.stack([course[k] for k in steps]).numpy()
        assert found.seen_weights.values.tobytes() == expected.tobytes()
    assert "missing" not in trace.seen_steps.attrs
    assert len(window.steps) == 4  # which is the user's


def test_a_window_that_the_tracer_made_is_let_go_of_when_the_run_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {"length": 4, "memory": "1MB"}
    monkeypatch.setattr("nettrace.tracer.WeightWindow", lambda: WeightWindow(**short))
    tracer = nt.Tracer(probe(), NAMES, every=[5])
    attached(6, tracer)
    assert tracer.window.count == 0
    assert tracer.window._rows.numel() == 0


def test_one_that_was_never_full_is_missing_at_the_end_with_the_reason(tmp_path: Path) -> None:
    tracer = nt.Tracer(
        probe(), [*NAMES, "loss/mean"], every=4, to=tmp_path, window=WeightWindow(50)
    )
    with pytest.warns(nt.MissingMeasureWarning, match="11 of 50 snapshots") as caught:
        attached(10, tracer)
    assert len(caught) == 1
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 4, 8, 10]
    reasons = json.loads(trace.seen_steps.attrs["missing"])
    assert list(reasons) == ["10"]
    assert np.isfinite(trace.loss_mean.values).tolist() == [True, True, True, False]


def test_a_resumed_run_fills_it_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 3, "to": tmp_path, "on_error": "raise"}
    attached(6, nt.Tracer(probe(), NAMES, window=WeightWindow(4), **options))
    tracer = nt.Tracer(probe(), NAMES, window=WeightWindow(4), **options)
    assert "window" not in json.dumps(str(tracer.state_dict()))
    attached(9, tracer, step=6)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [3, 6, 9, 12, 15]
    assert trace.seen_steps.sel(step=9).values.tolist() == [6, 7, 8, 9]


def test_what_goes_wrong_with_feeding_does_not_end_a_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(self: WeightWindow, *_: Any) -> None:
        raise ArithmeticError("nobody foresaw it")

    monkeypatch.setattr(windows.WeightWindow, "_see", fails)
    tracer = nt.Tracer(probe(), [*NAMES, "loss/mean"], every=3, to=tmp_path)
    with pytest.warns(nt.MissingMeasureWarning, match="ArithmeticError: nobody") as caught:
        course, _ = attached(6, tracer)
    assert len(caught) == 1
    assert training.differences(attached(6, None)[0], course) == []
    assert np.isfinite(nt.open(tmp_path).loss_mean.values).all()


# What it is not for ------------------------------------------------------------------------------


def test_checkpoints_have_no_window_and_that_is_said_once(tmp_path: Path) -> None:
    for step in range(3):
        torch.save(network().state_dict(), tmp_path / f"step={step}.pt")
    names = ["seen/steps", "loss/mean", "seen/weights"]
    found = nt.analyze(tmp_path, probe(), names, model=network(), progress=False)
    assert found.done == (0, 1, 2)
    assert found.failed == {}
    assert list(found.missing) == ["seen/steps", "seen/weights"]
    assert (
        "measure it while training, as by the callback WeightFluctuations"
        in (found.missing["seen/steps"])
    )
    assert np.isfinite(found.trace.loss_mean.values).all()
    alone = nt.analyze(
        tmp_path, probe(), "seen/steps", model=network(), to=tmp_path / "alone", progress=False
    )
    assert list(alone.missing) == ["seen/steps"]


def test_a_training_step_has_no_window() -> None:
    from nettrace.callbacks import GradientStatistics

    with pytest.raises(ValueError, match="'seen/steps' is not measured in training steps"):
        GradientStatistics(["gradients", "seen/steps"])
    assert resolve("seen/steps")[0].needs == ("window",)
