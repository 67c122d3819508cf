"""Options that earlier versions had, and the sentence that each of them ends in today."""

from __future__ import annotations

from typing import Any

# (command, old option) -> what to write today
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


def new_name(error: Any) -> str | None:
    """Return the sentence for an option that typer does not know because it has another name today."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    return RENAMED.get((" ".join(names), str(option)))
