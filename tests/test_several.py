"""Several probes at once are what each is alone, side by side; and kernels between two."""

import json
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nettrace as nt
from nettrace.measures import registry
from nettrace.several import stacked

EACH = ["ntk/gram", "ntk/spectrum", "ntk/trace_per_layer", "fisher/trace_mc", "loss"]


X = torch.ones(2, 3).double()


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def probe(n, **options):
    return nt.Probe(torch.randn(n, 3).double(), torch.arange(n) % 2, **options)


def measured(model, probes, *names, step=0):
    records = nt.Tracer(probes, names, on_error="raise")(model, step)
    return {record.name: record for record in records}


def rows(model, x):
    """(N, C, P), by plain autograd."""
    parameters = list(model.parameters())
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)])
            for f in model(x).flatten()
        ]
    ).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("sizes", [(5, 5), (5, 3), (2, 6)], ids=str)
def test_each_probe_has_what_it_has_alone(sizes):
    model = network()
    probes = {name: probe(n) for name, n in zip(("train", "val"), sizes, strict=True)}
    found = measured(model, probes, *EACH)
    apart = {name: measured(model, one, *EACH) for name, one in probes.items()}
    for place, name in enumerate(probes):
        for key, alone in apart[name].items():
            if key.startswith("nettrace/"):
                continue
            both = found[key]
            assert both.dims == ("probe", *alone.dims)
            assert both.coordinates == {"probe": ["train", "val"], **alone.coordinates}
            here = (place, *map(slice, alone.value.shape))
            np.testing.assert_array_equal(both.value[here], alone.value)
            rest = both.value[place].size - alone.value.size
            assert np.isnan(both.value[place]).sum() == rest
            padded = len({records[key].value.shape for records in apart.values()}) > 1
            assert ("padded" in both.attributes) == padded
            if alone.standard_error is not None:
                np.testing.assert_array_equal(both.standard_error[here], alone.standard_error)
            (part,) = [part for part in both.apart() if part.name == f"{key}/{name}"]
            np.testing.assert_array_equal(part.value, alone.value)
            assert part.dims == alone.dims
            assert part.coordinates == alone.coordinates
    assert found["nettrace/seconds"].is_scalar
    certificates = [found["nettrace/spot_check"].attributes[f"{k}: certificate"] for k in probes]
    assert all(nt.Certificate.from_json(text).error < 1e-6 for text in certificates)


def test_the_trace_keeps_the_probes_apart(tmp_path):
    model, probes = network(), {"train": probe(5), "val": probe(3), "test": probe(4)}
    tracer = nt.Tracer(probes, [*EACH, "ntk/cross"], every=2, to=tmp_path)
    for step in (0, 1, 2):
        records = {record.name: record for record in tracer(model, step)}
    data = nt.open(tmp_path)
    assert data.loss_mean.dims == ("step", "probe")
    assert data.probe.values.tolist() == ["train", "val", "test"]
    assert data.pair.values.tolist() == ["train-val", "train-test", "val-test"]
    assert data.ntk_cross.dims == ("step", "pair", "sample", "sample_2")
    for name in ("loss/mean", "fisher/trace_mc", "ntk/gram", "ntk/cross"):
        np.testing.assert_array_equal(data[name.replace("/", "_")][1], records[name].value)
    error = data.fisher_trace_mc_standard_error.sel(probe="val")[1]
    assert error == records["fisher/trace_mc"].standard_error[1] > 0
    assert data.attrs["probe"] == tracer.fingerprint


def test_what_differs_between_probes_is_kept_of_each():
    model = nn.Linear(3, 2).double()
    real = nt.Probe(torch.randn(4, 3).double(), torch.randn(4, 2).double())
    found = measured(model, {"a": probe(4), "b": real}, "loss/mean", "loss/accuracy")
    about = found["loss/mean"].attributes
    assert (about["a: likelihood"], about["b: likelihood"]) == ("categorical", "gaussian")
    assert about["convention"] == "mean over samples; standard error over samples"
    assert found["loss/accuracy"].missing_on == {"b": "it was not taken here"}  # no classes
    assert [part.name for part in found["loss/accuracy"].apart()] == ["loss/accuracy/a"]


@pytest.mark.parametrize("without", [("val",), ("train", "val")], ids=str)
def test_missing_on_one_is_nan_there_and_missing_on_all_is_missing(without, tmp_path):
    model = network()
    probes = {name: probe(4) for name in ("train", "val")}
    for name in without:
        probes[name] = nt.Probe(probes[name].inputs)
    tracer = nt.Tracer(probes, "loss/mean", to=tmp_path)
    with pytest.warns(nt.MissingMeasureWarning, match=f"missing at step 0 on {without[0]}"):
        record = tracer(model, 0)[0]
    data = nt.open(tmp_path)
    (why,) = json.loads(data.loss_mean.attrs["missing"]).values()
    assert "the loss is not known" in why
    if len(without) == 2:
        assert "the loss is not known" in record.missing
    else:
        assert record.missing is None
        assert "the loss is not known" in record.missing_on["val"]
        assert np.isnan(record.value).tolist() == [False, True]
        assert np.isnan(record.standard_error).tolist() == [False, True]
        assert why.startswith("val: Unavailable")
        np.testing.assert_array_equal(data.loss_mean[0], record.value)


def test_a_reason_stays_at_its_step(tmp_path):
    model = network()
    probes = {"train": probe(4), "val": probe(4)}
    tracer = nt.Tracer(probes, "loss/mean", to=tmp_path)
    for step in range(3):
        probes["val"].targets[0] = 7 if step == 1 else 0  # no class
        if step == 1:
            with pytest.warns(nt.MissingMeasureWarning, match="got 7"):
                tracer(model, step)
        else:
            tracer(model, step)
    found = nt.open(tmp_path).loss_mean
    assert list(json.loads(found.attrs["missing"])) == ["1"]
    assert np.isnan(found.sel(probe="val")).values.tolist() == [False, True, False]


def test_what_compares_looks_compares_those_of_one_probe(monkeypatch):
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))

    @nt.measure("several/moved", needs=["outputs", "first.outputs"], convention="largest change")
    def moved(outputs, before):
        """How far outputs are from the first."""
        return (outputs - before).abs().max()

    model, probes = network(), {"train": probe(4), "val": probe(3)}
    tracer = nt.Tracer(probes, "several/moved", on_error="raise")
    first = {name: model(one.inputs).detach() for name, one in probes.items()}
    assert tracer(model, 0)[0].value.tolist() == [0, 0]
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    now = tracer(model, 1)[0].value
    for place, (name, one) in enumerate(probes.items()):
        assert now[place] == (model(one.inputs) - first[name]).abs().max() > 0


def test_the_fingerprint_is_of_names_and_samples():
    one, other = probe(4), probe(4)
    given = [{"a": one, "b": other}, {"a": other, "b": one}, {"a": one, "c": other}, {"a": one}]
    prints = {nt.Tracer(probes, "loss").fingerprint for probes in given}
    assert len(prints) == 4
    assert nt.Tracer(one, "loss").fingerprint == one.fingerprint() not in prints


# Between two probes -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 3), (4, 4), (1, 2)], ids=str)
def test_the_kernel_between_probes_is_that_of_plain_autograd(sizes):
    model = network()
    train, val = (probe(n) for n in sizes)
    found = measured(model, {"train": train, "val": val}, "ntk/cross", "ntk/cross_alignment")
    a, b = (rows(model, one.inputs) for one in (train, val))
    true = torch.einsum("ncp,mcp->nm", a, b)
    assert found["ntk/cross"].dims == ("pair", "sample", "sample_2")
    assert found["ntk/cross"].coordinates == {"pair": ["train-val"]}
    np.testing.assert_allclose(found["ntk/cross"].value[0], true, rtol=1e-12, atol=1e-13)
    own = [torch.einsum("ncp,mcp->nm", j, j).norm() for j in (a, b)]
    alignment = float(true.square().sum() / (own[0] * own[1]))
    assert found["ntk/cross_alignment"].value[0] == pytest.approx(alignment, rel=1e-12)
    assert 0 < alignment <= 1
    moments = [torch.einsum("ncp,ndq->cpdq", j, j) for j in (a, b)]  # of all outputs side by side
    cosine = (moments[0] * moments[1]).sum() / (moments[0].norm() * moments[1].norm())
    assert alignment == pytest.approx(float(cosine), rel=1e-10)


@pytest.mark.parametrize(
    "kind", [lambda x: (x,), lambda x: {"input": x}, lambda x: UserDict(input=x)]
)
def test_probes_of_every_kind_of_inputs_can_be_joined(kind):
    x, y = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    real = nt.Probe(kind(y), torch.randn(2, 2).double())  # targets of another kind do not matter
    probes = {"a": nt.Probe(kind(x), torch.arange(4) % 2), "b": real}
    model = network()
    found = measured(model, probes, "ntk/cross")["ntk/cross"].value[0]
    kernel = nt.jacobian(model(torch.cat([x, y])), model).gram(trace_outputs=True)
    np.testing.assert_allclose(found, kernel[:4, 4:], rtol=1e-12)


@given(scale=st.floats(0.1, 10), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_alignment_is_symmetric_and_one_of_a_probe_with_itself(scale, seed):
    torch.manual_seed(seed)
    model, one, other = network(), probe(4), probe(3)

    def alignment(a, b):
        return measured(model, {"a": a, "b": b}, "ntk/cross_alignment")["ntk/cross_alignment"].value

    assert alignment(one, other) == pytest.approx(alignment(other, one), rel=1e-10)
    assert alignment(one, one) == pytest.approx(1, rel=1e-12)
    before = alignment(one, other)
    with torch.no_grad():  # turns the sign of the first layer's gradients, and no more
        model[2].weight.mul_(-1)
        model[2].bias.mul_(scale)
    assert alignment(one, other) == pytest.approx(before, rel=1e-10)


@pytest.mark.parametrize(
    ("probes", "says"),
    [
        (lambda: probe(3), r'Tracer\({"train": probe, "val": other}'),
        (lambda: {"only": probe(3)}, "one probe, and this compares two"),
        (lambda: {"a": probe(3), "b": probe(3, select="last")}, "differ in select="),
        (lambda: {"a": nt.Probe({"input": X}), "b": nt.Probe({"x": X})}, r"\['input'\].*\['x'\]"),
        (
            lambda: {k: nt.Probe({"input": X, "scale": torch.ones(())}) for k in "ab"},
            "one row a sample",
        ),
        (lambda: {"a": probe(3), "b": nt.Probe(torch.randn(2, 5))}, r"\(3,\).*\(5,\).*padding"),
    ],
    ids=["one", "one by name", "other outputs", "other names", "no rows", "other shape"],
)
def test_where_there_is_nothing_to_compare_the_reason_says_so(probes, says):
    with pytest.warns(nt.MissingMeasureWarning, match=says):
        record, *_ = nt.Tracer(probes(), "ntk/cross")(network(), 0)
    assert record.missing.startswith("Unavailable")
    with pytest.raises(Exception, match=says):
        nt.Tracer(probes(), "ntk/cross", on_error="raise")(network(), 0)


def test_a_group_leaves_out_what_compares_probes_where_there_is_one():
    assert "ntk/cross" not in measured(network(), probe(3), "ntk")
    assert "ntk/cross" in measured(network(), {"a": probe(3), "b": probe(3)}, "ntk")


@pytest.mark.parametrize(
    ("probes", "error", "says"),
    [
        ({}, ValueError, "empty mapping"),
        ({"a": (1, 2)}, TypeError, r"each, got tuple.*Probe\(inputs, targets\)"),
        ({"a/b": probe(2)}, ValueError, "without '/', got 'a/b'"),
        ({1: probe(2)}, ValueError, "got 1"),
    ],
    ids=["none", "no probe", "slash", "number"],
)
def test_what_are_no_probes_is_refused(probes, error, says):
    with pytest.raises(error, match=says):
        nt.Tracer(probes, "loss")


# Records side by side -----------------------------------------------------------------------------


def test_values_are_placed_by_their_labels():
    def shares(labels):
        value = np.asarray([float(ord(label)) for label in labels])
        return nt.Record("a/b", 3, value, dims=("class",), coordinates={"class": list(labels)})

    both = stacked("probe", {"x": shares("ab"), "y": shares("cb")})
    assert both.coordinates["class"] == ["a", "b", "c"]
    np.testing.assert_array_equal(both.value, [[97, 98, np.nan], [np.nan, 98, 99]])
    assert [part.coordinates["class"] for part in both.apart()] == [["a", "b"], ["b", "c"]]


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32, np.complex64])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)], ids=str)
def test_types_are_kept_unless_there_is_nan_among_them(dtype, sizes):
    records = {
        str(i): nt.Record("a/b", 0, np.ones(n, dtype), dims=("x",)) for i, n in enumerate(sizes)
    }
    both = stacked("probe", records)
    exact = sizes[0] == sizes[1] or dtype in (np.float32, np.complex64)
    assert (both.value.dtype == dtype) == exact
    assert np.nansum(both.value) == sum(sizes)
    assert ("padded" in both.attributes) == (sizes[0] != sizes[1])
