"""The Jacobian, whole and by layer, against one-sample-at-a-time autograd over the zoo."""

import oracle
import pytest
import torch
import zoo
from oracle import relative_error

import nettrace as nt

TOLERANCE = 1e-10
FULL = "2GiB"
#: Budgets that force chunks of outputs and tiles of samples.
SMALL = {"mlp": 3_000, "cnn": 60_000, "gpt": 400_000, "router": 20_000, "fourier": 20_000}


@pytest.fixture(scope="module", params=zoo.ZOO)
def case(request):
    member = zoo.build(request.param)
    truth = oracle.one_sample_jacobian(member)
    return request.param, member, truth


def jacobian(member, **options):
    return nt.jacobian(member.forward(member.model, member.batch), member.model, **options)


def test_every_quantity_is_that_of_single_samples(case):
    _, member, truth = case
    check(member, truth, FULL)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_budget_changes_nothing_but_memory(name):
    member = zoo.build(name)
    check(member, oracle.one_sample_jacobian(member), SMALL[name])


def check(member, truth, budget):
    j = torch.cat(list(truth.values()), 2)
    kernel = oracle.gram(j)
    found = jacobian(member, memory_budget=budget)
    u, v = torch.randn(found.parameters).double(), torch.randn(j.shape[:2]).double()
    n, c = j.shape[:2]
    assert (found.samples, found.outputs, found.parameters) == j.shape
    for value, true in [
        (found.gram(), kernel),
        (found.gram(trace_outputs=True), torch.einsum("ncmc->nm", kernel)),
        (found.blocks(), torch.einsum("ncnd->ncd", kernel)),
        (found.norms(), j.norm(dim=2)),
        (found.trace(), j.square().sum()),
        (found.jvp(u), j @ u),
        (found.vjp(v), torch.einsum("nc,ncp->p", v, j)),
        (found.rows(n - 1), j[-1]),
    ]:
        assert value.shape == true.shape
        assert relative_error(value, true) < TOLERANCE


def test_layers_are_each_right_and_sum_to_the_whole(case):
    name, member, truth = case
    found = jacobian(member)
    assert list(found.trace(per_layer=True)) == list(truth)
    u = {k: torch.randn_like(p) for k, p in member.model.named_parameters() if p.requires_grad}
    v = torch.randn(found.samples, found.outputs).double()
    flat_u = {k: (torch.view_as_real(p) if p.is_complex() else p).flatten() for k, p in u.items()}
    for layer, j in truth.items():
        if layer != "unused":
            assert j.any(), f"{layer} of {name} takes no part: the test would be vacuous"
    for shares, whole, true in [
        (found.gram(per_layer=True), found.gram(), oracle.gram),
        (
            found.gram(trace_outputs=True, per_layer=True),
            found.gram(trace_outputs=True),
            lambda j: torch.einsum("ncp,mcp->nm", j, j),
        ),
        (
            found.blocks(per_layer=True),
            found.blocks(),
            lambda j: torch.einsum("ncp,ndp->ncd", j, j),
        ),
        (found.trace(per_layer=True), found.trace(), lambda j: j.square().sum()),
    ]:
        assert relative_error(torch.stack(list(shares.values())).sum(0), whole) < TOLERANCE
        for layer, j in truth.items():
            assert relative_error(shares[layer], true(j)) < TOLERANCE
    norms, products, pulled = (
        found.norms(per_layer=True),
        found.jvp(u, per_layer=True),
        found.vjp(v, per_layer=True),
    )
    for layer, j in truth.items():
        assert relative_error(norms[layer], j.norm(dim=2)) < TOLERANCE
        assert relative_error(products[layer], j @ flat_u[layer]) < TOLERANCE
        share = pulled[layer]
        assert share.shape == u[layer].shape
        share = torch.view_as_real(share) if share.is_complex() else share
        assert relative_error(share.flatten(), torch.einsum("nc,ncp->p", v, j)) < TOLERANCE
    assert relative_error(sum(products.values()), found.jvp(u)) < TOLERANCE


def test_routes_are_the_intended_ones(case):
    name, member, truth = case
    found = jacobian(member)
    routes = found.coverage()
    assert set(routes.values()) == member.routes
    if name in zoo.HOUSE:
        traces = found.trace(per_layer=True)
        by_rule = sum(t for layer, t in traces.items() if routes[layer] == "rule")
        assert by_rule >= 0.9 * found.trace()


@pytest.mark.parametrize("name", zoo.HOUSE)
def test_single_precision_is_as_good_as_its_forward_pass(name):
    # Measured, relative to the largest entry: 8e-8 (mlp), 2e-7 (cnn), 3e-7 (gpt), 2e-7 (vit).
    wide, narrow = (jacobian(zoo.build(name, dtype)) for dtype in (torch.float64, torch.float32))
    assert narrow.gram().dtype == torch.float32
    assert relative_error(narrow.gram().double(), wide.gram()) < 2e-6
    assert relative_error(narrow.norms().double(), wide.norms()) < 2e-6


@pytest.mark.parametrize("name", zoo.HOUSE)
def test_nothing_is_left_on_the_model(name):
    member = zoo.build(name)
    before = [id(p) for p in member.model.parameters()]
    outputs = member.forward(member.model, member.batch)
    found = nt.jacobian(outputs, member.model)
    found.gram(), found.trace(), found.vjp(torch.ones(found.samples, found.outputs))
    assert [id(p) for p in member.model.parameters()] == before
    assert all(p.grad is None for p in member.model.parameters())
    assert not any(p._backward_hooks for p in member.model.parameters())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        for m in member.model.modules()
    )
    outputs.sum().backward()  # the tape is still good for the training's own backward


def test_projection_combines_outputs_sample_by_sample():
    member = zoo.build("cnn")
    found = jacobian(member)
    j = torch.stack([found.rows(n) for n in range(zoo.N)])
    v = torch.randn(3, zoo.N, found.outputs).double()
    true = torch.einsum("knc,ncp->nkp", v, j)
    projected = found.project(v)
    w = torch.randn(2, zoo.N, 3).double()
    assert relative_error(projected.gram(), oracle.gram(true)) < TOLERANCE
    assert relative_error(projected.rows(1), true[1]) < TOLERANCE
    assert (
        relative_error(projected.vjp(v[:, :, 0].T), torch.einsum("nk,nkp->p", v[:, :, 0].T, true))
        < TOLERANCE
    )
    twice = torch.einsum("jnk,nkp->njp", w, true)
    assert relative_error(projected.project(w).norms(), twice.norm(dim=2)) < TOLERANCE


def test_kernel_and_layer_blocks_in_one_pass():
    for budget in (FULL, SMALL["gpt"]):
        found = jacobian(zoo.build("gpt"), memory_budget=budget)
        gram, blocks = found.gram_and_layer_blocks()
        assert relative_error(gram, found.gram()) < TOLERANCE
        for name, block in found.blocks(per_layer=True).items():
            assert relative_error(blocks[name], block) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_loss_jacobian_is_that_of_single_samples(name):
    member = zoo.build(name)
    targets = torch.arange(zoo.N) % 3

    def losses(model, batch):
        outputs = member.forward(model, batch)
        return torch.nn.functional.cross_entropy(outputs, targets[: len(outputs)], reduction="none")

    rows = []
    for n in range(zoo.N):
        outputs = member.forward(member.model, member.take(n))
        loss = torch.nn.functional.cross_entropy(outputs, targets[n : n + 1])
        gradients = torch.autograd.grad(loss, list(member.model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    true = torch.stack(rows)
    found = nt.loss_jacobian(losses(member.model, member.batch), member.model)
    assert relative_error(found.norms(), true.norm(dim=1)) < TOLERANCE
    assert relative_error(found.gram(), true @ true.T) < TOLERANCE
    assert relative_error(found.mean(), true.mean(0)) < TOLERANCE
    assert relative_error(found.rows(2), true[2]) < TOLERANCE
    layers = found.norms(per_layer=True)
    squares = torch.stack([n.square() for n in layers.values()]).sum(0)
    assert relative_error(squares.sqrt(), true.norm(dim=1)) < TOLERANCE
    assert relative_error(sum(found.gram(per_layer=True).values()), true @ true.T) < TOLERANCE
    shares = found.mean(per_layer=True)
    assert relative_error(torch.cat([s.flatten() for s in shares.values()]), true.mean(0)) < 1e-10


def test_parameters_can_be_given_by_name_in_order_or_alone():
    member = zoo.build("mlp")
    whole = jacobian(member).gram(per_layer=True)
    outputs = member.forward(member.model, member.batch)
    named = dict(member.model.named_parameters())
    first = nt.jacobian(outputs, {"0.weight": named["0.weight"]})
    listed = nt.jacobian(outputs, [named["2.weight"], named["2.bias"]])
    alone = nt.jacobian(outputs, named["4.bias"])
    assert relative_error(first.gram(), whole["0.weight"]) < TOLERANCE
    assert relative_error(listed.gram(), whole["2.weight"] + whole["2.bias"]) < TOLERANCE
    assert relative_error(alone.gram(), whole["4.bias"]) < TOLERANCE
    assert list(listed.trace(per_layer=True)) == ["0", "1"]


def test_frozen_parameters_do_not_count():
    member = zoo.build("mlp")
    whole = jacobian(member).trace(per_layer=True)
    member.model[0].requires_grad_(False)
    found = jacobian(member)
    assert found.parameters == sum(p.numel() for p in member.model[2:].parameters())
    rest = sum(t for name, t in whole.items() if not name.startswith("0."))
    assert relative_error(found.trace(), rest) < TOLERANCE


def test_a_budget_below_the_result_is_refused_with_a_way_out():
    found = jacobian(zoo.build("mlp"), memory_budget=500)
    with pytest.raises(MemoryError, match="trace_outputs=True"):
        found.gram()
    assert found.gram(trace_outputs=True).shape == (zoo.N, zoo.N)
