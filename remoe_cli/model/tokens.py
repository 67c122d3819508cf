"""Turning prompts into token ids, in the same way for profiling and for serving."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedModel

from remoe_cli.errors import ModelError, UsageError
from remoe_cli.model.chat import Conversation, Prompt, as_text
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.foreign_code import refuse_foreign_code


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint's tokenizer.

    Raises: ModelError when it has none, or when it or its chat template cannot be used.
    """
    refuse_foreign_code(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        empty = not tokenizer("a word", add_special_tokens=False)["input_ids"]  # as made where a family's files are missing
    except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception of the tokenizers library
        raise ModelError(
            f"The tokenizer of {checkpoint.name} cannot be loaded: {reason(error)}",
            "Put its files into the checkpoint's folder.",
        ) from None
    if empty:
        raise ModelError(
            f"{checkpoint.name} has no tokenizer: its files are missing or empty.", "Put its files into the checkpoint's folder."
        )
    _check_template(tokenizer, checkpoint)
    return tokenizer


def check_chat_template(checkpoint: Checkpoint) -> None:
    """Find a broken chat template before anything is deployed.

    A tokenizer that is not there or cannot be loaded is no error here: the main function says that when it starts.

    Raises: ModelError for a chat template that cannot be used.
    """
    refuse_foreign_code(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception:
        return
    _check_template(tokenizer, checkpoint)


def _check_template(tokenizer: Any, checkpoint: Checkpoint) -> None:
    if not has_chat_template(tokenizer):
        return
    try:
        _apply_template(tokenizer, "?", tokenize=False)
    except Exception as error:
        if type(error) is not TemplateError:  # which is raise_exception's: the template works, and refuses this prompt
            raise ModelError(
                f"The chat template of {checkpoint.name} cannot be used: {reason(error)}",
                "Mend its chat_template.jinja, or chat_template in its tokenizer_config.json.",
            ) from None


def has_chat_template(tokenizer: Any) -> bool:
    """Tell whether the tokenizer wraps prompts in a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def encode(tokenizer: Any, prompt: Prompt, limit: int | None = None) -> list[int]:
    """Encode a prompt as token ids, inside the model's chat template if it has one.

    A prompt of more than `limit` tokens is cut first, so that the template stays complete; of a conversation the longest messages are cut.
    Without a chat template the messages of a conversation are joined by blank lines.

    Raises: UsageError, in the template's own words, for a prompt that the template refuses.
    """
    if limit is not None:
        prompt = _cut(tokenizer, prompt, limit)
    if not has_chat_template(tokenizer):
        return list(tokenizer(as_text(prompt))["input_ids"])
    with _refusals():
        return list(_apply_template(tokenizer, prompt, tokenize=True)["input_ids"])


def check_prompt(tokenizer: Any, prompt: Prompt) -> None:
    """Raise UsageError, in the template's own words, for a prompt that the model's chat template refuses."""
    if has_chat_template(tokenizer):
        with _refusals():
            _apply_template(tokenizer, prompt, tokenize=False)


def known(ids: list[list[int]], model: PreTrainedModel) -> list[list[int]]:
    """Return token ids of prompts; raise ModelError for those that the model has no embeddings for.

    Its tokenizer is another model's then.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if (largest := max(map(max, ids))) >= rows:
        raise ModelError(
            f"The tokenizer makes the token {largest} of a prompt, and the model has embeddings for {rows} tokens.",
            "Put the tokenizer of this model into its folder.",
        )
    return ids


def content_ids(tokenizer: Any, prompt: Prompt, limit: int | None = None) -> list[int]:
    """Encode a prompt's own texts without what a template or the tokenizer adds; cut as `encode` does."""
    return [token for ids in _shortened(_message_ids(tokenizer, prompt), limit) for token in ids]


def _message_ids(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt.messages]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _shortened(ids: list[list[int]], limit: int | None) -> list[list[int]]:
    """Cut each text to one length: the largest with which all have at most `limit` tokens, but at least 1."""
    if limit is None or sum(map(len, ids)) <= limit:
        return ids
    length = bisect_right(range(limit + 1), limit, key=lambda most: sum(min(len(each), most) for each in ids)) - 1
    return [each[: max(1, length)] for each in ids]


def _cut(tokenizer: Any, prompt: Prompt, limit: int) -> Prompt:
    whole = _message_ids(tokenizer, prompt)
    short = _shortened(whole, limit)
    if short == whole:
        return prompt
    if isinstance(prompt, str):
        return str(tokenizer.decode(short[0]))
    contents = [
        message["content"] if cut == ids else tokenizer.decode(cut) for message, cut, ids in zip(prompt.messages, short, whole, strict=True)
    ]
    return Conversation(tuple({**message, "content": text} for message, text in zip(prompt.messages, contents, strict=True)), prompt.tools)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a template raises for a conversation that it does not expect into the user's error."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:240] if isinstance(error, TemplateError) else reason(error)
        raise UsageError(f"The model's chat template refuses the prompt: {words}", "Change the prompt, or leave it out.") from None


def _apply_template(tokenizer: Any, prompt: Prompt, *, tokenize: bool) -> Any:
    asked = Conversation(({"role": "user", "content": prompt},)) if isinstance(prompt, str) else prompt
    messages = [dict(message) for message in asked.messages]
    return tokenizer.apply_chat_template(
        messages, tools=list(asked.tools) or None, add_generation_prompt=True, tokenize=tokenize, return_dict=True
    )
