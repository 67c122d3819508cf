"""Sequences in a batch: the same answers as alone, whoever joins, leaves, is cancelled or fails meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from remoe_cli.errors import DeployError, InvokeError
from remoe_cli.runtime import batch as batches
from remoe_cli.runtime.answer import Generated, Stop
from remoe_cli.runtime.engine import Engine
from remoe_cli.runtime.sampling import Sampling
from tests.support.batching import PROMPTS, Asked, engine_of, together


@pytest.fixture(autouse=True)
def failed_steps(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Warnings of steps that were done again; in most tests there may be none."""
    expected: list[str] = []
    yield expected
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == batches.__name__] == expected


def alone(engine: Engine, asked: Asked) -> Generated:
    return engine.generate(asked.prompt, asked.tokens, sampling=asked.sampling)


def answer(generated: Generated) -> tuple[Any, ...]:
    chosen = tuple((p.token_id, p.text, pytest.approx(p.logprob, abs=1e-4), tuple(i for i, _, _ in p.top)) for p in generated.logprobs)
    return generated.token_ids, generated.text, generated.finish_reason, generated.stop_string, chosen


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba"])
def test_each_answer_is_that_of_the_request_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They join and leave at different steps, the longest neither first nor last, and prompts are read in parts."""
    engine = engine_of(family)
    asked = [Asked(step, prompt, tokens) for step, prompt, tokens in zip((0, 1, 3, 4), PROMPTS, (14, 4, 7, 12), strict=True)]
    expected = [alone(engine, each).token_ids for each in asked]
    monkeypatch.setattr(batches, "PROMPT_PART_TOKENS", 9)
    assert engine.batches
    engine.attachment.calls.clear()
    made = together(engine, asked)
    assert [each.generated().token_ids for each in made] == expected
    layers = len(engine.attachment.layers)
    assert engine.attachment.calls.total() < layers * sum(map(len, expected))  # so steps were shared


def test_a_family_with_a_cache_of_its_own_is_served_one_request_at_a_time() -> None:
    engine = engine_of("minimax")
    assert not engine.batches
    assert len(alone(engine, Asked(0, PROMPTS[0])).token_ids) == 12


def test_each_request_keeps_its_own_sampling() -> None:
    engine = engine_of("mixtral")
    stop = f"w{alone(engine, Asked(0, PROMPTS[0], 6)).token_ids[4]}"
    asked = [
        Asked(0, PROMPTS[0], 12, Sampling(stop=(stop,))),
        Asked(0, PROMPTS[1], 12, Sampling(temperature=1.0, seed=7, top_p=0.9, logprobs=2)),
        Asked(1, PROMPTS[1], 12, Sampling(temperature=1.0, seed=8, top_k=20, frequency_penalty=0.5, presence_penalty=0.5)),
        Asked(2, PROMPTS[2], 12, Sampling(repetition_penalty=1.3, logit_bias={5: 3.0}, logprobs=0)),
    ]
    assert [answer(each.generated()) for each in together(engine, asked)] == [answer(alone(engine, each)) for each in asked]
    once, again = (together(engine, [replace(asked[1], step=step), asked[3]])[0].generated() for step in (0, 3))
    assert once.token_ids == again.token_ids


def test_one_that_is_cancelled_leaves_the_others_as_they_are() -> None:
    engine, tokens = engine_of("mixtral"), list[int]()

    def stopped() -> Stop | None:
        tokens.append(0)
        return "cancelled" if len(tokens) > 8 else None

    asked = [Asked(0, PROMPTS[0]), Asked(0, PROMPTS[2], stopped=stopped), Asked(0, PROMPTS[1])]
    first, cancelled, last = together(engine, asked)
    assert cancelled.finish_reason == "cancelled" and len(cancelled.stream.ids) < 12
    assert [each.generated().token_ids for each in (first, last)] == [alone(engine, asked[i]).token_ids for i in (0, 2)]


def test_one_that_is_cancelled_while_its_prompt_is_read_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PROMPT_PART_TOKENS", 8)
    engine, asked_for = engine_of("mixtral"), list[int]()

    def stopped() -> Stop | None:
        asked_for.append(0)
        return "cancelled" if len(asked_for) > 2 else None

    asked = [Asked(0, PROMPTS[0], 12), Asked(1, PROMPTS[2], 12, stopped=stopped)]
    other, cancelled = together(engine, asked)
    assert isinstance(cancelled.error, DeployError) and "is ending" in cancelled.error.message and cancelled.read == 16
    assert other.generated().token_ids == alone(engine, asked[0]).token_ids


def test_one_that_fails_leaves_the_others_as_they_are(failed_steps: list[str]) -> None:
    """The model fails whenever it reads the token that only one of them chooses."""
    engine, poison = engine_of("mixtral"), 99

    def refuse(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == poison).any():
            raise InvokeError("An expert function failed.", "Look at it.")

    asked = [Asked(0, PROMPTS[0]), Asked(2, PROMPTS[1], sampling=Sampling(logit_bias={poison: 100})), Asked(1, PROMPTS[2])]
    expected = [alone(engine, asked[i]).token_ids for i in (0, 2)]
    assert all(poison not in ids for ids in expected)
    handle = engine.model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        first, failed, last = together(engine, asked)
    finally:
        handle.remove()
    assert isinstance(failed.error, InvokeError) and failed.stream.ids == [poison]
    failed_steps.append("A step of 3 requests failed with InvokeError; each of them does it again alone.")
    assert [each.generated().token_ids for each in (first, last)] == expected


def test_one_whose_client_fails_leaves_the_others_as_they_are() -> None:
    engine = engine_of("mixtral")

    def broken(piece: Any) -> None:
        raise OSError("gone")

    batch = engine.batch()
    failed, other = engine.sequence(PROMPTS[0], 6, broken), engine.sequence(PROMPTS[1], 6)
    batch.add(failed)
    batch.add(other)
    while len(batch):
        batch.step()
    assert isinstance(failed.error, OSError) and not failed.parts
    assert other.generated().token_ids == alone(engine, Asked(0, PROMPTS[1], 6)).token_ids


def test_a_long_prompt_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read in parts, each step gives the others a token; and a short prompt that comes later is read before it."""
    monkeypatch.setattr(batches, "PROMPT_PART_TOKENS", 16)
    engine, notes = engine_of("mixtral"), list[list[int]]()
    long = [2 + i % 120 for i in range(16 * 10)]
    made = together(engine, [Asked(0, PROMPTS[0], 20), Asked(1, long, 4), Asked(3, PROMPTS[3], 8)], notes)
    streamed, first_of_long, first_of_short = ([row[n] for row in notes] for n in range(3))
    assert streamed == [2 + step if step < 19 else 20 for step in range(len(notes))]
    assert first_of_long.index(2) - 1 >= 10 and first_of_short.index(2) <= 4
    assert made[1].generated().token_ids == alone(engine, Asked(0, long, 4)).token_ids


def test_a_prompt_alone_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PROMPT_PART_TOKENS", 4)
    engine = engine_of("mixtral")
    engine.attachment.calls.clear()
    alone(engine, Asked(0, PROMPTS[2], 3))
    engine.attachment.check_fired(3)


def test_time_is_divided_and_tokens_beside_others_are_no_sample() -> None:
    engine = engine_of("mixtral")
    first, second = (each.generated() for each in together(engine, [Asked(0, PROMPTS[0], 8), Asked(4, PROMPTS[1], 8)]))
    assert first.shared[:4] == (False,) * 4 and first.shared[-1] and all(second.shared[:-5])
    assert first.parts == second.parts == () and first.main_s and second.main_s
    assert first.main_s < first.token_times_s[-1] and len(first.further) < 7
    single = alone(engine, Asked(0, PROMPTS[0], 8))
    assert (single.parts, single.main_s, single.shared, len(single.further)) == (None, None, (), 7)
