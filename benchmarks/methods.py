"""How nettrace and its peers compute each quantity.

A method prepares a workload and returns what is timed: a call that returns values by name. All
values are plain sums over samples:

    norms         (N,) norms of the loss gradients
    loss_gram     (N, N) their inner products
    ntk_trace     the sum of squares of the Jacobian of the outputs
    fisher_trace  the trace of the exact Fisher information
    drawn_trace   the same with the targets of `draw` in place of the expectation
    ntk           (N, C, N, C) the Gram matrix of the Jacobian
    estimate      an estimate of fisher_trace from random numbers of the method's own

Peers are imported where they are used, and given copies of the network, which some of them change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from workloads import Workload, cross_entropies, select

import nettrace as nt
from nettrace.likelihood import Categorical

Call: TypeAlias = Callable[[], Mapping[str, Tensor]]
#: None where the method computes something else on this workload.
Method: TypeAlias = Callable[[Workload], Call | None]

QUANTITIES = {
    "norms": "Per-sample loss-gradient norms",
    "loss_gram": "Loss Gram matrix, N x N",
    "traces": "NTK trace and exact Fisher trace",
    "mc_fisher": "Fisher trace, one drawn target a sample",
    "ntk": "Full NTK, NC x NC",
}
METHODS: dict[str, dict[str, Method]] = {quantity: {} for quantity in QUANTITIES}


def method(quantity: str, name: str) -> Callable[[Method], Method]:
    def register(function: Method) -> Method:
        METHODS[quantity][name] = function
        return function

    return register


def draw(logits: Tensor) -> Tensor:
    """Targets drawn from the softmax of (N, C) or (N, T, V) logits, always the same."""
    p = logits.detach().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


# nettrace -----------------------------------------------------------------------------------------


@method("norms", "nettrace")
def _(w: Workload) -> Call:
    return lambda: {"norms": nt.loss_jacobian(w.losses(), w.model).norms()}


@method("loss_gram", "nettrace")
def _(w: Workload) -> Call:
    return lambda: {"loss_gram": nt.loss_jacobian(w.losses(), w.model).gram()}


@method("traces", "nettrace")
def _(w: Workload) -> Call:
    def call() -> dict[str, Tensor]:  # as nettrace.statistics does for ntk/trace and fisher/trace
        outputs = w.outputs()
        J = nt.jacobian(outputs, w.model)
        if w.targets.dim() > 1:
            return {"ntk_trace": J.trace()}
        information, directions = torch.linalg.eigh(Categorical(1).metric(outputs))
        squares = J.project(directions.permute(2, 0, 1)).norms().square()
        return {"ntk_trace": squares.sum(), "fisher_trace": (squares * information).sum()}

    return call


@method("mc_fisher", "nettrace")
def _(w: Workload) -> Call:
    def call() -> dict[str, Tensor]:
        logits = w.model(w.inputs)
        losses = cross_entropies(logits, draw(logits))
        return {"drawn_trace": nt.loss_jacobian(losses, w.model).norms().square().sum()}

    return call


@method("ntk", "nettrace")
def _(w: Workload) -> Call:
    return lambda: {"ntk": nt.jacobian(w.outputs(), w.model).gram()}


# torch.func ---------------------------------------------------------------------------------------


def _functional(w: Workload) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    parameters = {name: p.detach() for name, p in w.model.named_parameters()}
    buffers = dict(w.model.named_buffers())

    def logits(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(w.model, {**p, **buffers}, (x[None],))

    return parameters, logits


def _vmap_grad(w: Workload) -> Callable[[Tensor], dict[str, Tensor]]:
    parameters, logits = _functional(w)

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropies(logits(p, x), y[None])[0]

    gradients = vmap(grad(loss), (None, 0, 0))
    return lambda targets: gradients(parameters, w.inputs, targets)


def _sqnorms(gradients: Mapping[str, Tensor]) -> Tensor:
    return sum(g.flatten(1).square().sum(1) for g in gradients.values())


def _products(gradients: Mapping[str, Tensor]) -> Tensor:
    return sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values())


@method("norms", "torch.func vmap(grad)")
def _(w: Workload) -> Call:
    gradients = _vmap_grad(w)
    return lambda: {"norms": _sqnorms(gradients(w.targets)).sqrt()}


@method("loss_gram", "torch.func vmap(grad)")
def _(w: Workload) -> Call:
    gradients = _vmap_grad(w)
    return lambda: {"loss_gram": _products(gradients(w.targets))}


@method("mc_fisher", "torch.func vmap(grad)")
def _(w: Workload) -> Call:
    gradients = _vmap_grad(w)

    def call() -> dict[str, Tensor]:
        with torch.no_grad():
            drawn = draw(w.model(w.inputs))
        return {"drawn_trace": _sqnorms(gradients(drawn)).sum()}

    return call


def _vmap_jacrev(w: Workload) -> Callable[[Tensor], dict[str, Tensor]]:
    parameters, logits = _functional(w)
    rows = vmap(jacrev(lambda p, x: select(logits(p, x))[0]), (None, 0))
    return lambda inputs: rows(parameters, inputs)


@method("traces", "torch.func vmap(jacrev) of 4")
def _(w: Workload) -> Call:
    rows = _vmap_jacrev(w)
    return lambda: {"ntk_trace": sum(_sqnorms(rows(x)).sum() for x in w.inputs.split(4))}


@method("ntk", "torch.func vmap(jacrev)")
def _(w: Workload) -> Call:
    rows = _vmap_jacrev(w)  # pytorch.org/tutorials/intermediate/neural_tangent_kernels.html

    def call() -> dict[str, Tensor]:
        jacobians = [j.flatten(2) for j in rows(w.inputs).values()]
        return {"ntk": sum(torch.einsum("ncp,mdp->ncmd", j, j) for j in jacobians)}

    return call


# Opacus -------------------------------------------------------------------------------------------


@method("norms", "Opacus ghost clipping")
def _(w: Workload) -> Call:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(copy.deepcopy(w.model).train())

    def call() -> dict[str, Tensor]:
        model.zero_grad()
        cross_entropies(model(w.inputs), w.targets).mean().backward()
        return {"norms": model.get_norm_sample()}

    return call


def _opacus(w: Workload) -> Callable[[], dict[str, Tensor]]:
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(w.model).train())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        for p in model.parameters():
            p.grad_sample = None
        cross_entropies(model(w.inputs), w.targets).mean().backward()
        return {name: p.grad_sample for name, p in model.named_parameters()}

    return gradients


@method("norms", "Opacus hooks")
def _(w: Workload) -> Call:
    gradients = _opacus(w)
    return lambda: {"norms": _sqnorms(gradients()).sqrt()}


@method("loss_gram", "Opacus hooks")
def _(w: Workload) -> Call:
    gradients = _opacus(w)
    return lambda: {"loss_gram": _products(gradients())}


# BackPACK -----------------------------------------------------------------------------------------


def _backpack(w: Workload, extension: str, **options: int) -> Callable[[], dict[str, Tensor]]:
    import backpack

    plain = all(not list(m.children()) for m in w.model.children())
    model = backpack.extend(copy.deepcopy(w.model), use_converter=not plain)
    criterion = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    wanted = getattr(backpack.extensions, extension)(**options)

    def call() -> dict[str, Tensor]:
        model.zero_grad()
        with backpack.backpack(wanted):
            logits = model(w.inputs)
            criterion(logits if logits.dim() == 2 else logits.mT, w.targets).backward()
        return {name: getattr(p, wanted.savefield) for name, p in model.named_parameters()}

    return call


@method("norms", "BackPACK BatchL2Grad")
def _(w: Workload) -> Call:
    squares = _backpack(w, "BatchL2Grad")
    return lambda: {"norms": sum(squares().values()).sqrt()}


@method("loss_gram", "BackPACK BatchGrad")
def _(w: Workload) -> Call:
    gradients = _backpack(w, "BatchGrad")
    return lambda: {"loss_gram": _products(gradients())}


@method("traces", "BackPACK DiagGGNExact")
def _(w: Workload) -> Call:
    diagonals = _backpack(w, "DiagGGNExact")
    return lambda: {"fisher_trace": sum(d.sum() for d in diagonals().values())}


@method("mc_fisher", "BackPACK DiagGGNMC")
def _(w: Workload) -> Call:
    diagonals = _backpack(w, "DiagGGNMC", mc_samples=1)
    return lambda: {"estimate": sum(d.sum() for d in diagonals().values())}


# nngeometry ---------------------------------------------------------------------------------------


def _nngeometry(w: Workload) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return copy.deepcopy(w.model), (w.inputs.clone(), w.targets)


@method("loss_gram", "nngeometry GramMatrix")
def _(w: Workload) -> Call:
    from nngeometry import GramMatrix

    model, data = _nngeometry(w)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropies(model(x), y)[:, None]

    def call() -> dict[str, Tensor]:
        return {"loss_gram": GramMatrix(model, data, function=losses).to_torch()[0, :, 0]}

    return call


@method("traces", "nngeometry FIM regression")
def _(w: Workload) -> Call:
    from nngeometry import FIM
    from nngeometry.object import PMatImplicit

    model, data = _nngeometry(w)

    def outputs(x: Tensor, y: Tensor) -> Tensor:
        return select(model(x))

    def call() -> dict[str, Tensor]:
        fim = FIM(model, data, PMatImplicit, variant="regression", function=outputs)
        return {"ntk_trace": len(w.inputs) * fim.trace()}

    return call


@method("traces", "nngeometry FIM logits")
def _(w: Workload) -> Call:
    from nngeometry import FIM
    from nngeometry.object import PMatImplicit

    model, data = _nngeometry(w)
    return lambda: {"fisher_trace": len(w.inputs) * FIM(model, data, PMatImplicit).trace()}


@method("mc_fisher", "nngeometry FIM_MonteCarlo")
def _(w: Workload) -> Call:
    from nngeometry import FIM_MonteCarlo
    from nngeometry.object import PMatImplicit

    model, data = _nngeometry(w)
    return lambda: {"estimate": len(w.inputs) * FIM_MonteCarlo(model, data, PMatImplicit).trace()}


@method("ntk", "nngeometry GramMatrix")
def _(w: Workload) -> Call:
    from nngeometry import GramMatrix

    model, data = _nngeometry(w)

    def outputs(x: Tensor, y: Tensor) -> Tensor:
        return select(model(x))

    def call() -> dict[str, Tensor]:
        kernel = GramMatrix(model, data, function=outputs).to_torch()  # (C, N, C, N)
        return {"ntk": kernel.permute(1, 0, 3, 2)}

    return call


# Hutchinson estimates of the trace of the Gauss-Newton matrix, the Fisher information of a softmax.
# For networks that are piecewise linear in each weight the Hessian has the same trace.


@method("traces", "curvlinops Hutchinson, 10 probes")
def _(w: Workload) -> Call:
    from curvlinops import GGNLinearOperator, hutchinson_trace

    model = copy.deepcopy(w.model)

    def call() -> dict[str, Tensor]:
        torch.manual_seed(0)
        ggn = GGNLinearOperator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(model.parameters()),
            [(w.inputs, w.targets)],
            check_deterministic=False,
        )
        return {"estimate": hutchinson_trace(ggn, num_matvecs=10)}

    return call


@method("traces", "PyHessian, 10 probes")
def _(w: Workload) -> Call | None:
    from pyhessian import hessian

    if any(isinstance(m, nn.GroupNorm | nn.LayerNorm) for m in w.model.modules()):
        return None
    model = copy.deepcopy(w.model)

    def call() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()

        def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, reduction="sum")

        found = hessian(model, criterion, (w.inputs, w.targets), cuda=False)
        draws = found.trace(maxIter=10, tol=-torch.inf)  # never stops early
        assert len(draws) == 10
        return {"estimate": torch.tensor(draws).mean()}

    return call


# What is true -------------------------------------------------------------------------------------


def oracle(w: Workload, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All values by plain autograd, on one sample and one output at a time, summed in float64.

    Returns:
        The values above, of `ntk` only the columns of the samples `few`.
    """
    with torch.no_grad():
        drawn = draw(w.model(w.inputs))
    model = copy.deepcopy(w.model).to(dtype)
    parameters = list(model.parameters())

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, parts, strict=True)
        full = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        return torch.cat([g.flatten() for g in full]).double()

    def logits(n: int) -> Tensor:
        x = w.inputs[n : n + 1]
        return model(x.to(dtype) if x.is_floating_point() else x)

    def jacobian(n: int) -> Tensor:
        return torch.stack([gradient(f) for f in select(logits(n))[0]])

    few = [0, len(w.inputs) // 2]
    columns = torch.cat([jacobian(n) for n in few])
    gradients, drawn_trace, blocks, kernel, metrics = [], 0, [], [], []
    for n in range(len(w.inputs)):
        z = logits(n)
        gradients.append(gradient(cross_entropies(z, w.targets[n : n + 1])[0]))
        drawn_trace += gradient(cross_entropies(z, drawn[n : n + 1])[0]).square().sum()
        j = jacobian(n)
        blocks.append(j @ j.T)
        kernel.append(j @ columns.T)
        p = select(z)[0].detach().softmax(0)
        metrics.append(p.diag() - p.outer(p))
    g = torch.stack(gradients)
    values = {
        "few": torch.tensor(few),
        "norms": g.norm(dim=1),
        "loss_gram": g @ g.T,
        "drawn_trace": drawn_trace,
        "ntk_trace": torch.stack(blocks).diagonal(dim1=1, dim2=2).sum(),
        "ntk": torch.stack(kernel).unflatten(2, (len(few), -1)),
    }
    if w.targets.dim() == 1:
        values["fisher_trace"] = (torch.stack(blocks) * torch.stack(metrics)).sum()
        values["estimate"] = values["fisher_trace"]
    return values
