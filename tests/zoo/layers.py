"""Models of everyday layers: the house models, and what can be hard about common modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from zoo.member import N, last_token, member


@member("mlp", "W5", lambda: torch.randn(N, 5))
def plain_regressor() -> nn.Module:
    """The plain regressor."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))


# The models of the house -------------------------------------------------------------------------


@member("cnn", "", lambda: torch.randn(N, 3, 8, 8))
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


@member("gpt", "W10", lambda: torch.randint(0, 50, (N, 8)), forward=last_token)
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


@member("vit", "", lambda: torch.randn(N, 3, 8, 8))
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


@member("convolutions", "", lambda: torch.randn(N, 2, 10))
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


@member("recurrent", "W9", lambda: torch.randn(N, 6, 3))
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


@member("time-first", "W9", lambda: torch.randn(N, 5, 3))
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


@member("router", "W7", lambda: torch.randn(N, 6, 4))
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


@member("low-rank", "", lambda: torch.randn(N, 6))
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


@member("shared", "", lambda: torch.randn(N, 5), "rule unused")
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


@member("attention", "", lambda: torch.randn(N, 8, 8))
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


@member("no-rule", "", lambda: (torch.randn(N, 4), torch.randint(0, 9, (N, 3))), "rule node")
class Normalised(nn.Module):
    """RMSNorm, PReLU, bilinear, a bag; a custom function and an exponent, which have no rule."""

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
        self.power = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.activation(self.norm(x)) + self.bag(tokens)
        x = self.bilinear(x, torch.tanh(x).abs() ** self.power)
        return self.Square.apply(x, self.weight, 2)


@member("resnet", "W5", lambda: torch.randn(N, 3, 8, 8))
class ResNet(nn.Module):
    """Convolutions with batch normalisation around identities, one of them projected."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shortcut = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.blocks = nn.ModuleList([self.branch(4, 4, 1), self.branch(4, 6, 2)])
        self.head = nn.Linear(6, 3)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)

    @staticmethod
    def branch(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.blocks[0](x))
        x = F.relu(self.shortcut(x) + self.blocks[1](x))
        return self.head(x.mean((2, 3)))


@member("paddings", "", lambda: torch.randn(N, 2, 6, 6))
class Paddings(nn.Module):
    """Reflected, replicated and circular borders; depthwise, pointwise, transposed filters."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.depth = nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="replicate")
        self.point = nn.Conv2d(8, 3, 1, bias=False)
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2, groups=3)
        self.circle = nn.Conv2d(3, 2, 3, stride=2, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.depth(torch.tanh(self.reflect(x))))
        x = F.max_pool2d(torch.tanh(self.up(self.point(x))), 2)
        return F.adaptive_avg_pool2d(self.circle(x), 1).flatten(1)


@member("u-net", "", lambda: torch.randn(N, 1, 4, 4, 4))
class UNet(nn.Module):
    """Three dimensions, a skip around interpolation, and a map as output."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 3, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(3, affine=True)
        self.middle = nn.Conv3d(3, 3, 3, padding="same", dilation=2)
        self.out = nn.Conv3d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.leaky_relu(self.norm(self.down(x)))
        x = torch.tanh(self.middle(F.avg_pool3d(skip, 2)))
        x = F.interpolate(x, scale_factor=2, mode="trilinear")
        return self.out(torch.cat([x, skip], 1))[:, 0, :2, 0, 0]


@member("bags", "", lambda: (torch.randint(1, 9, (N, 4)), torch.rand(N, 4)), "rule node")
class Bags(nn.Module):
    """Bags of words, flat with offsets, weighted, with padding; a table with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.EmbeddingBag(9, 4, mode="sum", padding_idx=3)
        self.weighted = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
        self.largest = nn.EmbeddingBag(9, 4, mode="max")
        self.table = nn.Embedding(9, 4, padding_idx=2)
        self.score = nn.Parameter(torch.randn(9))

    def forward(self, words: Tensor, weights: Tensor) -> Tensor:
        n, t = words.shape
        starts = torch.arange(0, n * t + 1, t)
        x = self.flat(words.flatten(), starts[:-1]) + self.largest(words)
        y = self.weighted(words.flatten(), starts, (weights * self.score[words]).flatten())
        return torch.tanh(x * y) + self.table(words).prod(1)


@member("tables", "W19", lambda: (torch.randint(0, 3, (N, 5)), torch.randint(0, 2, (N, 5))))
class Tables(nn.Module):
    """Values of states and actions, looked up by several indices at once, by gathering, by bag."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(3, 2))
        self.features = nn.Parameter(torch.randn(2, 3, 2))
        self.prior = nn.Parameter(torch.randn(1, 3))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        value = self.values[state, action - 2] + self.prior.expand(len(state), -1).gather(1, state)
        return (torch.tanh(value)[..., None] * self.features[action, state]).sum(1)


@member("in-place", "", lambda: torch.randn(N, 4))
class InPlace(nn.Module):
    """Results are written into slices of others; parameters are written there as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(6, 3)
        self.token = nn.Parameter(torch.randn(1))
        self.tail = nn.Parameter(torch.randn(2))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        h[:, :3] = self.first(x).relu_()
        h[:, 3] = self.token * x[:, 0]
        h[:, 4:] = self.tail
        h += self.shift
        h[:, 1:].mul_(2).sigmoid_()
        return self.second(h)


@member("masked", "W15", lambda: (torch.randn(N, 5, 3), torch.rand(N, 5) > 0.5))
class Masked(nn.Module):
    """A learned token where the mask is set; boolean rows; positions stacked and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(3))
        self.rows, self.columns = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 3))
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.where(mask[..., None], self.mask_token, x)
        h = torch.tanh(self.encode(h + torch.cat([self.rows, self.columns])))
        lost = torch.zeros_like(x).masked_scatter(mask[..., None], self.decode(h[mask]))
        return (lost - x * mask[..., None]).square().mean(1)


@member("orthogonal", "", lambda: torch.randn(N, 4))
class Parametrized(nn.Module):
    """Weights that are orthogonal, symmetric, positive, pruned, normalised by hand."""

    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).T

    def __init__(self) -> None:
        super().__init__()
        orthogonal = parametrizations.orthogonal
        self.exponential = orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp")
        self.cayley = orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
        self.reflections = orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
        self.symmetric = nn.Linear(4, 4)
        parametrize.register_parametrization(self.symmetric, "weight", self.Symmetric())
        self.log_scale = nn.Parameter(torch.randn(4, 4))
        self.standard = nn.Parameter(torch.randn(4, 2, 3))
        self.register_buffer("keep", (torch.rand(4, 4) > 0.3).float())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.cayley(torch.tanh(self.exponential(x))))
        x = torch.tanh(self.symmetric(torch.tanh(self.reflections(x))))
        x = F.linear(x, F.softplus(self.log_scale) * self.keep)
        w = self.standard
        w = (w - w.mean((1, 2), keepdim=True)) / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(x.view(-1, 2, 2), w, padding=1).mean(2)


@member("spectral-training", "W13", lambda: torch.randn(N, 4), training=True)
class SpectralTraining(nn.Module):
    """Power iteration changes buffers at every forward pass; so does a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.spectral_norm(nn.Linear(4, 5))
        self.head = torch.nn.utils.spectral_norm(nn.Linear(5, 2))
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(torch.tanh(self.normed(x)) / self.calls)


@member("dropout", "", lambda: torch.randn(N, 4, 4), alone=False, training=True)
class Dropout(nn.Module):
    """Units and channels are dropped at random; running statistics are kept on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.channels, self.units = nn.Dropout1d(0.3), nn.Dropout(0.3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.channels(x)))
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 1)), 0.1)
        return self.head(self.units(x - self.mean)).sum(1)


@member("ensemble", "", lambda: torch.randn(N, 3))
class Ensemble(nn.Module):
    """Functional calls of stacked parameters under vmap."""

    def __init__(self) -> None:
        super().__init__()
        models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(3)]
        stacked, _ = torch.func.stack_module_state(models)
        self.stack = nn.ParameterList(nn.Parameter(p.detach()) for p in stacked.values())
        self.names, self.base = list(stacked), [models[0].to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        def one(*parameters: Tensor) -> Tensor:
            named = dict(zip(self.names, parameters, strict=True))
            return torch.func.functional_call(self.base[0], named, (x,))

        return torch.func.vmap(one)(*self.stack).movedim(0, 1).flatten(1)


@member("per-sample-function", "", lambda: torch.randn(N, 3))
class PerSample(nn.Module):
    """The network is written for one sample and mapped over the batch; gradients come with it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            return self.net(x).sum()

        value, force = torch.func.vmap(lambda x: (energy(x), torch.func.grad(energy)(x)))(x)
        return torch.cat([value[:, None], force], 1)


@member("checkpointed", "", lambda: torch.randn(N, 4))
class Checkpointed(nn.Module):
    """What is saved for the backward pass is computed again, or kept elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(lambda x: torch.tanh(self.second(x)) * x, x, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            return self.head(torch.tanh(x))


class Plain(nn.Module):
    """A convolution, attention and a norm; called through a compiler, or in narrow numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolution(x)).mT
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x).mean(1)


def sequence() -> Tensor:
    return torch.randn(N, 2, 5)


def compiled(backend: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        torch.compiler.reset()
        return torch.compile(model, backend=backend)(x)

    return forward


# The first backend leaves the tape as it is; the others make one node of the network, by whose own
# backward everything is found.
for backend, routes in [("eager", "rule"), ("aot_eager", "node"), ("inductor", "node")]:
    name = f"compiled-{backend}".replace("_", "-")
    member(name, "", sequence, routes, forward=compiled(backend), alone=False)(Plain)


def autocast(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    return forward


# A dozen roundings of relative size 2^-8 and 2^-11.
for name, dtype, tolerance in [("bf16", torch.bfloat16, 5e-2), ("fp16", torch.float16, 6e-3)]:
    member(
        f"autocast-{name}",
        "",
        sequence,
        forward=autocast(dtype),
        dtype=torch.float32,
        tolerance=tolerance,
    )(Plain)


@member("complex", "W18", lambda: torch.randn(N, 3), forward=lambda m, x: torch.view_as_real(m(x)))
class ComplexNetwork(nn.Module):
    """Complex weights and outputs, which count as pairs of reals; a magnitude in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=torch.cfloat)
        self.filters = nn.Parameter(torch.randn(2, 1, 2, dtype=torch.cfloat))
        self.threshold = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.to(self.filters.dtype))
        z = z * torch.sigmoid(z.abs() + self.threshold) / (z.abs() + 0.1)
        return F.conv1d(z[:, None], self.filters).mean(2)
