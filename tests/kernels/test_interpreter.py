"""All tests of kernels once more, by Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nettrace.kernels.launch import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is it")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(which):
    pytest.importorskip("triton")
    # The interpreter computes by NumPy, which warns of what is masked.
    options = ["-q", "-k", "interpreter", "-p", "no:xdist", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-m", which, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10
