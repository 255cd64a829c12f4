"""Quantiles over runs are those of NumPy, with holes in them."""

import numpy as np
import pytest

pytest.importorskip("plotly", reason="figures need plotly")

from nettrace.dashboard.tracks import _quantiles


@pytest.mark.parametrize("runs", [2, 3, 8])
def test_they_are_as_numpy_finds_them(runs):
    rng = np.random.default_rng(runs)
    values = rng.normal(size=(runs, 500))
    values[rng.random(values.shape) < 0.4] = np.nan
    values = values[:, np.isfinite(values).any(0)]
    at = (0.0, 0.1, 0.5, 0.9, 1.0)
    expected = np.nanquantile(values, at, axis=0)
    np.testing.assert_allclose(_quantiles(values, at), expected, rtol=1e-12, atol=1e-14)
