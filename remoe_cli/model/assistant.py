"""An assistant: a small model with the same vocabulary that drafts tokens for the model that answers.

It is loaded whole, beside the model. Each answer has a cache of its own, which takes wrong tokens back. Its drafts are greedy, whatever
the request's parameters are: what becomes of a draft is decided as for every other one (draft.py, runtime/batch.py), so an assistant never
changes a token.

Source: Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023; transformers'
AssistedCandidateGenerator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.batch_cache import crop, remember, takes_drafts
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.loader import copy_weights, model_dtype, read_config, skeleton
from remoe_cli.model.products import prepare_products
from remoe_cli.model.spec import AssistantSpec, kv_layer
from remoe_cli.model.stored import quantisation

_MOST_READ = 2048  # tokens of a prompt that are read in one pass


@dataclass(frozen=True)
class Assistant:
    """A loaded assistant.

    vocabulary   token ids below this are of both models; embeddings may have more rows than the tokenizer has tokens
    """

    model: PreTrainedModel
    vocabulary: int

    def begin(self) -> AssistantDrafts:
        """Begin an answer, of which nothing is read."""
        return AssistantDrafts(self, DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    @property
    def positions(self) -> int | None:
        """Return how many tokens it has positions for; None where it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def readable(self, tokens: Sequence[int]) -> int:
        """Count the first tokens that it can read: those that it has a place and an embedding for."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        end = next((place for place, token in enumerate(tokens) if token >= rows), len(tokens))
        return end if self.positions is None else min(end, self.positions)

    def guesses(self, tokens: Sequence[int], first: int) -> list[int]:
        """Return which token it would draft after `first` of some tokens, after one more, and so on.

        It goes on to the last token that it can read. One pass tells all of them, as the tokens are known.
        """
        ids = list(tokens[: self.readable(tokens)])
        if len(ids) < first:
            return []
        logits = self.forward(ids, None, last=len(ids) - first + 1)
        return cast(list[int], logits.argmax(dim=-1).tolist())

    def forward(self, ids: Sequence[int], cache: Cache | None, last: int = 1) -> torch.Tensor:
        """Run one pass. Shapes: returns the logits of the `last` tokens, [last, vocabulary]."""
        read = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=read, past_key_values=cache, use_cache=cache is not None, logits_to_keep=last)
        return cast(torch.Tensor, out.logits[0, -last:, : self.vocabulary])


@dataclass
class AssistantDrafts:
    """The drafts of one answer.

    held   the tokens that `cache` has read
    """

    assistant: Assistant
    cache: Cache
    held: list[int] = field(default_factory=list)

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens of a prompt before anything is drafted, as far as the assistant can."""
        tokens = tokens[: self.assistant.readable(tokens)]
        self._take_back(tokens, len(tokens))
        remember(self.cache, all_tokens=False)
        for start in range(len(self.held), len(tokens), _MOST_READ):
            self._forward(tokens[start : start + _MOST_READ])

    def __call__(self, tokens: Sequence[int], most: int) -> list[int]:
        """Draft up to `most` tokens that come after some tokens."""
        positions = self.assistant.positions
        most = most if positions is None else min(most, positions - len(tokens))
        if most < 1 or self.assistant.readable(tokens) < len(tokens):
            return []
        self._take_back(tokens, len(tokens) - 1)
        # Sliding windows keep all until the next draft takes back what is wrong of this one.
        remember(self.cache, all_tokens=True)
        draft = [self._forward(tokens[len(self.held) :])]
        while len(draft) < most:
            draft.append(self._forward(draft[-1:]))
        return draft

    def _take_back(self, tokens: Sequence[int], most: int) -> None:
        """Keep what the cache has read of the first `most` tokens."""
        same = next((place for place, (a, b) in enumerate(zip(self.held, tokens, strict=False)) if a != b), len(self.held))
        kept = min(same, most)
        if self.held:
            crop(self.cache, [0], [len(self.held) - kept], kept)
        del self.held[kept:]

    def _forward(self, ids: Sequence[int]) -> int:
        logits = self.assistant.forward(ids, self.cache)
        self.held.extend(ids)
        return int(logits[-1].argmax())


def load_assistant(checkpoint: Checkpoint, vocabulary: int, device: str = "cpu", *, copied: bool = False) -> Assistant:
    """Load an assistant for a model with so many token ids.

    With `copied`, no weight stays mapped from its file.

    Raises: ModelError for a checkpoint that cannot be loaded or cannot draft.
    """
    config = _config(checkpoint)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=model_dtype(config),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({"experts_implementation": "eager"} if _has_experts(skeleton(config)) else {}),
        )
    except Exception as error:  # every family fails its own way
        raise ModelError(
            f"The assistant {checkpoint.name} cannot be loaded: {reason(error)}", "Check that the checkpoint is complete."
        ) from None
    if absent := sorted(_missing(report)):
        raise ModelError(
            f"The assistant {checkpoint.name} is missing {len(absent)} tensors, such as {absent[0]}.", "Check that it is complete."
        )
    model = cast(PreTrainedModel, model.eval().to(device))
    prepare_products(model, ())
    if copied:
        copy_weights(model)
    return Assistant(model, min(vocabulary, int(model.get_input_embeddings().weight.shape[0])))


def _missing(report: Mapping[str, Any]) -> Iterator[str]:
    yield from report["missing_keys"]
    yield from (name for name, *_ in report["mismatched_keys"])


def read_assistant_spec(checkpoint: Checkpoint) -> AssistantSpec:
    """Read the sizes of an assistant from its config.json.

    Raises: ModelError for a model that cannot draft.
    """
    config = _config(checkpoint)
    model, text = skeleton(config), config.get_text_config()
    if not takes_drafts(model):
        raise ModelError(
            f"The assistant {checkpoint.name} (family '{config.model_type}') cannot draft: its cache cannot take wrong tokens back.",
            "Give a model whose layers all have attention with keys and values.",
        )
    return AssistantSpec(
        dtype=str(model_dtype(config)).removeprefix("torch."),
        bytes=sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values()),
        hidden_layers=text.num_hidden_layers,
        kv_layers=tuple(layer for each in _one_token(model).layers if (layer := kv_layer(each)) is not None),
    )


def _config(checkpoint: Checkpoint) -> Any:
    if (settings := quantisation(checkpoint.path)) is not None:
        raise ModelError(
            f"The assistant {checkpoint.name} is stored quantised ({settings.get('quant_method')}).",
            "Give a checkpoint of it in bfloat16 or float32.",
        )
    return read_config(checkpoint)


def _has_experts(model: PreTrainedModel) -> bool:
    return any(hasattr(module, "_is_expert_parallel") for module in model.modules())


def _one_token(model: PreTrainedModel) -> Cache:
    """Send one token through a model on the meta device; its experts, if it has any, do nothing."""
    from remoe_cli.model.experts import attach

    if _has_experts(model):
        attach(model, lambda layer, hidden, index, weights: hidden)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    return cache


def refuse_other_vocabulary(model: str, tokenizer: Any, assistant: str, its: Any) -> None:
    """Refuse an assistant whose tokenizer has other tokens, or has them under other ids.

    Raises: UsageError that names a token.
    """
    own, other = tokenizer.get_vocab(), its.get_vocab()
    if own == other:
        return
    token = min((text for text in own.keys() | other.keys() if own.get(text) != other.get(text)), key=lambda text: own.get(text, len(own)))
    ids = " and ".join(
        f"{name} has it {'not' if ids.get(token) is None else f'as {ids[token]}'}" for name, ids in ((model, own), (assistant, other))
    )
    raise UsageError(
        f"The assistant {assistant} has another vocabulary than the model: of the token {token!r}, {ids}.",
        "Give a smaller model of the same family, with the same tokenizer.",
    )
