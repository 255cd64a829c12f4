"""A tracer that counts the steps of an optimizer by itself, in a loop that says nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import nettrace as nt

MEASURES = ["loss", "ntk/trace", "fisher/trace", "weights/displacement"]


def network() -> nn.Sequential:
    """With all that a measurement could disturb."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def probe() -> nt.Probe:
    samples = training.Samples(seed=2)
    return nt.Probe(samples.inputs, samples.targets)


def plain(model: nn.Module, batch: Any, optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for optimizer in optimizers:
        optimizer.step()


def closed(model: nn.Module, batch: Any, optimizers: list[Any]) -> None:
    def closure() -> Tensor:
        optimizers[0].zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizers[0].step(closure)


def alternating(model: nn.Module, batch: Any, optimizers: list[Any]) -> None:
    """Two steps of the first for each of the last."""
    optimizers[0].zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizers[0].step()
    plain(model, batch, optimizers)


def adam(model: Any, **options: Any) -> list[Any]:
    return [torch.optim.AdamW(model.parameters(), 0.01, **options)]


LOOPS: dict[str, tuple[Callable[..., list[Any]], Callable[..., None]]] = {
    "Adam": (adam, plain),
    "closure": (adam, closed),
    "LBFGS": (lambda model: [torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)], closed),
    "two optimizers": (
        lambda m: [torch.optim.SGD(m[0].parameters(), 0.1, momentum=0.9), *adam(m[4])],
        plain,
    ),
    "alternating": (
        lambda m: [torch.optim.SGD(m[0].parameters(), 0.1), *adam(m[4])],
        alternating,
    ),
    "scheduled": (
        lambda m: [torch.optim.lr_scheduler.StepLR(adam(m)[0], 1).optimizer],
        plain,
    ),
}


def train(
    loop: str, trace: Callable[..., Any], steps: int = 5
) -> tuple[dict[str, Any], nn.Module, Any]:
    training.seed()
    model = network()
    make, step = LOOPS[loop]
    optimizers = make(model)
    data = training.loader(training.Augmented(count=4 * steps), shuffle=True)
    course = []
    with trace(model, optimizers) as run:
        for batch in data:
            step(model, batch, optimizers)
            course.append(training.state(model))
    ends = {"course": course, "optimizers": [o.state_dict() for o in optimizers]}
    hooks = sum(len(o._optimizer_step_post_hooks) for o in optimizers)
    return {**training.state(model), **ends, "hooks": hooks}, model, run


def bare(model: nn.Module, optimizers: list[Any]) -> Any:
    return nullcontext()


@pytest.mark.parametrize("loop", LOOPS)
def test_training_is_bitwise_the_same_in_the_context(loop: str, tmp_path: Path) -> None:
    tracer = nt.Tracer(probe(), MEASURES, every=1, to=tmp_path, on_error="raise")
    found, model, run = train(loop, tracer.attached)
    assert training.differences(train(loop, bare)[0], found) == []
    assert run.step == 5
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 1, 2, 3, 4, 5]
    last = nt.Tracer(probe(), ["loss/mean"])(model, 5)[0].value
    assert trace.loss_mean.values[-1] == last
    assert trace.loss_mean.values[0] != last


def test_the_values_are_those_of_a_tracer_that_is_called(tmp_path: Path) -> None:
    names = [*MEASURES, "ntk/preconditioned_trace", "ntk/velocity"]
    schedule = range(1, 6, 2)
    tracer = nt.Tracer(probe(), names, every=schedule, to=tmp_path / "attached")
    train("two optimizers", tracer.attached)
    by_hand = nt.Tracer(probe(), names, every=schedule, to=tmp_path / "called")
    training.seed()
    model = network()
    optimizers = LOOPS["two optimizers"][0](model)
    by_hand(model, 0, optimizers)
    data = training.loader(training.Augmented(count=20), shuffle=True)
    for step, batch in enumerate(data, 1):
        plain(model, batch, optimizers)
        by_hand(model, step, optimizers)
    attached, called = nt.open(tmp_path / "attached"), nt.open(tmp_path / "called")
    assert attached.step.values.tolist() == [1, 3, 5]
    for name in called:
        if not name.startswith("nettrace_seconds"):
            assert attached[name].variable.equals(called[name].variable), name


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_do_not_count(fused: bool) -> None:
    model = network()
    (optimizer,) = adam(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    tracer = nt.Tracer(probe(), "loss/mean", every=1)
    seen = []
    with tracer.attached(model, optimizer) as run:
        for index, (x, y) in enumerate(training.loader()):
            before = model[0].weight.detach().clone()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (math.inf if index in (0, 2) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append((run.step, torch.equal(before, model[0].weight)))
    assert seen == [(0, True), (1, False), (1, True), (2, False)]


class Interrupted(Exception):
    pass


def test_what_was_measured_before_an_exception_is_on_disk(tmp_path: Path, monkeypatch: Any) -> None:
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    model = network()
    (optimizer,) = adam(model)
    tracer = nt.Tracer(probe(), "loss", every=nt.with_last(1), to=tmp_path)

    def interrupted() -> None:
        with tracer.attached(model, optimizer):
            for batch in list(training.loader())[:2]:
                plain(model, batch, [optimizer])
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert nt.open(tmp_path).step.values.tolist() == [0, 1, 2]
    assert synced
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("on_error", ["record", "raise"])
def test_nothing_is_raised_into_the_training_unless_asked_for(on_error: Any) -> None:
    def fragile(step: int) -> bool:
        if step > 2:
            raise RuntimeError("out of luck")
        return True

    tracer = nt.Tracer(probe(), "loss", every=fragile, on_error=on_error)
    if on_error == "raise":
        with pytest.raises(RuntimeError, match="out of luck"):
            train("Adam", tracer.attached)
    else:
        with pytest.warns(nt.MissingMeasureWarning, match=r"step 3: RuntimeError: out") as caught:
            found, _, run = train("Adam", tracer.attached)
        assert len(caught) == 1
        assert run.step == 5
        assert training.differences(train("Adam", bare)[0], found) == []


def test_a_folder_of_another_probe_is_refused_before_the_training(tmp_path: Path) -> None:
    model = network()
    nt.Tracer(probe(), "loss", to=tmp_path)(model, 0)
    other = nt.Tracer(nt.Probe(torch.randn(3, 4)), "ntk/trace", to=tmp_path)
    (optimizer,) = adam(model)
    with pytest.raises(ValueError, match="another probe"), other.attached(model, optimizer):
        pass
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 5]), (5, [0, 5]), (100, [0, 5])])
def test_the_last_step_is_known_on_leaving(every: int, steps: list[int], tmp_path: Path) -> None:
    tracer = nt.Tracer(probe(), "loss", every=nt.with_last(every), to=tmp_path)
    train("Adam", tracer.attached)
    assert nt.open(tmp_path).step.values.tolist() == steps


def test_epochs_of_unknown_length_are_asked_for_before_the_training() -> None:
    tracer = nt.Tracer(probe(), "loss", every=nt.epochs(1))
    with pytest.raises(ValueError, match="steps_per_epoch="):
        train("Adam", tracer.attached)


def test_a_resumed_run_supersedes_and_compares_with_its_first_look(tmp_path: Path) -> None:
    names = ["weights/displacement", "ntk/velocity", "loss/mean"]

    def run(folder: Path, parts: list[tuple[int, int]], every: Any = (2, 2)) -> Any:
        training.seed()
        model = network().eval()
        (optimizer,) = adam(model)
        batches = list(training.loader(training.Samples(count=32)))
        checkpoint: dict[str, Any] = {}
        for (start, end), period in zip(parts, every, strict=False):
            tracer = nt.Tracer(probe(), names, every=period, to=folder)
            if checkpoint:
                model.load_state_dict(checkpoint["model"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                tracer.load_state_dict(checkpoint["tracer"])
            with tracer.attached(model, optimizer, step=start) as attached:
                for batch in batches[start:end]:
                    plain(model, batch, [optimizer])
                    if attached.step == 3 and not checkpoint:
                        torch.save(
                            {
                                "model": model.state_dict(),
                                "optimizer": optimizer.state_dict(),
                                "tracer": tracer.state_dict(),
                                "step": attached.step,
                            },
                            folder.with_suffix(".pt"),
                        )
                        checkpoint = torch.load(folder.with_suffix(".pt"), weights_only=True)
        return nt.open(folder)

    whole = run(tmp_path / "whole", [(0, 8)])
    parts = run(tmp_path / "parts", [(0, 7), (3, 8)])
    assert parts.step.values.tolist() == whole.step.values.tolist() == [0, 2, 4, 6, 8]
    for name in ("weights_displacement", "ntk_velocity", "loss_mean"):
        assert parts[name].variable.equals(whole[name].variable), name
    # Of the former attempt, nothing after the step where the latter took up is left, though the
    # latter has not measured before step 8.
    fewer = run(tmp_path / "fewer", [(0, 7), (3, 8)], every=(2, [8]))
    assert fewer.step.values.tolist() == [0, 2, 8]
    assert nt.open(tmp_path / "fewer", attempt=0).step.values.tolist() == [0, 2, 4, 6]


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of processes of one."""
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")
def test_of_a_wrapped_network_what_is_inside_is_measured(tmp_path: Path) -> None:
    def trained(folder: Path | None, wrap: bool) -> dict[str, Any]:
        training.seed()
        model: Any = network()
        inner, (optimizer,) = model, adam(model)
        if wrap:
            model = nn.parallel.DistributedDataParallel(model)
        names = [*MEASURES, "ntk/trace_per_layer"]
        tracer = nt.Tracer(probe(), names, every=1, to=folder, on_error="raise")
        with tracer.attached(model, optimizer) if folder else nullcontext():
            for batch in training.loader():
                plain(model, batch, [optimizer])
        return {**training.state(inner), "optimizer": optimizer.state_dict()}

    bare_ = trained(None, True)
    assert training.differences(bare_, trained(tmp_path / "wrapped", True)) == []
    trained(tmp_path / "plain", False)
    wrapped, plain_ = nt.open(tmp_path / "wrapped"), nt.open(tmp_path / "plain")
    assert wrapped.loss_mean.variable.equals(plain_.loss_mean.variable)
    assert wrapped.ntk_trace_per_layer.identical(
        plain_.ntk_trace_per_layer.assign_coords(wall_time=wrapped.wall_time)
    )
    assert wrapped.fisher_trace.variable.equals(plain_.fisher_trace.variable)


@pytest.mark.parametrize(
    ("model", "optimizer", "step", "error", "says"),
    [
        (3, adam(network()), 0, TypeError, "expected a torch.nn.Module, got int"),
        (network(), [], 0, TypeError, "whose steps are counted, got list"),
        (network(), ["SGD"], 0, TypeError, "whose steps are counted, got str"),
        (network(), adam(network()), -1, ValueError, "at least 0, got -1"),
        (network(), adam(network()), 0.5, TypeError, "float"),
    ],
)
def test_what_cannot_be_attached_to_is_refused(
    model: Any, optimizer: Any, step: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        nt.Tracer(probe(), "loss").attached(model, optimizer, step=step)


def test_two_tracers_may_be_attached_at_once_also_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    model = network()
    (optimizer,) = adam(model)
    for start in (0, 4, 2):
        one = nt.Tracer(probe(), "loss/mean", every=1, to=tmp_path).attached
        other = nt.Tracer(probe(), "ntk/trace", every=2, to=tmp_path).attached
        with (
            one(model, optimizer, step=start) as first,
            other(model, optimizer, step=start) as second,
        ):
            for batch in training.loader():
                plain(model, batch, [optimizer])
        assert first.step == second.step == start + 4
        found = nt.open(tmp_path)
        assert found.loss_mean.notnull().sum() == start + 5
        assert found.ntk_trace.dropna("step").step.values.tolist() == list(range(0, start + 5, 2))


def test_a_context_is_entered_once_at_a_time() -> None:
    model = network()
    attached = nt.Tracer(probe(), "loss/mean").attached(model, *adam(model))
    with attached, pytest.raises(RuntimeError, match="entered already"), attached:
        pass
