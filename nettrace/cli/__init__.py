"""The command line; one module a command, each with its parser and what it runs."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from nettrace import locate
from nettrace.cli import (
    analyze,
    completion,
    dashboard,
    explain,
    export,
    measures,
    report,
    wandb_workspace,
)
from nettrace.cli.configuration import configured
from nettrace.cli.texts import UsageError, formatter, wrapped

_TOUR = """\
examples:
  nettrace measures                          what can be measured
  nettrace explain model.py:build --data model.py:probe
                                             is it right, and what does it cost?
  nettrace analyze checkpoints --model model.py:build --data model.py:probe \\
      --measures ntk,loss --to runs/x        measure what was trained before
  nettrace export runs/x --to netcdf         for other programs, as x.nc
  nettrace report runs/*                     all figures, as a page
  nettrace dashboard runs/*                  a page of runs, while they train

A name such as model.py:build is that of something in a file, and
package.module:build that of something that can be imported.
`nettrace COMMAND --help` tells more.

exit codes: 0 done; 1 failed, with a message on stderr; 2 not a valid command
line; 3 done in part (analyze); 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: by default those that the process was started with.

    Returns:
        The exit status: 0; 1 if the command failed, 3 if it did in part, 130 if it was interrupted.

    Raises:
        SystemExit: 2, if the arguments are not as the command takes them; 0 after help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = "nettrace"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown
            parser = make_parser()
            options = configured(parser, given)
            command = f"nettrace {options.command}"
            status = _run(options)
            sys.stdout.flush()
            return status
    except (UsageError, locate.LocateError) as error:
        message = str(error)
    except BrokenPipeError:  # as of `nettrace measures | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # of code of the user's, mostly
        message = locate.told(error)
    print(wrapped(f"{command}: {message}"), file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        UsageError: if code of the user's ends the process, with whatever status.
    """
    try:
        for module in getattr(options, "modules", ()):
            locate.import_module(module)
        status: int = options.run(options)
    except SystemExit as error:
        raise UsageError(
            f"code that it loaded ended the process, by sys.exit({error.code!r}): guard what a "
            "script does by if __name__ == '__main__':"
        ) from error
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function from options to the exit status."""
    parser = argparse.ArgumentParser(
        prog="nettrace",
        description="Measure the physics of learning, while a network trains and afterwards.",
        epilog=_TOUR,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = (measures, explain, analyze, export, report, dashboard, wandb_workspace, completion)
    for one in every:
        one.add(commands)
    return parser


def _shown(message: Warning | str, *where: Any, **more: Any) -> None:
    print(wrapped(f"warning: {message}"), file=sys.stderr)
