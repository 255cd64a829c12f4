"""Gradients of scales and shifts, against plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import affine_psg

SHAPES = [(1, 1, 1), (5, 1, 17), (3, 33, 40), (4, 16, 64), (2, 130, 7)]
CASES = cases(SHAPES)


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
@pytest.mark.parametrize("normalises", [False, True])
def test_sums_over_tokens(normalises, shape, dtype, layout, where):
    x = drawn(*shape, dtype=dtype, layout=layout, device=where)
    dy = drawn(*shape, dtype=dtype, layout=layout, device=where, seed=1)
    mean = rstd = None
    wide = x.double()
    if normalises:
        mean, rstd = drawn(*shape[:2], 2, device=where, seed=2).unbind(-1)
        wide = (wide - mean.double()[..., None]) * rstd.double()[..., None]
    scales, shifts = affine_psg(x, dy, mean, rstd)
    assert scales.dtype == shifts.dtype == torch.float32
    assert_near(scales, (wide * dy.double()).sum(1), where)
    assert_near(shifts, dy.double().sum(1), where)
    again = affine_psg(x, dy, mean, rstd)
    assert torch.equal(again[0], scales)


def test_layer_norm_by_autograd():
    x, dy = drawn(3, 5, 8).double(), drawn(3, 5, 8, seed=1).double()
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + 1e-5).rsqrt()
    scales, shifts = affine_psg(x, dy, mean, rstd)
    for n in range(3):
        weight, bias = (
            torch.ones(8).double().requires_grad_(),
            torch.zeros(8).double().requires_grad_(),
        )
        F.layer_norm(x[n], (8,), weight, bias).backward(dy[n])
        torch.testing.assert_close(scales[n], weight.grad)
        torch.testing.assert_close(shifts[n], bias.grad)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing(shape, where):
    x = torch.empty(shape, device=where)
    scales, shifts = affine_psg(x, x)
    assert torch.equal(scales, x.new_zeros(shape[0], shape[2]))
    assert torch.equal(shifts, scales)


def test_it_is_an_operation_of_torch(where):
    x, dy = drawn(3, 4, 8, device=where), drawn(3, 4, 8, device=where, seed=1)
    torch.library.opcheck(affine_psg, (x, dy))
    torch.library.opcheck(affine_psg, (x, dy, x[..., 0], dy[..., 0]))
    compiled = torch.compile(
        lambda a, b: affine_psg(2 * a, b)[0], backend="aot_eager", fullgraph=True
    )
    assert_near(compiled(x, dy), 2 * (x * dy).double().sum(1), where)


@pytest.mark.parametrize(
    "given", [((3, 4), (3, 4)), ((3, 4, 5), (3, 4, 6)), ((3, 4, 5), (3, 4, 5), (3, 5), (3, 4))]
)
def test_shapes_that_do_not_fit(given):
    with pytest.raises(ValueError, match="expected"):
        affine_psg(*(torch.ones(shape) for shape in given))


def test_a_mean_alone():
    with pytest.raises(ValueError, match="both of mean and rstd"):
        affine_psg(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2))
