"""Where kernels are tried: by torch, by Triton's interpreter, on a GPU."""

import pytest
import torch

from nettrace.kernels.launch import INTERPRETED

WHERE = ["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=WHERE)
def where(request):
    """The device that tensors are to be on; of the interpreter, in a process of its own alone."""
    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("Triton's interpreter is for a process of its own: see test_interpreter.py")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return "cuda" if request.param == "cuda" else "cpu"
