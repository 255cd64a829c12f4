"""How each kernel is launched on large networks, for each entry of its table."""

from __future__ import annotations

from collections.abc import Iterator

from compilation import NUMBERS, Variant

from nettrace.kernels import configurations


def every(architecture: str) -> Iterator[Variant]:
    """All kernels on an architecture, each in half and single precision."""
    for size in ("half", "single"):
        for kernel in (affine, ghost_gram, ghost_norm, embedding, sketch):
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
    short, long = configurations.GHOST_SHORT, configurations.GHOST
    for table, tokens in ((short, 1), (short, 8), (long, 4), (long, 128)):
        config = table[architecture][size]
        rows, columns, _ = config.blocks
        tb, sb = min(tokens, rows), min(tokens, columns)
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
                **{
                    "SYMMETRIC": tokens < 128,
                    "TB": tb,
                    "SB": sb,
                    "PRECISION": precision(architecture),
                },
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
    strides = ("an", "at", "gn", "gt")
    yield Variant(
        f"ghost_norm {size} of {most} tokens {config.blocks}",
        "nettrace.kernels.jit.ghost:sqnorm_kernel",
        {
            **dict.fromkeys(("a", "g"), NUMBERS[size]),
            "out": "*fp32",
            **dict.fromkeys(("samples", "tokens", "inputs", "outputs", *strides), "i32"),
        },
        {
            **dict.fromkeys(("ad", "gd"), 1),
            **{"TB": most, "BM": most, "BK": bk},
            "PRECISION": precision(architecture),
        },
        ("a", "g", "out", "inputs", "outputs", *strides),
        config.warps,
        config.stages,
        multiplies=True,
    )


def embedding(architecture: str, size: str) -> Iterator[Variant]:
    config = configurations.EMBEDDING[architecture][size]
    rows, bk = config.blocks
    for norms, tokens in ((False, 8), (True, rows)):
        yield Variant(
            f"embedding {size} {'norms' if norms else 'pairs'} of {tokens} tokens {config.blocks}",
            "nettrace.kernels.jit.embedding:embedding_kernel",
            {
                **dict.fromkeys(("ids", "order", "lows", "tops"), "*i64"),
                **{"g": NUMBERS[size], "out": "*fp32"},
                **dict.fromkeys(("samples", "tokens", "features", "gn", "gt"), "i32"),
            },
            {
                **{"gd": 1, "NORMS": norms, "BLOCKS": 16, "TB": tokens, "BM": rows, "BK": bk},
                "PRECISION": precision(architecture),
            },
            ("ids", "order", "lows", "tops", "g", "out", "features", "gn", "gt"),
            config.warps,
            config.stages,
            multiplies=True,
        )


def sketch(architecture: str, size: str) -> Iterator[Variant]:
    for columns in (64, 128):
        table = configurations.SKETCH if columns == 64 else configurations.SKETCH_WIDE
        config = table[architecture][size]
        most, bk = config.blocks
        strides = ("an", "at", "gn", "gt")
        yield Variant(
            f"sketch {size} of {columns} columns, {most} tokens {config.blocks}",
            "nettrace.kernels.jit.sketch:sketch_kernel",
            {
                **dict.fromkeys(("a", "g", "ra", "rg"), NUMBERS[size]),
                "out": "*fp32",
                **dict.fromkeys(("samples", "tokens", "inputs", "outputs"), "i32"),
                **dict.fromkeys(("k1", "k2", *strides), "i32"),
            },
            {
                **{"ad": 1, "gd": 1, "K1": columns, "K2": columns, "BT": most, "BK": bk},
                **dict.fromkeys(("PRECISION", "WITHIN"), precision(architecture)),
            },
            (*("a", "g", "ra", "rg", "out", "inputs", "outputs", "k1", "k2"), *strides),
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
