"""How each kernel is launched on large networks, for each entry of its table."""

from __future__ import annotations

from collections.abc import Iterator

from compilation import NUMBERS, Variant

from nettrace.kernels import configurations


def every(architecture: str) -> Iterator[Variant]:
    """All kernels on an architecture, each in half and single precision."""
    for size in ("half", "single"):
        for kernel in (affine, ghost_gram, ghost_norm):
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


#: How products of float32 are made by default.
def precision(architecture: str) -> str:
    return "bf16x3" if architecture == "gfx942" else "tf32x3"


def ghost_gram(architecture: str, size: str) -> Iterator[Variant]:
    sides = {"a": "n t", "g": "n t", "b": "m s", "h": "m s"}
    widths = {"a": "ad", "g": "gd", "b": "bd", "h": "hd"}
    strides = [side + axis for side, axes in sides.items() for axis in axes.split()]
    numbers = ("samples", "others", "tokens", "tokens_of_others", "inputs", "outputs")
    for tokens in (1, 2, 8, 4, 32, 128, (64, 8)):
        short = tokens in (1, 2, 8)
        table = configurations.GHOST_SHORT if short else configurations.GHOST
        config = table[architecture][size]
        rows, columns, _ = config.blocks
        tb, sb = tokens if isinstance(tokens, tuple) else (min(tokens, columns),) * 2
        yield Variant(
            f"ghost_gram {size} of {tokens} tokens {config.blocks}",
            "nettrace.kernels.jit.ghost:gram_kernel",
            {
                **dict.fromkeys(sides, NUMBERS[size]),
                "out": "*fp32",
                **dict.fromkeys((*numbers, *strides), "i32"),
            },
            {
                **dict.fromkeys(widths.values(), 1),
                **{"SYMMETRIC": tb == sb, "TB": tb, "SB": sb, "PRECISION": precision(architecture)},
                **dict(zip(("BM", "BN", "BK"), config.blocks, strict=True)),
            },
            (*sides, "out", "inputs", "outputs", *strides),
            config.warps,
            config.stages,
            multiplies=True,
        )


def ghost_norm(architecture: str, size: str) -> Iterator[Variant]:
    config = configurations.GHOST_NORM[architecture][size]
    most, bk = config.blocks
    for tokens in sorted({1, 8, 32, most}):
        strides = ("an", "at", "gn", "gt")
        yield Variant(
            f"ghost_norm {size} of {tokens} tokens {config.blocks}",
            "nettrace.kernels.jit.ghost:sqnorm_kernel",
            {
                **dict.fromkeys(("a", "g"), NUMBERS[size]),
                "out": "*fp32",
                **dict.fromkeys(("samples", "tokens", "inputs", "outputs", *strides), "i32"),
            },
            {
                **dict.fromkeys(("ad", "gd"), 1),
                **{"TB": tokens, "BM": max(16, tokens), "BK": bk},
                "PRECISION": precision(architecture),
            },
            ("a", "g", "out", "inputs", "outputs", *strides),
            config.warps,
            config.stages,
            multiplies=True,
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
