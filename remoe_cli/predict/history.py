"""What predictors learn from: prompts as vectors and bags of tokens, and how often each used each expert.

Frequencies are float64 [P, L, E] over the MoE layers that have routing; each row sums to 1. Three views of a profile are kept apart,
since prefill and decode route differently: `prefill` (what the paper predicts), `decode`, and `request`, both together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Prompt
from remoe_cli.model.checkpoint import find
from remoe_cli.model.tokens import load_tokenizer
from remoe_cli.model.vectors import Bags, EmbeddingTable, bags, embedding_table, prompt_features
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
View = Literal["request", "prefill", "decode"]


@dataclass(frozen=True)
class Prompts:
    """P prompts: their vectors float32 [P, d] (sums of normalised embeddings), their bags, and the table behind both."""

    vectors: npt.NDArray[np.float32]
    bags: Bags
    table: EmbeddingTable

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, at: Indices) -> Prompts:
        return replace(self, vectors=self.vectors[at], bags=self.bags.take(at))


@dataclass(frozen=True)
class History:
    """Prompts and what they used. `selections` [P]: expert choices per layer that a prompt's frequencies rest on (tokens times top-k)."""

    prompts: Prompts
    frequencies: Floats
    selections: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, at: Indices) -> History:
        return History(self.prompts.take(at), self.frequencies[at], self.selections[at])


def prompts_of(profile: Profile, vectors_from: str | None = None, data: PromptSet | None = None) -> Prompts:
    """The profile's prompts as features; raises UsageError when it has none and neither says where to get them.

    `vectors_from` names another checkpoint than the profile's for the embeddings; it needs the texts again, in `data`.
    """
    if vectors_from is not None:
        if data is None or len(data.texts) != len(profile.arrays["prompt_tokens"]):
            raise UsageError(
                f"Vectors from another checkpoint need the texts of the profile's {len(profile.arrays['prompt_tokens'])} prompts.",
                "Give the dataset that was profiled with --data.",
            )
        checkpoint = find(vectors_from)
        made = prompt_features(checkpoint, data.texts, None)
        return Prompts(made["prompt_vectors"], _bags(made), embedding_table(checkpoint))
    if not profile.arrays["prompt_vectors"].shape[1]:
        raise UsageError(
            f"The profile {profile.path} holds no prompt vectors: its prompts' texts or their embeddings were not at hand.",
            "Give --vectors-from CHECKPOINT, and --data with the prompts.",
        )
    source = profile.record.vectors or profile.record.model
    revision = None if source.revision.startswith("local:") else source.revision
    return Prompts(profile.arrays["prompt_vectors"], _bags(profile.arrays), embedding_table(find(source.path, revision)))


def prompts_from(table: EmbeddingTable, texts: tuple[Prompt, ...], limit: int | None) -> Prompts:
    """New prompts as features, by the same tokenizer and table."""
    made = bags(load_tokenizer(table.checkpoint), texts, limit)
    return Prompts(table.sums(made, made.counts), made, table)


def histories(profile: Profile, prompts: Prompts) -> dict[View, History]:
    """The views that the profile has routing for; `request` is always first. Prompts without any token in a view are left out of it."""
    routing = profile.record.routing
    recorded = np.isin(profile.record.spec.moe_layers, profile.record.spec.moe_layers if routing.layers is None else routing.layers)
    by_phase = {phase: profile.arrays[f"{phase}_counts"][:, recorded].astype(np.float64) for phase in routing.phases}
    views: dict[View, Floats] = {"request": sum(by_phase.values(), np.zeros(()))}
    if len(by_phase) > 1:
        views |= {"prefill": by_phase["prefill"], "decode": by_phase["decode"]}
    return {view: _history(prompts, counts) for view, counts in views.items()}


def _history(prompts: Prompts, counts: Floats) -> History:
    totals = counts.sum(axis=2, keepdims=True)
    used = np.flatnonzero((totals > 0).all(axis=(1, 2)))
    return History(prompts.take(used), counts[used] / totals[used], totals[used].mean(axis=(1, 2)).astype(np.int64))


def _bags(arrays: dict[str, npt.NDArray[Any]]) -> Bags:
    return Bags(arrays["bag_sizes"], arrays["bag_tokens"], arrays["bag_counts"])
