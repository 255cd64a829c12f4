"""Running moments of weights, against NumPy over all snapshots."""

import numpy as np
import pytest
import torch
from kernel_truth import TYPES, assert_near
from torch import nn

from nettrace.kernels import WELFORD_SUMS, moments, weight_welford_

#: A program in the interpreter takes 3 blocks of 64: some fill them, some do not, some are empty.
SHAPES = [(64, 3), (7,), (193, 2), (), (0, 4), (5, 3, 4), (192,)]
F32, F16, BF16 = TYPES


def snapshots(shapes, dtypes, count, device):
    """Weights that wander, at each of some times."""
    random = np.random.default_rng(0)
    for shape, dtype in zip(shapes, dtypes, strict=True):
        yield torch.tensor(random.standard_normal((count, *shape)).cumsum(0)).to(device, dtype)


def zeros(rows, dtype=torch.float32, count=1):
    return [[torch.zeros_like(r[0], dtype=dtype) for r in rows] for _ in range(count)]


def true_sums(row):
    """Sums over entries after the last of the snapshots (n, ...), and sums of their sizes."""
    x = row.double().cpu().numpy()
    w, mean, variance, update = x[-1], x.mean(0), x.var(0), x[-1] - x[-2]
    columns = [(w - mean) ** 2, update**2, w**2, variance, variance**2, w * update]
    return np.array([[c.sum() for c in columns], [np.abs(c).sum() for c in columns]])


@pytest.mark.parametrize("kinds", [(F32,), (F16,), (BF16,), (F32, BF16, F16)])
def test_moments_of_many_snapshots(kinds, where):
    dtypes = [kinds[i % len(kinds)] for i in range(len(SHAPES))]
    rows = list(snapshots(SHAPES, dtypes, 7, where))
    means, squares = zeros(rows, count=2)
    previous = [row[0].clone() for row in rows]
    for n in range(7):
        found = weight_welford_([row[n] for row in rows], means, squares, n + 1, previous)
        for row, p in zip(rows, previous, strict=True):
            assert torch.equal(row[n], p)
    assert found.dtype == torch.float64
    assert found.shape == (len(SHAPES), len(WELFORD_SUMS))
    for i, row in enumerate(rows):
        x = row.double()
        assert_near(means[i], x.mean(0), where)
        assert_near(squares[i], (x - x.mean(0)).square().sum(0), where)
        truth, size = true_sums(row)
        assert (np.abs(found[i].cpu().numpy() - truth) <= 1e-6 * size).all()


def test_moments_in_float64_are_exact():
    rows = list(snapshots(SHAPES, [torch.float64] * len(SHAPES), 30, "cpu"))
    means, squares = zeros(rows, torch.float64, 2)
    previous = [row[0].clone() for row in rows]
    for n in range(30):
        found = weight_welford_([row[n] for row in rows], means, squares, n + 1, previous)
    for i, row in enumerate(rows):
        torch.testing.assert_close(squares[i], (row - row.mean(0)).square().sum(0))
        np.testing.assert_allclose(found[i], true_sums(row)[0], rtol=1e-12)


def test_one_step_of_the_recursion(where):
    """From means of zero and squares of one, without statistics."""
    weights = list(snapshots(SHAPES, [F32] * len(SHAPES), 1, where))
    (means,) = zeros(weights)
    squares = [torch.ones_like(m) for m in means]
    w, m, s = [w[0] for w in weights], means, squares
    assert weight_welford_(w, m, s, 4).shape == (0, len(WELFORD_SUMS))
    for i, one in enumerate(w):
        torch.testing.assert_close(m[i], one / 4, rtol=1e-6, atol=0)
        torch.testing.assert_close(s[i], 1 + one * one * 0.75, rtol=1e-6, atol=0)


def test_statistics_leave_moments_as_they_are(where):
    rows = list(snapshots(SHAPES, [F32] * len(SHAPES), 6, where))
    means, squares, others, more = zeros(rows, count=4)
    previous = [row[0].clone() for row in rows]
    for n in range(6):
        weight_welford_([row[n] for row in rows], means, squares, n + 1)
        weight_welford_([row[n] for row in rows], others, more, n + 1, previous)
    for a, b in zip(means + squares, others + more, strict=True):
        assert torch.equal(a, b)


LAYOUTS = {
    "transposed": lambda x: x.mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x[:, :2, None].to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("state", ["contiguous", "as the weights", "with gaps"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_layout(layout, state, where):
    x = torch.arange(24 * 14.0, device=where).reshape(24, 14, 1).expand(-1, -1, 3).sin()
    x = x if layout == "channels last" else x[..., 0].contiguous()
    weights = [LAYOUTS[layout](x), x + 1]
    if layout == "channels last":
        assert weights[0].shape == (24, 2, 1, 3)
    memory = torch.contiguous_format if state == "contiguous" else torch.preserve_format
    first = torch.zeros_like(weights[0], memory_format=memory)
    if state == "with gaps":
        first = first.repeat_interleave(2, -1)[..., ::2]
    means = [first, torch.zeros_like(weights[1])]
    squares = [m.clone(memory_format=memory) for m in means]
    previous = [m.clone() for m in means]
    before = [w.clone() for w in weights]
    for n in (1, 2):
        found = weight_welford_([w * n for w in weights], means, squares, n, previous)
        weights_now = [w.clone() for w in weights]
    for i, w in enumerate(weights):
        assert torch.equal(weights_now[i], before[i])
        torch.testing.assert_close(means[i], 1.5 * w, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(squares[i], 0.5 * w * w, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(previous[i], 2 * w, rtol=0, atol=0)
        size = float(w.double().square().sum())
        quartic = float(w.double().pow(4).sum())
        expected = [0.25 * size, size, 4 * size, 0.25 * size, quartic / 16, 2 * size]
        np.testing.assert_allclose(found[i].cpu(), expected, rtol=1e-6)


def test_parts_of_a_larger_tensor(where):
    """Weights that lie apart from multiples of 16 bytes are read where they are."""
    flat = torch.arange(1.0, 301, device=where)
    weights = [flat[:7], flat[7:100].view(3, 31), flat[100:]]
    means, squares = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    weight_welford_(weights, means, squares, 1)
    for w, m in zip(weights, means, strict=True):
        assert torch.equal(w, m)


def test_small_variances_have_a_participation_ratio(where):
    """Their squares are far below the smallest number of float32."""
    weights = [torch.full((130,), 2e-13, device=where)]
    means, squares, previous = zeros([w[None] for w in weights], count=3)
    weight_welford_(weights, means, squares, 1)
    found = weight_welford_([-weights[0]], means, squares, 2, previous)[0]
    assert float(found[3] ** 2 / found[4]) == pytest.approx(130, rel=1e-5)


def test_it_is_the_same_each_time(where):
    rows = list(snapshots([(3, 64), (501,)], [F32, F32], 2, where))
    results = []
    for _ in range(2):
        means, squares = zeros(rows, count=2)
        previous = [row[0].clone() for row in rows]
        weight_welford_([row[0] for row in rows], means, squares, 1)
        found = weight_welford_([row[1] for row in rows], means, squares, 2, previous)
        results.append([*means, *squares, *previous, found])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing(where):
    assert weight_welford_([], [], [], 3).shape == (0, 6)
    empty = torch.empty(0, 3, device=where)
    found = weight_welford_([empty], [empty.clone()], [empty.clone()], 3, [empty.clone()])
    assert found.tolist() == [[0.0] * 6]


def test_parameters_that_train(where):
    """Nothing of them is changed, and what is found is no part of their graph."""
    model = nn.Linear(3, 2).to(where)
    before = [p.detach().clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    means, squares, previous = zeros([p[None] for p in before], count=3)
    found = weight_welford_(list(model.parameters()), means, squares, 1, previous)
    assert not found.requires_grad
    assert versions == [p._version for p in model.parameters()]
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.requires_grad
        assert p.grad is None


def test_it_is_an_operation_of_torch(where):
    def made():
        weights = [torch.arange(6.0, device=where).view(2, 3), torch.ones(70, device=where)]
        return weights, *([torch.zeros_like(w) for w in weights] for _ in range(3))

    weights, means, squares, previous = made()
    torch.library.opcheck(moments._weight_welford_, (weights, means, squares, 2, []))
    torch.library.opcheck(moments._weight_welford_, (weights, means, squares, 2, previous))

    def step(weights, means, squares, previous):
        found = weight_welford_([2 * w for w in weights], means, squares, 2, previous)
        return found[:, 2], means[1] + 1

    weights, means, squares, previous = made()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found, after = compiled(weights, means, squares, previous)
    assert found.tolist() == [4 * 55.0, 4 * 70.0]
    assert torch.equal(after, means[1] + 1)
    assert torch.equal(means[0], weights[0])
    assert torch.equal(previous[1], 2 * weights[1])


@pytest.mark.gpu
def test_more_entries_than_an_integer_of_32_bits_counts():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("there is no GPU with as much memory")
    weight = torch.ones(2**31 + 77, device="cuda", dtype=BF16)
    weight[-1] = 3
    mean, square = (torch.zeros_like(weight, dtype=F32) for _ in range(2))
    previous = torch.zeros_like(weight)
    found = weight_welford_([weight], [mean], [square], 1, [previous])
    assert float(found[0, 2]) == 2**31 + 76 + 9
    assert float(mean[-1]) == float(previous[-1]) == 3
    assert float(mean[:-1].min()) == float(mean[:-1].max()) == 1


def one(**changed):
    x = torch.zeros(2, 3)
    given = {"weights": [x], "means": [x.clone()], "squares": [x.clone()], "count": 1}
    return {**given, **changed}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"count": 0}, "at least 1"),
        ({"means": []}, "expected 1 means"),
        ({"squares": [torch.zeros(3, 2)]}, "shape"),
        ({"previous": [torch.zeros(2, 3).half()]}, "of the same, got"),
        ({"previous": [torch.zeros(2, 3)] * 2}, "expected 1 previous"),
        ({"means": [torch.zeros(2, 3).half()]}, "or a wider"),
        ({"weights": [torch.zeros(2, 3, dtype=torch.complex64)]}, "view_as_real"),
        ({"weights": [torch.zeros(2, 3, dtype=torch.int32)]}, "real floating"),
        ({"means": [torch.zeros(2, 3, device="meta")]}, "on cpu"),
        ({"weights": []}, "expected 0 means"),
    ],
)
def test_what_does_not_fit(changed, told):
    with pytest.raises(ValueError, match=told):
        weight_welford_(**one(**changed))
