"""What batches are made of, which outputs are looked at, and whether their loss is the network's.

The classes of Hugging Face's are stood in for by what matters of them: a batch is a `UserDict`, and
what a network returns an `OrderedDict` that is a dataclass at the same time.
"""

import re
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nettrace as nt

N, T, V = 6, 3, 5


@dataclass
class ModelOutput(OrderedDict):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class BatchEncoding(UserDict):
    pass


@dataclass(frozen=True)
class Sample:
    x: Tensor
    target: Tensor


Pair = namedtuple("Pair", "x y")
Two = namedtuple("Two", "first second")


class Classifier(nn.Module):
    """As Hugging Face's: tokens and a mask in, logits out, and a loss where labels are given."""

    def __init__(self, loss=F.cross_entropy, returns=ModelOutput):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, V)
        self.loss, self.returns, self.calls = loss, returns, 0

    def forward(self, input_ids, attention_mask=None, labels=None, **options):
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else self.loss(logits, labels)
        return self.returns(loss=loss, logits=logits, hidden=hidden)


def tokens():
    torch.manual_seed(1)
    mask = torch.ones(N, T)
    mask[0, 2] = 0
    ids = torch.randint(0, 7, (N, T))
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(N) % V}


def plain(model, batch):
    """A probe that says everything."""
    inputs = (batch["input_ids"], batch["attention_mask"])
    return nt.Probe(inputs, batch["labels"], forward=lambda m, x: m(*x)["logits"])


def measured(model, probe, *names):
    records = nt.Tracer(probe, names, on_error="raise")(model, 0)
    return {record.name: record for record in records}


# Batches ------------------------------------------------------------------------------------------

X, Y = torch.randn(N, 4), torch.arange(N) % 3


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        Two(X, Y),
        Pair(X, Y),
        {"x": X, "label": Y},
        {"input": X, "targets": Y},
        UserDict(input=X, y=Y),
        Sample(X, Y),
        {"input": X, "labels": Y, "bias": None},
    ],
    ids="pair list names named other-name input userdict dataclass none".split(),
)
def test_batches_of_every_kind_give_the_same_probe(batch):
    model = nn.Linear(4, 3)
    probe = nt.Probe.from_batch(batch)
    assert torch.equal(probe.targets, Y)
    assert torch.equal(probe.look(model), model(X))
    assert torch.equal(probe.take(torch.tensor([4, 1])).look(model), model(X[[4, 1]]))
    assert probe.to("cpu").fingerprint() == probe.fingerprint()


@pytest.mark.parametrize("inputs", [Sample(X, Y), Two(X, Y), UserDict(first=X, second=Y)])
def test_inputs_keep_what_they_are_made_of(inputs):
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, first, second=None):
            return self.linear(first.x if isinstance(first, Sample) else first)

    probe, model = nt.Probe(inputs), Taking()
    assert len(probe) == N
    assert torch.equal(probe.take(torch.tensor([2])).look(model), model.linear(X[[2]]))


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("returns", [ModelOutput, dict, lambda **found: found["logits"]])
def test_a_batch_of_a_language_model_is_taken_as_it_is(kind, returns):
    model, batch = Classifier(returns=returns), tokens()
    probe = nt.Probe.from_batch(kind(batch))
    assert sorted(probe.inputs) == ["attention_mask", "input_ids"]
    names = ["ntk/trace", "fisher/trace", "fisher/trace_empirical", "loss/mean"]
    found = measured(model, probe, *names)
    model.returns = dict
    expected = measured(model, plain(model, batch), *names)
    for name in names:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-6)


def test_a_data_set_of_dicts_gives_a_probe():
    data = [{"x": x, "label": y} for x, y in zip(X, Y, strict=True)]
    probe = nt.Probe.from_dataset(data, 3)
    assert torch.equal(probe.inputs["x"], X[::2])
    assert torch.equal(probe.targets, Y[::2])


# Which outputs ------------------------------------------------------------------------------------


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.body, self.make = nn.Linear(4, T * V), make

    def forward(self, x):
        return self.make(self.body(x).view(-1, T, V))


@dataclass
class Heads:
    policy: Tensor
    value: Tensor


@pytest.mark.parametrize(
    ("make", "select", "expected"),
    [
        (lambda z: z, "last", lambda z: z[:, -1]),
        (lambda z: {"logits": z, "hidden": z}, "last", lambda z: z[:, -1]),
        (lambda z: {"policy": z[:, 0], "value": z[:, 1]}, "value", lambda z: z[:, 1]),
        (lambda z: {"last": z[:, 0], "value": z}, "last", lambda z: z[:, 0]),
        (lambda z: Heads(z[:, 0], z[:, 1]), "policy", lambda z: z[:, 0]),
        (lambda z: Heads(z[:, 0], z[:, 1]), 1, lambda z: z[:, 1]),
        (lambda z: Two(z[:, 0], z[:, 1]), 0, lambda z: z[:, 0]),
        (lambda z: (z[:, 0], z[:, 1]), 1, lambda z: z[:, 1]),
        (lambda z: ModelOutput(logits=z, hidden=z[:, 2]), "hidden", lambda z: z[:, 2]),
        (lambda z: (z, None), lambda found: found[0].sum(1), lambda z: z.sum(1)),
        (lambda z: (z, "note"), None, lambda z: z),
        (lambda z: {"loss": z.sum(), "out": z[:, 2]}, None, lambda z: z[:, 2]),
        (lambda z: ModelOutput(logits=z, hidden=z[:, 2]), None, lambda z: z),
    ],
    ids=(
        "last last-logits head named-last field field-number named-tuple number model-output "
        "function single single-key logits"
    ).split(),
)
def test_the_outputs_that_are_meant_are_looked_at(make, select, expected):
    model = Returning(make).double()
    x = X.double()
    probe, z = nt.Probe(x, select=select), model.body(x).view(-1, T, V)
    assert torch.equal(probe.look(model), expected(z))
    found = measured(model, probe, "ntk/gram", "ntk/trace")
    true = nt.jacobian(expected(z), model).gram()
    torch.testing.assert_close(torch.as_tensor(found["ntk/gram"].value), true)
    plain = isinstance(make(z), Tensor) and select is None
    assert ("outputs" in found["ntk/trace"].attributes) != plain


@pytest.mark.parametrize(
    ("make", "select", "said"),
    [
        (lambda z: ModelOutput(logits=z), None, "logits"),
        (lambda z: ModelOutput(logits=z), "last", "logits, last token"),
        (lambda z: z, "last", "last token"),
        (lambda z: (z,), 0, "0"),
        (lambda z: (z, z), lambda found: found[1], "select=<lambda>"),
    ],
)
def test_records_say_which_outputs_were_taken(make, select, said):
    found = measured(Returning(make), nt.Probe(X, select=select), "ntk/trace")
    assert found["ntk/trace"].attributes["outputs"] == said


@pytest.mark.parametrize(
    ("make", "select", "says"),
    [
        (lambda z: {"a": z, "b": z}, None, r"not clear.*dict of 'a': \(6, 3, 5\), 'b'.*select="),
        (lambda z: {"a": z}, "b", r"no tensor 'b'.*dict of 'a': \(6, 3, 5\).*select="),
        (lambda z: Heads(z, z), None, "Heads of 'policy'.*'value'"),
        (lambda z: (z,), 3, r"no tensor 3.*tuple of 0: \(6, 3, 5\)"),
        (lambda z: z[:, 0], "last", r"\(N, T, V\).*got \(6, 5\)"),
        (lambda z: z, lambda found: 7, "select= to give a tensor.*got int"),
        (lambda z: None, None, "NoneType.*forward=lambda"),
    ],
    ids="unclear key dataclass number last function none".split(),
)
def test_where_it_is_not_clear_which_are_meant_the_error_names_what_there_is(make, select, says):
    with pytest.raises(TypeError, match=says):
        nt.Probe(X, select=select).look(Returning(make))


def test_what_selects_is_part_of_the_fingerprint():
    prints = {nt.Probe(X, select=s).fingerprint() for s in (None, "last", "logits", 0, 1)}
    assert len(prints) == 5
    with pytest.raises(TypeError, match=r"got 1\.5"):
        nt.Probe(X, select=1.5)


# The network's own loss ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (F.cross_entropy, "own loss is this"),
        (lambda z, y: N * F.cross_entropy(z, y), f"{N} times this, a sum over samples"),
    ],
)
def test_a_loss_that_is_the_networks_own_is_taken_and_a_factor_stated(loss, says):
    model, probe = Classifier(loss), nt.Probe.from_batch(tokens())
    found = measured(model, probe, "fisher/trace", "loss/mean", "ntk/trace")
    for name in ("fisher/trace", "loss/mean"):
        assert says in found[name].attributes["loss_checked"]
    assert "loss_checked" not in found["ntk/trace"].attributes


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, V + 1)),
        lambda z, y: F.multi_margin_loss(z, y),
        lambda z, y: F.cross_entropy(z, y) + 0.01 * z.square().mean(),
    ],
    ids="smoothed weighted margin penalised".split(),
)
def test_what_rests_on_another_loss_is_missing_with_both_numbers(loss):
    model, batch = Classifier(loss), tokens()
    probe = nt.Probe.from_batch(batch)
    names = ["ntk/trace", "loss/mean", "fisher/trace", "fisher/trace_mc", "collective/chi_align"]
    with pytest.warns(nt.MissingMeasureWarning, match="losses="):
        records = {r.name: r for r in nt.Tracer(probe, names)(model, 0)}
    with torch.no_grad():
        found = model(**batch)
    numbers = [float(F.cross_entropy(found.logits, batch["labels"])), float(found.loss)]
    for name in names[1:]:
        told = re.search(r"samples is (\S+), while .* returned (\S+)\. ", records[name].missing)
        assert [float(number) for number in told.groups()] == pytest.approx(numbers, rel=1e-4)
        assert "likelihood='categorical'" in records[name].missing
    assert records["ntk/trace"].missing is None
    alone = measured(model, nt.Probe(probe.inputs), "ntk/trace")["ntk/trace"].value
    assert records["ntk/trace"].value == pytest.approx(alone, rel=1e-6)
    declared = nt.Probe.from_batch(batch, likelihood="categorical")
    assert "loss_checked" not in measured(model, declared, "loss/mean")["loss/mean"].attributes


def test_labels_that_are_among_the_inputs_too_are_compared():
    model, batch = Classifier(lambda z, y: F.cross_entropy(z, y) + 1), tokens()
    probe = nt.Probe(batch, batch["labels"])
    with pytest.warns(nt.MissingMeasureWarning, match="losses="):
        (found, *_) = nt.Tracer(probe, "loss/mean")(model, 0)
    assert "does not give what the network returned" in found.missing


@pytest.mark.parametrize(
    ("reduction", "says"),
    [
        (
            lambda e: e.square().mean(),
            "0.666667 times this, a mean over samples and the 3 terms of each without the half",
        ),
        (
            lambda e: e.square().sum(1).mean(),
            "2 times this, the mean over samples without the half",
        ),
        (lambda e: e.square().sum(), "12 times this, a sum over samples without the half"),
        (lambda e: e.square().sum(1).mean() / 2, "own loss is this"),
        (
            lambda e: e.square().mean() / 2,
            "0.333333 times this, a mean over samples and the 3 terms of each",
        ),
    ],
    ids="mse sums total half half-mean".split(),
)
def test_the_conventions_of_squared_errors_are_told_apart(reduction, says):
    class Regressor(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, labels=None):
            z = self.linear(x)
            return {"logits": z, "loss": None if labels is None else reduction(z - labels)}

    probe = nt.Probe.from_batch({"x": X, "labels": torch.randn(N, 3)})
    said = measured(Regressor(), probe, "loss/mean")["loss/mean"].attributes["loss_checked"]
    assert said.endswith(says)


@pytest.mark.parametrize(
    "loss",
    [lambda z, y: torch.tensor(torch.nan), lambda z, y: F.cross_entropy(z[:3], y)],
    ids=["not a number", "fails"],
)
def test_where_there_is_no_comparing_the_record_says_so(loss):
    found = measured(Classifier(loss), nt.Probe.from_batch(tokens()), "loss/mean")
    assert found["loss/mean"].attributes["loss_checked"].startswith("not checked: ")
    found = measured(nn.Linear(4, 3), nt.Probe(X, Y), "loss/mean")
    said = "not checked: the network returned no loss of its own"
    assert found["loss/mean"].attributes["loss_checked"] == said
