"""All kernels compile for all architectures without spilling, and one that spills is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nettrace.kernels.launch import INTERPRETED

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted do not compile")


def run(*command):
    pytest.importorskip("triton")
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "architecture",
    [
        "sm90",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm80", "sm100", "sm120", "gfx942")),
    ],
)
def test_all_configurations_compile(architecture):
    done = run(str(HERE / "compilation.py"), architecture)
    failed = [line for line in done.stdout.splitlines() if not line.endswith("fine")]
    assert not failed
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) >= 20


def test_a_configuration_that_spills_is_found():
    code = (
        "from compilation import told; from variants import planted; print(told(planted(), 'sm90'))"
    )
    done = run("-c", code)
    assert "spills" in done.stdout, done.stderr[-3000:]
    assert "True" in done.stdout
