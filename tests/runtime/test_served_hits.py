"""The routing that is counted while serving is the routing that profiling records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from remoe_cli.model.experts import attach
from remoe_cli.profile.routing import BatchRouting, RoutingRecorder, record_batch
from remoe_cli.runtime.batch import Batch
from remoe_cli.runtime.kept import Ended
from remoe_cli.runtime.main_function import MainFunction, Request
from remoe_cli.runtime.served_hits import DECODE, PREFILL, Hits
from tests.support.api_server import whole_model
from tests.support.by_hand import by_hand

PROMPTS, NEW, EXPERTS = ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [90, 3, 41], [22]), 12, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[MainFunction, BatchRouting]:
    """A main function, and what the same model's profile records of the prompts."""
    folder = tmp_path_factory.mktemp("model")
    model = by_hand(folder, ()).model
    recorder = RoutingRecorder()
    attach(model, recorder)
    return whole_model(folder / "model"), record_batch(model, recorder, PROMPTS, EXPERTS, NEW, 0)


def test_a_served_request_counts_as_its_prompt_in_a_profile(made: tuple[MainFunction, BatchRouting]) -> None:
    main, recorded = made
    for index, prompt in enumerate(PROMPTS):
        kept: list[Ended] = []
        answer = replace(main, keep=kept.append).answer(Request(prompt_token_ids=tuple(prompt), max_new_tokens=NEW))
        (served,) = kept
        assert served.kind == "answered" and served.receipt == answer.receipt and answer.observed is None
        assert served.observed is not None and served.observed.revision == main.config.model.revision
        assert np.array_equal(served.observed.prefill, recorded.prefill_counts[index])
        assert np.array_equal(served.observed.decode, recorded.decode_counts[index])


def test_several_answers_to_a_request_count_together(made: tuple[MainFunction, BatchRouting]) -> None:
    """Each of them reads the prompt. A client that asks for it gets what is kept."""
    main, recorded = made
    answer = main.answer(Request(prompt_token_ids=tuple(PROMPTS[0]), max_new_tokens=NEW, n=2, observed=True))
    assert answer.observed is not None and np.array_equal(answer.observed.prefill, 2 * recorded.prefill_counts[0])


def test_requests_in_one_batch_count_apart(made: tuple[MainFunction, BatchRouting], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that joins later, and where a step fails after its layers, and each does it again alone."""
    main, recorded = made
    sequences = [main.engine.sequence(prompt, NEW) for prompt in PROMPTS]
    batch, forward, failed = main.engine.batch(), Batch._forward, []

    def failing(self: Batch, several: Any, *arguments: Any) -> Any:
        logits = forward(self, several, *arguments)
        if len(several) == len(PROMPTS) and not failed:
            failed.append(True)
            raise RuntimeError("after the last layer")
        return logits

    monkeypatch.setattr(Batch, "_forward", failing)
    for each in sequences:
        batch.add(each)
        batch.step()
    while len(batch):
        batch.step()
    assert failed
    for index, each in enumerate(sequences):
        prefill, decode = each.hits.counts
        assert np.array_equal(prefill, recorded.prefill_counts[index]) and np.array_equal(decode, recorded.decode_counts[index])


def test_ids_of_no_expert_count_for_nothing() -> None:
    hits = Hits((4, 7), experts=3)
    hits.add(DECODE, 7, np.array([[0, 3], [-1, 2]]))
    assert hits.counts[DECODE].tolist() == [[0, 0, 0], [1, 0, 1]] and not hits.counts[PREFILL].any()
