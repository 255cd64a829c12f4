"""`nettrace wandb-workspace`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from nettrace.cli.configuration import require
from nettrace.cli.texts import (
    UsageError,
    add_measures,
    add_shared,
    new_parser,
    print_json,
    split,
)
from nettrace.measures import Measure, resolve

_EXAMPLES = """
nettrace wandb-workspace me/digits                     what the callbacks log by default
nettrace wandb-workspace me/digits --measures ntk,loss/mean
nettrace wandb-workspace me/digits --callbacks Curvature,StabilityMonitor
nettrace wandb-workspace me/bert --callbacks TransformersTrace
nettrace wandb-workspace me/digits --dry-run           save nothing, but list the panels
nettrace wandb-workspace me/digits --json              save nothing, but print what W&B would get
"""
_TRAINER = "TransformersTrace"


def add(commands: Any) -> None:
    """Adds the command's parser."""
    about = "make a W&B workspace with a panel for whatever the callbacks log"
    parser = new_parser(commands, "wandb-workspace", about, _EXAMPLES)
    parser.set_defaults(run=run)
    require(
        parser.add_argument(
            "project", nargs="?", metavar="ENTITY/PROJECT", help="the W&B project that it is of"
        )
    )
    add_measures(parser, "measures or groups to show, by default those of the callbacks")
    parser.add_argument(
        "--callbacks",
        nargs="+",
        metavar="CALLBACK",
        help="callbacks whose measures are shown; by default all of Lightning's. "
        f"{_TRAINER} logs under other names: a workspace is of it, or of the others",
    )
    parser.add_argument(
        "--prefix", default="", help="what was given to the callbacks as prefix=, if anything"
    )
    parser.add_argument(
        "--probes", nargs="+", metavar="NAME", help="the names of several probes, if there were any"
    )
    parser.add_argument(
        "--name", default="nettrace", help="what the workspace is called (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="save nothing, and list the panels; like --json, without a network or an API key",
    )
    add_shared(parser)


def run(options: argparse.Namespace) -> int:
    """Saves the workspace, and prints where it is; or prints what it would have.

    Raises:
        UsageError: if a package is missing, there is no such callback or measure, or W&B refuses.
    """
    from nettrace.dashboard.workspace import packages, specification, workspace  # take long

    entity, _, project = options.project.partition("/")
    if not entity or not project or "/" in project:
        raise UsageError(
            f"expected ENTITY/PROJECT, the W&B user or team and its project, such as me/digits, "
            f"got {options.project!r}"
        )
    chosen = split(options.callbacks)
    try:
        packages()
        measures = resolve(split(options.measures)) if options.measures else _measures(chosen)
        if options.measures:
            _classes(chosen)
        found = workspace(
            entity,
            project,
            measures,
            name=options.name,
            prefix=options.prefix,
            probes=split(options.probes),
            of_trainer=_TRAINER in chosen,
        )
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    if options.dry_run and not options.json:
        for section in found.sections:
            print(f"{section.name}: {len(section.panels)} panels")
            for panel in section.panels:
                print(f"  {getattr(panel, 'title', None) or type(panel).__name__}")
        return 0
    if options.json:
        print_json(json.loads(specification(found)))
    else:
        print(_save(found, options.project))
    return 0


def _measures(names: Sequence[str]) -> list[Measure]:
    """What callbacks measure by default; none named are all of Lightning's."""
    found: dict[str, Measure] = {}
    for callback in _classes(names):
        with suppress(TypeError):  # of LandscapeProbe, whose probes are named by its user
            found |= {one.name: one for one in getattr(callback(), "measures", ())}
    return [found[name] for name in sorted(found)]


def _classes(names: Sequence[str]) -> list[Any]:
    """Callbacks by name.

    Raises:
        ValueError: if there is no such callback.
        ImportError: if a package is missing that they are of.
    """
    module = import_module("nettrace.callbacks")
    known = list(module.__all__)
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"there is no callback {wrong[0]!r}, but {', '.join(known)}")
    if _TRAINER in names and len(set(names)) > 1:
        raise ValueError(
            f"{_TRAINER} logs under other names than {', '.join(n for n in names if n != _TRAINER)}"
            ": make a workspace for each, with another --name"
        )
    return [getattr(module, name) for name in names or known if names or name != _TRAINER]


def _save(found: Any, project: str) -> str:
    """Saves a workspace, and says where it is."""
    try:
        found.save()
    except Exception as error:  # of the network, of W&B's, and of those who may not
        text = str(error) or type(error).__name__
        raise UsageError(
            f"cannot save the workspace of {project}: {text}\n"
            "It needs a network, a W&B account that may write to the project (`wandb login`, or an "
            "API key in WANDB_API_KEY), and the project to be there. --dry-run --json prints the "
            "workspace without any of these."
        ) from error
    return str(found.url)
