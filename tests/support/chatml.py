"""A tiny checkpoint that chats as Qwen's models do: its template shows tools, its tokens are bytes, and an answer can end.

Its weights make it answer every chat with `SAID`: attention and experts add nothing, and each token of it is followed by the next. Where a
grammar forbids that token, all others are as likely as each other.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

TEMPLATE = """{%- if tools %}<|im_start|>system
# Tools: answer in <tool_call></tool_call>
{%- for tool in tools %}
{{ tool | tojson }}{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}
{%- if message.role == 'tool' %}
<tool_response>{{ message.tool_call_id }} {{ message.content }}</tool_response>{% else %}
{{ message.content }}{% endif %}
{%- for call in message.tool_calls or () %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
CALL = '{"name": "add", "arguments": {"a": 1}}'
SAID = ("Let me ", "add.", "<tool_call>", '\n{"name": "add", ', '"arguments": {"a"', ": ", "1}}\n", "</tool_call>", "<|im_end|>")
_SPECIAL = ("<|im_start|>", "<|im_end|>")


def save_chatml(folder: Path, said: tuple[str, ...] = SAID) -> Path:
    """Save it; `said` are different texts, each a token, and the last ends the answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(list(_SPECIAL))
    # Bytes already are tokens, and no text of `said` may be found in a prompt: it is in none, but for the tags.
    tokens.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>", "assistant", *said)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    vocabulary = tokens.get_vocab_size()
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=tokens.token_to_id("<|im_end|>"),
        pad_token_id=tokens.token_to_id("<|im_end|>"),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        embeddings.normal_()
        head.zero_()
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                weight.zero_()
        chain = [tokens.token_to_id(text) for text in ("assistant", *said)]
        for now, following in itertools.pairwise(chain):
            head[following] += embeddings[now] / 4
    model.save_pretrained(folder)
    return folder
