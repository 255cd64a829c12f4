"""Moments of per-sample gradients of a linear layer, written out and by autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_truth import TYPES, assert_near, cases, drawn

import nettrace.kernels.psg as psg
from nettrace.kernels import psg_moments

#: N, T, I, O.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 290, 17),
    (5, 1, 17, 9),
    (1, 7, 5, 70),
    (3, 33, 40, 50),
    (2, 16, 16, 32),
]
CASES = cases(SHAPES)


def written_out(a, g):
    return torch.einsum("nti,nto->nio", a.double(), g.double())


def check(found, p, where, weight=None, factor=1):
    """Holds all moments against gradients that are written out."""
    total = p.sum(0) if weight is None else torch.einsum("n,nio->io", weight.double(), p)
    true = p.square().sum((1, 2)), total, p.square().sum(0)
    for one, other in zip(found, true, strict=True):
        assert_near(one, other, where, factor)


def inputs(shape, dtype=torch.float32, layout="contiguous", device="cpu"):
    n, t, i, o = shape
    a = drawn(n, t, i, dtype=dtype, layout=layout, device=device)
    return a, drawn(n, t, o, dtype=dtype, layout=layout, device=device, seed=1)


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_against_gradients_that_are_written_out(shape, dtype, layout, where):
    a, g = inputs(shape, dtype, layout, where)
    weight = drawn(shape[0], device=where, seed=2)
    found = psg_moments(a, g, weight, sq=True, precision="ieee")
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found)
    check(found, written_out(a, g), where, weight)
    again = psg_moments(a, g, weight, sq=True, precision="ieee")
    assert all(map(torch.equal, again, found))


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("shape", [(3, 18, 20, 35), (7, 1, 20, 35)])
def test_precisions(shape, precision, where):
    a, g = inputs(shape, device=where)
    found = psg_moments(a, g, sq=True, precision=precision)
    factor = 1 if where == "cpu" else {"tf32": 200, "tf32x3": 2, "ieee": 1}[precision]
    check(found, written_out(a, g), where, factor=factor)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_several_samples_one_after_the_other(parts, where, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("nettrace.kernels.jit.psg.split", lambda programs, most: parts)
    a, g = inputs((5, 37, 20, 33), device=where)
    weight = drawn(5, device=where, seed=2)
    found = psg_moments(a, g, weight, sq=True, precision="ieee")
    check(found, written_out(a, g), where, weight)


@pytest.mark.parametrize(("dw", "sq"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tokens", [1, 18])
def test_what_is_not_asked_for_is_empty(tokens, dw, sq, where):
    a, g = inputs((3, tokens, 20, 33), device=where)
    sqnorm, total, squares = psg_moments(a, g, dw=dw, sq=sq)
    p = written_out(a, g)
    assert_near(sqnorm, p.square().sum((1, 2)), where, 2)
    for asked, found, true in ((dw, total, p.sum(0)), (sq, squares, p.square().sum(0))):
        if asked:
            assert_near(found, true, where, 2)
        else:
            assert found.shape == (0, 0)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_types_that_differ(dtype, where):
    a, g = inputs((3, 5, 20, 33), device=where)
    for x, y in ((a.to(dtype), g), (a, g.to(dtype))):
        found = psg_moments(x, y, sq=True, precision="ieee")
        check(found, written_out(x, y), where)
    found = psg_moments(a.half(), g.bfloat16(), sq=True, precision="ieee")
    check(found, written_out(a.half(), g.bfloat16()), where)


def test_weights_are_of_any_type(where):
    a, g = inputs((3, 5, 20, 33), torch.float16, device=where)
    true = psg_moments(a, g, torch.tensor([0.5, 0, -2.0], device=where))[1]
    for dtype in (torch.float16, torch.float32, torch.float64):
        weight = torch.tensor([0.5, 9, 0, 9, -2.0, 9], dtype=dtype, device=where)[::2]
        assert torch.equal(psg_moments(a, g, weight)[1], true)


def test_autograd():
    layer = torch.nn.Linear(6, 4).double()
    x, y = drawn(5, 3, 6).double(), drawn(5, 3, 4, seed=1).double()
    out = layer(x)
    (g,) = torch.autograd.grad(F.mse_loss(out, y, reduction="sum"), out)
    sqnorm, total, squares = psg_moments(x, g, sq=True)
    assert sqnorm.dtype == total.dtype == squares.dtype == torch.float64
    grads = []
    for n in range(5):
        layer.zero_grad()
        F.mse_loss(layer(x[n]), y[n], reduction="sum").backward()
        grads.append(layer.weight.grad.mT.clone())
    layer.zero_grad()
    F.mse_loss(layer(x), y, reduction="sum").backward()
    torch.testing.assert_close(total, layer.weight.grad.mT)
    torch.testing.assert_close(sqnorm, torch.stack([grad.square().sum() for grad in grads]))
    torch.testing.assert_close(squares, sum(grad.square() for grad in grads))


@pytest.mark.parametrize("shape", [(7, 5, 6, 4), (7, 1, 6, 4)])
@pytest.mark.parametrize("held", [1, 9, 50])
def test_little_memory(held, shape, monkeypatch):
    a, g = (x.double() for x in inputs(shape))
    weight = drawn(7, seed=2).double()
    true = psg_moments(a, g, weight, sq=True)
    monkeypatch.setattr(psg, "HELD", held)
    for one, other in zip(psg_moments(a, g, weight, sq=True), true, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)])
def test_nothing(shape, where):
    a, g = inputs(shape, device=where)
    sqnorm, total, squares = psg_moments(a, g, a.new_ones(shape[0]), sq=True)
    assert torch.equal(sqnorm, a.new_zeros(shape[0]))
    assert torch.equal(total, a.new_zeros(shape[2:]))
    assert torch.equal(squares, total)


def test_it_is_an_operation_of_torch(where):
    a, g = inputs((3, 4, 8, 6), device=where)
    weight = drawn(3, device=where, seed=2)
    torch.library.opcheck(psg_moments, (a.half(), g, weight, False, True, "ieee"))
    torch.library.opcheck(psg_moments, (a, g))
    compiled = torch.compile(
        lambda a, g: psg_moments(2 * a, g, precision="ieee")[1],
        backend="aot_eager",
        fullgraph=True,
    )
    assert_near(compiled(a, g), 2 * written_out(a, g).sum(0), where)


@pytest.mark.gpu
def test_more_than_31_bits_of_numbers():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    a = torch.zeros(2, 2**15 + 1, 2**15, dtype=torch.bfloat16, device="cuda")
    a[1, -1] = 1
    g = torch.ones(2, 2**15 + 1, 16, dtype=torch.bfloat16, device="cuda")
    sqnorm, total, _ = psg_moments(a, g)
    assert sqnorm.tolist() == [0, 2**19]
    assert bool((total == 1).all())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (3, 4)), "expected a"),
        (((3, 4, 5), (3, 5, 5)), "expected a"),
        (((3, 4, 5), (3, 4, 6), (4,)), "weight for each of 3"),
        (((3, 4, 5), (3, 4, 6), (3, 1)), "weight for each of 3"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        psg_moments(*(torch.ones(shape) for shape in shapes))


def test_numbers_that_do_not_fit():
    a = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="expected g of a real floating type"):
        psg_moments(a, a.cfloat())
    with pytest.raises(ValueError, match="expected weight of a real"):
        psg_moments(a, a, torch.ones(1, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a precision of tf32, tf32x3, ieee, got 'tf64'"):
        psg_moments(a, a, precision="tf64")
