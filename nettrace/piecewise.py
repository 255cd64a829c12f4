"""Whether a network is piecewise linear in each single weight, read off the autograd tape.

For such a network, d^2 f / d w_i^2 = 0 wherever it is defined, so that the trace of the Hessian of
a loss is that of its Gauss-Newton part: tr H = sum_i (df/dw_i)^T M (df/dw_i), M the Hessian of the
loss by the outputs f. Off the diagonal the two matrices differ.
"""

from __future__ import annotations

from torch.autograd.graph import GradientEdge, Node

from nettrace.tape import VIEWS, Tape

#: Nodes that are piecewise linear in all of their inputs together.
_LINEAR = (
    VIEWS
    | {
        name + "Backward0"
        for name in (
            "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Amax "
            "Amin AvgPool2D AvgPool3D Cat Clamp ClampMax ClampMin ConstantPadNd Copy Cumsum "
            "Diagonal Embedding Expand Flip Gather Hardshrink Hardsigmoid Hardtanh Im2Col "
            "Index IndexAdd IndexSelect LeakyRelu MaskedFill Max Maximum MaxPool2DWithIndices "
            "MaxPool3DWithIndices Mean Min Minimum MkldnnMaxPool2D Neg PixelShuffle "
            "PixelUnshuffle ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat "
            "ReplicationPad1D ReplicationPad2D ReplicationPad3D Roll Rsub Scatter ScatterAdd "
            "Softshrink Stack Sub Sum Threshold Trace Tril Triu Unfold UpsampleBicubic2D "
            "UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D "
            "UpsampleNearest3D UpsampleTrilinear3D Where"
        ).split()
    }
    | {name + "Backward1" for name in "Clamp ClampMax ClampMin Max Mean Min Sum".split()}
)

#: Nodes that are linear in each input, and multiply the inputs at these slots.
_PRODUCTS = {
    name + "Backward0": slots
    for name, slots in {
        "Addmm": (1, 2),
        "Addmv": (1, 2),
        "Baddbmm": (1, 2),
        "Bmm": (0, 1),
        "Convolution": (0, 1),
        "Dot": (0, 1),
        "Linear": (0, 1),
        "Mm": (0, 1),
        "Mul": (0, 1),
        "Mv": (0, 1),
        "NativeBatchNorm": (0, 1),
        "CudnnBatchNorm": (0, 1),
        "PreluKernel": (0, 1),
    }.items()
}

#: Nodes that are linear in all inputs but for those at these slots.
_LINEAR_BUT = {
    "DivBackward0": (1,),
    "NativeGroupNormBackward0": (0,),
    "NativeLayerNormBackward0": (0,),
}


class NotPiecewiseLinearError(ValueError):
    """A network that bends in some weight: its Hessian has more than a Gauss-Newton part."""


def check_piecewise_linear(tape: Tape) -> None:
    """Checks that the outputs are piecewise linear in each single weight.

    They are if every operation is piecewise linear in what depends on parameters, and no two
    operands that are multiplied depend on the same parameter. So convolutions, ReLU, pooling,
    residual additions, batch normalisation in eval mode and low-rank products B A pass; smooth
    activations, softmax, layer and group normalisation of what depends on parameters, and weights
    that act on their own results, such as tied ones and layers called twice, do not.

    Args:
        tape: of the outputs.

    Raises:
        NotPiecewiseLinearError: if they are not, or an operation is not known to be; it is named.
    """
    behind: dict[Node, frozenset[str]] = {}

    def depends(node: Node, slot: int) -> frozenset[str]:
        child, nr = node.next_functions[slot]
        if child is None:
            return frozenset()
        name = tape.leaf(GradientEdge(child, nr))
        return behind.get(child, frozenset()) if name is None else frozenset({name})

    for node in tape.nodes:
        inputs = [depends(node, slot) for slot in range(len(node.next_functions))]
        behind[node] = frozenset().union(*inputs)
        name = node.name()
        if name in _PRODUCTS:
            left, right = (inputs[slot] for slot in _PRODUCTS[name])
            if both := sorted(left & right):
                raise NotPiecewiseLinearError(
                    f"the outputs are not piecewise linear in {both[0]!r}: {name} multiplies two "
                    f"results that both depend on it. {_REMEDY}"
                )
            if getattr(node, "_saved_training", False):
                raise NotPiecewiseLinearError(
                    f"{name} normalises by the batch's own statistics: call model.eval() first"
                )
        elif name in _LINEAR_BUT:
            bent = frozenset().union(*(inputs[slot] for slot in _LINEAR_BUT[name]))
            if bent:
                raise NotPiecewiseLinearError(_message(name, bent))
        elif name not in _LINEAR:
            raise NotPiecewiseLinearError(_message(name, behind[node]))


_REMEDY = (
    "The trace of the Hessian is that of the Gauss-Newton matrix for piecewise linear networks "
    "alone; take 'fisher/trace' for the Gauss-Newton part, which is defined here too, or estimate "
    "the trace by Hutchinson's method"
)


def _message(name: str, parameters: frozenset[str]) -> str:
    few = ", ".join(sorted(parameters)[:3]) + (", ..." if len(parameters) > 3 else "")
    return (
        f"{name} is not known to be piecewise linear in its input, which depends on {few}. "
        f"{_REMEDY}"
    )
