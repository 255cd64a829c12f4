"""How each kernel is launched on large networks, for each entry of its table."""

from __future__ import annotations

from collections.abc import Iterator

from compilation import NUMBERS, Variant

from nettrace.kernels import configurations


def every(architecture: str) -> Iterator[Variant]:
    """All kernels on an architecture, each in half and single precision."""
    for size in ("half", "single"):
        for kernel in (affine,):
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
