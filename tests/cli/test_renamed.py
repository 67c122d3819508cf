"""Options that had another name: each ends in the sentence that names the new one, and the new one exists."""

from __future__ import annotations

import json
import re

import pytest

from remoe_cli.cli.renamed import RENAMED, WITH_DATA
from tests.cli.reference import cli_reference
from tests.support.forked import remoe

OPTIONS = {
    path.removeprefix("remoe "): {option for parameter in command.params for option in parameter.opts}
    for path, command, _ in cli_reference().walk()
}
ROWS = [(command, row.option, row.sentence) for row in RENAMED for command in row.commands]


def test_every_command_with_data_is_known() -> None:
    assert {command for command, options in OPTIONS.items() if "--data" in options} == set(WITH_DATA)


@pytest.mark.sweep
@pytest.mark.parametrize(("command", "option", "sentence"), ROWS)
def test_an_old_option_names_the_new_one(command: str, option: str, sentence: str) -> None:
    assert sentence.startswith(option) and option not in OPTIONS[command]
    if new := re.search(r" is now (--[\w-]+)\.", sentence):
        assert new[1] in OPTIONS[command]
        helps = command
    else:
        new_command = re.search(r"'remoe (profile \w+) ", sentence)
        assert new_command and new_command[1] in OPTIONS
        helps = new_command[1]
    for given in ((option, "value"), (f"{option}=value",)):
        run = remoe(*command.split(), "something", *given, "--json")
        assert run.returncode == 2
        assert json.loads(run.stdout)["error"] == {"kind": "Usage", "message": sentence, "hint": f"See 'remoe {helps} --help'."}
    assert option not in remoe(*command.split(), "--help").stdout.replace(f"{option}-", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--routing", "counts.npz"), "--routing FILE is now 'remoe profile import MODEL FILE'."),
        (("model", "--target", "olmoe"), "--target NAME is now 'remoe profile measure NAME'."),
        (("model", "--prompts=p.txt"), "--prompts is now --data."),
        (("--input", "p.txt"), "--input is now --data."),
    ],
)
def test_the_short_form_of_profile_run_names_the_new_ones_too(arguments: tuple[str, ...], message: str) -> None:
    run = remoe("profile", *arguments, "-o", "out")
    assert run.returncode == 2 and run.stderr.startswith(f"error: {message}\n")


def test_another_commands_unknown_option_is_unknown() -> None:
    run = remoe("status", "--input", "x")
    assert run.returncode == 2 and "No such option: --input" in run.stderr
