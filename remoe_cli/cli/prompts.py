"""Reading prompts for a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from remoe_cli.cli import output

if TYPE_CHECKING:
    from remoe_cli.profile.prompts import PromptSet


def read_prompts(source: str, field: str, limit: int | None = None) -> PromptSet:
    """Read prompts as profile/prompts does, and say how many rows were left out."""
    from remoe_cli.profile import prompts

    found = prompts.read_prompts(source, field, limit)
    if found.skipped:
        output.say(f"{found.skipped} {'row' if found.skipped == 1 else 'rows'} of {found.source} ask nothing and were left out.")
    return found
