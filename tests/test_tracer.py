"""The tracer refuses what mixes the batch where no tape shows it, at every record."""

import errno
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nettrace as nt

N = 8


class Net(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.linear, self.gate, self.mix = nn.Linear(4, 3), nn.Parameter(torch.zeros(())), mix

    def forward(self, x):
        return self.mix(self, x)


def samples():
    torch.manual_seed(1)
    return torch.randn(N, 4), torch.arange(N) % 3


def measure(model, what="ntk/trace", step=0, **options):
    x, y = samples()
    tracer = nt.Tracer(nt.Probe(x, y, **options), what, on_error="raise")
    return tracer(model, step)[0].value


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, x: m.linear(x - x.mean(0)),
        lambda m, x: m.linear(x.cumsum(0)),
        lambda m, x: m.linear(x + 1e-3 * x.roll(1, 0)),
        lambda m, x: m.linear(
            x.view(-1, 2, 4).mean(1, keepdim=True).expand(-1, 2, -1).flatten(0, 1)
        ),
        lambda m, x: m.linear(x) + torch.arange(len(x))[:, None],
        lambda m, x: m.linear(x - x.mean(0)) + 1e-9 * torch.randn(len(x), 3),
        lambda m, x: m.linear(x) * (m.linear(x).detach() > m.linear(x).detach().median()),
        lambda m, x: m.linear(x)[torch.arange(len(x) - 1, -1, -1)],
    ],
    ids="centred cumulative weak pairs position noisy median reversed".split(),
)
def test_mixing_that_leaves_no_mark_on_the_tape_is_refused(mix):
    with pytest.raises(nt.CoupledSamplesError, match="in two parts or another order"):
        measure(Net(mix))


def test_a_gate_upstream_that_opens_later_is_refused_then():
    x, y = samples()
    model = Net(lambda m, x: m.linear(x + m.gate * x.mean(0)))
    tracer = nt.Tracer(nt.Probe(x, y), "fisher/trace_ntk", on_error="record")
    with torch.no_grad():
        model.gate.fill_(0.5)
    with pytest.warns(nt.MissingMeasureWarning, match="CoupledSamplesError"):
        (record, _) = tracer(model, 1)
    assert "CoupledSamplesError" in record.missing
    buffered = Net(lambda m, x: m.linear(x + m.gate.item() * x.mean(0)))
    tracer = nt.Tracer(nt.Probe(x, y), "ntk/trace", on_error="raise")
    assert tracer(buffered, 0)[0].value > 0
    with torch.no_grad():
        buffered.gate.fill_(0.5)
    with pytest.raises(nt.CoupledSamplesError):
        tracer(buffered, 1)


@pytest.mark.parametrize(
    "losses",
    [
        lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f)), reduction="none"),
        lambda f, y: (f - f.mean(0)).square().sum(1),
        lambda f, y: (f - f.mean(0).detach()).square().sum(1),
        lambda f, y: F.cross_entropy(f, y, reduction="none").cumsum(0),
        lambda f, y: F.cross_entropy(f, y, reduction="none") * torch.bincount(y)[y],
    ],
    ids="contrastive centred detached cumulative counts".split(),
)
@pytest.mark.parametrize("what", ["fisher/trace_empirical", "collective/chi_align", "loss/mean"])
def test_a_loss_that_mixes_samples_is_refused(losses, what):
    with pytest.raises(nt.CoupledSamplesError, match="loss"):
        measure(Net(lambda m, x: m.linear(x)), what, losses=losses)


def test_where_parts_cannot_be_told_the_loss_is_still_checked_on_the_tape():
    model = Net(lambda m, x: m.linear(x.view(N, 4)))  # for batches of one size
    assert measure(model) > 0
    with pytest.raises(nt.CoupledSamplesError, match="by the loss"):
        measure(model, "fisher/trace_empirical", losses=lambda f, y: (f - f.mean(0)).pow(2).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_that_only_round_differently_or_draw_at_random_pass(dtype):
    x, _ = samples()
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(20)])
    tracer = nt.Tracer(nt.Probe(x.to(dtype)), "ntk/trace", on_error="raise")
    assert tracer(deep.to(dtype), 0)[0].value > 0
    noisy = Net(lambda m, x: m.linear(x) + torch.randn(len(x), 3))
    assert measure(noisy) > 0


@pytest.mark.parametrize(
    ("outputs", "targets", "says"),
    [
        ((8, 1), torch.arange(8)[:, None] % 2 * 1.0, "all 0 or 1.*likelihood='gaussian'"),
        ((8, 3), F.one_hot(torch.arange(8) % 3) * 0.8 + 0.2 / 3, "sum to one"),
        ((8, 5, 5), torch.zeros(8, 5).long(), r"axis 1 or 2 .*class_axis=2"),
    ],
)
def test_a_likelihood_that_cannot_be_told_is_asked_for(outputs, targets, says):
    probe = nt.Probe(torch.zeros(8, 1), targets)
    with pytest.raises(ValueError, match=says):
        probe.distribution(torch.randn(outputs))


def test_the_likelihood_travels_with_the_value():
    x, y = samples()
    records = nt.Tracer(nt.Probe(x, y), ["fisher/trace", "ntk/trace"])(nn.Linear(4, 3), 0)
    assert records[0].attributes["likelihood"] == "categorical"
    assert "cross-entropy" in records[0].attributes["loss"]
    assert "likelihood" not in records[1].attributes


def test_a_full_disk_is_reported_once_and_the_loop_goes_on(tmp_path, monkeypatch):
    x, y = samples()
    tracer = nt.Tracer(nt.Probe(x, y), "ntk/trace", to=tmp_path)

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.write", full)
    with pytest.warns(nt.MissingMeasureWarning, match="No space left") as caught:
        assert all(tracer(nn.Linear(4, 3), step) for step in range(3))
    assert len(caught) == 1


def test_an_uninitialised_network_is_missing_until_it_is():
    x, y = samples()
    model = nn.LazyLinear(3)
    tracer = nt.Tracer(nt.Probe(x, y), "ntk/trace")
    with pytest.warns(nt.MissingMeasureWarning, match="uninitialized"):
        assert tracer(model, 0)[0].missing
    model(x)
    assert tracer(model, 1)[0].missing is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_is_measured_as_what_is_not(reentrant):
    def checkpointed(m, x):
        x = x.detach().requires_grad_()
        return m.gate + 1 + checkpoint(m.linear, x, use_reentrant=reentrant).tanh()

    found = []
    for mix in (checkpointed, lambda m, x: m.gate + 1 + m.linear(x).tanh()):
        torch.manual_seed(0)
        found.append(measure(Net(mix)))
    assert found[0] == found[1] > N * 3  # which is the gate's share
