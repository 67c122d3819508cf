"""Profiling conversations: what is counted is what the model would be served, and what cannot be served is found before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.checkpoint import find
from remoe_cli.model.tokens import encode, load_tokenizer
from remoe_cli.predict.history import features_from, features_of
from remoe_cli.profile.prompts import PromptSet, read_prompts
from tests.profile.test_run import TEXTS, run, same_bytes, save_checkpoint

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('Tools are not supported.') }}{% endif %}"
    "{% if m.role == 'user' %}<user> {% endif %}{{ m.content }} {% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), chat=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path: Path, rows: list[Any]) -> PromptSet:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(str(path))


def test_single_questions_give_the_same_profile_as_plain_texts(model: Path, tmp_path: Path) -> None:
    """ShareGPT's rows, of which the first is no question; to the byte, but for the names of file and field."""
    rows = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]} for text in TEXTS]
    prompts = write(tmp_path / "a.jsonl", [{"conversations": []}, *rows])
    assert prompts.texts == TEXTS
    run(model, tmp_path / "one", prompts=PromptSet("memory", "prompt", prompts.texts))
    run(model, tmp_path / "other")
    assert same_bytes(tmp_path / "one", tmp_path / "other")


def test_a_conversation_is_counted_as_it_is_served(model: Path, tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3 w4 w5"}
    answer, more = {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"}
    turns = [[system, user], [user, answer, more], [system, user, answer, more], [user]]
    prompts = write(tmp_path / "a.jsonl", [{"messages": [*messages, answer]} for messages in turns])
    made = run(model, tmp_path / "profile", prompts=prompts, batch_size=2)
    tokenizer = load_tokenizer(find(str(model)))
    served = [encode(tokenizer, prompt) for prompt in prompts.texts]
    assert served[2] == [*tokenizer("w1 w2 <user> w3 w4 w5 w6 <user> w7 <assistant>")["input_ids"]]
    assert made.arrays["prompt_tokens"].tolist() == list(map(len, served)) == [7, 8, 10, 5]
    assert made.record.dataset.field == "messages"
    assert made.arrays["bag_sizes"].tolist() == [5, 5, 7, 3]
    new = features_from(features_of(made).table, prompts.texts, 12)
    assert np.array_equal(new.vectors, made.arrays["prompt_vectors"])


def test_a_prompt_that_the_template_refuses_is_named_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remoe_cli.profile.run._load", lambda *arguments: pytest.fail("the model was loaded"))
    rows = [{"messages": [{"role": "user", "content": "w1"}]}] * 100 + [{"messages": [{"role": "tool", "content": "w1"}]}]
    prompts = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=r"a\.jsonl, row 101: The model's chat template refuses the prompt: Tools are not supported\."):
        run(model, tmp_path / "profile", prompts=prompts)
    assert not (tmp_path / "profile").exists()


def test_a_template_that_cannot_be_used_stops_before_anything_runs(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ModelError, match=r"chat template of .* cannot be used"):
        run(folder, tmp_path / "profile")
    assert not (tmp_path / "profile").exists()


def test_a_model_without_a_template_is_said_to_have_none(tmp_path: Path) -> None:
    folder, said = save_checkpoint(tmp_path / "model"), []
    rows = [{"messages": [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3"}]}] * 3
    made = run(folder, tmp_path / "profile", prompts=write(tmp_path / "a.jsonl", rows), say=said.append)
    assert "joined by blank lines" in said[0]
    assert made.arrays["prompt_tokens"].tolist() == [3, 3, 3]
    said.clear()
    run(folder, tmp_path / "plain", say=said.append)
    assert "blank lines" not in " ".join(said)
