"""Models of sequences: recurrent nets, state spaces, transformers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.member import N, last_token, member


class Recurrence(nn.Module):
    """Weights shared in time, with the library's kernels; time or the batch comes first."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.cell = kind(3, 4, **options)
        self.head = nn.Linear(4 * (1 + self.cell.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.cell.batch_first:
            return self.head(self.cell(x)[0]).sum(1)
        return self.head(self.cell(x.transpose(0, 1))[0]).sum(0)


for name, make in {
    "rnn": partial(Recurrence, nn.RNN, nonlinearity="relu", bidirectional=True, batch_first=True),
    "rnn-time-first": partial(Recurrence, nn.RNN, num_layers=2),
    "gru": partial(Recurrence, nn.GRU, bidirectional=True),
    "gru-batch-first": partial(Recurrence, nn.GRU, num_layers=2, batch_first=True),
    "lstm": partial(Recurrence, nn.LSTM, bidirectional=True, num_layers=2, batch_first=True),
    "lstm-time-first": partial(Recurrence, nn.LSTM),
}.items():
    member(name, "W9", lambda: torch.randn(N, 4, 3))(make)


# In single precision a kernel of oneDNN takes all steps at once.
member(
    "lstm-fused",
    "W9",
    lambda: torch.randn(N, 4, 3),
    "rule node",
    dtype=torch.float32,
    tolerance=1e-5,
)(partial(Recurrence, nn.LSTM))


@member("lstm-packed", "W9", lambda: (torch.randn(N, 4, 3), torch.tensor([2, 4, 3, 4])))
class Packed(nn.Module):
    """Sequences of different lengths in one packed batch, projected, from a learned state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, proj_size=2, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h, c = x.new_zeros(1, len(x), 2), self.start.expand(-1, len(x), -1).contiguous()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.cell(packed, (h, c))[0], batch_first=True)[0].sum(1)


@member("selective-state-space", "W9", lambda: torch.randn(N, 6, 4))
class Selective(nn.Module):
    """The step, the input and the output of a diagonal state space depend on the token."""

    def __init__(self, width: int = 4, states: int = 3) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 2 * width, bias=False)
        self.shift = nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.select = nn.Linear(width, 2 * states + 1, bias=False)
        self.step = nn.Linear(1, width)
        self.log_rate = nn.Parameter(torch.rand(width, states).log())
        self.skip = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.mix(x).chunk(2, -1)
        x = F.silu(self.shift(x.mT)[..., : x.shape[1]].mT)
        b, c, dt = self.select(x).split([3, 3, 1], -1)
        dt = F.softplus(self.step(dt))
        decay = torch.exp(-dt[..., None] * self.log_rate.exp())
        inflow = (dt * x)[..., None] * b[..., None, :]
        state, y = torch.zeros_like(inflow[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + inflow[:, t]
            y.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(y, 1) + self.skip * x) * F.silu(gate)).sum(1)


@member("linear-state-space", "W9", lambda: torch.randn(N, 8))
class LongConvolution(nn.Module):
    """The kernel of a long convolution is computed from complex parameters, without a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate, self.frequency = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.read = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        pole = torch.complex(-self.log_rate.exp(), self.frequency)
        time = torch.arange(x.shape[1])
        kernel = (self.read[:, None] * torch.exp(pole[:, None] * time)).sum(0).real
        y = torch.fft.irfft(torch.fft.rfft(x, n=16) * torch.fft.rfft(kernel, n=16), n=16)[:, :8]
        return self.head(torch.tanh(y))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """Rotary positions, grouped queries, fused causal attention, a gated feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 6, bias=False), nn.Linear(width, 6, bias=False)
        self.down = nn.Linear(6, width, bias=False)

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        t, d = x.shape[-2:]
        angle = torch.outer(torch.arange(t), 100.0 ** -(torch.arange(d // 2) / (d // 2)))
        phase = torch.polar(torch.ones_like(angle), angle).to(x.dtype.to_complex())
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * phase).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = self.query(h).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.key_value(h).unsqueeze(1).chunk(2, -1)
        q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@member("llama", "W10", lambda: torch.randint(0, 11, (N, 6)), forward=last_token)
class Llama(nn.Module):
    """Tied embeddings around layers with rotary positions and RMSNorm written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.Sequential(Layer(8), Layer(8))
        self.norm = RMSNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.layers(self.embedding(tokens)))
        return F.linear(x, self.embedding.weight)


@member("encoder-decoder", "W10", lambda: (torch.randn(N, 4, 3), torch.randint(0, 5, (N, 3))))
class Translator(nn.Module):
    """Two modalities meet in cross-attention; the padding of one is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.embedding = nn.Linear(3, 4), nn.Embedding(5, 4)
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        padding = torch.tensor([False, False, False, True]).expand(len(x), -1)
        causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
        y = self.transformer(
            self.into(x),
            self.embedding(tokens),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.head(y)[:, -1]


@member("language-loss", "W10", lambda: torch.randint(1, 7, (N, 6)))
class LanguageLoss(nn.Module):
    """The loss of a sample is a mean over its tokens, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(7, 8), Layer(8), nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.layer(self.embedding(tokens[:, :-1])))
        target = tokens[:, 1:].masked_fill(tokens[:, 1:] == 3, -100)
        losses = F.cross_entropy(logits.mT, target, ignore_index=-100, reduction="none")
        return losses.sum(1) / (target >= 0).sum(1).clamp(min=1)
