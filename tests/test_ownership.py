"""Networks in which samples depend on each other are refused; none gives a number."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nettrace as nt

N = 6


class Mixing(nn.Module):
    """A network with an operation on the whole batch in its middle."""

    def __init__(self, mix):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.last = nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.zeros(1))
        self.mix = mix

    def forward(self, x):
        return self.last(self.mix(self, torch.tanh(self.first(x))))


MIXES = {
    "mean": lambda m, h: h - h.mean(0),
    "spread": lambda m, h: h / h.std(),
    "shift": lambda m, h: h + h.roll(1, 0),
    "weak shift": lambda m, h: h + 1e-6 * h.roll(1, 0),
    "reverse": lambda m, h: h * h.flip(0),
    "softmax": lambda m, h: h.softmax(0),
    "running sum": lambda m, h: h.cumsum(0),
    "sort": lambda m, h: h.sort(0)[0],
    "attention": lambda m, h: (h @ h.T).softmax(1) @ h,
    "only mean": lambda m, h: h.mean(0, keepdim=True).expand(len(h), -1),
    "shut gate, mean": lambda m, h: h + m.gate * h.mean(0),
    "shut gate, shift": lambda m, h: h + m.gate * h.roll(1, 0),
    "shut gate, attention": lambda m, h: h + m.gate * ((h @ h.T).softmax(1) @ h),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mixing_operation_is_refused(name):
    model, x = Mixing(MIXES[name]), torch.randn(N, 5)
    found = nt.jacobian(model(x), model)
    for quantity in (found.gram, found.trace, found.norms, found.blocks, found.coverage):
        with pytest.raises(nt.CoupledSamplesError, match="coupled"):
            quantity()
    with torch.no_grad():
        model.gate.fill_(0.01)
    with pytest.raises(nt.CoupledSamplesError):
        nt.jacobian(model(x), model).trace()


def test_the_mixing_operation_is_named():
    model, x = Mixing(MIXES["shift"]), torch.randn(N, 5)
    with pytest.raises(nt.CoupledSamplesError, match=r"RollBackward0.*coupled='rows'"):
        nt.jacobian(model(x), model).trace()


class ZeroInitialisedBranch(nn.Module):
    """The branch that mixes ends in a layer that is zero at initialisation, inside another."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.zeros(5))
        nn.init.zeros_(self.inner.weight)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.head(h + self.scale * self.inner(h - h.mean(0)))


def test_inputs_that_need_a_gradient_are_no_weights():
    shift, x = nn.Parameter(torch.randn(3)), torch.randn(N, 3, requires_grad=True)
    h = x - shift  # an operation that keeps neither operand on the tape
    with pytest.raises(nt.CoupledSamplesError):
        nt.jacobian(torch.tanh(h - h.mean(0)), [shift]).trace()


def test_a_hook_that_mixes_gradients_is_found_by_the_spot_check():
    # Hooks on tensors leave no mark on the tape, from which layouts are derived.
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 5)
    h = model[0](x)
    h.register_hook(lambda g: g - g.mean(0))
    with pytest.raises(nt.SpotCheckError, match=r"parameter '0\."):
        nt.certify(nt.jacobian(model[2](torch.tanh(h)), model))


def test_a_coupling_behind_two_shut_gates_is_refused():
    model = ZeroInitialisedBranch()
    with pytest.raises(nt.CoupledSamplesError):
        nt.jacobian(model(torch.randn(N, 5)), model).trace()


def test_shut_gates_without_coupling_are_no_obstacle():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.zeros_(model[2].weight), nn.init.zeros_(model[3].weight)
    found = nt.jacobian(model(torch.randn(N, 5)), model)
    rows = torch.stack([found.rows(n) for n in range(N)])
    torch.testing.assert_close(found.norms(), rows.norm(dim=2))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)],
        lambda: [nn.BatchNorm1d(5), nn.Linear(5, 3)],
        lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)],
        lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 3)],
        lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False)],
    ],
    ids=["middle", "first", "no weight", "twice", "no statistics"],
)
def test_batch_normalisation_in_training_is_refused_with_the_remedy(layers):
    model, x = nn.Sequential(*layers()), torch.randn(N, 5)
    with pytest.raises(nt.CoupledSamplesError, match=r"batch normalisation.*model\.eval\(\)"):
        nt.jacobian(model(x), model).trace()


def test_a_contrastive_loss_is_refused():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(N, 5)
    z = F.normalize(model(x))
    losses = F.cross_entropy(z @ z.T / 0.1, torch.arange(N), reduction="none")
    with pytest.raises(nt.CoupledSamplesError):
        nt.loss_jacobian(losses, model).norms()


@pytest.mark.parametrize("mix", ["mean", "attention", "shut gate, shift"])
def test_rows_of_coupled_outputs_can_be_asked_for(mix):
    model, x = Mixing(MIXES[mix]).double(), torch.randn(N, 5).double()
    outputs = model(x)
    found = nt.jacobian(outputs, model, coupled="rows")
    parameters = list(model.parameters())
    rows = []
    for f in outputs.flatten():
        row = torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in row]))
    j = torch.stack(rows).view(N, 3, -1)
    torch.testing.assert_close(found.gram(), torch.einsum("ncp,mdp->ncmd", j, j))
    torch.testing.assert_close(found.norms(), j.norm(dim=2))
    u = torch.randn(found.parameters).double()
    torch.testing.assert_close(found.jvp(u), j @ u)
    assert set(found.coverage().values()) == {"rows"}


def test_a_router_that_changes_its_mind_is_followed():
    """Assignments change with the weights, while every shape on the tape stays as it is."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
            self.sign = 1.0

        def forward(self, x):
            score = self.sign * x.sum(1)
            order = score.argsort()
            halves = order[: N // 2], order[N // 2 :]
            out = torch.cat([e(x[rows]) for e, rows in zip(self.experts, halves, strict=True)])
            return torch.tanh(out[torch.cat(halves).argsort()])

    model, x = Router().double(), torch.randn(N, 4).double()
    grams = []
    for sign in (1.0, -1.0):
        model.sign = sign
        found = nt.jacobian(model(x), model)
        j = torch.stack([found.rows(n) for n in range(N)])
        grams.append(found.gram())
        torch.testing.assert_close(grams[-1], torch.einsum("ncp,mdp->ncmd", j, j))
    assert not torch.allclose(*grams)


@pytest.mark.parametrize("samples", [1, 2, 31, 33, 1100])
def test_any_number_of_samples_is_told_apart(samples):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(samples, 3)
    found = nt.jacobian(model(x), model).norms()
    per_sample = torch.func.vmap(
        torch.func.jacrev(lambda p, x: torch.func.functional_call(model, p, (x,))), (None, 0)
    )(dict(model.named_parameters()), x)
    true = torch.stack([j.flatten(2).square().sum(2) for j in per_sample.values()]).sum(0).sqrt()
    torch.testing.assert_close(found, true)


class Tokens(nn.Module):
    """Three tokens a sample, of which `read` makes outputs; no bias, so that zeros stay zeros."""

    def __init__(self, read):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        self.read = read

    def forward(self, x, mask):
        return self.read(self, x, mask.to(x.dtype)[..., None])


def gathered(m, x, mask):
    rows = mask.flatten().nonzero().flatten()
    h = torch.tanh(m.first(x.flatten(0, 1)[rows]))
    return m.head(torch.zeros(len(x), 4).to(h).index_add(0, rows // x.shape[1], h))


def routed(m, x, mask):
    h, out = torch.tanh(m.first(x)).flatten(0, 1), 0
    for expert, chosen in zip(m.experts, (mask > 0, mask == 0), strict=True):
        rows = chosen.flatten().nonzero().flatten()
        out = out + torch.zeros_like(h).index_add(0, rows, torch.tanh(expert(h[rows])))
    return m.head(out).view(*x.shape[:2], -1).sum(1)


def ignored(m, x, mask):
    logits = m.head(torch.tanh(m.first(x))).mT
    target = torch.where(mask[..., 0] > 0, 1, -100)
    return F.cross_entropy(logits, target, ignore_index=-100, reduction="none").sum(1)


READS = {
    "zero input": lambda m, x, mask: m.head(torch.tanh(m.first(x * mask))).sum(1),
    "dead units": lambda m, x, mask: m.head(F.relu(m.first(x) - 1e3 * (1 - mask))).sum(1),
    "time first": lambda m, x, mask: m.head(
        F.relu(m.first((x * mask).transpose(0, 1).contiguous()))
    ).sum(0),
    "padding": lambda m, x, mask: m.head((torch.tanh(m.first(x)) * mask).sum(1)),
    "masked attention": lambda m, x, mask: m.head(
        F.scaled_dot_product_attention(
            *[m.first(x)] * 3, attn_mask=(mask > 0).mT.expand(-1, 3, -1)
        ).nan_to_num()
    ).sum(1),
    "gathered": gathered,
    "routed": routed,
    "ignored loss": ignored,
}
MASKS = {
    "all": torch.ones(N, 3),
    "one token": torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]]),
    "a sample": torch.tensor([1, 1, 0, 1, 1, 1])[:, None].expand(-1, 3),
    "first and last": torch.tensor([0, 1, 1, 1, 1, 0])[:, None].expand(-1, 3),
    "all but one": torch.tensor([0, 0, 0, 1, 0, 0])[:, None].expand(-1, 3),
    "nothing": torch.zeros(N, 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("read", READS)
def test_rows_through_which_nothing_flows_belong_to_nobody(read, mask):
    """Then the rows come to life, while every shape on the tape stays as it is."""
    model, x = Tokens(READS[read]).double(), torch.randn(N, 3, 3).double()
    for flow in (MASKS[mask], MASKS["all"]):
        found = nt.jacobian(model(x, flow), model)
        j = torch.stack([found.rows(n) for n in range(N)])
        torch.testing.assert_close(found.gram(), torch.einsum("ncp,mdp->ncmd", j, j))
        torch.testing.assert_close(found.norms(), j.norm(dim=2))
        if read != "routed":  # where each row has another expert instead
            assert torch.equal(found.norms().ne(0).any(1), flow.ne(0).any(1))


def test_gradients_of_very_different_size_are_told_apart():
    scale = torch.tensor([1e-12, 1.0, 1e12, 1e-6])[:, None]
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    plain = nt.jacobian(model(x), model).norms()
    torch.testing.assert_close(nt.jacobian(model(x) * scale, model).norms(), plain * scale)


class Biased(nn.Module):
    """Attention with a bias for each difference of places, as in T5, or for each token."""

    def __init__(self, table):
        super().__init__()
        self.tokens, self.bias = nn.Embedding(9, 4), nn.Embedding(9, 2)
        self.out, self.table = nn.Linear(4, 3), table

    def forward(self, t):
        h = self.tokens(t)
        bias = self.bias(self.table(t)).permute(2, 0, 1)  # heads first
        scores = (h @ h.mT)[:, None] + bias[None]
        return self.out((scores.softmax(-1) @ h[:, None]).sum(1)).mean(1)


def differences(t):
    places = torch.arange(t.shape[1])
    return (places[None] - places[:, None]).clamp(-4, 4) + 4


@pytest.mark.parametrize("length", [3, 4, 6, 8])
@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_tables_of_relative_positions_are_no_samples(samples, length):
    model, t = Biased(differences).double(), torch.randint(0, 9, (samples, length))
    rows = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
        for n in range(samples)
        for one in model(t[n : n + 1])[0]
    ]
    norms = torch.stack([sum(g.square().sum() for g in row) for row in rows]).sqrt()
    torch.testing.assert_close(nt.jacobian(model(t), model).norms().flatten(), norms)


@pytest.mark.parametrize(
    "table",
    [lambda t: t, lambda t: t.clamp(1, 1), lambda t: t.sort(1)[0]],
    ids="any one sorted".split(),
)
def test_a_table_of_the_samples_own_numbers_couples_them(table):
    model, t = Biased(table), torch.randint(0, 9, (4, 4))
    with pytest.raises(nt.CoupledSamplesError):
        nt.jacobian(model(t), model).norms()
