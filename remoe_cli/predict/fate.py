"""Fate, one of the paper's baselines: each layer's router, applied to the token embeddings.

A router sees one token at a time, so each distinct token is asked about once. The routers are the model's, so this is the only predictor
that needs the model; its experts are not loaded. Layers after the first see other hidden states than the embeddings: this is what the
method guesses, and its error.

Source: method.md, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.experts import ExpertLayer, attach
from remoe_cli.model.loader import load
from remoe_cli.predict.history import Floats, PromptFeatures

_BATCH = 4096


@dataclass(frozen=True)
class Fate:
    """Fate: predicts from what the model's own routers choose.

    tokens    [U] distinct token ids, ascending
    choices   [U, L, k] the experts that the routers choose for each
    """

    tokens: npt.NDArray[np.int32]
    choices: npt.NDArray[np.int64]
    experts: int

    def predict(self, prompts: PromptFeatures) -> Floats:
        """Predict the frequencies of Q prompts, [Q, L, E]; all their tokens must have been asked about."""
        bags, (_, layers, _) = prompts.bags, self.choices.shape
        counts = np.zeros((len(prompts), layers, self.experts))
        chosen = self.choices[np.searchsorted(self.tokens, bags.tokens)]  # [N, L, k]
        for layer in range(layers):
            for slot in chosen[:, layer].T:
                np.add.at(counts[:, layer], (bags.prompt, slot), bags.counts)
        frequencies: Floats = counts / counts.sum(axis=2, keepdims=True)
        return frequencies


def ask_routers(checkpoint: Checkpoint, tokens: npt.NDArray[np.int32], layers: Sequence[int]) -> Fate:
    """Ask the routers of these hidden layers about each token.

    Raises: ModelError for a family whose MoE block cannot be called alone.
    """
    model = load(checkpoint, keep={})
    seen: dict[int, list[Tensor]] = {}

    def see(layer: ExpertLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.setdefault(layer.layer, []).append(index)
        return hidden

    asked = [layer for layer in attach(model, see).layers if layer.layer in set(layers)]
    distinct = np.unique(tokens)
    with torch.inference_mode():
        for start in range(0, len(distinct), _BATCH):
            hidden = model.get_input_embeddings()(torch.from_numpy(distinct[None, start : start + _BATCH].astype(np.int64)))
            for layer in asked:
                block = model.get_submodule(layer.name.rpartition(".")[0])
                try:
                    block(hidden)
                except Exception as error:  # every family's block has arguments of its own
                    raise ModelError(
                        f"The routers of '{model.config.model_type}' cannot be called alone: {reason(error)}",
                        "Run the comparison without Fate.",
                    ) from None
    choices = np.stack([torch.cat(seen[layer.layer]).numpy() for layer in asked], axis=1)
    return Fate(distinct, choices.astype(np.int64), asked[0].experts)
