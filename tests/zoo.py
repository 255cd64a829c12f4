"""Small but true members of model families, each with the feature that makes it hard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

N = 4


@dataclass(frozen=True)
class Member:
    """A model, a batch of `N` samples, and how to get outputs (N, ...) from them."""

    model: nn.Module
    batch: Tensor | tuple[Tensor, ...]
    forward: Callable[[nn.Module, object], Tensor]
    routes: frozenset[str] = frozenset({"rule"})

    def take(self, n: int) -> Tensor | tuple[Tensor, ...]:
        """The batch with sample `n` alone."""
        if isinstance(self.model, Graphs):
            nodes, graph = self.batch
            return nodes[graph == n], graph[graph == n] * 0
        if isinstance(self.batch, Tensor):
            return self.batch[n : n + 1]
        return tuple(part[n : n + 1] for part in self.batch)


def call(model: nn.Module, batch: object) -> Tensor:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def last_token(model: nn.Module, batch: object) -> Tensor:
    return call(model, batch)[:, -1, :7]


# The four of the house --------------------------------------------------------------------------


class CNN(nn.Module):
    """Groups, BatchNorm with its own statistics, GroupNorm and a raw scale."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.group_norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            self.batch_norm.running_mean.normal_()
            self.batch_norm.running_var.uniform_(0.5, 2)
            self.batch_norm.weight.normal_()
            self.group_norm.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.batch_norm(self.first(x)))
        x = F.silu(self.group_norm(self.second(x))) * self.scale
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tied embeddings, nn.MultiheadAttention, raw positions."""

    def __init__(self, vocabulary: int = 50, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", torch.full((length, length), -math.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x, self.mask.to(x.dtype))
        return F.linear(self.norm(x), self.embedding.weight)


class ViT(nn.Module):
    """Patches by convolution, a class token, learned positions."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width) * 0.1)
        self.block = Block(width, 2)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.block(x)[:, 0])


# More of the same rules -------------------------------------------------------------------------


class Convolutions(nn.Module):
    """One, two and three dimensions, dilation, transposition, depth-wise groups, paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, dilation=2, padding=2)
        self.up = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2, output_padding=1)
        self.depth = nn.Conv1d(6, 6, 3, groups=6, padding=1, padding_mode="circular")
        self.two = nn.Conv2d(6, 3, (3, 2), padding=(1, 1), bias=False)
        self.three = nn.Conv3d(3, 2, (2, 2, 1), stride=(1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depth(torch.tanh(self.up(torch.tanh(self.one(x))))))
        x = x.unflatten(2, (-1, 3))
        x = torch.tanh(self.two(x))
        x = self.three(x.unsqueeze(-1).expand(-1, -1, -1, -1, 2))
        return x.flatten(2).mean(2)


class Recurrent(nn.Module):
    """One cell called at every step, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for frame in x.transpose(0, 1):
            h = self.cell(frame, h)
        return self.head(h)


class TimeFirst(nn.Module):
    """A linear layer on (time, batch, features), then images folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.convolution = nn.Conv2d(1, 2, 3, bias=False)
        self.norm = nn.InstanceNorm2d(2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = torch.tanh(self.linear(x.transpose(0, 1)))  # (T, N, 8)
        y = y.transpose(0, 1).reshape(n * t, 1, 2, 4)
        y = F.pad(y, (1, 1, 1, 1))
        y = self.norm(self.convolution(y))
        return torch.tanh(y).reshape(n, t, -1).sum(1)[:, :3]


class Router(nn.Module):
    """Tokens are gathered by the expert they choose: ragged rows, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights = self.gate(tokens).softmax(-1)
        chosen = weights.argmax(-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).nonzero().flatten()
            out = out.index_add(0, rows, torch.tanh(expert(tokens[rows])) * weights[rows, e, None])
        return self.head(out.view_as(x).mean(1))


class Graphs(nn.Module):
    """Message passing on one batched graph; the samples are the graphs, of different sizes."""

    sizes = (3, 5, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(3, 6)
        self.update = nn.Linear(6, 6)
        self.read = nn.Linear(6, 2)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        edges = graph[:, None] == graph[None, :]
        h = torch.tanh(self.message(x))
        h = torch.tanh(self.update(edges.to(x.dtype) @ h))
        pooled = h.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, h)
        return self.read(pooled)


class LowRank(nn.Module):
    """Weights computed from parameters: a product, a gate, weight and spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.base.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 6))
        self.b = nn.Parameter(torch.randn(6, 2))
        self.gate = nn.Parameter(torch.tensor(0.3))
        self.normed = parametrizations.weight_norm(nn.Linear(6, 5))
        self.spectral = parametrizations.spectral_norm(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + torch.sigmoid(self.gate) * self.b @ self.a
        x = torch.tanh(F.linear(x, weight, self.base.bias))
        return self.spectral(torch.tanh(self.normed(x)))


class Shared(nn.Module):
    """One layer called twice, one weight also used transposed, one parameter never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.gain = nn.Parameter(torch.randn(5))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x * self.gain))
        x = torch.tanh(self.layer(x) / (2 + self.gain**2))
        return x @ self.layer.weight + self.gain


class Attention(nn.Module):
    """Query and key differ, so that slices of one projection are used; learned queries; einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.positions = nn.Embedding(8, 8)
        self.heads = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1]))
        y, _ = self.attention(self.queries.expand(len(x), -1, -1), x, x)
        return torch.einsum("nqhd,hde->nqe", y.unflatten(2, (2, 4)), self.heads).mean(1)


class Normalised(nn.Module):
    """RMSNorm, PReLU, bilinear, embedding bag and a custom autograd function: some have no rule."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, power):
            ctx.save_for_backward(x, weight)
            return x**power * weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g * 2 * x * weight, (g * x**2).sum(0), None

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.activation = nn.PReLU(4)
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.bag = nn.EmbeddingBag(9, 4, mode="mean")
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.activation(self.norm(x)) + self.bag(tokens)
        return self.Square.apply(self.bilinear(x, torch.tanh(x)), self.weight, 2)


class Fourier(nn.Module):
    """Complex weights between a Fourier transform and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.cfloat))
        self.mix = nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat))
        self.head = nn.Linear(3 * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :4]
        modes = torch.einsum("nik,iok->nok", modes, self.weight)
        modes = (modes.mT @ self.mix).mT
        return self.head(torch.tanh(torch.fft.irfft(modes, n=8)).flatten(1))


class Forces(nn.Module):
    """The output is a gradient with respect to the input, as for atomic forces and PINNs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU())
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.head(self.net(x))
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, -force], 1)


def mlp() -> Member:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))
    return Member(model, torch.randn(N, 5), call)


ZOO: dict[str, Callable[[], Member]] = {
    "mlp": mlp,
    "cnn": lambda: Member(CNN(), torch.randn(N, 3, 8, 8), call),
    "gpt": lambda: Member(GPT(), torch.randint(0, 50, (N, 8)), last_token),
    "vit": lambda: Member(ViT(), torch.randn(N, 3, 8, 8), call),
    "convolutions": lambda: Member(Convolutions(), torch.randn(N, 2, 10), call),
    "recurrent": lambda: Member(Recurrent(), torch.randn(N, 6, 3), call),
    "time-first": lambda: Member(TimeFirst(), torch.randn(N, 5, 3), call),
    "router": lambda: Member(Router(), torch.randn(N, 6, 4), call),
    "graphs": lambda: Member(
        Graphs(),
        (
            torch.randn(sum(Graphs.sizes), 3),
            torch.arange(N).repeat_interleave(torch.tensor(Graphs.sizes)),
        ),
        call,
    ),
    "low-rank": lambda: Member(LowRank(), torch.randn(N, 6), call),
    "shared": lambda: Member(Shared(), torch.randn(N, 5), call, frozenset({"rule", "unused"})),
    "attention": lambda: Member(Attention(), torch.randn(N, 8, 8), call),
    "no-rule": lambda: Member(
        Normalised(),
        (torch.randn(N, 4), torch.randint(0, 9, (N, 3))),
        call,
        frozenset({"rule", "node"}),
    ),
    "fourier": lambda: Member(Fourier(), torch.randn(N, 2, 8), call),
    "forces": lambda: Member(Forces(), torch.randn(N, 3), call),
}

HOUSE = ("mlp", "cnn", "gpt", "vit")


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Member:
    """A member, in eval mode, from a fixed seed."""
    torch.manual_seed(seed)
    member = ZOO[name]()
    wide = {torch.float64: torch.complex128, torch.float32: torch.complex64}[dtype]

    def cast(t: Tensor) -> Tensor:
        return (
            t.to(wide if t.is_complex() else dtype)
            if t.dtype.is_floating_point or t.is_complex()
            else t
        )

    model = member.model._apply(cast).eval()
    batch = member.batch
    parts = batch if isinstance(batch, tuple) else (batch,)
    parts = tuple(p.to(dtype) if p.is_floating_point() else p for p in parts)
    return Member(
        model, parts if isinstance(batch, tuple) else parts[0], member.forward, member.routes
    )
