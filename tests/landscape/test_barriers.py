import copy

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from torch import nn
from zoo import build, losses

import nettrace as nt
from nettrace.landscape import barrier
from nettrace.landscape.barriers import Barrier
from nettrace.landscape.run import run


class Number(nn.Module):
    """One weight, which each sample scales."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w).double())

    def forward(self, x):
        return x[:, 0] * self.w


def along(function, n: int = 7) -> nt.Probe:
    """A probe of which the loss is a function of the weight, times a number of the sample."""
    x = torch.ones(n, 1).double()
    scales = torch.linspace(0.5, 1.5, n).double()
    return nt.Probe(x, scales, losses=lambda outputs, scales: function(outputs) * scales)


def mlp(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    ).double()
    for _ in range(3):
        model(torch.randn(30, 1, 5, 5).double() * (1 + seed))
    return model.eval()


def classes(n: int = 30) -> nt.Probe:
    torch.manual_seed(5)
    return nt.Probe(torch.randn(n, 4).double(), torch.randint(3, (n,)))


def images(n: int = 30) -> nt.Probe:
    torch.manual_seed(5)
    return nt.Probe(torch.randn(n, 1, 5, 5).double(), torch.randint(3, (n,)))


def test_barrier_of_a_double_well():
    found = barrier(Number(-1.0), along(lambda w: (w**2 - 1) ** 2), {"w": torch.tensor(1.0)})
    t = np.linspace(0, 1, 25)
    np.testing.assert_allclose(found["t"], t)
    np.testing.assert_allclose(found["loss"], ((2 * t - 1) ** 2 - 1) ** 2, atol=1e-12)
    assert float(found["barrier"]) == pytest.approx(1)
    assert float(found["barrier_at"]) == 0.5
    assert float(found["convexity_defect"]) == pytest.approx(1)
    scales = np.linspace(0.5, 1.5, 7)
    assert float(found["barrier_standard_error"]) == pytest.approx(scales.std(ddof=1) / 7**0.5)
    assert found.attrs["distance"] == 2


def test_barrier_is_over_the_line_between_the_ends():
    """w^3 from -1 to 2 has the chord 3 w + 2, which it touches at -1 and lies below after."""
    probe = along(lambda w: w**3 + 5)
    found = barrier(Number(-1.0), probe, Number(2.0), points=31)
    w = -1 + 3 * found["t"].values
    np.testing.assert_allclose(found["excess"], w**3 - 3 * w - 2, atol=1e-12)
    assert float(found["barrier"]) == 0
    backwards = barrier(Number(2.0), along(lambda w: 5 - w**3), Number(-1.0), points=31)
    assert float(backwards["barrier"]) == pytest.approx(4)
    assert float(backwards["barrier_at"]) == pytest.approx(1 / 3)
    # The envelope follows the concave function's chord, then the convex part.
    assert float(backwards["convexity_defect"]) >= 4


def test_convexity_defect_is_the_height_over_the_convex_hull():
    def bumpy(w):
        return w**2 + 0.3 * torch.sin(9 * w)

    found = barrier(Number(-1.0), along(bumpy), Number(2.0), points=41)
    t, loss = found["t"].values, found["loss"].values
    hull = ConvexHull(np.stack([t, loss], 1))
    below = [e for e in hull.equations if e[1] < 0]
    envelope = np.max([-(e[0] * t + e[2]) / e[1] for e in below], 0)
    assert float(found["convexity_defect"]) == pytest.approx((loss - envelope).max(), rel=1e-9)
    assert float(found["convexity_defect"]) > float(found["barrier"]) >= 0
    convex = barrier(Number(-1.0), along(lambda w: w**2), Number(2.0))
    assert float(convex["convexity_defect"]) == pytest.approx(0, abs=1e-12)


def test_loss_and_error_along_the_line_are_those_of_the_networks_there():
    one, other, probe = mlp(1), mlp(2), classes()
    found = barrier(one, probe, other, points=5)
    excesses = []
    for t in found["t"].values:
        there = copy.deepcopy(one)
        with torch.no_grad():
            for p, a, b in zip(
                there.parameters(), one.parameters(), other.parameters(), strict=True
            ):
                p.copy_((1 - t) * a + t * b)
        outputs = there(probe.inputs).detach()
        each = nn.functional.cross_entropy(outputs, probe.targets, reduction="none")
        wrong = (outputs.argmax(1) != probe.targets).double()
        here = found.sel(t=t)
        assert float(here["loss"]) == pytest.approx(float(each.mean()), rel=1e-12)
        assert float(here["error_rate"]) == pytest.approx(float(wrong.mean()), rel=1e-12)
        excesses.append((each, wrong))
    for place, (name, at) in enumerate(
        [("barrier", "barrier_at"), ("error_barrier", "error_barrier_at")]
    ):
        rows = torch.stack([e[place] for e in excesses])
        t = torch.linspace(0, 1, 5).double()[:, None]
        rows = rows - (1 - t) * rows[0] - t * rows[-1]
        best = int(rows.mean(1).argmax())
        assert float(found[at]) == best / 4
        assert float(found[name]) == pytest.approx(float(rows.mean(1)[best]), abs=1e-12)
        error = float(rows[best].std() / 30**0.5)
        assert float(found[f"{name}_standard_error"]) == pytest.approx(error, abs=1e-12)


def test_standard_errors_are_calibrated():
    """Over probes of 20 samples each of one population, in the middle of the line."""
    one, other = mlp(1), mlp(2)
    torch.manual_seed(0)
    x, y = torch.randn(3000, 4).double(), torch.randint(3, (3000,))
    found = [barrier(one, nt.Probe(x[k::150], y[k::150]), other, points=3) for k in range(150)]
    values = np.array([float(f["excess"][1]) for f in found])
    errors = np.array([float(f["excess_standard_error"][1]) for f in found])
    assert (errors**2).mean() ** 0.5 == pytest.approx(values.std(ddof=1), rel=0.2)


def test_running_statistics_are_interpolated():
    one, other, probe = normed(1), normed(2), images()
    found = barrier(one, probe, other, points=3)
    middle = copy.deepcopy(one)
    middle.load_state_dict(
        {
            n: (t + other.state_dict()[n]) / 2 if t.is_floating_point() else t
            for n, t in one.state_dict().items()
        }
    )
    for network, loss in zip((one, middle, other), found["loss"], strict=True):
        truth = nn.functional.cross_entropy(network(probe.inputs), probe.targets)
        assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-10)
    assert "running statistics of batch normalisation among them" in found.attrs["convention"]


def test_running_statistics_are_estimated_on_the_probe():
    one, other, probe = normed(1), normed(2), images()
    found = barrier(one, probe, other, points=3, batch_norm="estimated")
    middle = copy.deepcopy(one)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), other.parameters(), strict=True):
            p.lerp_(q, 0.5)
    for network, loss in zip((one, middle, other), found["loss"], strict=True):
        network = copy.deepcopy(network).train()
        truth = nn.functional.cross_entropy(network(probe.inputs), probe.targets)
        assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-10)
    assert one[1].running_mean is not None
    assert "probe's own statistics" in found.attrs["convention"]


def test_other_weights_come_from_networks_states_and_checkpoints(tmp_path):
    one, other, probe = mlp(1), mlp(2), classes()
    torch.save({"state_dict": {f"net.{n}": t for n, t in other.state_dict().items()}},
               tmp_path / "x.ckpt")  # fmt: skip
    found = [
        barrier(one, probe, given, points=5)
        for given in (other, other.state_dict(), tmp_path / "x.ckpt", nn.DataParallel(other))
    ]
    for each in found[1:]:
        np.testing.assert_array_equal(each["loss"], found[0]["loss"])


def test_frozen_parameters_are_interpolated():
    one, other, probe = mlp(1), mlp(2), classes()
    free = barrier(one, probe, other, points=3)
    one.requires_grad_(False)
    np.testing.assert_array_equal(barrier(one, probe, other, points=3)["loss"], free["loss"])


@pytest.mark.parametrize("name", ["cnn", "gpt", "vit", "shared", "low-rank", "complex"])
def test_networks_are_left_as_they_were(name):
    member, other = build(name), build(name, seed=1)
    probe = nt.Probe(
        member.batch, forward=member.forward, losses=lambda outputs, _: losses(outputs)
    )
    member.model.train()
    before = [
        {n: t.clone() for n, t in m.state_dict().items()} for m in (member.model, other.model)
    ]
    random = torch.get_rng_state()
    found = barrier(member.model, probe, other.model, points=3)
    assert np.isfinite(found["loss"]).all()
    truth = losses(member.forward(other.model.eval(), member.batch)).mean()
    assert float(found["loss"][-1]) == pytest.approx(float(truth.detach()), rel=1e-9)
    for m, state in zip((member.model, other.model), before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(m.training for m in member.model.modules())


def test_half_precision_weights_are_widened():
    one, other, probe = mlp(1), mlp(2), classes()
    half = nt.Probe(probe.inputs.half(), probe.targets)
    found = barrier(one.half(), half, other.half(), points=5)
    wide = nt.Probe(half.inputs.double(), probe.targets)
    truth = barrier(one.double(), wide, other.double(), points=5)
    np.testing.assert_allclose(found["loss"], truth["loss"], rtol=1e-5)


def test_numbers_that_are_not_finite_on_the_way_are_left_in_the_result(logged):
    found = barrier(Number(-1.0), along(lambda w: (w**2 - 0.5).sqrt()), Number(1.0), points=9)
    assert np.isnan(found["loss"][3:6]).all()
    assert float(found["barrier"]) == 0
    assert found.attrs["doubts"] == "the loss is not finite at 5 of 9 points"
    assert len(logged) == 1
    logged.clear()


def test_an_infinite_loss_on_the_way_is_an_infinite_barrier(logged):
    found = barrier(Number(-1.0), along(lambda w: 1 / w**2), Number(1.0), points=3)
    assert float(found["barrier"]) == np.inf
    assert np.isnan(found["barrier_standard_error"])
    logged.clear()


def test_what_there_was_no_time_for_is_nan(logged):
    one, other, probe = mlp(1), mlp(2), classes()
    with nt.freeze.frozen(one):
        taken = Barrier(one, probe, other, points=201)
        empty = taken.result()
        found = run(taken, seconds=1e-9)
    assert np.isnan(empty["barrier"])
    assert np.isnan(empty["convexity_defect"])
    done = np.isfinite(found["loss"].values)
    assert done[[0, 100, 200]].all()
    assert not done.all()
    assert float(found["barrier"]) == pytest.approx(float(np.nanmax(found["excess"])))
    assert "of 201 points were evaluated" in found.doubts
    logged.clear()


def test_what_is_infinite_at_one_end_is_so_at_that_end_alone():
    one, other, probe = mlp(1), mlp(2), classes()
    for model in (one, other):
        model.register_buffer("unused", torch.zeros(2))
    one.unused.fill_(torch.inf)
    found = barrier(one, probe, other, points=3)
    assert np.isfinite(found["loss"]).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 2}, "at least 3"),
        ({"batch_norm": "reset"}, "'interpolated' or 'estimated'"),
        ({"seconds": -1}, "seconds="),
    ],
)
def test_bad_arguments_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        barrier(mlp(1), classes(), mlp(2), **options)


def test_bad_ends_are_named():
    one, probe = mlp(1), classes()
    with pytest.raises(ValueError, match=r"0.weight of shape \(9, 4\) where the network has"):
        barrier(one, probe, nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)))
    with pytest.raises(ValueError, match=r"lacks 2.weight"):
        barrier(one, probe, nn.Sequential(nn.Linear(4, 8)))
    with pytest.raises(ValueError, match=r"the other network is nan"):
        barrier(one, probe, {n: t * torch.nan for n, t in one.state_dict().items()})
    with pytest.raises(TypeError, match="got int"):
        barrier(one, probe, 3)
