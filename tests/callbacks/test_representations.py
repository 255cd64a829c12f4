"""The geometry of representations along small trainings, as the network makes it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace.callbacks import RepresentationGeometry, Trace
from nettrace.measures.similarity import cka

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

INPUTS, TARGETS = training.Samples(seed=2)[range(16)]


@pytest.mark.parametrize("given", [True, False])
def test_values_are_those_of_the_network(given: bool, tmp_path: Path) -> None:
    model = training.network()()
    probe = nt.Probe(INPUTS, TARGETS) if given else None
    options: dict[str, Any] = {"every": [0, 4], "probe": probe, "on_error": "raise"}
    geometry = RepresentationGeometry(layers=["net.1", "net.1.tanh"], to=tmp_path, **options)
    training.fit([geometry, Trace("ntk/trace", **options)], model)
    trace = nt.open(tmp_path)
    assert trace.representation.values.tolist() == ["net.1.tanh", "net.1"]
    assert not any("missing" in found.attrs for found in trace.values())
    samples = INPUTS if given else training.Samples()[range(16)][0]
    hidden = model.net[:2](samples).detach()
    last = trace.isel(step=-1)
    expected = cka(hidden, samples)
    assert last.geometry_cka_inputs.values == pytest.approx([expected] * 2, rel=1e-9)
    before = training.network()().net[:2](samples).detach()
    assert float(last.geometry_cka_first[1]) == pytest.approx(cka(before, hidden), rel=1e-9)


def test_callbacks_with_other_layers_measure_apart(tmp_path: Path) -> None:
    folders = {"net.0": tmp_path / "a", "net.1": tmp_path / "b"}
    callbacks = [
        RepresentationGeometry("geometry/participation_ratio", layers=name, every=[2], to=to)
        for name, to in folders.items()
    ]
    training.fit(callbacks, training.network()())
    for name, to in folders.items():
        assert nt.open(to).representation.values.tolist() == [name]


def test_a_layer_that_is_not_there_is_told_once_and_ends_nothing(
    tmp_path: Path, logged: list[str]
) -> None:
    geometry = RepresentationGeometry(
        "geometry/participation_ratio", layers="net.7", every=2, to=tmp_path
    )
    trainer = training.fit(geometry, training.network()())
    assert trainer.global_step > 0
    assert "'net.7'" in logged.pop()
    assert "'net.7'" in nt.open(tmp_path).geometry_participation_ratio.attrs["missing"]


def test_live_is_offline(tmp_path: Path) -> None:
    class Network(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    model, probe = Network(), nt.Probe(INPUTS, TARGETS, layers="1")
    live = nt.Tracer(probe, "geometry", to=tmp_path / "live")(model, 3)
    torch.save({"state_dict": model.state_dict(), "global_step": 3}, tmp_path / "step=3.ckpt")
    nt.analyze(tmp_path / "step=3.ckpt", probe, "geometry", model=Network, to=tmp_path / "again")
    before, again = (nt.open(tmp_path / name) for name in ("live", "again"))
    names = [r.name.replace("/", "_") for r in live if r.name.startswith("geometry/")]
    assert len(names) > 10
    for name in names:
        assert np.array_equal(before[name].values, again[name].values), name
