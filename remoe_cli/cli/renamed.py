"""Options that a command had once, or that another one has, and the sentence that each ends in."""

from __future__ import annotations

import re
from typing import NamedTuple


class Renamed(NamedTuple):
    """An option that some commands had or never had; its sentence says what to use."""

    commands: tuple[str, ...]
    option: str
    sentence: str


WITH_DATA = ("profile run", "profile import", "profile measure", "predict", "plan make", "infer")
RENAMED = (
    Renamed(WITH_DATA, "--input", "--input is now --data."),
    Renamed(WITH_DATA, "--prompts", "--prompts is now --data."),
    Renamed(("deploy",), "--budget", "--budget is now --monthly-alert."),
    Renamed(("deploy",), "--budget-email", "--budget-email is now --alert-email."),
    Renamed(("package",), "--context", "--context is now --output."),
    Renamed(("profile run", "plan make"), "--routing", "--routing FILE is now 'remoe profile import MODEL FILE'."),
    Renamed(("profile run",), "--vectors-from", "--vectors-from is now an option of 'remoe profile import MODEL FILE'."),
    Renamed(("profile run",), "--target", "--target NAME is now 'remoe profile measure NAME'."),
    Renamed(
        ("profile merge", "profile measure", "plan make", "deploy"),
        "--experts",
        "--experts is an option of 'remoe profile run MODEL' and 'remoe profile import MODEL FILE': a profile has the form of its experts,"
        " and what is made of it follows.",
    ),
)
_COMMAND = re.compile(r"'(remoe profile \w+) ")


def new_name(command: str, option: str) -> tuple[str, str] | None:
    """Find the sentence for an option that a command lacks, and the command that explains it.

    `command` is a path such as "remoe plan".
    """
    for commands, old, sentence in RENAMED:
        if old == option and command.removeprefix("remoe ") in commands:
            instead = _COMMAND.search(sentence)
            return sentence, instead[1] if instead else command
    return None
