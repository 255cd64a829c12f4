"""Networks and batches on which costs are measured: an MLP, a LeNet, a ResNet, a ViT and a GPT.

All are written as in the field, with random weights and inputs drawn from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """A network with a batch.

    Args:
        title: what it is, in a line.
        model: its weights are at initialisation.
        inputs: (N, ...).
        targets: (N,) classes, or (N, T) tokens.
    """

    title: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def outputs(self) -> Tensor:
        """(N, C = 10) the outputs to differentiate: for tokens, ten logits of the last position."""
        return select(self.model(self.inputs))

    def losses(self) -> Tensor:
        """(N,) the cross-entropy of each sample, a mean over its tokens."""
        return cross_entropies(self.model(self.inputs), self.targets)

    def step(self) -> None:
        """A plain forward and backward pass of the mean loss, whose cost is the unit U."""
        self.model.zero_grad()
        self.losses().mean().backward()


def select(logits: Tensor) -> Tensor:
    """(N, C) of logits (N, C), or of logits (N, T, V) of tokens."""
    return logits if logits.dim() == 2 else logits[:, -1, :CLASSES]


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) of logits (N, C) or (N, T, V)."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)


def mlp(samples: int = 256, width: int = 512) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )
    return _classifier(f"MLP 784-{width}-{width}-10", model, torch.randn(samples, 784))


def lenet(samples: int = 128) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )
    return _classifier("LeNet", model, torch.randn(samples, 1, 28, 28))


class Residual(nn.Module):
    """The basic block of a ResNet (He et al. 2015), with a projection where it shrinks."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet(samples: int = 32, width: int = 32, norm: str = "group") -> Workload:
    """ResNet-18 with a 3x3 stem, as for CIFAR."""
    torch.manual_seed(0)

    def normalise(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels) if norm == "group" else nn.BatchNorm2d(channels)

    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        normalise(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(Residual(channels, width * 2**stage, stride, normalise))
            channels = width * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    title = f"ResNet-18, {'GroupNorm' if norm == 'group' else 'BatchNorm in eval'}, width {width}"
    return _classifier(title, nn.Sequential(*layers), torch.randn(samples, 3, 32, 32))


class Block(nn.Module):
    """A transformer block with the normalisation first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        heads = self.qkv(x).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(n, t, d))


def places(x: Tensor) -> Tensor:
    """(N, T) positions of tokens; with the axis of samples, without which Opacus fails."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


class ViT(nn.Module):
    """A vision transformer that averages over tokens at the end, with learned positions."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Embedding((image // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = x + self.positions(places(x))
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit(samples: int = 32, width: int = 192, depth: int = 6) -> Workload:
    torch.manual_seed(0)
    model = ViT(image=32, patch=4, width=width, depth=depth, heads=3)
    title = f"ViT, 64 tokens, width {width}, depth {depth}"
    return _classifier(title, model, torch.randn(samples, 3, 32, 32))


class GPT(nn.Module):
    """A decoder whose head is its token embedding, initialised as GPT-2."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, V) logits of (N, T) tokens."""
        x = self.tokens(tokens) + self.positions(places(tokens))
        return self.head(self.norm(self.blocks(x)))


def gpt(
    samples: int = 8,
    context: int = 128,
    width: int = 256,
    depth: int = 4,
    heads: int = 4,
    vocabulary: int = 1024,
) -> Workload:
    torch.manual_seed(0)
    model = GPT(vocabulary, context, width, depth, heads)
    text = torch.randint(vocabulary, (samples, context + 1))
    title = f"GPT, tied head, {context} tokens of {vocabulary}, width {width}, depth {depth}"
    return Workload(f"{title}, N = {samples}", model, text[:, :-1], text[:, 1:])


def _classifier(title: str, model: nn.Module, inputs: Tensor) -> Workload:
    samples = len(inputs)
    targets = torch.randint(CLASSES, (samples,))
    return Workload(f"{title}, N = {samples}", model.eval(), inputs, targets)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "lenet": lenet,
    "resnet": resnet,
    "resnet-bn": lambda: resnet(norm="batch"),
    "vit": vit,
    "gpt": gpt,
}
