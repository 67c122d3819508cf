"""Prompts as vectors, from a checkpoint's tokenizer and embedding table. No model runs.

A prompt's vector is the sum of its tokens' L2-normalised embeddings. The cosine of two such vectors is the paper's soft cosine
similarity (tests/model/test_vectors.py compares the two forms). Beside it a prompt is kept as a bag: its distinct tokens with their
counts. Weights of words that depend on all prompts can then be computed later, and profiles of shards can be merged. The order of the
tokens is not kept. What is predicted from the vectors is not known here.

Source: method.md, section 5.
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
    """Token bags of P prompts with N entries in all, one prompt after the other.

    sizes    [P]   distinct tokens of each prompt
    tokens   [N]   their ids, ascending within a prompt
    counts   [N]   how often each occurs in its prompt
    """

    sizes: Ints
    tokens: Ints
    counts: Ints

    @property
    def prompt(self) -> npt.NDArray[np.int64]:
        """The prompt of each entry, [N]."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def take(self, prompts: npt.NDArray[np.int64]) -> Bags:
        """Return the bags of some prompts, in the given order."""
        starts = np.cumsum(self.sizes) - self.sizes
        at = np.concatenate([np.arange(starts[p], starts[p] + self.sizes[p]) for p in prompts] or [np.empty(0, dtype=np.int64)])
        return Bags(self.sizes[prompts], self.tokens[at], self.counts[at])


@dataclass(frozen=True)
class EmbeddingTable:
    """The token embeddings [V, d] of a checkpoint.

    `weight` stays in its file until rows of it are used.
    """

    checkpoint: Checkpoint
    weight: Tensor

    @property
    def width(self) -> int:
        return int(self.weight.shape[1])

    def rows(self, tokens: npt.NDArray[Any]) -> Floats:
        """Return the L2-normalised embeddings of n tokens, float32 [n, d]."""
        rows: Floats = torch.nn.functional.normalize(self.weight[torch.as_tensor(tokens, dtype=torch.long)].float(), dim=1).numpy()
        return rows

    def sums(self, bags: Bags, weights: npt.NDArray[Any]) -> Floats:
        """Sum each prompt's normalised embeddings, each times its entry in `weights`.

        Shapes: weights [N], one for each entry of the bags; returns float32 [P, d].
        """
        distinct, at = np.unique(bags.tokens, return_inverse=True)
        table = self.rows(distinct)
        out = np.zeros((len(bags.sizes), self.width), dtype=np.float32)
        first = 0
        for prompt, size in enumerate(bags.sizes.tolist()):
            out[prompt] = weights[first : first + size].astype(np.float32) @ table[at[first : first + size]]
            first += size
        return out


def embedding_table(checkpoint: Checkpoint) -> EmbeddingTable:
    """Find the input embeddings of any causal language model's checkpoint, with experts or without.

    Raises: ModelError when the checkpoint has no such tensor, or several that could be it.
    """
    model = skeleton(read_config(checkpoint))
    weight = model.get_input_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is weight)
    tail = ".".join(name.split(".")[-2:])
    found = [source for key, source in open_weights(checkpoint).items() if key.endswith(tail) and source.get_shape() == list(weight.shape)]
    if len(found) != 1:
        raise ModelError(
            f"{checkpoint.path} has {len(found)} tensors that could be its embedding table ({tail} of {list(weight.shape)}).",
            "Check that the checkpoint is complete, or name another one with --vectors-from.",
        )
    return EmbeddingTable(checkpoint, found[0][:])


def bags(tokenizer: Any, texts: Sequence[Prompt], limit: int | None) -> Bags:
    """Count the first `limit` tokens of each text, without special tokens.

    Raises: UsageError for a text without tokens.
    """
    sizes, tokens, counts = [], [], []
    for text in texts:
        distinct, times = np.unique(np.array(content_ids(tokenizer, text, limit), dtype=np.int32), return_counts=True)
        if not len(distinct):
            raise UsageError(f"The tokenizer makes no tokens of the prompt {as_text(text)!r}.", "Remove the prompt from the data.")
        sizes.append(len(distinct))
        tokens.append(distinct)
        counts.append(times.astype(np.int32))
    none = np.empty(0, dtype=np.int32)
    return Bags(np.array(sizes, dtype=np.int32), np.concatenate([none, *tokens]), np.concatenate([none, *counts]))


def prompt_features(checkpoint: Checkpoint, texts: Sequence[Prompt], limit: int | None) -> dict[str, npt.NDArray[Any]]:
    """Compute what a profile keeps of its prompts' texts. Each prompt's rows depend on that prompt alone.

    Shapes: prompt_vectors [P, d], bag_sizes [P], bag_tokens [N] and bag_counts [N].
    Raises: ModelError for a checkpoint without tokenizer or embedding table, UsageError for a text without tokens.
    """
    made = bags(load_tokenizer(checkpoint), texts, limit)
    vectors = embedding_table(checkpoint).sums(made, made.counts)
    return {"prompt_vectors": vectors, "bag_sizes": made.sizes, "bag_tokens": made.tokens, "bag_counts": made.counts}
