"""Measures that compare looks, against explicit Jacobians, SciPy, torch.func and closed forms."""

import copy
import itertools
import math

import numpy as np
import oracle
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jvp

import nettrace as nt
from nettrace.linearise import linearised, put_in_place
from nettrace.measures import motion
from nettrace.statistics import Inapplicable

N, C = 6, 3


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mlp(width=7):
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, C))
    return net.double()


def move(model, size=0.1):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def looks(model, probe, names, steps, size=0.1):
    """The records by name and step, of a network that moves at random between looks."""
    tracer, found = nt.Tracer(probe, names, on_error="raise"), {}
    for number, step in enumerate(steps):
        if number:
            move(model, size)
        found |= {(r.name, r.step): r for r in tracer(model, step)}
    return found


def kernel(model, x):
    j = oracle.jacobian(model(x), dict(model.named_parameters()))
    j = torch.cat(list(j.values()), 2).flatten(0, 1)
    return (j @ j.T).numpy()


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


# The kernel ---------------------------------------------------------------------------------------


def test_the_kernels_motion_is_that_of_explicit_kernels():
    model, x, steps = mlp(), normal(N, 4), [0, 5, 7]
    tracer, kernels, found = (
        nt.Tracer(nt.Probe(x, torch.arange(len(x)) % C), "ntk", on_error="raise"),
        {},
        {},
    )
    for step in steps:
        kernels[step] = kernel(model, x)
        found |= {(r.name, r.step): r for r in tracer(model, step)}
        move(model)
    centring = np.eye(N * C) - 1 / (N * C)
    for before, step in [*itertools.pairwise(steps), (0, 7)]:
        one, other = kernels[before], kernels[step]
        distance = np.linalg.norm(other - one) / np.linalg.norm(one)
        leading = [np.linalg.eigh(k)[1][:, ::-1][:, :9] for k in (one, other)]  # 3 C, half of N C
        angles = scipy.linalg.subspace_angles(*leading)[::-1]
        centred = [centring @ k @ centring for k in (one, other)]
        expected = {"first": {}, "previous": {}}
        if before == 0:
            expected["first"] = {"ntk/cka_distance_first": 1 - cosine(*centred)}
        if (before, step) != (0, 7):
            velocities = {"ntk/velocity": distance, "ntk/angular_velocity": 1 - cosine(one, other)}
            expected["previous"] = {k: v / (step - before) for k, v in velocities.items()}
        for when, values in expected.items():
            if values:
                values |= {
                    f"ntk/distance_{when}": distance,
                    f"ntk/misalignment_{when}": 1 - cosine(one, other),
                    f"ntk/rotation_{when}": angles,
                }
            for name, value in values.items():
                record = found[name, step]
                np.testing.assert_allclose(record.value, value, rtol=1e-8, atol=1e-13)
                assert record.attributes["reference_step"] == before
    assert found["ntk/rotation_first", 7].attributes["k"] == 9


def test_the_first_look_is_no_distance_from_itself_and_has_no_previous():
    found = looks(mlp(), nt.Probe(normal(N, 4), torch.arange(N) % C), ["ntk", "weights"], [3])
    assert not any("previous" in name or "velocity" in name for name, _ in found)
    assert ("weights/lazy_rich_index", 3) not in found
    for (name, _), record in found.items():
        if "first" in name or "displacement" in name:
            np.testing.assert_allclose(record.value, 0, atol=1e-13, err_msg=name)
            assert record.attributes["reference_step"] == 3


def test_a_linear_networks_kernel_stands_still_and_its_linearisation_is_itself():
    model, x, y = nn.Linear(4, C).double(), normal(N, 4), torch.arange(N) % C
    found = looks(model, nt.Probe(x, y), ["ntk", "weights", "loss/mean"], [0, 1], size=1.0)
    names = ["distance_first", "misalignment_first", "velocity", "cka_distance_first"]
    for name in [*names, "rotation_first", "rotation_previous"]:
        np.testing.assert_allclose(found[f"ntk/{name}", 1].value, 0, atol=1e-14, err_msg=name)
    assert found["weights/lazy_rich_index", 1].value < 1e-14
    loss = found["weights/linearised_loss", 1]
    assert loss.value == pytest.approx(found["loss/mean", 1].value, rel=1e-14)
    assert loss.standard_error == pytest.approx(found["loss/mean", 1].standard_error, rel=1e-13)
    assert loss.attributes["likelihood"] == "categorical"


kernels = st.integers(0, 10**6).map(
    lambda seed: torch.randn(
        12, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
)


def gram_of(factor):
    return (factor @ factor.T).view(4, 3, 4, 3)


@given(kernels, kernels, st.floats(1e-6, 1e6), st.permutations(range(4)))
@settings(max_examples=30, deadline=None)
def test_kernel_distances_are_symmetric_and_see_neither_scale_nor_order(a, b, scale, order):
    one, other = gram_of(a), gram_of(b)
    shuffled = [k[order][:, :, order] for k in (one, other)]
    for distance in (motion.misalignment, motion.cka_distance):
        true = float(distance(one, other))
        assert 0 <= true <= 1
        assert float(distance(other, one)) == pytest.approx(true, rel=1e-12, abs=1e-15)
        assert float(distance(scale * one, other)) == pytest.approx(true, rel=1e-9, abs=1e-14)
        assert float(distance(*shuffled)) == pytest.approx(true, rel=1e-12, abs=1e-15)
        assert float(distance(one, one)) < 1e-15
    true = float(motion.distance(one, other))
    assert float(motion.distance(*shuffled)) == pytest.approx(true, rel=1e-12)
    assert float(motion.distance(scale * one, scale * other)) == pytest.approx(true, rel=1e-12)
    assert float(motion.distance(scale * one, one)) == pytest.approx(abs(scale - 1), rel=1e-9)
    norms = one.norm() / other.norm()
    assert float(motion.distance(other, one)) * float(norms) == pytest.approx(true, rel=1e-12)


@given(kernels, st.floats(1e-9, math.pi / 2), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_rotation_is_that_by_which_a_subspace_was_turned(seed, angle, k):
    basis = torch.linalg.qr(seed[:, :12]).Q
    one, orthogonal, mixed = basis[:, :k], basis[:, k : 2 * k], torch.linalg.qr(seed[:k, :k]).Q
    turned = one.clone()
    turned[:, 0] = math.cos(angle) * one[:, 0] + math.sin(angle) * orthogonal[:, 0]
    expected = [0.0] * (k - 1) + [angle]
    found = motion.rotation(turned @ mixed, one).value  # whatever basis of the subspace is given
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-14)
    assert motion.rotation(one @ mixed, one).value.tolist() == pytest.approx([0] * k, abs=1e-14)
    right = [math.pi / 2] * k
    assert motion.rotation(orthogonal @ mixed, one).value.tolist() == pytest.approx(right)


@pytest.mark.parametrize(("samples", "outputs", "k"), [(40, 1, 10), (40, 3, 12), (9, 4, 12)])
@pytest.mark.parametrize("few", [False, True])
def test_as_many_eigenvectors_lead_as_the_convention_says(samples, outputs, k, few):
    samples, k = (4, 2 * outputs) if few else (samples, k)
    model = nn.Linear(samples, outputs).double()
    found = looks(model, nt.Probe(normal(samples, samples)), "ntk/rotation_first", [0])
    assert found["ntk/rotation_first", 0].value.shape == (k,)
    assert k <= samples * outputs / 2


def test_kernels_that_are_the_same_for_all_pairs_have_no_centred_direction():
    for constant in (torch.full((4, 1, 4, 1), 0.3), torch.ones(1, 1, 1, 1)):
        with pytest.raises(Inapplicable, match="centring leaves nothing"):
            motion.cka_distance(constant, constant)


def test_kernels_that_are_zero_have_no_direction():
    zero = torch.zeros(2, 1, 2, 1)
    for distance in (motion.distance, motion.misalignment):
        with pytest.raises(ValueError, match="kernel that is zero is not defined"):
            distance(torch.ones(2, 1, 2, 1), zero)


# The weights --------------------------------------------------------------------------------------


def test_displacement_by_hand():
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]])), model.bias.zero_()
    tracer = nt.Tracer(nt.Probe(normal(N, 2)), "weights/displacement", on_error="raise")
    layers = nt.Tracer(nt.Probe(normal(N, 2)), "weights/displacement_per_layer", on_error="raise")
    assert tracer(model, 0)[0].value == 0
    assert layers(model, 0)[0].value.tolist() == [0, 0]
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.0, 4.0]])), model.bias.fill_(3.0)
    assert tracer(model, 1)[0].value == 1.0  # 5 / 5
    record = layers(model, 1)[0]
    assert record.value.tolist() == [0.8, math.inf]
    assert record.coordinates == {"layer": ["weight", "bias"]}
    zero = {"w": torch.zeros(3)}
    assert [float(motion.displacement({"w": torch.full((3,), w)}, zero)) for w in (0.0, 1.0)] == [
        0,
        math.inf,
    ]


def test_weights_that_were_thawed_since_say_so():
    model = mlp()
    model[0].weight.requires_grad_(False)
    tracer = nt.Tracer(nt.Probe(normal(N, 4)), "weights/displacement", on_error="raise")
    tracer(model, 0)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"\['0.weight'\] need a gradient either now"):
        tracer(model, 1)


class Normed(nn.Module):
    """Tied weights, a lookup, and buffers that move too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(4))
        self.also = self.norm  # a module, and so buffers, under two names

    def forward(self, x):
        return self.head(torch.tanh(self.also(self.table(x).sum(1))) * self.scale)


def recurrent():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, C)

        def forward(self, x):
            return self.head(self.rnn(x.unflatten(1, (2, 4)))[0][:, -1])

    return Recurrent()


CASES = {
    "mlp": (mlp, lambda: normal(N, 4)),
    "tied": (lambda: Normed().double(), lambda: torch.randint(0, 5, (N, 3))),
    "recurrent": (lambda: recurrent().double(), lambda: normal(N, 8)),
}


def disturb_buffers(model):
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.3 * torch.rand_like(buffer))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # in jvp
@pytest.mark.parametrize("case", CASES)
def test_the_linearised_network_is_that_of_torch_func(case):
    model, x = (make() for make in CASES[case])
    y = torch.arange(N) % 3
    model.eval()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    names = ["weights", "fisher/trace", "loss/mean"]
    tracer = nt.Tracer(nt.Probe(x, y), names, on_error="raise")
    tracer(model, 0)
    move(model), disturb_buffers(model)
    shift = {n: p.detach() - theta[n] for n, p in model.named_parameters()}
    twin = copy.deepcopy(model)  # torch leaves modules with two names broken
    f_0, df = jvp(lambda p: functional_call(twin, {**p, **buffers}, x), (theta,), (shift,))
    f_lin, f_t = (f_0 + df).detach(), model(x).detach()
    found = {r.name: r for r in tracer(model, 1)}
    index = float((f_t - f_lin).norm() / (f_t - f_0.detach()).norm())
    assert found["weights/lazy_rich_index"].value == pytest.approx(index, rel=1e-10)
    assert index > 1e-3
    loss = float(F.cross_entropy(f_lin, y))
    assert found["weights/linearised_loss"].value == pytest.approx(loss, rel=1e-12)


ZOO = "cnn gpt vit recurrent shared attention bags in-place low-rank checkpointed complex"


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # of old parts of torch
@pytest.mark.parametrize("name", ZOO.split())
def test_the_linearised_network_is_that_of_explicit_rows(name):
    member = zoo.build(name)
    probe = nt.Probe(member.batch, forward=member.forward)
    outputs = member.forward(member.model, member.batch)
    j = oracle.jacobian(outputs, member.parameters)
    state = {**dict(member.model.named_parameters()), **dict(member.model.named_buffers())}
    state = {n: t.detach().clone() for n, t in state.items()}
    move(member.model, 0.02)
    shift = {n: p.detach() - state[n] for n, p in member.parameters.items()}
    true = outputs.detach().flatten(1)
    for n, u in shift.items():
        u = torch.view_as_real(u) if u.is_complex() else u
        true = true + j[n] @ u.flatten()
    found = linearised(member.model, probe, state, outputs.detach())
    assert found.shape == outputs.shape
    assert oracle.relative_error(found.flatten(1), true) < 1e-12
    assert oracle.relative_error(outputs.detach().flatten(1), true) > 1e-4


STATISTICS = "gram scores loss_gradient_sqnorms mean_gradient_sqnorm fisher_sqnorms".split()


@pytest.mark.parametrize("case", CASES)
def test_the_tape_of_the_look_stays_valid(case):
    from nettrace.freeze import frozen
    from nettrace.past import Past
    from nettrace.statistics import Statistics

    model, x = (make() for make in CASES[case])
    probe, past = nt.Probe(x, torch.arange(N) % 3), Past()
    reference = Statistics.references["linearised_outputs"]
    with frozen(model):
        past.keep(Statistics(model, probe, past=past, step=0), [reference])
    move(model), disturb_buffers(model)
    before = {n: t.clone() for n, t in model.state_dict(keep_vars=True).items()}
    objects = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    orders = []
    for order in itertools.permutations(["linearised_outputs", *STATISTICS[:2]]):
        with frozen(model):
            look = Statistics(model, probe, STATISTICS, past=past, step=1)
            orders.append({name: getattr(look, name) for name in [*order, *STATISTICS]})
            buffers = [id(b) for b in model.buffers()]
            _ = Statistics(model, probe, past=past, step=1).linearised_outputs
            assert buffers == [id(b) for b in model.buffers()]
    with frozen(model):
        plain = Statistics(model, probe, STATISTICS)
        for found in orders:
            for name in STATISTICS:
                assert torch.equal(found[name], getattr(plain, name)), name
            assert torch.equal(found["linearised_outputs"], orders[0]["linearised_outputs"])
    for n, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[n])
    assert objects == {n: (p, p.data_ptr()) for n, p in model.named_parameters()}


def test_what_is_put_in_place_is_taken_out_again_after_an_error():
    model = Normed()
    own = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    other = {n: t.detach() + 1 for n, t in {**dict(model.named_parameters())}.items()}
    other |= {n: t + 1 for n, t in model.named_buffers()}
    kept = {n: t.clone() for n, t in other.items()}
    with pytest.raises(ZeroDivisionError), put_in_place(model, other):  # noqa: PT012
        assert model.head.weight is model.table.weight
        assert all(torch.equal(t, other[n]) for n, t in model.named_buffers())
        assert all(torch.equal(t, other[n]) for n, t in model.named_parameters())
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.mul_(2)  # as some forwards do
        1 / 0  # noqa: B018
    assert all(torch.equal(t, kept[n]) for n, t in other.items())
    for n, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is own[n][0]
        assert torch.equal(tensor, own[n][1])


def test_a_network_that_depends_on_more_than_weights_and_buffers_is_refused():
    class Warmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.warmth = mlp(), 1.0

        def forward(self, x):
            return self.warmth * self.net(x)

    model = Warmed()
    tracer = nt.Tracer(nt.Probe(normal(N, 4)), "weights/lazy_rich_index", on_error="raise")
    tracer(model, 0)
    model.warmth = 1.1
    with pytest.raises(ValueError, match="no longer gives the outputs that it gave then"):
        tracer(model, 1)
    model.net.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"buffers \['net.extra'\] are not those of the first"):
        tracer(model, 2)


def test_weights_frozen_or_thawed_since_are_linearised_too():
    model, x = mlp(), normal(N, 4)
    model[0].weight.requires_grad_(False)
    tracer = nt.Tracer(nt.Probe(x), "weights/lazy_rich_index", on_error="raise")
    tracer(model, 0)
    plain = nt.Tracer(nt.Probe(x), "weights/lazy_rich_index", on_error="raise")
    for p in model.parameters():
        p.requires_grad_(True)
    plain(model, 0)
    move(model)
    true = plain(model, 1)[0].value
    model[2].weight.requires_grad_(False)
    assert tracer(model, 1)[0].value == pytest.approx(float(true), rel=1e-12)
    moved = {n: p.detach() + 1 for n, p in model.named_parameters()}
    with put_in_place(model, moved):
        outputs = model(x).detach()
    linearised(model, nt.Probe(x), moved, outputs)
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [True, True, False, True]


def test_a_larger_output_scale_is_lazier():
    # Chizat et al.: f = alpha h, half the squared error over alpha^2; the weights' motion and the
    # departure from the linearised network both fall as 1 / alpha.
    class Scaled(nn.Module):
        def __init__(self, alpha):
            super().__init__()
            torch.manual_seed(1)
            self.net, self.alpha = mlp(30), alpha
            self.start = mlp(30)  # so that f is 0 at first
            self.start.load_state_dict(self.net.state_dict())
            self.start.requires_grad_(False)

        def forward(self, x):
            return self.alpha * (self.net(x) - self.start(x))

    x, y = normal(N, 4), normal(N, C)
    found = []
    for alpha in (1.0, 10.0, 100.0):
        model = Scaled(alpha)
        probe = nt.Probe(x, y)
        names = ["weights/lazy_rich_index", "weights/displacement", "ntk/distance_first"]
        tracer = nt.Tracer(probe, names, on_error="raise")
        tracer(model, 0)
        optimizer = torch.optim.SGD(model.net.parameters(), 0.02 / alpha**2)
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().sum()).backward()
            optimizer.step()
        found.append([float(r.value) for r in tracer(model, 60)[:3]])
    for less, more in itertools.pairwise(zip(*found, strict=True)):
        assert less[0] > less[1] > less[2], (less, more)
    for lazier in zip(*found, strict=True):
        assert 7 < lazier[1] / lazier[2] < 13
    assert found[2][0] < 0.02
