"""Which form of a per-sample quantity is cheapest for a layer, by counts and a device's ceilings.

A layer's gradient of sample n is P[n] = sum_t a[n, t] g[n, t]^T, of I x O numbers. Squared norms,
and Gram matrices of all pairs of samples, have these forms:

    single    products of tokens' norms, and of two Gram matrices, where each sample has one token
    ghost     sum_ts (a[n, t] . a[m, s]) (g[n, t] . g[m, s]), half of the pairs (Li et al. 2022,
              arXiv 2110.05679, for norms)
    psg       norms of blocks of P, which are never written
    written   P written in bounded pieces, and products of these

In operations, norms by ghost are cheaper than psg for T < 2 I O / (I + O), and Gram matrices by
ghost than written for T < sqrt(I O / (I + O)) or little more: far fewer tokens, as P[n] serves all
of a sample's pairs. Written gradients also go through memory twice. A form takes as long as the
slower of its operations and its traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from nettrace.kernels.launch import architecture

if TYPE_CHECKING:
    from nettrace.kernels.factors import Outer

Quantity: TypeAlias = Literal["sqnorm", "gram"]
Form: TypeAlias = Literal["single", "ghost", "psg", "written"]


class Ceilings(NamedTuple):
    """What a device does at most.

    Args:
        half: floating point operations a second of products in bfloat16 or float16.
        single: in tf32, of which a product of float32 takes three.
        double: in float64.
        bandwidth: bytes a second from memory.
    """

    half: float
    single: float
    double: float
    bandwidth: float

    def operations(self, dtype: torch.dtype) -> float:
        """Operations a second on numbers of a type, complex ones as four."""
        if dtype.is_complex:
            return self.operations(dtype.to_real()) / 4
        if dtype == torch.float64:
            return self.double
        return self.single / 3 if dtype == torch.float32 else self.half


#: By architecture, from the makers' data sheets, without sparsity; none was measured. Of A100 SXM
#: 80 GB, H100 SXM, HGX B200, GeForce RTX 5090 and MI300X.
CEILINGS = {
    "sm80": Ceilings(312e12, 156e12, 19.5e12, 2.04e12),
    "sm90": Ceilings(989e12, 494e12, 67e12, 3.35e12),
    "sm100": Ceilings(2250e12, 1125e12, 37e12, 8.0e12),
    "sm120": Ceilings(209e12, 105e12, 1.6e12, 1.79e12),
    "gfx942": Ceilings(1307e12, 654e12, 163e12, 5.3e12),
}
#: What shares of the ceilings forms are assumed to reach: of operations, and of bandwidth.
_SHARES: Mapping[Form, float] = {"single": 0.6, "ghost": 0.6, "psg": 0.7, "written": 0.85}
_BANDWIDTH = 0.88


class Layer(NamedTuple):
    """The shapes of a layer's inputs a (N, G, T, I) and gradients g (K, N, G, T, O).

    Args:
        samples: N.
        tokens: T.
        inputs: I, of each group.
        outputs: O, of each group.
        cotangents: K, of which all share the inputs.
        groups: G.
        lookup: whether inputs are numbers of rows, as of an embedding of I rows.
    """

    samples: int
    tokens: int
    inputs: int
    outputs: int
    cotangents: int = 1
    groups: int = 1
    lookup: bool = False

    @property
    def compared(self) -> int:
        """What an inner product of two inputs takes, in multiplications."""
        return 1 if self.lookup else self.inputs

    @property
    def numbers(self) -> float:
        """How many numbers are read of inputs and gradients."""
        each = self.compared + self.cotangents * self.outputs
        return self.samples * self.groups * self.tokens * each

    @property
    def gradients(self) -> float:
        """How many numbers all of its gradients have."""
        return self.cotangents * self.samples * self.groups * self.inputs * self.outputs


class Work(NamedTuple):
    """What a form takes.

    Args:
        operations: floating point operations, a multiplication and an addition each.
        numbers: read from memory or written to it.
    """

    operations: float
    numbers: float


class Plan(NamedTuple):
    """The form of a quantity that is cheapest, and what each was estimated at.

    Args:
        form: the cheapest.
        seconds: of each form.
    """

    form: Form
    seconds: dict[Form, float]


def plan(
    quantity: Quantity,
    layer: Layer,
    other: Layer | None = None,
    *,
    dtype: torch.dtype,
    ceilings: Ceilings,
) -> Plan:
    """The form of a quantity that takes the least time.

    Args:
        quantity: "sqnorm" or "gram".
        layer: whose gradients.
        other: with whose gradients those of the layer make inner products, if not with their own.
        dtype: of inputs and gradients.
        ceilings: of the device: of `CEILINGS`, or measured.

    Raises:
        ValueError: if there is no such quantity.

    Example:
        >>> import torch
        >>> from nettrace.kernels.plan import CEILINGS, Layer, plan
        >>> layer = Layer(samples=32, tokens=197, inputs=768, outputs=3072)
        >>> [plan(q, layer, dtype=torch.bfloat16, ceilings=CEILINGS["sm90"]).form
        ...  for q in ("sqnorm", "gram")]
        ['ghost', 'written']
    """
    if quantity not in ("sqnorm", "gram"):
        raise ValueError(f"expected the quantity sqnorm or gram, got {quantity!r}")
    works = norm_work(layer) if quantity == "sqnorm" else gram_work(layer, other)
    rate, bandwidth = ceilings.operations(dtype), _BANDWIDTH * ceilings.bandwidth
    counted = {form: work.operations / (rate * _SHARES[form]) for form, work in works.items()}
    seconds = {
        form: max(counted[form], work.numbers * dtype.itemsize / bandwidth)
        for form, work in works.items()
    }
    # Where both wait for memory alone, fewer operations leave more of the device to others.
    return Plan(min(seconds, key=lambda form: (seconds[form], counted[form])), seconds)


def norm_work(layer: Layer) -> dict[Form, Work]:
    """What squared norms (K, N) take, by form; kernels do each cotangent by itself."""
    n, t, _, o, k, g, _ = layer
    pairs = n * g * t * t  # half of which are made
    if t == 1:
        return {"single": Work(2 * pairs * (layer.compared + k * o), layer.numbers)}
    read = k * layer._replace(cotangents=1).numbers
    if layer.lookup:  # rows of the gradient that are not looked up are written as well
        own = Work(2 * layer.numbers, layer.numbers + 2 * layer.gradients)
    else:
        own = Work(2 * t * layer.gradients, read)
    return {"ghost": Work(k * pairs * (layer.compared + o), read), "psg": own}


def gram_work(layer: Layer, other: Layer | None = None) -> dict[Form, Work]:
    """What inner products (N, K, M, J) take, by form."""
    both = other or layer
    k, j = layer.cotangents, both.cotangents
    share = 1 if other else 0.5  # of the pairs
    pairs = share * layer.samples * both.samples * layer.groups
    t, s, o = layer.tokens, both.tokens, layer.outputs
    read = layer.numbers + (other.numbers if other else 0)
    if t == 1 == s:
        return {"single": Work(2 * pairs * (layer.compared + k * j * o), read)}
    met = 2 * pairs * t * (s * (layer.compared + j * o) + k * j * o)
    # One cotangent's products stay in registers; those of several are read by each.
    kept = 0 if k == 1 == j else 2 * pairs * t * (s + j * o)
    made = gradients = 0.0
    for one in (layer, other) if other else (layer,):
        made += 2 * one.numbers if one.lookup else 2 * one.tokens * one.gradients
        gradients += one.gradients
    products = 2 * pairs * k * j * layer.inputs * o
    return {
        "ghost": Work(met, read + kept),
        "written": Work(made + products, read + 2 * gradients),
    }


def device_costs(
    quantity: Quantity, x: Outer, samples: int, y: Outer | None = None, others: int = 0
) -> tuple[float, float]:
    """By tokens and by whole gradients, what a quantity of factored gradients costs on a GPU.

    For so many samples of `x`, and of `y` if it is another; over groups, in multiplications that
    could be made in the time. Of more than one token.
    """
    pair = [_layer(one, n) for one, n in ((x, samples), (y, others)) if one is not None]
    ceilings, dtype = CEILINGS[architecture(x.moving.device)], x.moving.dtype
    seconds = plan(quantity, *pair, dtype=dtype, ceilings=ceilings).seconds
    each = ceilings.operations(dtype) / 2 / x.shape[2]
    return each * seconds["ghost"], each * seconds["psg" if quantity == "sqnorm" else "written"]


def _layer(x: Outer, samples: int) -> Layer:
    k, _, g, t, d, m = x.shape
    return Layer(samples, t, d, m, k, g, x.still.is_lookup)
