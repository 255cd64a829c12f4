"""Focusing of a small training, against strengths that are written out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import nn

import nettrace as nt
from nettrace.callbacks import Focusing

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]


class Network(training.network()):
    """Four hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [4, 6, 5, 6, 5, 3]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])


def focusing(model: Any) -> list[float]:
    found = []
    weights = [p.detach().double().square() for p in model.parameters() if p.dim() == 2]
    for before, behind in itertools.pairwise(weights):
        pi = before.sum(1) * behind.sum(0)
        found.append(float(1 - pi.sum() ** 2 / pi.square().sum() / len(pi)))
    return found


def test_focusing_is_measured_while_lightning_trains(tmp_path: Path) -> None:
    plain, model = Network(), Network()
    training.fit([], plain)
    training.fit(Focusing(every=[0, 4], to=tmp_path, on_error="raise"), model)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [0, 4]
    assert trace.nodes.values.tolist() == [f"net.{i}.weight[0]" for i in (0, 2, 4, 6)]
    for row, network in enumerate((Network(), model)):
        np.testing.assert_allclose(trace.focus_focusing[row], focusing(network), rtol=1e-9)
    assert trace.focus_alternation.notnull().all()
    p = trace.focus_alternation_p_layers
    assert ((p >= 1 / 24) & (p <= 1)).all()
    assert p.attrs["draws"] == 24
