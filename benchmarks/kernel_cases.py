"""What kernels are timed on, and what they are held against: layers of networks as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Arguments: TypeAlias = tuple[Any, ...]
#: Samples, tokens, inputs and outputs.
LINEAR = {
    "ViT-B qkv": (32, 197, 768, 2304),
    "ViT-B MLP": (32, 197, 768, 3072),
    "ViT-B MLP, N = 128": (128, 197, 768, 3072),
    "GPT-2 projection": (16, 1024, 768, 768),
    "GPT-2 MLP": (16, 1024, 768, 3072),
    "ResNet-50 1x1, stage 3": (64, 196, 1024, 256),
    "ResNet-50 1x1, stage 4": (64, 49, 512, 2048),
    "small T": (256, 16, 768, 768),
    "MLP, T = 1": (1024, 1, 1024, 1024),
}
GRAM = {
    "T = 8": (128, 8, 768, 768),
    "T = 16": (128, 16, 768, 3072),
    "T = 32": (64, 32, 768, 768),
    "T = 64": (64, 64, 768, 3072),
    **{name: LINEAR[name] for name in ("ViT-B qkv", "small T", "MLP, T = 1")},
}
#: Samples, channels, height and width, filters, and their size, stride, padding and groups.
CONV = {
    "ResNet-50 3x3, stage 1": (64, 64, 56, 56, 64, 3, 1, 1, 1),
    "ResNet-50 3x3, stage 2, stride 2": (64, 128, 56, 56, 128, 3, 2, 1, 1),
    "ResNet-50 3x3, stage 3": (64, 256, 14, 14, 256, 3, 1, 1, 1),
    "ResNet-50 3x3, stage 4": (64, 512, 7, 7, 512, 3, 1, 1, 1),
}
COLUMNS = 64


@dataclass(frozen=True)
class Op:
    """An operation, by its name in `nettrace.kernels`.

    Args:
        name: of it.
        shapes: by title, for which it is timed.
        small: a shape for which it is checked.
        make: arguments of a shape, in a type, on a device, from a seed.
        truth: from arguments in float64, what it is to return first, as one einsum has it, and
            perhaps second.
        forms: by name, the same in operations of torch.
        operations: floating point operations for a shape; 0 where memory alone is waited for.
        plain: a forward and backward pass of the layer, if it is one.
        goals: what is to be shown.
        tables: those in `nettrace.kernels.configurations` that it is launched by, and with which
            options.
        types: of numbers.
    """

    name: str
    shapes: dict[str, Shape]
    small: Shape
    make: Callable[[Shape, torch.dtype, str, int], Arguments]
    truth: Callable[..., tuple[Tensor, ...]]
    forms: dict[str, Callable[..., object]]
    operations: Callable[[Shape], float]
    goals: str
    plain: Callable[..., object] | None = None
    tables: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def drawn(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=random, device=device).to(dtype)


def linear(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    n, t, i, o = shape
    return (
        drawn((n, t, i), dtype, device, 2 * seed),
        drawn((n, t, o), dtype, device, 2 * seed + 1),
    )


def written(a: Tensor, g: Tensor) -> Tensor:
    """(N, I, O) gradients sample by sample."""
    return torch.einsum("nti,nto->nio", a, g)


def plain_linear(a: Tensor, g: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """The three products of a forward and backward pass."""
    weight = g.new_empty((a.shape[2], g.shape[2]))
    return a @ weight, g @ weight.mT, a.flatten(0, 1).mT @ g.flatten(0, 1)


def norms_by_tokens(a: Tensor, g: Tensor) -> Tensor:
    return ((a @ a.mT) * (g @ g.mT)).sum((1, 2), dtype=torch.float32)


def norms_written(a: Tensor, g: Tensor) -> Tensor:
    return (a.mT @ g).square().sum((1, 2), dtype=torch.float32)


def gram_by_tokens(a: Tensor, g: Tensor) -> Tensor:
    n, t, _ = a.shape
    x, y = a.flatten(0, 1), g.flatten(0, 1)
    return ((x @ x.T) * (y @ y.T)).view(n, t, n, t).sum((1, 3), dtype=torch.float32)


def gram_written(a: Tensor, g: Tensor) -> Tensor:
    p = (a.mT @ g).flatten(1)
    return p @ p.T


def with_gradient(norms: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., object]:
    """Norms and the gradient of the weight, each by itself."""
    return lambda a, g: (norms(a, g), a.flatten(0, 1).mT @ g.flatten(0, 1))


def moments_truth(a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    p = written(a, g)
    return torch.einsum("nio,nio->n", p, p), p.sum(0)


def gram_truth(a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return (torch.einsum("nti,msi,nto,mso->nm", a, a, g, g),)


def tokens(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    n, t, d, vocabulary = shape
    random = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(vocabulary, (n, t), generator=random, device=device)
    return ids, drawn((n, t, d), dtype, device, seed)


def embedding_truth(ids: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    same = (ids[:, :, None, None] == ids[None, None]).to(g.dtype)
    return (torch.einsum("ntms,ntd,msd->nm", same, g, g),)


def embedding_added(ids: Tensor, g: Tensor) -> Tensor:
    """Opacus's way: the rows that are looked up, each sample's gradients added up in them."""
    n, t, d = g.shape
    rows, places = ids.unique(return_inverse=True)
    found = g.new_zeros((n * len(rows), d), dtype=torch.float32)
    at = places + len(rows) * torch.arange(n, device=g.device)[:, None]
    found.index_add_(0, at.flatten(), g.flatten(0, 1).float())
    found = found.view(n, -1)
    return found @ found.T


def projected(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    a, g = linear(shape, dtype, device, seed)
    ra, rg = (
        drawn((x.shape[2], COLUMNS), torch.float32, device, s).sign().to(dtype) / COLUMNS**0.5
        for x, s in ((a, 1), (g, 2))
    )
    return a, g, ra, rg


def sketch_truth(a: Tensor, g: Tensor, ra: Tensor, rg: Tensor) -> tuple[Tensor, ...]:
    return (torch.einsum("nti,nto,ik,oj->nkj", a, g, ra, rg),)


def images(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    n, c, h, w, filters, size, stride, padding, groups = shape
    places = [(length + 2 * padding - size) // stride + 1 for length in (h, w)]
    x, gy = (
        drawn((n, c, h, w), dtype, device, 2 * seed),
        drawn((n, filters, *places), dtype, device, 2 * seed + 1),
    )
    x, gy = (z.to(memory_format=torch.channels_last) for z in (x, gy))
    return x, gy, [size] * 2, [stride] * 2, [padding] * 2, [1] * 2, groups


def conv_truth(x: Tensor, gy: Tensor, *geometry: Any) -> tuple[Tensor, ...]:
    """By autograd, sample by sample."""
    size, stride, padding, dilation, groups = geometry
    weight = x.new_zeros((gy.shape[1], x.shape[1] // groups, *size), requires_grad=True)
    found = []
    with torch.enable_grad():
        for one, g in zip(x, gy, strict=True):
            out = F.conv2d(one[None], weight, None, stride, padding, dilation, groups)
            found.append(torch.autograd.grad(out, weight, g[None])[0])
    p = torch.stack(found)
    return p.square().sum((1, 2, 3, 4)), p.sum(0)


def conv_unfolded(x: Tensor, gy: Tensor, *geometry: Any) -> tuple[Tensor, ...]:
    size, stride, padding, dilation, groups = geometry
    met = F.unfold(x, size, dilation, padding, stride).unflatten(1, (groups, -1))
    p = gy.flatten(2).unflatten(1, (groups, -1)) @ met.mT
    return p.square().sum((1, 2, 3), dtype=torch.float32), p.sum(0)


def plain_conv(x: Tensor, gy: Tensor, *geometry: Any) -> object:
    size, stride, padding, dilation, groups = geometry
    weight = x.new_empty((gy.shape[1], x.shape[1] // groups, *size))
    F.conv2d(x, weight, None, stride, padding, dilation, groups)
    rest = (None, stride, padding, dilation, False, [0, 0], groups, [True, True, False])
    return torch.ops.aten.convolution_backward(gy, x, weight, *rest)


def normalised(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    x, dy = (drawn(shape, dtype, device, 2 * seed + k) for k in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(wide), -1, correction=0)
    return x, dy, mean, (variance + 1e-5).rsqrt()


def affine_truth(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    return torch.einsum("ntd,ntd,nt->nd", x - mean[..., None], dy, rstd), dy.sum(1)


def affine_eager(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    y = (x.float() - mean[..., None]) * rstd[..., None]
    return (y * dy.float()).sum(1), dy.sum(1, dtype=torch.float32)


def plain_norm(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> object:
    weight = x.new_ones(x.shape[-1])
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, weight, 1e-5)
    rest = (x.shape[-1:], mean, rstd, weight, weight, [True, True, True])
    return torch.ops.aten.native_layer_norm_backward(dy, x, *rest)


def network(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
    """Weights of a transformer of some blocks, width and vocabulary, and their state."""
    blocks, width, vocabulary = shape
    one = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes = [(vocabulary, width), (1024, width)]
    shapes += [*one, (3 * width,), (4 * width,), *[(width,)] * 6] * blocks
    weights, previous, means = (
        [drawn(s, kind, device, seed + 7 * k + i) for i, s in enumerate(shapes)]
        for k, kind in enumerate((dtype, dtype, torch.promote_types(dtype, torch.float32)))
    )
    squares = [m.square() for m in means]
    return weights, means, squares, 5, previous


def welford_truth(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> tuple[Tensor, ...]:
    rows = []
    for w, m, s, p in zip(weights, means, squares, previous, strict=True):
        mean = m + (w - m) / count
        v = (s + (w - m) * (w - mean)) / count
        columns = ((w - mean) ** 2, (w - p) ** 2, w**2, v, v**2, w * (w - p))
        rows.append(torch.stack([c.sum() for c in columns]))
    return (torch.stack(rows),)


def welford_eager(
    weights: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    count: int,
    previous: list[Tensor],
) -> Tensor:
    d = torch._foreach_sub(weights, means)
    torch._foreach_add_(means, d, alpha=1 / count)
    torch._foreach_addcmul_(squares, d, d, value=(count - 1) / count)
    moved, off = torch._foreach_sub(weights, previous), torch._foreach_sub(weights, means)
    v = torch._foreach_div(squares, count)
    columns = [torch._foreach_norm(x) for x in (off, moved, weights, v)]
    columns.append(torch._foreach_norm(v, 1))
    columns.append([x.sum() for x in torch._foreach_mul(weights, moved)])
    torch._foreach_copy_(previous, weights)
    return torch.stack([torch.stack(list(c)) for c in columns], 1)


def _conv_operations(shape: Shape) -> float:
    n, c, h, w, filters, size, stride, padding, groups = shape
    places = math.prod((x + 2 * padding - size) // stride + 1 for x in (h, w))
    return 2 * n * places * c // groups * filters * size**2


OPS = (
    Op(
        "psg_moments",
        LINEAR,
        (3, 5, 7, 6),
        linear,
        moments_truth,
        {"ghost": with_gradient(norms_by_tokens), "written": with_gradient(norms_written)},
        lambda s: 2 * math.prod(s),
        "65 % of the bf16 ceiling at T >= 128; 1.3 times (ViT-B) and 1.6 times (GPT-2, ResNet-50) "
        "as fast as weight gradient and norms in torch",
        plain_linear,
        {"PSG": {}, "PSG_SQUARES": {"sq": True}},
    ),
    Op(
        "ghost_sqnorm",
        LINEAR,
        (3, 5, 7, 6),
        linear,
        lambda a, g: (torch.einsum("nti,nsi,nto,nso->n", a, a, g, g),),
        {"ghost": norms_by_tokens, "written": norms_written},
        lambda s: s[0] * s[1] ** 2 * (s[2] + s[3]),
        "none",
        plain_linear,
        {"GHOST_NORM": {}},
    ),
    Op(
        "ghost_gram",
        GRAM,
        (4, 5, 7, 6),
        linear,
        gram_truth,
        {"ghost": gram_by_tokens, "written": gram_written},
        lambda s: (s[0] * s[1]) ** 2 * (s[2] + s[3]),
        "1.5 times as fast as torch at T of 8 to 64",
        plain_linear,
        {"GHOST": {}, "GHOST_SHORT": {}},
    ),
    Op(
        "embedding_gram",
        {"GPT-2 tokens": (32, 1024, 768, 50257)},
        (3, 5, 7, 4),
        tokens,
        embedding_truth,
        {"added up": embedding_added},
        lambda s: (s[0] * s[1]) ** 2 * s[2] / s[3],
        "none",
        None,
        {"EMBEDDING": {}},
    ),
    Op(
        "kron_sketch",
        {name: LINEAR[name] for name in list(LINEAR)[:-1]},
        (3, 5, 7, 6),
        projected,
        sketch_truth,
        {"three products": lambda a, g, ra, rg: (a @ ra).mT @ (g @ rg)},
        lambda s: 2 * s[0] * s[1] * COLUMNS * (s[2] + s[3] + COLUMNS),
        "1.6 times as fast as three products in torch",
        plain_linear,
        {"SKETCH": {}},
    ),
    Op(
        "conv_psg",
        CONV,
        (3, 32, 6, 5, 48, 3, 1, 1, 2),
        images,
        conv_truth,
        {"unfolded": conv_unfolded},
        _conv_operations,
        "twice as fast as unfold and products in torch",
        plain_conv,
        {"CONV_PSG": {}, "CONV_PSG_SQUARES": {"sq": True}},
    ),
    Op(
        "affine_psg",
        {"ViT-B": (128, 197, 768), "GPT-2": (16, 1024, 768), "Llama": (8, 2048, 2048)},
        (3, 5, 7),
        normalised,
        affine_truth,
        {"formula": affine_eager},
        lambda s: 0,
        "85 % of copy bandwidth, 3 times as fast as eager torch",
        plain_norm,
        {"AFFINE": {}},
    ),
    Op(
        "weight_welford_",
        {"GPT-2": (12, 768, 50257)},
        (1, 8, 11),
        network,
        welford_truth,
        {"foreach": welford_eager},
        lambda s: 0,
        "85 % of copy bandwidth, 3 times as fast as eager torch",
        None,
        {"MOMENTS": {}},
    ),
)
