"""What a command asks before it replaces what remoe made earlier.

What remoe did not make is never replaced (owned.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from remoe_cli.cli import output
from remoe_cli.errors import RemoeError, UsageError

ReplaceOption = Annotated[bool, typer.Option("--yes", "-y", help="Replace what remoe made there before, without asking.")]


def agree_to_replace(yes: bool, *paths: Path) -> None:
    """Ask whether what stands at these paths may be replaced, unless `yes` agrees to that.

    Nothing is asked of what is empty or not there.

    Raises: UsageError where there is no terminal to answer, RemoeError after another answer than yes.
    """
    there = [path for path in paths if (any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0)]
    if not there or yes:
        return
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    what, other = f"{there[0]}{more}", "Give another name with --output"
    if output.is_json() or not sys.stdin.isatty():
        raise UsageError(f"{there[0]} exists already, and nobody can be asked whether to replace it.", f"{other}, or --yes to replace it.")
    if not output.ask(f"Replace {what}?"):
        raise RemoeError(f"{what} was not replaced, as you did not agree.", f"{other}.")
