"""Writes docs/reference/cli.md, the reference of all commands, from the commands themselves:

python docs/reference/make_cli_reference.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from remoe_cli.cli import app
from remoe_cli.cli.groups import panels_of
from remoe_cli.cli.renamed import RENAMED

PAGE = Path(__file__).with_name("cli.md")
MAKER = "python docs/reference/make_cli_reference.py"


def walk(command: Any = None, parent: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path ("remoe profile run"), the command and a context of every group and command, each group before its commands."""
    command = command or get_command(app.app)
    context = command.make_context(command.name or "remoe", [], parent=parent, resilient_parsing=True)
    yield context.command_path, command, context
    for name in command.list_commands(context) if hasattr(command, "commands") else ():
        yield from walk(command.commands[name], context)


def reference() -> str:
    """Return the text of the page."""
    parts = [
        "# Commands",
        f"Made from the commands by `{MAKER}`; do not edit this page. `remoe COMMAND --help` prints the same.",
        "Words are explained in the [glossary](glossary.md).",
        *(part for path, command, context in walk() for part in _section(path, command, context)),
        "## Exit codes",
        _table(("code", "meaning"), [(str(code), meaning) for code, meaning in app.EXIT_CODES.items()]),
        "## Old names",
        "These options have another name today. remoe names the new one and exits with 2.",
        _table(
            ("option", "today"),
            [(f"`{option}` of {', '.join(f'`remoe {command}`' for command in commands)}", text) for commands, option, text in RENAMED],
        ),
    ]
    return re.sub(r"'(remoe [^'\n]+)'(?!\n)", r"`\1`", "\n\n".join(parts)) + "\n"


def _section(path: str, command: Any, context: Any) -> Iterator[str]:
    yield f"## {path}"
    yield from (" ".join(paragraph.split()) for paragraph in command.help.split("\n\n"))
    yield _code(command.get_usage(context).removeprefix("Usage: "))
    for panel, rows in panels_of(command, context).items():
        if shown := [(f"`{name}`", text) for name, text in rows if name != "--help"]:
            yield _table((panel, ""), shown)
    if "Examples:" in command.epilog:
        yield _code("\n".join(line.strip() for line in command.epilog.splitlines()[1:]))


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((a.replace("|", "\\|"), b.replace("|", "\\|").replace("  [", " [")) for a, b in rows)]
    return "\n".join(f"| {a} | {b} |" for a, b in lines)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
