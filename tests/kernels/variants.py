"""How each kernel is launched on large networks, for each entry of its table."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from compilation import NUMBERS, SHARED, Variant

from nettrace.kernels import configurations
from nettrace.kernels.launch import Config

#: How float32 is multiplied; gfx942 knows no tf32x3.
PRODUCTS = {
    name: {"half": "tf32", "single": "bf16x3" if name == "gfx942" else "tf32x3"} for name in SHARED
}


def every(architecture: str) -> Iterator[Variant]:
    """All kernels on an architecture, each in half and single precision."""
    kernels = (affine, moments, psg, conv_psg, ghost_gram, ghost_norm, embedding, sketch)
    for size in ("half", "single"):
        for kernel in kernels:
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


def sizes(alone: Config, squares: Config) -> list[tuple[bool, Config]]:
    """Whether squares are kept, and how: with them, a kernel needs more of everything."""
    return [(True, squares)] if alone == squares else [(False, alone), (True, squares)]


def psg(architecture: str, size: str) -> Iterator[Variant]:
    pointers = ("a", "g", "weight", "sqnorms", "totals", "squares")
    whole = ("samples", "tokens", "rows", "columns", "an", "at", "gn", "gt")
    both = configurations.PSG, configurations.PSG_SQUARES
    for sq, config in sizes(*(table[architecture][size] for table in both)):
        yield Variant(
            f"psg {size} {'with squares' if sq else 'alone'} {config.blocks}",
            "nettrace.kernels.jit.psg:moments_kernel",
            {
                **dict.fromkeys(("a", "g"), NUMBERS[size]),
                **dict.fromkeys(pointers[2:], "*fp32"),
                **dict.fromkeys(whole, "i32"),
            },
            {
                **{"WEIGHTED": True, "DW": True, "SQ": sq},
                **{"PREC": PRODUCTS[architecture][size], "TOGETHER": 8},
                **dict(zip(("BI", "BO", "BT"), config.blocks, strict=True)),
            },
            (*pointers, "rows", "columns", "an", "at", "gn", "gt"),
            config.warps,
            config.stages,
            multiplies=True,
            streams=True,
        )


def conv_psg(architecture: str, size: str) -> Iterator[Variant]:
    pointers = ("x", "gy", "sqnorms", "totals", "squares")
    geometry = (
        *("samples", "places", "channels", "filters", "height", "width", "out_width"),
        *("filter_area", "filter_width", "padding_h", "padding_w"),
    )
    once = ("groups", "stride_h", "stride_w", "dilation_h", "dilation_w")
    both = configurations.CONV_PSG, configurations.CONV_PSG_SQUARES
    kept = sizes(*(table[architecture][size] for table in both))
    launched = [(sq, config, config.blocks, PRODUCTS[architecture][size]) for sq, config in kept]
    _, config, (_, _, places), word = launched[-1]
    if size == "half":  # few channels and filters, for which smaller blocks are launched
        launched.append((True, config, (64, 64, places), word))
    else:  # without tensor cores, for which all that is multiplied is in registers
        launched.append((True, config, config.blocks, "ieee"))
    for sq, config, blocks, word in launched:
        yield Variant(
            f"conv_psg {size} {'with squares' if sq else 'alone'} {blocks} {word}",
            "nettrace.kernels.jit.conv_psg:conv_moments_kernel",
            {
                **dict.fromkeys(("x", "gy"), NUMBERS[size]),
                **dict.fromkeys(pointers[2:], "*fp32"),
                **dict.fromkeys(geometry, "i32"),
            },
            {
                **dict.fromkeys(once, 1),
                **{"DW": True, "SQ": sq, "PREC": word, "TOGETHER": 8},
                **dict(zip(("BI", "BO", "BT"), blocks, strict=True)),
            },
            (*pointers, "channels", "filters"),
            config.warps,
            config.stages,
            multiplies=word != "ieee",
            streams=True,
        )


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
