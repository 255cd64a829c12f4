"""Curvature and stability of small trainings, against dense Hessians of autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
from torch import Tensor
from torch.func import functional_call

import nettrace as nt
from nettrace.callbacks import Curvature, StabilityMonitor

pytestmark = [pytest.mark.filterwarnings(warning) for warning in training.HARMLESS]

INPUTS, TARGETS = training.Samples(seed=2)[range(16)]


def hessian(model: Any) -> Tensor:
    """Of the mean loss on the probe, dense and in float64."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {n: w.view(s) for (n, s), w in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, (INPUTS.double(),)), TARGETS)

    flat = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", [Curvature, StabilityMonitor])
def test_values_are_those_of_the_dense_hessian(kind: Any, momentum: float, tmp_path: Path) -> None:
    class Network(training.network()):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.2, momentum=momentum)

    model = Network()
    probe = nt.Probe(INPUTS, TARGETS)
    training.fit(kind(every=[4], probe=probe, to=tmp_path, on_error="raise"), model)
    trace = nt.open(tmp_path)
    assert trace.step.values.tolist() == [4]
    assert not any("missing" in found.attrs for found in trace.values())
    last = trace.isel(step=0)
    matrix = hessian(model)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    assert float(last.hessian_lambda_max) == pytest.approx(top, rel=1e-3)
    threshold = 2 * (1 + momentum) / 0.2
    assert float(last.hessian_stability) == pytest.approx(top / threshold, rel=1e-3)
    spread = 5 * float(last.hessian_trace_standard_error)
    assert float(last.hessian_trace) == pytest.approx(float(matrix.trace()), abs=spread + 1e-3)
