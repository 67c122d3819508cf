"""Options that earlier versions had, and the sentence that each of them ends in today."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typer.exceptions import TyperException

# (command, old option) -> the sentence
RENAMED = {
    ("predict", "--input"): "--input is now --data.",
    ("infer", "--input"): "--input is now --data.",
    ("plan", "--prompts"): "--prompts is now --data.",
    ("deploy", "--budget"): "--budget is now --monthly-alert.",
    ("deploy", "--budget-email"): "--budget-email is now --alert-email.",
    ("package", "--context"): "--context is now --output.",
    ("profile run", "--routing"): "--routing FILE is now 'remoe profile import MODEL FILE'.",
    ("profile run", "--vectors-from"): "--vectors-from is now an option of 'remoe profile import MODEL FILE'.",
    ("profile run", "--target"): "--target NAME is now 'remoe profile measure NAME'.",
}


def new_name(command: str, error: TyperException) -> str | None:
    """Return the sentence for an option that typer does not know, if `command` ("remoe plan") had it once."""
    return RENAMED.get((command.removeprefix("remoe "), getattr(error, "option_name", "")))
