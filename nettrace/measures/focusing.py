"""Node focusing: how far the weights of a network are focused on a few of its nodes.

De Jong, Meigel and Rulands, Emergent weight morphologies in deep neural networks (2025),
arXiv:2501.05550, find that weights focus on a subset of nodes, and that the degree of it oscillates
from layer to layer. Their formulas are not used; these are definitions of our own.

A layer of nodes is a group of hidden units of which the order does not matter. With the sums over
all weights that write to node j, and over all that read it,

    s_in(j) = sum |w|^2,   s_out(j) = sum |w'|^2,   pi_j = s_in(j) s_out(j),   p_j = pi_j / sum pi

the path strength of a node does not change if the weights before its ReLU are multiplied by a > 0
and those behind it divided by a, as s_in and s_out do; those of nodes in neighbouring layers may.
The loads of "focus/path_focusing" change nowhere. Permuted nodes have permuted strengths.

- Dense networks: nodes are hidden units; s_in sums a row of the weight before them, s_out a column
  of the one behind, biases not counted.
- Convolutional ones: nodes are channels, and sums go over the other channels and all places of a
  filter. Where a convolution has groups of channels, groups are one layer of nodes and channels
  within groups another, summed over the groups; channels of a depthwise convolution are read and
  written by it alike. A dense layer behind flattened maps reads a channel at all places.
- Attention: heads are a layer of nodes, written to by the weights of queries, keys and values and
  read by that of the output. Features within heads, alike in all heads, are another, where
  queries, keys and values are of one parameter; else those of the values, for nothing reads those
  of queries and keys but each other. Where several queries share keys, the heads of the keys are a
  layer, and the queries within one another.
- Residual streams: the features of a stream are one layer of nodes, however many blocks there are;
  all that adds to the stream writes to them, an embedding of tokens by all of its rows, and all
  that takes from it reads them. The units within each block are layers of their own.

A weight is what is contracted with activations, as it is then: after weight normalisation or the
like, frozen or not, complex ones by their magnitudes, and with the fixed scales that belong to it.
Such is what activations are multiplied by along one axis, or altogether, and that depends on
parameters and buffers alone: gamma / sqrt(var + eps) of batch normalisation in evaluation mode, the
weight of another norm, a LayerScale. If it scales what comes from one weight alone, and all that
takes from that weight takes it scaled, it belongs to the weight that writes, as behind a
convolution and at the end of a residual branch; else to the weights that read, as at the beginning
of a pre-activation block and behind an addition. Where a weight reads a sum of which the terms are
scaled differently, it is scaled by the root of their mean square; in loads each path has its own.
Scales that depend on the samples, as those of layer and group norms, or of batch norms without
running statistics, do not count; nor do those that vary along places or several axes, constants,
biases, those of norms either, and embeddings of positions that do not depend on data. A parameter
counts once in each of its roles, however often it is called: where input and output embeddings are
tied, it writes and reads. Groups of units that weights only write to, or only read, as learned
queries, are no layers, and are named in the attribute `left_out`. Layers are in the order in which
the forward pass reaches them.

The load of a node is the sum over all paths from inputs to outputs through it of the products of
the |w|, with fixed scales, on the way: of a chain of dense layers,
(|W_l| ... |W_1| 1)_j (1 |W_L| ... |W_{l+1}|)_j. See `nettrace.landscape.nodes.Nodes.loads` for what
else there may be on the way. Where activations are joined side by side or cut apart between
weights, as queries, keys and values of one parameter are, there is none, and the error says where.

Of a layer of which all path strengths are zero, each node counts as much as any other.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nettrace.estimators import generator
from nettrace.measures.registry import Value, measure
from nettrace.operator import PerLayer
from nettrace.statistics import Inapplicable, Statistics

if TYPE_CHECKING:
    from nettrace.landscape.nodes import Nodes

_SOURCE = "de Jong, Meigel and Rulands 2025, arXiv:2501.05550, in a definition of our own"
_PI = (
    "of path strengths pi_j = s_in(j) s_out(j), sums of squares of the weights that write to "
    "hidden unit j and that read it; equal where all are zero"
)
_R = (
    "sum_l d_l d_{l+1} / sum_l d_l^2 of the deviations d_l of focus/focusing from a straight line "
    "in the number of the layer"
)
#: Layers of which there are no more are put in all orders.
MOST_ENUMERATED = 8
#: In how many orders, drawn at random, others are put.
ORDERS = 9_999
#: Autocorrelations and deviations that differ by less are taken for equal.
_ROUNDING = 1e-9


@measure(
    "focus/focusing",
    needs=["node_strengths", "nodes"],
    convention=f"1 - (sum pi)^2 / (n sum pi^2), in [0, 1 - 1/n], {_PI}",
    dims=["nodes"],
    source=_SOURCE,
)
def focusing(strengths: PerLayer, nodes: Nodes) -> Value:
    """How far the weights are focused on a few nodes of each layer: 0 if on all alike."""
    dead = [name for name, found in strengths.items() if not bool(found.prod(0).any())]
    attributes: dict[str, str | int | float] = {}
    if dead:
        attributes["all_zero"] = ", ".join(dead)
    if nodes.left_out or nodes.dropped:
        said = {**nodes.left_out, **nodes.dropped}
        attributes["left_out"] = "; ".join(f"{name}: {why}" for name, why in said.items())
    if nodes.uncounted:
        attributes["warning"] = (
            f"activations are multiplied with {', '.join(nodes.uncounted)} number by number, not "
            "contracted by a matrix product or convolution: these do not count as weights"
        )
    return Value(_phi(strengths), coordinates=_labels(strengths), attributes=attributes)


@measure(
    "focus/inverse_participation",
    needs=["node_strengths"],
    convention=f"sum_j p_j^2 with p = pi / sum pi, in [1/n, 1], {_PI}",
    dims=["nodes"],
    source=_SOURCE,
)
def inverse_participation(strengths: PerLayer) -> Value:
    """The inverse participation ratio of the nodes of each layer."""
    found = [p.square().sum() for p in _shares(strengths).values()]
    return Value(torch.stack(found), coordinates=_labels(strengths))


@measure(
    "focus/entropy",
    needs=["node_strengths"],
    convention=f"-sum_j p_j ln p_j with p = pi / sum pi, in nats, in [0, ln n], {_PI}",
    dims=["nodes"],
    source=_SOURCE,
)
def entropy(strengths: PerLayer) -> Value:
    """The entropy of the path strengths of the nodes of each layer."""
    found = [-torch.xlogy(p, p).sum() for p in _shares(strengths).values()]
    return Value(torch.stack(found).clamp_min(0), coordinates=_labels(strengths))


@measure(
    "focus/strengths",
    needs=["node_strengths"],
    convention="sums of squares of the weights that write to each hidden unit, and of those that "
    "read it; NaN beyond a layer's own",
    dims=["direction", "nodes", "node"],
    source=_SOURCE,
    grouped=False,
)
def node_strengths(strengths: PerLayer) -> Value:
    """The strengths of the nodes of each layer, in and out."""
    longest = max(found.shape[1] for found in strengths.values())
    rows = torch.full((2, len(strengths), longest), torch.nan, dtype=torch.float64)
    for number, found in enumerate(strengths.values()):
        rows[:, number, : found.shape[1]] = found
    return Value(rows, coordinates={"direction": ["in", "out"], **_labels(strengths)})


@measure(
    "focus/path_focusing",
    needs=["node_loads"],
    convention="1 - (sum q)^2 / (n sum q^2), in [0, 1 - 1/n], of the loads q_j, sums over all "
    "paths from inputs to outputs through hidden unit j of the products of |w|; equal where all "
    "are zero",
    dims=["nodes"],
    source=_SOURCE,
    grouped=False,
)
def path_focusing(loads: PerLayer) -> Value:
    """How far the paths from inputs to outputs are focused on a few nodes of each layer."""
    found = [1 - 1 / (_share(q).square().sum() * len(q)) for q in loads.values()]
    return Value(torch.stack(found).clamp_min(0), coordinates=_labels(loads))


@measure(
    "focus/alternation",
    needs=["node_strengths"],
    convention=f"{_R}; in [-1, 1], negative where layers alternate; 0 where all are on the line",
    source=_SOURCE,
)
def alternation(strengths: PerLayer) -> Value:
    """Whether layers that are focused more and less alternate: lag-1 autocorrelation over layers.

    Chance alone makes it negative: of L independent numbers it is about -2 / L on average. Its
    p-values say how much more it is.
    """
    phi = _several(_phi(strengths))
    return Value(_autocorrelation(phi), attributes={"layers": len(phi)})


@measure(
    "focus/alternation_p_layers",
    needs=["node_strengths"],
    convention=f"share of the orders of layers of which {_R} is as low or lower: of all orders "
    f"of up to {MOST_ENUMERATED} layers, else (1 + count) / (1 + {ORDERS}) of random ones",
    source=_SOURCE,
)
def alternation_p_layers(strengths: PerLayer) -> Value:
    """How likely layers alternate as much if their order is random; small where they alternate.

    Where layers are of several kinds, as in a transformer, these alternate by themselves:
    focus/alternation_p_weights takes account of that.
    """
    phi = _several(_phi(strengths))
    if len(phi) <= MOST_ENUMERATED:
        orders = torch.tensor(list(itertools.permutations(range(len(phi)))))
    else:
        draws = generator(0, "orders of layers")
        orders = torch.rand(ORDERS, len(phi), generator=draws).argsort(-1)
    null = _autocorrelation(phi[orders])
    given = _autocorrelation(phi)
    if len(phi) <= MOST_ENUMERATED:  # of which one is the order given
        return _tail(null, int((null <= given + _ROUNDING).sum()), len(null))
    return _tail(null, 1 + int((null <= given + _ROUNDING).sum()), 1 + len(null))


@measure(
    "focus/alternation_p_weights",
    needs=["node_strengths", "shuffled_strengths"],
    convention="(1 + count) / (1 + K) of K networks, the numbers of each weight shuffled, of "
    f"which {_R} is as low or lower",
    source=_SOURCE,
    grouped=False,
)
def alternation_p_weights(strengths: PerLayer, shuffled: PerLayer) -> Value:
    """How likely layers alternate as much if the numbers of each weight are shuffled.

    Kinds and widths of layers stay as they are, and what shuffling takes away is focusing itself.
    So where one layer stands out, this can be small although layers do not alternate: the value of
    focus/alternation is to be held against `null_mean` as well.
    """
    given = _autocorrelation(_several(_phi(strengths)))
    null = _autocorrelation(_phi(shuffled).mT)
    return _tail(null, 1 + int((null <= given + _ROUNDING).sum()), 1 + len(null))


def _tail(null: Tensor, count: int, of: int) -> Value:
    spread = float(null.std(correction=0))
    told = {"null_mean": float(null.mean()), "null_deviation": spread, "draws": len(null)}
    return Value(torch.tensor(count / of, dtype=torch.float64), attributes=told)


def _labels(strengths: PerLayer) -> dict[str, list[str]]:
    return {"nodes": list(strengths)}


def _share(values: Tensor) -> Tensor:
    """What share of all each has along the last axis; the same for all where there is nothing."""
    most = values.amax(-1, keepdim=True)
    scaled = torch.where(most > 0, values / most, 1.0)
    return scaled / scaled.sum(-1, keepdim=True)


def _shares(strengths: PerLayer) -> PerLayer:
    """(..., n) p_j by layer."""
    return {name: _share(_path(found)) for name, found in strengths.items()}


def _path(found: Tensor) -> Tensor:
    """(..., n) path strengths of strengths (..., 2, n), of the largest of each."""
    most = found.amax(-1, keepdim=True)
    scaled = torch.where(most > 0, found / most, 0.0)
    return scaled.prod(-2)


def _phi(strengths: PerLayer) -> Tensor:
    """(layers, ...) the focusing."""
    found = [1 - 1 / (p.square().sum(-1) * p.shape[-1]) for p in _shares(strengths).values()]
    return torch.stack(found).clamp_min(0)


def _several(phi: Tensor) -> Tensor:
    if len(phi) < Statistics.alternating:
        raise Inapplicable("there are too few layers of nodes to alternate")
    return phi


def _autocorrelation(phi: Tensor) -> Tensor:
    """(...) that of lag 1 of rows (..., L) about a straight line, 0 where all are on it."""
    place = torch.linspace(-1, 1, phi.shape[-1], dtype=torch.float64)
    centred = phi - phi.mean(-1, keepdim=True)
    slope = (centred @ place / place.square().sum()).unsqueeze(-1)
    apart = centred - slope * place
    size = apart.square().sum(-1)
    found = (apart[..., 1:] * apart[..., :-1]).sum(-1)
    return torch.where(size.sqrt() > _ROUNDING * math.sqrt(phi.shape[-1]), found / size, 0.0)
