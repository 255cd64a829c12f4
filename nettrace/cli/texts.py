"""What commands print, and the options that they share."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from typing import Any

DATA = (
    "a nettrace.Probe, a tensor of inputs, an (inputs, targets) pair, a data set, loader or data "
    "module, or a function that gives one; as module:name or path/to/file.py:name"
)
EXIT_CODES = "exit codes: 0 done; 1 failed, with a message on stderr; 2 not a valid command line"


class UsageError(Exception):
    """What was asked for cannot be done; the message says what to do instead."""


def width() -> int:
    """Characters in a line of the terminal, at most 120."""
    return min(120, shutil.get_terminal_size((80, 24)).columns)


def formatter(prog: str) -> argparse.HelpFormatter:
    """Help whose examples are printed as they are written."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width())


def wrapped(text: str, label: str = "") -> str:
    """Text filled to the terminal's width, hanging from a label."""
    lines = [
        textwrap.fill(line, width(), initial_indent=label, subsequent_indent=" " * len(label))
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    json.dump(document, sys.stdout, indent=2, default=str)  # ASCII, whatever names files have
    print()


def new_parser(
    commands: Any, name: str, about: str, examples: str, exit_codes: str = EXIT_CODES
) -> argparse.ArgumentParser:
    """The parser of a command, with its examples and exit codes below its options."""
    epilog = f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}\n\n"
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=textwrap.fill(about, width()),
        epilog=epilog + textwrap.fill(exit_codes, width()),
        formatter_class=formatter,
        allow_abbrev=False,
    )
    return parser


def add_measures(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds `--measures`, which takes names by commas and spaces, and `--import`."""
    parser.add_argument("--measures", nargs="+", metavar="NAME", help=about)
    add_import(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="a module or file that defines measures; may be given again",
    )


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--config`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with the names of these options as keys, such as max-seconds: 10, and "
        "paths as seen from the current folder; what the command line says comes first",
    )


def split(names: list[str] | None) -> list[str]:
    """Names that were told apart by commas and spaces."""
    return [name for text in names or [] for name in text.replace(",", " ").split()]
