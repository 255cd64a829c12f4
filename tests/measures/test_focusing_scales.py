"""Fixed scales belong to weights: networks that are the same function, or folded by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.landscape.nodes import Nodes

NAMES = ("focus/focusing", "focus/path_focusing")
FACTORS = torch.tensor([1e-3, 0.5, 2.0, 10.0, 300.0]).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def drawn(model: nn.Module) -> nn.Module:
    """With norms as after training, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 5)
    return model.double().eval()


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return drawn(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))


def focus(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    tracer = nt.Tracer(nt.Probe(x), NAMES, on_error="raise", max_seconds=None)
    found = {r.name: r.value for r in tracer(model, step=0)}
    return [found[name] for name in NAMES]


def of(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with frozen(model):
        nodes = Nodes(model, nt.Probe(x), 0)
        return nodes.strengths(), nodes.loads()


def same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """The same function has the same focus."""
    torch.testing.assert_close(one(x), other(x), rtol=1e-9, atol=1e-9)
    for a, b in zip(focus(one, x), focus(other, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def alike(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """The same function has the same strengths and loads."""
    torch.testing.assert_close(one(x), other(x), rtol=1e-9, atol=1e-9)
    for a, b in zip(of(one, x), of(other, x), strict=True):
        assert len(a) == len(b) > 0
        for left, right in zip(a.values(), b.values(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=0)


def scale(norm: nn.Module) -> Tensor:
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().abs()


def test_rows_that_batch_norm_divides_by_their_scale_again_change_nothing():
    model = dense()
    model[1].eps = 0.0  # with which it is the same function to the last digits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight *= FACTORS[:, None]
        twin[0].bias *= FACTORS
        twin[1].running_mean *= FACTORS
        twin[1].running_var *= FACTORS**2
    same(model, twin, normal(4, 6))


def test_scales_may_be_moved_to_the_next_weight():
    model = dense()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight *= FACTORS
        twin[1].bias *= FACTORS
        twin[3].weight /= FACTORS
    same(model, twin, normal(4, 6))


def test_one_node_that_carries_everything_has_all_the_focus():
    model = dense()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0, 0, 0, 0, 1.0]))
    for value in focus(model, normal(4, 6)):
        np.testing.assert_allclose(value, [1 - 1 / 5], rtol=1e-12)


def test_dense_networks_are_those_folded():
    model = dense()
    folded = nn.Sequential(fuse_linear_bn_eval(model[0], model[1]), *model[2:]).eval()
    alike(model, folded, normal(4, 6))


@pytest.mark.parametrize("inplace", [False, True])
def test_convolutions_are_those_folded(inplace):
    torch.manual_seed(0)
    model = drawn(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace)),
            *(nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace)),
            *(nn.ConvTranspose2d(6, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace)),
            *(nn.Conv2d(4, 4, 2, groups=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)),
        )
    )
    folded = nn.Sequential(
        *(fuse_conv_bn_eval(model[0], model[1]), nn.ReLU()),
        *(fuse_conv_bn_eval(model[3], model[4]), nn.ReLU()),
        *(fuse_conv_bn_eval(model[6], model[7], transpose=True), nn.ReLU()),
        *(fuse_conv_bn_eval(model[9], model[10]), *model[11:]),
    ).eval()
    alike(model, folded, normal(4, 2, 6, 6))


class Block(nn.Module):
    """A residual stream with batch norms in the branch, or before its weights."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.stem, self.stem_norm = nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4)
        self.up, self.down = nn.Conv1d(4, 5, 1), nn.Conv1d(5, 4, 1)
        self.first = nn.BatchNorm1d(4 if before else 5)
        self.second = nn.BatchNorm1d(5 if before else 4)
        self.last, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = self.stem(x)
            x = x + self.down(self.second(self.up(self.first(x).relu())).relu())
            return self.head(self.last(x).relu().mean(-1))
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.second(self.down(self.first(self.up(x)).relu()))
        return self.head(x.relu().mean(-1))


def test_a_residual_block_with_norms_in_its_branch_is_that_folded():
    torch.manual_seed(0)
    model = drawn(Block(before=False))
    folded = copy.deepcopy(model)
    for conv, norm in (("stem", "stem_norm"), ("up", "first"), ("down", "second")):
        setattr(folded, conv, fuse_conv_bn_eval(getattr(model, conv), getattr(model, norm)))
        setattr(folded, norm, nn.Identity())
    alike(model, folded, normal(4, 2, 5))


def test_a_pre_activation_block_reads_its_stream_scaled():
    torch.manual_seed(0)
    model = drawn(Block(before=True))
    strengths, loads = of(model, normal(4, 2, 5))
    first, second, last = (scale(norm) for norm in (model.first, model.second, model.last))
    flat = [m.weight.detach().flatten(2) for m in (model.stem, model.up, model.down)]
    flat.append(model.head.weight.detach()[..., None])
    stem, up, down, head = (w.square().sum(-1) for w in flat)
    up = second[:, None] ** 2 * up * first**2
    stream = stem.sum(1) + down.sum(1), up.sum(0) + (head * last**2).sum(0)
    hidden = up.sum(1), down.sum(0)
    torch.testing.assert_close(strengths["stem.weight[0]"], torch.stack(stream))
    torch.testing.assert_close(strengths["up.weight[0]"], torch.stack(hidden))
    stem, up, down, head = (w.abs().sum(-1) for w in flat)
    into, out = stem.sum(1), head.sum(0) * last
    through = second[:, None] * up * first
    torch.testing.assert_close(loads["up.weight[0]"], (through @ into) * (out @ down))
    entered = into * (out + out @ down @ through) + (down @ through @ into) * out
    torch.testing.assert_close(loads["stem.weight[0]"], entered)


@pytest.mark.parametrize(
    ("name", "behind"), [("first", "up"), ("second", "down"), ("last", "head")]
)
def test_pre_activation_blocks_of_the_same_function_have_the_same_focus(name, behind):
    """Scales that move between a norm and the weights behind it.

    As with any weights, those of neighbouring layers may change if they move beyond a ReLU.
    """
    torch.manual_seed(0)
    model = drawn(Block(before=True))
    twin = copy.deepcopy(model)
    norm, weight = getattr(twin, name), getattr(twin, behind).weight
    s = torch.rand(weight.shape[1]).double() * 10 + 0.1
    with torch.no_grad():
        norm.weight *= s
        norm.bias *= s
        weight /= s.reshape(1, -1, *[1] * (weight.dim() - 2))
    x = normal(4, 2, 5)
    if name != "second":
        return same(model, twin, x)
    torch.testing.assert_close(model(x), twin(x))
    (phi, paths), (moved, moved_paths) = focus(model, x), focus(twin, x)
    np.testing.assert_allclose(moved_paths, paths, rtol=1e-10)
    np.testing.assert_allclose(moved[1], phi[1], rtol=1e-10)
    return None


class ByHand(nn.Module):
    """Scales of a branch that are written out."""

    def __init__(self, scaled: Callable[[ByHand, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.branch = nn.Linear(3, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.gamma = nn.Parameter(normal(4))
        self.register_buffer("one", torch.tensor(0.3))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((x + self.scaled(self, self.branch(x))).relu())


@pytest.mark.parametrize(
    ("scaled", "by"),
    [
        (lambda m, x: x * m.gamma, lambda m: m.gamma),
        (lambda m, x: m.gamma[None] * x, lambda m: m.gamma),
        (lambda m, x: x / m.gamma, lambda m: 1 / m.gamma),
        (lambda m, x: (x + 0).relu_().mul_(m.gamma.exp()), lambda m: m.gamma.exp()),
        (lambda m, x: (x * m.one).relu() * m.gamma, lambda m: m.one * m.gamma),
        (lambda m, x: m.one * x, lambda m: m.one.expand(4)),
    ],
)
def test_vectors_and_numbers_along_nodes_belong_to_the_weight_that_writes(scaled, by):
    torch.manual_seed(0)
    model = ByHand(scaled).double()
    (stream,), (load,) = (found.values() for found in of(model, normal(4, 3)))
    one, branch, last = (m.weight.detach() for m in (model.first, model.branch, model.last))
    folded = branch * by(model).detach()[:, None]
    writes = one.square().sum(1) + folded.square().sum(1)
    # The same numbers read the stream.
    reads = folded.square().sum(0) + last.square().sum(0)
    torch.testing.assert_close(stream, torch.stack([writes, reads]))
    into, out, on = one.abs().sum(1), last.abs().sum(0), folded.abs()
    torch.testing.assert_close(load, into * (out + out @ on) + (on @ into) * out)


def test_data_and_constants_are_no_scales():
    torch.manual_seed(0)
    x = normal(4, 3)
    plain = ByHand(lambda m, x: x).double()
    for scaled in (lambda m, x: 3 * x, lambda m, x: x * x.sigmoid()):
        other = ByHand(scaled).double()
        other.load_state_dict(plain.state_dict())
        for a, b in zip(of(plain, x), of(other, x), strict=True):
            torch.testing.assert_close(list(a.values()), list(b.values()))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(5),
        lambda: nn.GroupNorm(1, 5),
        lambda: nn.BatchNorm1d(5, track_running_stats=False),
    ],
)
def test_norms_by_the_samples_count_by_their_weight_alone(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), norm(), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.normal_(model[1].weight)
    ((found,), _) = (one.values() for one in of(model, normal(4, 6)))
    w1, w2 = (model[i].weight.detach().square() for i in (0, 3))
    expected = torch.stack([w1.sum(1) * model[1].weight.detach() ** 2, w2.sum(0)])
    torch.testing.assert_close(found, expected)


def test_norms_of_inputs_belong_to_the_weights_that_read_them():
    torch.manual_seed(0)
    model = drawn(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    norm, folded = model[0], copy.deepcopy(model[1])
    signed = scale(norm) * norm.weight.sign()
    with torch.no_grad():
        folded.bias += folded.weight @ (norm.bias - signed * norm.running_mean)
        folded.weight *= signed
    alike(model, nn.Sequential(folded, *model[2:]), normal(4, 6))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        one, other = (norm(self.first(x)).relu() for norm in self.norms)
        return self.last(one + other)


def test_a_weight_that_is_called_with_several_scales_has_their_mean_square():
    torch.manual_seed(0)
    model = drawn(Shared())
    (found,), (load,) = (one.values() for one in of(model, normal(4, 3)))
    a, b = (scale(norm) for norm in model.norms)
    w1, w2 = model.first.weight.detach(), model.last.weight.detach()
    writes = w1.square().sum(1) * (a**2 + b**2) / 2
    torch.testing.assert_close(found, torch.stack([writes, w2.square().sum(0)]))
    torch.testing.assert_close(load, w1.abs().sum(1) * (a + b) * w2.abs().sum(0))


def test_shuffled_weights_are_those_folded():
    model = dense()
    with frozen(model):
        nodes = Nodes(model, nt.Probe(normal(4, 6)), 0)
        (own,) = nodes.strengths().values()
        (moved,) = nodes.shuffled(torch.Generator().manual_seed(0)).values()
    torch.testing.assert_close(own.sum(1), moved.sum(1))
    assert not torch.allclose(own, moved)


def test_scales_that_are_not_finite_are_refused():
    model = dense()
    model[1].running_var[0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.running_var.* are not finite"):
        of(model, normal(4, 6))
