"""An assumed loss is held against the one that the first training step returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor

import nettrace as nt
from nettrace.callbacks import FisherTrace, NTKTrace, Trace

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

both_namespaces = pytest.mark.parametrize("namespace", training.NAMESPACES)
NAMES = ("loss_mean", "fisher_trace", "collective_chi_align")


def classifier(loss: Callable[[Tensor, Tensor], Tensor], kind: Any = None) -> Any:
    """A network that is trained by some loss."""

    class Classifier(kind or training.delicate()):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss(self(batch[0]), batch[1])

    return Classifier()


def checked(folder: Path, name: str = "loss_mean") -> str:
    """What the trace says of the loss."""
    return nt.open(folder)[name].attrs["loss_checked"]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3, "max_steps": 2},
    "bfloat16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},
}


@pytest.mark.parametrize("options", OPTIONS)
@both_namespaces
def test_cross_entropy_is_found_to_be_so_with_dropout_and_norms(
    options: str, namespace: str, tmp_path: Path
) -> None:
    model = classifier(F.cross_entropy, training.delicate(namespace))
    data = training.loader(training.Augmented(), shuffle=True)
    callback = Trace(["loss", "fisher", "collective"], every=1, to=tmp_path)
    training.fit(callback, model, data, namespace=namespace, **OPTIONS[options])
    trace = nt.open(tmp_path)
    for name in NAMES:
        assert checked(tmp_path, name) == "on the first batch, the network's own loss is this"
        assert "missing" not in trace[name].attrs


def test_the_comparison_rests_on_the_draws_of_the_training_step(tmp_path: Path) -> None:
    class Drawing(training.delicate()):
        def training_step(self, batch: Any, index: int) -> Tensor:
            torch.rand(7)
            return super().training_step(batch, index)

    with pytest.warns(nt.MissingMeasureWarning, match="does not give"):
        training.fit(Trace("loss", every=1, to=tmp_path), Drawing())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "margin": F.multi_margin_loss,
    "squared": lambda z, y: (z - F.one_hot(y, 3)).square().mean(),
    "focal": lambda z, y: (
        (F.cross_entropy(z, y, reduction="none").neg().exp() - 1).square()
        * F.cross_entropy(z, y, reduction="none")
    ).mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_rests_on_another_loss_is_missing_from_the_first_step_on(
    loss: str, tmp_path: Path
) -> None:
    callbacks = [kind(every=1, to=tmp_path) for kind in (Trace, NTKTrace, FisherTrace)]
    with pytest.warns(nt.MissingMeasureWarning, match=r"first batch.*Probe\(\.\.\., losses="):
        training.fit(callbacks, classifier(LOSSES[loss]))
    trace = nt.open(tmp_path)
    for name in NAMES:
        reasons = json.loads(trace[name].attrs["missing"])
        assert list(reasons) == ["1..4"]
        assert trace[name].isnull().values.tolist() == [False, True, True, True, True]
        assert checked(tmp_path, name) == "not checked yet: no batch has been trained on"
    assert "missing" not in trace.ntk_trace.attrs


def test_the_numbers_are_those_of_the_first_batch(tmp_path: Path) -> None:
    model, samples = training.network()(), training.Samples()
    with torch.no_grad():
        outputs, targets = model(samples.inputs[:4]), samples.targets[:4]
        ours = float(F.cross_entropy(outputs, targets))
        theirs = float(F.multi_margin_loss(outputs, targets))
    says = f"is {ours:.4f}.*returned {theirs:.4f}"
    with pytest.warns(nt.MissingMeasureWarning, match=says):
        training.fit(Trace("loss", every=1), classifier(F.multi_margin_loss, training.network()))


@pytest.mark.parametrize("declared", [{"likelihood": "categorical"}, {"losses": None}], ids=str)
def test_a_loss_that_is_declared_is_not_questioned(
    declared: dict[str, Any], tmp_path: Path
) -> None:
    if "losses" in declared:
        declared = {"losses": lambda z, y: F.multi_margin_loss(z, y, reduction="none")}
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets, **declared)
    callback = Trace(["loss/mean"], every=1, probe=probe, to=tmp_path)
    training.fit(callback, classifier(F.multi_margin_loss))
    found = nt.open(tmp_path).loss_mean
    assert not found.isnull().any()
    assert "loss_checked" not in found.attrs


def test_each_of_several_probes_is_held_against_the_training(tmp_path: Path) -> None:
    samples = training.Samples()
    pair = samples.inputs, samples.targets
    probes = {"open": nt.Probe(*pair), "said": nt.Probe(*pair, likelihood="categorical")}
    callback = Trace("loss/mean", every=1, probe=probes, to=tmp_path)
    with pytest.warns(nt.MissingMeasureWarning, match="on open: .*does not give"):
        training.fit(callback, classifier(F.multi_margin_loss))
    found = nt.open(tmp_path).loss_mean
    assert found.isnull().sel(probe="open").values.tolist() == [False, True, True, True, True]
    assert not found.isnull().sel(probe="said").any()


class Regression(training.Samples):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.inputs[index, :3].sin()


def test_the_mean_squared_error_is_ours_up_to_a_factor(tmp_path: Path) -> None:
    callback = Trace("loss/mean", every=1, to=tmp_path)
    training.fit(callback, classifier(F.mse_loss), training.loader(Regression()))
    assert checked(tmp_path) == (
        "on the first batch, the network's own loss is 0.666667 times this, a mean over samples "
        "and the 3 terms of each without the half"
    )


@pytest.mark.parametrize("case", ["no loss", "no probe of it", "LBFGS"])
def test_where_there_is_no_comparing_the_trace_says_why(case: str, tmp_path: Path) -> None:
    class Manual(training.network()):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    class Nested(training.network()):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch["all"], index)

    class Curved(training.network()):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)

    model, data, says = {
        "no loss": (Manual(), None, "returned no loss"),
        "no probe of it": (
            Nested(),
            training.loader([{"all": sample} for sample in training.Samples()]),
            "TypeError",
        ),
        "LBFGS": (Curved(), None, "LBFGS"),
    }[case]
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    training.fit(Trace("loss/mean", every=1, probe=probe, to=tmp_path), model, data)
    assert checked(tmp_path).startswith("not checked: ")
    assert says in checked(tmp_path)


# Batches as language models take them -------------------------------------------------------------


@dataclass
class Output:
    """What a network of Hugging Face's returns, as far as it matters here."""

    logits: Tensor
    loss: Tensor | None = None


class Dicts(training.Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.inputs[index], "labels": self.targets[index]}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dict_batches_give_a_default_probe_and_their_own_loss(
    smoothing: float, tmp_path: Path
) -> None:
    class Pretrained(training.network()):
        def forward(self, features: Tensor, labels: Tensor | None = None) -> Output:
            logits = self.net(features)
            if labels is None:
                return Output(logits)
            return Output(logits, F.cross_entropy(logits, labels, label_smoothing=smoothing))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self(**batch).loss

    callback = Trace(["ntk/trace", "loss/mean"], every=2, to=tmp_path)
    if smoothing:
        with pytest.warns(nt.MissingMeasureWarning, match="on the probe its mean over samples"):
            training.fit(callback, Pretrained(), training.loader(Dicts()))
        assert nt.open(tmp_path).loss_mean.isnull().all()  # at the first step too
    else:
        training.fit(callback, Pretrained(), training.loader(Dicts()))
        assert checked(tmp_path) == "on the probe, the network's own loss is this"
    trace = nt.open(tmp_path)
    assert trace.ntk_trace.attrs["outputs"] == "logits"
    plain = training.network()()
    samples = training.Samples()
    (record, *_) = nt.Tracer(nt.Probe(samples.inputs, samples.targets), "ntk/trace")(plain, 0)
    assert trace.ntk_trace.values[0] == pytest.approx(float(record.value), rel=1e-6)
