"""The gradients of single samples: signal and noise, their spectrum and tails, and conflicts.

With g_n the gradient of sample n's loss, G their expectation over the source of the samples and
Sigma their covariance there, stochastic gradient descent with batches of B samples sees G with
noise of covariance Sigma / B. Of N samples with mean g, unbiased estimates are

    tr Sigma = N / (N - 1) (<|g_n|^2> - |g|^2)      and      |G|^2 = |g|^2 - tr Sigma / N,

and the simple noise scale tr Sigma / |G|^2 is the batch size at which signal and noise are equal:
McCandlish et al. (2018), arXiv:1812.06162, section 2.2 and appendix A. Errors are those of leaving
out samples one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nettrace.jackknife import delete_one_error
from nettrace.measures.registry import Value, measure
from nettrace.operator import PerLayer
from nettrace.statistics import Inapplicable
from nettrace.statistics.kernel import spectrum_of

_SOURCE = "McCandlish et al. 2018, arXiv:1812.06162, appendix A"
_PARTS = ("gradient_layer_squares", "gradient_layer_overlaps")
_IN_SAMPLES = (*_PARTS, "gradient_batch")
_OF_STEP = "of a step's batch, the samples' shares of its loss, times N"
#: How many samples a tail index takes, at least.
_FEWEST = 16


@measure(
    "gradients/norms",
    needs=["gradient_layer_squares"],
    convention=f"norm of each sample's loss gradient; {_OF_STEP}",
    dims=["gradient_sample"],
    source=_SOURCE,
)
def norms(gradient_layer_squares: PerLayer) -> Tensor:
    """The norms of per-sample loss gradients."""
    return _total(gradient_layer_squares).clamp_min(0).sqrt()


@measure(
    "gradients/signal",
    needs=_PARTS,
    convention="squared norm of the expected loss gradient, unbiased: of the mean over samples "
    "less noise / N, negative where the noise hides it; standard error by the jackknife",
    source=_SOURCE,
)
def signal(gradient_layer_squares: PerLayer, gradient_layer_overlaps: PerLayer) -> Value:
    """The squared norm of the expected gradient, unbiased."""
    return _estimate(_signal, _total(gradient_layer_squares), _total(gradient_layer_overlaps))


@measure(
    "gradients/noise",
    needs=_IN_SAMPLES,
    convention="trace of the covariance of per-sample loss gradients, unbiased, of single samples; "
    "standard error by the jackknife",
    source=_SOURCE,
)
def noise(
    gradient_layer_squares: PerLayer, gradient_layer_overlaps: PerLayer, gradient_batch: float
) -> Value:
    """The trace of the covariance of per-sample gradients, unbiased."""
    squares, overlaps = _total(gradient_layer_squares), _total(gradient_layer_overlaps)
    return _estimate(_noise, squares, overlaps, gradient_batch)


@measure(
    "gradients/noise_scale",
    needs=_IN_SAMPLES,
    convention="noise over signal, in samples: the simple noise scale; negative where the samples "
    "do not tell the signal from zero; standard error by the jackknife",
    source=_SOURCE,
)
def noise_scale(
    gradient_layer_squares: PerLayer, gradient_layer_overlaps: PerLayer, gradient_batch: float
) -> Value:
    """The batch size at which the gradient's signal and noise are equal."""
    squares, overlaps = _total(gradient_layer_squares), _total(gradient_layer_overlaps)
    return _estimate(_noise_scale, squares, overlaps, gradient_batch)


@measure(
    "gradients/signal_to_noise_per_layer",
    needs=_IN_SAMPLES,
    convention="signal over noise of single samples, by parameter, each unbiased; standard error "
    "by the jackknife",
    dims=["layer"],
    source="Liu et al. 2020, arXiv:2001.07384, definition 1, with sums over a parameter's entries",
)
def signal_to_noise_per_layer(
    gradient_layer_squares: PerLayer, gradient_layer_overlaps: PerLayer, gradient_batch: float
) -> Value:
    """Each parameter's ratio of gradient signal to noise."""
    squares = torch.stack(list(gradient_layer_squares.values()), 1)
    overlaps = torch.stack(list(gradient_layer_overlaps.values()), 1)
    found = _estimate(_signal_to_noise, squares, overlaps, 1 / gradient_batch)
    return Value(found.value, found.standard_error, {"layer": list(gradient_layer_squares)})


@measure(
    "gradients/fisher_trace",
    needs=["gradient_layer_squares"],
    convention="mean over samples of squared loss gradients: the trace of the empirical Fisher; "
    f"{_OF_STEP}; standard error over samples",
    source="Kunstner et al. 2019, arXiv:1905.12558",
)
def fisher_trace(gradient_layer_squares: PerLayer) -> Value:
    """The trace of the empirical Fisher."""
    return Value.mean(_total(gradient_layer_squares))


@measure(
    "gradients/covariance_spectrum",
    needs=["gradient_gram"],
    convention="eigenvalues of the covariance of per-sample loss gradients, sums over N, largest "
    "first; N of them, among which all that are not zero; their sum is (N - 1) / N noise",
    dims=["gradient_mode"],
    source=_SOURCE,
)
def covariance_spectrum(gradient_gram: Tensor) -> Tensor:
    """The spectrum of the gradients' covariance."""
    centred = gradient_gram - gradient_gram.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    return spectrum_of(centred / len(centred))


@measure(
    "gradients/tail_index",
    needs=_PARTS,
    convention="Hill's estimate of the exponent a of P(|g_n - g| > x) ~ x^-a, from the largest "
    "sqrt(N) norms of N, at least 16; standard error a / sqrt(k - 2) of k norms",
    source="Hill 1975; of gradient noise: Simsekli et al. 2019, arXiv:1901.06053",
)
def tail_index(gradient_layer_squares: PerLayer, gradient_layer_overlaps: PerLayer) -> Value:
    """How heavy the tail of the gradient noise is: smaller is heavier."""
    squares, overlaps = _total(gradient_layer_squares), _total(gradient_layer_overlaps)
    if len(squares) < _FEWEST:
        raise Inapplicable(f"a tail index takes at least {_FEWEST} samples, got {len(squares)}")
    distances = (squares - 2 * overlaps + overlaps.mean()).clamp_min(0)
    count = math.isqrt(len(squares))
    largest = distances.sort(descending=True).values[: count + 1].log() / 2
    index = (count - 1) / (largest[:count] - largest[count]).sum()
    return Value(index, index / math.sqrt(count - 2), attributes={"norms": count})


@measure(
    "gradients/conflict",
    needs=["term_products"],
    convention="cosines between the gradients of the terms that the step's loss is a sum of",
    dims=["term", "other_term"],
    source="Yu et al. 2020, arXiv:2001.06782, definition 1",
)
def conflict(term_products: tuple[list[str], PerLayer]) -> Value:
    """Whether the terms of a loss pull the same way."""
    names, products = term_products
    return Value(_cosines(_total(products)), coordinates={"term": names, "other_term": list(names)})


@measure(
    "gradients/conflict_per_layer",
    needs=["term_products"],
    convention="cosines between the gradients of the terms that the step's loss is a sum of, by "
    "parameter",
    dims=["layer", "term", "other_term"],
    source="Yu et al. 2020, arXiv:2001.06782, definition 1",
)
def conflict_per_layer(term_products: tuple[list[str], PerLayer]) -> Value:
    """Whether the terms of a loss pull each parameter the same way."""
    names, products = term_products
    cosines = torch.stack([_cosines(product) for product in products.values()])
    labels = {"layer": list(products), "term": names, "other_term": list(names)}
    return Value(cosines, coordinates=labels)


@measure(
    "gradients/conflict_per_group",
    needs=["term_products", "parameter_groups"],
    convention="cosines between the gradients of the terms that the step's loss is a sum of, over "
    "the parameters of each of the optimizers' groups",
    dims=["group", "term", "other_term"],
    source="Yu et al. 2020, arXiv:2001.06782, definition 1",
)
def conflict_per_group(
    term_products: tuple[list[str], PerLayer], parameter_groups: dict[str, list[str]]
) -> Value:
    """Whether the terms of a loss pull each group of parameters the same way."""
    names, products = term_products
    cosines = torch.stack(
        [
            _cosines(_total({name: products[name] for name in group}))
            for group in parameter_groups.values()
        ]
    )
    labels = {"group": list(parameter_groups), "term": names, "other_term": list(names)}
    return Value(cosines, coordinates=labels)


@measure(
    "gradients/gram",
    needs=["gradient_gram"],
    convention=f"inner products of per-sample loss gradients; {_OF_STEP}",
    dims=["gradient_sample", "other_gradient_sample"],
    source=_SOURCE,
    grouped=False,
)
def gram(gradient_gram: Tensor) -> Tensor:
    """The inner products of per-sample loss gradients."""
    return gradient_gram


def _total(shares: PerLayer) -> Tensor:
    return torch.stack([share.double() for share in shares.values()]).sum(0)


def _cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().clamp_min(0).sqrt()
    return products / (norms * norms[:, None])


# Of the mean square of N gradients and the square of their mean:


def _noise(square: Tensor, of_mean: Tensor, count: int) -> Tensor:
    return (square - of_mean) * (count / (count - 1) if count > 1 else torch.nan)


def _signal(square: Tensor, of_mean: Tensor, count: int) -> Tensor:
    return of_mean - _noise(square, of_mean, count) / count


def _noise_scale(square: Tensor, of_mean: Tensor, count: int) -> Tensor:
    return _noise(square, of_mean, count) / _signal(square, of_mean, count)


def _signal_to_noise(square: Tensor, of_mean: Tensor, count: int) -> Tensor:
    return 1 / _noise_scale(square, of_mean, count)


def _estimate(
    function: Callable[[Tensor, Tensor, int], Tensor],
    squares: Tensor,
    overlaps: Tensor,
    unit: float = 1.0,
) -> Value:
    """A function of those, and its standard error.

    Args:
        function: of the mean square, the square of the mean and N.
        squares: (N, ...) |g_n|^2.
        overlaps: (N, ...) the products of g_n with the mean.
        unit: by what to multiply it.
    """
    count = len(squares)
    if count < 2:
        raise ValueError("signal and noise are told apart by at least 2 samples, got 1")
    square, of_mean = squares.double().mean(0), overlaps.double().mean(0)
    # The mean without sample n is (N g - g_n) / (N - 1).
    less = (count * square - squares) / (count - 1)
    less_mean = (count**2 * of_mean - 2 * count * overlaps + squares) / (count - 1) ** 2
    error = delete_one_error(function(less, less_mean, count - 1))
    return Value(unit * function(square, of_mean, count), unit * error)
