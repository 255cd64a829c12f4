import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.func import functional_call
from zoo import build, losses

import nettrace as nt
from nettrace.landscape import slice_1d, slice_2d
from nettrace.landscape.points import coarse_to_fine
from nettrace.landscape.run import run
from nettrace.landscape.slices import Slice


class Bowl(nn.Module):
    """w^T A w / 2 + b^T w + noise of the sample, as the outputs."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, 1 + len(curvatures), dtype=torch.float64))
        turn, _ = torch.linalg.qr(torch.randn(len(curvatures), len(curvatures)).double())
        self.register_buffer("A", turn @ torch.diag(curvatures.double()) @ turn.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ self.A @ self.w / 2 + x[:, 0]


def values(outputs, _):
    return outputs


def bowl(*curvatures: float) -> tuple[Bowl, nt.Probe]:
    return Bowl(torch.tensor(curvatures)), nt.Probe(torch.randn(9, 1).double(), losses=values)


def classifier() -> tuple[nn.Module, nt.Probe]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return model, nt.Probe(torch.randn(20, 4).double(), torch.randint(3, (20,)))


def at(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in model.parameters()])
    return {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}


def point(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_slice_of_a_quadratic_loss_is_a_parabola():
    model, probe = bowl(3.0, 1.0, -0.5)
    d = torch.tensor([1.0, -2.0, 0.5]).double()
    found = slice_1d(model, probe, direction=d, extent=(-1, 2), points=13)
    x, w = torch.linspace(-1, 2, 13).double()[:, None], point(model)
    expected = ((w + x * d) @ model.A * (w + x * d)).sum(1) / 2 + probe.inputs.mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(found["x"], x[:, 0])
    # Samples differ by a constant, whatever the weights.
    error = float(probe.inputs.std() / 3)
    np.testing.assert_allclose(found["loss_standard_error"], error, rtol=1e-12)
    assert found.attrs["stopped"] == "done"
    assert found.attrs["doubts"] == ""
    assert "error_rate" not in found


def test_plane_of_a_quadratic_loss_is_a_paraboloid():
    model, probe = bowl(3.0, 1.0, -0.5, 2.0)
    pair = (torch.eye(4).double()[0], torch.eye(4).double()[2])
    found = slice_2d(model, probe, directions=pair, extent=(1.0, (0.0, 3.0)), points=(5, 4))
    assert found["loss"].dims == ("x", "y")
    for x in found["x"].values:
        for y in found["y"].values:
            w = point(model) + x * pair[0] + y * pair[1]
            expected = float(w @ model.A @ w / 2 + probe.inputs.mean())
            assert float(found["loss"].sel(x=x, y=y)) == pytest.approx(expected, rel=1e-12)


def test_second_derivative_along_an_eigenvector_is_the_eigenvalue():
    model, probe = classifier()
    found = slice_2d(model, probe, directions="hessian", extent=1e-3, points=3)

    def loss(vector: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            functional_call(model, at(model, vector), probe.inputs), probe.targets
        )

    hessian = torch.autograd.functional.hessian(loss, point(model))
    truth = torch.linalg.eigvalsh(hessian).flip(0)[:2]
    np.testing.assert_allclose(found["eigenvalue"], truth, rtol=1e-6)
    middle = float(found["loss"][1, 1])
    along_x = float(found["loss"][0, 1] + found["loss"][2, 1]) - 2 * middle
    along_y = float(found["loss"][1, 0] + found["loss"][1, 2]) - 2 * middle
    np.testing.assert_allclose([along_x / 1e-6, along_y / 1e-6], truth, rtol=1e-4)
    np.testing.assert_allclose(found["direction_norm"], 1, rtol=1e-6)


def test_first_derivative_along_the_gradient_is_its_length():
    model, probe = classifier()
    found = slice_1d(model, probe, direction="gradient", extent=1e-5, points=3)
    loss = nn.functional.cross_entropy(model(probe.inputs), probe.targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    slope = float(found["loss"][2] - found["loss"][0]) / 2e-5
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_filters_of_a_random_direction_have_the_norms_of_the_weights():
    member = build("cnn")
    probe = nt.Probe(member.batch, losses=lambda outputs, _: losses(outputs))
    with nt.freeze.frozen(member.model):
        taken = Slice(member.model, probe, ["random"], [None], [3], seed=4)
    parts = taken.loss.split(taken._along.vectors[0])
    for name, p in member.model.named_parameters():
        if p.dim() == 1:  # biases, norms and a raw scale
            assert not parts[name].any()
            continue
        for filter_, own in zip(parts[name], p.detach(), strict=True):
            assert float(filter_.norm()) == pytest.approx(float(own.norm()), rel=1e-12)
    assert "seed 4" in taken.result().attrs["convention"]
    assert "norms of the weights' filters" in taken.result().attrs["convention"]


def test_a_slice_does_not_see_the_scale_of_a_rectified_layer():
    """What filter normalisation is for (Li et al. 2018, section 4)."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    probe = nt.Probe(torch.randn(20, 4).double(), torch.randint(3, (20,)))
    model = model.double()
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight *= 10
        rescaled[2].weight /= 10
    one, other = (slice_1d(m, probe, points=5) for m in (model, rescaled))
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-10)
    raw = [slice_1d(m, probe, points=5, normalise="none") for m in (model, rescaled)]
    assert abs(float(raw[0]["loss"][0] - raw[1]["loss"][0])) > 0.1


def test_norms_with_several_axes_have_no_filters():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm([2, 6]), nn.Flatten(), nn.Linear(12, 2))
    probe = nt.Probe(torch.randn(5, 2, 4), torch.randint(2, (5,)))
    with nt.freeze.frozen(model):
        taken = Slice(model, probe, ["random"], [None], [3])
    parts = taken.loss.split(taken._along.vectors[0])
    assert not parts["1.weight"].any()
    assert parts["0.weight"].any()


def test_random_directions_differ_and_come_again():
    model, probe = classifier()
    found = [slice_2d(model, probe, points=3, seed=seed) for seed in (0, 0, 1)]
    xr.testing.assert_equal(found[0].drop_attrs(), found[1].drop_attrs())
    assert not np.allclose(found[0]["loss"], found[2]["loss"])
    assert not np.allclose(found[0]["loss"], found[0]["loss"].T)


def test_error_rate_and_errors_are_those_of_the_samples():
    model, probe = classifier()
    d = torch.randn_like(point(model))
    found = slice_1d(model, probe, direction=d, points=5)
    for x in found["x"].values:
        outputs = functional_call(model, at(model, point(model) + x * d), probe.inputs)
        each = nn.functional.cross_entropy(outputs, probe.targets, reduction="none").detach()
        wrong = (outputs.argmax(1) != probe.targets).double()
        here = found.sel(x=x)
        for name, samples in [("loss", each), ("error_rate", wrong)]:
            assert float(here[name]) == pytest.approx(float(samples.mean()), rel=1e-12)
            error = float(samples.std() / 20**0.5)
            assert float(here[f"{name}_standard_error"]) == pytest.approx(error, rel=1e-10)


def test_standard_errors_are_calibrated():
    """Over probes of 12 samples each of one population, at weights beside the network's own."""
    model, _ = classifier()
    d = torch.randn_like(point(model))
    x, y = torch.randn(1800, 4).double(), torch.randint(3, (1800,))
    found = [
        slice_1d(model, nt.Probe(x[k::150], y[k::150]), direction=d, points=2) for k in range(150)
    ]
    for name in ("loss", "error_rate"):
        means = np.stack([one[name] for one in found])
        errors = np.stack([one[f"{name}_standard_error"] for one in found])
        np.testing.assert_allclose((errors**2).mean(0) ** 0.5, means.std(0, ddof=1), rtol=0.2)


def trained(model: nn.Module, probe: nt.Probe, steps: int) -> list[dict[str, Tensor]]:
    states, optimizer = [], torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(steps):
        states.append({n: t.clone() for n, t in model.state_dict().items()})
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(probe.inputs), probe.targets).backward()
        optimizer.step()
    return [*states, model.state_dict()]


def test_principal_directions_of_a_trajectory_are_those_of_scikit_learn():
    model, probe = classifier()
    states = trained(model, probe, 12)
    found = slice_2d(model, probe, directions="trajectory", trajectory=states, points=5)
    matrix = np.stack(
        [torch.cat([s[n].flatten() for n, _ in model.named_parameters()]).numpy() for s in states]
    )
    pca = PCA(2).fit(matrix)
    np.testing.assert_allclose(found["explained_variance"], pca.explained_variance_ratio_)
    away = (matrix - matrix[-1]) @ pca.components_.T
    signs = np.sign(away[0] * found["trajectory"].values[0])
    np.testing.assert_allclose(found["trajectory"], away * signs, atol=1e-9)
    rest = np.linalg.norm(matrix - matrix[-1] - away @ pca.components_, axis=1)
    np.testing.assert_allclose(found["trajectory_distance"], rest, atol=1e-9)
    # The slice takes in all of it.
    for axis, name in enumerate(("x", "y")):
        place = found["trajectory"][:, axis]
        assert found[name][0] < place.min()
        assert place.max() < found[name][-1]
        assert found[name][0] < 0 < found[name][-1]


def test_trajectories_are_of_networks_checkpoints_and_states(tmp_path):
    model, probe = classifier()
    states = trained(model, probe, 2)
    other = copy.deepcopy(model)
    other.load_state_dict(states[0])
    torch.save({"state_dict": states[1]}, tmp_path / "one.ckpt")
    given = [other, tmp_path / "one.ckpt", states[2]]
    one, other = (
        slice_1d(model, probe, direction="trajectory", trajectory=t, points=3)
        for t in (given, states)
    )
    np.testing.assert_array_equal(one["loss"], other["loss"])
    assert one.sizes["snapshot"] == 3


def test_directions_may_be_named_by_parameter():
    model, probe = classifier()
    part = torch.randn(6, 4).double()
    whole = torch.zeros_like(point(model))
    whole[:24] = part.flatten()
    one = slice_1d(model, probe, direction={"0.weight": part}, points=5)
    other = slice_1d(model, probe, direction=whole, points=5)
    np.testing.assert_array_equal(one["loss"], other["loss"])


def test_only_some_parameters_may_vary():
    model, probe = classifier()
    found = slice_1d(model, probe, direction="hessian", parameters="3.*", points=3)
    head = torch.cat([p.detach().flatten() for p in model[3].parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = {"weight": vector[:18].view(3, 6), "bias": vector[18:]}
        outputs = functional_call(model[3], parts, model[:3](probe.inputs))
        return nn.functional.cross_entropy(outputs, probe.targets)

    hessian = torch.autograd.functional.hessian(loss, head)
    assert float(found["eigenvalue"][0]) == pytest.approx(
        float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6
    )
    assert found.attrs["weights"] == 21


def test_numbers_that_are_not_finite_are_left_in_the_result(logged):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    probe = nt.Probe(torch.ones(3, 1), losses=lambda outputs, _: outputs[:, 0].log())
    found = slice_1d(model, probe, direction=torch.ones(1), extent=(-2.0, 2.0), points=5)
    np.testing.assert_allclose(found["loss"], [np.nan, -np.inf, 0, np.log(2), np.log(3)])
    assert found.attrs["doubts"] == "the loss is not finite at 2 of 5 points"
    assert logged.pop().endswith("not finite at 2 of 5 points")


def test_points_are_evaluated_coarse_to_fine():
    order = coarse_to_fine([9])
    assert order[0] == 4
    assert set(order[:3]) == {0, 4, 8}
    assert set(order[:5]) == {0, 2, 4, 6, 8}
    plane = [divmod(int(i), 5) for i in coarse_to_fine([5, 5])]
    assert plane[0] == (2, 2)
    assert set(plane[:9]) == {(i, j) for i in (0, 2, 4) for j in (0, 2, 4)}
    assert sorted(coarse_to_fine([4, 7])) == list(range(28))


def test_what_there_was_no_time_for_is_nan(logged):
    model, probe = bowl(1.0, 2.0)
    with nt.freeze.frozen(model):
        taken = Slice(model, probe, ["gradient"], [None], [200])
        assert np.isnan(taken.result()["loss"]).all()
        found = run(taken, seconds=1e-9)
    assert found.attrs["stopped"] == "out of time"
    there = np.isfinite(found["loss"].values)
    assert 0 < there.sum() < 200
    assert found.attrs["doubts"] == f"{there.sum()} of 200 points were evaluated: give it more time"
    logged.clear()
    assert there[100]


@pytest.mark.parametrize(
    "name", ["cnn", "gpt", "vit", "recurrent", "low-rank", "shared", "pinn", "inner-loop"]
)
def test_networks_are_left_as_they_were(name):
    member = build(name)
    probe = nt.Probe(
        member.batch, forward=member.forward, losses=lambda outputs, _: losses(outputs)
    )
    member.model.train()
    before = {n: t.clone() for n, t in member.model.state_dict().items()}
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = slice_1d(member.model, probe, points=3, extent=0.1)
    assert np.isfinite(found["loss"]).all()
    for n, t in member.model.state_dict().items():
        assert torch.equal(t, before[n]), n
    assert all(m.training for m in member.model.modules())
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])


def test_half_precision_weights_are_widened():
    model, probe = classifier()
    half = copy.deepcopy(model).half()
    d = torch.randn_like(point(model))
    few = nt.Probe(probe.inputs.half(), probe.targets)
    found = slice_1d(half, few, direction=d, points=3, extent=1e-4)
    truth = slice_1d(
        half.double(),
        few.map(lambda t: t.double() if t.is_floating_point() else t),
        direction=d,
        points=3,
        extent=1e-4,
    )
    np.testing.assert_allclose(found["loss"], truth["loss"], rtol=1e-5)


def test_complex_weights_count_as_pairs():
    member = build("complex")
    probe = nt.Probe(
        member.batch, forward=member.forward, losses=lambda outputs, _: losses(outputs)
    )
    size = sum(
        torch.view_as_real(p).numel() if p.is_complex() else p.numel()
        for p in member.model.parameters()
    )
    d = torch.randn(size).double()
    found = slice_1d(member.model, probe, direction=d, points=3)
    moved, place = {}, 0
    for n, p in member.model.named_parameters():
        pairs = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        part = pairs + d[place : place + pairs.numel()].view_as(pairs)
        place += pairs.numel()
        moved[n] = torch.view_as_complex(part.contiguous()) if p.is_complex() else part
    outputs = torch.view_as_real(functional_call(member.model, moved, member.batch))
    assert float(found["loss"][2]) == pytest.approx(float(losses(outputs).mean()), rel=1e-10)
    by_filter = slice_1d(member.model, probe, points=3)
    assert np.isfinite(by_filter["loss"]).all()


def test_the_result_is_written_and_read(tmp_path):
    model, probe = classifier()
    found = slice_2d(model, probe, points=3, to=tmp_path / "slice.nc")
    with xr.open_dataset(tmp_path / "slice.nc") as read:
        np.testing.assert_array_equal(read["loss"], found["loss"])
        assert read.attrs["convention"] == found.attrs["convention"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"direction": "steepest"}, "'random', 'hessian'"),
    ({"direction": torch.ones(3)}, r"shape \(63,\).*got \(3,\)"),
    ({"direction": torch.zeros(63)}, "length 0"),
    ({"direction": torch.full((63,), torch.nan)}, "length nan"),
    ({"direction": {"0.wieght": torch.ones(6, 4)}}, "'0.wieght', which is no parameter"),
    ({"direction": {"0.weight": torch.ones(4, 6)}}, r"shape \(6, 4\), got \(4, 6\)"),
    ({"direction": "trajectory"}, "pass trajectory="),
    ({"direction": "trajectory", "trajectory": []}, "one snapshot or more"),
    ({"normalise": "layer"}, "'filter', 'unit', 'none'"),
    ({"parameters": "*.bias"}, "no parameter that varies has filters"),
    ({"extent": -1.0}, "positive number"),
    ({"extent": (1.0, 1.0)}, "from low to high"),
    ({"points": 1}, "at least 2"),
    ({"seconds": 0}, "seconds="),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_bad_arguments_are_named(wrong, said):
    model, probe = classifier()
    with pytest.raises(ValueError, match=said):
        slice_1d(model, probe, **wrong)


def test_planes_need_two_directions():
    model, probe = classifier()
    d = torch.ones(63).double()
    for pair, said in [
        ((d, -2 * d), "parallel"),
        (("gradient", "gradient"), "one gradient"),
        ((d,), "two directions"),
    ]:
        with pytest.raises(ValueError, match=said):
            slice_2d(model, probe, directions=pair)
    with pytest.raises(TypeError, match="got float"):
        slice_1d(model, probe, direction=1.0)


def test_trajectories_of_another_architecture_are_named():
    model, probe = classifier()
    other = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"0.weight of shape \(7, 4\) where the network has"):
        slice_1d(model, probe, trajectory=[other])


def test_an_unknown_loss_is_named():
    model, probe = classifier()
    with pytest.raises(ValueError, match="what the loss is"):
        slice_1d(model, nt.Probe(probe.inputs))
