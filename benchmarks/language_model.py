"""The NTK trace of a language model to 1 %: 65 million outputs, at most ten training steps.

GPT-mini with tied embeddings, a vocabulary of 32,000 and all token logits as outputs, at
initialisation and after training on the text of Python's standard library. U is one plain forward
and backward pass of the mean token cross-entropy on the same batch. Each repeat starts from the
tokens: forward pass, reading of the tape, and estimate. Times are CPU times on one thread. Run by
`python benchmarks/language_model.py [repeats]`, which writes `results/language_model.md`.
"""

from __future__ import annotations

import platform
import re
import statistics
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nettrace as nt

VOCABULARY, TOKENS, SAMPLES = 32_000, 256, 8
WIDTH, LAYERS, HEADS = 192, 6, 6
STEPS, GOAL, PROBES = 200, 0.01, 12
RESULTS = Path(__file__).parent / "results" / "language_model.md"


class Block(nn.Module):
    """Attention and a perceptron, normalised before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) features."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder whose embedding is also its head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, V) logits."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def text() -> Tensor:
    """The standard library's words and signs, hashed into the vocabulary."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    words = re.findall(r"\w+|[^\w\s]|\n", "".join(f.read_text(errors="ignore") for f in files))
    return torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in words])


def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - TOKENS - 1, (SAMPLES,))
    windows = torch.stack([tokens[i : i + TOKENS + 1] for i in starts])
    return windows[:, :-1], windows[:, 1:]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model: nn.Module, tokens: Tensor) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        value = loss(model, *batch(tokens))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return float(value)


def measure(model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> list[str]:
    """The row of the table for one state of the model."""
    units, costs, estimates = [], [], []
    for seed in range(-1, repeats):  # the first warms up
        start = time.process_time()
        loss(model, x, y).backward()
        middle = time.process_time()
        model.zero_grad()
        found = nt.jacobian(model(x), model).estimate_trace(
            probes=PROBES, relative_error=GOAL, seed=seed
        )
        if seed >= 0:
            units.append(middle - start)
            costs.append(time.process_time() - middle)
            estimates.append(found)
            print(found, units[-1], costs[-1] / statistics.median(units), flush=True)
    unit = statistics.median(units)
    ratios = [cost / unit for cost in costs]
    values = torch.stack([e.value for e in estimates]).double()
    others = (values.sum() - values) / (repeats - 1)
    weight = ((repeats - 1) / repeats) ** 0.5  # the mean of the others errs too
    errors = (values / others - 1) * weight
    claimed = [float(e.standard_error / e.value) for e in estimates]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        f"{unit:.2f} s",
        f"{min(e.probes for e in estimates)} to {max(e.probes for e in estimates)}",
        f"{middle:.1f} ({low:.1f} to {high:.1f}, at most {max(ratios):.1f})",
        f"{statistics.mean(claimed):.2%}",
        f"{float(errors.square().mean().sqrt()):.2%}",
        f"{float(errors.abs().max()):.2%}",
        f"{float(values.mean()):.4g}",
    ]


def main(repeats: int = 20) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, model = text(), GPT()
    probe = batch(tokens)
    lines = [
        "# NTK trace of a language model to 1 %",
        "",
        f"`benchmarks/language_model.py`; Python {platform.python_version()}, torch "
        f"{torch.__version__}, one CPU thread, {repeats} repeats. N = {SAMPLES}, T = {TOKENS}, "
        f"V = {VOCABULARY}: {SAMPLES * TOKENS * VOCABULARY:,} outputs. U: one plain forward and "
        "backward pass. The true error is that against the mean of the other repeats, rid of that "
        "mean's own error.",
        "",
        "| | U | probes | cost in U, median (quartiles) | standard error claimed | true error, rms "
        "| largest | trace |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines.append("| at initialisation | " + " | ".join(measure(model, *probe, repeats)) + " |")
    final = train(model, tokens)
    cells = " | ".join(measure(model, *probe, repeats))
    lines.append(f"| after {STEPS} steps, loss {final:.2f} | {cells} |")
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
