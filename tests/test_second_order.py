"""Products with Hessians and Gauss-Newton matrices, over the zoo, against what autograd gives.

The truth of a Hessian is the difference of two gradients by plain first-order autograd; that of a
Gauss-Newton matrix is the Jacobian written out, one output at a time.
"""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
import training
import zoo
from torch import nn
from torch.nn.utils import parametrizations

import nettrace as nt
from nettrace.freeze import frozen
from nettrace.second_order import NotTwiceDifferentiableError
from nettrace.statistics import Statistics

pytestmark = [
    pytest.mark.filterwarnings(text)
    for text in (*training.HARMLESS, "ignore:`torch.jit.*deprecated:DeprecationWarning")
]
#: Members that are no function of weights and batch alone, or not in double precision.
UNFIT = {
    name for name, kind in zoo.ZOO.items() if kind.coupled or kind.training or kind.tolerance > 1e-9
}
#: Members whose gradients are not those of one smooth loss.
REFUSED = {
    "bags": "not symmetric",  # gradients that are scaled by how often a row is used
    "energy-model": "not symmetric",  # samples that are drawn from the model, and detached
    "layer-local": "not symmetric",
    "orthogonal": "jumps",  # signs of a QR decomposition
    "policy": "not symmetric",  # advantages that are detached
    "quantised": "not symmetric",  # straight through what is rounded
}
#: Members with an operation of which the backward pass is not, or wrongly, differentiable.
BY_DIFFERENCES = {
    "episodes",
    "equilibrium",
    "gaussian-process",
    "low-rank",
    "no-rule",
    "radial-basis",
}


def losses_of(outputs):
    return zoo.losses(outputs.abs() if outputs.is_complex() else outputs)


def probe_of(member):
    return nt.Probe(
        member.batch,
        forward=lambda _, batch: member.forward(member.model, batch),
        losses=lambda outputs, _: losses_of(outputs),
    )


def mean_gradient(member, move, scale):
    """With the weights moved, and moved back."""
    parameters = member.parameters
    data = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = data[name] + scale * move[name]
    torch.manual_seed(0)
    loss = losses_of(member.forward(member.model, member.batch)).mean()
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    for name, p in parameters.items():
        p.data = data[name]
    return dict(zip(parameters, (g.detach() for g in found), strict=True))


def norm(tensors):
    return float(sum(t.abs().square().sum() for t in tensors) ** 0.5)


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - UNFIT))
def test_hessian_products_are_differences_of_gradients(name):
    member = zoo.build(name)
    with frozen(member.target):
        torch.manual_seed(0)
        statistics = Statistics(member.target, probe_of(member))
        if name in REFUSED:
            with pytest.raises(NotTwiceDifferentiableError, match=REFUSED[name]):
                statistics.hessian_operator  # noqa: B018
            return
        operator = statistics.hessian_operator
        vector = torch.randn(operator.size, dtype=operator.dtype)
        found = operator.split(operator(vector))
        move = operator.split(vector / vector.norm())
        above, below = (mean_gradient(member, move, sign * 1e-5) for sign in (1, -1))
        true = {n: (above[n] - below[n]) / 2e-5 * vector.norm() for n in above}
        error = norm(found[n] - true[n] for n in true)
        assert error <= 1e-5 * norm(true.values()) + 1e-7
        how = statistics.about(["hessian_operator"])["second_derivatives"]
        assert how.startswith("finite differences" if name in BY_DIFFERENCES else "reverse")


@pytest.mark.parametrize("name", [*zoo.HOUSE, "complex", "lstm", "pinn"])
def test_gauss_newton_products_are_those_of_the_matrix(name):
    """For the losses sum f^2 / 2 + f^4 / 12, which bend by 1 + f^2."""
    member = zoo.build(name)
    probe = nt.Probe(
        member.batch,
        forward=lambda _, batch: member.forward(member.model, batch),
        losses=lambda f, _: (f.square() / 2 + f**4 / 12).flatten(1).sum(1),
    )
    with frozen(member.target):
        torch.manual_seed(0)
        operator = Statistics(member.target, probe).gauss_newton_operator
        vector = torch.randn(operator.size, dtype=operator.dtype)
        torch.manual_seed(0)
        outputs = member.forward(member.model, member.batch)
        j = torch.cat(list(oracle.jacobian(outputs, member.parameters).values()), 2)
        bend = 1 + outputs.detach().flatten(1).square()
        true = torch.einsum("ncp,nc,ncq,q->p", j, bend, j, vector) / len(j)
        assert norm([operator(vector) - true]) <= 1e-10 * norm([true])


def classifier(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(10, 4)
    return model, nt.Probe(x.to(dtype), torch.arange(10) % 3)


def dense(operator):
    return torch.stack([operator(row) for row in torch.eye(operator.size, dtype=operator.dtype)])


def true_hessian(model, probe, dtype=torch.float64):
    """By reverse over reverse mode of a loss that is written out."""
    model = copy.deepcopy(model).to(dtype)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(w):
        parts = w.split([s.numel() for s in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        outputs = torch.func.functional_call(model, named, (probe.inputs.to(dtype),))
        return F.cross_entropy(outputs, probe.targets)

    return torch.autograd.functional.hessian(loss, flat)


def test_through_layer_normalisation():
    model, probe = classifier()
    with frozen(model):
        statistics = Statistics(model, probe)
        found = dense(statistics.hessian_operator)
        fisher = dense(statistics.fisher_operator)
        assert torch.allclose(found, true_hessian(model, probe), rtol=0, atol=1e-12)
        p = statistics.outputs.softmax(1)
        m = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        rows = torch.stack([statistics.jacobian.rows(n) for n in range(10)])
        true = torch.einsum("ncp,ncd,ndq->pq", rows, m, rows) / 10
        assert torch.allclose(fisher, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    model, probe = classifier(dtype)
    before = copy.deepcopy(model.state_dict())
    with frozen(model):
        found = dense(Statistics(model, probe).hessian_operator)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), true_hessian(model, probe), rtol=0, atol=1e-5)
    assert all(
        torch.equal(before[n], t) and t.dtype == dtype for n, t in model.state_dict().items()
    )


def test_blocks_and_scales():
    model, probe = classifier()
    with frozen(model):
        operator = Statistics(model, probe).hessian_operator
        whole = true_hessian(model, probe)
        place = operator.layers["3.weight"]
        block = dense(operator.block("3.weight"))
        assert torch.allclose(block, whole[place, place], rtol=0, atol=1e-12)
        d, s = torch.rand(operator.size).double(), torch.rand(operator.size).double()
        true = d[:, None] * (whole + torch.diag(s)) * d
        assert torch.allclose(dense(operator.scaled(d, s)), true, rtol=0, atol=1e-12)


def test_weight_normalisation_is_wrong_in_torch_and_taken_by_differences():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    model, probe = model.double(), classifier()[1]
    with frozen(model):
        statistics = Statistics(model, probe)
        operator = statistics.hessian_operator
        vector = torch.randn(operator.size)
        found, wide = operator(vector).double(), statistics.wide_loss
        assert "finite differences" in statistics.about(["hessian_top"])["second_derivatives"]
        steps = [wide.gradient(wide.point + sign * 1e-6 * vector) for sign in (1, -1)]
        assert norm([found - (steps[0] - steps[1]) / 2e-6]) <= 1e-5 * norm([found])
        with pytest.raises(NotTwiceDifferentiableError, match="WeightNorm"):
            statistics._twice  # noqa: B018


def test_the_wide_loss_is_the_loss_at_other_weights():
    model, probe = classifier(torch.float32)
    with frozen(model):
        wide = Statistics(model, probe).wide_loss
        moved = wide.point + 0.1
        true = copy.deepcopy(model).double()
        with torch.no_grad():
            for p in true.parameters():
                p += 0.1
        expected = F.cross_entropy(true(probe.inputs.double()), probe.targets)
        assert abs(wide(moved) - float(expected.detach())) < 1e-14
        assert abs(wide(wide.point) - float(Statistics(model, probe).losses.mean())) < 1e-6
