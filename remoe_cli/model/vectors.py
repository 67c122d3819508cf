"""Prompts as vectors, from a checkpoint's tokenizer and embedding table alone: no layer is loaded, nothing is run.

One vector a prompt: the sum of its tokens' L2-normalised embeddings. The cosine of two such vectors is the paper's soft cosine
similarity (method section 5; tests/model/test_vectors.py holds the two forms against each other). Beside it a prompt is kept as a bag, its
distinct tokens with their counts, so that other weightings, which depend on all prompts, can be made later and shards can be joined.
The order of the tokens is not kept.

This module does not know what is predicted from the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.chat import Prompt, as_text
from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.loader import open_weights, read_config, skeleton
from remoe_cli.model.tokens import content_ids, load_tokenizer

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Bags:
    """Token bags of P prompts, one after the other: sizes [P] distinct tokens each, their ids (ascending within a prompt) and counts."""

    sizes: Ints
    tokens: Ints
    counts: Ints

    @property
    def prompt(self) -> npt.NDArray[np.int64]:
        """The prompt that each entry belongs to."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def take(self, prompts: npt.NDArray[np.int64]) -> Bags:
        """The bags of some prompts, in the order given."""
        starts = np.cumsum(self.sizes) - self.sizes
        at = np.concatenate([np.arange(starts[p], starts[p] + self.sizes[p]) for p in prompts] or [np.empty(0, dtype=np.int64)])
        return Bags(self.sizes[prompts], self.tokens[at], self.counts[at])


@dataclass(frozen=True)
class EmbeddingTable:
    """L2-normalised token embeddings of a checkpoint, [V, d]; `weight` stays in its file until rows are asked for."""

    checkpoint: Checkpoint
    weight: Tensor

    @property
    def width(self) -> int:
        return int(self.weight.shape[1])

    def rows(self, tokens: npt.NDArray[Any]) -> Floats:
        """The normalised embeddings of some tokens, float32 [n, d]."""
        rows: Floats = torch.nn.functional.normalize(self.weight[torch.as_tensor(tokens, dtype=torch.long)].float(), dim=1).numpy()
        return rows

    def sums(self, bags: Bags, weights: npt.NDArray[Any]) -> Floats:
        """Per prompt the sum of its distinct tokens' embeddings, each times its entry in `weights`; float32 [P, d]."""
        distinct, at = np.unique(bags.tokens, return_inverse=True)
        table = self.rows(distinct)
        out = np.zeros((len(bags.sizes), self.width), dtype=np.float32)
        first = 0
        for prompt, size in enumerate(bags.sizes.tolist()):
            out[prompt] = weights[first : first + size].astype(np.float32) @ table[at[first : first + size]]
            first += size
        return out


def embedding_table(checkpoint: Checkpoint) -> EmbeddingTable:
    """The input embeddings of any causal language model's checkpoint, dense or not; raises ModelError when they cannot be found."""
    model = skeleton(read_config(checkpoint))
    weight = model.get_input_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is weight)
    tail = ".".join(name.split(".")[-2:])
    found = [source for key, source in open_weights(checkpoint).items() if key.endswith(tail) and source.get_shape() == list(weight.shape)]
    if len(found) != 1:
        raise ModelError(
            f"{checkpoint.path} has {len(found)} tensors that could be its embedding table ({tail} of {list(weight.shape)}).",
            "Check that the checkpoint is whole, or take the vectors from another one with --vectors-from.",
        )
    return EmbeddingTable(checkpoint, found[0][:])


def bags(tokenizer: Any, texts: Sequence[Prompt], limit: int | None) -> Bags:
    """The texts' first `limit` tokens each, without special tokens; raises UsageError for a text without any token."""
    sizes, tokens, counts = [], [], []
    for text in texts:
        distinct, times = np.unique(np.array(content_ids(tokenizer, text, limit), dtype=np.int32), return_counts=True)
        if not len(distinct):
            raise UsageError(f"The tokenizer makes no tokens of the prompt {as_text(text)!r}.", "Remove it from the dataset.")
        sizes.append(len(distinct))
        tokens.append(distinct)
        counts.append(times.astype(np.int32))
    none = np.empty(0, dtype=np.int32)
    return Bags(np.array(sizes, dtype=np.int32), np.concatenate([none, *tokens]), np.concatenate([none, *counts]))


def prompt_features(checkpoint: Checkpoint, texts: Sequence[Prompt], limit: int | None) -> dict[str, npt.NDArray[Any]]:
    """What a profile keeps of its prompts' texts: `prompt_vectors` [P, d], `bag_sizes` [P], `bag_tokens` and `bag_counts` [N].

    Each prompt's part depends on that prompt alone, so that shards are joined by concatenation. Raises ModelError when the checkpoint has
    no tokenizer or no embedding table, UsageError for a text without tokens.
    """
    made = bags(load_tokenizer(checkpoint), texts, limit)
    vectors = embedding_table(checkpoint).sums(made, made.counts)
    return {"prompt_vectors": vectors, "bag_sizes": made.sizes, "bag_tokens": made.tokens, "bag_counts": made.counts}
