"""Kernels and Fisher information of the training's own steps, with nothing to configure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nettrace as nt
from nettrace.callbacks import GradientStatistics, NTKTrace

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

SAMPLES, BATCH, STEPS = 12, 4, 2
MEASURES = ["ntk/gram", "ntk/trace", "ntk/entropy", "fisher/trace", "gradients/norms"]


class Data(Dataset[Any]):
    """Points with a class each, several labels, a real number, and texts."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parts = {
            "x": torch.randn(SAMPLES, 4, generator=generator),
            "class": torch.arange(SAMPLES) % 3,
            "labels": torch.rand(SAMPLES, 3, generator=generator).round(),
            "real": torch.randn(SAMPLES, generator=generator),
            "tokens": torch.randint(1, 9, (SAMPLES, 5), generator=generator),
        }
        self.parts["tokens"][::3, 3:] = 0  # padding

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {name: part[n] for name, part in self.parts.items()}


class Base(pl.LightningModule):
    """Remembers the weights, the batch and the random state of the first batch of each update."""

    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[dict[str, Tensor], Any, Tensor]] = {}
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, index: int) -> Any:
        if self.exact:
            batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        weights = {name: value.clone() for name, value in self.state_dict().items()}
        self.seen.setdefault(self.global_step, (weights, batch, torch.get_rng_state()))
        return self.loss(batch)

    def outputs(self, batch: Any) -> Tensor:
        return self.net(batch["x"])

    def information(self, z: Tensor) -> Tensor:
        p = z.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Classes(Base):
    def loss(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.outputs(batch), batch["class"], label_smoothing=0.1)
        return loss + 0.01 * sum(p.square().sum() for p in self.parameters())


class Labels(Base):
    def loss(self, batch: Any) -> dict[str, Tensor]:
        criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5]).double())
        return {"loss": criterion(self.outputs(batch), batch["labels"])}

    def information(self, z: Tensor) -> Tensor:
        return torch.diag_embed(z.sigmoid() * (-z).sigmoid())


class Real(Base):
    def outputs(self, batch: Any) -> Tensor:
        return self.net(batch["x"])[:, :1]

    def loss(self, batch: Any) -> Tensor:
        return ((self.outputs(batch).squeeze(1) - batch["real"]) ** 2).mean()

    def information(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)[..., None]


class Dropped(Classes):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))


class HuggingFace(Base):
    """A language model that computes its own loss, from a configuration, with padding."""

    exact = False

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        size = {"vocab_size": 9, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
        self.net = GPT2LMHeadModel(GPT2Config(**size, **dropout))

    def loss(self, batch: Any) -> Tensor:
        return self.net(input_ids=batch["tokens"], labels=self.labels(batch)).loss

    def labels(self, batch: Any) -> Tensor:
        return batch["tokens"].masked_fill(batch["tokens"] == 0, -100)

    def outputs(self, batch: Any) -> Tensor:
        z = self.net(input_ids=batch["tokens"]).logits
        counts = F.pad(self.labels(batch)[:, 1:] != -100, (0, 1))
        return z.masked_fill(~counts[..., None], 0)

    def information(self, z: Tensor) -> Tensor:
        blocks = super().information(z)
        return torch.stack([torch.block_diag(*m) for m in blocks])


class Bert(HuggingFace):
    """A classifier of sentences, in which dropout is drawn."""

    def __init__(self) -> None:
        Base.__init__(self)
        from transformers import BertConfig, BertForSequenceClassification

        size = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_labels": 3}
        config = BertConfig(**size, num_attention_heads=2, intermediate_size=8)
        config.problem_type = "single_label_classification"
        self.net = BertForSequenceClassification(config)

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch["tokens"], labels=batch["class"]).loss

    def outputs(self, batch: Any) -> Tensor:
        return self.net(batch["tokens"]).logits

    information = Base.information


STYLES: dict[str, type[Base]] = {
    "classes": Classes,
    "labels": Labels,
    "real": Real,
    "dropout": Dropped,
    "language model": HuggingFace,
    "sentences": Bert,
}


def fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    data = DataLoader(Data(), BATCH, shuffle=True)
    settings = {"max_steps": STEPS, "max_epochs": -1, **options}
    return training.fit(list(callbacks), module, data, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_values_are_those_of_outputs_one_sample_at_a_time(
    style: str, accumulate: int, tmp_path: Any
) -> None:
    if not STYLES[style].exact:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = STYLES[style]()
    module = module.double() if module.exact else module
    statistics = GradientStatistics(MEASURES, every=1, to=tmp_path, on_error="raise")
    fit(module, statistics, accumulate_grad_batches=accumulate)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == list(range(STEPS))
    assert trace.ntk_trace.attrs["mode"] == "training step"
    tolerance = 1e-9 if STYLES[style].exact else 1e-3
    draws = style in ("dropout", "sentences")
    for step, (weights, batch, random) in module.seen.items():
        if step == STEPS:
            continue
        module.load_state_dict(weights)
        torch.set_rng_state(random)
        if draws:  # alone, a sample would draw other masks
            outputs = list(module.outputs(batch).split(1))
        else:
            alone = [{k: v[n : n + 1] for k, v in batch.items()} for n in range(BATCH)]
            outputs = [module.outputs(one) for one in alone]
        j = torch.stack([rows(z, module) for z in outputs])
        m = torch.cat([module.information(z.detach()) for z in outputs]).double()
        gram = torch.einsum("ncp,mdp->ncmd", j, j)
        flat = gram.reshape(j.shape[0] * j.shape[1], -1)
        p = torch.linalg.eigvalsh(flat).clamp_min(0) / flat.trace()
        fisher = torch.einsum("ncp,ncd,ndp->", j, m, j) / BATCH
        now = trace.sel(step=step)
        scale = float(gram.abs().max())
        assert now.ntk_gram.values == pytest.approx(gram.numpy(), abs=tolerance * scale)
        assert float(now.ntk_trace) == pytest.approx(float(flat.trace()), rel=tolerance)
        entropy = -float(torch.xlogy(p, p).sum())
        assert float(now.ntk_entropy) == pytest.approx(entropy, rel=10 * tolerance)
        assert float(now.fisher_trace) == pytest.approx(float(fisher), rel=tolerance)


def rows(outputs: Tensor, module: nn.Module) -> Tensor:
    found = []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(
            output,
            list(module.parameters()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found.append(torch.cat([g.flatten() for g in gradients]).double())
    return torch.stack(found)


class Delicate(Classes):
    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3))
        )


HARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bfloat16": {"precision": "bf16-mixed"},
    "half": {"precision": "16-true"},
}


@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
@pytest.mark.parametrize("how", HARD)
def test_the_training_is_bitwise_the_same(how: str, tmp_path: Any) -> None:
    found = []
    statistics = GradientStatistics(
        ["ntk", "fisher", "fisher/diagonal", "collective"], every=1, to=tmp_path
    )
    for callbacks in ([], [statistics]):
        torch.manual_seed(0)
        module = Delicate()
        trainer = fit(module, *callbacks, **HARD[how])
        found.append({**training.result(trainer, module), "seen": module.seen})
    assert training.differences(*found) == []
    trace = nt.open(tmp_path)
    steps = slice(1) if how == "half" else slice(None)  # in which AdamW fails by itself
    assert np.isfinite(trace.ntk_trace.values[steps]).all()
    assert np.isfinite(trace.fisher_trace.values[steps]).all()
    assert "constant" in str(trace.ntk_trace.attrs["batch_statistics"])


def test_the_scale_of_half_precision_makes_no_difference() -> None:
    from nettrace.statistics import StepStatistics

    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3
    plain = StepStatistics(F.cross_entropy(model(x), y), model, 6, 0)
    scaled = StepStatistics(F.cross_entropy(model(x), y) * 2**16 / 4, model, 6, 0, scale=2**14)
    for name in ("gram", "fisher_sqnorms", "scores", "outputs"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-5, abs=1e-6)


class Focal(Base):
    exact = False

    def loss(self, batch: Any) -> Tensor:
        each = F.cross_entropy(self.outputs(batch), batch["class"], reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


class Heads(Base):
    exact = False

    def loss(self, batch: Any) -> Tensor:
        h = self.net[:2](batch["x"])
        prediction = F.cross_entropy(self.net[2](h), batch["class"])
        return prediction + F.mse_loss(h[:, 0], batch["real"])


NONE: dict[str, tuple[type[Base], str]] = {
    "focal": (Focal, "no outputs are found behind the loss.*MulBackward0.*NTKTrace"),
    "two heads": (Heads, "2 standard losses with different outputs.*NTKTrace"),
}


@pytest.mark.parametrize("kind", NONE)
def test_other_losses_are_missing_with_what_was_found(kind: str, tmp_path: Any) -> None:
    module, words = NONE[kind]
    statistics = GradientStatistics(["ntk/trace", "fisher/trace", "gradients"], to=tmp_path)
    with pytest.warns(nt.MissingMeasureWarning, match=words):
        fit(module(), statistics)
    trace = nt.open(tmp_path)
    for name in ("ntk_trace", "fisher_trace"):
        assert "NoLikelihoodError" in str(trace[name].attrs["missing"])
    assert np.isfinite(trace.gradients_norms.values).all()


def test_a_group_stands_for_what_a_step_has() -> None:
    names = {m.name for m in GradientStatistics(["gradients", "ntk", "fisher"]).measures}
    assert {"ntk/trace", "ntk/entropy", "fisher/trace_mc", "gradients/noise"} <= names
    assert not {"ntk/distance_first", "ntk/cross", "ntk/velocity"} & names
    asked = NTKTrace().measures
    assert len(names & {m.name for m in asked}) > len(asked) / 2


@pytest.mark.parametrize("name", ["ntk/distance_first", "weights", "hessian/trace", "loss/mean"])
def test_what_a_step_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}.* is not measured in training steps"):
        GradientStatistics(["gradients", name])
