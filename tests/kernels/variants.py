"""How each kernel is launched on large networks, for each entry of its table."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from compilation import NUMBERS, Variant

from nettrace.kernels import configurations


def every(architecture: str) -> Iterator[Variant]:
    """All kernels on an architecture, each in half and single precision."""
    for size in ("half", "single"):
        for kernel in (affine, moments):
            yield from kernel(architecture, size)


def affine(architecture: str, size: str) -> Iterator[Variant]:
    config = configurations.AFFINE[architecture][size]
    pointers = ("x", "dy", "mean", "rstd")
    whole = ("samples", "tokens", "features", "xn", "xt", "yn", "yt", "mn", "rn")
    for normalises in (False, True):
        yield Variant(
            f"affine {size} {'normalising' if normalises else 'plain'} {config.blocks}",
            "nettrace.kernels.jit.affine:affine_kernel",
            {
                **dict.fromkeys(pointers, NUMBERS[size]),
                **dict.fromkeys(("scales", "shifts"), "*fp32"),
                **dict.fromkeys(whole, "i32"),
            },
            {
                **dict.fromkeys(("xd", "yd", "mt", "rt"), 1),
                **{"NORMALISES": normalises, "PARTS": 4},
                **dict(zip(("BT", "BD"), config.blocks, strict=True)),
            },
            (*pointers, "scales", "shifts", "features", "xn", "xt", "yn", "yt"),
            config.warps,
            config.stages,
            streams=True,
        )


def moments(architecture: str, size: str) -> Iterator[Variant]:
    config = configurations.MOMENTS[architecture][size]
    block, _ = config.blocks
    for sums in (False, True):
        yield Variant(
            f"moments {size} {'with sums' if sums else 'alone'} {config.blocks}",
            "nettrace.kernels.jit.moments:welford_kernel",
            {
                **{"tensors": "*i64", "parts": "*i64", "sums": "*fp64"},
                **dict.fromkeys(("inverse", "share"), "fp32"),
            },
            {
                "TYPE": {"half": tl.bfloat16, "single": tl.float32}[size],
                **{"ALIGNED": True, "SUMS": sums, "BLOCK": block},
            },
            ("tensors", "parts", "sums"),
            config.warps,
            config.stages,
            streams=True,
        )
    if size == "single":
        yield Variant(
            "moments total",
            "nettrace.kernels.jit.moments:total_kernel",
            {"tensors": "*i64", "sums": "*fp64", "found": "*fp64"},
            {"BLOCK": 128},
            ("tensors", "sums", "found"),
            warps=4,
            stages=3,
        )


def planted() -> Variant:
    """One that spills: far more numbers than there are registers."""
    (found,) = (v for v in affine("sm90", "single") if "plain" in v.name)
    blocks = {"BT": 16, "BD": 512}
    return Variant(
        "planted",
        found.kernel,
        found.types,
        {**found.constants, **blocks},
        found.aligned,
        warps=1,
        stages=1,
    )
