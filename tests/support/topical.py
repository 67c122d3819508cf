"""Histories of prompts on topics: what a prompt is about decides its words and, by other laws, its experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from remoe_cli.model.checkpoint import Checkpoint
from remoe_cli.model.vectors import Bags, EmbeddingTable
from remoe_cli.predict.history import History, PromptFeatures

VOCABULARY, WIDTH, TOPICS, LAYERS, EXPERTS = 400, 24, 6, 3, 8


def topical(prompts: int, *, seed: int = 0, selections: int = 300, tokens: int = 40) -> History:
    """Prompts that mix two topics each. Words of a topic lie near each other; one token in three is common to all prompts."""
    laws = np.random.default_rng(99)
    centres = laws.standard_normal((TOPICS, WIDTH))
    topic_of = laws.integers(0, TOPICS, VOCABULARY)
    common = laws.permutation(VOCABULARY)[:20]
    weight = torch.from_numpy((centres[topic_of] + 0.8 * laws.standard_normal((VOCABULARY, WIDTH))).astype(np.float32))
    likings = laws.gamma(0.5, size=(TOPICS, LAYERS, EXPERTS)) + 0.02

    random = np.random.default_rng(seed)
    bags, counts = [], np.zeros((prompts, LAYERS, EXPERTS))
    for prompt in range(prompts):
        mixture = np.zeros(TOPICS)
        mixture[random.permutation(TOPICS)[:2]] = random.dirichlet([2, 1])
        words = random.choice(VOCABULARY, tokens, p=mixture[topic_of] / mixture[topic_of].sum())
        words[random.random(tokens) < 1 / 3] = random.choice(common)
        bags.append(np.unique(words, return_counts=True))
        shares = np.tensordot(mixture, likings, axes=1)
        counts[prompt] = random.multinomial(selections, shares / shares.sum(axis=1, keepdims=True))
    bag = Bags(
        *(np.concatenate(parts).astype(np.int32) for parts in ([[len(t)] for t, _ in bags], [t for t, _ in bags], [c for _, c in bags]))
    )
    table = EmbeddingTable(Checkpoint("none", Path(), "local:0"), weight)
    known = PromptFeatures(table.sums(bag, bag.counts), bag, table)
    return History(known, counts / selections, np.full(prompts, selections))
