"""Sketches of gradients, against gradients written out in float64, and on average over seeds."""

import pytest
import torch
from kernel_truth import assert_near, cases, drawn

from nettrace.kernels import kron_signs, kron_sketch

#: N, T, I, O.
SHAPES = [(1, 1, 1, 1), (4, 1, 33, 20), (3, 40, 17, 9), (3, 9, 40, 50), (2, 33, 64, 32)]


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(SHAPES))
def test_gradients_between_two_matrices(shape, dtype, layout, where):
    n, t, i, o = shape
    options = {"dtype": dtype, "layout": layout, "device": where}
    a, g = drawn(n, t, i, **options), drawn(n, t, o, **options, seed=1)
    ra, rg = (r.to(where) for r in kron_signs(i, o, 32, 24, 3, "a layer"))
    found = kron_sketch(a, g, ra, rg)
    assert found.dtype == torch.float32
    assert torch.equal(found, kron_sketch(a, g, ra, rg))
    # Signs as they are, not as float32 rounds their divisor.
    signs = (ra.double().sign(), rg.double().sign())
    true = torch.einsum("nti,nto,ik,ol->nkl", a.double(), g.double(), *signs) / (32 * 24) ** 0.5
    assert_near(found, true.flatten(1), where)
