"""How kernels are launched on each architecture: tables, written by benchmarks/kernels.py --tune.

Nothing is tuned while a program runs, so that results are the same each time, and every entry is
compiled for its architecture by the tests, which let none pass that spills registers.
"""

from __future__ import annotations

from nettrace.kernels.launch import Config, Table

_NAMES = ("sm80", "sm90", "sm100", "sm120", "gfx942")


def _everywhere(half: Config, single: Config, interpreted: Config) -> Table:
    """One configuration for all architectures."""
    found = {name: {"half": half, "single": single} for name in _NAMES}
    return {**found, "interpreter": {"half": interpreted, "single": interpreted}}


def _but_half(table: Table, **configs: Config) -> Table:
    """The same but for numbers of half precision on some architectures."""
    return {**table, **{name: {**table[name], "half": c} for name, c in configs.items()}}


#: Tokens and features.
AFFINE = _everywhere(
    Config((16, 256), 4, 3), Config((16, 256), 4, 3), interpreted=Config((16, 32), 4, 1)
)
#: Entries that a program takes at a time, and how often it does.
MOMENTS = _everywhere(
    Config((1024, 32), 4, 3), Config((1024, 32), 8, 3), interpreted=Config((64, 3), 4, 1)
)

#: Rows, columns and tokens.
PSG = _but_half(
    _everywhere(
        Config((128, 128, 64), 8, 3),
        Config((128, 64, 32), 8, 3),
        interpreted=Config((16, 32, 16), 4, 1),
    ),
    sm90=Config((128, 128, 64), 8, 4),
    sm100=Config((128, 128, 64), 8, 4),
    sm120=Config((128, 128, 32), 8, 3),
    gfx942=Config((128, 128, 32), 8, 2),
)
#: The same where squares are kept as well.
PSG_SQUARES = _but_half(
    _everywhere(
        Config((128, 64, 64), 8, 3),
        Config((128, 64, 32), 8, 3),
        interpreted=Config((32, 16, 16), 4, 1),
    ),
    gfx942=Config((128, 128, 32), 8, 2),
)
#: Channels, filters and places.
CONV_PSG = {
    **PSG,
    "sm80": {"half": Config((128, 64, 64), 8, 3), "single": Config((64, 64, 32), 8, 3)},
}
#: The same where squares are kept as well.
CONV_PSG_SQUARES = {
    **PSG_SQUARES,
    "sm80": {"half": Config((128, 64, 64), 8, 3), "single": Config((64, 64, 32), 8, 3)},
}

#: Rows and columns, which are tokens of samples, and features.
GHOST = _everywhere(
    Config((128, 128, 64), 8, 3), Config((64, 64, 32), 8, 3), interpreted=Config((32, 16, 32), 4, 1)
) | {
    "sm80": {"half": Config((128, 64, 64), 8, 3), "single": Config((64, 64, 16), 8, 3)},
    "sm120": {"half": Config((128, 64, 64), 8, 3), "single": Config((64, 32, 32), 8, 3)},
}
#: The same for up to 8 tokens, where sums of many pairs of samples take registers as well.
GHOST_SHORT = _everywhere(
    Config((64, 64, 64), 8, 3), Config((64, 64, 16), 8, 3), interpreted=Config((32, 16, 32), 4, 1)
)
#: The most tokens, and features.
GHOST_NORM = _everywhere(
    Config((128, 64), 8, 3), Config((64, 32), 8, 3), interpreted=Config((16, 32), 4, 1)
) | {"sm120": {"half": Config((64, 64), 4, 3), "single": Config((64, 32), 8, 3)}}
#: Rows, which are tokens of samples, as many columns, and features.
EMBEDDING = _everywhere(
    Config((64, 64), 8, 3), Config((64, 32), 8, 3), interpreted=Config((16, 32), 4, 1)
) | {
    "sm80": {"half": Config((64, 64), 8, 3), "single": Config((64, 16), 8, 3)},
    "sm100": {"half": Config((64, 64), 8, 2), "single": Config((64, 32), 8, 3)},
    "sm120": {"half": Config((64, 64), 8, 3), "single": Config((64, 16), 8, 3)},
}
#: The most tokens, and features, for sketches of up to 64 columns.
SKETCH = _everywhere(
    Config((128, 64), 8, 3), Config((64, 32), 8, 3), interpreted=Config((16, 32), 4, 1)
) | {
    "sm80": {"half": Config((64, 32), 8, 3), "single": Config((32, 32), 8, 3)},
    "sm120": {"half": Config((64, 32), 8, 3), "single": Config((32, 32), 8, 3)},
}
#: The same for more.
SKETCH_WIDE = _everywhere(
    Config((32, 32), 8, 3), Config((16, 32), 8, 3), interpreted=Config((16, 32), 4, 1)
) | {
    "sm90": {"half": Config((64, 64), 8, 3), "single": Config((32, 16), 8, 3)},
    "sm100": {"half": Config((32, 64), 8, 3), "single": Config((32, 16), 8, 3)},
    "gfx942": {"half": Config((64, 64), 8, 3), "single": Config((16, 32), 8, 3)},
}
