"""Options that had another name: each ends in the sentence that names the new one, and the new one exists."""

from __future__ import annotations

import json
import re

import pytest

from remoe_cli.cli.renamed import RENAMED
from tests.cli.reference import cli_reference
from tests.support.forked import remoe

OPTIONS = {
    path.removeprefix("remoe "): {option for parameter in command.params for option in parameter.opts}
    for path, command, _ in cli_reference().walk()
}


@pytest.mark.parametrize(("command", "option"), RENAMED)
def test_an_old_option_names_the_new_one(command: str, option: str) -> None:
    sentence = RENAMED[command, option]
    run = remoe(*command.split(), "something", option, "value", "--json")
    assert run.returncode == 2
    assert json.loads(run.stdout)["error"] == {"kind": "Usage", "message": sentence, "hint": f"See 'remoe {command} --help'."}
    assert sentence.startswith(option) and option not in OPTIONS[command]
    if new := re.search(r" is now (--[\w-]+)\.", sentence):
        assert new[1] in OPTIONS[command]
    else:
        new_command = re.search(r"'remoe (profile \w+) ", sentence)
        assert new_command and new_command[1] in OPTIONS
    assert option not in remoe(*command.split(), "--help").stdout.replace(f"{option}-", "")


def test_the_short_form_of_profile_run_names_the_new_commands_too() -> None:
    run = remoe("profile", "model", "--routing", "counts.npz", "--latency-from", "paper", "-o", "out")
    assert run.returncode == 2 and run.stderr.startswith("error: --routing FILE is now 'remoe profile import MODEL FILE'.\n")


def test_another_commands_unknown_option_is_unknown() -> None:
    run = remoe("status", "--input", "x")
    assert run.returncode == 2 and "No such option: --input" in run.stderr
