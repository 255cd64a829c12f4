"""`nettrace completion`."""

from __future__ import annotations

import argparse
from typing import Any

from nettrace.cli.configuration import commands_of
from nettrace.cli.texts import UsageError, new_parser
from nettrace.measures import available

_EXAMPLES = """
eval "$(nettrace completion bash)"     in ~/.bashrc
nettrace completion zsh > ~/.zsh/_nettrace
nettrace completion tcsh > ~/.nettrace.csh
"""
_FILES = ("checkpoints", "traces", "config", "checkpoint", "to", "output")


def add(commands: Any) -> None:
    """Adds the command's parser."""
    about = "print a script by which a shell completes commands, options and measures"
    parser = new_parser(commands, "completion", about, _EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(options: argparse.Namespace) -> int:
    """Prints the script.

    Raises:
        UsageError: if the package that makes it is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise UsageError("completion needs shtab: pip install 'nettrace[completion]'") from error

    from nettrace.cli import make_parser

    parser = make_parser()
    measures = [measure.name for measure in available()]
    groups = sorted({name.partition("/")[0] for name in measures})
    for command in commands_of(parser).values():
        for action in command._actions:
            if action.dest == "measures":
                action.choices = [*groups, *measures]
            elif action.dest in _FILES and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))
    return 0
