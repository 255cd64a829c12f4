"""The command line: `nettrace explain`, `nettrace measures`; one function a command."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nettrace.differentiate import parse_bytes
from nettrace.measures import available, statistics
from nettrace.probe import Probe
from nettrace.statistics import Statistics
from nettrace.tracer import Tracer


class UsageError(Exception):
    """What was asked for cannot be done; the message says what to do instead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: by default those that the process was started with.

    Returns:
        The exit status: 0, or 1 if the command failed.
    """
    parser = argparse.ArgumentParser(
        prog="nettrace", description="Measure the physics of learning while a network trains."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    about = "say how the derivatives of a network are found, check them, and state what they cost"
    command = commands.add_parser("explain", help=about, description=about)
    command.set_defaults(run=explain)
    command.add_argument(
        "model", help="module:name of the network, or of a function that builds it"
    )
    command.add_argument(
        "--data",
        required=True,
        metavar="MODULE:NAME",
        help="a Probe, a tensor of inputs or an (inputs, targets) pair, or a function giving one",
    )
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights to load, as saved by torch.save"
    )
    command.add_argument(
        "--memory", default="2GiB", help="memory budget (%(default)s), as in nettrace.jacobian"
    )

    command.add_argument(
        "--measures", nargs="+", metavar="NAME", help="those to price; by default all"
    )
    command.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        help="above how many a measure would be refused (%(default)g), as in nettrace.Tracer",
    )

    about = "list the measures"
    command = commands.add_parser("measures", help=about, description=about)
    command.set_defaults(run=measures)
    command.add_argument(
        "--statistics", action="store_true", help="list what measures can be made of instead"
    )
    for command in commands.choices.values():
        command.add_argument(
            "--import",
            action="append",
            default=[],
            dest="modules",
            metavar="MODULE",
            help="a module that defines measures",
        )

    options = parser.parse_args(arguments)
    try:
        for module in options.modules:
            _import(module)
        options.run(options)
    except UsageError as error:
        print(_wrapped(f"nettrace {options.command}: {error}"), file=sys.stderr)
        return 1
    except BrokenPipeError:  # as of `nettrace measures | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def explain(options: argparse.Namespace) -> None:
    """Prints the certificate of a network on a probe, and what its measures cost.

    Raises:
        UsageError: if there is no certificate.
    """
    try:
        memory = parse_bytes(options.memory)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
    model = _load(options.model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected {options.model} to be a torch.nn.Module, got {_kind(model)}")
    if options.checkpoint is not None:
        _restore(model, options.checkpoint)
    probe = _probe(options.data)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    print(f"{type(model).__name__}, {sum(sizes.values()):,} parameters in {len(sizes)} tensors")
    print(probe, end="\n\n")
    names = options.measures or [measure.name for measure in available()]
    try:
        tracer = Tracer(probe, names, memory_budget=memory, max_seconds=options.max_seconds)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        certificate = tracer.certify(model)
        explanation = tracer.explain(model)
    except Exception as error:  # samples that are coupled, or whatever the network raises
        raise UsageError(f"no certificate: {type(error).__name__}: {error}") from error
    print(certificate.table(_width()), end="\n\n")
    print(explanation.table(_width()))
    if certificate.outputs > Statistics.exact_outputs:
        print(
            _wrapped(
                f"There are {certificate.outputs:,} outputs, more than {Statistics.exact_outputs}: "
                f"ntk/trace is an estimate to {Statistics.relative_error:.0%}, priced at the "
                "fewest passes that it can take; Jacobian.trace() is exact."
            )
        )


def measures(options: argparse.Namespace) -> None:
    """Prints what can be measured, from what, by which convention and source."""
    if options.statistics:
        for name, summary in statistics().items():
            print(name)
            print(_wrapped(summary, "    "))
        return
    for one in available():
        print(one.name + (f" ({', '.join(one.dims)})" if one.dims else ""))
        for label, text in [
            ("", one.summary),
            ("convention  ", one.convention),
            ("needs       ", ", ".join(one.needs)),
            ("source      ", one.source),
        ]:
            if text:
                print(_wrapped(text, "    " + label))
        print()


def _import(name: str) -> ModuleType:
    """A module, which may lie in the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"{name} needs {error.name}, which is not installed") from error
        raise UsageError(
            f"there is no module {name!r}: expected {name.replace('.', '/')}.py in {here} or an "
            "installed module"
        ) from error
    except Exception as error:
        raise UsageError(f"{name} cannot be imported: {_told(error)}") from error


def _load(where: str) -> Any:
    """What is called `module:name`, called if it is a function or a class."""
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise UsageError(f"expected module:name, such as my_module:build, got {where!r}")
    module = _import(module_name)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, vars(found), cutoff=0.4)
            hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UsageError(f"{module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise UsageError(f"{where}() failed: {_told(error)}") from error


def _probe(where: str) -> Probe:
    found = _load(where)
    if isinstance(found, Probe):
        return found
    if not isinstance(found, (Tensor, tuple, list, dict)):
        raise UsageError(
            f"expected {where} to be a nettrace.Probe, a tensor of inputs or an (inputs, targets) "
            f"pair, got {_kind(found)}"
        )
    try:
        return Probe.from_batch(found)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} makes no probe: {error}") from error


def _restore(model: nn.Module, file: Path) -> None:
    """Loads weights from a file that holds them, or them under "state_dict", as Lightning does."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"there is no checkpoint {file}") from error
    except Exception as error:
        raise UsageError(
            f"{file} cannot be read as weights alone ({type(error).__name__}): save it by "
            "torch.save(model.state_dict(), file); other Python objects are not loaded, because "
            "they can run code"
        ) from error
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    try:
        model.load_state_dict(found)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{file} does not fit the model: {error}") from error


def _told(error: Exception) -> str:
    """An error of somebody else's code, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _wrapped(text: str, label: str = "") -> str:
    """Text filled to the terminal's width, hanging from a label."""
    lines = [
        textwrap.fill(line, _width(), initial_indent=label, subsequent_indent=" " * len(label))
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def _width() -> int:
    return min(120, shutil.get_terminal_size((80, 24)).columns)


if __name__ == "__main__":
    sys.exit(main())
