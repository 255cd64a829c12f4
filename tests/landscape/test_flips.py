"""Compiled loops move walkers exactly as operations on tensors do."""

import os
import subprocess
import sys

import pytest
import torch

from nettrace.landscape import committee, multilayer, parity, perceptron
from nettrace.landscape.discrete_walkers import DiscreteWalkers
from nettrace.landscape.walkers import Walkers

NETWORKS = {
    "perceptron": perceptron(11),
    "ternary": perceptron(7, levels=(-1, 0, 1)),
    "quantised": perceptron(6, levels=(-0.5, 0.25, 1)),
    "committee": committee(9, 3),
    "tree committee": committee(12, 4, tree=True),
    "parity": parity(5, 7),
    "tree parity": parity(9, 3, tree=True),
    "two layers": multilayer(7, 5, 1),
    "two quantised layers": multilayer(5, 4, 1, levels=(-2, 0, 1, 3)),
}
WHERE = [
    "Numba",
    "Triton, interpreted",
    pytest.param("Triton", marks=pytest.mark.gpu),
]


# The interpreter computes by NumPy, which warns where nobody has been before and after.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_loops_are_as_tensors(name, halves, where):
    network, device = NETWORKS[name], "cpu"
    random = torch.Generator().manual_seed(1)
    x = torch.randn(13, network.layers[0].shape[1], generator=random)
    # Sums of halves have no rounding, either.
    x = (2 * x).round() / 2 if halves else x.sign()
    y = torch.randn(13, generator=random).sign()
    if where == "Triton":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        device = "cuda"

    def walkers(device):
        draws = torch.Generator().manual_seed(2)
        return DiscreteWalkers(network, x.to(device), y.to(device), 6, draws)

    fast, slow = walkers(device), walkers("cpu")
    if where == "Triton, interpreted":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("what Triton does is decided when it is imported: see below")
        fast._kernel = pytest.importorskip("nettrace.kernels.flips").flips_
    else:
        assert fast.moved_by == where
    moves = 25 if where == "Triton, interpreted" else 2000
    entropy = torch.cat([-(torch.arange(14) - 6.5).square() / 13, torch.tensor([torch.inf])])
    entropy[2:4] = -torch.inf  # where nobody has been
    windows = torch.tensor([[0, 0, 0, 3, 3, 3], [13, 13, 8, 9, 9, 13]])
    for part in (moves - 7, 7):
        chances = torch.rand(part, 6, generator=random, dtype=torch.float64)
        found = fast.walk(chances, entropy.double(), *windows)
        true = Walkers.walk(slow, chances, entropy.double(), *windows)
        for one, other in zip(found, true, strict=True):
            assert one.equal(other)
        assert true[1].unique().numel() > 3
    for one, other in zip(
        [*fast.weights, *fast.levels, fast.energies],
        [*slow.weights, *slow.levels, slow.energies],
        strict=True,
    ):
        assert one.cpu().equal(other)
    outputs = slow.outputs(x)
    assert slow.energies.equal(((outputs < 0) != (y < 0)).sum(1))


@pytest.mark.slow
def test_the_interpreted_loop_is_as_tensors():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "loops and interpreted"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{2 * len(NETWORKS)} passed" in done.stdout


def test_threads_make_no_difference(monkeypatch):
    from nettrace.landscape import compiled

    x = torch.randn(40, 21, generator=torch.Generator().manual_seed(0))
    tracks = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(compiled, "_WORTH", 1)
        walkers = DiscreteWalkers(
            perceptron(21), x, x[:, 0].sign(), 8, torch.Generator().manual_seed(0)
        )
        chances = torch.rand(500, 8, generator=torch.Generator().manual_seed(1)).double()
        low = torch.zeros(8, dtype=torch.int64)
        tracks.append(walkers.walk(chances, torch.zeros(42).double(), low, low + 40)[0])
    assert tracks[0].equal(tracks[1])


def test_without_compilers_tensors_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "nettrace.landscape.compiled", None)
    x = torch.ones(3, 4)
    walkers = DiscreteWalkers(perceptron(4), x, torch.ones(3), 2, torch.Generator())
    assert walkers.moved_by == "torch"


COMPILE = """
import subprocess, sys, tempfile, warnings
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nettrace.kernels.flips import _flips, warps

warnings.simplefilter("ignore")
types = {"uniform": "*fp64", "chances": "*fp64", "entropy": "*fp64", "least": "fp32"}
types["least_above"] = "fp32"
whole = "layers low high free free_above chosen chosen_above energies track proposals"
types |= dict.fromkeys(whole.split(), "*i64")
whole = "moves walkers patterns units sources places places_above"
types |= dict.fromkeys(whole.split(), "i32")
constants = ("LEVELS", "DEEP", "PRODUCT", "BLOCK")
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for deep, product, block in ((0, 0, 64), (0, 0, 2048), (1, 0, 2048), (1, 1, 2048)):
    for capability in (80, 90, 100, 120):
        source = ASTSource(
            _flips,
            {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in _flips.arg_names},
            dict(zip(constants, (2, bool(deep), bool(product), block))),
            {},
        )
        options = {"num_warps": warps(block), "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            told = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
            ).stdout
        assert "REG" in told
        if "STACK:0" not in told or "LOCAL:0" not in told:
            sys.exit(f"{deep} {product} {block} {capability}: {told}")
"""


def test_the_kernel_compiles_without_spilling():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
