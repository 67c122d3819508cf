"""Defaults of options from files: the project's remoe.toml, and the user's own.

    [deploy]
    target = "aws"
    region = "eu-west-1"

    [plan]
    catalog = "prices/aws.toml"

A table is a command, a key is one of its options; `[plan]` is short for `[plan.make]`, as on the command line. A path begins at the file's
folder. The command line goes before the project's file, and that before the user's.

What agrees to costs, to a loss or to replacing files, opens a server to others, or shapes what is printed is said on the command line only.
A project may be somebody else's, so what decides who may ask a server, which image runs in an account, or what is destroyed is not taken
from its file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from remoe_cli import bounded
from remoe_cli.errors import UsageError
from remoe_cli.settings import config_dir

NAME = "remoe.toml"
COMMAND_LINE_ONLY = (
    *("yes", "accept-loss", "host", "csv", "json", "quiet", "verbose", "help", "version", "install-completion", "show-completion"),
)
_USERS_ONLY = ("token-file", "endpoint-image")  # and all of `destroy`
_TEXT_OR_FILE = ("assistant", "data", "messages", "vectors_from")  # a path, or something else: a path if there is such a file
_NAME_OR_FILE = ("catalog", "latency_from")  # a name of remoe's own, or the path of a .toml file (provenance.py)
_HINT = "See 'remoe config show', and 'remoe COMMAND --help' for the options of a command."


@dataclass(frozen=True)
class Setting:
    """One value of a file: the command's words, the option without its hyphens, and its parameter's name."""

    command: tuple[str, ...]
    option: str
    parameter: str
    value: Any
    source: Path


def files() -> tuple[Path, ...]:
    """List the files that are read, the user's first: the later one decides.

    The project's is the nearest one in this folder or above. One that belongs to another user is left aside: whoever shares a folder shall
    not choose where somebody deploys.
    """
    here = Path.cwd()
    project = next((folder / NAME for folder in (here, *here.parents) if _is_own(folder / NAME)), None)
    return tuple(path for path in (users_file(), project) if path is not None and path.is_file())


def users_file() -> Path:
    """Return where the user's own settings are, if there are any."""
    return config_dir() / NAME


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid in (0, os.geteuid())
    except OSError:
        return False


def read_settings(root: Any) -> list[Setting]:
    """Read all settings for the commands below `root`.

    Raises: UsageError for a file that cannot be read or is not TOML, and for what is no command or option, naming the file.
    """
    return [setting for path in files() for setting in _of_table(path, _read(path), root, ())]


def default_map(settings: Sequence[Setting]) -> dict[str, Any]:
    """Nest the values by command and parameter, as the parser of the command line takes them."""
    nested: dict[str, Any] = {}
    for setting in settings:
        table = nested
        for word in setting.command:
            table = table.setdefault(word, {})
        table[setting.parameter] = setting.value
    return nested


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(bounded.read_bytes(path, bounded.FIGURES).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check its permissions, or remove it.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}.", "Correct it, or remove it.") from None


def _of_table(path: Path, table: Mapping[str, Any], group: Any, words: tuple[str, ...]) -> Iterator[Setting]:
    """Read the table of a group: tables of its commands, and options of its default command."""
    commands, default = group.commands, getattr(group, "default", None)
    own: dict[str, Any] = {}
    for key, value in table.items():
        if key in commands and not isinstance(value, dict):
            raise UsageError(f"{path} has '{key}' as a value, but it is a command.", f"Write a table: [{'.'.join((*words, key))}].")
        if key in commands:
            inner = commands[key]
            read = _of_table if hasattr(inner, "commands") else _of_command
            yield from read(path, value, inner, (*words, key))
        elif default is not None:
            own[key] = value
        else:
            raise _unknown(path, f"[{'.'.join((*words, key))}]" if isinstance(value, dict) else key, "command", key, commands)
    if own and default is not None:
        yield from _of_command(path, own, commands[default], (*words, default))


def _of_command(path: Path, table: Mapping[str, Any], command: Any, words: tuple[str, ...]) -> Iterator[Setting]:
    options = {name.removeprefix("--"): each for each in command.params if each.param_type_name == "option" for name in each.opts}
    long = {name: each for name, each in options.items() if not name.startswith("-")}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name in COMMAND_LINE_ONLY:
            raise UsageError(f"{path} sets '{key}', which is said on the command line only.", f"Remove it. {_HINT}")
        if name not in long or isinstance(value, dict):
            raise _unknown(path, f"'{key}' in [{'.'.join(words)}]", f"option of 'remoe {' '.join(words)}'", name, long)
        if path != users_file() and (name in _USERS_ONLY or words == ("destroy",)):
            raise UsageError(
                f"{path} sets '{key}', which is not taken from a project's file.", f"Say it on the command line, or in {users_file()}."
            )
        parameter = long[name]
        if parameter.multiple != isinstance(value, list):
            what = "takes a list" if parameter.multiple else "takes one value"
            raise UsageError(f"{path} sets '{key}' to {value!r:.100}, and --{name} {what}.", f"See 'remoe {' '.join(words)} --help'.")
        yield Setting(words, name, parameter.name, _placed(value, parameter, path.parent), path)


def _placed(value: Any, parameter: Any, folder: Path) -> Any:
    """Let a relative path begin at the file's folder."""
    if not isinstance(value, str):
        return value
    annotation = parameter.type_descriptor.annotation
    is_path = annotation is Path or Path in get_args(annotation)
    is_figures = parameter.name in _NAME_OR_FILE and ("/" in value or value.endswith(".toml"))
    is_there = parameter.name in _TEXT_OR_FILE and (folder / value).exists()
    return str(folder / value) if is_path or is_figures or is_there else value


def _unknown(path: Path, what: str, kind: str, name: str, known: Mapping[str, Any]) -> UsageError:
    near = get_close_matches(name, known, 1)
    return UsageError(f"{path} has {what}, which is no {kind}.", f"Did you mean '{near[0]}'?" if near else _HINT)
