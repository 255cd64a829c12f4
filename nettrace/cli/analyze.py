"""`nettrace analyze`."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from nettrace import offline
from nettrace.cli import configuration
from nettrace.cli.texts import (
    DATA,
    UsageError,
    add_measures,
    add_shared,
    new_parser,
    print_json,
    split,
    wrapped,
)
from nettrace.offline import Analysis
from nettrace.record import MissingMeasureWarning

_ABOUT = "measure checkpoints as a callback would have measured the network in training"
_EXAMPLES = """
nettrace analyze checkpoints --model model.py:build --data model.py:probe
nettrace analyze checkpoints --model model.py:build --data model.py:probe \\
    --measures ntk,fisher/trace --to runs/x --jobs 2
nettrace analyze 'seed-1/*.ckpt' --data data.py:Digits
nettrace analyze --config runs/x/analyze.yaml   again; what is done is skipped
"""
_EXIT_CODES = (
    "exit codes: 0 done; 1 failed, with a message on stderr; 2 not a valid command line; "
    "3 done, but for checkpoints that failed; 130 interrupted, what was measured is kept"
)
_DEFAULTS = inspect.signature(offline.analyze).parameters


def add(commands: Any) -> None:
    """Adds the command's parser."""
    parser = new_parser(commands, "analyze", _ABOUT, _EXAMPLES, _EXIT_CODES)
    parser.set_defaults(run=run, parser=parser)
    configuration.require(
        parser.add_argument(
            "checkpoints",
            nargs="*",
            metavar="CHECKPOINTS",
            help="files, folders or patterns: of Lightning, torch.save, safetensors, Hugging Face, "
            "FSDP and distributed checkpoints",
        )
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the network, or a class or function that makes it, from the checkpoint's "
        "hyper-parameters if it has arguments, as module:name or path/to/file.py:name; not needed "
        "where checkpoints say what they are of",
    )
    configuration.require(parser.add_argument("--data", metavar="NAME", help=f"required: {DATA}"))
    default = ", ".join(_DEFAULTS["measures"].default)
    add_measures(parser, f"measures or groups, by commas or spaces; by default {default}")
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        help="where the trace goes; by default analysis, beside the checkpoints",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes to measure in (%(default)s)"
    )
    parser.add_argument("--dask", metavar="ADDRESS", help="measure on this Dask cluster instead")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of each; by default the cores shared out"
    )
    parser.add_argument(
        "--memory", default="2GiB", metavar="SIZE", help="memory budget of each (%(default)s)"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        metavar="S",
        help="above how many a measure is refused; by default none is",
    )
    parser.add_argument("--retry", action="store_true", help="take again what is missing")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code that checkpoints may hold; only if you trust their author",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and no report")
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Measures checkpoints, prints what was done, and keeps the options with the trace.

    Raises:
        UsageError: if nothing can be measured.
        LocateError: if there is no such network or probe.
    """
    asked = split(options.measures) or list(_DEFAULTS["measures"].default)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingMeasureWarning)  # which the report names
            found = offline.analyze(
                options.checkpoints,
                options.data,
                asked,
                model=options.model,
                to=options.to,
                jobs=options.jobs,
                dask=options.dask,
                threads=options.threads,
                memory_budget=options.memory,
                max_seconds=options.max_seconds,
                allow_pickle=options.allow_pickle,
                retry=options.retry,
                progress=not options.quiet,
                modules=options.modules,
            )
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
    can_be_repeated = bool(found.done or found.skipped)
    file = _saved(options, asked, found.folder) if can_be_repeated else None
    if options.json:
        print_json(_document(found))
    elif not options.quiet:
        _report(found, file)
    if options.json or options.quiet:
        for path, reason in found.failed.items():
            print(wrapped(f"failed: {path}: {reason}"), file=sys.stderr)
    if found.failed and not (found.done or found.skipped):
        raise UsageError("none of the checkpoints could be measured")
    return 3 if found.failed else 0


def _document(found: Analysis) -> dict[str, Any]:
    return {
        "trace": str(found.folder),
        "done": found.done,
        "skipped": found.skipped,
        "failed": {str(path): reason for path, reason in found.failed.items()},
        "missing": dict(found.missing),
        "anew": found.anew,
        "seconds": found.seconds,
    }


def _saved(options: argparse.Namespace, measures: list[str], folder: Path) -> Path:
    """The file that repeats this, from any folder; options of other analyses stay in theirs."""
    lasting = argparse.Namespace(**vars(options))
    lasting.checkpoints = [configuration.absolute(path) for path in options.checkpoints]
    lasting.data = configuration.absolute_name(options.data)
    lasting.model = options.model and configuration.absolute_name(options.model)
    lasting.modules = [
        configuration.absolute(name) if name.endswith(".py") else name for name in options.modules
    ]
    lasting.measures, lasting.to = measures, str(folder.absolute())
    return configuration.save(lasting, options.parser, folder)


def _report(found: Analysis, file: Path | None) -> None:
    print(wrapped(str(found)))
    if file is not None:
        print(f"open it by nettrace.open({str(found.folder)!r})")
        print(f"repeat this by nettrace analyze --config {shlex.quote(str(file))}")
