"""What a main function sends: lines in parts of any length, each within a limit, and nothing but text, an answer or an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from remoe_cli import bounded
from remoe_cli.errors import DeployError, ModelError
from remoe_cli.runtime import client

ANSWER = b'{"answer": {"text": "ab", "receipt": {"prompt_tokens": 1, "generated_tokens": 2}}}'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_in_parts_of_any_length(size: int) -> None:
    text = b'{"text": "a"}\n\n{"text": "\xc3\xa4"}\n{"last": 1}'
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(client._lines(parts)) == [b'{"text": "a"}', b'{"text": "\xc3\xa4"}', b'{"last": 1}']


def test_a_line_without_an_end_is_refused_before_it_fills_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "RESPONSE", bounded.Limit(1000))
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 100
            yield b"x" * 100

    with pytest.raises(bounded.LimitError, match="is the most"):
        list(client._lines(endless()))
    assert read == 1100


def answered(monkeypatch: pytest.MonkeyPatch, *lines: bytes) -> tuple[dict[str, object], list[str]]:
    monkeypatch.setattr(client, "_events", lambda endpoint, request: map(client._event, lines))
    texts: list[str] = []
    return client.answer(client.Http("http://x"), "prompt", 3, texts.append), texts


def test_text_and_then_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    document, texts = answered(monkeypatch, b'{"text": "a"}', b'{"text": "b"}', ANSWER)
    assert document["text"] == "ab" and texts == ["a", "b"]


EMPTY = b'{"error": {"kind": "Model", "message": "", "hint": ""}}'


@pytest.mark.parametrize("line", [b"{}", b'{"text": 5}', b'{"answer": 5}', b'{"answer": {}}', b'{"error": "x"}', EMPTY])
def test_what_no_main_function_sends(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeployError, match="it sent what is neither text, answer nor error"):
        answered(monkeypatch, line, ANSWER)


def test_an_error_keeps_its_kind_and_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError) as raised:
        answered(monkeypatch, b'{"error": {"kind": "Model", "message": "Two\\nlines", "hint": "h"}}')
    assert raised.value.message == "Two\\nlines"
