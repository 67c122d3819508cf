"""`-` is standard input wherever a prompt or a file of prompts is read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_cli import bounded
from remoe_cli.cli import options
from remoe_cli.cli.options import prompts_of
from remoe_cli.errors import UsageError
from remoe_cli.profile.prompts import read_prompts


def standard_input(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (b"one\n\ntwo\r\nthree", ("one", "two", "three")),
        (b'\n{"prompt": "one"}\n{"prompt": "\xc3\xa9\\n{"}\n', ("one", "é\n{")),
        (b"\xef\xbb\xbfone\n{two}\n", ("one", "{two}")),
    ],
)
def test_data_is_json_lines_or_text_lines(text: bytes, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, text)
    prompts = read_prompts("-")
    assert prompts.texts == texts and prompts.source == "standard input"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "standard input holds no prompts"),
        (b" \n\n", "standard input holds no prompts"),
        (b'{"prompt": "x"}\ny', "standard input, row 2: not JSON"),
        (b'\n{"question": "x"}', "standard input, row 2 has no field 'prompt'"),
        (b"\xff", "standard input, row 1: not UTF-8"),
    ],
)
def test_wrong_data_is_refused(text: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, text)
    with pytest.raises(UsageError, match=message):
        read_prompts("-")


def test_a_limit_leaves_the_rest_of_standard_input_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b"one\ntwo\n\xff")
    assert read_prompts("-", limit=2).texts == ("one", "two")


def test_a_prompt_is_all_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b"  two lines\nof one prompt\n")
    assert prompts_of("-", None, "prompt").texts == ("  two lines\nof one prompt",)
    assert prompts_of("as it is\n", None, "prompt").texts == ("as it is\n",)
    standard_input(monkeypatch, b" \n")
    with pytest.raises(UsageError, match="Standard input holds no prompt"):
        prompts_of("-", None, "prompt")


def test_the_command_line_reads_it(tmp_path: Path) -> None:
    """Prompts are read before the model, so that the model that is missing shows that they were found."""
    command = [sys.executable, "-m", "remoe_cli", "profile", "no-model", "--data", "-", "-o", str(tmp_path / "out"), "--json"]
    for text, message in (("a prompt\n", "no folder no-model"), ('{"text": "x"}\n', "standard input, row 1 has no field 'prompt'")):
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
        assert message in json.loads(run.stdout)["error"]["message"]


def test_a_prompt_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_LONGEST_PROMPT", bounded.Limit(5))
    standard_input(monkeypatch, b"a" * 6)
    with pytest.raises(UsageError, match="it has more than 0 KiB, which is the most for it"):
        prompts_of("-", None, "prompt")
