"""Moments of per-sample gradients of a convolution, against plain autograd."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from kernel_truth import TYPES, assert_near, drawn

from nettrace.kernels import conv_psg

#: N, C, H, W, O; size, stride, padding, dilation, groups.
CASES = [
    ((2, 17, 6, 5, 19), ((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    ((2, 34, 5, 4, 32), ((3, 2), (2, 1), (1, 2), (1, 2), 2)),
    ((2, 16, 4, 5, 40), ((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    ((1, 16, 3, 3, 16), ((3, 3), (1, 1), (0, 0), (1, 1), 1)),
    ((2, 16, 1, 9, 16), ((1, 3), (1, 3), (0, 1), (1, 1), 1)),
    ((2, 16, 2, 2, 16), ((2, 2), (1, 1), (3, 3), (1, 1), 1)),
    ((3, 3, 8, 7, 4), ((3, 2), (2, 1), (1, 2), (1, 2), 1)),
    ((2, 6, 5, 5, 12), ((3, 3), (1, 1), (1, 1), (1, 1), 6)),
]
FORMATS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "width and height exchanged": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
}


def inputs(shape, geometry, dtype=torch.float32, device="cpu"):
    n, c, h, w, o = shape
    size, stride, padding, dilation, _ = geometry
    steps = zip((h, w), size, stride, padding, dilation, strict=True)
    places = [(m + 2 * p - d * (s - 1) - 1) // t + 1 for m, s, t, p, d in steps]
    x = drawn(n, c, h, w, dtype=dtype, device=device)
    return x, drawn(n, o, *places, dtype=dtype, device=device, seed=1)


def by_autograd(x, gy, geometry):
    """(N, O, C / G, *size) in float64, a sample at a time."""
    size, *rest = geometry
    weight = torch.zeros(gy.shape[1], x.shape[1] // geometry[-1], *size, dtype=torch.float64)
    weight = weight.to(x.device).requires_grad_()
    found = []
    for one, other in zip(x.double(), gy.double(), strict=True):
        out = F.conv2d(one[None], weight, None, *rest)
        found.append(torch.autograd.grad(out, weight, other[None])[0])
    return torch.stack(found)


def check(found, p, where):
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found)
    true = p.square().sum((1, 2, 3, 4)), p.sum(0), p.square().sum(0)
    for one, other in zip(found, true, strict=True):
        assert_near(one, other, where)


@pytest.mark.parametrize(("shape", "geometry"), CASES)
def test_against_autograd(shape, geometry, where):
    x, gy = inputs(shape, geometry, device=where)
    found = conv_psg(x, gy, *geometry, sq=True, precision="ieee")
    check(found, by_autograd(x, gy, geometry), where)
    again = conv_psg(x, gy, *geometry, sq=True, precision="ieee")
    assert all(map(torch.equal, again, found))


@pytest.mark.parametrize(("layout", "dtype"), list(zip(FORMATS, [*TYPES[1:], *TYPES], strict=True)))
@pytest.mark.parametrize("groups", [1, 8])
def test_formats_and_types(groups, layout, dtype, where):
    geometry = ((2, 3), (1, 2), (1, 0), (1, 1), groups)
    x, gy = map(FORMATS[layout], inputs((2, 16, 3, 6, 24), geometry, dtype, where))
    found = conv_psg(x, gy, *geometry, sq=True, precision="ieee")
    check(found, by_autograd(x, gy, geometry), where)


@pytest.mark.parametrize(("dw", "sq"), [(False, False), (True, False), (False, True)])
def test_what_is_not_asked_for_is_empty(dw, sq, where):
    geometry = ((1, 2), (1, 1), (0, 0), (1, 1), 1)
    x, gy = inputs((2, 16, 3, 4, 18), geometry, device=where)
    sqnorm, total, squares = conv_psg(x, gy, *geometry, dw=dw, sq=sq, precision="ieee")
    p = by_autograd(x, gy, geometry)
    assert_near(sqnorm, p.square().sum((1, 2, 3, 4)), where)
    for asked, found, true in ((dw, total, p.sum(0)), (sq, squares, p.square().sum(0))):
        if asked:
            assert_near(found, true, where)
        else:
            assert found.shape == (0, 0, 0, 0)


def test_double_precision_of_a_batch():
    layer = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    x = drawn(5, 4, 9, 8).double()
    out = layer(x)
    (gy,) = torch.autograd.grad(out.square().sum(), out, retain_graph=True)
    out.square().sum().backward()
    sqnorm, total, _ = conv_psg(x, gy, (3, 3), (2, 2), (1, 1), (1, 1), 2)
    torch.testing.assert_close(total, layer.weight.grad)
    p = by_autograd(x, gy, ((3, 3), (2, 2), (1, 1), (1, 1), 2))
    torch.testing.assert_close(sqnorm, p.square().sum((1, 2, 3, 4)))


def test_little_memory(monkeypatch):
    shape, geometry = CASES[-2]
    x, gy = (one.double() for one in inputs(shape, geometry))
    true = conv_psg(x, gy, *geometry, sq=True)
    monkeypatch.setattr(import_module("nettrace.kernels.conv_psg"), "HELD", 1)
    for one, other in zip(conv_psg(x, gy, *geometry, sq=True), true, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0, 16, 4, 4, 16), (2, 16, 4, 4, 0), (2, 0, 4, 4, 16)])
def test_nothing(shape, where):
    geometry = CASES[0][1]
    x, gy = inputs(shape, geometry, device=where)
    sqnorm, total, squares = conv_psg(x, gy, *geometry, sq=True)
    assert torch.equal(sqnorm, x.new_zeros(shape[0]))
    assert torch.equal(total, x.new_zeros(shape[4], shape[1], 3, 3))
    assert torch.equal(squares, total)


def test_it_is_an_operation_of_torch(where):
    geometry = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, gy = inputs((2, 16, 3, 3, 16), geometry, device=where)
    torch.library.opcheck(conv_psg, (x, gy, *geometry))
    torch.library.opcheck(conv_psg, (x.half(), gy, *geometry, False, True, "ieee"))
    compiled = torch.compile(
        lambda x, gy: conv_psg(2 * x, gy, *geometry, precision="ieee")[1],
        backend="aot_eager",
        fullgraph=True,
    )
    assert_near(compiled(x, gy), 2 * by_autograd(x, gy, geometry).sum(0), where)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": (3,)}, "size of two numbers from 1 on"),
        ({"stride": (0, 1)}, "stride of two numbers from 1 on"),
        ({"padding": (-1, 1)}, "padding of two numbers from 0 on"),
        ({"dilation": (2, 2)}, r"gy at \(4, 3\) places"),
        ({"groups": 3}, "groups that divide 4 channels"),
        ({"groups": 0}, "groups that divide 4 channels"),
        ({"x": torch.ones(2, 4, 6)}, r"expected x \(N, C, H, W\)"),
        ({"x": torch.ones(3, 4, 6, 5)}, r"expected x \(N, C, H, W\)"),
        ({"x": torch.ones(2, 4, 6, 5, dtype=torch.long)}, "expected x of a real"),
        ({"precision": "half"}, "expected a precision of"),
    ],
)
def test_what_does_not_fit(changed, message):
    given = {
        "x": torch.ones(2, 4, 6, 5),
        "gy": torch.ones(2, 4, 6, 5),
        "size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
    }
    with pytest.raises(ValueError, match=message):
        conv_psg(**{**given, **changed})
