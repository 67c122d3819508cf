"""What predictors learn from: prompts as vectors and bags, and how often each used each expert.

Frequencies are float64 [P, L, E] over the MoE layers that have routing; each row sums to 1. A profile has three views, because prefill
and decode route differently: `prefill` (what the paper predicts), `decode`, and `request`, both together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from remoe_cli.errors import UsageError
from remoe_cli.model.chat import Prompt
from remoe_cli.model.checkpoint import find_named, find_profiled
from remoe_cli.model.tokens import load_tokenizer
from remoe_cli.model.vectors import Bags, EmbeddingTable, bags, embedding_table, prompt_features
from remoe_cli.profile.prompts import PromptSet
from remoe_cli.profile.record import Profile

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
View = Literal["request", "prefill", "decode"]


@dataclass(frozen=True)
class PromptFeatures:
    """P prompts as predictors see them.

    vectors   float32 [P, d], sums of normalised embeddings
    bags      their distinct tokens
    table     the embeddings behind both
    """

    vectors: npt.NDArray[np.float32]
    bags: Bags
    table: EmbeddingTable

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, at: Indices) -> PromptFeatures:
        """Return some of the prompts."""
        return replace(self, vectors=self.vectors[at], bags=self.bags.take(at))


@dataclass(frozen=True)
class History:
    """Prompts, and the experts that they used.

    frequencies   float64 [P, L, E]
    selections    [P] expert choices in one layer that a prompt's frequencies are computed from: tokens times top-k
    """

    prompts: PromptFeatures
    frequencies: Floats
    selections: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, at: Indices) -> History:
        """Return some of the prompts with their frequencies."""
        return History(self.prompts.take(at), self.frequencies[at], self.selections[at])


def has_features(profile: Profile) -> bool:
    """Return whether the profile holds the features of its prompts: vectors, and bags of tokens."""
    return bool(profile.arrays["prompt_vectors"].shape[1]) and "bag_sizes" in profile.arrays


def features_of(profile: Profile, vectors_from: str | None = None, data: PromptSet | None = None) -> PromptFeatures:
    """Get the features of the profile's prompts.

    `vectors_from` names a checkpoint for the embeddings in place of the profile's; it needs the prompts' texts again, in `data`.

    Raises: UsageError when the profile has no features, or `vectors_from` has no texts; ArtifactError when the model of the profile's
    vectors has changed.
    """
    if vectors_from is not None:
        if data is None or len(data.texts) != len(profile.arrays["prompt_tokens"]):
            raise UsageError(
                f"Vectors from another checkpoint need the texts of the profile's {len(profile.arrays['prompt_tokens'])} prompts.",
                "Give the profiled prompts with --profiled-data.",
            )
        checkpoint = find_named(vectors_from)
        made = prompt_features(checkpoint, data.texts, None)
        return PromptFeatures(made["prompt_vectors"], _bags(made), embedding_table(checkpoint))
    if not has_features(profile):
        raise UsageError(
            f"The profile {profile.path} holds no prompt vectors and tokens, because it was made without prompt texts or embeddings.",
            "Give --vectors-from CHECKPOINT, and the prompts with --profiled-data.",
        )
    source = profile.record.vectors or profile.record.model
    table = embedding_table(find_profiled(source.path, source.revision))
    return PromptFeatures(profile.arrays["prompt_vectors"], _bags(profile.arrays), table)


def features_from(table: EmbeddingTable, texts: tuple[Prompt, ...], limit: int | None) -> PromptFeatures:
    """Compute the features of new prompts, by the tokenizer and the embeddings of `table`."""
    made = bags(load_tokenizer(table.checkpoint), texts, limit)
    return PromptFeatures(table.sums(made, made.counts), made, table)


def histories(profile: Profile, prompts: PromptFeatures) -> dict[View, History]:
    """Get the views for which the profile has routing, `request` first.

    A view has no prompts without a token in it.
    """
    routing = profile.record.routing
    recorded = np.isin(profile.record.spec.moe_layers, profile.record.spec.moe_layers if routing.layers is None else routing.layers)
    by_phase = {phase: profile.arrays[f"{phase}_counts"][:, recorded].astype(np.float64) for phase in routing.phases}
    views: dict[View, Floats] = {"request": sum(by_phase.values(), np.zeros(()))}
    if len(by_phase) > 1:
        views |= {"prefill": by_phase["prefill"], "decode": by_phase["decode"]}
    return {view: _history(prompts, counts) for view, counts in views.items()}


def _history(prompts: PromptFeatures, counts: Floats) -> History:
    totals = counts.sum(axis=2, keepdims=True)
    used = np.flatnonzero((totals > 0).all(axis=(1, 2)))
    return History(prompts.take(used), counts[used] / totals[used], totals[used].mean(axis=(1, 2)).astype(np.int64))


def _bags(arrays: dict[str, npt.NDArray[Any]]) -> Bags:
    return Bags(arrays["bag_sizes"], arrays["bag_tokens"], arrays["bag_counts"])
