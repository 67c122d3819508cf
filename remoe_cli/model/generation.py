"""generation_config.json: how a model wants its answers made, as far as remoe can follow it.

remoe makes one answer at a time, and streams it.

Stop strings are honoured. What asks for more than one way on (beams, several sequences), for a second model, or for code is set aside by
name when the model is loaded: `set_aside` lists it, so that every command can say so once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria

from remoe_cli.errors import ModelError
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.foreign_code import read_object

FILE = "generation_config.json"
# What is set aside, and the values with which it asks for nothing.
_ASIDE: Mapping[str, tuple[Any, ...]] = {
    # more than one sequence
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("constraints", "force_words_ids"), ()),
    # another way of decoding, a second model, or code of the hub
    **dict.fromkeys(("penalty_alpha", "use_mtp"), (0, False)),
    **dict.fromkeys(("dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model", "custom_generate"), ()),
    **dict.fromkeys(("guidance_scale",), (1,)),
    **dict.fromkeys(("token_healing", "trust_remote_code"), (False,)),
    # what `generate` takes from its caller only
    **dict.fromkeys(("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "streamer"), ()),
    **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask", "continuous_batching_config", "compile_config"), ()),
    # other forward passes, another result, an end that depends on the machine
    **dict.fromkeys(("prefill_chunk_size", "max_time"), ()),
    "use_cache": (True,),
    "return_dict_in_generate": (False,),
    "cache_implementation": ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked"),
    "cache_config": (),
}


def read_generation_config(checkpoint: Checkpoint, default: GenerationConfig) -> GenerationConfig:
    """Read generation_config.json, without stop strings and what is set aside.

    `default` is that of config.json, where a checkpoint has no such file.

    Raises: ModelError for a file that transformers cannot use.
    """
    if not (checkpoint.path / FILE).is_file():
        for name in (*set_aside(checkpoint), "stop_strings"):
            setattr(default, name, None)
        return default
    settings = read_object(checkpoint, FILE)
    try:
        if not settings:
            GenerationConfig.from_pretrained(checkpoint.path)  # says what is wrong with the file
        return GenerationConfig.from_dict({key: value for key, value in settings.items() if key not in (*_ASIDE, "stop_strings")})
    except Exception as error:  # every setting is checked in its own way
        raise ModelError(f"{checkpoint.path}/{FILE} cannot be used: {reason(error)}", "Correct the file or remove it.") from None


def set_aside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """List by name the generation settings of a checkpoint that remoe does not follow."""
    settings = _settings(checkpoint)
    aside = [key for key, harmless in _ASIDE.items() if settings.get(key) is not None and settings[key] not in harmless]
    if settings.get("stop_strings") and not stop_strings(checkpoint):
        aside.append("stop_strings")
    return tuple(sorted(aside))


def warning(checkpoint: Checkpoint) -> str | None:
    """Say in one sentence what is set aside; None where nothing is."""
    aside = set_aside(checkpoint)
    if not aside:
        return None
    return f"Not followed of the model's generation settings, as remoe makes one answer at a time: {', '.join(aside)}."


def stop_strings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the texts that end an answer; none where the setting is no text and no list of texts."""
    stop = _settings(checkpoint).get("stop_strings")
    strings = [stop] if isinstance(stop, str) else stop
    return tuple(strings) if isinstance(strings, list) and all(isinstance(each, str) and each for each in strings) else ()


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_object(checkpoint, FILE if (checkpoint.path / FILE).is_file() else "config.json")


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends each sequence whose answer holds a stop string, and keeps where.

    transformers' StopStringCriteria cannot be used: it fails on tokenizers that do not know the letters "abcdef". Like that, this looks at
    the text with special tokens, as "<|im_end|>" is a usual stop string.

    ends   for each sequence of a batch, the tokens (with the prompt's) after which it ended; 0 while it goes on
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self.strings, self._prompt = tokenizer, tuple(strings), 0
        self.ends = torch.zeros(0, dtype=torch.long)

    def begin(self, sequences: int, prompt_tokens: int) -> StopStrings:
        """Begin a batch, whose prompts have this many tokens with their padding."""
        self.ends, self._prompt = torch.zeros(sequences, dtype=torch.long), prompt_tokens
        return self

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in enumerate(input_ids[:, self._prompt :].tolist() if self.strings else ()):
            if not self.ends[row]:
                text = self._tokenizer.decode(ids)
                if any(each in text for each in self.strings):
                    self.ends[row] = input_ids.shape[1]
        return (self.ends > 0).to(input_ids.device)


def visible(text: str, strings: Sequence[str], *, ended: bool | None) -> str:
    """Return how much of an answer's text can be shown: nothing of a stop string, also not its beginning.

    `ended` is None while the answer goes on; True when a stop string has ended it, False when something else has.

    >>> [visible(text, ["###"], ended=None) for text in ("one #", "one # two", "one ### two")]
    ['one ', 'one # two', 'one ']
    >>> visible("one #", ["###"], ended=False), visible("one ### two", ["###"], ended=True)
    ('one #', 'one ')
    """
    if ended is False:
        return text
    cut = min((at for each in strings if (at := text.find(each)) >= 0), default=len(text))
    if ended is None:
        parts = (len(text) - n for each in strings for n in range(1, len(each)) if text.endswith(each[:n]))
        cut = min((cut, *parts))
    return text[:cut]
