"""One network, one batch, five schools: what each makes of them, and that ours are the same.

    python benchmarks/schools.py [--jax PYTHON]

nngeometry and neural-tangents are the packages themselves, the latter in an environment of its own
with an older jax. papyrus, ZnNL and perspic are on no registry: their formulas are written again
here in numpy, on a Jacobian by plain autograd, or for ZnNL, which takes its kernel from
neural-tangents, on that. Writes `benchmarks/results/schools.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import lenet

import nettrace as nt

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "schools.md"
SAMPLES = 16

#: By our name for it, what a school finds.
Found = Mapping[str, np.ndarray | float]


# The formulas -------------------------------------------------------------------------------------


def jacobian(model: nn.Module, x: Tensor) -> np.ndarray:
    """(N, C, P), by plain autograd, one output of one sample at a time."""
    parameters = [*model.parameters()]
    rows = []
    for sample in x.split(1):
        for output in model(sample).flatten():
            gradient = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows).unflatten(0, (len(x), -1)).detach().numpy()


def derivative(outputs: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N, C) the gradient of the mean cross-entropy by the outputs."""
    p = np.exp(outputs - outputs.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True) - np.eye(outputs.shape[1])[classes]) / len(outputs)


def entropy(kernel: np.ndarray) -> float:
    """As in papyrus and ZnNL: eigenvalues are clipped before they are normalised."""
    eigenvalues = np.clip(np.linalg.eigvalsh(kernel), 1e-14, None)
    p = eigenvalues / eigenvalues.sum()
    return float(-(p * np.log(p)).sum())


def cosines(kernel: np.ndarray) -> np.ndarray:
    """Of the rows of the Jacobian; those of a zero row are zero."""
    norms = np.sqrt(np.outer(kernel.diagonal(), kernel.diagonal()))
    return np.divide(kernel, norms, out=np.zeros_like(kernel), where=norms != 0)


def papyrus(kernel: np.ndarray, g: np.ndarray) -> Found:
    """papyrus.measurements, of a kernel (N C, N C) and a loss derivative (N, C)."""
    eigenvalues = np.clip(np.linalg.eigvalsh(kernel)[::-1], 1e-14, None)
    q = np.sqrt(kernel.diagonal()) / np.sqrt(kernel.diagonal()).sum()
    return {
        "collective/trace_papyrus": kernel.trace() / len(kernel),
        "collective/entropy_papyrus": entropy(kernel),
        "collective/entropy_effective_papyrus": entropy(kernel) / np.log(len(kernel)),
        "collective/covariance_entropy_papyrus": entropy(cosines(kernel)),
        "collective/eigenvalues_papyrus": eigenvalues / eigenvalues.sum(),
        "collective/self_entropy_papyrus": -(q[q > 0] * np.log(q[q > 0])).sum(),
        "collective/magnitude_distribution_papyrus": q,
        "collective/loss_derivative_papyrus": g,
    }


def znnl(kernel: np.ndarray, g: np.ndarray) -> Found:
    """ZnNL's JaxRecorder, before papyrus took its place."""
    q = np.sqrt(kernel.diagonal()) / np.sqrt(kernel.diagonal()).sum()
    return {
        "collective/trace_znnl": kernel.trace() / len(kernel),
        "collective/entropy_znnl": entropy(kernel),
        "collective/covariance_entropy_znnl": entropy(cosines(kernel)),
        "collective/eigenvalues_znnl": np.sort(np.clip(np.linalg.eigvalsh(kernel), 1e-14, None)),
        "collective/magnitude_entropy_znnl": -(q[q > 0] * np.log(q[q > 0])).sum(),
        "collective/magnitude_distribution_znnl": q,
        "collective/magnitude_variance_znnl": np.var(len(q) * q),
        "collective/loss_derivative_znnl": g,
    }


def perspic(j: np.ndarray, g: np.ndarray, targets: int) -> Found:
    """What perspic's analyzer logs, of a Jacobian (N, C, P) and a loss derivative."""
    chi_net = (j**2).sum() / targets
    chi_loss = targets * (g**2).sum()
    sqnorm = (np.einsum("ncp,nc->p", j, g) ** 2).sum()
    return {
        "collective/trace_perspic": chi_net,
        "collective/chi_loss_perspic": chi_loss,
        "collective/gradient_sqnorm": sqnorm,
        "collective/chi_align": sqnorm / (chi_loss * chi_net),
    }


# The packages -------------------------------------------------------------------------------------


def nngeometry(model: nn.Module, x: Tensor) -> Found:
    """The Fisher information and the Gram matrix of nngeometry."""
    from nngeometry import FIM, GramMatrix
    from nngeometry.object import PMatImplicit

    def trace(variant: str) -> float:
        return float(FIM(model, (x,), PMatImplicit, variant=variant).trace())

    kernel = GramMatrix(model, (x,), function=lambda x: model(x)).to_torch()  # (C, N, C, N)
    return {
        "collective/trace_nngeometry": trace("regression"),
        "fisher/trace": trace("classif_logits"),
        "ntk/gram": kernel.permute(1, 0, 3, 2).detach().numpy(),
    }


def neural_tangents(python: str, model: nn.Module, x: Tensor) -> Found:
    """neural-tangents' empirical kernels, in the environment of another Python."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = [p.detach().numpy() for p in model.parameters()]
        data = {f"parameter {i}": p for i, p in enumerate(parameters)}
        np.savez(Path(folder) / "network.npz", inputs=x.numpy(), names=[*data], **data)
        subprocess.run(
            [python, str(HERE / "tangents.py"), folder],
            env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"},
            check=True,
            stderr=subprocess.DEVNULL,  # jaxlib's notes
        )
        kernels = dict(np.load(Path(folder) / "kernels.npz"))
    return {
        "collective/trace_neural_tangents": kernels["traced"].diagonal().mean(),
        "collective/gram_neural_tangents": kernels["traced"],
        "ntk/gram": kernels["full"].transpose(0, 2, 1, 3),  # (N, N, C, C)
    }


# The table ----------------------------------------------------------------------------------------


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def ours(model: nn.Module, probe: nt.Probe, *measures: str) -> dict[str, np.ndarray]:
    return {r.name: r.value for r in nt.Tracer(probe, measures, on_error="raise")(model, step=0)}


def difference(found: np.ndarray | float, true: np.ndarray | float) -> float:
    """The largest, relative to the largest entry."""
    return float(np.abs(np.asarray(found) - true).max() / np.abs(true).max())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--jax", default=".venv/jax/bin/python", help="its Python")
    args = options.parse_args()
    torch.set_num_threads(1)
    w = lenet(SAMPLES)
    torch.set_default_dtype(torch.float64)  # which nngeometry asks for
    model, x, y = w.model.double(), w.inputs.double(), w.targets
    one_hot = F.one_hot(y, 10).double()
    probe_one_hot = nt.Probe(x, one_hot, losses=cross_entropies)
    found = ours(model, nt.Probe(x, y), "collective", "ntk/gram", "fisher/trace")
    found_one_hot = ours(model, probe_one_hot, "collective")

    j = jacobian(model, x)
    kernel = j.reshape(-1, j.shape[-1]) @ j.reshape(-1, j.shape[-1]).T
    g = derivative(model(x).detach().numpy(), y.numpy())
    tangents = neural_tangents(args.jax, model, x)
    schools = [
        ("papyrus", "formulas, plain autograd", papyrus(kernel, g), found),
        ("ZnNL", "formulas, kernel of neural-tangents", znnl(_flat(tangents), g), found),
        ("perspic", "formulas, plain autograd", perspic(j, g, y.numel()), found),
        ("perspic, one-hot", "the same", perspic(j, g, one_hot.numel()), found_one_hot),
        ("neural-tangents", "0.6.5, JAX 0.4.20", tangents, found),
        ("nngeometry", version("nngeometry"), nngeometry(model, x), found),
    ]
    lines = [
        "# One network, one batch, five schools",
        "",
        f"{w.title.split(',')[0]}, {SAMPLES} samples, 10 outputs, float64; the trace of the whole "
        f"kernel is {kernel.trace():.10g}. Of arrays, the norm is shown. Difference: the largest, "
        "relative to the largest entry. `perspic, one-hot` has the targets as one-hot vectors.",
        "",
        "| school | theirs by | quantity | theirs | nettrace | difference |",
        "|---|---|---|---:|---:|---:|",
    ]
    for school, by, values, mine in schools:
        for name, value in values.items():
            theirs, own = (f"{np.linalg.norm(v):.10g}" for v in (value, mine[name]))
            error = difference(mine[name], value)
            lines.append(f"| {school} | {by} | `{name}` | {theirs} | {own} | {error:.0e} |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def _flat(tangents: Found) -> np.ndarray:
    kernel = np.asarray(tangents["ntk/gram"])
    order = kernel.shape[0] * kernel.shape[1]
    return kernel.reshape(order, order)


if __name__ == "__main__":
    main()
