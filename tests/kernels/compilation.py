"""Compiles kernels for architectures, without a GPU: python compilation.py [ARCHITECTURE ...]

For all of them if none is named. Each entry of the tables of configurations is compiled as it would
be launched, and what came of it is read with the tools of Triton's own wheel: registers that spill,
shared memory, instructions of tensor cores, loads of 16 bytes. Prints a line for each, and ends
with 1 if one of them fails. In a process of its own: kernels that are interpreted cannot be
compiled.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
#: Bytes of shared memory that a program may take.
SHARED = {"sm80": 163, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64}
#: How Triton writes types, by whether numbers are of half or single precision.
NUMBERS = {"half": "*bf16", "single": "*fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched.

    Args:
        name: what is said of it.
        kernel: "module:function" below `nettrace.kernels.jit`.
        types: of its arguments, as Triton writes them; constants are left out.
        constants: by name.
        aligned: arguments that are multiples of 16, as the launcher finds out.
        warps: as in `Config`.
        stages: as in `Config`.
        multiplies: whether it is to use tensor cores.
        streams: whether it is to load 16 bytes at a time.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    multiplies: bool = False
    streams: bool = False


def compiled(variant: Variant, architecture: str) -> str:
    """What is wrong with a kernel on an architecture, if anything is."""
    module, _, name = variant.kernel.partition(":")
    kernel = getattr(import_module(module), name)
    numbers = {argument: i for i, argument in enumerate(kernel.arg_names)}
    given = {**dict.fromkeys(variant.constants, "constexpr"), **variant.types}
    assert given.keys() == numbers.keys(), given.keys() ^ numbers.keys()
    source = ASTSource(
        kernel,
        {argument: given[argument] for argument in kernel.arg_names},
        {(numbers[name],): value for name, value in variant.constants.items()},
        {(numbers[name],): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    target = GPUTarget("hip", "gfx942", 64)
    if architecture != "gfx942":
        target = GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    try:
        made = triton.compile(source, target=target, options=options)
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {str(error)[:200]}"
    wrong = []
    if made.metadata.shared > 1024 * SHARED[architecture]:
        wrong.append(f"{made.metadata.shared} bytes of shared memory")
    if architecture == "gfx942":
        spilled = re.search(r"vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])
        if spilled and int(spilled[1]):
            wrong.append(f"spills {spilled[1]} registers")
        if variant.multiplies and "mfma" not in made.asm["amdgcn"]:
            wrong.append("no matrix instructions")
        return ", ".join(wrong)
    usage, text = disassembled(made.asm["cubin"])
    if usage["STACK"] or usage["LOCAL"] or re.search(r"\b(LDL|STL)\b", text):
        wrong.append(f"spills, {usage['STACK']} bytes of stack")
    if variant.multiplies and not re.search(r"\bHGMMA\b|\bHMMA\b|\bUTC\w*MMA\b", text):
        wrong.append("no tensor cores")
    if variant.streams and not re.search(r"ld\.global\S*\.v4|LDG\S*\.128", made.asm["ptx"] + text):
        wrong.append("no loads of 16 bytes")
    return ", ".join(wrong)


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """What a kernel takes, by name, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said, text = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    assert usage, said
    return usage, text


def told(variant: Variant, architecture: str) -> tuple[str, bool]:
    """A line on one compilation, and whether it failed."""
    wrong = compiled(variant, architecture)
    return f"{architecture:7} {variant.name:60} {wrong or 'fine'}", bool(wrong)


def jobs(architectures: list[str]) -> Iterator[tuple[Variant, str]]:
    """All kernels on some architectures, or on all."""
    from variants import every

    for architecture in architectures or SHARED:
        for variant in every(architecture):
            yield variant, architecture


if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        lines = list(pool.map(told, *zip(*jobs(sys.argv[1:]), strict=True)))
    print("\n".join(line for line, _ in lines))
    sys.exit(any(failed for _, failed in lines))
