"""The outputs behind the loss of a training step, against one backward pass an output.

Each case gives the loss as somebody writes it, and by itself the outputs which are meant, how many
weigh nothing, and the information about them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import jacobian
from torch import Tensor, nn

import nettrace as nt
from nettrace import Probe, Tracer
from nettrace.measures import resolve
from nettrace.statistics import StepStatistics
from nettrace.training_step import StepTracer

N, C, T, V = 5, 3, 4, 6
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(N, 4, generator=GENERATOR).double()
Y = torch.tensor([0, 2, 1, 1, 0])
REAL = torch.randn(N, C, generator=GENERATOR).double()
SHARES = torch.rand(N, C, generator=GENERATOR).double().softmax(1)
YES = (REAL > 0).double()
COUNTS = torch.poisson(torch.full((N, C), 2.0)).double()
WEIGHTS = torch.tensor([0.5, 1.0, 3.0]).double()
TEXTS = torch.randint(0, V, (N, T + 1), generator=GENERATOR)
PADDED = TEXTS.clone()
PADDED[1, 3:], PADDED[2, 1:] = -100, -100


class Mixed(nn.Module):
    """Tokens see those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, 5)
        self.memory = nn.GRU(5, 5, batch_first=True)
        self.head = nn.Linear(5, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.memory(self.embedding(tokens))[0])


def network(kind: str = "classes") -> nn.Module:
    torch.manual_seed(1)
    made = (
        Mixed() if kind == "texts" else nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))
    )
    return made.double()


def of_classes(z: Tensor) -> Tensor:
    """diag(p) - p p^T over the last axis."""
    p = z.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def of_texts(z: Tensor) -> Tensor:
    """That of each token, along the diagonal of all of a text's."""
    return torch.stack([torch.block_diag(*tokens) for tokens in of_classes(z)])


def of_transposed_texts(z: Tensor) -> Tensor:
    """That, of outputs (N, V, T)."""
    order = torch.arange(T * V).view(T, V).T.flatten()
    return of_texts(z.transpose(1, 2))[:, order][:, :, order]


def of_yes(z: Tensor) -> Tensor:
    return torch.diag_embed(z.sigmoid() * (1 - z.sigmoid()))


def of_real(z: Tensor) -> Tensor:
    return torch.eye(z[0].numel()).double().expand(len(z), -1, -1)


def of_counts(z: Tensor) -> Tensor:
    return torch.diag_embed(z.exp())


def mixup(z: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(z, Y) + 0.7 * F.cross_entropy(z, Y.flip(0))


def with_entropy(z: Tensor) -> Tensor:
    logs = z.log_softmax(1)
    return F.nll_loss(logs, Y) - 3 * (logs.exp() * logs).sum(1).mean()


def distribution(z: Tensor) -> Tensor:
    return -torch.distributions.Categorical(logits=z).log_prob(Y).mean()


@dataclass
class Case:
    """A loss of a network's outputs, and what is meant."""

    loss: Callable[[Tensor], Tensor]
    name: str
    information: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor] = lambda z: z
    kind: str = "classes"
    counted: Tensor | None = None
    weighted: bool = False


def classes(loss: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(loss, "categorical", of_classes, **options)


def yes(loss: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(loss, "bernoulli", of_yes, **options)


def real(loss: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(loss, "gaussian", of_real, **options)


def counts(loss: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(loss, "poisson", of_counts, **options)


def texts(loss: Callable[[Tensor], Tensor], **options: Any) -> Case:
    return Case(loss, "categorical", of_texts, kind="texts", **options)


def next_tokens(z: Tensor, targets: Tensor = TEXTS, **options: Any) -> Tensor:
    return F.cross_entropy(z.reshape(-1, V), targets[:, 1:].reshape(-1), **options)


KEPT = (PADDED[:, 1:] != -100)[..., None]
CASES = {
    "cross_entropy": classes(lambda z: F.cross_entropy(z, Y)),
    "summed": classes(lambda z: F.cross_entropy(z, Y, reduction="sum")),
    "accumulated and scaled": classes(lambda z: F.cross_entropy(z, Y) / 4 * 1024),
    "not reduced": classes(lambda z: F.cross_entropy(z, Y, reduction="none").mean()),
    "class weights": classes(lambda z: F.cross_entropy(z, Y, weight=WEIGHTS), weighted=True),
    "sample weights": classes(
        lambda z: (F.cross_entropy(z, Y, reduction="none") * X[:, 0].abs()).mean(), weighted=True
    ),
    "ignore_index": classes(
        lambda z: nn.CrossEntropyLoss(ignore_index=1)(z, Y), counted=(Y != 1)[:, None]
    ),
    "label_smoothing": classes(lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(z, Y)),
    "smoothed and weighted": classes(
        lambda z: F.cross_entropy(z, Y, weight=WEIGHTS, label_smoothing=0.2), weighted=True
    ),
    "probabilities": classes(lambda z: F.cross_entropy(z, SHARES)),
    "divergence": classes(lambda z: F.kl_div(z.log_softmax(1), SHARES, reduction="batchmean")),
    "nll_loss": classes(lambda z: F.nll_loss(torch.log_softmax(z, -1), Y)),
    "gathered": classes(lambda z: -z.log_softmax(1).gather(1, Y[:, None]).mean()),
    "picked": classes(lambda z: -z.log_softmax(1)[torch.arange(N), Y].sum() / N),
    "logarithm of softmax": classes(lambda z: -(z.softmax(1).log() * SHARES).sum(1).mean()),
    "less logsumexp": classes(lambda z: -(z - z.logsumexp(1, True))[range(N), Y].mean()),
    "distribution": classes(distribution),
    "mixup": classes(mixup),
    "temperature": classes(lambda z: F.cross_entropy(z / 0.3, Y), outputs=lambda z: z / 0.3),
    "penalised": classes(lambda z: F.cross_entropy(z, Y) + z.abs().mean()),
    "penalised by entropy": classes(with_entropy),
    "in single precision": classes(lambda z: F.cross_entropy(z.float(), Y)),
    "with logits": yes(lambda z: F.binary_cross_entropy_with_logits(z, YES)),
    "with logits, summed": yes(lambda z: nn.BCEWithLogitsLoss(reduction="sum")(z, SHARES)),
    "pos_weight": yes(
        lambda z: F.binary_cross_entropy_with_logits(z, YES, pos_weight=WEIGHTS), weighted=True
    ),
    "masked": yes(
        lambda z: (
            (F.binary_cross_entropy_with_logits(z, YES, reduction="none") * (REAL > 0.3)).sum()
            / (REAL > 0.3).sum()
        ),
        counted=REAL > 0.3,
    ),
    "of a sigmoid": yes(lambda z: F.binary_cross_entropy(z.sigmoid(), YES)),
    "distribution of yes": yes(
        lambda z: -torch.distributions.Bernoulli(logits=z).log_prob(YES).mean()
    ),
    "mse_loss": real(lambda z: F.mse_loss(z, REAL)),
    "targets first": real(lambda z: F.mse_loss(REAL, z, reduction="sum")),
    "one output": real(
        lambda z: F.mse_loss(z[:, 0], REAL[:, 0]), outputs=lambda z: z[:, 0].unsqueeze(1)
    ),
    "pow": real(lambda z: (z - REAL).pow(2).mean()),
    "half squared": real(lambda z: 0.5 * ((REAL - z) ** 2).sum(1).mean()),
    "times itself": real(lambda z: (lambda d: (d * d).mean())(z - REAL)),
    "from one": real(lambda z: (1 - z).square().mean()),
    "variance given": real(
        lambda z: F.gaussian_nll_loss(z, REAL, torch.full((N, C), 0.5).double())
    ),
    "normal": real(lambda z: -torch.distributions.Normal(z, 0.3).log_prob(REAL).mean()),
    "poisson_nll_loss": counts(lambda z: F.poisson_nll_loss(z, COUNTS, full=True)),
    "rates": counts(lambda z: (z.exp() - z * COUNTS).sum(1).mean()),
    "tokens": texts(next_tokens),
    "tokens, classes second": Case(
        lambda z: F.cross_entropy(z.transpose(1, 2), TEXTS[:, 1:]),
        "categorical",
        of_transposed_texts,
        lambda z: z.transpose(1, 2),
        "texts",
    ),
    "tokens, padded": texts(lambda z: next_tokens(z, PADDED), counted=KEPT),
    "tokens but the last": Case(
        lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), TEXTS[:, 1:T].reshape(-1)),
        "categorical",
        of_texts,
        lambda z: z[:, :-1],
        "texts",
    ),
    "the last token": Case(
        lambda z: F.cross_entropy(z[torch.arange(N), T - 1 - Y], Y),
        "categorical",
        of_classes,
        lambda z: z[torch.arange(N), T - 1 - Y],
        "texts",
    ),
}
NAMES = ["ntk", "fisher", "fisher/diagonal", "fisher/spectrum", "gradients/norms"]


def known(names: list[str]) -> list[str]:
    return [m.name for m in resolve(names) if StepStatistics.known().issuperset(m.needs)]


def of_step(model: nn.Module, loss: Tensor, names: list[str], **options: Any) -> dict[str, Any]:
    options = {"scale": 1.0, **options}
    records = StepTracer("record").measure(
        lambda memory, ranks: StepStatistics(loss, model, N, 0, ranks=ranks, **options),
        model,
        0,
        resolve(known(names)),
    )
    return {record.name: record for record in records}


def forward(case: Case, model: nn.Module) -> Tensor:
    return model(TEXTS[:, :-1]) if case.kind == "texts" else model(X)


@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
@pytest.mark.parametrize("name", CASES)
def test_kernel_and_information_are_those_of_outputs_one_by_one(name: str) -> None:
    case = CASES[name]
    model = network(case.kind)
    tolerance = 1e-5 if "single" in name else 1e-10
    found = of_step(model, case.loss(forward(case, model)), NAMES)
    outputs = case.outputs(forward(case, model))
    counted = torch.ones_like(outputs) if case.counted is None else case.counted.expand_as(outputs)
    j = torch.cat(list(jacobian(outputs, dict(model.named_parameters())).values()), 2)
    j = (j * counted.reshape(N, -1, 1)).detach()
    gram = torch.einsum("ncp,mdp->ncmd", j, j)
    m = case.information(outputs).detach()
    fisher = torch.einsum("ncp,ncd,ndq->pq", j, m, j) / N

    def near(measure: str, true: Any, relative: float = tolerance) -> None:
        record = found[measure]
        assert not record.missing, record.missing
        true = np.asarray(true)
        assert np.abs(record.value - true).max() <= relative * np.abs(true).max()

    flat = gram.reshape(j.shape[0] * j.shape[1], -1)
    spectrum = torch.linalg.eigvalsh(flat).flip(0).clamp_min(0)
    p = spectrum / spectrum.sum()
    near("ntk/gram", gram.numpy())
    near("ntk/trace", flat.trace())
    near("ntk/trace_per_output", flat.trace() / len(flat))
    near("ntk/spectrum", spectrum, 10 * tolerance)
    near("ntk/entropy", -torch.xlogy(p, p).sum(), 10 * tolerance)
    near("fisher/trace", fisher.trace())
    near("fisher/trace_ntk", fisher.trace())
    near("fisher/diagonal", fisher.diagonal())
    top = torch.linalg.eigvalsh(fisher).flip(0)[:3]
    assert found["fisher/spectrum"].value[:3] == pytest.approx(top.numpy(), rel=1e4 * tolerance)
    drawn = found["fisher/trace_mc"]
    trace = float(fisher.trace())
    assert abs(drawn.value - trace) < 6 * drawn.standard_error + 1e-3 * trace
    about = found["ntk/trace"].attributes
    assert about["likelihood"] == found["fisher/trace"].attributes["likelihood"] == case.name
    assert about["mode"] == "training step"
    assert "on the tape" in about["recognised"]
    assert ("weights" in about) == case.weighted
    assert ("left_out" in about) == (case.counted is not None)
    assert ("beside" in about) == ("penalised" in name)
    assert found["nettrace/step_outputs_spot_check"].value < 1e-4
    if case.name == "categorical":
        axis = 1 if "second" in name else outputs.dim() - 1
        centred = outputs - outputs.mean(axis, keepdim=True)
        i = torch.cat(list(jacobian(centred, dict(model.named_parameters())).values()), 2)
        i = i * counted.reshape(N, -1, 1)
        near("ntk/trace_centred", i.detach().square().sum())
    else:
        assert "ntk/trace_centred" not in found


def focal(z: Tensor) -> Tensor:
    each = F.cross_entropy(z, Y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def contrastive(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(N).flip(0))


def divided(z: Tensor) -> Tensor:
    return -(z.exp() / z.exp().sum(1, keepdim=True))[torch.arange(N), Y].log().mean()


ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, 0.1, -1.0]).double()
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "root of the mean square": (lambda z: F.mse_loss(z, REAL).sqrt(), "SqrtBackward0"),
    "focal": (focal, "MulBackward0"),
    "Huber": (lambda z: F.huber_loss(z, REAL), "HuberLossBackward0"),
    "absolute": (lambda z: F.l1_loss(z, REAL), "AbsBackward0"),
    "divided by hand": (divided, "LogBackward0"),
    "clamped": (
        lambda z: F.cross_entropy(z, Y, reduction="none").clamp(max=2).mean(),
        "ClampBackward1|ClampMaxBackward0",
    ),
    "the other divergence": (
        lambda z: (z.softmax(1) * (z.log_softmax(1) - SHARES.log())).sum(1).mean(),
        "MulBackward0",
    ),
    "advantages of both signs": (
        lambda z: (F.cross_entropy(z, Y, reduction="none") * ADVANTAGES).mean(),
        r"weights from -0.2 to 0.4",
    ),
    "unlikelihood": (lambda z: z.log_softmax(1).gather(1, Y[:, None]).mean(), "weights from -0.2"),
    "chances below zero": (
        lambda z: F.cross_entropy(z, SHARES - 0.3),
        "not negative",
    ),
    "margins": (lambda z: F.multi_margin_loss(z, Y), "MultiMarginLossBackward0"),
    "targets above one": (
        lambda z: F.binary_cross_entropy_with_logits(z, 2 * YES),
        "BinaryCrossEntropyWithLogitsBackward0",
    ),
    "both sides learnt": (lambda z: F.mse_loss(z, z.flip(1).exp()), "MseLossBackward0"),
    "two heads": (
        lambda z: F.cross_entropy(z, Y) + F.mse_loss(z.exp(), REAL),
        r"2 standard losses with different outputs: (gaussian|categorical) by",
    ),
    "two temperatures": (
        lambda z: F.cross_entropy(z, Y) + F.kl_div((z / 2).log_softmax(1), SHARES),
        "2 standard losses",
    ),
    "targets broadcast": (
        lambda z: ((z[:, :1] - REAL[:, 0]) ** 2).mean(),
        "PowBackward0",
    ),
    "targets broadcast by the loss": (
        lambda z: F.mse_loss(z[:, :1], REAL[:, 0]),
        "MseLossBackward0",
    ),
    "contrasts": (contrastive, "samples are coupled"),
    "classes along samples": (lambda z: -(z.log_softmax(0) * SHARES).mean(), "coupled"),
    "nothing counts": (
        lambda z: (F.cross_entropy(z, Y, reduction="none") * 0).mean(),
        "no weight",
    ),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_likelihood_is_refused_with_what_was_found(name: str) -> None:
    loss, words = REFUSED[name]
    model = network()
    found = of_step(model, loss(model(X)), ["ntk/trace", "fisher/trace", "fisher/trace_mc"])
    for record in found.values():
        if record.name.startswith(("ntk", "fisher")):
            assert record.missing is not None
            assert re.search(words, record.missing), record.missing
            if "NoLikelihoodError" in record.missing and "nothing" not in name:
                assert "Probe" in record.missing


@pytest.mark.filterwarnings("ignore::nettrace.MissingMeasureWarning")
@pytest.mark.parametrize("each", [1, 2])
def test_tokens_that_are_picked_are_not_taken_for_samples(each: int) -> None:
    """As many as there are samples, but not one of each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, 5), nn.Tanh(), nn.Linear(5, V)).double()
    masks = {"uneven": torch.zeros(N, T, dtype=torch.bool), "even": torch.zeros(N, T, dtype=bool)}
    masks["uneven"].view(-1)[: each * N] = True
    masks["even"][:, torch.randperm(T)[:each]] = True
    z, y = model(TEXTS[:, 1:]), TEXTS[:, 1:]
    for kind, mask in masks.items():
        for picked in (z[mask], z.view(-1, V)[mask.view(-1)]):
            loss = F.cross_entropy(picked, y[mask])
            found = of_step(model, loss, ["ntk/gram", "gradients/norms"])
            missing = {found[name].missing for name in ("ntk/gram", "gradients/norms")}
            if kind == "uneven":
                (reason,) = missing
                assert "rows that IndexBackward0 picked" in reason
                continue
            if each > 1:
                assert "it is not seen which belong to which" in missing.pop()
                continue
            assert missing == {None}
            j = torch.cat(list(jacobian(picked, dict(model.named_parameters())).values()), 2)
            j = j.reshape(N, each * V, -1)
            true = torch.einsum("ncp,mdp->ncmd", j, j)
            assert found["ntk/gram"].value == pytest.approx(true.numpy(), abs=1e-10)


PROBES: dict[str, tuple[Tensor, dict[str, str], Callable[[Tensor], Tensor]]] = {
    "classes": (Y, {}, lambda z: F.cross_entropy(z, Y)),
    "real": (REAL, {}, lambda z: F.mse_loss(z, REAL)),
    "yes": (
        YES,
        {"likelihood": "bernoulli"},
        lambda z: F.binary_cross_entropy_with_logits(z, YES, pos_weight=WEIGHTS),
    ),
    "counts": (COUNTS, {"likelihood": "poisson"}, lambda z: F.poisson_nll_loss(z, COUNTS)),
}


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_gives_the_same(kind: str) -> None:
    """All that a step and a probe both have, but what is drawn."""
    targets, options, loss = PROBES[kind]
    model = network()
    names = known(["ntk", "fisher", "collective", "loss"])
    tracer = Tracer(Probe(X, targets, **options), names, on_error="raise", max_seconds=None)
    of_probe = {record.name: record for record in tracer(model, step=0)}
    found = of_step(model, loss(model(X)), names)
    assert {"ntk/alignment", "ntk/residual_modes", "ntk/entropy_traced"} <= set(found)
    assert {"fisher/trace_empirical", "collective/chi_loss"} <= set(found)
    assert ("ntk/class_ratio" in found) == (kind == "classes")
    for name in names:
        if name not in of_probe:
            assert name not in found
            continue
        value, error = of_probe[name].value, of_probe[name].standard_error
        assert found[name].value == pytest.approx(value, rel=1e-8, abs=1e-10, nan_ok=True)
        if error is not None:
            assert found[name].standard_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z, REAL),
        lambda z: F.mse_loss(REAL, z, reduction="sum"),
        lambda z: ((z - REAL) ** 2).mean(),
        lambda z: (REAL - z).square().sum(1).mean() / 2,
    ],
)
def test_residuals_have_their_sign(loss: Callable[[Tensor], Tensor]) -> None:
    model = network()
    scores = StepStatistics(loss(model(X)), model, N, 0).scores
    assert torch.allclose(scores, model(X).detach() - REAL)


def test_a_penalty_on_weights_is_no_squared_error() -> None:
    model = network()
    anchored = sum(
        (torch.rand_like(p) * (p - p.detach() + 0.1) ** 2).sum() for p in model.parameters()
    )
    found = of_step(model, F.cross_entropy(model(X), Y) + anchored, ["ntk/trace"])["ntk/trace"]
    plain = of_step(model, F.cross_entropy(model(X), Y), ["ntk/trace"])["ntk/trace"]
    assert found.value == plain.value
    assert "a penalty on parameters" in found.attributes["beside"]


def test_what_the_tape_does_not_keep_is_missing_alone() -> None:
    model = network()
    loss = ((model(X) - REAL) ** 2).mean()
    with pytest.warns(nt.MissingMeasureWarning, match="mse_loss"):
        found = of_step(model, loss, ["ntk", "fisher"])
    assert {n for n, r in found.items() if r.missing} == {
        "ntk/alignment",
        "ntk/alignment_centred",
        "ntk/class_blocks",
        "ntk/class_ratio",
    }
    model = network("texts")
    with pytest.warns(nt.MissingMeasureWarning, match="targets of the step are ignored"):
        found = of_step(model, next_tokens(model(TEXTS[:, :-1]), PADDED), ["ntk/alignment"])
    assert found["ntk/alignment"].missing
    model = network()
    with pytest.warns(nt.MissingMeasureWarning, match="are probabilities, and no classes"):
        found = of_step(model, mixup(model(X)), ["ntk/alignment"])
    assert found["ntk/alignment"].missing


def test_statistics_of_the_batch_are_held_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)).double()
    found = of_step(model, F.cross_entropy(model(X), Y), ["ntk/trace", "fisher/trace"])
    h = model[0](X)
    constant = (h.mean(0).detach(), (h.var(0, correction=0) + 1e-5).sqrt().detach())
    z = model[3](torch.tanh((h - constant[0]) / constant[1] * model[1].weight + model[1].bias))
    j = torch.cat(list(jacobian(z, dict(model.named_parameters())).values()), 2)
    assert found["ntk/trace"].value == pytest.approx(float(j.square().sum()), rel=1e-9)
    assert "constant" in found["fisher/trace"].attributes["batch_statistics"]


def test_above_many_outputs_the_trace_is_estimated_and_the_rest_refused_by_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StepStatistics, "exact_outputs", T * V - 1)
    monkeypatch.setattr(StepStatistics, "relative_error", 0.1)
    model = network("texts")
    names = ["ntk/trace", "ntk/trace_centred", "fisher/trace", "fisher/trace_mc"]
    with pytest.warns(nt.MissingMeasureWarning, match="fisher/trace_mc"):
        found = of_step(model, next_tokens(model(TEXTS[:, :-1])), names, memory_budget=20_000)
    z = model(TEXTS[:, :-1])
    j = torch.cat(list(jacobian(z, dict(model.named_parameters())).values()), 2)
    j = j.view(N, T, V, -1)
    true = {
        "ntk/trace": j.square().sum(),
        "ntk/trace_centred": (j - j.mean(2, keepdim=True)).square().sum(),
        "fisher/trace_mc": torch.einsum("ntvp,ntvw,ntwp->", j, of_classes(z.detach()), j) / N,
    }
    for name, value in true.items():
        assert abs(found[name].value - float(value)) < 5 * found[name].standard_error
    assert found["ntk/trace"].attributes["method"] == "hutchinson"
    assert "OverBudgetError" in found["fisher/trace"].missing


def test_products_of_the_jacobian_are_those_of_its_gram_matrix() -> None:
    model = network()
    look = StepStatistics(F.cross_entropy(model(X), Y, ignore_index=1), model, N, 0)
    j = look.jacobian
    v = torch.randn(N, C).double()
    gram = j.gram().reshape(N * C, -1)
    assert j.gram_product(v).flatten() == pytest.approx((gram @ v.flatten()), rel=1e-9)
    scales = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    flat = torch.cat([s.flatten() for s in scales.values()]).detach()
    rows = torch.cat([j.rows(n) for n in range(N)]) * flat
    scaled = j.scaled(scales)
    assert scaled.gram().reshape(N * C, -1) == pytest.approx(rows @ rows.T, rel=1e-9)
    assert scaled.gram_product(v).flatten() == pytest.approx(rows @ rows.T @ v.flatten(), rel=1e-9)
    assert scaled.rows(0) == pytest.approx(rows[:C], rel=1e-9)
