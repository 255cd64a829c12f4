"""What the Hessian's largest eigenvalue, trace and density cost, and how right they are.

    python benchmarks/curvature.py [--repeats NUMBER]

Against PyHessian, and curvlinops with SciPy's eigsh, in the same process, on one thread. U is one
plain forward and backward pass of the same batch, timed beside each call. What is true is found in
float64 by products that are written here: largest eigenvalues by eigsh to 1e-6, the rest from the
dense Hessian. The tables go to `benchmarks/results/curvature.md`.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from pyhessian import hessian
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import WORKLOADS, Workload, cross_entropies

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.matrix_traces import probed
from nettrace.second_order import CurvatureOperator
from nettrace.spectral_density import quadrature
from nettrace.statistics import Statistics

RESULTS = Path(__file__).parent / "results" / "curvature.md"
#: Lanczos steps and draws of a density, the same for all.
STEPS, DRAWS = 30, 4
SEEDS = 10
TARGET = 0.02
Products = Callable[[Tensor], Tensor]


# Networks on digits -------------------------------------------------------------------------------


def digits(samples: int, image: bool) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    inputs = torch.tensor(x[:samples] / 16, dtype=torch.float32)
    return inputs.view(-1, 1, 8, 8) if image else inputs, torch.tensor(y[:samples])


def dense(activation: type[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, width), activation(), nn.Linear(width, width), activation()),
        nn.Linear(width, 10),
    )


def convolutional(channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * channels, 10)),
    )


#: By name, from a scale to a network.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "tanh MLP": lambda scale: dense(nn.Tanh, 16 * scale),
    "GELU MLP": lambda scale: dense(nn.GELU, 16 * scale),
    "ReLU MLP": lambda scale: dense(nn.ReLU, 16 * scale),
    "tanh CNN": lambda scale: convolutional(6 + scale // 2),
}


def trained(name: str, scale: int, seed: int, samples: int = 512) -> Workload:
    """A network trained on digits until 95 % of the samples are right."""
    torch.manual_seed(seed)
    model = NETWORKS[name](scale)
    work = Workload(f"{name} on digits", model, *digits(samples, "CNN" in name))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    while (model(work.inputs).argmax(1) == work.targets).double().mean() < 0.95:
        for batch in torch.randperm(samples).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(work.inputs[batch]), work.targets[batch]).backward()
            optimizer.step()
    return work


# What is true -------------------------------------------------------------------------------------


def wide(work: Workload) -> tuple[Products, int]:
    """Products with the Hessian in float64, by plain double backward; P."""
    model = copy.deepcopy(work.model).double()
    parameters = list(model.parameters())
    inputs = work.inputs.double() if work.inputs.is_floating_point() else work.inputs
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropies(model(inputs), work.targets).mean()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def times(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient, parameters, vector, retain_graph=True)
        return torch.cat([p.flatten() for p in parts])

    return times, len(gradient)


def largest(work: Workload) -> float:
    """The largest eigenvalue, by eigsh to 1e-6."""
    times, size = wide(work)
    operator = LinearOperator(
        (size, size), lambda v: times(torch.from_numpy(v.ravel())).numpy(), dtype=np.float64
    )
    start = np.random.default_rng(0).normal(size=size)
    return float(eigsh(operator, 1, which="LA", tol=1e-6, v0=start, ncv=20)[0][0])


def matrix(work: Workload) -> Tensor:
    """(P, P) the Hessian in float64."""
    times, size = wide(work)
    return torch.stack([times(row) for row in torch.eye(size, dtype=torch.float64)])


# The methods --------------------------------------------------------------------------------------


class Counted:
    """How many products with the Hessian are made in this, by whichever of nettrace's objects."""

    def __enter__(self) -> Counted:
        self.products, self._own = 0, CurvatureOperator.__call__

        def times(operator: CurvatureOperator, vector: Tensor) -> Tensor:
            self.products += 1
            return self._own(operator, vector)

        CurvatureOperator.__call__ = times
        return self

    def __exit__(self, *error: object) -> None:
        CurvatureOperator.__call__ = self._own


def probe(work: Workload) -> nt.Probe:
    return nt.Probe(
        work.inputs, work.targets, losses=None if work.targets.dim() == 1 else cross_entropies
    )


def tracer(work: Workload) -> nt.Tracer:
    return nt.Tracer(probe(work), ["hessian/lambda_max"], every=1, on_error="raise")


def record(tracing: nt.Tracer, work: Workload, step: int) -> tuple[float, int]:
    """The largest eigenvalue as a user would have it, and products."""
    with Counted() as counted:
        found = tracing(work.model, step)
    return float(found[0].value), counted.products


def bare(work: Workload, seed: int) -> tuple[float, int]:
    """The same without the tracer: the look, the check by finite differences, and products."""
    statistics = Statistics(work.model, probe(work), seed=seed)
    with frozen(work.model):
        top = statistics.hessian_top
    return float(top.values[0]), statistics.hessian_operator.products


def pyhessian(work: Workload) -> hessian:
    model = copy.deepcopy(work.model)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backward(create_graph=True)
        return hessian(
            model,
            lambda outputs, targets: cross_entropies(outputs, targets).mean(),
            (work.inputs, work.targets),
            cuda=False,
        )


def power(work: Workload, seed: int) -> tuple[float, int]:
    module = sys.modules[hessian.__module__]
    torch.manual_seed(seed)
    products, own = 0, module.hessian_vector_product

    def times(*arguments: object) -> object:
        nonlocal products
        products += 1
        return own(*arguments)

    module.hessian_vector_product = times
    try:
        return pyhessian(work).eigenvalues()[0][0], products
    finally:
        module.hessian_vector_product = own


def curvlinops(work: Workload) -> HessianLinearOperator:
    model = nn.Sequential(copy.deepcopy(work.model), nn.Flatten(0, -2))
    return HessianLinearOperator(
        model,
        *(nn.CrossEntropyLoss(), list(model.parameters())),
        [(work.inputs, work.targets.flatten())],
        check_deterministic=False,
        num_data=1,
        batch_size_fn=lambda _: 1,
    )


def arpack(work: Workload, seed: int) -> tuple[float, int]:
    """Eigsh to 1e-3 of curvlinops' operator."""
    operator, products = curvlinops(work), 0

    def times(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        with sdpa_kernel(SDPBackend.MATH):
            return (operator @ torch.from_numpy(vector.ravel())).numpy()

    start = np.random.default_rng(seed).normal(size=operator.shape[0]).astype(np.float32)
    whole = LinearOperator(operator.shape, times, dtype=np.float32)
    return float(eigsh(whole, 1, which="LA", tol=1e-3, v0=start)[0][0]), products


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def unit(work: Workload) -> float:
    """CPU seconds of a forward and backward pass: of some, the median."""
    return float(np.median([seconds(work.step)[0] for _ in range(5)]))


# The tables ---------------------------------------------------------------------------------------

COLD: dict[str, Callable[[Workload, int], tuple[float, int]]] = {
    "a record": lambda work, seed: record(tracer(work), work, seed),
    "bare": bare,
    "PyHessian": power,
    "curvlinops, eigsh": arpack,
}


def cold(work: Workload, repeats: int) -> str:
    true = largest(work)
    cells = {name: ([], [], []) for name in COLD}
    for seed in range(repeats + 1):
        for name, method in COLD.items():
            u = unit(work)
            took, (value, products) = seconds(lambda: method(work, seed))  # noqa: B023
            if seed:
                error = abs(value - true) / abs(true)
                for kept, number in zip(cells[name], (took / u, products, error), strict=True):
                    kept.append(number)
    told = [
        f"{np.median(us):.0f} U, {np.median(products):.0f}; {np.median(e):.0e} ({max(e):.0e})"
        for us, products, e in cells.values()
    ]
    return f"| {work.title} | {1e3 * u:.0f} | " + " | ".join(told) + " |"


@dataclass(frozen=True)
class Run:
    """A training that is recorded 25 times after the first.

    Args:
        network: by name.
        title: of the optimizer.
        rule: makes the optimizer.
        batch: samples of a batch.
        before: steps before the first record.
        every: steps from record to record.
    """

    network: str
    title: str
    rule: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    batch: int = 1024
    before: int = 0
    every: int = 10

    def workload(self) -> Workload:
        torch.manual_seed(1)
        if self.network in WORKLOADS:
            return WORKLOADS[self.network]()
        network = NETWORKS[self.network](16)
        return Workload(self.network, network, *digits(1024, "CNN" in self.network))


def descent(rate: float, momentum: float = 0.0) -> Callable[[Iterable[Tensor]], torch.optim.SGD]:
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum)


RUNS = [
    Run("tanh MLP", "SGD, 0.05, momentum 0.9", descent(0.05, 0.9), batch=64),
    Run("GELU MLP", "Adam, 1e-3", lambda p: torch.optim.Adam(p, 1e-3), batch=64),
    Run("tanh CNN", "SGD, 0.05, momentum 0.9", descent(0.05, 0.9), batch=64),
    Run("ReLU MLP", "gradient descent, 0.2", descent(0.2)),
    Run("GELU MLP", "gradient descent, 0.5, at its edge", descent(0.5), before=40),
    Run("GELU MLP", "the same, at every step", descent(0.5), before=40, every=1),
    Run("tanh MLP", "gradient descent, 0.5, past its edge", descent(0.5), before=100),
    Run("ReLU MLP", "gradient descent, 0.3, past its edge", descent(0.3), before=100),
    Run("mlp", "gradient descent, 0.02", descent(0.02)),
    Run("lenet", "gradient descent, 0.02", descent(0.02)),
]


def warm(run: Run) -> str:
    work = run.workload()
    optimizer, tracing = run.rule(work.model.parameters()), tracer(work)
    kept: list[tuple[float, int, float, float]] = []
    for step in range(-run.before, 25 * run.every + 1):
        if step >= 0 and step % run.every == 0:
            u = unit(work)
            took, (value, products) = seconds(lambda: record(tracing, work, step))  # noqa: B023
            true = largest(work)
            kept.append((took / u, products, abs(value - true) / abs(true), true))
        chosen = torch.randperm(len(work.inputs))[: run.batch]
        optimizer.zero_grad()
        cross_entropies(work.model(work.inputs[chosen]), work.targets[chosen]).mean().backward()
        optimizer.step()
    us, products, errors, tops = zip(*kept[1:], strict=True)
    return (
        f"| {work.title}, {run.title} | {run.every} | {1e3 * u:.0f} | {min(tops):.2g} to "
        f"{max(tops):.2g} | {np.median(us):.1f} ({max(us):.0f}) | "
        f"{np.median(products):.0f} ({max(products)}) | {np.median(errors):.0e} | "
        f"{sum(e > 1e-3 for e in errors)} of {len(errors)}, {max(errors):.0e} |"
    )


def traces(name: str, seed: int) -> str:
    work = trained(name, 1, seed)
    hessian_matrix = matrix(work)
    true = float(hessian_matrix.trace())
    exact = Statistics(work.model, probe(work), {"hessian_trace"}).hessian_trace
    peer = np.array(pyhessian(work).trace(maxIter=200, tol=-np.inf)) - true
    told = []
    for method in ("xtrace", "hutch++"):
        found = [
            probed(
                *(lambda v: (hessian_matrix @ v.double()).to(v), len(hessian_matrix)),
                **{"dtype": torch.float32, "device": "cpu", "method": method, "seed": k},
                **{"relative_error": TARGET, "most_products": 1000},
            )
            for k in range(SEEDS)
        ]
        errors = np.array([float(f.trace.value) for f in found]) / true - 1
        error = float(np.sqrt(np.mean(errors**2)))
        products = float(np.mean([f.products for f in found]))
        stated = np.median([float(f.trace.standard_error) for f in found]) / true
        needed = float(np.mean(peer**2)) / (error * true) ** 2
        told.append(
            f"{products:.0f} | {100 * error:.2f} ({100 * stated:.2f}) | {needed:.0f} | "
            f"{products / needed:.2f}"
        )
    kind = "exact, 0" if isinstance(exact, Tensor) else "estimated"
    return f"| {name}, {seed} | {true:.1f} | {kind} | " + " | ".join(told) + " |"


def old_eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    """torch.eig, which PyHessian's density calls and torch has no more, for a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def densities(name: str) -> list[str]:
    work = trained(name, 1, 0)
    true = torch.linalg.eigvalsh(matrix(work))
    torch.eig = old_eig

    def own(seed: int) -> tuple[Tensor, Tensor]:
        operator = Statistics(work.model, probe(work), seed=seed).hessian_operator
        found = quadrature(
            *(operator, operator.size),
            **{"dtype": operator.dtype, "device": operator.device, "seed": seed},
            **{"steps": STEPS, "draws": DRAWS},
        )
        return found.nodes.flatten(), found.weights.flatten()

    def of_pyhessian(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        nodes, weights = pyhessian(work).density(iter=STEPS, n_v=DRAWS)
        return torch.tensor(nodes).flatten(), torch.tensor(weights).flatten()

    def of_curvlinops(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        operator = curvlinops(work)
        found = [fast_lanczos(operator, STEPS) for _ in range(DRAWS)]
        return torch.cat([v for v, _ in found]), torch.cat([c[0].square() for _, c in found])

    rows = []
    methods = {"nettrace": own, "PyHessian": of_pyhessian, "curvlinops": of_curvlinops}
    for method, call in methods.items():
        call(0)
        ratios, errors = [], []
        for seed in range(SEEDS):
            u = unit(work)
            took, (nodes, weights) = seconds(lambda: call(seed))  # noqa: B023
            ratios.append(took / u)
            nodes, weights = nodes.double(), weights.double() / DRAWS
            moments = [float((weights * nodes**k).sum() / (true**k).mean()) - 1 for k in (1, 2, 3)]
            order = nodes.argsort()
            steps = weights[order].cumsum(0)
            whole = torch.searchsorted(true, nodes[order], right=True) / len(true)
            before = torch.cat([steps.new_zeros(1), steps[:-1]])
            # Largest at the edges of the steps, within which the true function rises.
            apart = torch.maximum((steps - whole).abs(), (before - whole).abs()).max()
            mass = abs(float(weights.sum()) - 1)
            errors.append([*moments, float(apart), mass])
        of_moments = np.sqrt(np.mean(np.square(errors), 0))
        told = " | ".join(f"{100 * e:.2g}" for e in of_moments[:3])
        rows.append(
            f"| {name} | {method} | {np.median(ratios):.0f} | {told} | {of_moments[3]:.3f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    works = [WORKLOADS[name]() for name in ("mlp", "lenet", "vit", "gpt")]
    works += [trained(name, 16, 0, 1024) for name in NETWORKS]
    sections = [
        f"""# Curvature: cost and truth

`python benchmarks/curvature.py`; Python {platform.python_version()}, torch {torch.__version__}; CPU
time on one thread of a machine that others may share, interleaved repeats; in units U of one plain
forward and backward pass of the same batch, timed beside each call. Errors are relative to values
in float64 that share no code with what is measured. Networks on digits are trained until 95 % of
the samples are right.
"""
    ]

    def add(text: str) -> None:
        sections.append(text)
        RESULTS.write_text("\n".join(sections))

    def add_table(head: Sequence[str], rows: Iterable[str]) -> None:
        """Row by row, so that what is measured is kept if this is stopped."""
        add("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n")
        for row in rows:
            sections[-1] += row + "\n"
            RESULTS.write_text("\n".join(sections))
            print(row, flush=True)

    add(
        f"""## The largest eigenvalue, cold

Each cell: U, products; relative error, median of {repeats} random starts (worst). "A record" is
`hessian/lambda_max` by a new `Tracer`, all of it: the look, what tells the price of a run's records
beforehand, the check by finite differences, products. "Bare" is without that price, as in all later
records. PyHessian is `eigenvalues()` as it comes (tol=1e-3); curvlinops with eigsh to tol=1e-3.
"""
    )
    head = ["network", "U, ms", *COLD]
    add_table(head, (cold(work, repeats) for work in works))
    add(
        """## The largest eigenvalue, warm-started along a training

25 records of one tracer after the first; in a cell the median (and the worst). The edge is at an
eigenvalue of 2 over the learning rate.
"""
    )
    head = ["training", "every", "U, ms", "eigenvalue", "U a record", "products", "error"]
    add_table([*head, "error above 1e-3"], map(warm, RUNS))
    add(
        f"""## The trace, to {100 * TARGET:.0f} %

Products until the stated standard error is below {100 * TARGET:.0f} %; the true root mean square
error over {SEEDS} seeds, in % (the stated one); products that PyHessian's Hutchinson estimate takes
for the same true error, by the spread of 200 of its draws; ours over its. "hessian/trace" says
whether the measure is exact, without any product.
"""
    )
    four = ["products", "error, %", "PyHessian's", "ratio"]
    head = ["network, seed", "trace", "hessian/trace"]
    head += [f"{m}: {h}" for m in ("XTrace", "Hutch++") for h in four]
    add_table(head, (traces(name, seed) for name in NETWORKS for seed in range(2)))
    add(
        f"""## The spectral density

{STEPS} products from each of {DRAWS} random vectors for all; root mean square errors over {SEEDS}
seeds of the first three moments in %, and of the largest difference of the cumulative distribution.
PyHessian's `density()` fails with any torch since 2.0, `torch.eig` being gone; it is given one.
curvlinops is its `fast_lanczos`.
"""
    )
    head = ["network", "by", "U", "1st, %", "2nd, %", "3rd, %", "distribution"]
    add_table(head, (row for name in ("tanh MLP", "ReLU MLP") for row in densities(name)))


if __name__ == "__main__":
    main()
