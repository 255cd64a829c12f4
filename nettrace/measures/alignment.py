"""How the neural tangent kernel lies to what is to be learnt: targets, classes, residuals.

Of the kernel summed over outputs, (N, N): its alignment with the targets, Cristianini et al.,
On kernel-target alignment (2001), and centred, Cortes, Mohri and Rostamizadeh, Algorithms for
learning kernels based on centered alignment (2012). Of the (N C, N C) kernel: where the residual
lies among its modes, and how fast gradient descent takes each away, Jacot et al. (2018),
arXiv:1806.07572, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrace.jackknife import delete_one_error
from nettrace.likelihood import Categorical, Likelihood
from nettrace.measures.registry import Value, measure
from nettrace.statistics import Inapplicable

_MODES = "Jacot et al. 2018, arXiv:1806.07572, section 5"


@measure(
    "ntk/alignment",
    needs=["traced_gram", "targets", "suggested_likelihood"],
    convention="<K, Y Y^T> / (|K| |Y Y^T|), K the (N, N) kernel summed over outputs, Y classes "
    "one-hot, or real targets as they are; in [0, 1]; standard error over samples",
    source="Cristianini et al. 2001, On kernel-target alignment",
)
def alignment(traced_gram: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Value:
    """The alignment of kernel and targets, y^T K y / (|K| |y|^2) for one real target."""
    kernel, similarity = traced_gram.double(), _similarity(targets, likelihood)
    return _cosine(*(_inner(*pair) for pair in _pairs(kernel, similarity)))


@measure(
    "ntk/alignment_centred",
    needs=["traced_gram", "targets", "suggested_likelihood"],
    convention="as ntk/alignment, K and Y Y^T both centred over samples: linear CKA; in [0, 1], "
    "not corrected for few samples; standard error over samples",
    source="Cortes et al. 2012, arXiv:1203.0550",
)
def alignment_centred(traced_gram: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Value:
    """The centred alignment of kernel and targets.

    Of few samples it is too high: for p features and q targets that have nothing to do with each
    other, it is about sqrt(p q / ((p + n) (q + n))) for n samples.
    """
    kernel, similarity = traced_gram.double(), _similarity(targets, likelihood)
    return _cosine(*(_centred_inner(*pair) for pair in _pairs(kernel, similarity)))


@measure(
    "ntk/class_blocks",
    needs=["traced_gram", "outputs", "targets", "suggested_likelihood"],
    convention="mean entry of the (N, N) kernel summed over outputs, over pairs of different "
    "samples of two classes; NaN where there is no pair",
    dims=["class", "class_2"],
    source="Baratin et al. 2021, arXiv:2008.00938",
)
def class_blocks(
    traced_gram: Tensor, outputs: Tensor, targets: Tensor, likelihood: Likelihood | None
) -> Tensor:
    """The kernel between classes: how far learning one sample moves others of each class."""
    classes = _classes(targets, likelihood)
    count = outputs.shape[1]
    member = torch.nn.functional.one_hot(classes, count).to(traced_gram.device, torch.float64)
    sizes = member.sum(0)
    kernel = traced_gram.double()
    sums = member.T @ (kernel - kernel.diagonal().diag()) @ member
    return sums / (sizes.outer(sizes) - sizes.diag())


@measure(
    "ntk/class_ratio",
    needs=["traced_gram", "targets", "suggested_likelihood"],
    convention="mean entry of the (N, N) kernel summed over outputs, over pairs of different "
    "samples of one class, over that of two classes; standard error over samples",
    source="Baratin et al. 2021, arXiv:2008.00938",
)
def class_ratio(traced_gram: Tensor, targets: Tensor, likelihood: Likelihood | None) -> Value:
    """How much more alike the kernel finds samples of one class than those of two."""
    classes = _classes(targets, likelihood).to(traced_gram.device)
    alike = classes[:, None] == classes
    apart = (~alike).double()
    alike = alike.double().fill_diagonal_(0)
    kernel = traced_gram.double()
    within = _inner(kernel, alike) / _inner(alike, alike)
    between = _inner(kernel, apart) / _inner(apart, apart)
    if not bool((within / between)[0].isfinite()):
        raise ValueError(
            "the ratio within and between classes is not defined: it takes two samples of one "
            "class, one of another, and a kernel that is finite and not zero between them"
        )
    return _with_error(within / between)


@measure(
    "ntk/residual_modes",
    needs=["eigenvectors", "scores"],
    convention="squared share of the residual, the gradient of the losses by all N C outputs, in "
    "each eigenvector of the (N C, N C) kernel, largest eigenvalue first; the shares sum to 1; "
    "those of equal eigenvalues mean something in sum alone",
    dims=["mode"],
    source=_MODES,
)
def residual_modes(eigenvectors: Tensor, scores: Tensor) -> Tensor:
    """Where among the kernel's modes what is left to learn lies."""
    residual = scores.double()
    size = residual.square().sum()
    if not bool(size > 0) or not bool(size.isfinite()):
        raise ValueError(
            f"the modes of the residual are not defined: its squared norm is {float(size)}"
        )
    return torch.einsum("nc,nck->k", residual, eigenvectors).square() / size


@measure(
    "ntk/decay_rates",
    needs=["eigenvalues", "samples"],
    convention="eigenvalue of the (N C, N C) kernel over N, largest first: a step of gradient "
    "descent at learning rate eta on the mean over samples of half the squared error, summed over "
    "outputs, multiplies the residual in this mode by 1 - eta times it while the kernel stays",
    dims=["mode"],
    source=_MODES,
)
def decay_rates(eigenvalues: Tensor, samples: int) -> Tensor:
    """How fast each mode of the residual is predicted to be learnt, by unit of learning rate."""
    return eigenvalues / samples


def _similarity(targets: Tensor, likelihood: Likelihood | None) -> Tensor:
    """(N, N) inner products of targets; of classes, the number of positions where they agree."""
    rows = targets.reshape(len(targets), -1)
    if _are_classes(targets, likelihood):
        return (rows[:, None] == rows).sum(-1).double()
    return rows.double() @ rows.double().T


def _are_classes(targets: Tensor, likelihood: Likelihood | None) -> bool:
    if not targets.is_floating_point() and bool((targets < 0).any()):
        raise ValueError(
            f"expected classes from 0 on, got {int(targets.min())}: leave samples whose target is "
            "to be ignored out of the probe"
        )
    return isinstance(likelihood, Categorical) or (
        likelihood is None and not targets.is_floating_point()
    )


def _classes(targets: Tensor, likelihood: Likelihood | None) -> Tensor:
    if not _are_classes(targets, likelihood) or targets.dim() != 1:
        raise Inapplicable("the samples do not belong to one class each")
    return targets.long()


def _pairs(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(a, b), (a, a), (b, b)]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(1 + N,) the inner product of symmetric matrices, then without each sample in turn."""
    products = a * b
    whole = products.sum()
    return torch.cat([whole[None], whole - 2 * products.sum(1) + products.diagonal()])


def _centred_inner(a: Tensor, b: Tensor) -> Tensor:
    """As `_inner`, of the matrices centred over the samples that are there: <H a H, b>."""
    rows_a, rows_b = a.sum(1), b.sum(1)
    own_a, own_b = a.diagonal(), b.diagonal()
    whole = rows_a @ rows_b
    without = whole - rows_a * rows_b  # sum over m != n of (rows_a - a[n])_m (rows_b - b[n])_m
    without -= b @ rows_a - own_b * rows_a + a @ rows_b - own_a * rows_b
    without += (a * b).sum(1) - own_a * own_b
    rows = torch.cat([whole[None], without])
    count = torch.full_like(rows, len(a) - 1)
    count[0] += 1
    ones = torch.ones_like(a)
    plain = _inner(a, b)
    centred = plain - 2 * rows / count + _inner(a, ones) * _inner(b, ones) / count**2
    return torch.where(centred.abs() > 1e-12 * plain.abs(), centred, 0)  # the rest is rounding


def _cosine(ab: Tensor, aa: Tensor, bb: Tensor) -> Value:
    sizes = aa * bb
    if not bool(sizes[0] > 0) or not bool(sizes[0].isfinite()):
        raise ValueError(
            "the alignment of kernel and targets is not defined: one of them is zero, not finite, "
            "or the same for all samples"
        )
    return _with_error((ab / sizes.sqrt()).clamp(0, 1))


def _with_error(values: Tensor) -> Value:
    """A value and its standard error, from that of all samples and those without each in turn."""
    return Value(values[0], delete_one_error(values[1:]))
