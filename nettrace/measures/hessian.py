"""Curvature of the mean loss: the Hessian, the Gauss-Newton matrix and the Fisher information.

H = G + R, with G the generalised Gauss-Newton matrix, the mean over samples of J^T M J with M the
Hessian of a sample's loss by its outputs, and R what the outputs' own curvature adds: Schraudolph
(2002), Fast curvature matrix-vector products; Martens (2020), arXiv:1412.1193, sections 8 and 9.
The Fisher information is G for losses that are negative logarithms of a likelihood in its natural
parameters, as cross-entropy and half the squared error are.

All are found by products with vectors, in single precision or wider, on a tape without fused
attention: eigenvalues by Lanczos' process with full reorthogonalisation, to an estimated error of
1e-3 in single and 1e-6 in double precision, relative to the outermost at their end of the spectrum
(to a tenth of the other where that is more); traces by XTrace. A largest eigenvalue that is
looked at alone may at first be off by its distance from the second where that is below one per
cent; asked for together with `hessian/eigenvalues` it is not.

Stability: Cohen et al. (2021), arXiv:2103.00065, for gradient descent with momentum; Cohen et al.
(2022), arXiv:2207.14484, for Adam; Wu and Su (2023), arXiv:2305.17490, for noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nettrace.eigenpairs import Eigenpairs
from nettrace.estimators import Estimate
from nettrace.matrix_traces import Probed
from nettrace.measures.registry import Value, measure
from nettrace.operator import PerLayer
from nettrace.per_sample import LossJacobian
from nettrace.second_order import CurvatureOperator
from nettrace.spectral_density import Quadrature
from nettrace.statistics import Inapplicable, Statistics, Unavailable

_MARTENS = "Schraudolph 2002; Martens 2020, arXiv:1412.1193, section 8"
_LANCZOS = "Lanczos 1950; Parlett 1998, The symmetric eigenvalue problem, chapter 13"
_XTRACE = "Epperly, Tropp and Webber 2024, arXiv:2301.07825"
_QUADRATURE = "Ubaru, Chen and Saad 2017; Ghorbani et al. 2019, arXiv:1901.10159"
_EDGE = "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484"
_OF = "of the mean loss over samples"
#: By group, the matrix's statistics begin with this, and it is called that.
_MATRICES = {
    "hessian": ("hessian", f"the Hessian {_OF}"),
    "ggn": ("gauss_newton", f"the generalised Gauss-Newton matrix {_OF}"),
    "fisher": ("fisher", "the Fisher information, mean over samples"),
}
#: The width of densities, as a part of the spectrum's range.
_WIDTH = 0.01
#: Groups of measures for which the group's name stands: the Fisher's are dear beside its traces.
_GROUPED = ("hessian", "ggn")


def lambda_max(top: Eigenpairs) -> Value:
    """The largest eigenvalue, the sharpness where it is the Hessian's."""
    return Value(top.values[0], attributes=_residuals(top))


def eigenvalues(pairs: Eigenpairs) -> Value:
    """The eigenvalues at one end of the spectrum, signed."""
    return Value(pairs.values, attributes=_residuals(pairs))


def frobenius(estimates: Probed) -> Value:
    """The Frobenius norm, from an unbiased estimate of its square."""
    square = estimates.frobenius_square
    norm = square.value.clamp_min(0).sqrt()
    error = square.standard_error / (2 * norm) if norm else square.standard_error
    return Value(norm, error, attributes=_probes(square))


def density(found: Quadrature) -> Value:
    """The density of eigenvalues, at the places that density_at gives."""
    there = found.density(width=_WIDTH)
    return Value(there.value, there.standard_error, attributes=_draws(found))


def density_at(found: Quadrature) -> Value:
    """The eigenvalues at which the density is given."""
    return Value(found.grid(_WIDTH), attributes=_draws(found))


def _draws(found: Quadrature) -> dict[str, str | int | float]:
    draws, nodes = found.nodes.shape
    return {"n_probes": draws, "nodes": nodes, "width": _WIDTH, "products": found.products}


for _group, (_matrix, _words) in _MATRICES.items():
    _grouped = _group in _GROUPED
    measure(
        f"{_group}/lambda_max",
        needs=[f"{_matrix}_top"],
        convention=f"largest eigenvalue of {_words}; the attribute residual is |A v - lambda v|, "
        "a bound on the error",
        source=_LANCZOS,
        grouped=_grouped,
    )(lambda_max)
    measure(
        f"{_group}/eigenvalues",
        needs=[f"{_matrix}_leading"],
        convention=f"the {Statistics.upper} largest eigenvalues of {_words}, largest first; the "
        "attribute residuals has |A v - lambda v| of each",
        dims=["leading_mode"],
        source=_LANCZOS,
        grouped=_grouped,
    )(eigenvalues)
    measure(
        f"{_group}/frobenius",
        needs=[f"{_matrix}_estimates"],
        convention=f"Frobenius norm of {_words}; standard error of the estimator",
        source=_XTRACE,
        grouped=_grouped,
    )(frobenius)
    measure(
        f"{_group}/density",
        needs=[f"{_matrix}_density"],
        convention=f"density of the eigenvalues of {_words}, of integral 1; each is a Gaussian of "
        f"standard deviation {_WIDTH:g} of their range; standard error over draws",
        dims=["bin"],
        source=_QUADRATURE,
        grouped=False,
    )(density)
    measure(
        f"{_group}/density_at",
        needs=[f"{_matrix}_density"],
        convention=f"the eigenvalues at which {_group}/density is given",
        dims=["bin"],
        source=_QUADRATURE,
        grouped=False,
    )(density_at)


def _trace(found: Tensor | Estimate) -> Value:
    """From the samples' exact traces, or an estimate of their mean."""
    if isinstance(found, Tensor):
        exact = Value.mean(found)
        attributes: dict[str, str | int | float] = {"method": "exact", "error_of": "samples"}
        return Value(exact.value, exact.standard_error, attributes=attributes)
    return Value(found.value, found.standard_error, attributes=_probes(found))


_TRACE = (
    "exact where it is known to be, else estimated, as the attribute method says; standard error "
    "over samples, or of the estimator, as the attribute error_of says"
)


@measure(
    "hessian/trace",
    needs=["hessian_trace"],
    convention=f"trace of {_MATRICES['hessian'][1]}; {_TRACE}; exact for networks that are "
    "piecewise linear in each weight",
    source=_MARTENS,
)
def trace(hessian_trace: Tensor | Estimate) -> Value:
    """The trace of the Hessian of the mean loss by the parameters."""
    return _trace(hessian_trace)


@measure(
    "hessian/trace_per_layer",
    needs=["hessian_layer_traces"],
    convention=f"trace of each parameter's diagonal block of {_MATRICES['hessian'][1]}; {_TRACE}",
    dims=["layer"],
    source=_MARTENS,
)
def trace_per_layer(hessian_layer_traces: Mapping[str, Tensor | Estimate]) -> Value:
    """The trace of each parameter's block of the Hessian."""
    found = [_trace(share) for share in hessian_layer_traces.values()]
    errors = [torch.as_tensor(one.standard_error) for one in found]
    return Value(
        torch.stack([torch.as_tensor(one.value) for one in found]),
        torch.stack(errors),
        {"layer": list(hessian_layer_traces)},
        found[0].attributes,
    )


@measure(
    "ggn/trace",
    needs=["gauss_newton_trace"],
    convention=f"trace of {_MATRICES['ggn'][1]}; {_TRACE}; exact where it is the Fisher "
    "information",
    source=_MARTENS,
)
def gauss_newton_trace(gauss_newton_trace: Tensor | Estimate) -> Value:
    """The trace of the Gauss-Newton matrix."""
    return _trace(gauss_newton_trace)


@measure(
    "hessian/lambda_min",
    needs=["hessian_bottom"],
    convention=f"smallest eigenvalue, signed, of {_MATRICES['hessian'][1]}; the attribute residual "
    "is |A v - lambda v|, a bound on the error",
    source=_LANCZOS,
)
def lambda_min(hessian_bottom: Eigenpairs) -> Value:
    """The smallest eigenvalue of the Hessian: how far from convex the loss is."""
    return lambda_max(hessian_bottom)


@measure(
    "hessian/eigenvalues_lowest",
    needs=["hessian_lowest"],
    convention=f"the {Statistics.lower} smallest eigenvalues, signed, of "
    f"{_MATRICES['hessian'][1]}, smallest first; the attribute residuals has |A v - lambda v| of "
    "each",
    dims=["lowest_mode"],
    source=_LANCZOS,
    grouped=False,
)
def lowest(hessian_lowest: Eigenpairs) -> Value:
    """The smallest eigenvalues of the Hessian, signed."""
    return eigenvalues(hessian_lowest)


@measure(
    "hessian/lambda_max_per_layer",
    needs=["hessian_layer_tops"],
    convention=f"largest eigenvalue of each parameter's diagonal block of "
    f"{_MATRICES['hessian'][1]}; the attribute residual is the largest |A v - lambda v|",
    dims=["layer"],
    source=_LANCZOS,
    grouped=False,
)
def lambda_max_per_layer(hessian_layer_tops: Mapping[str, Eigenpairs]) -> Value:
    """The largest eigenvalue of each parameter's block of the Hessian."""
    tops = list(hessian_layer_tops.values())
    return Value(
        torch.stack([top.values[0] for top in tops]),
        coordinates={"layer": list(hessian_layer_tops)},
        attributes={"residual": max(float(top.residuals[0]) for top in tops)},
    )


@measure(
    "hessian/diagonal",
    needs=["hessian_diagonal"],
    convention=f"diagonal of {_MATRICES['hessian'][1]}, in the order of the parameters, each "
    "flattened; standard error of the estimator",
    dims=["parameter"],
    source=_XTRACE,
    grouped=False,
)
def diagonal(hessian_diagonal: Estimate) -> Value:
    """The diagonal of the Hessian, a number for each weight."""
    found = hessian_diagonal
    return Value(found.value, found.standard_error, attributes=_probes(found))


# Along directions that training takes -------------------------------------------------------------


@measure(
    "hessian/gradient_sharpness",
    needs=["hessian_operator", "mean_gradient"],
    convention=f"g^T H g / |g|^2, g the gradient {_OF}, H its Hessian",
    source="Cohen et al. 2021, arXiv:2103.00065",
)
def gradient_sharpness(operator: CurvatureOperator, mean_gradient: PerLayer) -> Tensor:
    """The curvature of the loss along its gradient."""
    return _rayleigh(operator, operator.flat(mean_gradient), "the gradient is zero")


@measure(
    "hessian/update_sharpness",
    needs=["hessian_operator", "weights", "previous.weights"],
    convention=f"u^T H u / |u|^2, u the difference of the weights to the look before, H the "
    f"Hessian {_OF}",
    source="Cohen et al. 2021, arXiv:2103.00065",
)
def update_sharpness(operator: CurvatureOperator, weights: PerLayer, earlier: PerLayer) -> Tensor:
    """The curvature of the loss along the way that the weights have come since the look before."""
    update = operator.flat({name: weights[name] - earlier[name] for name in operator.layers})
    return _rayleigh(operator, update, "the weights have not moved")


@measure(
    "hessian/gradient_alignment",
    needs=["hessian_leading", "hessian_operator", "mean_gradient"],
    convention="share of the squared gradient of the mean loss in the span of the "
    f"{Statistics.upper} leading eigenvectors of the Hessian, in [0, 1]",
    source="Gur-Ari, Roberts and Dyer 2018, arXiv:1812.04754, equation 2",
)
def gradient_alignment(
    leading: Eigenpairs, operator: CurvatureOperator, mean_gradient: PerLayer
) -> Value:
    """How much of the gradient lies in the top eigenspace of the Hessian."""
    gradient = operator.flat(mean_gradient).double()
    inside = leading.vectors.double().T @ gradient
    _check_length(gradient, "the gradient is zero")
    share = inside.square().sum() / gradient.square().sum()
    return Value(share, attributes={"modes": len(inside)})


@measure(
    "hessian/noise_alignment",
    needs=["hessian_leading", "hessian_operator", "loss_gradients", "loss_gradient_sqnorms"],
    convention="tr(V^T C V) / tr C, V the leading eigenvectors of the Hessian, C the covariance "
    "of the samples' gradients; in [0, 1]; standard error over samples",
    source="Gur-Ari, Roberts and Dyer 2018, arXiv:1812.04754, equation 2, for the noise",
)
def noise_alignment(
    leading: Eigenpairs,
    operator: CurvatureOperator,
    loss_gradients: LossJacobian,
    loss_gradient_sqnorms: Tensor,
) -> Value:
    """How much of the gradient noise lies in the top eigenspace of the Hessian."""
    if loss_gradients.samples < 2:
        raise ValueError("gradient noise takes at least 2 samples, got 1")
    vectors = leading.vectors
    along = torch.stack(
        [
            torch.stack(list(loss_gradients.jvp(operator.split(v)).values())).sum(0)
            for v in vectors.T
        ]
    ).double()
    mean = loss_gradients.mean().double()
    overlaps = torch.stack(list(loss_gradients.jvp(loss_gradients.mean(per_layer=True)).values()))
    inside = (along - along.mean(1, keepdim=True)).square().sum(0)
    whole = loss_gradient_sqnorms.double() - 2 * overlaps.sum(0).double() + mean.square().sum()
    _check_length(whole, "the samples' gradients are all the same")
    share = inside.sum() / whole.sum()
    # Of a ratio of means, by its linear part.
    samples = len(whole)
    error = (inside - share * whole).square().sum().sqrt() / whole.sum()
    error = error * (samples / max(samples - 1, 1)) ** 0.5
    return Value(share, error, attributes={"modes": len(along)})


# Stability ----------------------------------------------------------------------------------------


@measure(
    "hessian/stability",
    needs=["stability_top", "stability_threshold"],
    convention="largest eigenvalue of D^1/2 (H + S) D^1/2 over the value from which on steps of "
    "the optimizer grow, 2 (1 + b) / (1 - d) with momentum b and dampening d, 2 (1 + b) / (1 + "
    "2 b) by Nesterov, 2 (1 + b1) / (1 - b1) for Adam: 1 at the edge of stability; D the learning "
    "rates, over sqrt(v) + eps for Adam and AdamW, S the weight decay in the gradient",
    source=_EDGE,
    grouped=False,
)
def stability(stability_top: Eigenpairs, stability_threshold: float) -> Value:
    """How near the optimizer is to instability without noise: 1 at the edge of stability."""
    attributes = {**_residuals(stability_top), "threshold": stability_threshold}
    return Value(stability_top.values[0] / stability_threshold, attributes=attributes)


@measure(
    "hessian/stability_gd",
    needs=["hessian_top", "learning_rates"],
    convention="eta lambda_max / 2, eta the learning rate: 1 at the edge of stability of gradient "
    "descent without momentum, whatever the optimizer",
    source="Cohen et al. 2021, arXiv:2103.00065",
    grouped=False,
)
def stability_gd(hessian_top: Eigenpairs, learning_rates: Mapping[str, float]) -> Value:
    """How near plain gradient descent would be to instability."""
    several = set(learning_rates.values())
    if len(several) != 1:
        raise Unavailable(
            f"the parameters have different learning rates, {sorted(several)}: 'hessian/stability' "
            "takes account of each"
        )
    eta = several.pop()
    attributes = {**_residuals(hessian_top), "learning_rate": eta}
    return Value(eta * hessian_top.values[0] / 2, attributes=attributes)


@measure(
    "hessian/stability_sgd",
    needs=["hessian_layer_traces", "learning_rates"],
    convention="tr(D H) / 2, D the learning rates: at a minimum of all samples' losses at once, "
    "SGD of single samples is linearly stable only if it is at most 1; with batches of B, or "
    "where the samples' minima differ, it may exceed that",
    source="Wu and Su 2023, arXiv:2305.17490",
    grouped=False,
)
def stability_sgd(
    hessian_layer_traces: Mapping[str, Tensor | Estimate], learning_rates: Mapping[str, float]
) -> Value:
    """How near SGD of single samples would be to instability by its noise."""
    found = {name: _trace(share) for name, share in hessian_layer_traces.items()}
    halves = {name: learning_rates.get(name, 0.0) / 2 for name in found}
    value = sum(float(one.value) * halves[name] for name, one in found.items())
    first = next(iter(hessian_layer_traces.values()))
    if isinstance(first, Tensor):  # samples are the same for all layers
        whole = [torch.as_tensor(s) * halves[n] for n, s in hessian_layer_traces.items()]
        return _trace(torch.stack(whole).sum(0))
    errors = [float(torch.as_tensor(f.standard_error)) * halves[n] for n, f in found.items()]
    return Value(value, sum(errors), attributes=_probes(first))


def _rayleigh(operator: CurvatureOperator, vector: Tensor, zero: str) -> Tensor:
    _check_length(vector, zero)
    unit = (vector / torch.linalg.vector_norm(vector, dtype=torch.float64)).to(vector)
    found: Tensor = unit.double() @ operator(unit).double()
    return found


def _check_length(vector: Tensor, zero: str) -> None:
    if not bool(vector.abs().sum() > 0):
        raise Inapplicable(zero)


def _residuals(pairs: Eigenpairs) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {"residual": float(pairs.residuals[0])}
    if len(pairs.residuals) > 1:
        found["residuals"] = " ".join(f"{float(r):.3g}" for r in pairs.residuals)
    if not pairs.converged:
        found["converged"] = "not to the tolerance: the residual bounds the error"
    return found


def _probes(found: Estimate) -> dict[str, str | int | float]:
    return {"method": found.method, "n_probes": found.probes, "error_of": "estimator"}
