"""Where samples lie, as derived from the operations, is where the tape itself says they lie."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from nettrace.layout import Layout, layouts
from nettrace.ownership import _Entry, _ownerships
from nettrace.tape import Tape

N = 4


def compare(outputs, parameters, constants=()):
    """Every derived layout against what scaling the samples' cotangents does to each gradient.

    Returns:
        How many layouts were derived, and of how many edges.
    """
    tape = Tape.behind(outputs, parameters, constants)
    derived = layouts(tape)
    nodes = [node for node in tape.nodes if node not in tape.weights]
    roots = [_Entry.of(root, N, 0) for root in tape.roots]
    found = dict(_ownerships(roots, nodes, (), 2**30))
    count = 0
    for edge, owned in found.items():
        layout = derived.get(edge)
        if not isinstance(layout, Layout):
            continue
        count += 1
        assert owned is not None, f"{edge[0].name()} mixes samples"
        axis = owned.axes.get(layout.dim)
        assert axis is not None, f"{edge[0].name()} has no samples along axis {layout.dim}"
        numbers = torch.arange(len(axis.owners)) // layout.inner % tape.samples
        assert bool(((axis.owners == numbers) | (axis.owners < 0)).all()), edge[0].name()
    return count, len(found)


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n != "compiled-inductor"])
def test_derived_layouts_are_true_of_every_member(name):
    member = zoo.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = member.forward(member.model, member.batch)
    constants = [*member.model.buffers(), *member.model.parameters()]
    compare(outputs, member.parameters, constants)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "gpt", "vit", "llama", "gru", "u-net"])
def test_whole_networks_are_derived(name):
    member = zoo.build(name)
    outputs = member.forward(member.model, member.batch)
    derived, edges = compare(outputs, member.parameters, list(member.model.buffers()))
    assert derived == edges


#: From h, (N, 6, 8), to anything with samples first; all within samples.
WITHIN = {
    "reshape": lambda h: h.reshape(N * 6, 8).tanh().view(N, 2, 3, 8).flatten(1),
    "time first": lambda h: (
        h.transpose(0, 1).reshape(6 * N, 8).tanh().view(6, N, 8).transpose(0, 1)
    ),
    "last": lambda h: h.movedim(0, -1).tanh().movedim(-1, 0),
    "folded into channels": lambda h: h.permute(1, 0, 2).reshape(6, N * 8).sin().view(6, N, 8)[1],
    "softmax": lambda h: h.softmax(1).log_softmax(-1),
    "reductions": lambda h: h.mean(1) + h.sum(1) + h.amax(1) + h.var(1) + h.norm(dim=1),
    "kept": lambda h: h - h.mean((1, 2), keepdim=True) + h.logsumexp(2, keepdim=True),
    "parts": lambda h: torch.cat([*h.split(3, 1), *h.unbind(1)[2][:, None].chunk(1, -1)], 1),
    "stack": lambda h: torch.stack([h[:, 0], h[:, 1]], 1).squeeze().unsqueeze(-1),
    "select": lambda h: h[:, 2] * h.select(2, 1).narrow(1, 0, 1),
    "index": lambda h: h[:, [0, 3]] + h.index_select(1, torch.tensor([1, 1])),
    "gather": lambda h: h.gather(2, torch.zeros(N, 6, 2).long()),
    "along": lambda h: h.cumsum(1).flip(1).roll(2, 1).sort(1)[0],
    "pad": lambda h: F.pad(h, (1, 2, 0, 1)),
    "windows": lambda h: h.unfold(1, 3, 1),
    "attention": lambda h: F.scaled_dot_product_attention(*[h.unflatten(2, (2, 4)).mT] * 3),
    "products": lambda h: h @ h.mT + torch.einsum("nij,nkj->nik", h, h),
    "baddbmm": lambda h: torch.baddbmm(h.new_zeros(1, 6, 6), h, h.mT),
    "convolution": lambda h: F.conv1d(h, torch.ones(3, 6, 3).double()).relu(),
    "pools": lambda h: F.max_pool2d(h[:, None], 2) + F.avg_pool2d(h[:, None], 2),
    "norms": lambda h: F.layer_norm(h, (8,)) + F.group_norm(h, 2) + F.instance_norm(h),
    "spectrum": lambda h: torch.fft.irfft(torch.fft.rfft(h)),
    "losses": lambda h: F.mse_loss(h, torch.zeros_like(h), reduction="none").sum(1),
    "classes": lambda h: F.cross_entropy(h, torch.zeros(N, 8).long(), reduction="none"),
    "double backward": lambda h: torch.autograd.grad(
        torch.tanh(h).square().sum(), h, create_graph=True
    )[0],
}


@pytest.mark.parametrize("name", WITHIN)
def test_derived_layouts_are_true_of_operations(name):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    h = layer(torch.randn(N, 6, 8).double())
    derived, edges = compare(WITHIN[name](h).exp(), dict(layer.named_parameters()))
    assert derived == edges


#: Operations that move samples or mix them, though they look like those above.
ACROSS = {
    "roll of all": lambda h: h.roll(5),
    "roll": lambda h: h.roll(1, 0),
    "flip": lambda h: h.flip(0),
    "shift by padding": lambda h: F.pad(h, (0, 0, 0, 0, 1, -1)),
    "spread of all": lambda h: h / h.std(),
    "norm of all": lambda h: h / h.norm(),
    "sorted": lambda h: h.sort(0)[0],
    "softmax": lambda h: h.softmax(0),
    "batch as rows": lambda h: (h.flatten(1) @ h.flatten(1).T) @ h.flatten(1),
    "taken apart": lambda h: torch.stack(h.unbind(0)[::-1]),
    "joined": lambda h: torch.cat([h[2:], h[:2]]),
    "indexed": lambda h: h[torch.tensor([1, 2, 3, 0])],
    "indexed twice": lambda h: h[:, torch.arange(N), :, None][..., torch.zeros(N).long()].transpose(
        0, 1
    ),
    "reshaped": lambda h: h.reshape(6, N, 8).transpose(0, 1),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "images": lambda h: F.max_pool2d(h.movedim(0, 1), 2).movedim(1, 0).repeat(2, 1, 1),
}


@pytest.mark.parametrize("name", ACROSS)
def test_nothing_false_is_derived_where_samples_move(name):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    outputs = ACROSS[name](layer(torch.randn(N, 6, 8).double())).exp()
    tape = Tape.behind(outputs, dict(layer.named_parameters()), ())
    (use,) = {use.node for use in tape.uses() if use.node.name() == "AddmmBackward0"}
    assert layouts(tape).get((use, 0)) != Layout(0, 6)
    compare(outputs, dict(layer.named_parameters()))
