"""Several processes measure what one alone measures on the same probe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured_together
import numpy as np
import pytest
import torch

from nettrace.ranks import ALONE

SCRIPT = Path(measured_together.__file__)


def run(folder: Path, processes: int, *arguments: str) -> list[Any]:
    """What each of some processes found."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, f"--nproc-per-node={processes}", str(SCRIPT), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(processes)]


@pytest.mark.parametrize(
    ("network", "how", "processes"),
    [
        ("classifier", "ddp", 2),
        ("classifier", "fsdp", 3),
        pytest.param("classifier", "ddp", 3, marks=pytest.mark.slow),
        pytest.param("classifier", "fsdp", 2, marks=pytest.mark.slow),
        pytest.param("images", "ddp", 3, marks=pytest.mark.slow),
        pytest.param("images", "fsdp", 2, marks=pytest.mark.slow),
        pytest.param("texts", "fsdp", 2, marks=pytest.mark.slow),
        pytest.param("experts", "ddp", 3, marks=pytest.mark.slow),
    ],
)
def test_every_measure_is_that_of_one_process(
    network: str, how: str, processes: int, tmp_path: Path, logged: list[str]
) -> None:
    alone = measured_together.measures(network, "plain")
    found = run(tmp_path, processes, network, how)
    measured = 0
    for name, record in alone.items():
        for several in found:
            if isinstance(record, str | None):  # of its own samples each
                assert _without_numbers(several[name]) == _without_numbers(record), name
                continue
            value, error = several[name].value, several[name].standard_error
            first = found[0][name]
            assert (several[name].missing is None) == (record.missing is None), name
            assert np.array_equal(value, first.value, equal_nan=True), name
            if name.startswith("nettrace/"):
                continue
            measured += record.missing is None
            atol = 1e-10 * np.abs(np.nan_to_num(record.value)).max(initial=1e-2)
            np.testing.assert_allclose(value, record.value, 1e-10, atol, err_msg=name)
            if record.standard_error is not None:
                np.testing.assert_allclose(error, record.standard_error, rtol=1e-8, err_msg=name)
    assert measured > (5 if network == "texts" else 40)
    logged.clear()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_member_of_the_zoo(processes: int, tmp_path: Path) -> None:
    alone = measured_together.every_member(ALONE)
    found = run(tmp_path, processes, "zoo", "plain")
    assert len(alone) > 60
    for name, products in alone.items():
        for what, true in products.items():
            for several in found:
                value = several[name][what]
                values = value if isinstance(value, dict) else {"": value}
                trues = true if isinstance(true, dict) else {"": true}
                largest = max(float(t.abs().max()) for t in trues.values())
                for key, one in values.items():
                    wrong = float((one - trues[key]).abs().max())
                    assert wrong <= 1e-9 * largest, (name, what, key)


def _without_numbers(text: str | None) -> str:
    return re.sub(r"\d+", "N", str(text))
