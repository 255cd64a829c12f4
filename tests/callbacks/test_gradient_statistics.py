"""Statistics of the training's own steps, with nothing to configure, on modules of many styles."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import nettrace as nt
from nettrace.callbacks import GradientStatistics, NTKTrace, Trace
from nettrace.callbacks.session import Session

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

SAMPLES, BATCH, STEPS = 12, 4, 3


class Data(Dataset[Any]):
    """Samples of some shape: a function from x (4,), a class and a text of tokens."""

    def __init__(self, make: Callable[[Tensor, int, Tensor], Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 4, generator=generator)
        self.tokens = torch.randint(0, 9, (SAMPLES, 5), generator=generator)
        self.make = make

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, n: int) -> Any:
        return self.make(self.x[n], n % 3, self.tokens[n])


class Base(pl.LightningModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Plain(Base):
    """As tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class OwnArithmetic(Base):
    """A loss written out, with a penalty, returned in a dictionary; the weights are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 7) / 2)
        self.w2 = nn.Parameter(torch.randn(7, 3) / 2)

    def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        logits = (batch["x"] @ self.w1).sin() @ self.w2
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        hits = p[torch.arange(len(p)), batch["label"]]
        penalty = sum(w.abs().sum() for w in (self.w1, self.w2))
        return {"loss": -torch.log(hits).sum() / len(hits) + 0.01 * penalty}


class SeveralTerms(Base):
    """Reconstruction, prediction and a penalty on the code, with weights that change."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6))
        self.decoder, self.classifier = nn.Linear(6, 4), nn.Linear(6, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        (x, _), y = batch["input"], batch["target"]
        code = self.encoder(x)
        terms = {
            "reconstruction": F.mse_loss(self.decoder(code), x),
            "prediction": F.cross_entropy(self.classifier(code), y, label_smoothing=0.1),
            "sparsity": code.abs().mean(),
        }
        return sum(0.5**i * term for i, term in enumerate(terms.values()))


class Texts(Base):
    """The next token, over all tokens of all texts, by a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.memory = nn.GRU(6, 6, batch_first=True)

    def training_step(self, batch: Any, index: int) -> Tensor:
        features, _ = self.memory(self.embedding(batch))
        logits = features @ self.embedding.weight.T
        return F.cross_entropy(logits[:, :-1].reshape(-1, 9), batch[:, 1:].reshape(-1))


class Adversaries(Base):
    """Two networks with an optimizer each, manually."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, 4)
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def losses(self, x: Tensor) -> list[Callable[[], Tensor]]:
        def of_critic() -> Tensor:
            real, made = self.critic(x), self.critic(self.generator(x).detach())
            return F.softplus(made).mean() + F.softplus(-real).mean()

        return [of_critic, lambda: F.softplus(-self.critic(self.generator(x))).mean()]

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.losses(batch[0]), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.critic, self.generator)
        return [torch.optim.SGD(part.parameters(), 0.1) for part in parts]


class HuggingFace(Base):
    """A transformer that computes its own loss, from a configuration."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        size = {"vocab_size": 9, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
        self.model = GPT2LMHeadModel(GPT2Config(**size, **dropout))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss


STYLES: dict[str, tuple[type[Base], Callable[..., Any], Callable[[Any, int], Any]]] = {
    "plain": (Plain, lambda x, y, t: (x, y), lambda b, n: [part[n : n + 1] for part in b]),
    "own arithmetic": (
        OwnArithmetic,
        lambda x, y, t: {"x": x, "label": y},
        lambda b, n: {k: v[n : n + 1] for k, v in b.items()},
    ),
    "several terms": (
        SeveralTerms,
        lambda x, y, t: {"input": (x, t), "target": y},
        lambda b, n: {
            "input": [part[n : n + 1] for part in b["input"]],
            "target": b["target"][n : n + 1],
        },
    ),
    "texts": (Texts, lambda x, y, t: t, lambda b, n: b[n : n + 1]),
    "Hugging Face": (HuggingFace, lambda x, y, t: t, lambda b, n: b[n : n + 1]),
}


@dataclass
class Seen:
    """The weights and the batch of a step."""

    step: int
    state: dict[str, Tensor]
    batch: Any


class Witness(pl.Callback):
    """Remembers with which weights each batch is seen."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.seen.append(Seen(trainer.global_step, state, batch))


def fit(
    module: Any, make: Any, to: Any, *callbacks: Any, every: Any = 1, **options: Any
) -> list[Seen]:
    witness = Witness()
    statistics = GradientStatistics(["gradients", "gradients/gram"], every=every, to=to)
    settings = {"max_steps": STEPS, **options}
    training.fit(
        [witness, statistics, *callbacks], module, DataLoader(Data(make), BATCH), **settings
    )
    return witness.seen


def rows_of(losses: list[Callable[[], Tensor]], module: nn.Module) -> np.ndarray:
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss(), list(module.parameters()), allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([g.flatten() for g in gradients]).double().numpy())
    return np.stack(found)


def returned(found: Any) -> Tensor:
    return found["loss"] if isinstance(found, dict) else found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_any_module_is_measured_without_configuration(
    style: str, accumulate: int, tmp_path: Any
) -> None:
    if style == "Hugging Face":
        pytest.importorskip("transformers")
    kind, make, take = STYLES[style]
    torch.manual_seed(0)
    module = kind().double() if style != "Hugging Face" else kind()
    seen = fit(
        module,
        (lambda x, y, t: make(x.double(), y, t)) if style != "Hugging Face" else make,
        tmp_path,
        accumulate_grad_batches=accumulate,
        max_epochs=-1,
    )
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == list(range(STEPS))
    assert not any("missing" in variable.attrs for variable in trace.values())
    assert float(trace.nettrace_step_spot_check.max()) < 1e-4
    assert trace.gradients_norms.attrs["mode"] == "training step"
    tolerance = 1e-9 if style != "Hugging Face" else 1e-4
    for step in range(STEPS):
        first = next(one for one in seen if one.step == step)
        module.load_state_dict(first.state)
        alone = [take(first.batch, n) for n in range(BATCH)]
        rows = rows_of(
            [lambda one=one: returned(module.training_step(one, 0)) for one in alone], module
        )
        now = trace.sel(step=step)
        gram = rows @ rows.T
        scale = tolerance * abs(gram).max()
        assert now.gradients_gram.values == pytest.approx(gram, abs=scale)
        assert now.gradients_norms.values == pytest.approx(
            np.linalg.norm(rows, axis=1), rel=tolerance
        )
        noise = np.trace(np.cov(rows.T))
        assert float(now.gradients_noise) == pytest.approx(noise, rel=tolerance)


def test_each_backward_pass_of_manual_optimisation_has_its_own_values(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = Adversaries().double()
    seen = fit(module, lambda x, y, t: (x.double(), y), tmp_path, every=[0])
    trace = nt.open(tmp_path)
    module.load_state_dict(seen[0].state)
    x = seen[0].batch[0]
    alone = [module.losses(x[n : n + 1]) for n in range(BATCH)]
    rows = rows_of([critic for critic, _ in alone], module)
    assert trace.gradients_norms.values[0] == pytest.approx(np.linalg.norm(rows, axis=1))
    optimizer = torch.optim.SGD(module.critic.parameters(), 0.1)
    optimizer.zero_grad()
    module.losses(x)[0]().backward()
    optimizer.step()  # the second is measured after the first's update
    alone = [module.losses(x[n : n + 1]) for n in range(BATCH)]
    rows = rows_of([generator for _, generator in alone], module)
    second = trace["gradients_norms_backward_2"]
    assert second.attrs["name"] == "gradients/norms_backward_2"
    assert second.values[0] == pytest.approx(np.linalg.norm(rows, axis=1))


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_statistics_held_constant_are_noted(tmp_path: Any) -> None:
    fit(Normalised(), lambda x, y, t: (x, y), tmp_path)
    noise = nt.open(tmp_path).gradients_noise
    assert noise.attrs["batch_statistics"] == "held constant at those of this batch"
    assert np.isfinite(noise.values).all()


class Hidden(Plain):
    """A part of the network leaves no tape."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head, self.hides = nn.Linear(8, 3), hides
        self.dropout = nn.Dropout(0.3)
        self.part = (
            torch.compile(self.net[2:], backend="aot_eager") if hides == "compiled" else None
        )

    def training_step(self, batch: Any) -> Tensor:  # which takes no index
        h = self.dropout(self.net[:2](batch[0]))
        if self.hides == "plain":
            h = self.net[2:](h)
        elif self.part is not None:
            h = self.part(h)
        else:
            h = checkpoint(self.net[2:], h, use_reentrant=self.hides == "reentrant")
        loss = F.cross_entropy(self.head(h), batch[1])
        self.log("loss", loss)
        return loss


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.parametrize("hides", ["compiled", "reentrant", "not reentrant"])
def test_what_is_hidden_is_evaluated_again_and_noted(hides: str, tmp_path: Any) -> None:
    found = {}
    for kind in ("plain", hides):
        torch.manual_seed(0)
        module = Hidden(kind)
        torch.manual_seed(1)
        fit(module, lambda x, y, t: (x, y), tmp_path / kind)
        found[kind] = nt.open(tmp_path / kind).gradients_gram
        weights = [p.detach().clone() for p in module.parameters()]
        torch.manual_seed(0)
        alone = Hidden(kind)
        torch.manual_seed(1)
        training.fit([], alone, DataLoader(Data(lambda x, y, t: (x, y)), BATCH), max_steps=STEPS)
        assert all(map(torch.equal, weights, (p.detach() for p in alone.parameters())))
    plain, hidden = found["plain"], found[hides]
    assert hidden.values == pytest.approx(plain.values, rel=1e-4)
    assert "evaluated" not in plain.attrs
    text = str(hidden.attrs["evaluated"])
    ((one, other),) = set(re.findall(r"its loss is (\S+), that of the training (\S+)", text))
    assert float(one) == pytest.approx(float(other.strip("'},")), rel=1e-5)


class Contrastive(Plain):
    def training_step(self, batch: Any, index: int) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class Opaque(torch.autograd.Function):
    """Cross-entropy, as fused kernels compute it: only the sum is on the tape."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(1) - F.one_hot(y, 3))
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0] / len(ctx.saved_tensors[0]), None


class Fused(Plain):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return Opaque.apply(self.net(batch[0]), batch[1])


UNSEEN = {"contrasts": (Contrastive, "samples are coupled"), "fused": (Fused, "OpaqueBackward")}


@pytest.mark.parametrize("why", UNSEEN)
def test_what_cannot_be_told_apart_is_missing_with_the_reason(why: str, tmp_path: Any) -> None:
    kind, words = UNSEEN[why]
    with pytest.warns(nt.MissingMeasureWarning, match=words) as warned:
        fit(kind(), lambda x, y, t: (x, y), tmp_path)
    ours = [w for w in warned if w.category is nt.MissingMeasureWarning]
    assert len(ours) == 1
    trace = nt.open(tmp_path)
    assert words in trace.gradients_noise.attrs["missing"]
    assert trace.step.values.tolist() == list(range(STEPS))
    statistics = GradientStatistics(on_error="raise")
    with pytest.raises(nt.CoupledSamplesError, match=words):
        training.fit([statistics], kind(), DataLoader(Data(lambda x, y, t: (x, y)), BATCH))


def watch_output(module: Plain, seen: list[Any]) -> None:
    def watch(_: Any, __: Any, outputs: Tensor) -> None:
        outputs.register_hook(lambda g: seen.append(float(g.norm())))

    module.net.register_forward_hook(watch)


def retain_output(module: Plain, seen: list[Any]) -> None:
    module.net.register_forward_hook(lambda _, __, outputs: outputs.retain_grad())


def watch_module(module: Plain, seen: list[Any]) -> None:
    module.net.register_full_backward_hook(lambda *_: seen.append(1))


HOOKS = {
    "Tensor.register_hook": watch_output,
    "Tensor.retain_grad": retain_output,
    "register_full_backward_hook": watch_module,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_are_not_called_by_measuring(kind: str, tmp_path: Any) -> None:
    found = []
    for measuring in (False, True):
        torch.manual_seed(0)
        module, seen = Plain(), []
        HOOKS[kind](module, seen)
        if measuring:
            with pytest.warns(nt.MissingMeasureWarning, match=kind):
                fit(module, lambda x, y, t: (x, y), tmp_path)
        else:
            data = DataLoader(Data(lambda x, y, t: (x, y)), BATCH)
            training.fit([], module, data, max_steps=STEPS)
        found.append([seen, [p.detach().clone() for p in module.parameters()]])
    assert training.differences(*found) == []
    assert kind in nt.open(tmp_path).gradients_noise.attrs["missing"]
    assert type(Tensor.register_hook).__name__ == "function"
    assert "retain_grad" not in vars(Tensor)


def test_hooks_of_parameters_are_set_aside(tmp_path: Any) -> None:
    torch.manual_seed(0)
    module, seen = Plain(), []
    module.net[0].weight.register_hook(lambda g: seen.append(float(g.norm())))
    fit(module, lambda x, y, t: (x, y), tmp_path)
    assert len(seen) == STEPS
    assert np.isfinite(nt.open(tmp_path).gradients_noise.values).all()


class Counting(torch.autograd.Function):
    """The identity, whose backward pass keeps a running maximum in a buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor) -> Tensor:
        ctx.largest = largest
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.largest.mul_(0.9).add_(g.abs().max())
        return g / (1 + ctx.largest), None


class Quantised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(Counting.apply(self.net(batch[0]), self.largest), batch[1])


@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
def test_buffers_that_backward_passes_write_to_are_left_alone(tmp_path: Any) -> None:
    found = []
    for callbacks in ([], [GradientStatistics(every=1)]):
        torch.manual_seed(0)
        module = Quantised()
        data = DataLoader(Data(lambda x, y, t: (x, y)), BATCH)
        training.fit(callbacks, module, data, max_steps=STEPS)
        found.append(training.state(module))
    assert training.differences(*found) == []


def test_samples_are_what_most_tensors_count(tmp_path: Any) -> None:
    class Weighted(Plain):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]), batch["y"], weight=batch["weights"])

    def joined(samples: list[Any]) -> Any:
        x, y = zip(*samples, strict=True)
        return {"weights": torch.ones(3), "x": torch.stack(x), "y": torch.tensor(y)}

    statistics = GradientStatistics(every=1, to=tmp_path)
    data = DataLoader(Data(lambda x, y, t: (x, y)), 6, collate_fn=joined)
    training.fit([statistics], Weighted(), data, max_steps=1)
    assert nt.open(tmp_path).gradients_norms.shape == (1, 6)


def test_it_shares_a_folder_and_the_loggers_with_measures_of_a_probe(tmp_path: Any) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets, forward=lambda model, x: model.net(x))
    kernel = NTKTrace("ntk/trace", every=2, probe=probe, to=tmp_path)
    fit(Plain(), lambda x, y, t: (x, y), tmp_path, kernel)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 1, 2]
    assert np.isfinite(trace.ntk_trace.values).tolist() == [True, False, True]
    assert np.isfinite(trace.gradients_noise.values).all()


def test_a_probes_gradients_have_the_same_names(tmp_path: Any) -> None:
    samples = training.Samples()
    probe = nt.Probe(samples.inputs, samples.targets)
    trace = Trace("gradients", every=1, probe=probe, to=tmp_path)
    training.fit([trace], max_steps=2)
    found = nt.open(tmp_path)
    assert np.isfinite(found.gradients_noise_scale.values).all()
    assert "gradients_conflict" not in found


def test_what_it_says_of_itself(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"depends on its batch.*budget="):
        GradientStatistics().explain(Plain())
    fit(Plain(), lambda x, y, t: (x, y), tmp_path)
    (callback,) = json.loads(nt.open(tmp_path).attrs["configuration"])["callbacks"]
    assert callback["probe"] == "the training's own batches"


def test_nothing_is_watched_after_a_hook_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, loss: Tensor) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Session, "before_backward", fail)
    before = Tensor.register_hook, "retain_grad" in vars(Tensor)
    data = DataLoader(Data(lambda x, y, t: (x, y)), BATCH)
    with pytest.warns(nt.MissingMeasureWarning, match="measures no more in this training"):
        training.fit([GradientStatistics(every=1)], Plain(), data, max_steps=1)
    assert (Tensor.register_hook, "retain_grad" in vars(Tensor)) == before


def test_the_critical_batch_size_and_the_groups_of_a_training(tmp_path: Any) -> None:
    class Grouped(SeveralTerms):
        def configure_optimizers(self) -> Any:
            named = {"params": self.encoder.parameters(), "name": "encoder"}
            rest = [*self.decoder.parameters(), *self.classifier.parameters()]
            return torch.optim.AdamW([named, {"params": rest}], 0.01)

    found = []
    names = ["gradients", "gradients/critical_batch_size"]
    for callbacks in ([], [GradientStatistics(names, every=1, to=tmp_path)]):
        torch.manual_seed(0)
        module = Grouped()
        make = STYLES["several terms"][1]
        its = training.fit(callbacks, module, DataLoader(Data(make), BATCH), max_steps=STEPS)
        found.append({**training.result(its, module), "course": []})
    assert training.differences(*found) == []
    trace = nt.open(tmp_path)
    assert np.isfinite(trace.gradients_critical_batch_size.values).all()
    assert trace.term.values.tolist() == ["MseLoss", "NllLoss", "Sum", "Mean"]
    assert trace.gradients_conflict_per_group.shape == (STEPS, 2, 4, 4)
    assert trace.group.values.tolist() == ["encoder", "group1"]


class Fuses(Plain):
    """Attention whose backward pass cannot be differentiated, unless `apart`."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.net, self.dropout = nn.Linear(1, 12), nn.Dropout(0.2)
        self.head, self.apart = nn.Linear(4, 3), apart

    def training_step(self, batch: Any, index: int) -> Tensor:
        q, k, v = self.dropout(self.net(batch[0][:, None, :, None])).chunk(3, -1)
        with sdpa_kernel(SDPBackend.MATH) if self.apart else nullcontext():
            found = F.scaled_dot_product_attention(q, k, v)
        return F.cross_entropy(self.head(found.mean((1, 2))), batch[1])


def test_fused_attention_is_evaluated_again_to_be_differentiated_twice(tmp_path: Any) -> None:
    found, weights = {}, []
    names = ["gradients/critical_batch_size", "gradients/noise"]
    for kind in ("none", "fused", "apart"):
        torch.manual_seed(0)
        module = Fuses(kind == "apart").double()
        statistics = GradientStatistics(names, every=1, to=tmp_path / kind)
        data = DataLoader(Data(lambda x, y, t: (x.double(), y)), BATCH)
        its = training.fit([statistics] * (kind != "none"), module, data, max_steps=STEPS)
        weights.append({**training.result(its, module), "course": []})
        found[kind] = None if kind == "none" else nt.open(tmp_path / kind)
    assert training.differences(weights[0], weights[1]) == []
    fused, apart = found["fused"], found["apart"]
    for name in ("gradients_critical_batch_size", "gradients_noise"):
        assert fused[name].values == pytest.approx(apart[name].values, rel=1e-6)
        assert "cannot be differentiated twice" in str(fused[name].attrs["evaluated"])
        assert "evaluated" not in apart[name].attrs
