"""Where the samples lie in a gradient on the tape, derived from the operations alone.

The outputs' axis 0 counts samples. Going back through the tape, each operation of a known kind says
where the samples lie in the gradient of its operand: a pointwise operation leaves them where they
are, a transposition moves them, a reshape splits or joins their axis. What is derived so holds
whatever the values, also behind a gate that is shut. An operation that is not known, or that may
mix samples, derives nothing; `nettrace.ownership` then asks the tape itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch.autograd.graph import Node

from nettrace.tape import Tape, edge_key, metadata, shape_of

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Slice `i` along axis `dim` belongs to sample `i // inner % samples`."""

    dim: int
    inner: int


#: "summed" where the gradients of all samples are added up, as for an operand that all share.
Verdict: TypeAlias = Layout | Literal["summed"] | None


@dataclass(frozen=True)
class _Step:
    """From a node's output to its operand number `slot`."""

    node: Any
    slot: int
    layout: Layout
    out: Shape
    operand: Shape
    samples: int

    def at(self, dim: int) -> Verdict:
        """The same slices along axis `dim` of the operand."""
        return Layout(dim, self.layout.inner)

    def axes(self, ndim: int, *attributes: str) -> list[int]:
        """The axes that the node names, counted from the front of `ndim` of them."""
        values = [getattr(self.node, a, None) for a in attributes]
        named = next((v for v in values if v is not None), ())
        # Negative axes are kept as unsigned numbers.
        return [
            (v - 2**64 if v >= 2**63 else v) % ndim
            for v in (named if isinstance(named, tuple) else (named,))
        ]


_Derivation: TypeAlias = Callable[[_Step], Verdict]
_DERIVATIONS: dict[str, _Derivation] = {}


def _derives(names: str) -> Callable[[_Derivation], _Derivation]:
    def register(function: _Derivation) -> _Derivation:
        for name in names.split():
            _DERIVATIONS[name if name[-1].isdigit() else name + "Backward0"] = function
        return function

    return register


def layouts(tape: Tape) -> dict[tuple[Node, int], Verdict]:
    """Where the samples lie in the gradient at each edge of the tape, as far as can be derived."""
    known: dict[tuple[Node, int], Verdict] = {
        edge_key(root.edge): Layout(0, root.inner) if tape.samples > 1 else None
        for root in tape.roots
    }
    for node in reversed(tape.nodes):
        if node in tape.weights:
            continue
        outputs = [known[node, nr] for nr in range(len(metadata(node))) if (node, nr) in known]
        for slot, (child, nr) in enumerate(node.next_functions):
            if child is None or not tape.carries_samples(child):
                continue
            verdicts = {_derived(tape, node, slot, child, nr, output) for output in outputs}
            if (child, nr) in known:
                verdicts.add(known[child, nr])
            known[child, nr] = verdicts.pop() if len(verdicts) == 1 else None
    return known


def _derived(tape: Tape, node: Node, slot: int, child: Node, nr: int, output: Verdict) -> Verdict:
    derivation = _DERIVATIONS.get(node.name()) if node not in tape.held else _pointwise
    if derivation is None or not isinstance(output, Layout):
        return None
    out, operand = shape_of(node), shape_of(child, nr)
    return derivation(_Step(node, slot, output, out, operand, tape.samples))


@_derives(
    "Abs Add Acos Alias Asin Atan Ceil Celu Clamp ClampMax ClampMin Clone Cos Cosh Digamma Div Elu "
    "Erf Erfc Exp Exp2 Expand Expm1 Fill Floor Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp "
    "Lgamma Log Log10 Log1P Log2 LogSigmoid LogicalNot MaskedFill Maximum Minimum Mish MseLoss Mul "
    "Neg Pow Reciprocal Relu Round Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss "
    "Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Trunc Where Xlogy BinaryCrossEntropy "
    "BinaryCrossEntropyWithLogits HuberLoss Addcdiv Addcmul Atan2 Conj Real Imag NanToNum Hypot "
    "LerpBackward1 PowBackward1 ClampBackward1 XlogyBackward1 NativeDropout PreluKernel "
    "EluBackward GeluBackward LeakyReluBackward SigmoidBackward SiluBackward SoftplusBackward "
    "TanhBackward ThresholdBackward AddBackward1 DivBackward1 MulBackward1 RsubBackward1 "
    "SubBackward1"
)
def _pointwise(step: _Step) -> Verdict:
    dim = step.layout.dim - len(step.out) + len(step.operand)
    if dim < 0 or step.operand[dim] == 1:
        return "summed"
    return step.at(dim)


@_derives(
    "View UnsafeView ReshapeAlias Unsqueeze Squeeze SqueezeBackward1 SqueezeBackward2 Unflatten"
)
def _reshape(step: _Step) -> Verdict:
    stride = step.layout.inner * math.prod(step.out[step.layout.dim + 1 :])
    for dim, length in enumerate(step.operand):
        below = math.prod(step.operand[dim + 1 :])
        if below and stride % below == 0 and length * below % (stride * step.samples) == 0:
            return Layout(dim, stride // below) if length else None
    return None


@_derives("T Transpose TransposeBackward1")
def _transpose(step: _Step) -> Verdict:
    ndim = len(step.out)
    (first,) = step.axes(ndim, "_saved_dim0") or [0]
    (second,) = step.axes(ndim, "_saved_dim1") or [ndim - 1]
    return step.at({first: second, second: first}.get(step.layout.dim, step.layout.dim))


@_derives("Permute")
def _permute(step: _Step) -> Verdict:
    return step.at(step.axes(len(step.out), "_saved_dims")[step.layout.dim])


@_derives("Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Flip Roll Slice Split SplitWithSizes")
@_derives("UnsafeSplit Cat Glu")
@_derives("Narrow Tile SortBackward0 TopkBackward0 FftC2C FftC2R FftR2C Unfold")
@_derives("IndexSelect Gather")
def _along(step: _Step) -> Verdict:
    """What happens along other axes is within a sample."""
    dim = step.layout.dim
    axes = step.axes(len(step.operand), "_saved_dim", "_saved_dims", "_saved_dimension")
    same = dim < len(step.operand) and step.operand[dim] == step.out[dim]
    return step.at(dim) if axes and dim not in axes and same else None


@_derives(
    "SumBackward1 MeanBackward1 ProdBackward1 Amax Amin MaxBackward0 MinBackward0 Logsumexp Var Std"
)
@_derives("LinalgVectorNorm NormBackward1 NormBackward2 Select Unbind Median")
def _reduced(step: _Step) -> Verdict:
    axes = step.axes(len(step.operand), "_saved_dim")
    if not axes:
        return None
    if len(step.out) == len(step.operand):  # reduced axes are kept, with length 1
        return None if step.layout.dim in axes else step.at(step.layout.dim)
    return step.at([d for d in range(len(step.operand)) if d not in axes][step.layout.dim])


@_derives("ViewAsComplex ViewAsReal")
def _as_pairs(step: _Step) -> Verdict:
    """A last axis of length 2 comes or goes."""
    dim = step.layout.dim
    return step.at(dim) if dim < min(len(step.out), len(step.operand)) else None


@_derives("Stack")
def _stack(step: _Step) -> Verdict:
    (new,) = step.axes(len(step.out), "_saved_dim")
    dim = step.layout.dim
    return None if dim == new else step.at(dim - (dim > new))


@_derives("Mm Addmm Bmm Baddbmm")
def _matmul(step: _Step) -> Verdict:
    slot = step.slot
    if "add" in step.node.name().lower():
        if slot == 0:
            return _pointwise(step)
        slot -= 1
    rows = len(step.out) - 2  # the axis of the first factor's rows; the next is the second's
    dim = step.layout.dim
    return step.at(dim) if dim < rows or dim == rows + slot else None


@_derives("Convolution MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D Col2Im Im2Col")
@_derives("AdaptiveAvgPool2D AdaptiveAvgPool3D UpsampleNearest1D UpsampleNearest2D")
@_derives("UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleNearest3D")
@_derives("UpsampleTrilinear3D NativeGroupNorm")
@_derives("ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D NllLoss NllLoss2D")
@_derives("ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention")
@_derives("ScaledDotProductFlashAttention ScaledDotProductCudnnAttention")
def _batched(step: _Step) -> Verdict:
    """The first axis is that of a batch, whose entries the operation keeps apart."""
    batched = len(step.out) > 2 or step.node.name() == "NllLossBackward0"
    same = step.out[0] == step.operand[0]
    first = step.slot < (3 if "Attention" in step.node.name() else 1)
    return step.at(0) if batched and first and same and step.layout.dim == 0 else None


@_derives("ConstantPadNd")
def _pad(step: _Step) -> Verdict:
    pairs = 2 * (len(step.out) - 1 - step.layout.dim)  # which count axes from the last
    return None if any(step.node._saved_pad[pairs : pairs + 2]) else step.at(step.layout.dim)


@_derives("NativeLayerNorm")
def _layer_norm(step: _Step) -> Verdict:
    outer = len(step.out) - len(step.node._saved_normalized_shape)
    return step.at(step.layout.dim) if step.slot == 0 and step.layout.dim < outer else None


@_derives("NativeBatchNorm CudnnBatchNorm")
def _batch_norm(step: _Step) -> Verdict:
    if step.layout.dim == 1:  # samples are channels, as in instance normalisation
        return step.at(1 if step.slot == 0 else 0)
    return step.at(step.layout.dim) if step.slot == 0 and not step.node._saved_training else None


@_derives("Index")
def _index(step: _Step) -> Verdict:
    given = [d for d, index in enumerate(step.node._saved_indices) if index is not None]
    adjacent = given[-1] - given[0] + 1 == len(given)  # else the indexed axes come first
    return step.at(step.layout.dim) if adjacent and step.layout.dim < given[0] else None
