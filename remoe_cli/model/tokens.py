"""Prompts to token ids, the same way when profiling and when serving."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, reason


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; raises ModelError when it has none that can be used."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception of the tokenizers library
        raise ModelError(
            f"The tokenizer of {checkpoint.name} cannot be loaded: {reason(error)}", "The checkpoint's folder needs its tokenizer files."
        ) from None


def has_chat_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def encode(tokenizer: Any, prompt: str, limit: int | None = None) -> list[int]:
    """Token ids of a user's prompt, wrapped in the model's chat template when it has one.

    A prompt of more than `limit` tokens is cut before it is wrapped, so that the template stays whole.
    """
    if limit is not None:
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt = prompt if len(plain) <= limit else tokenizer.decode(plain[:limit])
    if not has_chat_template(tokenizer):
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
