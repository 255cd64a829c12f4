"""Figures of traces: `draw` of the kernel and the Fisher information, and parts of others."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8E5AA8", "#777777"
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def draw(data: xr.Dataset, path: Path) -> None:
    """Draws a trace of ntk, fisher, collective and loss measures to a file."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), layout="constrained")
    step = data.step.values
    learning(axes[0, 0], data, step)
    layers(axes[0, 1], data, step)
    entropy(axes[0, 2], data, step)
    fisher(axes[1, 0], data, step)
    spectrum(axes[1, 1], data, step)
    alignment(axes[1, 2], data, step)
    for axis, row in ((axes[0, 3], 0), (axes[1, 3], -1)):
        kernel(axis, data, row)
    for axis in axes[:, :3].flat:
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)
        axis.set_xlim(0, step[-1])
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def band(axis: Axes, data: xr.Dataset, name: str, colour: str, label: str) -> None:
    """A curve with its standard error."""
    value = data[name].values
    axis.plot(data.step, value, color=colour, label=label)
    if name + "_standard_error" in data:
        error = data[name + "_standard_error"].values
        axis.fill_between(data.step, value - error, value + error, color=colour, alpha=0.2, lw=0)


def learning(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """Loss and accuracy on the probe."""
    axis.set_title("Learning")
    band(axis, data, "loss_mean", BLUE, "loss (nats)")
    band(axis, data, "loss_accuracy", ORANGE, "accuracy")
    axis.set_ylim(0)
    axis.legend()


def layers(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """The kernel's trace, by layer."""
    axis.set_title("Trace of the kernel, by parameter")
    shares = data.ntk_trace_per_layer.values.T / np.prod(data.ntk_gram.shape[1:3])
    colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.95, len(shares)))
    axis.stackplot(step, shares, colors=colours, labels=[str(n) for n in data.layer.values])
    axis.set_ylabel("mean over samples and outputs")
    axis.legend(fontsize=7.5, loc="upper left")


def entropy(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """The kernel's entropies, as fractions of their maxima."""
    axis.set_title("Entropy of the kernel")
    axis.plot(step, data.ntk_entropy_normalised, color=BLUE, label="all outputs, $S/\\ln NC$")
    axis.plot(step, data.ntk_entropy_traced_normalised, color=ORANGE, label="traced, $S/\\ln N$")
    axis.set_ylabel("fraction of the maximum")
    axis.legend()


def fisher(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """The trace of the Fisher information, by routes that check each other."""
    axis.set_title("Trace of the Fisher information")
    band(axis, data, "fisher_trace", BLUE, "exact")
    band(axis, data, "fisher_trace_mc", ORANGE, "Monte Carlo $\\pm$ s.e.")
    band(axis, data, "fisher_trace_empirical", GREY, "empirical $\\pm$ s.e.")
    axis.set_ylabel("mean over samples")
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # the legend stands above the peak
    axis.legend(loc="upper left")


def spectrum(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """The kernel's largest eigenvalues."""
    axis.set_title("Spectrum of the kernel")
    modes = data.ntk_spectrum.values / data.ntk_spectrum.sizes["mode"]
    chosen = np.unique(np.geomspace(1, modes.shape[1] // 2, 24).astype(int)) - 1
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(chosen)))
    for mode, colour in zip(chosen, colours, strict=True):
        axis.plot(step, modes[:, mode], color=colour, lw=1)
    axis.set_yscale("log")
    axis.set_ylabel(f"eigenvalue / NC, modes 1 to {chosen[-1] + 1}")


def alignment(axis: Axes, data: xr.Dataset, step: np.ndarray) -> None:
    """What makes up the squared gradient, relative to the start."""
    axis.set_title(r"$|\nabla L|^2 = \chi_{loss}\,\chi_{net}\,\chi_{align}$")
    for name, colour, label in (
        ("collective_gradient_sqnorm", GREY, r"$|\nabla L|^2$"),
        ("collective_chi_loss", BLUE, r"$\chi_{loss}$"),
        ("collective_chi_net", ORANGE, r"$\chi_{net}$"),
        ("collective_chi_align", GREEN, r"$\chi_{align}$"),
    ):
        axis.plot(step, data[name] / data[name][0], color=colour, label=label)
    axis.set_yscale("log")
    axis.set_ylabel("relative to step 0")
    axis.legend(ncols=2)


def kernel(axis: Axes, data: xr.Dataset, row: int) -> None:
    """The kernel between samples, cosine-normalised, in the probe's order: here by class."""
    full = data.ntk_gram[row].values
    traced = np.einsum("ncmc->nm", full)
    norm = np.sqrt(np.diag(traced))
    image = axis.imshow(traced / np.outer(norm, norm), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_title(f"Neural tangent kernel, step {int(data.step[row])}")
    axis.set_xlabel("sample, in order of class")
    axis.figure.colorbar(image, ax=axis, shrink=0.8, label="cosine")


def tracks(axis: Axes, data: xr.Dataset, count: int = 4) -> None:
    """The leading eigenvalues of the Hessian over time, and the value where descent is unstable.

    Args:
        axis: to draw on.
        data: a trace of hessian/eigenvalues and hessian/stability_gd.
        count: how many eigenvalues to draw.
    """
    edge = 2 / data.hessian_stability_gd.attrs["learning_rate"]
    values = data.hessian_eigenvalues.values.T[:count]
    shades = plt.get_cmap("Greys")(np.linspace(0.75, 0.4, count - 1))
    for i, track in enumerate(values):
        style = {"color": BLUE, "marker": "o", "ms": 3} if i == 0 else {"color": shades[i - 1]}
        axis.plot(data.step, track, lw=1.4, zorder=count - i, label=rf"$\lambda_{i + 1}$", **style)
    axis.axhline(edge, color=ORANGE, lw=1.2, ls="--", zorder=9, label=rf"$2/\eta$ = {edge:.3g}")
    axis.set(title="Leading eigenvalues of the Hessian", ylim=(0, 1.25 * max(edge, values.max())))
    axis.set(xlabel="optimizer step", ylabel=r"eigenvalue of $\nabla^2 L$")
    axis.legend(loc="upper center", ncols=count + 1, fontsize=8.5, columnspacing=1)


def density(axis: Axes, data: xr.Dataset) -> None:
    """Densities of the Hessian's eigenvalues at the steps of a trace, with their standard errors.

    Args:
        axis: to draw on.
        data: a trace of hessian/density and hessian/density_at.
    """
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.8, data.sizes["step"]))
    for row, colour in enumerate(colours):
        at, value = data.hessian_density_at[row].values, data.hessian_density[row].values
        error = data.hessian_density_standard_error[row].values
        axis.plot(at, value, color=colour, lw=1.2, label=f"step {int(data.step[row])}")
        axis.fill_between(at, value - error, value + error, color=colour, alpha=0.25, lw=0)
    axis.set(yscale="log", ylim=(1e-4, 5 * data.hessian_density.max()))
    axis.set(title="Density of eigenvalues", xlabel=r"eigenvalue of $\nabla^2 L$")
    axis.set_ylabel("density $\\pm$ s.e., of integral 1")
    axis.legend(loc="upper center")


def variance_flatness(axis: Axes, data: xr.Dataset) -> None:
    """The variances of the weights against the flatness of the loss, mode by mode, and the fit.

    Args:
        axis: to draw on.
        data: one record of weights/variance, weights/flatness and weights/flatness_exponent.
    """
    flat, psi = data.weights_flatness.values, data.weights_flatness_exponent
    variance = data.weights_variance.values[: len(flat)]
    fitted = slice(psi.attrs["first_mode"], psi.attrs["last_mode"] + 1)
    axis.loglog(flat[:1], variance[:1], "o", mfc="none", color=GREY, label="drift, not fitted")
    axis.loglog(flat[fitted], variance[fitted], "o", ms=3.5, color=BLUE, alpha=0.6)
    u, v = np.log(flat[fitted]), np.log(variance[fitted])
    kept = np.isfinite(u) & np.isfinite(v)
    ends = np.linspace(u[kept].min() - 0.1, u[kept].max() + 0.1, 50)
    low, high = psi.attrs["interval_low"], psi.attrs["interval_high"]
    lines = [np.exp(v[kept].mean() - p * (ends - u[kept].mean())) for p in (low, float(psi), high)]
    label = rf"$\psi$ = {float(psi):.2f}, 95 %: {low:.2f} to {high:.2f}"
    axis.plot(np.exp(ends), lines[1], color=ORANGE, label=label)
    axis.fill_between(np.exp(ends), lines[0], lines[2], color=ORANGE, alpha=0.2, lw=0)
    axis.set_ylim(np.nanmin(variance) / 10, 30 * np.nanmax(variance))
    axis.set(title=r"Variance against flatness, $\sigma_i^2 \sim F_i^{-\psi}$")
    axis.set_xlabel("flatness $F_i$: width of the loss at e times its least")
    axis.set_ylabel(r"variance of the weights $\sigma_i^2$")
    axis.legend(loc="upper right", fontsize=8.5)


def variance_predicted(axis: Axes, data: xr.Dataset) -> None:
    """The variances of the weights against those that theory expects of the same window.

    Args:
        axis: to draw on.
        data: one record of weights/variance and weights/variance_predicted.
    """
    predicted = data.weights_variance_predicted
    measured = data.weights_variance.values[: predicted.size]
    axis.loglog(predicted[:1], measured[:1], "o", mfc="none", color=GREY, label="drift")
    axis.loglog(predicted[1:], measured[1:], "o", ms=3.5, color=BLUE, alpha=0.6)
    ends = [predicted.min(), predicted.max()]
    axis.plot(ends, ends, color=ORANGE, ls="--", label="measured as expected")
    told = predicted.attrs
    axis.text(
        *(0.97, 0.05),
        f"correlation of logarithms {told['log_correlation']:.3f}\nslope {told['slope']:.2f}, "
        f"median ratio {told['median_ratio']:.2g}",
        **{"transform": axis.transAxes, "ha": "right", "fontsize": 8.5},
    )
    axis.set(title="Variance against what theory expects")
    axis.set(xlabel=r"expected $\sigma_i^2$, each mode by itself", ylabel=r"measured $\sigma_i^2$")
    axis.legend(loc="upper left", fontsize=8.5)


def by_layer(axis: Axes, data: xr.Dataset, name: str, colour: str, label: str) -> None:
    """What a measure is in each layer at the first step of a trace (dashed) and at the last.

    Args:
        axis: to draw on.
        data: a trace of the measure, of layers.
        name: of the measure, as in the data.
        colour: of both curves.
        label: in the legend.
    """
    for row, style in ((0, "--"), (-1, "-")):
        one = data[name][row]
        error = data[f"{name}_standard_error"][row]
        text = f"{label}, {'first' if row == 0 else 'last'} step"
        axis.errorbar(
            *(range(one.size), one, error),
            **{"color": colour, "ls": style, "marker": "o", "ms": 3, "capsize": 2, "label": text},
        )
    axis.set_xticks(range(data.sizes["representation"]), data.representation.values)
    axis.set_xlabel("layer")


def similarity(axis: Axes, data: xr.Dataset) -> None:
    """How similar each two layers are at the last step of a trace of geometry/cka_layers."""
    found = data.geometry_cka_layers[-1]
    image = axis.imshow(found, cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(found.shape[0]), data.representation.values)
    axis.set_yticks(range(found.shape[0]), data.representation.values)
    axis.set(title=f"Similarity of layers, step {int(found.step)}")
    axis.figure.colorbar(image, ax=axis, shrink=0.7, label="unbiased CKA")


def collapse(axis: Axes, data: xr.Dataset) -> None:
    """The measures of neural collapse over time, all of which it brings to 0.

    Args:
        axis: to draw on.
        data: a trace of the measures geometry/nc1_variability and so on.
    """
    for name, colour, label in (
        ("nc1_variability", BLUE, "NC1: spread within classes"),
        ("nc2_equinorm", ORANGE, "NC2: lengths of means"),
        ("nc2_maximal_angle", GREEN, "NC2: angles of means"),
        ("nc3_self_duality", PURPLE, "NC3: weights against means"),
        ("nc4_nearest_mean", GREY, "NC4: not the nearest mean"),
    ):
        name = f"geometry_{name}"
        band(axis, data.assign({name: data[name].where(data[name] > 0)}), name, colour, label)
    axis.set(title="Neural collapse", xlabel="optimizer step", ylabel="distance from collapse")
    axis.set(yscale="log", ylim=(3e-4, 100))
    axis.legend(fontsize=8, loc="upper right", labelspacing=0.25)
