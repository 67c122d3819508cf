"""What every command's help promises: it fits 100 columns, explains each option, and shows examples that the command line accepts."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from remoe_cli.cli import app
from tests.cli.reference import cli_reference
from tests.support.forked import remoe

TREE = {path: (command, context) for path, command, context in cli_reference().walk()}
PATHS = list(TREE)


def parse(command: Any, words: list[str]) -> Any:
    """The command's context, as typer makes it before it calls the command's function; raises what a wrong option raises."""
    context = command.make_context("remoe", words)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context


def examples(text: str) -> list[list[str]]:
    """The words of each `remoe ...` in the examples of a help text, without pipes, redirections and comments."""
    commands = [part for line in text.partition("Examples:\n")[2].splitlines() for part in line.partition(" > ")[0].split(" | ")]
    words = [shlex.split(command, comments=True) for command in commands]
    return [each for each in words if each[:1] == ["remoe"]]


@pytest.mark.parametrize("path", PATHS)
def test_help_fits_100_columns(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command, context = TREE[path]
    text = command.get_help(context)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(len(line) <= 100 for line in (command.help or "").splitlines()[:1]), "the first line of a docstring"


@pytest.mark.parametrize("path", PATHS)
def test_every_command_and_option_is_explained(path: str) -> None:
    command, _ = TREE[path]
    assert command.help.split("\n\n")[0].endswith(".")
    for parameter in command.params:
        assert parameter.help and parameter.help[0] == parameter.help[0].strip() and parameter.help.endswith("."), parameter.name


@pytest.mark.sweep
@pytest.mark.parametrize("path", PATHS)
def test_every_command_shows_examples_that_parse(path: str) -> None:
    command, context = TREE[path]
    found = examples(command.get_help(context))
    assert 1 <= len(found) <= 3
    assert any(" ".join(words).startswith(path.removesuffix(" run").removesuffix(" make")) for words in found)
    for words in found:
        if words[-1] != "--help":
            parse(get_command(app.app), words[1:])


def test_the_help_names_every_exit_code_on_one_line() -> None:
    command, context = TREE["remoe"]
    lines = command.get_help(context).splitlines()
    for code, meaning in app.EXIT_CODES.items():
        assert any(f"{code} {meaning}" in line for line in lines), meaning


def test_an_example_with_a_wrong_option_does_not_parse() -> None:
    with pytest.raises(TyperException, match="No such option"):
        parse(get_command(app.app), ["plan", "p", "-o", "x", "--nonsense"])


def test_every_command_is_in_a_panel() -> None:
    """`panels` decides what is listed, so a command that is missing there would be there, and in no help."""
    command, context = TREE["remoe"]
    assert sorted(command.list_commands(context)) == sorted(command.commands)


def test_help_at_80_columns_is_80_wide() -> None:
    lines = remoe("profile", "run", "--help", COLUMNS="80").stdout.partition("Examples:")[0].splitlines()
    assert 60 < max(len(line) for line in lines) <= 80


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("remoe pro", {"profile"}),
        ("remoe profile ", {"run", "import", "measure", "merge"}),
        ("remoe profile import --lat", {"--latency-from"}),
        ("remoe profile model --ba", {"--batch-size"}),
        ("remoe deploy p --target ", {"local", "aws"}),
    ],
)
def test_a_shell_completes_commands_and_options(words: str, completed: set[str]) -> None:
    environment = {"_REMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    assert set(remoe(**environment).stdout.split()) == completed


def test_bash_gets_a_completion_script() -> None:
    assert "_REMOE_COMPLETE=complete_bash" in remoe(_REMOE_COMPLETE="source_bash").stdout
