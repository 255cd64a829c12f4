"""Finds the fastest configurations of kernels, and writes them to kernels/configurations.py."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nettrace.kernels import configurations
from nettrace.kernels.launch import Config, Table

PATH = Path(configurations.__file__).resolve()
SIZES = ("half", "single")


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number, by a factor of two or by one stage."""
    for i, block in enumerate(config.blocks):
        for other in (block // 2, 2 * block):
            if other >= 16:
                yield config._replace(blocks=(*config.blocks[:i], other, *config.blocks[i + 1 :]))
    for warps in (config.warps // 2, 2 * config.warps):
        if 1 <= warps <= 16:
            yield config._replace(warps=warps)
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= 6:
            yield config._replace(stages=stages)


def tuned(start: Config, cost: Callable[[Config], float]) -> Config:
    """The cheapest configuration that steps to neighbours come to.

    Args:
        start: where to begin.
        cost: seconds, infinite for what does not run or is wrong.
    """
    costs = {start: cost(start)}
    best = start
    while True:
        for one in neighbours(best):
            if one not in costs:
                costs[one] = cost(one)
        found = min(costs, key=costs.__getitem__)
        if costs[found] >= 0.98 * costs[best] or math.isinf(costs[found]):
            return best  # which is as good, up to noise
        best = found


def tried(
    table: Table, architecture: str, size: str, config: Config, call: Callable[[], Any]
) -> Any:
    """What a call returns where a table has another entry."""
    row = table[architecture]
    table[architecture] = {**row, size: config}  # tables may have rows in common
    try:
        return call()
    finally:
        table[architecture] = row


def written(tables: dict[str, Table], source: str) -> str:
    """The module's text with other tables."""
    lines = source.splitlines(keepends=True)
    assigned = {
        node.targets[0].id: node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for name, node in sorted(assigned.items(), key=lambda item: -item[1].lineno):
        if name in tables:
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [f"{name} = {spelled(tables[name])}\n"]
    return "".join(lines)


def spelled(table: Table) -> str:
    """A table as the module has it: one configuration for all, but for some."""
    others = {name: row for name, row in table.items() if name != "interpreter"}
    common = Counter((row["half"], row["single"]) for row in others.values()).most_common(1)[0][0]
    half, single = map(_spelled, common)
    interpreted = _spelled(table["interpreter"]["half"])
    text = f"_everywhere(\n    {half},\n    {single},\n    interpreted={interpreted},\n)"
    unlike = {name: row for name, row in others.items() if (row["half"], row["single"]) != common}
    if unlike:
        rows = [
            f'    "{name}": {{\n'
            + "".join(f'        "{size}": {_spelled(row[size])},\n' for size in SIZES)
            + "    },\n"
            for name, row in unlike.items()
        ]
        text += " | {\n" + "".join(rows) + "}"
    return text


def _spelled(config: Config) -> str:
    return f"Config({config.blocks!r}, {config.warps}, {config.stages})"
