"""Let a main function try drafts of another length than it was deployed with (draft.py)."""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.errors import UsageError
from remoe_cli.model.draft import Speculate
from remoe_cli.runtime.main_function import MainFunction


def with_speculate(main: MainFunction, asked: Speculate | None) -> MainFunction:
    """Return the main function with drafts of another length; None keeps the deployment's.

    Raises: UsageError where the model's family takes no drafts.
    """
    if asked is None:
        return main
    if asked != "off" and not main.engine.drafts:
        raise UsageError(
            f"A model of family '{main.engine.model.config.model_type}' takes no drafts: its cache cannot take wrong tokens back.",
            "Leave --speculate out, or give --speculate off.",
        )
    return replace(main, config=main.config.model_copy(update={"speculate": asked}))
