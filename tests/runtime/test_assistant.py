"""An assistant's drafts: they are its own greedy tokens, and answers are the same with them as without, in fewer passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model import draft
from remoe_cli.model.assistant import Assistant, load_assistant, read_assistant_spec, refuse_other_vocabulary
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.draft import Drafts, Speculate
from remoe_cli.runtime.main_function import Request
from remoe_cli.runtime.sampling import GREEDY, Sampling
from tests.runtime.test_draft import SAMPLED, main_of, told
from tests.support.assistants import assistant_of, checkpoint_of, nothing_found, save_dense
from tests.support.batching import PROMPTS, engine_of
from tests.support.families import VOCAB_SIZE, build


@pytest.fixture
def unfound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in the text, so that the assistant makes all drafts."""
    monkeypatch.setattr(draft, "lookup", nothing_found)


@pytest.mark.parametrize("name", ["dense", "mixtral", "gpt_oss"])
@torch.inference_mode()
def test_drafts_are_the_assistants_own_greedy_tokens_whatever_was_taken_back(name: str) -> None:
    """Also behind a sliding window, of 8 tokens, and after tokens that others have made."""
    assistant, random = assistant_of(name), torch.Generator().manual_seed(3)
    drafts, tokens = assistant.begin(), [*PROMPTS[2]]
    drafts.read(tokens[:20])
    drafts.read(tokens)
    tokens.append(7)
    for accepted, others in ((0, 1), (4, 0), (2, 1), (6, 3), (6, 1), (0, 9), (5, 1)):
        made = drafts(tokens, 6)
        ids = torch.tensor([tokens])
        greedy = assistant.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert made == greedy[0, len(tokens) :].tolist()
        tokens += made[:accepted] + torch.randint(2, VOCAB_SIZE, (others,), generator=random).tolist()
        if accepted == 2:  # a prompt that is read again after a step that failed
            drafts.read(tokens)
            tokens.append(9)


@pytest.mark.usefixtures("unfound")
@pytest.mark.parametrize(
    ("family", "name"), [("mixtral", "mixtral"), ("mixtral", "dense"), ("deepseek_v3", "gpt_oss"), ("gpt_oss", "gpt_oss")]
)
def test_the_same_answers_alone_and_in_a_batch(family: str, name: str) -> None:
    plain, engine = engine_of(family), replace(engine_of(family), assistant=assistant_of(name))
    asked: list[tuple[Sampling, Speculate, int]] = [(GREEDY, 6, 20), (SAMPLED, 3, 17), (GREEDY, "off", 12), (SAMPLED, "auto", 14)]
    expected = [plain.generate(prompt, n, sampling=sampling) for prompt, (sampling, _, n) in zip(PROMPTS, asked, strict=True)]
    for prompt, (sampling, _, n), each in zip(PROMPTS, asked, expected, strict=True):
        made = engine.generate(prompt, n, sampling=sampling, speculate=4)
        assert told(made) == told(each) and made.drafted.tokens == made.drafted.assistant_tokens > 3
        if family == name and sampling is GREEDY:  # it is the model itself, so all of its drafts are right
            assert made.drafted.accepted == made.drafted.tokens >= n * 3 / 5
    batch, sequences = engine.batch(), []
    for prompt, (sampling, speculate, n) in zip(PROMPTS, asked, strict=True):
        sequences.append(engine.sequence(prompt, n, sampling=sampling, speculate=speculate))
        batch.add(sequences[-1])
        batch.step()
    while len(batch):
        batch.step()
    assert [told(each.generated()) for each in sequences] == [told(each) for each in expected]
    assert [bool(each.drafts.made.assistant_tokens) for each in sequences] == [True, True, False, True]


def test_the_assistant_drafts_where_nothing_is_found_and_each_learns_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Helper:
        def read(self, tokens: Any) -> None:
            asked.append(-1)

        def __call__(self, tokens: Any, most: int) -> list[int]:
            asked.append(most)
            return [40, 41, 42][:most]

    drafts = Drafts(3, Helper())
    drafts.read([1])
    assert drafts.next([1, 2, 3, 1, 2], 9, ()) == [3, 1, 2] and not drafts.by_assistant and asked == [-1]
    drafts.learn(3, 0)
    assert drafts.next([1, 2, 3, 4], 2, ()) == [40, 41] and drafts.by_assistant and asked == [-1, 2]
    drafts.learn(2, 2)
    assert drafts.next([1, 2, 3, 4], 9, {41}) == [40] and drafts.next([1, 2, 3, 4], 9, {40}) == [] and not drafts.by_assistant
    assert drafts.made == (2, 5, 2, 1, 2, 2)
    assert drafts.acceptance.tokens < 3 < drafts.assisted.tokens  # the one was wrong, the other right
    assert Drafts("off", Helper()).next([1, 2, 3, 4], 9, ()) == []


@pytest.mark.usefixtures("unfound")
def test_a_receipt_tells_drafts_by_source(monkeypatch: pytest.MonkeyPatch) -> None:
    main = main_of("mixtral", 3)
    helped = replace(main, engine=replace(main.engine, assistant=assistant_of("mixtral")))
    request = Request(prompt_token_ids=tuple(PROMPTS[0]), max_new_tokens=12)
    without, receipt = main.answer(request), helped.answer(request).receipt
    assert receipt.assistant_draft_tokens == receipt.draft_tokens == receipt.assistant_accepted_tokens > 6
    assert receipt.assistant_drafts == receipt.drafts > 2 and "assistant" not in without.receipt.model_dump_json()


@pytest.mark.usefixtures("unfound")
def test_an_assistant_that_fails_ends_the_answer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = assistant_of("dense")
    engine = replace(engine_of("mixtral"), assistant=assistant)
    monkeypatch.setattr(Assistant, "forward", lambda *arguments, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS[0], 6, speculate=2)
    assert len(engine.generate(PROMPTS[0], 6).token_ids) == 6


def test_tokens_that_the_assistant_cannot_read_get_no_draft(tmp_path: Path) -> None:
    assistant = load_assistant(Checkpoint("small", save_dense(tmp_path, vocab_size=60, max_position_embeddings=24)), VOCAB_SIZE)
    assert (assistant.vocabulary, assistant.positions) == (60, 24)
    drafts, tokens = assistant.begin(), [*range(2, 22)]
    drafts.read(tokens)
    with torch.inference_mode():
        assert [len(drafts(tokens + [3] * more, 5)) for more in (0, 1, 3, 4, 9)] == [4, 3, 1, 0, 0]
        assert drafts([2, 99, 3], 5) == [] and len(drafts([2, 50, 3], 5)) == 5
        assert len(assistant.guesses([*tokens, *tokens], 20)) == 5 and assistant.guesses([2, 99, 3], 2) == []
    more = load_assistant(Checkpoint("large", save_dense(tmp_path / "large", vocab_size=200)), VOCAB_SIZE)
    assert more.vocabulary == VOCAB_SIZE
    with torch.inference_mode():
        assert max(more.guesses(PROMPTS[2], 1)) < VOCAB_SIZE


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    for family in ("qwen3_next", "minimax"):
        with pytest.raises(ModelError, match="its cache cannot take wrong tokens back"):
            read_assistant_spec(checkpoint_of(family))
    folder = save_dense(tmp_path / "quantised")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(ModelError, match=r"stored quantised \(fp8\)"):
        load_assistant(Checkpoint("q", folder), VOCAB_SIZE)
    folder = save_dense(tmp_path / "more")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match="is missing 9 tensors"):
        load_assistant(Checkpoint("m", folder), VOCAB_SIZE)


def test_another_vocabulary_is_refused_with_a_token() -> None:
    tokenizer = engine_of("mixtral").tokenizer

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {**tokenizer.get_vocab(), "w5": 6, "w6": 5}

    refuse_other_vocabulary("m", tokenizer, "a", tokenizer)
    with pytest.raises(
        UsageError, match=r"The assistant a has another vocabulary than the model: of the token 'w5', m has it as 5 and a has it as 6."
    ):
        refuse_other_vocabulary("m", tokenizer, "a", Other())


@pytest.mark.parametrize("name", ["dense", "mixtral", "gpt_oss"])
def test_sizes_are_those_of_the_loaded_model(name: str) -> None:
    spec, assistant = read_assistant_spec(checkpoint_of(name)), assistant_of(name)
    assert spec.bytes == sum(p.numel() * p.element_size() for p in assistant.model.parameters()) and spec.hidden_layers == 2
    drafts = assistant.begin()
    with torch.inference_mode():
        drafts.read(PROMPTS[2])
    held = [getattr(layer, each) for layer in drafts.cache.layers for each in ("keys", "values")]
    assert spec.kv_cache_bytes(len(PROMPTS[2])) == sum(each.numel() * each.element_size() for each in held)
    assert build("mixtral").config.vocab_size == VOCAB_SIZE
