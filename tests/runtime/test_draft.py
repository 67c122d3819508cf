"""Drafts: prompt lookup, and answers that are the same with drafts as without, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from remoe_cli.artifacts import Part
from remoe_cli.errors import InvokeError, UsageError
from remoe_cli.model import draft
from remoe_cli.model.draft import Acceptance, Drafts, Speculate, lookup, speculate_of
from remoe_cli.profile.record import ModelRef
from remoe_cli.runtime import batch as batches
from remoe_cli.runtime.answer import Generated, Stop
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.main_function import MainFunction, Request
from remoe_cli.runtime.metrics import Metrics
from remoe_cli.runtime.sampling import GREEDY, Sampling
from remoe_cli.runtime.server_config import ServerConfig
from remoe_cli.runtime.speculate import with_speculate
from tests.support.api_server import PRICES
from tests.support.batching import PROMPTS, engine_of, guesses
from tests.support.routing_files import SPEC

SAMPLED = Sampling(temperature=1.0, seed=7, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.2, logprobs=2)


@pytest.fixture
def passes() -> Iterator[Callable[[Engine], list[tuple[int, ...]]]]:
    """Note the shape of the token ids of each forward pass."""
    handles = []

    def of(engine: Engine) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        embeddings: Any = engine.model.get_input_embeddings()
        handles.append(embeddings.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))))
        return shapes

    yield of
    for handle in handles:
        handle.remove()


def told(made: Generated) -> tuple[Any, ...]:
    """What a client gets, and what is counted: all but times, calls and drafts."""
    assert made.hits is not None
    logprobs = [(each.token_id, pytest.approx(each.logprob, abs=1e-4), [i for i, _, _ in each.top]) for each in made.logprobs]
    return made.token_ids, made.text, made.finish_reason, made.stop_string, logprobs, made.hits.counts.tolist()


def test_the_first_of_the_longest_matches() -> None:
    assert lookup([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 2) == [3, 8]
    assert lookup([7, 1, 2, 3, 8, 1, 2, 4, 9, 8, 1, 2], 2) == [4, 9]
    assert lookup([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert lookup([4, 4, 4], 3) == [4, 4, 4]
    assert lookup([1, 2, 3, 2], 3) == lookup([1], 3) == lookup([1, 2, 1, 2], 0) == lookup([1, 2, 1, 2], -1) == []


def test_drafts_become_longer_while_they_are_right_and_seldom_while_they_are_wrong() -> None:
    known, tokens = Acceptance().after(7, 0), list[int]()
    for _ in range(3):
        tokens.append(known.tokens)
        known = known.after(known.tokens, known.tokens)
    assert tokens == [1, 3, 8]
    known, tokens = Acceptance(), []
    for _ in range(60):
        tokens.append(known.tokens)
        known = known.after(known.tokens, 0)
    assert tokens[0] == 7 and tokens[-3:] == [1, 0, 0] and sum(tokens[4:]) == 18  # one is tried again now and then


def test_a_draft_ends_before_what_would_end_the_answer() -> None:
    drafts = Drafts(8)
    assert drafts.next([1, 2, 3, 4, 5, 1, 2], 9, {4}) == [3] and drafts.next([1, 2, 3, 4, 5, 1, 2], 9, {3}) == []
    assert drafts.next([1, 2, 3, 4, 5, 1, 2], 2, ()) == [3, 4] and Drafts("off").next([1, 2, 3, 4, 5, 1, 2], 9, ()) == []


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_same_answers_alone_and_in_a_batch(family: str, monkeypatch: pytest.MonkeyPatch, passes: Any) -> None:
    """Whatever of the drafts is right: also behind a sliding window, of 8 tokens, and beside answers without drafts."""
    engine = engine_of(family)
    asked: list[tuple[Sampling, Speculate, int]] = [(GREEDY, 6, 20), (SAMPLED, 3, 17), (GREEDY, "off", 12), (SAMPLED, "auto", 14)]
    plain = [engine.generate(prompt, 20, sampling=sampling) for prompt, (sampling, _, _) in zip(PROMPTS, asked, strict=True)]
    expected = [engine.generate(prompt, n, sampling=sampling) for prompt, (sampling, _, n) in zip(PROMPTS, asked, strict=True)]
    monkeypatch.setattr(draft, "lookup", guesses(plain))
    shapes = passes(engine)
    for prompt, (sampling, _, n), each in zip(PROMPTS, asked, expected, strict=True):
        del shapes[:]
        made = engine.generate(prompt, n, sampling=sampling, speculate=5)
        assert told(made) == told(each) and made.drafted.accepted > 2
        assert len(shapes) == n - made.drafted.accepted and max(width for _, width in shapes[1:]) > 3
    batch, sequences = engine.batch(), []
    for prompt, (sampling, speculate, n) in zip(PROMPTS, asked, strict=True):
        sequences.append(engine.sequence(prompt, n, sampling=sampling, speculate=speculate))
        batch.add(sequences[-1])
        batch.step()
    while len(batch):
        batch.step()
    assert [told(each.generated()) for each in sequences] == [told(each) for each in expected]
    assert sequences[0].drafts.made.accepted > 2 and sequences[1].drafts.made.accepted > 2 and not sequences[2].drafts.made.tokens


def test_a_text_that_repeats_needs_few_passes(passes: Any) -> None:
    engine, shapes = engine_of("mixtral"), passes(engine_of("mixtral"))
    again = Sampling(logit_bias={5: 100.0})
    made = engine.generate(PROMPTS[0], 24, sampling=again, speculate="auto")
    assert made.token_ids == (5,) * 24 and len(shapes) < 9
    assert made.drafted.tokens == made.drafted.accepted == 24 - len(shapes)
    assert not made.further or len(made.further) < 5  # tokens of a pass with a draft do not tell what one token takes


def test_a_stop_string_and_a_cancelled_request_end_an_answer_within_a_draft() -> None:
    engine = engine_of("mixtral")
    plain = engine.generate(PROMPTS[0], 20)
    stop = Sampling(stop=(f"w{plain.token_ids[6]} w{plain.token_ids[7]}",))
    asked, tokens = Sampling(logit_bias={5: 100.0}), list[int]()

    def stopped() -> Stop | None:
        tokens.append(0)
        return "cancelled" if len(tokens) > 9 else None

    cancelled = engine.generate(PROMPTS[0], 24, stopped=stopped, sampling=asked, speculate=8)
    assert cancelled.finish_reason == "cancelled" and 3 < len(cancelled.token_ids) < 12
    with pytest.MonkeyPatch.context() as patch:
        expected = engine.generate(PROMPTS[0], 20, sampling=stop)
        patch.setattr(draft, "lookup", guesses([plain]))
        ended = engine.generate(PROMPTS[0], 20, sampling=stop, speculate=8)
    assert told(ended) == told(expected) and ended.finish_reason == "stop" and ended.drafted.accepted


def test_no_expert_computes_what_fills_a_row_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of one pass have drafts of different lengths; the shorter ones are filled up for nothing but attention."""
    engine = engine_of("mixtral")
    monkeypatch.setattr(draft, "lookup", lambda tokens, most: [9] * most)
    batch = engine.batch()
    for prompt, speculate in zip(PROMPTS[:3], (4, "off", 1), strict=True):
        batch.add(engine.sequence(prompt, 12, speculate=speculate))  # type: ignore[arg-type]
        batch._read(batch.reading.popleft())
    seen: list[Any] = []
    monkeypatch.setattr(batch, "_sent", lambda sequences, chosen: seen.extend(ids for _, ids in chosen) or {})
    with torch.inference_mode():
        batch._decode()
    assert len(seen) == len(engine.attachment.layers)
    for ids in seen:
        assert (ids.reshape(3, 5, 2) < 8).all(axis=2).tolist() == [[True] * 5, [True] + [False] * 4, [True] * 2 + [False] * 3]
        assert (ids <= 8).all()


def test_a_step_with_drafts_that_fails_is_done_again_by_each_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine, failing = engine_of("mixtral"), [True]
    asked = Sampling(logit_bias={5: 100.0})
    expected = [told(engine.generate(prompt, 12, sampling=asked)) for prompt in PROMPTS[:2]]

    def fail_once(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] == 2 and inputs[0].shape[1] > 2 and failing:
            failing.clear()
            raise InvokeError("An expert function failed.", "Look at it.")

    embeddings: Any = engine.model.get_input_embeddings()
    handle, batch = embeddings.register_forward_pre_hook(fail_once), engine.batch()
    try:
        sequences = [engine.sequence(prompt, 12, sampling=asked, speculate=4) for prompt in PROMPTS[:2]]
        for each in sequences:
            batch.add(each)
        while len(batch):
            batch.step()
    finally:
        handle.remove()
    assert not failing and [record.name for record in caplog.records] == [batches.__name__]
    assert [told(each.generated()) for each in sequences] == expected


def main_of(family: str, speculate: Speculate = "off") -> MainFunction:
    config = ServerConfig(model=ModelRef(path="m", revision="r"), spec=SPEC, functions=(), prices=PRICES, speculate=speculate)
    return MainFunction(config, engine_of(family))


def test_a_receipt_counts_drafts_and_has_none_without() -> None:
    main = main_of("mixtral")
    request = Request(prompt_token_ids=tuple(PROMPTS[0]), max_new_tokens=12, logit_bias={5: 100.0}, n=2)
    without, with_drafts = main.answer(request), with_speculate(main, 4).answer(request)
    assert "draft" not in without.receipt.model_dump_json() and without.token_ids == with_drafts.token_ids
    receipt = with_drafts.receipt
    assert 2 < receipt.drafts <= receipt.accepted_tokens == receipt.draft_tokens <= 2 * 11 - receipt.drafts
    metrics = Metrics("m", lambda: 0, lambda: 0)
    metrics.answered(with_drafts, 0, 0)
    for name, value in (("drafts", receipt.drafts), ("draft_tokens", receipt.draft_tokens), ("accepted_tokens", receipt.accepted_tokens)):
        assert f'vllm:spec_decode_num_{name}_total{{model_name="m"}} {value:.1f}' in metrics.text().decode()
    assert main.speculate == "off" and with_speculate(main, "auto").state().speculate == "auto"


@pytest.mark.parametrize("family", ["qwen3_next", "minimax"])
def test_a_cache_that_cannot_take_tokens_back_takes_no_drafts(family: str) -> None:
    main = main_of(family, speculate=4)
    assert main.speculate == main.state().speculate == "off" and with_speculate(main, "off").speculate == "off"
    with pytest.raises(UsageError, match=f"family '{family}' takes no drafts"):
        with_speculate(main, "auto")
    request = Request(prompt_token_ids=tuple(PROMPTS[0]), max_new_tokens=6, logit_bias={5: 100.0})
    assert main.answer(request).receipt.drafts == 0


def test_the_setting_is_left_out_of_a_document_without_drafts() -> None:
    config = main_of("mixtral").config
    assert "speculate" not in config.model_dump_json()
    again = ServerConfig.model_validate_json(config.model_copy(update={"speculate": 4}).model_dump_json())
    assert isinstance(again, Part) and again.speculate == 4 and replace(main_of("mixtral"), config=again).speculate == 4


@pytest.mark.parametrize("text", ["", "0", "33", "-1", "4.0", "Auto", "٣", "9" * 5000])
def test_what_is_no_length_of_a_draft_is_refused(text: str) -> None:
    assert [speculate_of(each) for each in ("auto", "off", "1", "32")] == ["auto", "off", 1, 32]
    with pytest.raises(UsageError, match="not 'auto', 'off' or a number"):
        speculate_of(text)
