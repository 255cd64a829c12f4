"""`nettrace measures`."""

from __future__ import annotations

import argparse
from typing import Any

from nettrace.cli.texts import add_shared, new_parser, print_json, wrapped
from nettrace.measures import available, statistics

_EXAMPLES = """
nettrace measures                        all, with conventions and sources
nettrace measures --statistics           what one of your own can be made of
nettrace measures --import my_measures   with those that a module defines
nettrace measures --json
"""


def add(commands: Any) -> None:
    """Adds the command's parser."""
    parser = new_parser(
        commands, "measures", "list what can be measured, by which convention", _EXAMPLES
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--statistics", action="store_true", help="list what measures can be made of instead"
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="a module or file that defines measures; may be given again",
    )
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Prints what can be measured, from what, by which convention and source."""
    if options.statistics:
        if options.json:
            print_json(statistics())
            return 0
        for name, summary in statistics().items():
            print(name)
            print(wrapped(summary, "    "))
        return 0
    if options.json:
        keys = ("name", "dims", "summary", "convention", "needs", "source")
        print_json([{key: getattr(one, key) for key in keys} for one in available()])
        return 0
    for one in available():
        print(one.name + (f" ({', '.join(one.dims)})" if one.dims else ""))
        for label, text in [
            ("", one.summary),
            ("convention  ", one.convention),
            ("needs       ", ", ".join(one.needs)),
            ("source      ", one.source),
        ]:
            if text:
                print(wrapped(text, "    " + label))
        print()
    return 0
