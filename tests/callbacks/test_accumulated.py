"""Where samples are coupled, the noise scale comes from the micro-batches of an update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nettrace as nt
from nettrace.callbacks import GradientStatistics
from nettrace.measures import resolve
from nettrace.statistics import micro_batches
from nettrace.statistics.micro_batches import MicroBatches, MicroBatchStatistics

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]
missing = pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
BATCH, ACCUMULATE = 4, 4


class Contrastive(pl.LightningModule):
    """SimCLR's loss of two noisy views, of which each sample sees all others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.unused = nn.Parameter(torch.ones(2))
        self.before: list[dict[str, Tensor]] = []
        self.seen: list[tuple[int, Tensor]] = []

    def loss(self, x: Tensor) -> Tensor:
        views = torch.cat([x, x.roll(1, 1)])
        z = F.normalize(self.net(views), dim=1)
        similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e3)
        return F.cross_entropy(similar, torch.arange(len(z)).roll(len(x)))

    def training_step(self, batch: Any, index: int) -> Tensor:
        state = {name: value.clone() for name, value in self.state_dict().items()}
        self.before.append(state)
        self.seen.append((self.trainer.global_step, batch[0].clone()))
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Manual(Contrastive):
    """The same by hand: an update after so many batches, or where the next of them begins."""

    def __init__(self, passes: int = 1, late: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.passes, self.late = passes, late

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        if self.late and index and index % ACCUMULATE == 0:
            self.update(optimizer)
        loss = super().training_step(batch, index)
        self.toggle_optimizer(optimizer)
        for number in range(self.passes):
            self.manual_backward((loss if not number else self.loss(batch[0])) / self.passes)
        self.untoggle_optimizer(optimizer)
        if not self.late and index % ACCUMULATE == ACCUMULATE - 1:
            self.update(optimizer)

    def update(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, 0.01, "norm")
        optimizer.step()
        optimizer.zero_grad()


NAMES = [f"gradients/{name}" for name in ("signal", "noise", "noise_scale")]


def data(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    """Batches of which the last is smaller, as is the number of them in the last update."""
    x = torch.randn(38, 5, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x.to(dtype)), BATCH)


def fit(module: Contrastive, callbacks: Any, **options: Any) -> dict[str, Any]:
    """All that came of two epochs."""
    settings = {"max_steps": -1, "max_epochs": 2, **options}
    training.seed()
    its = training.fit(callbacks, module.double(), data(), **settings)
    return {**training.result(its, module), "course": []}


def micro_gradients(module: Contrastive, step: int) -> tuple[list[int], list[np.ndarray]]:
    """Sizes and gradients of the micro-batches that an update was made of."""
    sizes, found = [], []
    parameters = [p for p in module.parameters() if p.requires_grad]
    for state, (at, x) in list(zip(module.before, module.seen, strict=True)):
        if at == step:
            module.load_state_dict(state)
            module.train()
            g = torch.autograd.grad(
                module.loss(x), parameters, materialize_grads=True, allow_unused=True
            )
            found.append(torch.cat([part.flatten() for part in g]).numpy())
            sizes.append(len(x))
    return sizes, found


def numbers(sizes: list[int], g: list[np.ndarray]) -> dict[str, float]:
    """McCandlish et al., appendix A.1: from small batches and the big one that they make."""
    count = len(g)
    small = np.mean([one @ one for one in g])
    big = np.mean(g, 0) @ np.mean(g, 0)
    signal = (count * big - small) / (count - 1)
    noise = (small - big) / (1 - 1 / count) / np.mean(1 / np.array(sizes))
    return {"signal": signal, "noise": noise, "noise_scale": noise / signal}


class Plain(Contrastive):
    """Without batch normalisation, whose buffers half precision moves elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


class Fails(pl.Callback):
    """Ends the training before its first update."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 2:
            raise ZeroDivisionError


def jackknife(sizes: list[int], g: list[np.ndarray], name: str) -> float:
    size = [1 / np.mean(1 / np.array(sizes))] * (len(g) - 1)
    without = [numbers(size, g[:m] + g[m + 1 :])[name] for m in range(len(g))]
    return float(np.sqrt((len(g) - 1) * np.var(without)))


STYLES: dict[str, tuple[Callable[[], Contrastive], dict[str, Any]]] = {
    "automatic": (Contrastive, {"accumulate_grad_batches": ACCUMULATE}),
    "clipped": (Contrastive, {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": 1e-3}),
    "manual": (Manual, {}),
    "updated late": (partial(Manual, late=True), {}),
}


@missing
@pytest.mark.parametrize("style", STYLES)
def test_values_are_those_of_the_micro_batches(style: str, tmp_path: Any) -> None:
    make, options = STYLES[style]
    module = make()
    result = fit(module, [GradientStatistics(every=1, to=tmp_path)], **options)
    assert training.differences(fit(make(), [], **options), result) == []
    trace = nt.open(tmp_path)
    steps = sorted({step for step, _ in module.seen})
    checked = 0
    for step in steps:
        now = trace.sel(step=step)
        sizes, g = micro_gradients(module, step)
        if style == "manual" and step == steps[-1]:
            continue  # no update comes of the last batches
        if style == "updated late":
            if step > 0:
                break  # the first batch after an update begins before it
            sizes, g = sizes[:ACCUMULATE], g[:ACCUMULATE]
        for name, true in numbers(sizes, g).items():
            found = now[f"gradients_{name}"]
            assert float(found) == pytest.approx(true, rel=1e-9)
            error = float(now[f"gradients_{name}_standard_error"])
            if len(g) > 2:
                assert error == pytest.approx(jackknife(sizes, g, name), rel=1e-7)
            checked += 1
    assert checked >= 3 * (1 if style == "updated late" else 4)
    assert "8 rows for 4 samples" in str(trace.gradients_noise_scale.attrs["samples_apart"])
    assert "micro-batches of 4" in str(trace.gradients_noise_scale.attrs["batch"])
    assert "8 rows for 4 samples" in trace.gradients_norms.attrs["missing"]
    assert "gradients_signal_to_noise_per_layer" in trace


@missing
def test_the_scale_of_half_precision_is_taken_out() -> None:
    """On the CPU, where Lightning would take bfloat16: the weights are single, the tape is half."""
    found = {}
    for name, precision in (("double", None), ("half", 2.0**10)):
        plugins = []
        if precision is not None:
            from pytorch_lightning.plugins.precision import MixedPrecision

            plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", precision))]
        module, statistics = Plain(), GradientStatistics(NAMES, every=[0])
        its = training.fit(
            *([statistics], module.float(), data(torch.float32)),
            **{"max_steps": 1, "accumulate_grad_batches": ACCUMULATE, "plugins": plugins},
        )
        found[name] = {n: float(its.callback_metrics[n]) for n in NAMES}
    for name in NAMES:
        assert found["half"][name] == pytest.approx(found["double"][name], rel=0.03)


@missing
@pytest.mark.parametrize("why", ["one batch", "several passes"])
def test_what_is_no_micro_batch_is_missing_as_ever(why: str, tmp_path: Any) -> None:
    make = partial(Manual, passes=2) if why == "several passes" else Contrastive
    result = fit(make(), [GradientStatistics(every=1, to=tmp_path)], max_epochs=1)
    assert training.differences(fit(make(), [], max_epochs=1), result) == []
    trace = nt.open(tmp_path)
    for name in ("gradients_norms", "gradients_noise_scale"):
        assert "8 rows for 4 samples" in trace[name].attrs["missing"]
    if why == "several passes":
        assert "8 rows" in trace.gradients_noise_scale_backward_2.attrs["missing"]


@missing
def test_what_was_recorded_before_a_failure_is_on_disk(tmp_path: Any) -> None:
    callbacks = [GradientStatistics(every=1, to=tmp_path), Fails()]
    with pytest.raises(ZeroDivisionError):
        fit(Contrastive(), callbacks, accumulate_grad_batches=ACCUMULATE)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0]
    assert "8 rows for 4 samples" in trace.gradients_norms.attrs["missing"]
    assert "gradients_noise_scale" not in trace


def test_who_wants_errors_gets_none_of_what_micro_batches_tell(tmp_path: Any) -> None:
    statistics = GradientStatistics(NAMES, every=1, to=tmp_path, on_error="raise")
    fit(Contrastive(), [statistics], accumulate_grad_batches=ACCUMULATE, max_epochs=1)
    assert np.isfinite(nt.open(tmp_path).gradients_noise_scale.values).all()
    with pytest.raises(nt.CoupledSamplesError, match="8 rows for 4 samples"):
        fit(Contrastive(), [GradientStatistics(NAMES, every=1, on_error="raise")])


def test_gradients_beyond_the_memory_are_refused(tmp_path: Any, monkeypatch: Any) -> None:
    module = Contrastive().double()
    size = 3 * 8 * sum(p.numel() for p in module.parameters())  # of three
    monkeypatch.setattr("nettrace.callbacks.accumulated.parse_bytes", lambda _: size)
    statistics = GradientStatistics(NAMES, every=[0], to=tmp_path)
    options = {"accumulate_grad_batches": ACCUMULATE, "max_epochs": 1}
    with pytest.warns(nt.MissingMeasureWarning, match="gradients of 4 micro-batches"):
        result = fit(module, [statistics], **options)
    assert "above the memory budget" in nt.open(tmp_path).gradients_noise.attrs["missing"]
    assert training.differences(fit(Contrastive(), [], **options), result) == []


def test_a_failure_is_said_and_the_training_goes_on(tmp_path: Any, monkeypatch: Any) -> None:
    def fail(self: Any, samples: int, scale: float) -> None:
        raise RuntimeError("[enforce fail] not enough memory: you tried to allocate")

    monkeypatch.setattr(micro_batches.MicroBatches, "after_backward", fail)
    options = {"accumulate_grad_batches": ACCUMULATE, "max_epochs": 1}
    with pytest.warns(nt.MissingMeasureWarning) as warned:
        result = fit(Contrastive(), [GradientStatistics(NAMES, every=1, to=tmp_path)], **options)
    assert any("cannot measure the training step" in str(w.message) for w in warned)
    assert training.differences(fit(Contrastive(), [], **options), result) == []
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 1, 2]
    assert "8 rows" in trace.gradients_noise.attrs["missing"]


def test_they_are_without_bias_and_their_errors_calibrated() -> None:
    """Linear regression on Gaussian inputs, in micro-batches of several sizes."""
    d, draws, sizes = 5, 400, [6, 6, 6, 3, 6, 6, 6, 6, 6, 6, 6, 2]
    w = torch.full((d,), 0.4).double()
    signal = float(w @ w)
    noise = (signal + 1) * d + signal
    generator = torch.Generator().manual_seed(0)
    values: dict[str, list[float]] = {name: [] for name in NAMES[:2]}
    errors: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(draws):
        batches = MicroBatches({"w": w}, 2**20)
        for size in sizes:
            x = torch.randn(size, d, generator=generator).double()
            residuals = x @ w - torch.randn(size, generator=generator).double()
            batches.add({"w": residuals @ x / size}, size)
        found: Any = MicroBatchStatistics(batches, 0, "")
        for measure in resolve(NAMES[:2]):
            value = measure(found)
            values[measure.name].append(float(value.value))
            errors[measure.name].append(float(value.standard_error))
    for name, true in zip(values, (signal, noise), strict=True):
        found = np.array(values[name])
        assert abs(found.mean() - true) < 3.5 * found.std() / np.sqrt(draws)
        assert 0.85 < np.sqrt(np.square(errors[name]).mean()) / found.std() < 1.25


def test_complex_and_sparse_gradients_are_read() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    phases = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    parameters = {"embedding": embedding.weight, "phases": phases}
    batches = MicroBatches(parameters, 2**20)
    true = []
    for size in (2, 3, 4):
        x = torch.arange(size)
        loss = (embedding(x).square().sum() + (phases * size).abs().square().sum()) / size
        g = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        true.append(torch.cat([g[0].to_dense().flatten(), torch.view_as_real(g[1]).flatten()]))
        batches.before_backward()
        (8 * loss).backward()
        kept = [p.grad for p in parameters.values()]
        batches.after_backward(size, 8.0)
        assert all(a is b.grad for a, b in zip(kept, parameters.values(), strict=True))
    flat = torch.stack(true).double()
    assert torch.allclose(sum(batches.products().values()), flat @ flat.T, rtol=1e-5)
