"""Prompts to token ids: texts and conversations, with a chat template and without, cut to a limit; and templates that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.chat import Conversation
from remoe_cli.model.checkpoint import find
from remoe_cli.model.tokens import check_chat_template, check_prompt, content_ids, encode, load_tokenizer
from remoe_cli.model.vectors import bags
from tests.profile.test_run import WORDS, save_checkpoint

ROLES = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
# What Mistral's template does.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{{ m.content }} {% endfor %}"
)


def words(first: int, last: int) -> str:
    return " ".join(WORDS[first:last])


def chat(*turns: tuple[str, str], tools: tuple[Any, ...] = ()) -> Conversation:
    return Conversation(tuple({"role": role, "content": text} for role, text in turns), tools)


TALK = chat(("system", words(0, 2)), ("user", words(2, 8)), ("assistant", words(8, 9)), ("user", words(9, 14)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def with_template(folder: Path, template: Any) -> Any:
    tokenizer = load_tokenizer(find(str(folder)))
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_a_conversation_goes_through_the_template_as_it_is(folder: Path) -> None:
    tokenizer = with_template(
        folder, "{% for m in messages %}{% if m.role == 'user' %}<user> {% endif %}{{ m.content }} {% endfor %}<assistant>"
    )
    assert (
        text_of(tokenizer, encode(tokenizer, TALK)) == f"{words(0, 2)} <user> {words(2, 8)} {words(8, 9)} <user> {words(9, 14)} <assistant>"
    )


def test_one_message_of_the_user_is_its_text(folder: Path) -> None:
    tokenizer = with_template(folder, "<user> {% for m in messages %}{{ m.content }} {% endfor %}<assistant>")
    assert encode(tokenizer, chat(("user", "w1 w2"))) == encode(tokenizer, "w1 w2") == [3, 9, 10, 4]


def test_the_template_sees_tools(folder: Path) -> None:
    tokenizer = with_template(folder, "{% for t in tools %}{{ t.name }} {% endfor %}{{ messages[0].content }}")
    assert text_of(tokenizer, encode(tokenizer, chat(("user", "w1"), tools=({"name": "w5"},)))) == "w5 w1"


def test_without_a_template_messages_are_joined_by_blank_lines(folder: Path) -> None:
    tokenizer = load_tokenizer(find(str(folder)))
    seen: list[str] = []

    def watched(text: str) -> Any:
        seen.append(text)
        return tokenizer(text)

    assert text_of(tokenizer, encode(watched, TALK)) == words(0, 14)
    assert seen == [f"{words(0, 2)}\n\n{words(2, 8)}\n\n{words(8, 9)}\n\n{words(9, 14)}"]


@pytest.mark.parametrize(
    ("limit", "lengths"),
    [(14, (2, 6, 1, 5)), (13, (2, 5, 1, 5)), (12, (2, 4, 1, 4)), (9, (2, 3, 1, 3)), (5, (1, 1, 1, 1)), (1, (1, 1, 1, 1))],
)
def test_the_longest_messages_are_cut(limit: int, lengths: tuple[int, ...], folder: Path) -> None:
    """Every message stays, so that the template still sees the conversation; the bag of tokens is cut alike."""
    tokenizer = with_template(folder, "{% for m in messages %}{{ m.content }} {% endfor %}<assistant>")
    starts = (0, 2, 8, 9)
    left = " ".join(words(start, start + length) for start, length in zip(starts, lengths, strict=True))
    assert text_of(tokenizer, encode(tokenizer, TALK, limit)) == f"{left} <assistant>"
    assert text_of(tokenizer, content_ids(tokenizer, TALK, limit)) == left
    assert bags(tokenizer, [TALK], limit).tokens.tolist() == sorted(tokenizer(left)["input_ids"])


@pytest.mark.parametrize("limit", [1, 3, 5, 6, None])
def test_texts_are_cut_at_the_limit(limit: int | None, folder: Path) -> None:
    for template in (None, ROLES):
        tokenizer = with_template(folder, template)
        cut = words(0, 5 if limit is None else min(5, limit))
        assert encode(tokenizer, words(0, 5), limit) == encode(tokenizer, cut)
        assert content_ids(tokenizer, words(0, 5), limit) == content_ids(tokenizer, cut)


def test_a_template_that_refuses_is_quoted(folder: Path) -> None:
    tokenizer = with_template(folder, ALTERNATING)
    assert encode(tokenizer, "w1") == [9]
    for refuse in (encode, check_prompt):
        with pytest.raises(UsageError, match=r"refuses the prompt: Conversation roles must alternate user/assistant/") as caught:
            refuse(tokenizer, TALK)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[1].content + 'x' }}", "UndefinedError|list object has no element 1"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].name.first.last }}", "no attribute 'name'"),
    ],
)
def test_a_template_that_fails_is_no_crash(template: str, message: str, folder: Path) -> None:
    tokenizer = with_template(folder, template)
    with pytest.raises(UsageError, match=f"refuses the prompt: .*({message})"):
        encode(tokenizer, "w1")


UNUSABLE: dict[str, Any] = {
    "no end": "{% for m in messages %}",
    "filter": "{{ messages | no_such_filter }}",
    "function": "{{ no_such_function() }}",
    "division": "{{ 1 / 0 }}",
    "number": 5,
    "no default": [{"name": "other", "template": "x"}],
}


def break_template(folder: Path, template: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize(
    "template",
    UNUSABLE.values(),
    ids=UNUSABLE,
)
def test_a_template_that_cannot_be_used_is_a_model_error(template: Any, tmp_path: Path) -> None:
    break_template(save_checkpoint(tmp_path), template)
    for load in (load_tokenizer, check_chat_template):
        with pytest.raises(ModelError, match=r"chat template of .* cannot be used") as caught:
            load(find(str(tmp_path)))
        assert "\n" not in caught.value.message
        assert caught.value.hint


def test_a_template_that_refuses_some_prompts_is_a_good_template(tmp_path: Path) -> None:
    break_template(save_checkpoint(tmp_path), "{{ raise_exception('A system prompt is needed.') }}")
    with pytest.raises(UsageError, match="refuses the prompt: A system prompt is needed"):
        encode(load_tokenizer(find(str(tmp_path))), "w1")


def test_a_checkpoint_without_a_tokenizer_passes_the_check(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    check_chat_template(find(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    check_chat_template(find(str(tmp_path)))
