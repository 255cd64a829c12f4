"""What kernels are held against, and on which tensors."""

import torch

#: By name, how a contiguous tensor (N, T, D) is laid out in memory instead.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "part of a larger": lambda x: torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
}
TYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Relative errors that are allowed in the interpreter and on a GPU; numbers are rounded before.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}


def cases(shapes):
    """Shapes, types and layouts: all shapes, and of the last but one all types and layouts."""
    one = shapes[-2]
    found = [(shape, torch.float32, "contiguous") for shape in shapes]
    found += [(one, dtype, "contiguous") for dtype in TYPES[1:]]
    found += [(one, TYPES[i % 3], layout) for i, layout in enumerate(LAYOUTS) if i]
    return found


def drawn(*shape, dtype=torch.float32, layout="contiguous", device="cpu", seed=0):
    """Normal numbers, rounded to the type, in some layout."""
    random = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randn(*shape, generator=random).to(device, dtype))


def assert_near(found, true, device="cpu", factor=1.0):
    """Holds the relative Frobenius error against the tolerance."""
    assert found.shape == true.shape
    size = true.double().norm()
    assert bool(found.isfinite().all())
    off = (found.double() - true.double()).norm() / (size if size > 0 else 1)
    assert float(off) <= factor * TOLERANCE[device]
