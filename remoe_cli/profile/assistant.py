"""The assistant of a profile: finding it, and what it takes on this machine.

Its acceptance is in acceptance.py, what it drafts in model/assistant.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from remoe_cli import interrupts
from remoe_cli.errors import UsageError
from remoe_cli.model.assistant import Assistant, read_assistant_spec, refuse_other_vocabulary
from remoe_cli.model.batch_cache import takes_drafts
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.loader import read_config, skeleton
from remoe_cli.model.tokens import load_tokenizer
from remoe_cli.profile.curves import fit_linear
from remoe_cli.profile.latency_record import AssistantTimes
from remoe_cli.profile.pass_times import PROMPT_TOKENS, ROUNDS, now
from remoe_cli.profile.record import AssistantRef
from remoe_cli.progress import Report

_CACHED_TOKENS, _DRAFT_TOKENS = 64, 8
_DRAFTS = 4  # in a round


def assistant_ref(model: Checkpoint, tokenizer: Any, assistant: Checkpoint, report: Report) -> AssistantRef:
    """Identify an assistant for a model, and read its sizes. `report` is that of `digests.sha256_of`.

    Raises: UsageError for a model that takes no drafts, or another vocabulary; ModelError for an assistant that cannot draft.
    """
    config = read_config(model)
    if not takes_drafts(skeleton(config)):
        raise UsageError(
            f"A model of family '{config.model_type}' takes no drafts: its cache cannot take wrong tokens back.", "Leave --assistant out."
        )
    spec = read_assistant_spec(assistant)
    refuse_other_vocabulary(model.name, tokenizer, assistant.name, load_tokenizer(assistant))
    return AssistantRef(path=assistant.name, revision=assistant.identify(report), spec=spec)


def time_assistant(assistant: Assistant) -> AssistantTimes:
    """Time an assistant as the main function runs it: reading prompts, and drafting after a cached one."""
    drawn, device = torch.Generator().manual_seed(0), assistant.model.device

    def tokens(count: int) -> list[int]:
        ids: list[int] = torch.randint(assistant.vocabulary, (count,), generator=drawn).tolist()
        return ids

    def reading_s(count: int) -> float:
        ids, drafts = tokens(count), assistant.begin()
        start = now(device)
        drafts.read(ids)
        return now(device) - start

    def drafting_s() -> float:
        ids, drafts = tokens(_CACHED_TOKENS), assistant.begin()
        drafts.read(ids[:-1])
        start = now(device)
        drafts(ids, _DRAFT_TOKENS)
        return (now(device) - start) / _DRAFT_TOKENS

    with torch.inference_mode():
        drafting_s()  # pages the weights in
        rounds: list[Sequence[float]] = []
        for _ in range(ROUNDS):
            interrupts.check()
            rounds.append([statistics.median(drafting_s() for _ in range(_DRAFTS)), *(reading_s(count) for count in PROMPT_TOKENS)])
    decode_s, *reading = (statistics.median(column) for column in zip(*rounds, strict=True))
    return AssistantTimes(prefill=fit_linear(PROMPT_TOKENS, reading), decode_s=decode_s)
