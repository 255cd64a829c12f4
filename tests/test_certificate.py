"""The certificate and its spot check: faults that are planted are found, and named."""

import pytest
import torch
import zoo
from torch import nn

import nettrace as nt
from nettrace import gradients, rules
from nettrace.kernels import Outer, Still, dense
from nettrace.ownership import Axis

HARD = ("mlp", "cnn", "gpt", "router", "graphs", "no-rule", "fourier", "shared")


def jacobian(member, **options):
    return nt.jacobian(member.forward(member.model, member.batch), member.model, **options)


def plant(monkeypatch, node, fault):
    """Makes the rule for a kind of node wrong."""
    right = rules.RULES[node]
    monkeypatch.setitem(rules.RULES, node, lambda flow: fault(right(flow), flow))


def scaled(factor, flow):
    if isinstance(factor, Outer):
        return Outer(factor.still, factor.moving * 1.01, factor.moves_left)
    return type(factor)(factor.values * 1.01)


def transposed(factor, flow):
    if not isinstance(factor, Outer) or flow.slot == 0:
        return factor
    return Outer(factor.still, factor.moving, not factor.moves_left)


def one_sample_wrong(factor, flow):
    values = dense(factor).clone()
    if flow.samples.start in (0, None):
        values[:, 0] = 0
    return gradients.Dense(values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HARD)
def test_right_numbers_pass_and_shares_are_those_of_the_trace(name, dtype):
    member = zoo.build(name, dtype)
    found = jacobian(member)
    certificate = nt.certify(found)
    assert certificate.error < 10 * torch.finfo(dtype).eps
    assert {row.name: row.route for row in certificate.rows} == found.coverage()
    traces = found.trace(per_layer=True)
    for row in certificate.rows:
        exact = float(traces[row.name] / found.trace())
        assert row.share == pytest.approx(exact, **({"abs": 0.1} if certificate.draws else {}))
    assert sum(certificate.by_route().values()) == pytest.approx(1)
    assert nt.Certificate.from_json(certificate.as_json()) == certificate


@pytest.mark.parametrize(
    ("name", "node", "fault", "parameters"),
    [
        ("mlp", "AddmmBackward0", scaled, "[024].(weight|bias)"),
        ("mlp", "AddmmBackward0", one_sample_wrong, "[024].(weight|bias)"),
        ("shared", "AddmmBackward0", transposed, "layer.weight"),
        ("cnn", "NativeGroupNormBackward0", scaled, "group_norm.(weight|bias)"),
        ("cnn", "MulBackward0", scaled, "scale"),
        ("gpt", "EmbeddingBackward0", scaled, "embedding.weight"),
        ("gpt", "NativeLayerNormBackward0", scaled, r"(blocks\.\d\.)?norm\d?\.(weight|bias)"),
        ("vit", "ConvolutionBackward0", scaled, "patches.(weight|bias)"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_rule_is_found_and_named(monkeypatch, name, node, fault, parameters, seed):
    member = zoo.build(name, torch.float32)
    plant(monkeypatch, node, fault)
    with pytest.raises(nt.SpotCheckError, match=f"'{parameters}'.*'rule'.*by plain autograd"):
        nt.certify(jacobian(member), seed=seed)


@pytest.mark.parametrize("kernel", ["sqnorms", "blocks", "traced_gram_", "inner"])
def test_a_wrong_kernel_is_found(monkeypatch, kernel):
    from nettrace import operator

    right = getattr(operator, kernel)

    def wrong(*args):
        if kernel.endswith("_"):  # adds to its first argument
            right(*args)
            args[0].mul_(1.01)
            return None
        return 1.01 * right(*args)

    monkeypatch.setattr(operator, kernel, wrong)
    with pytest.raises(nt.SpotCheckError):
        nt.certify(jacobian(zoo.build("mlp", torch.float32)))


def test_a_fault_of_the_whole_that_no_share_shows_is_found(monkeypatch):
    monkeypatch.setattr(Still, "with_ones", lambda still: still)  # biases are lost
    with pytest.raises(nt.SpotCheckError, match="all parameters together"):
        nt.certify(jacobian(zoo.build("mlp", torch.float32)))


def test_a_hook_on_a_parameter_is_named():
    weight = torch.randn(3, 3, requires_grad=True)
    weight.register_hook(lambda g: 3 * g)
    with pytest.raises(nt.SpotCheckError, match="has a hook"):
        nt.certify(nt.jacobian(torch.tanh(torch.randn(4, 3) @ weight), weight))


def test_rows_given_to_the_wrong_samples_are_found(monkeypatch):
    right = Axis.by_sample
    monkeypatch.setattr(Axis, "by_sample", lambda s, v, d, n: right(s, v, d, n).roll(1, 0))
    with pytest.raises(nt.SpotCheckError, match="sample"):
        nt.certify(jacobian(zoo.build("mlp", torch.float32)))


def test_with_many_outputs_shares_are_estimated_at_a_cost_that_does_not_grow():
    torch.manual_seed(3)
    passes = []
    for outputs in (10, 100):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
        found = nt.jacobian(model(torch.randn(32, 6).double()), model)
        pull, backward = found._gradients.pull, found._gradients.backward
        counted = []
        found._gradients.pull = lambda v, layers, pull=pull, n=counted: (
            n.append(len(v)),
            pull(v, layers),
        )[1]
        found._gradients.backward = lambda v, back=backward, n=counted: (n.append(1), back(v))[1]
        certificate = nt.certify(found)
        passes.append(sum(counted))
        assert certificate.draws == 4
        traces = found.trace(per_layer=True)
        for row in certificate.rows:
            assert row.share == pytest.approx(float(traces[row.name] / found.trace()), abs=0.05)
    assert passes[0] == passes[1] <= 21
    assert "estimated from 4 random draws" in str(certificate)


@pytest.mark.parametrize(
    ("samples", "routes", "options"),
    [
        (1, {"rule"}, {}),
        (6, {"rows"}, {"coupled": "rows"}),
        (40, {"rule"}, {"memory_budget": 300}),  # too little for any inner product
    ],
)
def test_one_sample_coupled_samples_and_little_memory(samples, routes, options):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    model.train("coupled" in options)
    certificate = nt.certify(nt.jacobian(model(torch.randn(samples, 4)), model, **options))
    assert set(certificate.by_route()) == routes
    assert certificate.error < 1e-6
    assert sum(row.share for row in certificate.rows) == pytest.approx(1)


def test_a_bias_without_effect_is_no_fault():
    """Its gradient is nothing but what rounding leaves of a sum that cancels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Tanh(), nn.Linear(8, 3)
    )

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.shift = model, nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.net[1:](self.net[0](x) * 100 + self.shift)

    net = Shifted()
    for seed in range(10):
        certificate = nt.certify(nt.jacobian(net(torch.randn(5, 6)), net), seed=seed)
        assert certificate.rows[0].share < 1e-8


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_shows_every_parameter(width):
    certificate = nt.certify(jacobian(zoo.build("gpt")))
    lines = certificate.table(width).splitlines()
    assert all(len(line) <= max(width, 70) for line in lines)
    assert len([line for line in lines if " rule " in line]) == len(certificate.rows) + 1


# In a trace -------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def probe():
    return nt.Probe(torch.randn(6, 4), torch.arange(6) % 3)


def checked(tracer, model, steps):
    return [
        step for step in steps if any(r.name == "nettrace/spot_check" for r in tracer(model, step))
    ]


def test_it_is_taken_at_the_first_record_and_ever_more_rarely():
    tracer = nt.Tracer(probe(), "ntk/trace", on_error="raise")
    assert checked(tracer, net(), range(20)) == [0, 1, 3, 7, 15]
    assert checked(nt.Tracer(probe(), "loss"), net(), range(3)) == []


def test_it_is_taken_when_the_tape_changes_and_not_when_values_do():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.square = net(), False

        def forward(self, x):
            return self.net(x) ** 2 if self.square else self.net(x)

    model, tracer = Switch(), nt.Tracer(probe(), "ntk/trace", on_error="raise")
    checked(tracer, model, range(4))
    assert checked(tracer, model, [4]) == []
    model.square = True
    assert checked(tracer, model, [5, 6, 7]) == [5, 7]  # 7 is the eighth record
    with torch.no_grad():
        model.net[0].weight.mul_(2)
    assert checked(tracer, model, [8]) == []
    model.net[2].bias.requires_grad_(False)
    assert checked(tracer, model, [9]) == [9]


def test_it_is_kept_with_the_trace(tmp_path):
    model = net()
    tracer = nt.Tracer(probe(), ["ntk/trace", "loss"], to=tmp_path, on_error="raise")
    for step in range(3):
        tracer(model, step)
    data = nt.open(tmp_path)
    kept = data.nettrace_spot_check
    assert kept.notnull().values.tolist() == [True, True, False]
    certificate = nt.Certificate.from_json(kept.attrs["certificate"])
    assert [row.name for row in certificate.rows] == [n for n, _ in model.named_parameters()]
    assert certificate.error == kept[1]


def test_a_fault_makes_what_rests_on_derivatives_missing(monkeypatch, tmp_path):
    model = net()
    tracer = nt.Tracer(probe(), ["ntk/trace", "fisher", "loss"], to=tmp_path)
    with monkeypatch.context() as patch:
        plant(patch, "AddmmBackward0", scaled)
        with pytest.warns(nt.MissingMeasureWarning, match="SpotCheckError") as warned:
            records = {r.name: r for r in tracer(model, 0)}
    assert len(warned) == 1
    missing = {name for name, r in records.items() if r.missing}
    assert missing == {n for n in records if n.startswith(("ntk", "fisher"))} | {
        "nettrace/spot_check"
    }
    assert "'0.weight'" in records["ntk/trace"].missing or "bias" in records["ntk/trace"].missing
    assert not any(r.missing for r in tracer(model, 1))  # and it is tried again at once
    assert "SpotCheckError" in nt.open(tmp_path).ntk_trace.attrs["missing"]
    plant(monkeypatch, "AddmmBackward0", scaled)
    with pytest.raises(nt.SpotCheckError):
        nt.Tracer(probe(), "ntk/trace", on_error="raise")(model, 0)


def test_a_fault_that_begins_when_the_tape_changes_is_found_then(monkeypatch):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.late = net(), False
            self.norm = nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(self.net(x)) if self.late else self.net(x)

    model, tracer = Late(), nt.Tracer(probe(), "ntk/trace", on_error="raise")
    plant(monkeypatch, "NativeLayerNormBackward0", scaled)
    checked(tracer, model, range(5))
    model.late = True
    with pytest.raises(nt.SpotCheckError, match="norm"):
        tracer(model, 5)
