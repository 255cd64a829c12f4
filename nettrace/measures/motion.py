"""How far a network has moved since its first look, and since the look before this.

The kernel's motion: Fort et al., Deep learning versus kernel learning (2020), arXiv:2010.15110. The
weights', and whether it is lazy: Chizat, Oyallon and Bach (2019), arXiv:1812.07956; Kumar et al.
(2024), arXiv:2310.06110. The attribute `reference_step` is the step of the look compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.measures.registry import Value, measure
from nettrace.statistics import Inapplicable

_FORT = "Fort et al. 2020, arXiv:2010.15110"
_KUMAR = "Kumar et al. 2024, arXiv:2310.06110"
_LAZY = "Chizat, Oyallon and Bach 2019, arXiv:1812.07956"
_CKA = "Kornblith et al. 2019, arXiv:1905.00414"
_ANGLES = "Bjorck and Golub 1973, Numerical methods for computing angles between linear subspaces"
_RELATIVE = "Frobenius norm of the difference of the (N C, N C) kernels, over that of the earlier"
_COSINE = "1 - tr(K K') / (|K| |K'|), Frobenius norms of the (N C, N C) kernels, in [0, 1]"
_SUBSPACE = (
    "principal angles in radians, smallest first, between the spans of the k leading eigenvectors; "
    "k is the least multiple of C from 10 on, but at most half of N C"
)

# The kernel ---------------------------------------------------------------------------------------


@measure(
    "ntk/distance_first",
    needs=["gram", "first.gram"],
    convention=_RELATIVE + ", that of the first look",
    source=_KUMAR,
)
def distance(gram: Tensor, earlier: Tensor) -> Tensor:
    """How far the kernel is from that of the first look, relative to that."""
    _check_shapes(gram, earlier)
    scale = _norm(earlier)
    if not bool(scale > 0):
        raise ValueError("the relative distance from a kernel that is zero is not defined")
    return _norm(gram.double() - earlier.double()) / scale


@measure(
    "ntk/distance_previous",
    needs=["gram", "previous.gram"],
    convention=_RELATIVE + ", that of the look before",
    source=_KUMAR,
)
def distance_previous(gram: Tensor, earlier: Tensor) -> Tensor:
    """How far the kernel is from that of the look before, relative to that."""
    return distance(gram, earlier)


@measure(
    "ntk/velocity",
    needs=["gram", "previous.gram", "step", "previous.step"],
    convention="ntk/distance_previous over the number of steps since then",
    source=_KUMAR,
)
def velocity(gram: Tensor, earlier: Tensor, step: int, earlier_step: int) -> Tensor:
    """How fast the kernel moves, relative to itself, a step."""
    return distance(gram, earlier) / (step - earlier_step)


@measure(
    "ntk/misalignment_first",
    needs=["gram", "first.gram"],
    convention=_COSINE,
    source=_FORT,
)
def misalignment(gram: Tensor, earlier: Tensor) -> Tensor:
    """The kernel distance: how far the kernel points from where it did at the first look."""
    _check_shapes(gram, earlier)
    # Half the squared distance between unit vectors, which loses no digits to 1 - cos.
    return (_unit(gram) - _unit(earlier)).square().sum() / 2


@measure(
    "ntk/misalignment_previous",
    needs=["gram", "previous.gram"],
    convention=_COSINE,
    source=_FORT,
)
def misalignment_previous(gram: Tensor, earlier: Tensor) -> Tensor:
    """The kernel distance to the look before."""
    return misalignment(gram, earlier)


@measure(
    "ntk/angular_velocity",
    needs=["gram", "previous.gram", "step", "previous.step"],
    convention="ntk/misalignment_previous over the number of steps since then",
    source=_FORT,
)
def angular_velocity(gram: Tensor, earlier: Tensor, step: int, earlier_step: int) -> Tensor:
    """The kernel velocity: how fast the kernel turns, a step."""
    return misalignment(gram, earlier) / (step - earlier_step)


@measure(
    "ntk/cka_distance_first",
    needs=["gram", "first.gram"],
    convention="1 - CKA: as ntk/misalignment_first, rows and columns less their means over all "
    "N C; left out where that leaves rounding alone",
    source=_CKA,
)
def cka_distance(gram: Tensor, earlier: Tensor) -> Tensor:
    """How far the centred kernel points from where it did at the first look."""
    centred = [_centred(kernel) for kernel in (gram, earlier)]
    rounding = 10 * torch.finfo(gram.dtype).eps
    if any(_norm(c) <= rounding * _norm(k) for c, k in zip(centred, (gram, earlier), strict=True)):
        raise Inapplicable("centring leaves nothing of a kernel that is the same for all pairs")
    return misalignment(*centred)


@measure(
    "ntk/rotation_first",
    needs=["leading_eigenvectors", "first.leading_eigenvectors"],
    convention=_SUBSPACE + "; of the first look",
    dims=["angle"],
    source=_ANGLES,
)
def rotation(vectors: Tensor, earlier: Tensor) -> Value:
    """How far the leading eigenspace has turned since the first look."""
    _check_shapes(vectors, earlier)
    overlap = vectors.mT @ earlier
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(earlier - vectors @ overlap).flip(0)  # exact where angles are tiny
    return Value(torch.atan2(sines, cosines), attributes={"k": vectors.shape[1]})


@measure(
    "ntk/rotation_previous",
    needs=["leading_eigenvectors", "previous.leading_eigenvectors"],
    convention=_SUBSPACE + "; of the look before",
    dims=["angle"],
    source=_ANGLES,
)
def rotation_previous(vectors: Tensor, earlier: Tensor) -> Value:
    """How far the leading eigenspace has turned since the look before."""
    return rotation(vectors, earlier)


# The weights --------------------------------------------------------------------------------------


@measure(
    "weights/displacement",
    needs=["weights", "first.weights"],
    convention="|theta - theta_0| / |theta_0|, norms over all parameters that need a gradient; "
    "infinite where theta_0 = 0",
    source=_KUMAR,
)
def displacement(weights: dict[str, Tensor], earlier: dict[str, Tensor]) -> Tensor:
    """How far the weights are from those of the first look, relative to those."""
    moved, norms = _moved(weights, earlier)
    return _relative(moved.square().sum().sqrt(), norms.square().sum().sqrt())


@measure(
    "weights/displacement_per_layer",
    needs=["weights", "first.weights"],
    convention="|theta - theta_0| / |theta_0| for each parameter; infinite where theta_0 = 0",
    dims=["layer"],
    source=_KUMAR,
)
def displacement_per_layer(weights: dict[str, Tensor], earlier: dict[str, Tensor]) -> Value:
    """The same for each parameter; not shares of the whole."""
    moved, norms = _moved(weights, earlier)
    return Value(_relative(moved, norms), coordinates={"layer": list(weights)})


@measure(
    "weights/linearised_loss",
    needs=["linearised_losses"],
    convention="mean over samples, of outputs f_0 + J_0 (theta - theta_0); standard error over "
    "samples",
    source=_KUMAR,
)
def linearised_loss(linearised_losses: Tensor) -> Value:
    """The loss of the network linearised at its first look, with the weights of now."""
    return Value.mean(linearised_losses)


@measure(
    "weights/lazy_rich_index",
    needs=["outputs", "linearised_outputs", "first_outputs"],
    convention="|f - f_lin| / |f - f_0|, norms over samples and outputs, with f_lin = f_0 + "
    "J_0 (theta - theta_0); 0 is lazy",
    source=_LAZY,
)
def lazy_rich_index(outputs: Tensor, linearised: Tensor, first: Tensor) -> Tensor:
    """What share of the outputs' motion the linearised network misses: 0 where it is lazy."""
    moved = _norm(outputs.double() - first.double())
    if not bool(moved > 0):
        raise Inapplicable("the outputs have not moved yet")
    return _norm(outputs.double() - linearised.double()) / moved


def _norm(values: Tensor) -> Tensor:
    wide = values.to(torch.promote_types(values.dtype, torch.float64))
    norm: Tensor = torch.linalg.vector_norm(wide)
    return norm


def _check_shapes(now: Tensor, earlier: Tensor) -> None:
    if now.shape != earlier.shape:
        raise ValueError(
            f"expected the shape {tuple(earlier.shape)} of the earlier look, got "
            f"{tuple(now.shape)}: the network's outputs have changed in number"
        )


def _unit(kernel: Tensor) -> Tensor:
    norm = _norm(kernel)
    if not bool(norm > 0):
        raise ValueError("the direction of a kernel that is zero is not defined")
    return kernel.double() / norm


def _centred(gram: Tensor) -> Tensor:
    kernel = gram.double().reshape(gram.shape[0] * gram.shape[1], -1)
    kernel = kernel - kernel.mean(0)
    return kernel - kernel.mean(1, keepdim=True)


def _relative(moved: Tensor, norms: Tensor) -> Tensor:
    return torch.where(moved > 0, moved / norms, 0.0)


def _moved(weights: dict[str, Tensor], earlier: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The norms of each parameter's displacement and of what it was, on the CPU."""
    if weights.keys() != earlier.keys():
        raise ValueError(
            f"the parameters {sorted(weights.keys() ^ earlier.keys())} need a gradient either now "
            "or at the first look, not both: what they were then is not known"
        )
    moved = [_norm(w - earlier[name]).cpu() for name, w in weights.items()]
    return torch.stack(moved), torch.stack([_norm(earlier[name]).cpu() for name in weights])
