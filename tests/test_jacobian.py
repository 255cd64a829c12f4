"""The Jacobian, whole and by layer, against plain autograd over the zoo."""

import warnings
from dataclasses import dataclass
from shutil import which

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from oracle import relative_error
from torch import Tensor

import nettrace as nt

TOLERANCE = 1e-10
FULL = "2GiB"
#: Budgets that force chunks of outputs and tiles of samples.
SMALL = {"mlp": 3_000, "cnn": 60_000, "gpt": 400_000, "router": 20_000, "fourier": 20_000}


# Inductor compiles C++, which takes a minute.
COMPILED = [
    pytest.mark.slow,
    pytest.mark.skipif(not (which("g++") or which("clang++")), reason="needs a C++ compiler"),
]
MEMBERS = [
    pytest.param(name, marks=COMPILED if name == "compiled-inductor" else ()) for name in zoo.ZOO
]


@dataclass
class Case:
    """A member of the zoo, one forward pass of it, and its Jacobian (N, C, P) by parameter."""

    name: str
    member: zoo.Member
    outputs: Tensor
    truth: dict[str, Tensor]

    def jacobian(self, **options):
        return nt.jacobian(self.outputs, self.member.target, **self.options, **options)

    @property
    def options(self):
        return {"coupled": "rows"} if self.member.coupled else {}

    def agrees(self, found, true):
        assert found.shape == true.shape
        return relative_error(found, true.to(found.dtype)) < self.member.tolerance


def case_of(name):
    member = zoo.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what old parts of torch say of each other
        outputs = member.forward(member.model, member.batch)
    return Case(name, member, outputs, oracle.jacobian(outputs, member.parameters))


@pytest.fixture(scope="module", params=MEMBERS)
def case(request):
    return case_of(request.param)


def jacobian(member, **options):
    return nt.jacobian(member.forward(member.model, member.batch), member.model, **options)


def test_every_family_of_workloads_has_a_member():
    families = frozenset().union(*(kind.families for kind in zoo.ZOO.values()))
    assert families == {f"W{i}" for i in range(1, 21)}


@pytest.mark.parametrize("name", [name for name, kind in zoo.ZOO.items() if kind.alone])
def test_samples_alone_are_what_they_are_in_the_batch(name):
    """The two oracles agree: what is measured is what a sample has by itself."""
    case = case_of(name)
    for layer, j in oracle.one_sample_jacobian(name).items():
        assert case.agrees(case.truth[layer], j)


def test_every_quantity_is_that_of_plain_autograd(case):
    check(case, FULL)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_budget_changes_nothing_but_memory(name):
    check(case_of(name), SMALL[name])


def check(case, budget):
    j = torch.cat(list(case.truth.values()), 2).double()
    kernel = oracle.gram(j)
    found = case.jacobian(memory_budget=budget)
    u, v = torch.randn(found.parameters).double(), torch.randn(j.shape[:2]).double()
    n, c = j.shape[:2]
    assert (found.samples, found.outputs, found.parameters) == j.shape
    for value, true in [
        (found.gram(), kernel),
        (found.gram(trace_outputs=True), torch.einsum("ncmc->nm", kernel)),
        (found.blocks(), torch.einsum("ncnd->ncd", kernel)),
        (found.norms(), j.norm(dim=2)),
        (found.trace(), j.square().sum()),
        (found.column_sqnorms(), j.square().sum((0, 1))),
        (found.jvp(u), j @ u),
        (found.vjp(v), torch.einsum("nc,ncp->p", v, j)),
        (found.rows(n - 1), j[-1]),
    ]:
        assert case.agrees(value, true)


def test_layers_are_each_right_and_sum_to_the_whole(case):
    found, member, truth = case.jacobian(), case.member, case.truth
    assert list(found.trace(per_layer=True)) == list(truth)
    u = {k: torch.randn_like(p) for k, p in member.parameters.items()}
    v = torch.randn(found.samples, found.outputs).double()
    flat_u = {k: (torch.view_as_real(p) if p.is_complex() else p).flatten() for k, p in u.items()}
    for layer, j in truth.items():
        if layer != "unused":
            assert j.abs().max() > 1e-8, f"{layer} takes no part: the test would be vacuous"
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
        assert case.agrees(torch.stack(list(shares.values())).sum(0), whole)
        for layer, j in truth.items():
            assert case.agrees(shares[layer], true(j))
    norms, columns, products, pulled = (
        found.norms(per_layer=True),
        found.column_sqnorms(per_layer=True),
        found.jvp(u, per_layer=True),
        found.vjp(v, per_layer=True),
    )
    for layer, j in truth.items():
        assert case.agrees(norms[layer], j.norm(dim=2))
        pairs = (2,) * u[layer].is_complex()
        assert columns[layer].shape == (*u[layer].shape, *pairs)
        assert case.agrees(columns[layer].flatten(), j.square().sum((0, 1)))
        assert case.agrees(products[layer], j @ flat_u[layer])
        share = pulled[layer]
        assert share.shape == u[layer].shape
        share = torch.view_as_real(share) if share.is_complex() else share
        assert case.agrees(share.flatten(), torch.einsum("nc,ncp->p", v.to(j), j))
    assert case.agrees(sum(products.values()), found.jvp(u))


def test_loss_gradients_are_those_of_plain_autograd(case):
    losses = zoo.losses(case.outputs)
    truth = oracle.jacobian(losses, case.member.parameters)
    j = torch.cat(list(truth.values()), 2)[:, 0]
    found = nt.loss_jacobian(losses, case.member.target, **case.options)
    assert case.agrees(found.norms(), j.norm(dim=1))
    assert case.agrees(found.gram(), j @ j.T)
    assert case.agrees(found.mean(), j.mean(0))
    assert case.agrees(found.rows(2), j[2])
    norms, grams = found.norms(per_layer=True), found.gram(per_layer=True)
    for layer, share in truth.items():
        assert case.agrees(norms[layer], share[:, 0].norm(dim=1))
        assert case.agrees(grams[layer], share[:, 0] @ share[:, 0].T)
    shares = [
        torch.view_as_real(s) if s.is_complex() else s for s in found.mean(per_layer=True).values()
    ]
    assert case.agrees(torch.cat([s.flatten() for s in shares]), j.mean(0))


def test_routes_are_the_intended_ones(case):
    found = case.jacobian()
    routes = found.coverage()
    assert set(routes.values()) == case.member.routes
    if case.name in zoo.HOUSE:
        traces = found.trace(per_layer=True)
        by_rule = sum(t for layer, t in traces.items() if routes[layer] == "rule")
        assert by_rule >= 0.9 * found.trace()


@pytest.mark.parametrize("name", [name for name, kind in zoo.ZOO.items() if kind.coupled])
def test_coupled_members_are_refused_unless_rows_are_asked_for(name):
    case = case_of(name)
    for outputs in (case.outputs, zoo.losses(case.outputs)):
        with pytest.raises(nt.CoupledSamplesError, match="coupled='rows'"):
            nt.jacobian(outputs, case.member.target).norms()


def test_complex_outputs_are_refused_with_the_remedy():
    member = zoo.build("complex")
    outputs = member.model(member.batch)
    with pytest.raises(TypeError, match=r"torch\.view_as_real"):
        nt.jacobian(outputs, member.model)
    found = nt.jacobian(torch.view_as_real(outputs), member.model)
    for part, whole in ((outputs.real, 0), (outputs.imag, 1)):
        row = torch.autograd.grad(part[1, 0], list(member.parameters.values()), retain_graph=True)
        row = torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in row])
        assert relative_error(found.norms()[1, whole], row.norm()) < TOLERANCE


@pytest.mark.parametrize("name", zoo.HOUSE)
def test_single_precision_is_as_good_as_its_forward_pass(name):
    # Measured, relative to the largest entry: 9e-8 (resnet), 2e-7 (mlp, gpt, vit), 3e-7 (cnn).
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
    columns = true.square().sum((0, 1))
    assert relative_error(projected.column_sqnorms(), columns) < TOLERANCE
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


def transposed_with_bias(p):
    return F.linear(F.linear(p("x", 4, 3), p.w(3, 3), p.b(3)).tanh(), p.w(3, 3).t(), p.b(3))


def convolved_in_groups(p):
    y = F.conv1d(p("x", 4, 2, 5), p.w(4, 2, 1), p.b(4)).tanh()
    return F.conv1d(y, p.w(4, 2, 1), p.b(4), groups=2).mean(2)


def normalised_parameter(p):
    return F.layer_norm(p.w(4, 3), (4, 3), weight=p("x", 4, 3) * p.b(3))


def rectified_parameter(p):
    return F.prelu(p.w(1, 4, 3), p("x", 4, 2) @ p.b(2))[0]


def weighted_bags(p):
    words = torch.arange(8) % 5
    return F.embedding_bag(
        words, p.w(5, 3), torch.arange(4) * 2, mode="sum", per_sample_weights=p.b(8)
    )


def padded_transposition(p):
    out = F.conv_transpose2d(
        p("x", 4, 2, 4, 4), p.w(2, 3, 3, 3), p.b(6), 2, 0, (2, 1), groups=2, dilation=3
    )
    return out.tanh().mean((2, 3))


def lookup_and_head(p):
    h = p.w(6, 3)[torch.arange(8).view(4, 2) % 6]
    return F.linear(torch.tanh(h), p.w(6, 3), p.b(6)).sum(1)


@pytest.mark.parametrize(
    "use",
    [
        transposed_with_bias,
        convolved_in_groups,
        normalised_parameter,
        rectified_parameter,
        weighted_bags,
        padded_transposition,
        lookup_and_head,
    ],
)
def test_unusual_uses_of_weights_and_biases(use):
    class Drawn(dict):
        def __call__(self, name, *shape):
            if name not in self:
                self[name] = torch.randn(shape, dtype=torch.float64)
            return self[name]

        def w(self, *shape):
            return self("w", *shape).requires_grad_()

        def b(self, *shape):
            return self("b", *shape).requires_grad_()

    torch.manual_seed(0)
    drawn = Drawn()
    outputs = use(drawn)
    parameters = {name: drawn[name] for name in "wb"}
    j = torch.cat(list(oracle.jacobian(outputs, parameters).values()), 2)
    found = nt.jacobian(outputs, parameters)
    for value, true in [
        (found.gram(), oracle.gram(j)),
        (found.gram(trace_outputs=True), torch.einsum("ncp,mcp->nm", j, j)),
        (found.blocks(), torch.einsum("ncp,ndp->ncd", j, j)),
        (found.norms(), j.norm(dim=2)),
        (found.column_sqnorms(), j.square().sum((0, 1))),
        (sum(found.trace(per_layer=True).values()), j.square().sum()),
    ]:
        assert relative_error(value, true) < TOLERANCE
    nt.certify(found)


def test_autocast_around_contractions_changes_nothing():
    member = zoo.build("mlp", torch.float32)
    found = jacobian(member)
    with torch.autocast("cpu", torch.bfloat16):
        within = found.gram(), found.norms(), found.column_sqnorms(), found.blocks()
    outside = found.gram(), found.norms(), found.column_sqnorms(), found.blocks()
    assert all(torch.equal(a, b) for a, b in zip(within, outside, strict=True))
