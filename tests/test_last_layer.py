"""A network's head is found, with its features, or it is said why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor, nn

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.last_layer import LastLayer, NoLastLayerError, last_layer

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """With a head that is what a function makes of its parts."""

    def __init__(self, head: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.w = nn.Parameter(torch.randn(6, 3))
        self.b = nn.Parameter(torch.randn(3))
        self.v = nn.Parameter(torch.randn(6))
        self.shift = nn.Buffer(torch.randn(1, 3))
        self.fc = nn.Linear(6, 3)
        self.head = head

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self, self.features(x), x)


def look(model: nn.Module, x: Any = X, head: str | None = None, **options: Any) -> LastLayer:
    before = training.state(model)
    with frozen(model), torch.no_grad():
        try:
            return last_layer(model, nt.Probe(x, **options), head)
        finally:
            hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
            assert not any(hooks)
            assert not training.differences(before, {**before, **_weights(model)})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"weight {n}": p.detach() for n, p in model.named_parameters()}


def added(m: Any, h: Tensor, x: Tensor) -> Tensor:
    out = h @ m.w
    out += m.b
    return out


FUNCTIONAL: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str, bool]] = {
    "nn.Linear": (lambda m, h, x: m.fc(h), "fc", True),
    "F.linear": (lambda m, h, x: F.linear(h, m.w.T, m.b), "w", True),
    "F.linear by names": (lambda m, h, x: F.linear(input=h, weight=m.w.T, bias=m.b), "w", True),
    "@": (lambda m, h, x: h @ m.w, "w", False),
    "@ and +": (lambda m, h, x: m.b + h @ m.w, "w", True),
    "@ and +=": (added, "w", True),
    "a buffer added": (lambda m, h, x: h @ m.w + m.shift, "w", True),
    "addmm": (lambda m, h, x: torch.addmm(m.b, h, m.w), "w", True),
    "matmul": (lambda m, h, x: torch.matmul(h, m.w), "w", False),
    "a vector": (lambda m, h, x: h @ m.v, "v", False),
    "squeezed": (lambda m, h, x: F.linear(h, m.v[None]).squeeze(-1), "v", False),
    "some classes": (lambda m, h, x: m.fc(h)[:, 1:], "fc", True),
    "turned classes": (lambda m, h, x: m.fc(h)[:, [2, 0, 1]], "fc", True),
    "of a list": (lambda m, h, x: [m.fc(h)], "fc", True),
    "dropout at the end": (lambda m, h, x: F.dropout(m.fc(h), 0.5, m.training), "fc", True),
    "as float": (lambda m, h, x: m.fc(h).float().contiguous(), "fc", True),
    "of two halves": (lambda m, h, x: m.fc(h).unflatten(0, (5, 1)).squeeze(1), "fc", True),
    "a scaled weight": (lambda m, h, x: F.linear(h, 2 * m.w.T, m.b.exp()), "w", True),
}


@pytest.mark.parametrize("kind", FUNCTIONAL)
def test_linear_heads_are_found_however_they_are_written(kind: str) -> None:
    head, name, biased = FUNCTIONAL[kind]
    model = Network(head)
    found = look(model)
    assert found.name == name
    assert (found.bias is not None) == biased
    torch.testing.assert_close(found.features, model.features(X))
    expected = found.features @ found.weight.T + (0 if found.bias is None else found.bias)
    torch.testing.assert_close(found.by_position(found.outputs), expected)
    assert torch.equal(found.as_outputs(found.by_position(found.outputs)), found.outputs)


def inplace(m: Any, h: Tensor, x: Tensor) -> Tensor:
    out = m.fc(h)
    h.mul_(2)
    return out


def written(m: Any, h: Tensor, x: Tensor) -> Tensor:
    out = m.fc(h)
    out[:, 0] = -1
    return out


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "softmax": (lambda m, h, x: m.fc(h).softmax(-1), "'fc': behind it stands softmax; pass head"),
    "scaled": (lambda m, h, x: 2 * m.fc(h), r"behind it stands r?mul"),
    "a skip connection": (lambda m, h, x: m.fc(h) + x[:, :3], "behind it stands add"),
    "two of them": (lambda m, h, x: m.fc(h) + m.fc(2 * h), "'fc', is used 2 times"),
    "joined": (lambda m, h, x: torch.cat([m.fc(h), h @ m.w], 1), "behind it stands cat"),
    "pooled": (lambda m, h, x: m.fc(h[:, None]).mean(1), "behind it stands mean"),
    "no head": (lambda m, h, x: h, "'body': behind it stands tanh"),
    "weights of the data": (lambda m, h, x: h @ h.T, r"'body'.*tanh, T, matmul"),
    "changed features": (inplace, "differ from features @ weight.T"),
    "changed outputs": (written, "behind it stands setitem"),
    "a norm": (lambda m, h, x: F.layer_norm(m.fc(h), (3,)), "layer_norm"),
    "complex": (lambda m, h, x: torch.complex(h, h) @ m.w.cfloat(), "complex outputs"),
    "none at all": (lambda m, h, x: x.sin(), "no linear map leads to the outputs"),
    "repeated": (lambda m, h, x: (h @ m.v)[:, None].expand(-1, 2), "are not all results of 'v'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_refused_by_what_stands_behind(kind: str) -> None:
    head, text = REFUSED[kind]
    with pytest.raises(NoLastLayerError, match=text):
        look(Network(head))


def test_a_named_head_gives_the_outputs_whatever_follows() -> None:
    model = Network(lambda m, h, x: m.fc(h).softmax(-1))
    found = look(model, head="fc")
    torch.testing.assert_close(found.outputs, model.fc(model.features(X)))
    with pytest.raises(NoLastLayerError, match="to name one linear map"):
        look(model, head="")
    with pytest.raises(AttributeError, match=r"no module 'head'.*'body', 'fc'"):
        look(model, head="head")
    with pytest.raises(NoLastLayerError, match="for 5 samples on axis 0"):
        look(Network(lambda m, h, x: m.fc(h.repeat(2, 1))[:5].sin()), head="fc")


CONVOLUTION = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
TOKENS = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("model", "shape", "options", "positions"),
    [
        (CONVOLUTION, (5, 1, 6, 6), {}, (4, 4)),
        (nn.Sequential(CONVOLUTION, nn.Flatten()), (5, 1, 6, 6), {}, (16,)),
        (TOKENS, (5, 7, 4), {}, (7,)),
        (nn.Sequential(TOKENS, nn.Flatten()), (5, 7, 4), {}, (7,)),
        (TOKENS, (5, 7, 4), {"select": "last"}, ()),
        (TOKENS, (5, 7, 4), {"forward": lambda m, x: m(x).transpose(1, 2)}, (7,)),
        (TOKENS, (5, 7, 4), {"forward": lambda m, x: m(x)[torch.arange(5), [6, 0, 1, 2, 3]]}, ()),
        (TOKENS, (5, 7, 4), {"forward": lambda m, x: m(x.flatten(0, 1)).view(5, 7, 3)}, (7,)),
        (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (5, 4), {}, ()),
    ],
)  # fmt: skip
def test_features_are_those_of_each_position(
    model: nn.Module, shape: tuple[int, ...], options: Any, positions: tuple[int, ...]
) -> None:
    found = look(model, torch.randn(shape), **options)
    assert found.features.shape[:-1] == (5, *positions)
    values = torch.randn(found.outputs.shape)
    assert torch.equal(found.as_outputs(found.by_position(values)), values)
    expected = found.features @ found.weight.T + found.bias
    torch.testing.assert_close(found.as_outputs(expected), found.outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype: torch.dtype) -> None:
    wide = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3)).to(dtype)
    assert look(wide, X.to(dtype)).features.dtype == dtype


def test_networks_that_are_wrapped_parametrised_compiled_or_tied() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    assert look(normed).name == "0"
    compiled = torch.compile(nn.Sequential(nn.Linear(4, 3)), backend="eager")
    assert look(compiled).name.endswith("0")
    assert look(nn.DataParallel(nn.Linear(4, 3))).name == "weight"

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Any:
            return {"logits": self.out(self.embed(tokens).tanh()), "hidden": self.embed(tokens)}

    found = look(Tied(), torch.arange(8).view(2, 4))
    assert found.features.shape == (2, 4, 4)
    assert found.weight.shape == (9, 4)


def test_transformers_heads() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, num_labels=3, pad_token_id=0)
    tokens = {"input_ids": torch.randint(1, 11, (2, 5))}
    found = look(transformers.GPT2LMHeadModel(config), tokens)
    assert (found.features.shape, found.weight.shape) == ((2, 5, 8), (11, 8))
    found = look(transformers.GPT2ForSequenceClassification(config), tokens)
    assert (found.name, found.features.shape) == ("score", (2, 8))
