"""Whole training steps whose weight gradients are made together with per-sample norms.

Each layer's weight gradient comes from the kernel that makes the squared norms of its samples'
gradients. The callbacks never do this, since weights would differ in rounding from those without
them: what they cost is timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernel_timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nettrace.kernels as kernels


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.norms = norms
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        a, g = (z if z.dim() == 3 else z.unsqueeze(1) for z in (x, gy))
        norms, totals, _ = kernels.psg_moments(a, g)
        biases = g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
        ctx.norms.append(norms + biases.square().sum(1))
        return gy @ weight, totals.T.to(weight.dtype), biases.sum(0).to(weight.dtype), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor]) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.norms = norms
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        gx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
        )
        scales, shifts = kernels.affine_psg(x, dy, mean.squeeze(-1), rstd.squeeze(-1))
        ctx.norms.append(scales.square().sum(1) + shifts.square().sum(1))
        return gx, scales.sum(0).to(weight.dtype), shifts.sum(0).to(weight.dtype), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, norms: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.norms, ctx.rows = norms, len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ctx.norms.append(kernels.embedding_sqnorm(ids, gy))
        return torch.ops.aten.embedding_dense_backward(gy, ids, ctx.rows, -1, False), None, None


class _Places(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norms: list[Tensor]) -> Tensor:
        ctx.norms = norms
        return x + weight

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.norms.append(_wide(gy).square().sum((1, 2)))
        return gy, gy.sum(0), None


class Linear(nn.Linear):
    """Notes its samples' squared norms, if it is given where."""

    norms: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.norms is None:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias, self.norms)


class Norm(nn.LayerNorm):
    """As `Linear`."""

    norms: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.norms is None:
            return super().forward(x)
        return _Norm.apply(x, self.weight, self.bias, self.norms)


class Rows(nn.Embedding):
    """As `Linear`."""

    norms: list[Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.norms is None:
            return super().forward(ids)
        return _Rows.apply(self.weight, ids, self.norms)


class Places(nn.Module):
    """Adds a vector for each token's place; as `Linear`."""

    norms: list[Tensor] | None = None

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight if self.norms is None else _Places.apply(x, self.weight, self.norms)


class Block(nn.Module):
    """Attention and an MLP, after layer norms."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = Norm(width), Norm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        met = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(met.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A ViT-B, of which inputs are patches laid flat, or a GPT-2-small with a head of its own."""

    def __init__(
        self, tokens: int, width: int, blocks: int, inputs: int, outputs: int, reads: bool
    ) -> None:
        super().__init__()
        self.enter = Rows(inputs, width) if reads else Linear(inputs, width)
        self.places = Places(tokens, width)
        heads = max(1, width // 64)
        self.blocks = nn.Sequential(*(Block(width, heads, reads) for _ in range(blocks)))
        self.norm, self.leave = Norm(width), Linear(width, outputs)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.places(self.enter(x))))
        return self.leave(x if self.reads else x.mean(1))

    def note(self, norms: list[Tensor] | None) -> None:
        """Where layers are to note their samples' squared norms; None for nowhere."""
        for module in self.modules():
            if isinstance(module, Linear | Norm | Rows | Places):
                module.norms = norms


#: Samples, tokens, width, blocks, inputs, outputs, and whether it reads tokens.
MODELS = {
    "ViT-B": (32, 196, 768, 12, 768, 1000, False),
    "GPT-2 small": (16, 1024, 768, 12, 50257, 50257, True),
}


def built(
    samples: int, tokens: int, *rest: Any, device: str, dtype: torch.dtype
) -> tuple[Transformer, Tensor, Callable[[], Tensor]]:
    """A model, its inputs, and what makes its losses, (N,), from random targets."""
    torch.manual_seed(0)
    model = Transformer(tokens, *rest).to(device, dtype)
    _, _, inputs, outputs, reads = rest
    if reads:
        x = torch.randint(inputs, (samples, tokens), device=device)
    else:
        x = torch.randn(samples, tokens, inputs, device=device, dtype=dtype)
    shape = (samples, tokens) if reads else (samples,)
    targets = torch.randint(outputs, shape, device=device)

    def losses() -> Tensor:
        found = F.cross_entropy(model(x).movedim(-1, 1), targets, reduction="none")
        return found.view(samples, -1).mean(1)

    return model, x, losses


def stepped(model: Transformer, losses: Callable[[], Tensor], measured: bool) -> Tensor | None:
    """One forward and backward pass of the summed losses, and (N,) squared norms if asked for."""
    norms: list[Tensor] | None = [] if measured else None
    model.note(norms)
    model.zero_grad()
    losses().sum().backward()
    model.note(None)
    return None if norms is None else torch.stack(norms).sum(0)


def check() -> float:
    """How far norms and gradients of a small step are from autograd's, sample by sample."""
    worst = 0.0
    for sizes in ((3, 5, 8, 2, 6, 4, False), (3, 5, 8, 2, 11, 11, True)):
        model, _, losses = built(*sizes, device="cpu", dtype=torch.float64)
        parameters = list(model.parameters())
        true = []
        for loss in losses():
            own = torch.autograd.grad(loss, parameters, retain_graph=True)
            true.append(torch.stack([g.square().sum() for g in own]).sum())
        stepped(model, losses, measured=False)
        plain = [p.grad.clone() for p in parameters if p.grad is not None]
        norms = stepped(model, losses, measured=True)
        pairs = [(norms, torch.stack(true)), *zip([p.grad for p in parameters], plain, strict=True)]
        worst = max(worst, *(float((x - y).norm() / y.norm()) for x, y in pairs))
    return worst


def overhead(name: str) -> dict[str, float]:
    """Seconds of a plain step on a GPU, of one with norms, and of what a callback does at it."""
    model, _, losses = built(*MODELS[name], device=kernel_timing.DEVICE, dtype=torch.bfloat16)
    found = {
        "plain": kernel_timing.timed(lambda: stepped(model, losses, False), [()], 2).median,
        "with norms": kernel_timing.timed(lambda: stepped(model, losses, True), [()], 2).median,
    }
    found["callback"] = callback(model, losses, MODELS[name][0])
    return found


def callback(model: Transformer, losses: Callable[[], Tensor], samples: int) -> float:
    """Seconds that `GradientStatistics` takes at a step, between its forward and backward pass."""
    from nettrace.measures import resolve
    from nettrace.statistics import StepStatistics
    from nettrace.training_step import StepTracer

    measures, tracer, taken = resolve("gradients"), StepTracer("raise"), []
    for number in range(6):
        loss = losses().mean()

        def measure(loss: Tensor = loss) -> None:
            tracer.measure(
                lambda memory, ranks: StepStatistics(loss, model, samples, 0, memory, ranks=ranks),
                *(model, 0, measures),
            )

        seconds = kernel_timing.wall(measure, 1)
        if number in (2, 4, 5):  # the first records, and each power of two, are checked
            taken.append(seconds)
    return sorted(taken)[1]
