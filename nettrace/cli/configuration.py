"""Options from a YAML file, which the command line overrides, and options as such a file."""

from __future__ import annotations

import argparse
import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

import yaml

from nettrace.cli.texts import UsageError


def configured(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options as the arguments say, else as the file does that `--config` names.

    Raises:
        UsageError: if the file cannot be read, or has keys that the command does not know.
        SystemExit: if arguments are wrong or missing.
    """
    options = parser.parse_args(arguments)
    command = commands_of(parser)[options.command]
    if getattr(options, "config", None) is not None:
        given = _arguments(Path(options.config), command, options)
        # What comes later in a command line overrides what came before.
        options = parser.parse_args([options.command, *given, *_after(arguments, options.command)])
    for action in command._actions:
        needed = getattr(action, "needed", False)  # from the one or the other
        if needed and getattr(options, action.dest) in (None, []):
            name = "/".join(action.option_strings) or action.metavar or action.dest
            command.error(f"the following arguments are required: {name}")
    return options


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of commands, by name."""
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def require(action: argparse.Action) -> None:
    """Marks an argument as one without which the command cannot run."""
    action.needed = True  # type: ignore[attr-defined]


def save(options: argparse.Namespace, command: argparse.ArgumentParser, folder: Path) -> Path:
    """Writes options that are set as a file for `--config`, unless there is one that says the same.

    What others say is kept: the file is called as the command, or that with a number that is free.
    """
    found = {}
    for action in command._actions:
        value = getattr(options, action.dest, None)
        if _key(action) not in ("config", "json", "quiet", "help") and value not in (
            None,
            [],
            False,
        ):
            found[_key(action)] = value
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    text = f"# Options of nettrace {options.command}, for --config.\n{text}"
    file, number = folder / f"{options.command}.yaml", 1
    while file.exists():
        if file.read_text(encoding="utf-8", errors="replace") == text:
            return file
        number += 1
        file = folder / f"{options.command}-{number}.yaml"
    new = file.with_name(f".{file.name}")
    new.write_text(text, encoding="utf-8")
    return new.replace(file)


def absolute(path: str) -> str:
    """A path or pattern that means the same in any folder."""
    here = str(Path.cwd())
    return str(Path(here if Path(path).exists() else glob.escape(here)) / path)


def absolute_name(where: str) -> str:
    """A name as for `nettrace.locate` that means the same in any folder, if it is in a file."""
    file, colon, name = where.rpartition(":")
    return f"{absolute(file)}{colon}{name}" if file.endswith(".py") else where


def _arguments(
    file: Path, command: argparse.ArgumentParser, options: argparse.Namespace
) -> list[str]:
    """A file's settings as arguments."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file} cannot be read: {error}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise UsageError(f"expected {file} to hold options, as `jobs: 2`, got {found!r}")
    actions = {_key(a): a for a in command._actions if _key(a) not in ("help", "config")}
    first, rest = [], []
    for key, value in found.items():
        action = actions.get(str(key).replace("_", "-"))
        if action is None:
            near = difflib.get_close_matches(str(key), actions, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(actions)}"
            raise UsageError(f"{file} has {key!r}, which is no option of {command.prog}: {hint}")
        values = value if isinstance(value, list) else [value]
        if (
            any(isinstance(one, (dict, list)) or one is None for one in values)
            and value is not None
        ):
            raise UsageError(f"{file}: expected {key} to be text, a number or a list of them")
        if not action.option_strings:
            first += [] if getattr(options, action.dest) else [str(one) for one in values]
        elif action.nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(f"{file}: expected {key} to be true or false, got {value!r}")
            rest += [action.option_strings[0]] * value
        elif value is None:
            continue
        elif action.nargs == "+":
            rest.append(f"{action.option_strings[0]}={','.join(map(str, values))}")
        elif len(values) > 1 and not isinstance(action, argparse._AppendAction):
            raise UsageError(f"{file}: expected one {key}, got {value!r}")
        else:
            rest += [f"{_long(action)}={one}" for one in values]
    return [*first, *rest]


def _after(arguments: Sequence[str], command: str) -> list[str]:
    return list(arguments)[list(arguments).index(command) + 1 :]


def _long(action: argparse.Action) -> str:
    return max(action.option_strings, key=len)


def _key(action: argparse.Action) -> str:
    """The name of an option without dashes, or of what stands without one."""
    return _long(action).lstrip("-") if action.option_strings else action.dest
