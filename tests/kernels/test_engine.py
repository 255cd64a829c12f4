"""The Jacobian of networks of the zoo by compiled kernels, against plain autograd."""

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import oracle
import pytest
import torch
import zoo
from oracle import relative_error
from zoo.member import ZOO, Kind

import nettrace as nt
from nettrace import rules
from nettrace.kernels import fused

#: Kernels that the engine calls for some members, all of them between these.
CALLED = {
    "bags": {"embedding_gram", "embedding_sqnorm"},
    "gru": {"ghost_gram", "ghost_sqnorm", "psg_moments"},
    "masked": {"ghost_gram", "ghost_sqnorm", "psg_moments"},
    "tables": {"embedding_gram"},
    "wide-images": {"affine_psg", "conv_psg"},
}
FUSED = set().union(*CALLED.values()) - {"affine_psg"}
TOLERANCE = 1e-4
pytestmark = pytest.mark.parametrize(
    "where", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


class WideImages(torch.nn.Sequential):
    """Of channels enough for a compiled convolution, some of which meet in groups."""

    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 32, 3, stride=2),
            torch.nn.Tanh(),
            torch.nn.Conv2d(32, 32, (1, 2), groups=2, padding=1, bias=False),
            torch.nn.LayerNorm(6),
            torch.nn.Tanh(),
            torch.nn.Conv2d(32, 16, 3, dilation=2),
            torch.nn.Flatten(),
            torch.nn.Linear(96, 2),
        )


KINDS = {name: kind for name, kind in ZOO.items() if not kind.coupled and "inductor" not in name}
KINDS["wide-images"] = Kind(
    make=WideImages,
    draw=lambda: torch.randn(zoo.N, 3, 12, 12),
    families=frozenset(),
    routes=frozenset(),
)


def built(name, device):
    with patch.dict(ZOO, KINDS):
        member = zoo.build(name, torch.float32)

    def there(x):
        return x.to(device)

    batch = member.batch
    batch = tuple(map(there, batch)) if isinstance(batch, tuple) else there(batch)
    return replace(member, model=member.model._apply(there), batch=batch)


@contextmanager
def watched():
    """Which kernels are called meanwhile."""
    called = set()

    def watch(name, kernel):
        def call(*arguments, **options):
            called.add(name)
            return kernel(*arguments, **options)

        return call

    with ExitStack() as stack:
        for module, name in [(rules, "affine_psg"), *((fused, name) for name in FUSED)]:
            one = watch(name, getattr(module, name))
            stack.enter_context(patch.object(module, name, one))
        yield called


def seen(name, device):
    """A member on a device, and one forward pass of it."""
    member = built(name, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what old parts of torch say of each other
        torch.manual_seed(0)
        with torch.device(device):
            return member, member.forward(member.model, member.batch)


def contracted(member, outputs):
    """All contractions that have kernels."""
    j = nt.jacobian(outputs, member.target)
    return {
        "norms": j.norms(per_layer=True),
        "gram": {"": j.gram()},
        "gram of layers": j.gram(per_layer=True),
        "traced": j.gram(trace_outputs=True, per_layer=True),
        "columns": {"": j.column_sqnorms()},
    }


def true_contractions(member, outputs):
    """The same from the Jacobian written out, in float64 on the CPU."""
    truth = oracle.jacobian(outputs, member.parameters)
    truth = {name: rows.double().cpu() for name, rows in truth.items()}
    whole = torch.cat(list(truth.values()), 2)
    grams = {name: oracle.gram(rows) for name, rows in truth.items()}
    return {
        "norms": {name: rows.norm(dim=2) for name, rows in truth.items()},
        "gram": {"": oracle.gram(whole)},
        "gram of layers": grams,
        "traced": {name: torch.einsum("ncmc->nm", gram) for name, gram in grams.items()},
        "columns": {"": whole.square().sum((0, 1))},
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CALLED else pytest.mark.slow) for n in sorted(KINDS)]
)
def test_contractions_are_those_of_plain_autograd(name, where, monkeypatch):
    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in built(name, "cpu").model.modules())
    # Of recurrent networks cuDNN has no derivative in eval mode; elsewhere it rounds to tf32.
    monkeypatch.setattr(torch.backends.cudnn, "enabled", not recurrent)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    member, outputs = seen(name, where)
    tolerance = max(member.tolerance, TOLERANCE)  # more where plain autograd rounds to half
    with watched() as called:
        found = contracted(member, outputs)
    if where == "cpu":  # a GPU has costs of its own
        assert called >= CALLED.get(name, set())
    for what, shares in true_contractions(member, outputs).items():
        for layer, true in shares.items():
            value = found[what][layer].double().cpu()
            assert relative_error(value.reshape(true.shape), true) < tolerance, (what, layer)
    if where == "cuda" and member.alone:  # without noise, which devices draw differently
        other = contracted(*seen(name, "cpu"))
        for what, shares in found.items():
            for layer, value in shares.items():
                off = relative_error(value.cpu(), other[what][layer])
                assert off < 30 * tolerance, (what, layer)
