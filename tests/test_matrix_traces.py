"""Traces, blocks, diagonal and norm: unbiased, with true errors, against dense matrices."""

import pytest
import torch

from nettrace.matrix_traces import probed

BLOCKS = {"a": slice(0, 25), "b": slice(25, None), "all": slice(None), "none": slice(7, 7)}
METHODS = [("hutchinson", 8), ("hutch++", 4), ("xtrace", 6)]


def rotated(spectrum, seed=0):
    random = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q
    matrix = (basis * spectrum) @ basis.T
    return (matrix + matrix.T) / 2


def spectra():
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(60, generator=random, dtype=torch.float64)
    return {
        "falling": 0.8 ** torch.arange(60).double(),
        "indefinite": torch.cat([torch.tensor([5.0, 3, -4]), 0.2 * noise[3:]]),
        "flat": 1 + 0.1 * noise,
        "slow": 1 / (1 + torch.arange(60).double()),
    }


def of(matrix, **options):
    options = {"dtype": matrix.dtype, "device": "cpu", **options}
    return probed(lambda v: matrix @ v, len(matrix), BLOCKS, **options)


@pytest.mark.parametrize(("method", "probes"), METHODS)
@pytest.mark.parametrize("name", spectra())
def test_all_is_unbiased_and_its_errors_are_true(name, method, probes):
    a = rotated(spectra()[name])
    repeats = 150
    found = [of(a, method=method, probes=probes, diagonal=True, seed=s) for s in range(repeats)]
    right = {
        "trace": (lambda f: f.trace, a.trace()),
        "norm": (lambda f: f.frobenius_square, a.square().sum()),
        "a": (lambda f: f.blocks["a"], a.diagonal()[:25].sum()),
        "b": (lambda f: f.blocks["b"], a.diagonal()[25:].sum()),
        "diagonal": (lambda f: f.diagonal, a.diagonal()),
    }
    for what, (get, true) in right.items():
        values = torch.stack([get(f).value for f in found])
        claimed = torch.stack([get(f).standard_error for f in found])
        off = (values.mean(0) - true) / (values.std(0) / repeats**0.5)
        assert float(off.abs().max()) < 4.5, what
        ratio = (values - true).square().mean().sqrt() / claimed.square().mean().sqrt()
        assert (0.55 if method == "xtrace" else 0.8) < float(ratio) < 1.25, what
    for f in found:
        assert f.trace.method == method
        assert f.products == {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[method] * probes
        total = f.blocks["a"].value + f.blocks["b"].value
        assert float(total) == pytest.approx(float(f.trace.value), abs=1e-10)
        assert float(f.blocks["all"].value) == pytest.approx(float(f.trace.value), abs=1e-10)
        assert float(f.diagonal.value.sum()) == pytest.approx(float(f.trace.value), abs=1e-10)
        assert float(f.blocks["none"].value) == 0


@pytest.mark.parametrize("rows", [7, 2**16])
def test_probes_added_later_are_as_good(monkeypatch, rows):
    monkeypatch.setattr("nettrace.matrix_traces._ROWS", rows)
    a = rotated(1 / (1 + torch.arange(400).double()))
    options = {"diagonal": True, "most_products": 300}
    found = of(a, probes=3, relative_error=0.02, **options)
    same = of(a, probes=found.trace.probes, **options)
    assert found.trace.probes > 6
    assert found.products == 2 * found.trace.probes
    assert float(found.trace.standard_error) <= 0.02 * float(found.trace.value)
    for get in (lambda f: f.trace, lambda f: f.blocks["a"], lambda f: f.frobenius_square):
        assert get(found).value == pytest.approx(float(get(same).value), rel=1e-9)
        assert get(found).standard_error == pytest.approx(float(get(same).standard_error), 1e-6)
    assert torch.allclose(found.diagonal.value, same.diagonal.value, atol=1e-9)


def test_a_falling_spectrum_takes_at_most_half_of_hutchinsons_products():
    a = rotated(0.9 ** torch.arange(400).double())
    needed = {}
    for method in ("hutchinson", "xtrace"):
        options = {"method": method, "probes": 4, "relative_error": 0.02, "most_products": 399}
        found = [of(a, seed=s, **options) for s in range(8)]
        needed[method] = sum(f.products for f in found)
        errors = [abs(float(f.trace.value / a.trace()) - 1) for f in found]
        assert max(errors) < 0.08
    assert 2 * needed["xtrace"] < needed["hutchinson"]


def test_a_target_out_of_reach_ends_with_what_there_is():
    a = rotated(torch.linspace(-1, 1, 300).double())  # of trace 0
    for method, _ in METHODS:
        found = of(a, method=method, probes=4, relative_error=0.01, most_products=41)
        assert 35 <= found.products <= 41
        assert abs(float(found.trace.value)) < 5 * float(found.trace.standard_error)


@pytest.mark.parametrize(("method", "probes"), METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_matrices_are_told_exactly(size, method, probes):
    a = rotated(torch.linspace(-3, 7, size).double())
    found = of(a, method=method, probes=probes, diagonal=True)
    assert found.trace.method == "exact"
    assert found.products == size
    assert float(found.trace.value) == pytest.approx(float(a.trace()))
    assert float(found.frobenius_square.value) == pytest.approx(float(a.square().sum()))
    assert torch.allclose(found.diagonal.value, a.diagonal())
    assert float(found.diagonal.standard_error.abs().max()) == 0


@pytest.mark.parametrize(("method", "probes"), METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 2])
def test_low_rank(method, probes, dtype, rank):
    spectrum = torch.zeros(200).double()
    spectrum[:rank] = torch.tensor([3.0, -1])[:rank]
    a = rotated(spectrum).to(dtype)
    found = of(a, method=method, probes=probes, diagonal=True)
    precise = rank == 0 or method != "hutchinson"
    scale = 1e-4 if dtype == torch.float32 else 1e-10
    error = scale if precise else 6 * float(found.trace.standard_error)
    assert abs(float(found.trace.value) - float(a.double().trace())) <= error
    if precise:
        assert float(found.frobenius_square.value) == pytest.approx(10.0 * (rank > 0), abs=scale)
        assert torch.allclose(found.diagonal.value, a.diagonal().double(), atol=scale)


def test_the_same_seed_gives_the_same():
    a = rotated(1 / (1 + torch.arange(50).double()))
    for method, probes in METHODS:
        one, same, other = (of(a, method=method, probes=probes, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.trace.value, same.trace.value)
        assert not torch.equal(one.trace.value, other.trace.value)
    assert one.diagonal is None


def test_what_is_wrong_is_said():
    a = torch.eye(50)
    for options, message in [
        ({"method": "exact"}, "expected 'hutchinson', 'hutch"),
        ({"probes": 1}, "at least 2 probes"),
        ({"relative_error": 0.0}, "positive relative error"),
    ]:
        with pytest.raises(ValueError, match=message):
            of(a, **options)
    for method, probes in METHODS:
        with pytest.raises(ValueError, match="not finite"):
            of(a * torch.nan, method=method, probes=probes)
