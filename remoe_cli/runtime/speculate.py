"""Let a main function try drafts of another length than it was deployed with (draft.py)."""

from __future__ import annotations

from dataclasses import replace

from remoe_cli.errors import UsageError
from remoe_cli.runtime.draft import MOST_TOKENS, Speculate
from remoe_cli.runtime.main_function import MainFunction

_WORDS: dict[str, Speculate] = {"auto": "auto", "off": "off"}


def speculate_of(text: str) -> Speculate:
    """Read the option --speculate; raises UsageError for what is none of its values.

    >>> speculate_of("auto"), speculate_of("8")
    ('auto', 8)
    """
    if text in _WORDS:
        return _WORDS[text]
    if text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MOST_TOKENS:
        return int(text)
    raise UsageError(f"--speculate is {text!r:.100}, not 'auto', 'off' or a number of tokens.", f"Numbers are 1 to {MOST_TOKENS}.")


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
