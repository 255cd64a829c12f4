"""What holds for the Gram matrix of any network, on networks drawn at random."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import relative_error
from torch import nn

import nettrace as nt

TOLERANCE = 1e-10
WIDTH, LENGTH = 4, 3


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Convolution(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class TimeFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Recurrence(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return x * self.gain + self.shift


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        first = x.sum(-1) > 0
        out = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            out[chosen] = expert(x[chosen])
        return out


class Words(nn.Module):
    """Looks up the sign pattern of each token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)

    def forward(self, x):
        return x * self.table((x[..., 0] > 0).long() + 2 * (x[..., 1] > 0))


PIECES = {
    "dense": lambda: nn.Linear(WIDTH, WIDTH),
    "convolution": lambda: Convolution(WIDTH, WIDTH, 3, padding=1),
    "groups": lambda: Convolution(WIDTH, WIDTH, 3, padding=1, groups=2, padding_mode="circular"),
    "attention": lambda: Attention(WIDTH, 2, batch_first=True),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "time first": lambda: TimeFirst(WIDTH, WIDTH, bias=False),
    "recurrence": lambda: Recurrence(WIDTH, WIDTH, batch_first=True),
    "positions": Positions,
    "experts": Experts,
    "words": Words,
}


class Network(nn.Module):
    def __init__(self, pieces, outputs):
        super().__init__()
        layers = [PIECES[piece]() for piece in pieces]
        layers += [layers[0]]  # used twice
        self.trunk = nn.Sequential(*map(Residual, layers))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x):
        return self.head(self.trunk(x).mean(1))


@st.composite
def networks(draw):
    """A network and a batch of 2 to 5 samples, some of whose tokens may be zero."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    pieces = draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=3))
    model = Network(pieces, draw(st.integers(1, 3))).double()
    x = torch.randn(draw(st.integers(2, 5)), LENGTH, WIDTH).double()
    return model, x * torch.rand(x.shape[:2]).gt(draw(st.sampled_from([0.0, 0.3])))[..., None]


def property_of_networks(test):
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    options = settings(
        max_examples=12, deadline=None, derandomize=True, suppress_health_check=quiet
    )
    return options(given(networks())(test))


def jacobian(model, x):
    return nt.jacobian(model(x), model)


@property_of_networks
def test_permuting_samples_permutes_the_gram_matrix(case):
    model, x = case
    order = torch.randperm(len(x))
    whole, permuted = jacobian(model, x).gram(), jacobian(model, x[order]).gram()
    assert relative_error(permuted, whole[order][:, :, order]) < TOLERANCE


@property_of_networks
def test_splitting_the_probe_gives_its_blocks(case):
    model, x = case
    whole, parts = jacobian(model, x), [jacobian(model, part) for part in (x[:1], x[1:])]
    kernel = whole.gram()
    assert relative_error(parts[0].gram(), kernel[:1, :, :1]) < TOLERANCE
    assert relative_error(parts[1].gram(), kernel[1:, :, 1:]) < TOLERANCE
    rows = [torch.stack([part.rows(n) for n in range(part.samples)]) for part in parts]
    across = torch.einsum("ncp,mdp->ncmd", *rows)
    assert relative_error(across, kernel[:1, :, 1:]) < TOLERANCE
    norms = torch.cat([part.norms() for part in parts])
    assert relative_error(norms, whole.norms()) < TOLERANCE


@property_of_networks
def test_scaling_outputs_scales_by_the_square(case):
    model, x = case
    outputs = model(x)
    kernel = nt.jacobian(outputs, model).gram()
    assert relative_error(nt.jacobian(-3 * outputs, model).gram(), 9 * kernel) < TOLERANCE


@property_of_networks
def test_an_unused_parameter_changes_nothing(case):
    model, x = case
    before = jacobian(model, x)
    kernel, norms, size = before.gram(), before.norms(), before.parameters
    model.extra = nn.Parameter(torch.randn(3).double())
    after = jacobian(model, x)
    assert torch.equal(after.gram(), kernel)
    assert torch.equal(after.norms(), norms)
    assert after.parameters == size + 3
    assert after.trace(per_layer=True)["extra"] == 0
    assert after.coverage()["extra"] == "unused"
    v = torch.randn(after.samples, after.outputs)
    assert after.vjp(v)[:3].eq(0).all()  # a module's own parameters come first


@property_of_networks
def test_the_gram_matrix_is_symmetric_and_positive_semidefinite(case):
    model, x = case
    found = jacobian(model, x)
    kernel = found.gram().flatten(2).flatten(0, 1)
    assert relative_error(kernel, kernel.T) < 1e-14
    values = torch.linalg.eigvalsh(kernel)
    assert values[0] >= -1e-13 * values[-1]
    assert found.trace().item() == pytest.approx(values.sum().item(), rel=1e-10)


@property_of_networks
def test_layers_sum_to_the_whole(case):
    model, x = case
    found = jacobian(model, x)
    for quantity in (found.gram, found.blocks, found.trace):
        shares = quantity(per_layer=True)
        assert list(shares) == [name for name, _ in model.named_parameters()]
        assert relative_error(torch.stack(list(shares.values())).sum(0), quantity()) < TOLERANCE
