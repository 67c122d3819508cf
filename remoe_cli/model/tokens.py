"""Turning prompts into token ids, in the same way for profiling and for serving."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, reason


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint's tokenizer.

    Raises: ModelError when it has none that can be used.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception of the tokenizers library
        raise ModelError(
            f"The tokenizer of {checkpoint.name} cannot be loaded: {reason(error)}",
            "Put its files into the checkpoint's folder.",
        ) from None


def has_chat_template(tokenizer: Any) -> bool:
    """Tell whether the tokenizer wraps prompts in a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def encode(tokenizer: Any, prompt: str, limit: int | None = None) -> list[int]:
    """Encode a user's prompt as token ids, inside the model's chat template if it has one.

    A prompt of more than `limit` tokens is cut first, so that the template stays complete.
    """
    if limit is not None:
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt = prompt if len(plain) <= limit else tokenizer.decode(plain[:limit])
    if not has_chat_template(tokenizer):
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
